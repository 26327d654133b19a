"""The native way through attention: heads coded in one pass, products with cached rows that are
never unpacked as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from spikellm.kernels.native import ops

if TYPE_CHECKING:
    from spikellm.nn.head_codec import HeadCoder

MOST_QUERIES = 16
"""New tokens up to which products with rows are taken one by one.

For more, unpacking once and a matrix product are faster.
"""


def plan_for(coder: HeadCoder, x: Tensor) -> Tensor | None:
    """What kernels need of a coder.

    None where torch has to do the work: no kernels, another device, a gradient, a compiled model,
    ranges over the sequence.
    """
    if (
        x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and x.requires_grad)
        or not ops.native()
    ):
        return None
    return coder.plan(x.shape[-1])


def to_rows(coder: HeadCoder, x: Tensor) -> Tensor | None:
    """Packed rows of ``(batch, heads, tokens, channels)``."""
    plan = plan_for(coder, x)
    return (
        None
        if plan is None
        else cast(Tensor, ops.code_heads(x.float(), plan, coder.row_bytes(x.shape[-1])))
    )


def fake_quantize(coder: HeadCoder, x: Tensor) -> Tensor | None:
    """Values of ``(batch, heads, tokens, channels)`` after coding."""
    plan = plan_for(coder, x)
    return None if plan is None else cast(Tensor, ops.code_heads(x.float(), plan, 0))


class PackedKV(NamedTuple):
    """Cached keys or values of one layer.

    Attributes:
        rows: uint8 ``(batch, key-value heads, tokens, row bytes)``.
        plan: of their coder.
        channels: of a head.
    """

    rows: Tensor
    plan: Tensor
    channels: int

    def scores(self, query: Tensor) -> Tensor:
        """``query @ keys.T`` of decoded keys, for ``(batch, heads, queries, channels)``, heads
        sharing keys included.
        """
        return cast(Tensor, ops.key_scores(query, self.rows, self.plan))

    def sums(self, weights: Tensor) -> Tensor:
        """``weights @ values`` of decoded values, for ``(batch, heads, queries, tokens)``."""
        return cast(Tensor, ops.value_sums(weights, self.rows, self.plan, self.channels))

    def placeholder(self) -> Tensor:
        """What the model hands from the cache to attention: a tensor of the right shape without
        memory of its own, NaN to whoever computes with it.
        """
        batch, heads, tokens, _ = self.rows.shape
        x = torch.full((), torch.nan).expand(batch, heads, tokens, self.channels)
        x.spikellm_rows = self  # type: ignore[attr-defined]
        return x


def rows_of(x: Tensor) -> PackedKV | None:
    """Rows that a stand-in stands for; None of a tensor that is what it looks like."""
    return getattr(x, "spikellm_rows", None)
