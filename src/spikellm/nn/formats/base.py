"""What a weight format is: how a layer stores its weights, and what that costs.

A format holds no tensors. A layer has one, keeps the buffers that it asks for, and hands itself
over where a question is about them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from spikellm.core.offload import offload
from spikellm.core.registry import Registry
from spikellm.kernels.prepared import LinearWeights, PackedCodes
from spikellm.kernels.spec import WITH_INTEGERS, IntegerForm
from spikellm.nn.buffer_kinds import BufferKind, kind_of
from spikellm.nn.layout import Layout
from spikellm.recipe import LinearRecipe
from spikellm.recipe.base import WeightOptions


class Buffer(NamedTuple):
    """A named buffer before anything is written to it.

    Attributes:
        fill: its value everywhere.
        kind: what its bits are for where stored bits are counted; None for what its name says, see
            :func:`spikellm.nn.buffer_kinds.kind_of`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: int
    kind: BufferKind | None = None

    @property
    def stored_as(self) -> BufferKind:
        """What its bits are for."""
        return self.kind or kind_of(self.name, self.dtype)


class LayerShape(NamedTuple):
    """What decides the shapes of a layer's buffers.

    Attributes:
        columns, rows: inputs and outputs.
        settings: how the layer is coded.
        sizes: what decides shapes beyond the settings, see :meth:`WeightFormat.sizes_of`; saved in
            the model's configuration.
    """

    columns: int
    rows: int
    settings: LinearRecipe
    sizes: tuple[int, ...]


class Stored(Protocol):
    """A layer as its format sees it."""

    shape: LayerShape

    @property
    def weight_scale(self) -> Tensor: ...

    def get_buffer(self, target: str) -> Tensor: ...

    def layout(self) -> Layout: ...

    def stored(self, of_channels: Tensor) -> Tensor: ...


class WeightFormat(ABC):
    """How weights are stored. Rows are outputs, columns inputs in stored order.

    Attributes:
        name: in the registry and in recipes.
        coding: the kind of codes that it takes over (:meth:`write`), by which algorithms tell
            whether and how they fit it: ``affine`` for integers with zero-points,
            ``ternary``, ``partly-binary``, or one for which a plugin has a coder.
        integer_form: what kernels may make of the weights.
        unrolls: whether weights are trains of spikes, so that stepped and binary execution unroll
            them where inputs are not coded.
    """

    name: ClassVar[str]
    coding: ClassVar[str] = "affine"
    integer_form: ClassVar[IntegerForm] = "affine"
    unrolls: ClassVar[bool] = False

    @property
    def has_integers(self) -> bool:
        """Whether weights have an integer form."""
        return self.integer_form in WITH_INTEGERS

    @abstractmethod
    def buffers(self, shape: LayerShape) -> list[Buffer]:
        """The buffers that hold the weights; ``weight_scale`` is one of them."""

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``LayerShape.sizes`` of the layer with these buffers.

        Raises:
            ValueError: the buffers are damaged.
        """
        return ()

    def keeps_steps(self, weights: WeightOptions) -> bool:
        """Whether a layer with such weights stores the steps of its columns, if they have any."""
        return True

    def fitted_sizes(self, weights: Any, column_steps: Tensor | None) -> tuple[int, ...]:
        """``LayerShape.sizes`` of the layer that takes over these weights: what :meth:`sizes_of`
        gives once :meth:`write` has put them into buffers.

        Args:
            weights: as :meth:`write` takes them.
            column_steps: steps T of the weights of every column, uint8 ``(in,)``; None for one
                each.
        """
        return ()

    @abstractmethod
    def write(self, layer: Stored, weights: Any) -> None:
        """Take over coded weights, of the kind that this format has."""

    @abstractmethod
    def integer_weights(self, layer: Stored, rows: slice) -> Tensor:
        """Integer weights of some outputs, int16 ``(out, in)``.

        Raises:
            RequestError: the format has no integer form.
        """

    def planes_by_group(self, layer: Stored) -> tuple[int, ...]:
        """Planes of every weight group, each with scales of its own, where the integer form is
        ``planes``; else none.
        """
        return ()

    def has_plane(self, layer: Stored, plane: int, group: int) -> bool:
        """Whether a weight group has that plane."""
        planes = self.planes_by_group(layer)
        return not planes or plane < planes[group]

    def as_planes(self, layer: Stored) -> Sequence[LinearWeights]:
        """Those planes, ternary weights of one step; none where weights have one integer form."""
        return []

    def dense_weight(self, layer: Stored) -> Tensor:
        """The weight that the codes stand for, float32, ``(out, in)``, columns in their original
        order.
        """
        weight, layout = self.integer_weights(layer, slice(None)).float(), layer.layout()
        for group, (start, stop) in enumerate(layout.weight_groups):
            weight[:, start:stop] *= layer.weight_scale[:, group : group + 1]
        if layout.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, layout.order, weight)

    def release(self, layer: Stored) -> None:
        """Say that codes are not needed for a while: what is read from a file leaves memory."""
        for name, *_ in self.buffers(layer.shape):
            if name != "weight_scale":  # kernels read it where it is
                offload(layer.get_buffer(name))

    @abstractmethod
    def kernel_bits(self, layer: Stored) -> int:
        """Bits in which every code of :meth:`packed_codes` fits; 0 without an integer form."""

    @abstractmethod
    def packed_codes(self, layer: Stored) -> PackedCodes:
        """Codes of ``kernel_bits`` bits for all columns, and their zero-points."""

    def salient_columns(self, shape: LayerShape) -> int:
        """Columns whose weights take ``weights.salient_steps``."""
        return 0

    def column_steps(self, layer: Stored) -> Tensor | None:
        """Steps T of the weights of every channel, ``(in,)``; None where all take one."""
        return None

    def additive_share(self, layer: Stored) -> float | None:
        """Share of products that are additions whatever the inputs are; None where the inputs
        decide it.
        """
        return None

    def average_steps(self, layer: Stored) -> float | None:
        """Steps that the format counts of itself; None for the mean of input steps times weight
        steps over the columns.
        """
        return None

    def products(self, layer: Stored, steps: float) -> dict[int, float]:
        """Products executed for each of the original ones, by bits of the weight.

        Args:
            steps: the layer's average steps.
        """
        return {layer.shape.settings.weights.bits: steps}

    def validation_error(self, layer: Stored) -> str | None:
        """What in the stored weights no conversion writes; None if all is well."""
        return None


formats: Registry[WeightFormat] = Registry("weight format")


def register(kind: type[WeightFormat]) -> type[WeightFormat]:
    """Decorator that enters a format under its name."""
    formats.register(kind.name)(kind())
    return kind


def format_of(settings: WeightOptions) -> WeightFormat:
    """The format that a recipe asks for."""
    return formats[settings.format]


def group_of_columns(layout: Layout) -> Tensor:
    """Weight group of every stored column, int64 ``(in,)``."""
    sizes = torch.tensor([stop - start for start, stop in layout.weight_groups])
    return torch.arange(len(sizes)).repeat_interleave(sizes)
