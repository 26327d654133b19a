"""Save and load through the model library's own methods: ordinary safetensors shards that ``from_pretrained`` reloads, strictly.

``import spikellm`` registers the classes below as soon as the model library is imported. Where that import is missing, the library itself
only warns and fills the layers with random numbers; the model card says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from spikellm.checkpoint.card import model_card
from spikellm.checkpoint.config import METHOD, SpikeConfig
from spikellm.checkpoint.integrity import stored_types
from spikellm.errors import CheckpointError, RequestError
from spikellm.files import folder_when_done
from spikellm.modeling.attention import CHILD, IMPLEMENTATION, register
from spikellm.modeling.attention_spikes import HeadShape, SpikingAttention
from spikellm.modeling.cache import install_cache
from spikellm.modeling.experts import unfuse_experts
from spikellm.modeling.families import is_linear, weight_and_bias
from spikellm.modeling.linear import SpikingLinear
from spikellm.modeling.rotated import Rotated, Rotation, layer_name
from spikellm.modeling.swap import replace_module, spiking_like

_STORED = {torch.float32: "F32", torch.uint8: "U8"}  # names of types in safetensors' headers

register_quantization_config(METHOD)(SpikeConfig)


@register_quantizer(METHOD)
class SpikeQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts spiking layers into an empty model before its weights are read, and checks them afterwards."""

    quantization_config: SpikeConfig

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any) -> nn.Module:
        recipe = self.quantization_config.parsed_recipe()
        unfuse_experts(model)
        for name in self.quantization_config.modules:
            outer = layer_name(name)
            if outer != name and is_linear(found := _listed_module(model, outer)):
                replace_module(model, outer, Rotated(Rotation(weight_and_bias(found)[0].shape[1], "meta"), found))
            settings, module = recipe.for_module(outer), _listed_module(model, name)
            if settings is None or not is_linear(module):
                raise CheckpointError(
                    f"config.json lists {name!r} as converted, but its recipe or the model says otherwise; the folder is damaged"
                )
            replace_module(model, name, spiking_like(module, settings, "meta", tuple(self.quantization_config.sizes.get(name, ()))))
            parent = model.get_submodule(name.rpartition(".")[0])
            if not parent._non_persistent_buffers_set:  # (tables of positions, masks: these do want their initialisation)
                # some families initialise a layer's weight from the module around it; there is nothing left to initialise
                parent._is_hf_initialized = True  # type: ignore[assignment]
        for name, shape in self.quantization_config.attention.items():
            spiking, module = recipe.attention_for(name), _listed_module(model, name)
            if spiking is None:
                raise CheckpointError(f"config.json lists {name!r} as spiking, but its recipe says otherwise; the folder is damaged")
            setattr(module, CHILD, SpikingAttention(HeadShape(*shape), spiking, device="meta"))
        for shard in checkpoint_files or ():
            if shard.endswith(".safetensors"):
                check_stored_types(model, stored_types(Path(shard)))
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Attention that spikes runs through the interface, whatever was asked for."""
        if self.quantization_config.attention:
            register()
            config._attn_implementation = IMPLEMENTATION
        return config

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        missing = [
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); it is incomplete, convert again"
            )
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise CheckpointError(f"{name} holds {parameter.dtype}, expected floating-point numbers; the checkpoint is damaged")
        check_types(model)
        for name, module in model.named_modules():
            if isinstance(module, SpikingLinear):
                check_layer(name, module)
            elif isinstance(module, SpikingAttention):
                check_attention(name, module)
            elif isinstance(module, Rotation) and not module.signs.is_meta and int(module.signs.max()) > 2:
                raise CheckpointError(f"{name}.signs holds {int(module.signs.max())}, expected 0, 1 or 2; the checkpoint is damaged")
        if self.quantization_config.attention:
            install_cache(model)
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _listed_module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"config.json lists the converted module {name!r}, which {type(model).__name__} does not have; the folder is damaged"
        ) from None


def _own_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Buffers of spiking modules by full name, with the type that a conversion writes: scales and means are float32, all others bytes."""
    for name, module in model.named_modules():
        if isinstance(module, (SpikingLinear, SpikingAttention, Rotation)):
            for own, buffer in module.named_buffers(prefix=name, recurse=False):
                yield own, buffer, torch.float32 if own.endswith(("_scale", "_mean")) else torch.uint8


