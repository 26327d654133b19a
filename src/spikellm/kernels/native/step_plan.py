"""A list of operations that a decoder step runs in one call: see ``native/step.h``.

Nothing here knows of models or layers: whoever builds a list names places, gives tensors, and hands
over what prepared layers and coders hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.native import build, ops
from spikellm.kernels.native.linear import NativeAdditive, NativeLinear
from spikellm.kernels.native.step_structs import (
    ACTIVATIONS,
    KINDS,
    NORMS,
    TENSORS,
    Attention,
    Cached,
    Call,
    Op,
    Program,
    View,
)
from spikellm.quantization import hadamard

INPUT, OUTPUT = 0, 1
_LANES = {"AVX512": 16, "AVX2": 8}  # of torch's vectors of float32
_ALIGNED = 16


class Place(NamedTuple):
    """A matrix with a row for every token, or some columns of one.

    Attributes:
        view: its number.
        heads, size: values of a row.
    """

    view: int
    heads: int
    size: int


@dataclass(frozen=True)
class StepInput:
    """What a pass is given beside the program.

    Attributes:
        hidden: float32 ``(batch, queries, columns)``.
        positions: int64 ``(batch, queries)``, rows of the tables of rotary embedding.
        tables: cosine and sine of each table, float32 ``(positions, channels)``.
        mask: int64 ``(batch, tokens)``, zero for padding.
        cached: of every layer, as an array of pointers.
    """

    hidden: Tensor
    positions: Tensor | None
    tables: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor | None
    cached: Any


class StepProgram:
    """Operations in order. Tensors that they point to are kept.

    Args:
        columns, outputs: of the pass.
        dtype: of the model's numbers, float32 or bfloat16.
    """

    def __init__(self, columns: int, outputs: int, dtype: torch.dtype) -> None:
        self.dtype, self.columns, self.outputs = dtype, columns, outputs
        self._views: list[View] = []
        self._ops: list[Op] = []
        self._kept: list[Any] = []
        self._floats = 0
        self._places: dict[str, Place] = {}
        self._shown: list[int] = []  # columns of what linear layers read and write
        self._shown_until: list[int] = [0]
        self._packed: tuple[Program, Any, Any] | None = None
        self.last_source: Place | None = None  # what the last linear layer read
        self.last_rotation: tuple[Place, bytes] | None = None  # and the last rotation, and how
        self.last_rotated: Place | None = None
        self.input, self.output = self.place("input", columns), self.place("output", outputs)

    def place(self, name: str, size: int, heads: int = 1) -> Place:
        """A place of a name, made where there is none; the same name is the same memory."""
        known = self._places.get(name)
        if known is not None and known.heads * known.size == heads * size:
            return known
        if known is not None:
            return self.place(f"{name} of {heads * size}", size, heads)
        width = heads * size
        made = self._view(self._floats, width, 0, heads, size, size)
        self._floats += -(-width // _ALIGNED) * _ALIGNED
        self._places[name] = made
        return made

    def columns_of(
        self, place: Place, first: int, size: int, heads: int = 1, apart: int = 0
    ) -> Place:
        """Some columns of a place."""
        whole = self._views[place.view]
        return self._view(whole.at, whole.stride, first, heads, apart or size, size)

    def _view(self, at: int, stride: int, first: int, heads: int, apart: int, size: int) -> Place:
        self._views.append(View(at, stride, first, heads, apart, size, 0))
        return Place(len(self._views) - 1, heads, size)

    def keep(self, *kept: Any) -> None:
        """Keep what operations point to."""
        self._kept += kept

    @property
    def length(self) -> int:
        """Operations so far."""
        return len(self._ops)

    def shown(self, first: int, last: int) -> list[int]:
        """Columns of what linear layers of operations ``first`` to ``last`` read and write."""
        return self._shown[self._shown_until[first] : self._shown_until[last]]

    def _add(  # noqa: PLR0913
        self,
        kind: str,
        into: Place,
        source: Place,
        other: Place | None = None,
        data: Sequence[Tensor | None] = (),
        numbers: Sequence[int] = (),
        reals: Sequence[float] = (),
    ) -> None:
        self._kept += data
        self._forget_what_is_written(into)
        pointers = [None if one is None else one.data_ptr() for one in data]
        a, b, c, d = [*numbers, 0, 0, 0, 0][:4]
        x, y = [*reals, 0.0, 0.0][:2]
        where = -1 if other is None else other.view
        full = (ctypes.c_void_p * TENSORS)(*pointers)
        self._ops.append(
            Op(KINDS.index(kind), source.view, where, into.view, a, b, c, d, x, y, full)
        )
        if kind in ("linear", "additive", "dense"):
            self._shown += [source.size, into.size]
        self._shown_until.append(len(self._shown))
        self._packed = None

    def _forget_what_is_written(self, into: Place) -> None:
        at = self._views[into.view].at
        if self.last_source is not None and self._views[self.last_source.view].at == at:
            self.last_source = None
        touched = (self.last_rotation and self.last_rotation[0], self.last_rotated)
        if any(one is not None and self._views[one.view].at == at for one in touched):
            self.last_rotation = self.last_rotated = None

    # operations

    def norm(  # noqa: PLR0913
        self,
        into: Place,
        source: Place,
        kind: str,
        weight: Tensor | None,
        bias: Tensor | None,
        epsilon: float,
        lanes: int = 8,
    ) -> None:
        """A norm of each head of a place."""
        data = [None if one is None else one.float().contiguous() for one in (weight, bias)]
        self._add("norm", into, source, None, data, (NORMS.index(kind), lanes), (epsilon,))

    def linear(self, into: Place, source: Place, layer: NativeLinear, *, shared: bool) -> None:
        """A spiking linear layer; ``shared``: the one before coded the same input alike."""
        self._add("linear", into, source, None, layer.operands, (int(shared),))

    def additive(self, into: Place, source: Place, layer: NativeAdditive, *, shared: bool) -> None:
        """A ternary layer whose inputs are not coded."""
        self._add("additive", into, source, None, layer.operands, (int(shared),))

    def dense(self, into: Place, source: Place, weight: Tensor, bias: Tensor | None) -> None:
        """A layer of 16- or 32-bit weights, ``(out, in)``."""
        data = [weight, None if bias is None else bias.float().contiguous()]
        self._add("dense", into, source, None, data, (ops.TYPES[weight.dtype],))

    def rotate(
        self,
        into: Place,
        source: Place,
        signs: Tensor,
        channels: Tensor | None,
        offset: Tensor | None,
    ) -> None:
        """Signs and :func:`spikellm.quantization.hadamard.mix` among some channels, all by default;
        then ``offset`` is taken away.
        """
        between = mix_signs(len(signs))
        some = None if channels is None else channels.int().contiguous()
        data = [signs.float().contiguous(), some, between, offset]
        self._add("rotate", into, source, None, data, (len(signs),))

    def rope(self, place: Place, table: int, channels: int) -> None:
        """Rotary embedding of the first channels of each head, in place."""
        self._add("rope", place, place, numbers=(table, channels))

    def scale(self, place: Place, by: float) -> None:
        """A product with a number, in place."""
        self._add("scale", place, place, reals=(by,))

    def attend(self, into: Place, query: Place, key: Place, attention: Attention) -> None:
        """Attention of a layer."""
        self._kept.append(attention)
        self._add("attend", into, query, key)
        self._ops[-1].data[0] = ctypes.addressof(attention)

    def activate(
        self, into: Place, source: Place, kind: str, by: Place | None, *, by_row: bool = False
    ) -> None:
        """An activation function, and a product with ``by``."""
        self._add("activate", into, source, by, (), (ACTIVATIONS.index(kind), int(by_row)))

    def add(self, into: Place, source: Place, other: Place) -> None:
        """A sum."""
        self._add("add", into, source, other)

    # running

    def pack(self) -> Program:
        """The list as the library takes it."""
        if self._packed is None:
            views = (View * len(self._views))(*self._views)
            listed = (Op * len(self._ops))(*self._ops)
            made = Program(
                ctypes.addressof(views),
                ctypes.addressof(listed),
                len(listed),
                self._floats,
                ops.TYPES[self.dtype],
                torch_lanes(),
            )
            self._packed = made, views, listed
        return self._packed[0]

    def run(
        self,
        given: StepInput,
        first: int = 0,
        last: int | None = None,
        *,
        result: int = OUTPUT,
        forced: Sequence[Tensor] | None = None,
        commit: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run operations ``first`` to ``last``; with ``commit`` new tokens are cached afterwards.

        Args:
            forced: outputs of its linear layers, float32 ``(tokens, out)``, that the pass goes on
                with in the place of its own.

        Returns:
            ``(output, shown)``: what the place ``result`` (:data:`INPUT` or :data:`OUTPUT`) holds
            at the end, ``(batch, queries, columns)`` in the model's type, and where outputs are
            forced what each linear layer read and wrote, float32 ``(tokens, in)`` and ``(tokens,
            out)``.

        Raises:
            MemoryError: there is none left.
        """
        program, last = self.pack(), self.length if last is None else last
        batch, queries, _ = given.hidden.shape
        tokens, widths = batch * queries, self.shown(first, last) if forced is not None else []
        size = self._views[result].size
        output = given.hidden.new_empty((batch, queries, size), dtype=self.dtype)
        seen = torch.empty(tokens * sum(widths)) if forced is not None else None
        instead = None if forced is None else torch.cat([one.flatten() for one in forced])
        cos, sin = (pointers([pair[part] for pair in given.tables]) for part in (0, 1))
        call = Call(
            batch,
            queries,
            first,
            last,
            given.hidden.data_ptr(),
            output.data_ptr(),
            ctypes.addressof(given.cached) if given.cached is not None else None,
            ctypes.addressof(cos),
            ctypes.addressof(sin),
            None if given.positions is None else given.positions.data_ptr(),
            None if given.mask is None else given.mask.data_ptr(),
            0 if given.mask is None else given.mask.shape[1],
            None if seen is None else seen.data_ptr(),
            None if instead is None else instead.data_ptr(),
            torch.get_num_threads(),
            int(commit),
            result,
            0,
        )
        step = build.load_library().spikellm_step
        if step(ctypes.byref(program), ctypes.byref(call)):
            raise MemoryError("a kernel found no memory for its work")
        shown = [] if seen is None else list(seen.split([tokens * width for width in widths]))
        return output, [one.view(tokens, -1) for one in shown]


def torch_lanes() -> int:
    """Lanes of torch's vectors of float32 on this machine."""
    return _LANES.get(torch.backends.cpu.get_cpu_capability(), 16)


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Addresses of tensors as an array."""
    return (ctypes.c_void_p * max(1, len(tensors)))(*(one.data_ptr() for one in tensors))


def entries(cached: Sequence[Cached]) -> Any:
    """Caches of layers as an array of pointers."""
    return (ctypes.c_void_p * max(1, len(cached)))(*(ctypes.addressof(one) for one in cached))


def mix_signs(channels: int) -> Tensor:
    """Signs between the two transforms of a rotation, float32."""
    power = hadamard.largest_power(channels) if channels else 1
    return hadamard.shapiro(power).float().contiguous()
