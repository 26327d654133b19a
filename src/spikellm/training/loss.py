"""Losses of next tokens: divergence from the original, and that of the text itself."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def distillation_loss(
    logits: Tensor, wanted: Tensor | None, targets: Tensor, own: float = 0.0
) -> Tensor:
    """``(1 − own) · KL(original ‖ converted) + own · loss of the text``, summed over tokens, nats.

    Args:
        logits: of the converted model, ``(tokens, vocabulary)``.
        wanted: of the original; None where ``own`` is 1.
        targets: int64 ``(tokens,)``.
        own: share of the language model's own loss.
    """
    return cast(Tensor, _Distillation.apply(logits, wanted, targets, own))  # type: ignore[no-untyped-call]


class _Distillation(torch.autograd.Function):
    """The gradient is made with the loss, so that one matrix of a vocabulary's width is kept."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, wanted: Tensor | None, targets: Tensor, own: float
    ) -> Tensor:
        logs = torch.log_softmax(logits.float(), -1)
        loss = logs.new_zeros(())
        if own > 0:
            loss -= own * logs.gather(1, targets.unsqueeze(1)).sum()
        goal: Tensor | None = None
        if wanted is not None and own < 1:
            goal = torch.log_softmax(wanted.float(), -1)
            difference = goal - logs
            goal.exp_()
            loss += (1 - own) * torch.dot(goal.flatten(), difference.flatten())
            del difference
        gradient = logs.exp_()
        if goal is not None:
            gradient.sub_(goal, alpha=1 - own)
        if own > 0:
            gradient.scatter_add_(
                1, targets.unsqueeze(1), gradient.new_full((len(targets), 1), -own)
            )
        ctx.save_for_backward(gradient.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None
