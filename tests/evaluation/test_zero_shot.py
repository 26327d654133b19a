from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.core.errors import DependencyError, RequestError, SpikeLLMError
from spikellm.evaluation.zero_shot import PAPER, expand

QUESTIONS = [
    {
        "question": "Return a list of",
        "choices": ["all the names in the module", "purple elephants", "the"],
        "answer": 0,
    },
    {
        "question": "If the file does not exist, raise",
        "choices": ["a banana", "an exception of type OSError"],
        "answer": 1,
    },
    {
        "question": "This function is",
        "choices": ["deprecated", "deprecated since version 3", "sky"],
        "answer": 1,
    },
    {
        "question": "The default value is",
        "choices": ["None", "water and some other things that are long"],
        "answer": 0,
    },
    {
        "question": "Split the string at",
        "choices": ["the first occurrence of the separator", "noon"],
        "answer": 1,
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task of five questions."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (place / "docstrings.yaml").write_text(f"""
task: docstrings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place / "questions.jsonl"}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3.0}}
""")
    return place


def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracies from log-likelihoods of every choice, one at a time."""
    plain, normalised = [], []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["question"]).input_ids
            whole = tokenizer(f"{row['question']} {choice}").input_ids
            with torch.no_grad():
                logits = (
                    model(torch.tensor([whole[:-1]]), use_cache=False)
                    .logits[0]
                    .float()
                    .log_softmax(-1)
                )
            scores.append(
                sum(
                    float(logits[place - 1, whole[place]])
                    for place in range(len(prompt), len(whole))
                )
            )
        sizes = [len(choice) for choice in row["choices"]]
        plain.append(scores.index(max(scores)) == row["answer"])
        per_letter = [score / size for score, size in zip(scores, sizes, strict=True)]
        normalised.append(per_letter.index(max(per_letter)) == row["answer"])
    return sum(plain) / len(rows), sum(normalised) / len(rows)


@pytest.mark.parametrize("converted", [False, True])
def test_accuracy_is_that_of_log_likelihoods_by_hand(
    folder: Path, converted_folder: Path, converted: bool
) -> None:
    model, tokenizer = spikellm.load(converted_folder if converted else BUNDLED)
    found = spikellm.zero_shot(
        model, tokenizer, "docstrings", folder=folder, trust_remote_code=True
    )["docstrings"]
    assert (found.accuracy, found.normalised_accuracy) == by_hand(model, tokenizer, QUESTIONS)
    assert (found.version, found.shots, found.documents) == (3.0, 0, 5)
    share = found.accuracy
    assert share is not None
    assert found.accuracy_stderr == pytest.approx(math.sqrt(share * (1 - share) / 4))


def test_limit_shots_and_batches(bundled: tuple[Any, Any], folder: Path) -> None:
    one = spikellm.zero_shot(
        *bundled, ["docstrings"], folder=folder, trust_remote_code=True, limit=2
    )["docstrings"]
    assert one.documents == 2
    assert one.accuracy == by_hand(*bundled, QUESTIONS[:2])[0]
    shots = spikellm.zero_shot(
        *bundled, ["docstrings"], folder=folder, trust_remote_code=True, shots=2
    )["docstrings"]
    assert shots.shots == 2
    told: list[tuple[int, int]] = []
    batched = spikellm.zero_shot(
        *bundled,
        ["docstrings"],
        folder=folder,
        trust_remote_code=True,
        batch_size=4,
        on_batch=lambda *progress: told.append(progress),
    )["docstrings"]
    assert {total for _, total in told} == {sum(len(row["choices"]) for row in QUESTIONS)}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert batched.accuracy == by_hand(*bundled, QUESTIONS)[0]


def test_bos_is_what_the_harness_adds(
    bundled: tuple[Any, Any], bos_tokenizer: Any, folder: Path
) -> None:
    model, tokenizer = bundled
    seen: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, arguments: seen.append(int(arguments[0][0, 0]))
    )
    with pytest.raises(RequestError, match="adds no BOS token by itself"):
        spikellm.zero_shot(model, tokenizer, "docstrings", bos="always")
    for used, bos, there in (
        (tokenizer, "auto", False),
        (bos_tokenizer, "auto", True),
        (bos_tokenizer, "always", True),
        (bos_tokenizer, "never", False),
    ):
        seen.clear()
        spikellm.zero_shot(
            model, used, "docstrings", folder=folder, trust_remote_code=True, limit=1, bos=bos
        )
        assert seen
        assert {token == 0 for token in seen} == {there}, bos


MORE_TASKS = {
    "written": "generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}\n"
    "metric_list: [{metric: bleu}]",  # its error is bootstrapped, with a bar of its own
    "read": "loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}]",
}


