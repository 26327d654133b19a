"""Running a list of operations, or some of it, in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikellm.kernels.native import build
from spikellm.kernels.native.ops import pointer, unless
from spikellm.kernels.native.processors import step_threads
from spikellm.kernels.native.step_plan import OUTPUT, StepProgram
from spikellm.kernels.native.step_structs import Cached, Call


@dataclass(frozen=True)
class StepInput:
    """What a pass is given beside the program.

    Attributes:
        hidden: float32 ``(batch, queries, columns)``.
        positions: int64 ``(batch, queries)``, rows of the tables of rotary embedding.
        tables: cosine and sine of each table, float32 ``(positions, channels)``.
        mask: int64 ``(batch, tokens)``, zero for padding.
        cached: of every layer, as an array of pointers.
        apart: how many layers further the cache of the next sequence is; 0 where one cache holds
            all sequences.
    """

    hidden: Tensor
    positions: Tensor | None
    tables: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor | None
    cached: Any
    apart: int = 0


def run_step(
    program: StepProgram,
    given: StepInput,
    span: tuple[int, int] | None = None,
    *,
    result: int = OUTPUT,
    forced: Sequence[Tensor] | None = None,
    commit: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Run operations ``span[0]`` to ``span[1]``, all by default.

    Args:
        result: the place that is given at the end, ``INPUT`` or ``OUTPUT``.
        forced: outputs of its linear layers, float32 ``(tokens, out)``, that the pass goes on with
            in the place of its own.
        commit: new tokens are cached afterwards.

    Returns:
        ``(output, shown)``: ``(batch, queries, columns)`` in the model's type, and where outputs
        are forced what each linear layer read and wrote, float32 ``(tokens, in)`` and ``(tokens,
        out)``.

    Raises:
        MemoryError: there is none left.
    """
    first, last = span or (0, program.length)
    batch, queries, _ = given.hidden.shape
    tokens, widths = batch * queries, program.shown(first, last) if forced is not None else []
    columns = program.width(result)
    output = given.hidden.new_empty((batch, queries, columns), dtype=program.dtype)
    seen = torch.empty(tokens * sum(widths)) if forced is not None else None
    instead = None if forced is None else torch.cat([one.flatten() for one in forced])
    cos, sin = (pointers([pair[part] for pair in given.tables]) for part in (0, 1))
    call = Call(
        batch,
        queries,
        first,
        last,
        given.apart,
        given.hidden.data_ptr(),
        output.data_ptr(),
        ctypes.addressof(given.cached) if given.cached is not None else None,
        ctypes.addressof(cos),
        ctypes.addressof(sin),
        pointer(given.positions),
        pointer(given.mask),
        0 if given.mask is None else given.mask.shape[1],
        pointer(seen),
        pointer(instead),
        step_threads(),
        int(commit),
        result,
        0,
    )
    step = build.load_library().spikellm_step
    unless(step(ctypes.byref(program.pack()), ctypes.byref(call)), output)
    shown = [] if seen is None else list(seen.split([tokens * width for width in widths]))
    return output, [one.view(tokens, -1) for one in shown]


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Addresses of tensors as an array."""
    return (ctypes.c_void_p * max(1, len(tensors)))(*(one.data_ptr() for one in tensors))


def entries(cached: Sequence[Cached]) -> Any:
    """Caches of layers as an array of pointers, which keeps them."""
    found = (ctypes.c_void_p * max(1, len(cached)))(*(ctypes.addressof(one) for one in cached))
    found.kept = list(cached)  # type: ignore[attr-defined]
    return found
