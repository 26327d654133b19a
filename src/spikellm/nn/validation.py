"""What the state of spiking modules may hold.

Whatever reads such state from a file, a model folder or a journal, asks here before it is used;
kernels rely on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from spikellm.neurons.price import MOST_PRICE
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotation
from spikellm.nn.vocabulary import CodedEmbedding, CodedTable
from spikellm.quantization.thresholds import FULL_RANGE, MOST_FACTOR, MOST_SHARE

_STORED = {  # names of types in safetensors' headers
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.bfloat16: "BF16",
}


_FLOATS = ("_scale", "_mean", "_map", "_threshold", "_baseline", "_share", "_price", "offset")
"""Ends of names of float32 buffers."""


def own_buffers(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Buffers of spiking modules by full name, with the type that a conversion writes: that which a
    weight format declares; of other buffers float32 for scales, means and what tells tokens, else
    bytes.
    """
    for name, module in root.named_modules(prefix=prefix):
        if not isinstance(module, (SpikingLinear, SpikingAttention, Rotation, CodedTable)):
            continue
        declared = {}
        if isinstance(module, SpikingLinear):
            declared = {one.name: one.dtype for one in module.format.buffers(module.shape)}
        for own, buffer in module.named_buffers(recurse=False):
            usual = torch.float32 if own.endswith(_FLOATS) else torch.uint8
            yield (f"{name}.{own}" if name else own), buffer, declared.get(own, usual)


def wrong_stored_type(root: nn.Module, stored: Mapping[str, str]) -> str | None:
    """The first buffer that a file holds in another type (``F32``, ``U8``) than a conversion
    writes, which would be cast, NaN to 0; None if there is none.
    """
    for name, _, expected in own_buffers(root):
        found, written = stored.get(name), _STORED[expected]
        if found not in (None, written):
            return f"{name} is stored as {found}, expected {written}"
    return None


def validation_error(root: nn.Module, prefix: str = "") -> str | None:
    """The first thing in the state of the spiking modules within a module that no conversion
    writes; None if all is well.

    That is: buffers of another type (as read, or cast since), groups that do not exist, steps that
    are not the recipe's, scales that are not finite and positive, codes of weights or signs of
    rotations out of range.
    """
    for name, buffer, expected in own_buffers(root, prefix):
        if buffer.dtype != expected:
            return f"{name} holds {buffer.dtype}, expected {expected}"
    for name, module in root.named_modules(prefix=prefix):
        problem = None
        if isinstance(module, SpikingLinear):
            problem = _of_layer(module)
        elif isinstance(module, SpikingAttention):
            problem = _of_attention(module)
        elif isinstance(module, Rotation):
            problem = _of_rotation(module)
        elif isinstance(module, CodedTable):
            problem = _of_scales(module)
        elif isinstance(module, CodedEmbedding):
            problem = _of_embedding(module)
        if problem:
            return f"{name}.{problem}"
    return None


def _of_scales(module: SpikingLinear | CodedTable) -> str | None:
    scale = module.weight_scale
    if scale.is_meta or bool((torch.isfinite(scale) & (scale > 0)).all()):
        return None
    return "weight_scale holds values that are not finite and positive"


def _of_embedding(embedding: CodedEmbedding) -> str | None:
    if embedding.multiplier.is_meta or bool(torch.isfinite(embedding.multiplier).all()):
        return None
    return f"multiplier holds {float(embedding.multiplier):g}, expected a finite number"


def _of_rotation(rotation: Rotation) -> str | None:
    if rotation.signs.is_meta:
        return None
    if int(rotation.signs.max()) > 2:
        return f"signs holds {int(rotation.signs.max())}, expected 0, 1 or 2"
    if rotation.offset is not None and not bool(torch.isfinite(rotation.offset).all()):
        return "offset holds values that are not finite"
    return None


