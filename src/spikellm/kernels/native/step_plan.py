"""A list of operations that a decoder step runs in one call: see ``native/step.h``.

Nothing here knows of models or layers: whoever builds a list names places, gives tensors, and hands
over what prepared layers and coders hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.native import ops
from spikellm.kernels.native.linear import NativeAdditive, NativeLinear
from spikellm.kernels.native.step_structs import (
    ACTIVATIONS,
    KINDS,
    NORMS,
    TENSORS,
    Attention,
    Op,
    Program,
    View,
)
from spikellm.kernels.native.weight_only import NativeWeightOnly
from spikellm.quantization import hadamard

INPUT, OUTPUT = 0, 1
_LANES = {"AVX512": 16, "AVX2": 8}  # of torch's vectors of float32
_ALIGNED = 16
_LINEAR = ("linear", "additive", "dense", "weight_only")


class Place(NamedTuple):
    """A matrix with a row for every token, or some columns of one.

    Attributes:
        view: its number.
        heads, size: values of a row.
    """

    view: int
    heads: int
    size: int


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

    def width(self, view: int) -> int:
        """Columns of a view."""
        return int(self._views[view].size)

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
        if kind in _LINEAR:
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

    def weight_only(
        self, into: Place, source: Place, layer: NativeWeightOnly, bias: Tensor | None
    ) -> None:
        """A layer of integer weights whose inputs are not coded; ``bias`` where it has none."""
        own = layer.operands[4] if bias is None else bias.detach().float().contiguous()
        self._add("weight_only", into, source, None, [*layer.operands[:4], own])

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


def torch_lanes() -> int:
    """Lanes of torch's vectors of float32 on this machine."""
    return _LANES.get(torch.backends.cpu.get_cpu_capability(), 16)


def mix_signs(channels: int) -> Tensor:
    """Signs between the two transforms of a rotation, float32."""
    power = hadamard.largest_power(channels) if channels else 1
    return hadamard.shapiro(power).float().contiguous()
