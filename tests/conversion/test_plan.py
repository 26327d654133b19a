"""What a conversion refuses before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import first_blocks
from spikellm.algorithms import algorithms
from spikellm.algorithms.rtn import RoundToNearest
from spikellm.conversion.plan import plan_conversion
from spikellm.core.errors import RequestError
from spikellm.nn.formats import formats
from spikellm.nn.formats.affine import AffineFormat
from spikellm.recipe.load import load_recipe


class TernaryToo(RoundToNearest):
    formats = ("affine", "ternary")


class OddFormat(AffineFormat):
    coding = "odd"


def refusal(algorithm: str, *settings: str) -> str:
    model: Any = first_blocks(1)[0]
    recipe = load_recipe("w4a16", [f"algorithm={algorithm}", *settings])
    with pytest.raises(RequestError) as caught:
        plan_conversion(
            model, torch.zeros(1, 32, dtype=torch.long), recipe, algorithms[algorithm]()
        )
    return str(caught.value)


def test_algorithms_that_take_the_codes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(algorithms._entries, "other", TernaryToo)
    assert refusal("rtn", "weights={format: ternary}").endswith(
        "which has kind 'ternary'; set algorithm to block-ap or gptq or other, or choose another"
        " format"
    )


def test_where_no_algorithm_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats._entries, "affine", OddFormat())
    assert refusal("gptq").endswith("which has kind 'odd'; choose another format")
