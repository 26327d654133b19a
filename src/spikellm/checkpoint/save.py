"""Save and load through the model library's own methods: ordinary safetensors shards that
``from_pretrained`` reloads, strictly.

``import spikellm`` registers the classes below as soon as the model library is imported. Where that
import is missing, what :mod:`spikellm.checkpoint.notice` leaves in ``config.json`` makes the
library refuse the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from spikellm.checkpoint.card import model_card
from spikellm.checkpoint.config import METHOD, SpikeConfig
from spikellm.checkpoint.notice import lift
from spikellm.checkpoint.outline import require_fit
from spikellm.checkpoint.shards import read_headers
from spikellm.checkpoint.vocabulary import put_stored_vocabulary
from spikellm.core.errors import CheckpointError, RequestError
from spikellm.core.files import folder_when_done
from spikellm.models.attention_guard import guard
from spikellm.models.attention_interface import CHILD, IMPLEMENTATION, register
from spikellm.models.experts import unfuse_experts
from spikellm.models.families import is_linear, weight_and_bias
from spikellm.models.swap import replace_module, spiking_like
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.nn.rotation import Rotated, Rotation, layer_name, rotation_of
from spikellm.nn.validation import validation_error, wrong_stored_type
from spikellm.runtime.decoder_step.hook import use_step

register_quantization_config(METHOD)(SpikeConfig)


@register_quantizer(METHOD)
class SpikeQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts spiking layers into an empty model before its weights are read, and checks them
    afterwards.
    """

    quantization_config: SpikeConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        recipe = self.quantization_config.parsed_recipe()
        paths = [Path(file) for file in checkpoint_files or () if file.endswith(".safetensors")]
        shards, where = read_headers(paths), str(paths[0].parent) if paths else ""
        if paths:
            require_fit(model, shards, where, packed=True)
        unfuse_experts(model)
        for name in self.quantization_config.modules:
            outer = layer_name(name)
            if outer != name and is_linear(found := _listed_module(model, outer)):
                channels, centered = (
                    weight_and_bias(found)[0].shape[1],
                    rotation_of(name) + ".offset",
                )
                rotation = Rotation(channels, "meta", centered=centered in shards.tensors)
                replace_module(model, outer, Rotated(rotation, found))
            module, settings = _listed_module(model, name), recipe.for_module(outer)
            if settings is None or not is_linear(module):
                raise CheckpointError(
                    f"config.json lists {name!r} as converted, but its recipe or the model says"
                    " otherwise; the folder is damaged"
                )
            layer = spiking_like(
                module,
                settings,
                "meta",
                tuple(self.quantization_config.sizes.get(name, ())),
                biased=f"{name}.bias" in shards.tensors,
            )
            if f"{name}.group_share" in shards.tensors:
                layer.share_ranges()
            replace_module(model, name, layer)
            parent = model.get_submodule(outer.rpartition(".")[0])
            if (
                not parent._non_persistent_buffers_set
            ):  # (tables of positions, masks: these do want their initialisation)
                # some families initialise a layer's weight from the module around it; there is
                # nothing left to initialise
                parent._is_hf_initialized = True  # type: ignore[assignment]
        put_stored_vocabulary(model, self.quantization_config)
        for name, shape in self.quantization_config.attention.items():
            module, spiking = _listed_module(model, name), recipe.attention_for(name)
            if spiking is None:
                raise CheckpointError(
                    f"config.json lists {name!r} as spiking, but its recipe says otherwise; the"
                    " folder is damaged"
                )
            spikes = SpikingAttention(HeadShape(*shape), spiking, device="meta")
            for part in ("query", "key", "value"):
                if f"{name}.{CHILD}.{part}_share" in shards.tensors:
                    spikes.share_ranges(part)
            setattr(module, CHILD, spikes)
        _require_none(wrong_stored_type(model, shards.dtypes))
        if paths:
            require_fit(model, shards, where)
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Attention that spikes runs through the interface.

        This is also where the library first shows the configuration, before it looks for weights.

        Raises:
            RequestError: another implementation was asked for.
        """
        lift(config)
        if self.quantization_config.attention:
            register()
            text = config.get_text_config(decoder=True)
            if (asked := text._attn_implementation) not in (None, IMPLEMENTATION):
                raise RequestError(
                    f"attn_implementation is {asked!r}, under which this model's attention would"
                    f" not spike; leave it unset, or give {IMPLEMENTATION!r}"
                )
            text._attn_implementation = IMPLEMENTATION
        return config

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        missing = [
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors"
                f" ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); it is incomplete,"
                " convert again"
            )
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise CheckpointError(
                    f"{name} holds {parameter.dtype}, expected floating-point numbers; the"
                    " checkpoint is damaged"
                )
        _require_none(validation_error(model))
        if self.quantization_config.attention:
            guard(model)
        use_step(model)
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the frozen integers are, see :mod:`spikellm.nn.lora`."""
        return True


def _require_none(problem: str | None) -> None:
    if problem:
        raise CheckpointError(f"{problem}; the checkpoint is damaged")


def _listed_module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"config.json lists the converted module {name!r}, which {type(model).__name__} does"
            " not have; the folder is damaged"
        ) from None


def mark_converted(model: Any, config: SpikeConfig) -> None:
    """Tell the model library that a model was converted, so that it can save it."""
    model.config.quantization_config = config
    model.hf_quantizer = SpikeQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    if config.attention:
        guard(model)
    use_step(model)


def spike_config(model: Any) -> SpikeConfig | None:
    """Configuration of a converted model; None for an ordinary one."""
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, SpikeConfig) else None


def save(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str | int = "1GB",
) -> Path:
    """Write a converted model, its tokenizer and a model card to a folder, which appears only once
    it is complete.

    Raises:
        RequestError: the model was not converted, or ``out`` is not empty, and may not be
            overwritten or is no model.
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
