"""Scales between layers: channels are divided on one side and multiplied on the other, so that they
lose least together once they are rotated and coded (:func:`even_scale`).

    query-key       K rows / s, Q rows · s; the two channels that rotary embedding mixes share one s
    up-down         up rows / s, down columns · s
    value-output    V rows / s, O columns · s, one s for the query heads that share a value head
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from spikellm.transforms.base import Transform, transforms
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.fusion import Fusion
from spikellm.transforms.options import EqualizationOptions
from spikellm.transforms.value_heads import find_value_heads

_OBSERVED = {
    "query-key": ("query-heads", "key-heads"),
    "up-down": ("down",),
    "value-output": ("output",),
}


@transforms.register("equalization")
class Equalization(Transform[EqualizationOptions]):
    """Scales at the sites that a recipe names; a block that lets none through there says so."""

    Options = EqualizationOptions

    def observes(self, state: BlockState) -> Collection[str]:
        return [observed for site in self._sites(state) for observed in _OBSERVED[site]]

    def in_words(self) -> str:
        return f"channels of {' and '.join(self.options.sites)} equalized (fused)"

    def prepare_block(self, state: BlockState) -> None:
        work = {
            "query-key": _query_key,  # first: it is put into the block at once
            "up-down": _up_down,
            "value-output": _value_output,
        }
        wanted = self._sites(state)
        for site, equalize in work.items():
            if site in wanted and (problem := equalize(state)):
                state.notes.append(f"equalization: {problem}")

    def _sites(self, state: BlockState) -> list[str]:
        """Q and K are only seen where attention is reached."""
        return [
            site
            for site in self.options.sites
            if site != "query-key" or state.plan.heads is not None
        ]


def _query_key(state: BlockState) -> str | None:
    """Scale Q and K against each other; says why it cannot."""
    why = "this block has no query and key layers of its own"
    if {"query", "key"} <= state.roles.keys():
        fusion = _scaled_query_key(state)
        if fusion is not None and state.put_if_equal(fusion, at=state.roles.get("output")):
            return None
        why = (
            "what stands between this block's query and key layers and their products lets no"
            " scale through"
        )
    return f"{why}, so Q and K stay as they are"


def _scaled_query_key(state: BlockState) -> Fusion | None:
    """Scaled weights of Q and K; None where their sizes are not those of the heads."""
    shape, names = state.plan.heads, state.roles
    assert shape is not None
    fusion, half = Fusion(state.module), shape.key_channels // 2
    rows = fusion.weight(names["query"]).shape[0]
    own = fusion.weight(names["key"]).shape[0]
    query, key = state.inputs["query-heads"], state.inputs["key-heads"]
    whole = own == shape.heads * shape.key_channels and 2 * half == shape.key_channels
    if not whole or rows % own or query.shape[1] != rows:
        return None
    shared = rows // own
    spread = key - key.mean(0) if state.recipe.attention.center else key
    power = spread.square().mean(0).view(shape.heads, 2, half).sum(1)
    energy = query.square().mean(0).view(shape.heads, shared, 2, half).sum((1, 2))
    scale = even_scale(power.flatten(), energy.flatten()).view(shape.heads, 1, 1, half)
    of_key, of_query = (scale.expand(-1, count, 2, -1).flatten() for count in (1, shared))
    fusion.rows(names["key"], lambda x: x / of_key)
    fusion.rows(names["query"], lambda x: x * of_query)
    return fusion


def _up_down(state: BlockState) -> str | None:
    """Scale what up gives, and down reads; says why it cannot."""
    if not {"gate", "up", "down"} <= state.roles.keys():
        return (
            "what stands between this block's feed-forward layers lets no scale through, so they"
            " stay as they are"
        )
    down, fusion = state.roles["down"], state.fusion
    inputs = state.inputs["down"]
    scale = even_scale(state.power("down"), fusion.weight(down).square().sum(0))
    fusion.rows(state.roles["up"], lambda x: x / scale)
    fusion.columns(down, lambda x: x * scale)
    state.inputs["down"] = inputs / scale
    return None


def _value_output(state: BlockState) -> str | None:
    """Scale what V gives, and the output layer reads; says why it cannot."""
    heads = find_value_heads(state)
    if heads is None:
        return (
            "this block has no value layer of its own, so what the output layer reads stays as it"
            " is"
        )
    fusion, inputs = state.fusion, state.inputs["output"]
    scale = even_scale(
        heads.summed(state.power("output")),
        heads.summed(fusion.weight(heads.output).square().sum(0)),
    )
    wide = heads.repeated(scale)
    fusion.rows(heads.value, lambda x: x / scale)
    fusion.columns(heads.output, lambda x: x * wide)
    state.inputs["output"] = inputs / wide
    if "value-heads" in state.inputs:
        state.inputs["value-heads"] = state.inputs["value-heads"] / scale
    return None


def even_scale(power: Tensor, energy: Tensor) -> Tensor:
    """The scale s that loses least where ``x / s`` is rotated and coded: ``(E[x²] / ‖W‖²)^¼``, of
    geometric mean 1; 1 for dead channels.

    Rotated channels share one range, whose square follows ``Σ E[x²]/s²``, and each error weighs ``Σ
    s²‖W‖²`` on average; the product is least, by Cauchy and Schwarz, where ``s⁴`` follows
    ``E[x²]/‖W‖²``.

    Args:
        power: mean square of every channel, ``(channels,)``.
        energy: squared norm of the columns that read it, ``(channels,)``.
    """
    alive = (power > 0) & (energy > 0)
    scale = (
        torch.where(alive, power.double() / energy.double().clamp(min=1e-300), 1.0).clamp(
            1e-12, 1e12
        )
        ** 0.25
    )
    centre = scale[alive].log().mean().exp() if bool(alive.any()) else 1.0
    return torch.where(alive, scale / centre, 1.0)
