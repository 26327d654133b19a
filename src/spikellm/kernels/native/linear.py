"""Linear layers ready for the library's functions."""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from spikellm.kernels.base import plain
from spikellm.kernels.native import ops
from spikellm.kernels.native.additive_plan import OUTPUTS, make_additive_plan
from spikellm.kernels.native.coded import Coded, last_coded
from spikellm.kernels.native.linear_plan import make_plan
from spikellm.kernels.prepared import LinearWeights, Observed, raised_by, shown_codes
from spikellm.kernels.spec import LinearSpec

_CHUNK = 1 << 21  # weights that are unpacked at a time
_SHARED_TOKENS = 16  # below, coding costs less than looking


class NativeLayer(ABC):
    """What all kinds of layer share: one call of a function with pointers that stay the same.

    ``between`` are the tensors that the function takes between its inputs and its outputs, in its
    order; they are kept, and never a dense copy of the weights.

    Attributes:
        most_tokens: that the function is called for; more go through the operator.
    """

    most_tokens: ClassVar[float] = math.inf

    def __init__(self, function: object, spec: LinearSpec, between: list[Tensor | None]) -> None:
        self._function, self._columns, self._rows = function, spec.columns, spec.rows
        self._between = between
        self._pointers = [None if one is None else one.data_ptr() for one in between]
        self._behind: tuple[int | None, ...] = ()  # arguments behind y that stay the same

    def __call__(self, x: Tensor) -> Tensor:
        kind = self._kind_of(x)
        if kind is None or x.numel() // self._columns > self.most_tokens:
            return self._by_operator(x)
        y = x.new_empty((*x.shape[:-1], self._rows))
        return ops.unless(self._run(x, y, kind), y)

    def _kind_of(self, x: Tensor) -> int | None:
        """The library's number of the type of inputs that it can read where they are."""
        as_it_is = plain(x) and x.is_cpu and x.is_contiguous()
        return ops.TYPES.get(x.dtype) if as_it_is and x.shape[-1] == self._columns else None

    def _run(self, x: Tensor, y: Tensor, kind: int) -> int:
        """Write outputs into ``y``; not 0 where memory ran out."""
        return self._call(x, y, (*self._behind, kind))

    def _call(self, x: Tensor, y: Tensor, behind: tuple[int | None, ...]) -> int:
        """The library's function; ``behind``: what it takes between y and the threads."""
        failed: int = self._function(  # type: ignore[operator]
            x.data_ptr(),
            x.numel() // self._columns,
            *self._pointers,
            y.data_ptr(),
            *behind,
            torch.get_num_threads(),
        )
        return failed

    def _by_operator(self, x: Tensor) -> Tensor:
        return self.observed(x)[0]

    def observed(self, x: Tensor) -> Observed:
        """Output, codes and baselines, see :class:`spikellm.kernels.prepared.PreparedLinear`."""
        tokens = x.reshape(-1, self._columns)
        y, codes, z = self._operate(tokens if x.dtype in ops.TYPES else tokens.float())
        return Observed(y.to(x.dtype).reshape(*x.shape[:-1], self._rows), codes, z)

    @abstractmethod
    def _operate(self, tokens: Tensor) -> Observed:
        """The same for ``(tokens, in)`` of a type that the library knows, by its operator."""


