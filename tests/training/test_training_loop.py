"""The loop of training: interrupted and resumed, on several ranks, at once or in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import BUNDLED
from spikellm.core.errors import CheckpointError, RequestError
from spikellm.training import run
from spikellm.training.loss import distillation_loss

QUICK = (
    "training.seqlen=32",
    "training.batch=2",
    "training.held_out=2",
    "training.check_every=2",
)


class Interrupted(Exception):  # noqa: N818  a signal
    """Stands for a signal."""


def train(folder: Path, text: Path, journal: Path | None, stop: int = -1, **more: Any) -> Any:
    def on_step(progress: Any) -> None:
        if progress.step == stop:
            raise Interrupted

    model, tokenizer = spikellm.load(folder)
    settings = (*QUICK, *more.pop("settings", ()))
    spikellm.train(
        model,
        tokenizer,
        BUNDLED,
        text,
        steps=5,
        settings=settings,
        journal=journal,
        on_step=on_step,
        **more,
    )
    return model.state_dict(), model.config.quantization_config.record["training"]


@pytest.fixture(scope="module")
def whole(converted_folder: Path, text_file: Path) -> Any:
    return train(converted_folder, text_file, None)


@pytest.mark.parametrize("stop", [1, 4])
def test_interrupted_and_resumed_it_ends_in_the_same_bytes(
    stop: int,
    converted_folder: Path,
    text_file: Path,
    tmp_path: Path,
    whole: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_WRITES", 0.0)
    with pytest.raises(Interrupted):
        train(converted_folder, text_file, tmp_path / "j", stop)
    state, record = train(converted_folder, text_file, tmp_path / "j")
    assert record == whole[1]
    assert state.keys() == whole[0].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole[0].items())


def test_a_journal_of_something_else_is_refused(
    converted_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_WRITES", 0.0)
    with pytest.raises(Interrupted):
        train(converted_folder, text_file, tmp_path / "j", 2)
    with pytest.raises(RequestError, match=r"recipe\.training\.rate"):
        train(converted_folder, text_file, tmp_path / "j", settings=["training.rate=0.1"])
    (tmp_path / "j" / "training.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="delete it to train again"):
        train(converted_folder, text_file, tmp_path / "j")


def test_windows_one_by_one_give_the_same_gradients(
    converted_folder: Path, text_file: Path, whole: Any
) -> None:
    _, record = train(converted_folder, text_file, None, settings=["training.at_once=1"])
    assert record["losses"][0] == pytest.approx(whole[1]["losses"][0], rel=1e-3)


@pytest.mark.parametrize("own", [0.0, 0.3, 1.0])
def test_the_gradient_of_the_loss(own: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, wanted = torch.randn(2, 5, 7, generator=generator, dtype=torch.float32)
    targets = torch.randint(0, 7, (5,), generator=generator)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = distillation_loss(ours, wanted, targets, own)
    (loss * 2).backward()
    divergence = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"
    )
    text = torch.nn.functional.cross_entropy(theirs, targets, reduction="sum")
    expected = (1 - own) * divergence + own * text
    (expected * 2).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
