"""Which channels are rotated is chosen whatever the weight format is."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.recipe.base import WeightOptions
from spikellm.transforms.online_rotation import Trial, choose_signs


class Narrow(WeightOptions):
    format: Literal["narrow"] = "narrow"

    @property
    def bits(self) -> int:
        return 1


class Wide(Narrow):
    @property
    def bits(self) -> int:
        return 12


@pytest.mark.parametrize("weights", [Narrow(), Wide()])
def test_bits_that_affine_codes_do_not_have(
    weights: WeightOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WeightOptions.registry._entries, "narrow", type(weights))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    x[:, 3] *= 100  # an outlier, which a rotation spreads
    settings = LinearRecipe(weights=weights, activations=ActivationRecipe(bits=4))
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    trial = Trial("layer", x, weight, settings, 0)
    signs = choose_signs(trial, "loss")
    candidates = list(trial.candidates(choose_signs(trial, "all")))
    least = min(trial.loss(candidate) for candidate in candidates)
    assert trial.loss(signs) == least
