"""The native kernels as operators of torch, so that dispatch modes, fake tensors and profilers see
them.

What a layer prepared calls the library without going through the dispatcher, see
:mod:`spikellm.kernels.native.backend`; both come to the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spikellm.kernels.native import build
from spikellm.quantization import hadamard

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Types of inputs and outputs of linear layers that kernels read and write themselves."""

_library = torch.library.Library("spikellm", "DEF")
_library.define(
    "spike_linear(Tensor x, Tensor plan, Tensor codes, Tensor scale, Tensor zero, Tensor"
    " column_sums, Tensor? bias, int shown) -> (Tensor, Tensor, Tensor)"
)
_library.define("code_heads(Tensor x, Tensor plan, int row_bytes) -> Tensor")
_library.define("key_scores(Tensor query, Tensor rows, Tensor plan) -> Tensor")
_library.define("value_sums(Tensor weights, Tensor rows, Tensor plan, int channels) -> Tensor")
_library.define("mix(Tensor x) -> Tensor")
_library.define(
    "additive_linear(Tensor x, Tensor plan, Tensor words, Tensor scale, Tensor? bias) -> Tensor"
)


def _spike_linear(  # noqa: PLR0913  torch custom operators take tensors one by one
    x: Tensor,
    plan: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    column_sums: Tensor,
    bias: Tensor | None,
    shown: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``spikellm::spike_linear``: a spiking linear layer, merged, inputs coded on the way.

    See ``native/spike_linear.c``.

    Args:
        x: float32 or bfloat16, ``(tokens, in)``.
        plan: int32, see :func:`spikellm.kernels.native.linear_plan.make_plan`.
        codes: uint8, packed, ``(out, bytes)``.
        scale, zero: float32 and uint8, ``(out, weight groups)``.
        column_sums: int32, ``(segments, out)``, sums of integer weights.
        bias: float32, ``(out,)``.
        shown: activation groups whose counts and baselines are given too: 0, or all.

    Returns:
        ``(y, counts, baselines)``: ``(tokens, out)`` in the type of ``x``, the same bits as in
        torch; uint8 ``(tokens, in)`` in stored order, those of signed neurons raised by their
        largest code, and int32 ``(tokens, activation groups)``, or nothing.
    """
    x = x.contiguous()
    y, counts = x.new_empty(x.shape[0], codes.shape[0]), codes.new_empty(x.shape if shown else 0)
    baselines = plan.new_empty((x.shape[0], shown) if shown else 0)
    failed = build.load_library().spikellm_spike_linear(
        x.data_ptr(),
        x.shape[0],
        plan.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        column_sums.data_ptr(),
        pointer(bias),
        y.data_ptr(),
        counts.data_ptr() if shown else None,
        baselines.data_ptr() if shown else None,
        None,  # no memory that other layers could take over
        0,
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return unless(failed, y), counts, baselines


def _additive_linear(
    x: Tensor, plan: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """``spikellm::additive_linear``: a linear layer of ternary weights by additions alone.

    See ``native/additive.c``.

    Args:
        x: float32 or bfloat16, ``(tokens, in)``.
        plan, words: see :func:`spikellm.kernels.native.additive_plan.make_additive_plan`.
        scale: float32, ``(out, weight groups)``.
        bias: float32, ``(out,)``.

    Returns:
        ``(tokens, out)`` in the type of ``x``: as in torch up to rounding, and the same bits where
        inputs are integers.
    """
    x = x.contiguous()
    y = x.new_empty(x.shape[0], scale.shape[0])
    failed = build.load_library().spikellm_additive_linear(
        x.data_ptr(),
        x.shape[0],
        plan.data_ptr(),
        words.data_ptr(),
        scale.data_ptr(),
        pointer(bias),
        y.data_ptr(),
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return unless(failed, y)


def _code_heads(x: Tensor, plan: Tensor, row_bytes: int) -> Tensor:
    """``spikellm::code_heads``: codes of attention heads; see ``native/heads.c``.

    Args:
        x: float32, ``(batch, heads, tokens, channels)``.
        plan: see :func:`spikellm.kernels.native.head_plan.make_head_plan`.
        row_bytes: bytes of a row; 0 for values instead of rows.

    Returns:
        Rows as a cache keeps them, uint8 ``(batch, heads, tokens, row_bytes)``; or the values that
        codes stand for, float32, of the shape of ``x``. The same bits as torch.
    """
    return call_code_heads(build.load_library().spikellm_code_heads, x, plan, row_bytes)


def call_code_heads(kernel: Callable[..., int], x: Tensor, plan: Tensor, row_bytes: int) -> Tensor:
    """``code_heads`` by a function of the library."""
    x = x.contiguous()
    found = (
        x.new_empty((*x.shape[:-1], row_bytes), dtype=torch.uint8)
        if row_bytes
        else torch.empty_like(x)
    )
    rows, values = (found.data_ptr(), None) if row_bytes else (None, found.data_ptr())
    threads = torch.get_num_threads()
    failed = kernel(x.data_ptr(), *x.shape[:3], plan.data_ptr(), rows, values, threads)
    return unless(failed, found)


def _key_scores(query: Tensor, rows: Tensor, plan: Tensor) -> Tensor:
    """``spikellm::key_scores``: products of queries, float32 ``(batch, heads, queries, channels)``,
    with keys in rows: ``(batch, heads, queries, tokens)``.
    """
    kernel = build.load_library().spikellm_key_scores
    return call_with_rows(kernel, query, rows, plan, rows.shape[2])


def _value_sums(weights: Tensor, rows: Tensor, plan: Tensor, channels: int) -> Tensor:
    """``spikellm::value_sums``: sums of values in rows by weights, float32 ``(batch, heads,
    queries, tokens)``: ``(batch, heads, queries, channels)``.
    """
    return call_with_rows(build.load_library().spikellm_value_sums, weights, rows, plan, channels)


def call_with_rows(
    kernel: Callable[..., int], x: Tensor, rows: Tensor, plan: Tensor, last: int
) -> Tensor:
    """Products with packed rows by a function of the library, ``(batch, heads, queries, last)``."""
    x, rows = x.contiguous(), rows.contiguous()
    batch, heads, queries, _ = x.shape
    found = x.new_empty((batch, heads, queries, last))
    own = rows.shape[1]
    failed = kernel(
        x.data_ptr(),
        batch,
        own,
        heads // own,
        queries,
        rows.data_ptr(),
        rows.shape[2],
        plan.data_ptr(),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return unless(failed, found)


def call_mix(x: Tensor) -> Tensor:
    """``spikellm::mix``: a rotation by additions of float32 or float64 ``(..., n)``.

    The same bits as :func:`spikellm.quantization.hadamard.mix`.
    """
    x = x.contiguous()
    library, found, size = build.load_library(), torch.empty_like(x), x.shape[-1]
    power = hadamard.largest_power(size)
    kernel = library.spikellm_mix if x.dtype == torch.float32 else library.spikellm_mix_double
    kernel(
        x.data_ptr(),
        x.numel() // size,
        size,
        power,
        math.sqrt(power),
        hadamard.shapiro(power).data_ptr(),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def unless(failed: int, found: Tensor) -> Tensor:
    """What a kernel found, unless it failed."""
    if failed:
        raise MemoryError("a kernel found no memory for its work")
    return found


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's data lie; None for none."""
    return None if tensor is None else tensor.data_ptr()


_library.impl("spike_linear", _spike_linear, "CPU")
_library.impl("additive_linear", _additive_linear, "CPU")
_library.impl("mix", call_mix, "CPU")
torch.library.register_fake("spikellm::mix", torch.empty_like)
_library.impl("code_heads", _code_heads, "CPU")
_library.impl("key_scores", _key_scores, "CPU")
_library.impl("value_sums", _value_sums, "CPU")
torch.library.register_fake(
    "spikellm::code_heads",
    lambda x, plan, row_bytes: (
        x.new_empty(*x.shape[:-1], row_bytes, dtype=torch.uint8)
        if row_bytes
        else torch.empty_like(x)
    ),
)
torch.library.register_fake(
    "spikellm::key_scores",
    lambda query, rows, plan: query.new_empty(*query.shape[:-1], rows.shape[2]),
)
torch.library.register_fake(
    "spikellm::value_sums",
    lambda weights, rows, plan, channels: weights.new_empty(*weights.shape[:-1], channels),
)
torch.library.register_fake(
    "spikellm::spike_linear",
    lambda x, plan, codes, *rest: (
        x.new_empty(x.shape[0], codes.shape[0]),
        codes.new_empty(x.shape if rest[-1] else 0),
        plan.new_empty((x.shape[0], rest[-1]) if rest[-1] else 0),
    ),
)
torch.library.register_fake(
    "spikellm::additive_linear",
    lambda x, plan, words, scale, *_: x.new_empty(x.shape[0], scale.shape[0]),
)
spike_linear = torch.ops.spikellm.spike_linear.default
code_heads = torch.ops.spikellm.code_heads.default
key_scores = torch.ops.spikellm.key_scores.default
value_sums = torch.ops.spikellm.value_sums.default
mix = torch.ops.spikellm.mix.default
additive_linear = torch.ops.spikellm.additive_linear.default