def test_the_harness_is_silent(
    bundled: tuple[Any, Any],
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its bars, and git in a folder that is no repository."""
    for name, body in MORE_TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'questions.jsonl'}}}}}\n"
            "test_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
            f"output_type: {body}\n"
        )
    shutil.copy(folder / "docstrings.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    capfd.readouterr()
    names = ["docstrings", *MORE_TASKS]
    found = spikellm.zero_shot(*bundled, names, folder=tmp_path, limit=2, trust_remote_code=True)
    assert found.keys() == set(names)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_tokenizer_without_padding(bundled: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = bundled
    tokenizer.pad_token = None
    assert (
        spikellm.zero_shot(
            model, tokenizer, "docstrings", folder=folder, trust_remote_code=True, batch_size=3
        )["docstrings"].documents
        == 5
    )


def test_command(capsys: pytest.CaptureFixture[str], folder: Path, converted_folder: Path) -> None:
    assert (
        main(
            [
                "eval",
                str(converted_folder),
                "--tasks",
                "docstrings",
                "--task-folder",
                str(folder),
                "--trust-remote-code",
                "--limit",
                "3",
                "--json",
                "-",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["perplexity"] == {}
    assert result["tasks"]["docstrings"].keys() >= {
        "accuracy",
        "normalised_accuracy",
        "version",
        "shots",
        "documents",
    }
    assert "Traceback" not in captured.err
    assert (
        main(
            [
                "eval",
                str(converted_folder),
                "--tasks",
                "docstrings",
                "--task-folder",
                str(folder),
                "--trust-remote-code",
            ]
        )
        == 0
    )
    table = capsys.readouterr().out
    assert "docstrings" in table
    assert "accuracy" in table


def test_names() -> None:
    assert expand("paper") == list(PAPER)
    assert expand(" piqa , paper,x") == [
        "piqa",
        "arc_easy",
        "arc_challenge",
        "boolq",
        "hellaswag",
        "winogrande",
        "x",
    ]
    with pytest.raises(RequestError, match="no task is named"):
        expand(" , ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "docstring"], "did you mean docstrings"),
        (["--tasks", "docstrings", "--limit", "0"], "at least 1 document"),
        (["--tasks", "docstrings", "--task-folder", "/nowhere"], "no folder"),
        (["--tasks", ","], "no task is named"),
        (["--shots", "2", "--perplexity", "stdlib"], "--shots"),
        ([], "--perplexity or --tasks"),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], words: str
) -> None:
    place = (
        []
        if "--task-folder" in arguments or "--tasks" not in arguments
        else ["--task-folder", str(folder), "--trust-remote-code"]
    )
    assert main(["eval", str(BUNDLED), *arguments, *place]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1]


@pytest.mark.slow
def test_data_that_is_not_here_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The tasks of the paper come from the hub, which tests do not reach."""
    assert main(["eval", str(BUNDLED), "--tasks", "paper", "--limit", "1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert "the data of task 'piqa'" in error[-1]
    assert "--task-folder" in error[-1]


def test_damaged_task_files(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "task: bad\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        " /nowhere/q.jsonl}}\ntest_split: test\n"
    )
    with pytest.raises((RequestError, DependencyError), match="bad"):
        spikellm.zero_shot(*bundled, "bad", folder=tmp_path, trust_remote_code=True)


BODY = """dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_choice: [a, b]
"""
ATTACKS = {
    "function": {
        "bad.yaml": f"task: bad\n{BODY}doc_to_text: question\ndoc_to_target: !function helper.f\n"
    },
    "tag": {
        "bad.yaml": (
            f"%TAG !x! !func\n---\ntask: bad\n{BODY}doc_to_text: question\ndoc_to_target: !x!tion"
            " helper.f\n"
        )
    },
    "include": {
        "bad.yaml": "task: bad\ninclude: hidden.txt\n",
        "hidden.txt": f"{BODY}doc_to_text: question\ndoc_to_target: !function helper.f\n",
    },
    "template": {
        "bad.yaml": (
            f"task: bad\n{BODY}doc_to_text: \"{{{{ cycler.__init__.__globals__.os.system('touch"
            " RAN') }}\"\ndoc_to_target: answer\n"
        )
    },
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_code_in_task_files_is_not_run_unasked(
    bundled: tuple[Any, Any], folder: Path, tmp_path: Path, attack: str
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "helper.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\ndef f(doc): return 0\n"
    )
    for name, text in ATTACKS[attack].items():
        (tmp_path / name).write_text(
            text.replace("QUESTIONS", str(folder / "questions.jsonl")).replace("RAN", str(ran))
        )
    with pytest.raises(RequestError, match="--trust-remote-code"):
        spikellm.zero_shot(*bundled, "bad", folder=tmp_path)
    assert not ran.exists()
    with contextlib.suppress(
        SpikeLLMError
    ):  # these tasks are no good, but their code has run by then: each attack is one
        spikellm.zero_shot(*bundled, "bad", folder=tmp_path, trust_remote_code=True)
    assert ran.exists()


def test_missing_harness(bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DependencyError, match=r"spikellm\[eval\]"):
        spikellm.zero_shot(*bundled, "docstrings")