def _of_layer(layer: SpikingLinear) -> str | None:
    if layer.weight_scale.is_meta:
        return None  # offloaded to disk
    if int(layer.channel_group.max()) >= layer.group_steps.shape[0]:
        return (
            f"channel_group names group {int(layer.channel_group.max())} of"
            f" {layer.group_steps.shape[0]}"
        )
    expected = list(layer.settings.activations.group_steps)
    if layer.group_steps.tolist() != expected:
        return f"group_steps holds {layer.group_steps.tolist()}, the recipe says {expected}"
    by_mean = layer.settings.activations.threshold_from == "mean"
    widest, largest = (255, MOST_FACTOR) if by_mean else (FULL_RANGE, MOST_SHARE)
    if not 0 < layer.range_share <= widest:
        return f"input_range holds {layer.range_share}, expected 1 to {widest}"
    shares = layer.shares
    if shares is not None and not bool(((shares > 0) & (shares <= largest)).all()):
        return f"group_share holds {shares.tolist()}, expected numbers above 0 up to {largest}"
    if layer.settings.activations.token_steps:
        threshold, share = (layer.get_buffer(f"token_{one}") for one in ("threshold", "share"))
        if not (float(threshold) > 0 and 0 <= float(share) <= 1):
            return (
                f"token_threshold and token_share hold {float(threshold):g} and {float(share):g},"
                " expected a positive number and a share"
            )
    if problem := _of_price(layer, "spike_price") or _of_constants(layer):
        return problem
    return _of_scales(layer) or _of_sizes(layer) or layer.validation_error()


def _of_sizes(layer: SpikingLinear) -> str | None:
    try:
        held = layer.format.sizes_of(dict(layer.named_buffers(recurse=False)))
    except ValueError as error:
        return str(error)
    return None if held == layer.sizes else "sizes in config.json are not those of its tensors"


def _of_constants(layer: SpikingLinear) -> str | None:
    fixed, neuron, settings = layer.fixed, layer.neuron, layer.settings.activations
    if fixed is None or neuron is None:
        return None
    if not bool((torch.isfinite(fixed.theta) & (fixed.theta > 0)).all()):
        return "group_threshold holds values that are not finite and positive"
    top = torch.tensor([int(neuron.top(steps)) for steps in settings.group_steps])
    least, most = torch.zeros_like(top), top
    if neuron.signed:
        most = least
    elif settings.symmetric:
        least = most = top // 2
    z = fixed.baseline.cpu()
    if not bool(((z >= least) & (z <= most) & (z == z.round())).all()):
        return f"group_baseline holds {z.tolist()}, expected whole numbers up to {most.tolist()}"
    return None


def _of_price(module: nn.Module, name: str) -> str | None:
    price = module._buffers.get(name)
    if price is None or price.is_meta or 0 <= float(price) <= MOST_PRICE:
        return None
    return f"{name} holds {float(price):g}, expected 0 to {MOST_PRICE:g}"


def _of_attention(spikes: SpikingAttention) -> str | None:
    for part, settings in (
        ("key_group", spikes.settings.key),
        ("value_group", spikes.settings.value),
    ):
        group = getattr(spikes, part)
        if not group.is_meta and int(group.max()) >= len(settings.group_ranges):
            return f"{part} names group {int(group.max())} of {len(settings.group_ranges)}"
        threshold = spikes._buffers.get(part.replace("group", "threshold"))
        if threshold is not None and not threshold.is_meta and not bool((threshold > 0).all()):
            return f"{part.replace('group', 'threshold')} holds values that are not positive"
    for part in ("query", "key", "value"):
        share = spikes._buffers.get(f"{part}_share")
        by_mean = getattr(spikes.settings, part).threshold_from == "mean"
        most = MOST_FACTOR if by_mean else MOST_SHARE
        if share is not None and not share.is_meta and not 0 < float(share) <= most:
            return f"{part}_share holds {float(share):g}, expected above 0 up to {most:g}"
    for name in ("key_price", "value_price"):
        if problem := _of_price(spikes, name):
            return problem
    for name in ("key_mean", "key_map"):
        values = spikes._buffers.get(name)
        if values is not None and not values.is_meta and not bool(torch.isfinite(values).all()):
            return f"{name} holds values that are not finite"
    return None
