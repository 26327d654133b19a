"""Which equivalent scalings a decoder block offers, found from the roles of its parts and kept only
if they hold numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from spikellm.models.families import block_roles, weight_and_bias
from spikellm.nn.attention import HeadShape
from spikellm.transforms.fusion import OFFSETS
from spikellm.transforms.smoothing import Pair, Scaling, State, holds


def find_pairs(
    block: nn.Module,
    shape: HeadShape | None,
    wanted: Iterable[str],
    run: Callable[[nn.Module, State], Tensor],
    seed: int,
) -> tuple[list[Pair], list[str]]:
    """Pairs that hold, and names of those that were dropped because they do not.

    Args:
        block: float32 block with layers in the form ``(out, in)``.
        shape: heads of its attention, where known.
        wanted: ``norm``, ``value-output``, ``up-down``, ``query-key``.
        run: see :func:`spikellm.transforms.smoothing.holds`.
        seed: of the random scales of the check.
    """
    kept, dropped = [], []
    for variants in _candidates(block, shape, set(wanted)):
        found = next((pair for pair in variants if holds(block, pair, run, seed)), None)
        if found is None:
            dropped.append(variants[0].name)
        else:
            kept.append(found)
    return kept, dropped


def _candidates(block: nn.Module, shape: HeadShape | None, wanted: set[str]) -> list[list[Pair]]:
    """Variants of every pair that the block might offer."""
    roles, candidates = block_roles(block), []
    if "norm" in wanted:
        for norm, readers in (
            ("attention_norm", ("query", "key", "value", "fused")),
            ("feedforward_norm", ("gate", "up")),
        ):
            consumers = tuple(roles[reader] for reader in readers if reader in roles)
            if norm in roles and consumers:
                candidates.append(
                    [_norm_pair(block, roles[norm], consumers, offset) for offset in OFFSETS]
                )
    if "value-output" in wanted and shape is not None and {"value", "output"} <= roles.keys():
        candidates.append([_value_output(block, roles["value"], roles["output"], shape)])
    if "up-down" in wanted and {"gate", "up", "down"} <= roles.keys():
        candidates.append([_between(block, "up-down", roles["up"], roles["down"])])
    if "query-key" in wanted and shape is not None and {"query", "key"} <= roles.keys():
        candidates.append([_query_key(block, roles["query"], roles["key"], shape)])
    return candidates


def _norm_pair(block: nn.Module, norm: str, consumers: tuple[str, ...], offset: float) -> Pair:
    length = weight_and_bias(block.get_submodule(consumers[0]))[0].shape[1]
    index = torch.arange(length)
    scalings = [Scaling(f"{norm}.weight", 0, -1, index, offset)]
    if isinstance(getattr(block.get_submodule(norm), "bias", None), Tensor):
        scalings.append(Scaling(f"{norm}.bias", 0, -1, index))
    scalings += [Scaling(f"{name}.weight", 1, 1, index) for name in consumers]
    return Pair(
        f"{norm} -> {', '.join(name.rpartition('.')[2] for name in consumers)}",
        length,
        tuple(scalings),
        consumers,
    )


def _rows(block: nn.Module, layer: str, power: int, index: Tensor) -> list[Scaling]:
    has_bias = weight_and_bias(block.get_submodule(layer))[1] is not None
    return [
        Scaling(f"{layer}.{part}", 0, power, index)
        for part in (("weight", "bias") if has_bias else ("weight",))
    ]


def _between(block: nn.Module, name: str, producer: str, consumer: str) -> Pair:
    length = weight_and_bias(block.get_submodule(producer))[0].shape[0]
    index = torch.arange(length)
    return Pair(
        name,
        length,
        (*_rows(block, producer, -1, index), Scaling(f"{consumer}.weight", 1, 1, index)),
        (consumer,),
    )


def _value_output(block: nn.Module, value: str, output: str, shape: HeadShape) -> Pair:
    """One scale for each channel of each key-value head, repeated for the query heads that share
    it.
    """
    channels = torch.arange(shape.heads * shape.value_channels).view(
        shape.heads, shape.value_channels
    )
    columns = weight_and_bias(block.get_submodule(output))[0].shape[1]
    repeated = channels.repeat_interleave(max(1, columns // channels.numel()), dim=0).flatten()
    return Pair(
        "v -> o",
        channels.numel(),
        (*_rows(block, value, -1, channels.flatten()), Scaling(f"{output}.weight", 1, 1, repeated)),
        (output,),
    )


def _query_key(block: nn.Module, query: str, key: str, shape: HeadShape) -> Pair:
    """One scale for each pair of dimensions i and i + d/2 of each key head, which rotary embedding
    mixes.
    """
    half = shape.key_channels // 2
    tied = torch.arange(shape.heads * half).view(shape.heads, half).repeat(1, 2)
    rows = weight_and_bias(block.get_submodule(query))[0].shape[0]
    repeated = tied.repeat_interleave(max(1, rows // tied.numel()), dim=0).flatten()
    return Pair(
        "q <-> k",
        shape.heads * half,
        (*_rows(block, query, 1, repeated), *_rows(block, key, -1, tied.flatten())),
    )
