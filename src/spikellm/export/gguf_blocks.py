"""Integer weights as blocks of GGUF files: the same numbers in float32, or a reason why not.

A block holds integers ``k`` of neighbouring columns of a row and one scale ``d`` in float16, and
stands for ``d·k`` (``gguf.quants``). So a layer is exact in a type whose integers contain its own
where no group of columns ends within a block and scales are numbers of float16; a scale of more
columns is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.export.gguf_types import block_of, require_gguf
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.packing import pack

if TYPE_CHECKING:
    import numpy as np


class _Kind(NamedTuple):
    """A type: its smallest and largest integer, and the bytes of a block, ``(blocks, bytes)``, from
    its integers, ``(blocks, columns)``, and its scale, uint8 ``(blocks, 2)``.
    """

    lowest: int
    highest: int
    packed: Callable[[Tensor, Tensor], Tensor]


def _halves(codes: Tensor) -> Tensor:
    """Codes of 4 bits, the second half of a block in the upper bits."""
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << 4)


def _tq2_0(integers: Tensor, scale: Tensor) -> Tensor:
    codes = (integers + 1).to(torch.uint8).reshape(len(integers), -1, 4, 32)
    joined = codes[:, :, 0] | codes[:, :, 1] << 2 | codes[:, :, 2] << 4 | codes[:, :, 3] << 6
    return torch.cat([joined.flatten(1), scale], 1)


def _q4_0(integers: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([scale, _halves((integers + 8).to(torch.uint8))], 1)


def _q5_0(integers: Tensor, scale: Tensor) -> Tensor:
    codes = (integers + 16).to(torch.uint8)
    return torch.cat([scale, pack(codes >> 4, 1), _halves(codes & 15)], 1)


def _q8_0(integers: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([scale, integers.to(torch.int8).view(torch.uint8)], 1)


_KINDS = {
    "tq2_0": _Kind(-1, 1, _tq2_0),
    "q4_0": _Kind(-8, 7, _q4_0),
    "q5_0": _Kind(-16, 15, _q5_0),
    "q8_0": _Kind(-128, 127, _q8_0),
}
"""Types by name, the smallest first."""
_COLUMNS = 32  # of a block of all but the ternary type


def type_of(layer: SpikingLinear) -> str:
    """The smallest type that holds the weights of a layer exactly.

    Raises:
        RequestError: there is none; says why.
    """
    if layer.neuron is not None:
        raise RequestError("inputs are spikes, whose thresholds GGUF has no words for")
    if not layer.format.has_integers:
        raise RequestError(f"weights are {layer.format.name}, not integers with a scale")
    layout = layer.layout()
    if layout.order is not None or len(set(layout.weight_steps)) > 1:
        raise RequestError("columns take different numbers of steps, so scales of their own")
    if loose := next((stop for _, stop in layout.weight_groups if stop % _COLUMNS), None):
        raise RequestError(
            f"a group of columns ends at {loose} of {layer.in_features} inputs, within one of"
            f" GGUF's blocks of {_COLUMNS}; convert with groups that are a multiple"
        )
    _require_exact(_scale_of(layer))
    integers = layer.integer_weights()
    low, high = int(integers.min()), int(integers.max())
    for name, kind in _KINDS.items():
        ends = all(stop % block_of(name)[0] == 0 for _, stop in layout.weight_groups)
        if ends and kind.lowest <= low and high <= kind.highest:
            return name
    raise RequestError(
        f"integers reach from {low} to {high}, GGUF's from -128 to 127; convert with --set"
        " weights.symmetric=true"
    )


def blocks_of(layer: SpikingLinear, name: str) -> Tensor:
    """The weights of a layer in a type that holds them: uint8, ``(out, bytes)``.

    Raises:
        SpikeLLMError: the ``gguf`` package reads other weights from them.
    """
    columns, (rows, inputs) = block_of(name)[0], (layer.out_features, layer.in_features)
    integers = layer.integer_weights().cpu().reshape(-1, columns)
    groups = torch.tensor([stop - start for start, stop in layer.layout().weight_groups])
    scale = _scale_of(layer).cpu().repeat_interleave(groups // columns, 1).reshape(-1, 1)
    packed = _KINDS[name].packed(integers, scale.half().view(torch.uint8)).reshape(rows, -1)
    if not torch.equal(_read(packed.numpy(), name), layer.dense_weight().cpu()):
        raise SpikeLLMError(
            f"blocks of {name} read as other weights than {rows} × {inputs} of the model; please"
            " report this"
        )
    return packed


def _read(blocks: np.ndarray[Any, Any], name: str) -> Tensor:
    gguf = require_gguf()
    kind = gguf.GGMLQuantizationType[name.upper()]
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind))


def _scale_of(layer: SpikingLinear) -> Tensor:
    """Scales in use, float32 ``(out, groups)``."""
    return layer.weight_scale[:, : len(layer.layout().weight_groups)].detach().float()


def _require_exact(scale: Tensor) -> None:
    """Raise if a scale is no number of float16."""
    inexact = scale[scale.half().float() != scale]
    if not len(inexact):
        return
    if bool((inexact.bfloat16().float() == inexact).all()):
        raise RequestError(
            f"the scale {float(inexact[0]):.3g} is out of the range in which float16, the type of"
            " scales in GGUF, has all of its bits"
        )
    raise RequestError(
        "scales have more bits than float16, the type of scales in GGUF; convert with --set"
        " weights.scale_bits=16"
    )
