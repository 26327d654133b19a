"""What a registered factory has to make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from spikellm.core.errors import RecipeError
from spikellm.neurons import SoftResetNeuron, neurons
from spikellm.recipe import recipe_from


class Lookalike:
    """Has what a neuron seems to need, and is none."""

    levels, signed = 3, False
    encode = decode = stepped = binary = simulate = SoftResetNeuron.decode


@dataclass(frozen=True)
class OwnDecode(SoftResetNeuron):
    def decode(self, code: Tensor, theta: Tensor, baseline: Tensor) -> Tensor:  # type: ignore[misc]
        return super().decode(code, theta, baseline) + 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Lookalike(), "neuron 'other' is a Lookalike; expected a SoftResetNeuron"),
        (OwnDecode(levels=3), "neuron 'other' overrides decode"),
    ],
)
def test_what_is_no_soft_reset_neuron_is_refused_in_one_line(
    made: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(neurons._entries, "other", lambda bits: made)
    with pytest.raises(RecipeError, match=message) as found:
        recipe_from(
            {"name": "r", "algorithm": "rtn", "activations": {"bits": 4, "neuron": "other"}},
            "here",
        )
    assert "\n" not in str(found.value)
