"""The two matrix products of attention: scores (queries and keys) and values (probabilities and
values), with the sizes that their operations are counted from.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from spikellm.models.plain_attention import Operands
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain
from spikellm.profiling.counts import DENSE_BITS, Operations


class AttentionProduct(NamedTuple):
    """One product of attention, of an operand that is in the cache and one that is not.

    Attributes:
        name: ``scores`` or ``values``.
        cached: ``key`` or ``value``; its channels may take several steps.
        arriving: ``query`` or ``probabilities``.
        macs: multiply-accumulates of the whole matrix, not of its causal half.
        operands: numbers of the cached operand.
        outputs: numbers that come out, an accumulator each.
        fan_out: synapses of a spike of either operand, by operand.
    """

    name: str
    cached: str
    arriving: str
    macs: int
    operands: int
    outputs: int
    fan_out: dict[str, int]


def products_of_attention(seen: Operands) -> tuple[AttentionProduct, AttentionProduct]:
    """Scores and values of one call of an attention module."""
    batch, heads, queries, channels = seen.query.shape
    shared, keys, outputs = seen.key.shape[1], seen.key.shape[2], seen.value.shape[-1]
    pairs = batch * heads * queries * keys
    cached_fan_out = queries * (heads // shared)
    return (
        AttentionProduct(
            "scores",
            "key",
            "query",
            pairs * channels,
            seen.key.numel(),
            pairs,
            {"query": keys, "key": cached_fan_out},
        ),
        AttentionProduct(
            "values",
            "value",
            "probabilities",
            pairs * outputs,
            seen.value.numel(),
            batch * heads * queries * outputs,
            {"probabilities": outputs, "value": cached_fan_out},
        ),
    )


def operations_of_product(
    product: AttentionProduct, spikes: SpikingAttention | None, train: SpikeTrain | None
) -> Operations:
    """Multiply-accumulates of a product as executed in steps, by the bits of both operands.

    Args:
        train: spikes of the cached operand, None where it does not spike.
    """
    if spikes is None:
        bits, steps = (DENSE_BITS, DENSE_BITS), 1.0
    else:
        arriving = getattr(spikes.settings, product.arriving)
        cached = getattr(spikes.settings, product.cached)
        bits, steps = (arriving.bits, cached.bits), 1.0
        if train is not None:
            steps = float(train.steps.expand(train.shown.shape).float().mean())
    executed = Counter({bits: round(product.macs * steps)})
    return Operations(product.macs, executed, operands=product.operands)