class NativeLinear(NativeLayer):
    """Inputs coded on the way into one integer product.

    What many tokens were coded to is left for the next layer that is given the very same tensor,
    unwritten, and codes alike.

    Attributes:
        coding: bytes that are equal in layers that code alike.
    """

    def __init__(self, library: ctypes.CDLL, spec: LinearSpec, weights: LinearWeights) -> None:
        codes, zero = weights.packed_codes()
        plan, codes, zero = make_plan(spec), codes.contiguous(), zero.contiguous()
        self.operands = (
            plan,
            codes,
            weights.weight_scale.float().contiguous(),
            zero,
            _column_sums(library, spec, plan, codes, zero),
            float_bias(weights),
        )
        super().__init__(library.spikellm_spike_linear, spec, list(self.operands))
        self._behind = (None, None, None, 0)
        self._raised = raised_by(spec)
        self._bounds = spec.bounds
        self._coded_bytes = library.spikellm_coded_bytes
        self.coding = coding_of(self.operands[0])

    def _run(self, x: Tensor, y: Tensor, kind: int) -> int:
        if not self._shares(x):
            return super()._run(x, y, kind)
        return self._run_shared(x, y, kind)[0]

    def observed(self, x: Tensor) -> Observed:
        kind = self._kind_of(x)
        if kind is None or not self._shares(x):
            return super().observed(x)
        y = x.new_empty((*x.shape[:-1], self._rows))
        failed, coded = self._run_shared(x, y, kind, shown=True)
        return Observed(ops.unless(failed, y), *coded.shown or ())

    def _shares(self, x: Tensor) -> bool:
        """Whether codes are left for other layers; nobody counts writes of inference tensors."""
        return x.numel() // self._columns >= _SHARED_TOKENS and not x.is_inference()

    def _run_shared(
        self, x: Tensor, y: Tensor, kind: int, shown: bool = False
    ) -> tuple[int, Coded]:
        """Write outputs into ``y`` from what another layer left, or leave it."""
        coded = last_coded.of(x, self.coding, self, shown)
        if coded is not None:
            return self._call(x, y, (None, None, coded.memory.data_ptr(), 1, kind)), coded
        tokens = x.numel() // self._columns
        size = self._coded_bytes(self._pointers[0], tokens)
        memory = x.new_empty(size, dtype=torch.uint8)
        counts = memory.new_empty(tokens, self._columns) if shown else None
        z = x.new_empty((tokens, len(self._bounds)), dtype=torch.int32) if shown else None
        given = ops.pointer(counts), ops.pointer(z), memory.data_ptr(), 0, kind
        failed = self._call(x, y, given)
        coded = Coded(
            memory,
            None
            if counts is None or z is None
            else shown_codes(counts, z, self._raised, self._bounds),
        )
        if not failed:
            last_coded.keep(x, self.coding, self, coded)
        return failed, coded

    def _operate(self, tokens: Tensor) -> Observed:
        y, counts, z = ops.spike_linear(tokens, *self.operands, len(self._bounds))
        return Observed(y, *shown_codes(counts, z, self._raised, self._bounds))


class NativeAdditive(NativeLayer):
    """Ternary weights, or planes of them, on inputs that are not coded."""

    def __init__(self, library: ctypes.CDLL, spec: LinearSpec, weights: LinearWeights) -> None:
        made = [make_additive_plan(part, spec) for part in _chunks(spec, weights)]
        plan = made[0][0]
        plan[1] = spec.rows
        self.operands = (
            plan,
            torch.cat([words for _, words in made]),
            weights.weight_scale.float().contiguous(),
            float_bias(weights),
        )
        weights.release_codes()
        super().__init__(library.spikellm_additive_linear, spec, list(self.operands))

    def _operate(self, tokens: Tensor) -> Observed:
        return Observed(ops.additive_linear(tokens, *self.operands))


def coding_of(plan: Tensor) -> bytes:
    """Bytes of a plan that are equal in layers that code the same input to the same places."""
    words = plan.clone()
    words[1] = 0  # outputs
    return words.numpy().tobytes()


def float_bias(weights: LinearWeights) -> Tensor | None:
    """The bias as kernels read it."""
    return None if weights.bias is None else weights.bias.detach().float().contiguous()


def _column_sums(
    library: ctypes.CDLL, spec: LinearSpec, plan: Tensor, codes: Tensor, zero: Tensor
) -> Tensor:
    """``Σ (code − zero)`` over the columns of every segment, int32 ``(segments, out)``."""
    sums = codes.new_empty((len(spec.segments), spec.rows), dtype=torch.int32)
    failed = library.spikellm_column_sums(
        plan.data_ptr(),
        codes.data_ptr(),
        zero.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return ops.unless(failed, sums)


def _chunks(spec: LinearSpec, weights: LinearWeights) -> Iterator[list[Tensor]]:
    """Integer weights of all planes, some outputs at a time: a multiple of the additive kernel's
    blocks.
    """
    rows = max(1, _CHUNK // max(1, spec.columns) // OUTPUTS) * OUTPUTS
    for start in range(0, spec.rows, rows):
        yield [one.integer_weights(slice(start, start + rows)) for one in weights.planes()]
