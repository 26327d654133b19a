"""Which kernels run: native ones where they are to be had, the torch reference otherwise.

``SPIKELLM_KERNELS=auto`` (the default) takes native kernels and falls back with one notice, ``native`` makes their absence an error, ``torch`` leaves them off.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from spikellm.errors import DependencyError
from spikellm.kernels import build

CHOICES = ("auto", "native", "torch")
_log = logging.getLogger("spikellm")


def choice() -> str:
    """What the user asked for.

    Raises:
        DependencyError: ``SPIKELLM_KERNELS`` is something else.
    """
    found = os.environ.get("SPIKELLM_KERNELS") or "auto"
    if found not in CHOICES:
        raise DependencyError(f"SPIKELLM_KERNELS is {found!r}; expected {', '.join(CHOICES)}")
    return found


def native() -> bool:
    """Whether native kernels are used.

    Raises:
        DependencyError: they were asked for and cannot be had.
    """
    wanted = choice()
    if wanted == "torch":
        return False
    problem = _problem()
    if problem is not None and wanted == "native":
        raise DependencyError(problem)
    return problem is None


@cache
def _problem() -> str | None:
    """Why there are no native kernels; None if there are. Said once where nobody asked for them."""
    try:
        build.load_library()
    except DependencyError as error:
        if choice() == "auto":
            _log.warning("spikellm: native kernels are off, torch is used instead: %s", error)
        return str(error)
    return None


def describe() -> str:
    """The kernels in use, in words."""
    if native():
        return f"native, {build.level_of(build.load_library())}"
    return "torch" if choice() == "torch" else f"torch ({_problem()})"


_library = torch.library.Library("spikellm", "DEF")
_library.define(
    "spike_linear(Tensor x, Tensor plan, Tensor codes, Tensor scale, Tensor zero, Tensor column_sums, Tensor? bias, bool show) -> (Tensor, Tensor)"
)
_library.define("additive_linear(Tensor x, Tensor plan, Tensor words, Tensor scale, Tensor? bias) -> Tensor")


def _spike_linear(
    x: Tensor, plan: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, column_sums: Tensor, bias: Tensor | None, show: bool
) -> tuple[Tensor, Tensor]:
    """``spikellm::spike_linear``: a spiking linear layer in merged form, inputs coded on the way; see ``native/spike_linear.c``.

    Args:
        x: float32, ``(tokens, in)``.
        plan: int32, see :func:`spikellm.kernels.plan.make_plan`.
        codes: uint8, packed, ``(out, bytes)``.
        scale, zero: float32 and uint8, ``(out, weight groups)``.
        column_sums: int32, ``(segments, out)``, sums of integer weights.
        bias: float32, ``(out,)``.
        show: give the spike counts too.

    Returns:
        ``(y, counts)``: float32 ``(tokens, out)``, the same bits as the torch path; uint8 ``(tokens, in)`` in stored order, those of signed neurons raised by their
        largest code, or nothing.
    """
    x = x.contiguous()
    y, counts = x.new_empty(x.shape[0], codes.shape[0]), codes.new_empty(x.shape if show else 0)
    failed = build.load_library().spikellm_spike_linear(
        x.data_ptr(), x.shape[0], plan.data_ptr(), codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), column_sums.data_ptr(), _pointer(bias), y.data_ptr(), counts.data_ptr() if show else None,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("a kernel found no memory for its spikes")
    return y, counts


def _additive_linear(x: Tensor, plan: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``spikellm::additive_linear``: a linear layer of ternary weights by additions alone; see ``native/additive.c``.

    Args:
        x: float32, ``(tokens, in)``.
        plan, words: see :func:`spikellm.kernels.additive_plan.make_additive_plan`.
        scale: float32, ``(out, weight groups)``.
        bias: float32, ``(out,)``.

    Returns:
        float32, ``(tokens, out)``: the torch path's up to rounding, and the same bits where inputs are integers.
    """
    x = x.contiguous()
    y = x.new_empty(x.shape[0], scale.shape[0])
    failed = build.load_library().spikellm_additive_linear(
        x.data_ptr(), x.shape[0], plan.data_ptr(), words.data_ptr(), scale.data_ptr(), _pointer(bias), y.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    if failed:
        raise MemoryError("a kernel found no memory for its tables")
    return y


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_library.impl("spike_linear", _spike_linear, "CPU")
_library.impl("additive_linear", _additive_linear, "CPU")
torch.library.register_fake(
    "spikellm::spike_linear",
    lambda x, plan, codes, *rest: (x.new_empty(x.shape[0], codes.shape[0]), codes.new_empty(x.shape if rest[-1] else 0)),
)
torch.library.register_fake("spikellm::additive_linear", lambda x, plan, words, scale, *_: x.new_empty(x.shape[0], scale.shape[0]))
spike_linear = torch.ops.spikellm.spike_linear.default
additive_linear = torch.ops.spikellm.additive_linear.default
