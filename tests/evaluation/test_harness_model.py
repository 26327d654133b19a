"""``lm_eval --model spikellm``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import PROJECT
from spikellm.core.errors import RequestError
from spikellm.evaluation.harness import quiet
from spikellm.nn.execution import spiking_linears


def harness_model(**arguments: Any) -> Any:
    """As the harness's command makes it."""
    with quiet():
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import get_model

        command = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
        return get_model("spikellm").create_from_arg_obj(arguments, command)


def test_harness_knows_spiking_models(converted_folder: Path) -> None:
    made = harness_model(
        pretrained=str(converted_folder), execution="stepped", max_length=128, dtype="float32"
    )
    layers = spiking_linears(made.model).values()
    assert {layer.execution_mode for layer in layers} == {"stepped"}
    assert made.max_length == 128

    model, tokenizer = spikellm.load(converted_folder, dtype="float32")
    context, continuation = "Return a list of", " names"
    with quiet(), torch.no_grad():
        from lm_eval.api.instance import Instance

        [(found, _)] = made.loglikelihood(
            [Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True
        )
        start = len(tokenizer(context).input_ids)
        whole = tokenizer(context + continuation, return_tensors="pt").input_ids
        likelihoods = model(whole, use_cache=False).logits[0].float().log_softmax(-1)
    wanted = sum(
        float(likelihoods[place - 1, whole[0, place]]) for place in range(start, whole.shape[1])
    )
    assert found == pytest.approx(wanted, abs=1e-4)


def test_arguments_without_effect_are_refused(converted_folder: Path) -> None:
    with pytest.raises(RequestError, match="'parallelize' has no effect"):
        harness_model(pretrained=str(converted_folder), parallelize=True)


@pytest.mark.slow
def test_command_of_the_harness(converted_folder: Path, tmp_path: Path, installed: Path) -> None:
    """In a fresh process, with the package installed and imported by nobody but torch."""
    (tmp_path / "q.jsonl").write_text('{"question": "Return a", "choices": ["list", "x"]}\n')
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: q.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "spikellm", "--tasks", "mine"),
            *("--model_args", f"pretrained={converted_folder}", "--include_path", str(tmp_path)),
        ],
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(installed), str(PROJECT / "src")]),
        },
        capture_output=True,
        text=True,
    )
    assert "|mine|" in done.stdout.replace(" ", ""), done.stderr
