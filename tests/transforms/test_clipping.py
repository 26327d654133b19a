from __future__ import annotations

from typing import Any

import torch

from spikellm.quantization.ste import WeightCoding, fake_quantize_weight
from spikellm.transforms.clipping import initial_logits


def test_clipping_can_be_learned() -> None:
    """One huge weight in a row: narrowing the range pays, and the gradient finds it."""
    weight, coding = (
        torch.randn(1, 200, generator=torch.Generator().manual_seed(0)),
        WeightCoding([7], False, [(0, 200)], None),
    )
    weight[0, 0] = 12
    inputs = torch.randn(500, 200, generator=torch.Generator().manual_seed(1))
    inputs[:, 0] = 0
    gamma, beta = initial_logits(1, 1)
    for logit in (gamma, beta):
        logit.requires_grad_(True)
    optimizer = torch.optim.Adam([gamma, beta], lr=0.1)
    losses: list[Any] = []
    for _ in range(150):
        coded = fake_quantize_weight(weight, coding, (gamma, beta))
        loss = (inputs @ (coded - weight).T).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses) < 0.5 * losses[0]
    assert float(gamma.detach()) < 2
