"""A learned basis of the residual stream: readers lose less in it, by the sums that it is learned
from and by the errors of a model that is coded.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import spikellm
from conftest import first_blocks
from spikellm.core.errors import RecipeError
from spikellm.recipe.load import load_recipe
from spikellm.transforms.stream_basis import Site, learn_basis, mean_loss


def sites(width: int, count: int = 3) -> list[Site]:
    """Moments that are uneven in a basis of their own, the same for all."""
    generator = torch.Generator().manual_seed(width)
    turned, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))

    def moments() -> Tensor:
        sizes = torch.logspace(-1.5, 1.5, width, dtype=torch.float64)
        sizes = sizes * (1 + 0.3 * torch.rand(width, generator=generator, dtype=torch.float64))
        found = (turned * sizes) @ turned.T
        return found / found.trace()

    return [Site(moments(), moments().flip(0, 1)) for _ in range(count)]


def test_a_learned_basis_loses_less_and_keeps_lengths_and_the_constant_vector() -> None:
    found, identity = sites(24), torch.eye(24, dtype=torch.float64)
    basis = learn_basis(found, identity)
    assert mean_loss(found, basis.float()) < mean_loss(found, identity.float()) - 0.1
    torch.testing.assert_close(basis @ basis.T, identity, rtol=0, atol=1e-10)
    ones = torch.ones(24, dtype=torch.float64)
    torch.testing.assert_close(ones @ basis, ones, rtol=0, atol=1e-4)


def test_blocks_lose_less_in_it(text_file: Path) -> None:
    losses = {}
    for transforms in (
        "[norm-equalization]",
        "[{name: residual-rotation, basis: learned}, norm-equalization]",
    ):
        model, tokenizer = first_blocks(2, dtype="float32")
        online = "{name: online-rotation, layers: [attention-input, feedforward-input]}"
        settings = [f"transforms={transforms[:-1]}, {online}]"]
        found = spikellm.convert(
            model, tokenizer, "rtn-w4a4", str(text_file), samples=16, seqlen=64, settings=settings
        )
        losses[transforms] = sum(block.loss for block in found.blocks)
    without, learned = losses.values()
    assert learned < without


def test_without_scales_behind_norms_it_is_refused() -> None:
    with pytest.raises(RecipeError, match="no effect without norm-equalization"):
        load_recipe("rtn-w4a4", ["transforms=[{name: residual-rotation, basis: learned}]"])
