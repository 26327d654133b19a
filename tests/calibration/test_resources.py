"""What a conversion needs, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spikellm
from conftest import BUNDLED
from interruptions import bytes_of
from spikellm import workflow
from spikellm.calibration.activations import ActivationStore
from spikellm.calibration.resources import Needs
from spikellm.errors import RequestError
from spikellm.resources import choose_store

GIB = 1 << 30


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_states_in_a_file_are_those_in_ram(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    import tempfile

    batches = [torch.randn(*shape, 4).to(dtype) for shape in shapes]
    with tempfile.TemporaryDirectory() as place:
        ram, disk = ActivationStore(batches), ActivationStore(batches, Path(place))
        other, kept = ram.copy(), disk.copy()
        for store in (ram, disk):
            store[0] = store[0] * 2
        for store, same in ((ram, disk), (other, kept)):
            assert all(torch.equal(store[i], same[i]) for i in range(len(store)))
        assert ram.bytes == disk.bytes == sum(batch.nbytes for batch in batches)
        assert list(Path(place).iterdir()) == [], "the file has no name"


def test_the_store_changes_no_byte(text_file: Path, tmp_path: Path) -> None:
    for store in ("ram", "disk"):
        workflow.convert_to_folder(
            str(BUNDLED),
            tmp_path / store,
            "spike-w4a4-t2",
            str(text_file),
            samples=2,
            seqlen=32,
            settings=["omniquant.epochs=1"],
            store=store,
        )
    assert {k: v for k, v in bytes_of(tmp_path / "ram").items() if k != "README.md"} == {
        k: v for k, v in bytes_of(tmp_path / "disk").items() if k != "README.md"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "ram"]


@pytest.mark.parametrize(
    ("needs", "wanted", "expected"),
    [
        (Needs(1 * GIB, 2 * GIB, 1, 1), "auto", "ram"),
        (Needs(6 * GIB, 2 * GIB, 1, 1), "auto", "disk"),
        (Needs(1 * GIB, 2 * GIB, 1, 1), "disk", "disk"),
        (Needs(7 * GIB, 2 * GIB, 1, 1), "ram", "ram"),
        (Needs(9 * GIB, 2 * GIB, 1, 1), "ram", "needs about 11.0 GiB of RAM and 10.0 GiB are free; take fewer --samples, or --store disk"),
        (Needs(1, 12 * GIB, 1, 1), "auto", "12.0 GiB of RAM"),
        (Needs(6 * GIB, 1, 30 * GIB, 30 * GIB), "auto", "66.0 GiB of disk"),
    ],
)
def test_what_does_not_fit_is_refused(needs: Needs, wanted: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10 * GIB))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50 * GIB))
    if expected in ("ram", "disk"):
        assert choose_store(needs, wanted, tmp_path / "out.partial") == (None if expected == "ram" else tmp_path / "out.partial")
    else:
        with pytest.raises(RequestError, match=expected):
            choose_store(needs, wanted, tmp_path / "out.partial")


def test_an_unknown_store(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected auto, ram, disk"):
        workflow.convert_to_folder(str(BUNDLED), tmp_path / "out", "w4a4-t2", str(text_file), store="tape")


def test_estimates_are_of_the_right_size(text_file: Path) -> None:
    """The journal is what the codes take; the block holds at least its weights in float32."""
    told: list[Needs] = []
    model, tokenizer = spikellm.load(BUNDLED)
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    spikellm.convert(model, tokenizer, "gptq-w4a16", str(text_file), samples=2, seqlen=32, store=told.append)
    assert told[0].block >= 4 * block
    assert told[0].streams == 2 * 2 * 32 * model.config.hidden_size * 2
    assert 0.9 * 5 * block / 2 <= told[0].journal <= 1.1 * 5 * block / 2