def check_stored_types(model: nn.Module, stored: dict[str, str]) -> None:
    """Refuse buffers that a file holds in another type than a conversion writes; the model library would cast them, NaN to 0.

    Raises:
        CheckpointError: names the buffer.
    """
    for name, _, expected in _own_buffers(model):
        found, written = stored.get(name), _STORED[expected]
        if found not in (None, written):
            raise CheckpointError(f"{name} is stored as {found}, expected {written}; the checkpoint is damaged")


def check_types(model: nn.Module) -> None:
    """The same of buffers that were read (or cast since, ``dtype=…``). Kernels rely on it.

    Raises:
        CheckpointError: names the buffer.
    """
    for name, buffer, expected in _own_buffers(model):
        if buffer.dtype != expected:
            raise CheckpointError(f"{name} holds {buffer.dtype}, expected {expected}; the checkpoint is damaged")


def check_layer(name: str, layer: SpikingLinear) -> None:
    """Refuse state that no conversion writes: groups that do not exist, zero steps, scales that are not finite and positive.

    Raises:
        CheckpointError: names the layer and the buffer.
    """
    if layer.weight_scale.is_meta:
        return  # offloaded to disk
    if int(layer.channel_group.max()) >= layer.group_steps.shape[0]:
        raise CheckpointError(
            f"{name}.channel_group names group {int(layer.channel_group.max())} of {layer.group_steps.shape[0]}; the checkpoint is damaged"
        )
    expected = list(layer.settings.activations.group_steps)
    if layer.group_steps.tolist() != expected:
        raise CheckpointError(
            f"{name}.group_steps holds {layer.group_steps.tolist()}, the recipe says {expected}; the checkpoint is damaged"
        )
    if not bool((torch.isfinite(layer.weight_scale) & (layer.weight_scale > 0)).all()):
        raise CheckpointError(f"{name}.weight_scale holds values that are not finite and positive; the checkpoint is damaged")
    if problem := layer.damage():
        raise CheckpointError(f"{name}.{problem}; the checkpoint is damaged")


def check_attention(name: str, spikes: SpikingAttention) -> None:
    """Refuse groups that do not exist.

    Raises:
        CheckpointError: names the module and the buffer.
    """
    for part, settings in (("key_group", spikes.settings.key), ("value_group", spikes.settings.value)):
        group = getattr(spikes, part)
        if not group.is_meta and int(group.max()) >= len(settings.group_ranges):
            raise CheckpointError(
                f"{name}.{part} names group {int(group.max())} of {len(settings.group_ranges)}; the checkpoint is damaged"
            )
    mean = spikes._buffers.get("key_mean")
    if mean is not None and not mean.is_meta and not bool(torch.isfinite(mean).all()):
        raise CheckpointError(f"{name}.key_mean holds values that are not finite; the checkpoint is damaged")


def mark_converted(model: Any, config: SpikeConfig) -> None:
    """Tell the model library that a model was converted, so that it can save it."""
    model.config.quantization_config = config
    model.hf_quantizer = SpikeQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    if config.attention:
        install_cache(model)


def spike_config(model: Any) -> SpikeConfig | None:
    """Configuration of a converted model; None for an ordinary one."""
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, SpikeConfig) else None


def save(model: Any, tokenizer: Any, out: str | Path, *, overwrite: bool = False, max_shard_size: str | int = "1GB") -> Path:
    """Write a converted model, its tokenizer and a model card to a folder, which appears only once it is complete.

    Raises:
        RequestError: the model was not converted, or ``out`` is not empty, and may not be overwritten or is no model.
        SpikeLLMError: the disk refused.
    """
    config = spike_config(model)
    if config is None:
        raise RequestError("the model was not converted; call spikellm.convert first")
    out = Path(out)
    with folder_when_done(out, overwrite=overwrite) as folder:
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        except OSError:
            raise
        except Exception as error:
            if "No space left" in str(error):  # safetensors wraps the system's error
                raise OSError(28, "No space left on device") from None
            raise
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(out.name, model, config), encoding="utf-8")
    return out
