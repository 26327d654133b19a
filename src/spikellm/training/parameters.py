"""Sets of continuous numbers in a converted model that may be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikellm.core.errors import RequestError
from spikellm.models.attention_interface import CHILD, spiking_attentions
from spikellm.models.families import is_linear
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotation
from spikellm.nn.vocabulary import CodedEmbedding, CodedHead
from spikellm.training.base import Trainable

_LEAST = 1 / 64  # of its start that a scale or share may fall to
_ADDED = "_spikellm_added_bias"


def scales_of(model: nn.Module) -> list[Trainable]:
    """Scales of the weights of spiking layers, by row and group; they stay positive."""
    found = []
    for name, layer in spiking_linears(model).items():
        if layer.format.has_integers:
            found.append(_positive(f"{name}.weight_scale", layer.weight_scale))
    return found


def shares_of(model: nn.Module) -> list[Trainable]:
    """Parts of ranges that are coded: of every activation group, and of Q, K and V.

    Raises:
        RequestError: the thresholds of a layer are constants.
    """
    found = []
    for name, layer in spiking_linears(model).items():
        if layer.neuron is not None:
            if layer.fixed is not None:
                raise RequestError(
                    f"the thresholds of {name} are constants, so it codes no part of a token's"
                    " range that could be trained; set shares to false"
                )
            layer.share_ranges()
            found.append(_positive(f"{name}.group_share", layer.get_buffer("group_share")))
    for name, spikes in spiking_attentions(model).items():
        for part in ("query", "key", "value"):
            whole = part == "key" and spikes.settings.key_axis == "sequence"
            if getattr(spikes.settings, part).spiking and not whole:
                share = spikes.share_ranges(part)
                found.append(_positive(f"{name}.{CHILD}.{part}_share", share))
    return found


def gains_of(model: nn.Module) -> list[Trainable]:
    """Gains and biases of norms: vectors outside of linear layers and of a coded vocabulary."""
    inside = _vectors_of_layers(model)
    found = []
    for name, vector in model.named_parameters():
        if vector.dim() == 1 and vector.is_floating_point() and id(vector) not in inside:
            found.append(Trainable(name, vector, _size(vector.detach().float())))
    return found


def biases_of(model: nn.Module) -> list[Trainable]:
    """Biases of spiking layers; layers without one get one of zeros."""
    found = []
    for name, layer in spiking_linears(model).items():
        if layer.bias is None:
            dtype = next(model.parameters()).dtype
            zeros = torch.zeros(layer.out_features, dtype=dtype, device=layer.weight_scale.device)
            layer.bias = nn.Parameter(zeros, requires_grad=False)
            setattr(layer, _ADDED, True)
        # what an input of size 1 in one direction makes of a row
        unit = layer.dense_weight().norm(dim=1)
        found.append(Trainable(f"{name}.bias", layer.bias, unit))
    return found


def forget_added(model: nn.Module) -> None:
    """Take away shares and biases that training added."""
    for spikes in spiking_attentions(model).values():
        for part in ("query", "key", "value"):
            spikes._buffers.pop(f"{part}_share", None)
        spikes.forget()
    for layer in spiking_linears(model).values():
        layer._buffers.pop("group_share", None)
        if layer.__dict__.pop(_ADDED, False):
            layer.bias = None
        layer.forget()


def forget_coders(model: nn.Module) -> None:
    """Let attention make its coders anew, after its shares were written."""
    for spikes in spiking_attentions(model).values():
        spikes.forget()


def forget_prepared(model: nn.Module) -> None:
    """Let spiking modules prepare their kernels anew, after their numbers were written."""
    for module in model.modules():
        if isinstance(module, (SpikingLinear, SpikingAttention, Rotation)):
            module.forget()


def _positive(name: str, tensor: Tensor) -> Trainable:
    start = tensor.detach().clone()
    return Trainable(name, tensor, start, start * _LEAST)


def _size(values: Tensor) -> Tensor:
    """Root mean square, 1 where all are zero."""
    size = values.square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


def _vectors_of_layers(model: nn.Module) -> set[int]:
    return {
        id(vector)
        for module in model.modules()
        if is_linear(module) or isinstance(module, (SpikingLinear, CodedEmbedding, CodedHead))
        for vector in module.parameters(recurse=False)
        if vector.dim() == 1
    }
