"""Integer weights as a compressed-tensors checkpoint, which vLLM, SGLang and the model library
read; inputs as they are, or as spikes of one step and one range, whose thresholds are the format's
own dynamic quantization by token: ``θ = (high − low) / (2^bits − 1)`` and a zero-point.

Codes, zero-points and scales are those of the converted model: ``(code − zero)·scale`` is written
as ``(q − z)·scale`` with ``q = code − 2^(bits−1)`` and ``z = zero − 2^(bits−1)``, packed into words
of 32 bits by the format's own package (``pack-quantized``; ``int-quantized``, a byte each, where
inputs are coded). Scales are in the model's type, for
that is what readers take; the record says by how much they are rounded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spikellm.checkpoint.outline import outline_of
from spikellm.checkpoint.save import spike_config
from spikellm.core.errors import RequestError
from spikellm.core.extras import require
from spikellm.core.files import write_atomically
from spikellm.export.base import Source, exporters
from spikellm.neurons.base import keeps
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.packing import unpack

NOT_EXPRESSED = ("the recipe and the record of the conversion: the folder holds weights alone",)
_SPIKES = "that codes are spikes: readers quantize inputs in the model's type, ties to even"
_WEIGHTS = "model.safetensors"


@exporters.register("compressed-tensors")
class CompressedTensorsExporter:
    """A whole model as ``model.safetensors``, ``config.json`` and its tokenizer."""

    not_expressed: tuple[str, ...] = NOT_EXPRESSED

    def __init__(self) -> None:
        require("compressed-tensors checkpoints", "compressed", "compressed_tensors")

    def refuses(self, model: Any) -> str | None:
        config = spike_config(model)
        layers = spiking_linears(model)
        if config is None or not layers:
            return "is not converted; compressed-tensors holds integer weights"
        if config.attention:
            return "codes Q, K and V as spikes, which compressed-tensors has no words for"
        for name, module in model.named_modules():
            own = type(module).__module__.startswith("spikellm.")
            if own and not isinstance(module, SpikingLinear):
                return (
                    f"has a {type(module).__name__} ({name}), which compressed-tensors has no words"
                    " for; export a model without transforms and with its vocabulary at 16 bits"
                )
        return next(
            (f"{why} ({name})" for name, one in layers.items() if (why := _unfit(one))), None
        )

    def export(self, source: Source, folder: Path) -> list[dict[str, Any]]:
        """See :class:`spikellm.export.base.Exporter`."""
        model, layers = source.model, spiking_linears(source.model)
        if source.layers:
            raise RequestError("compressed-tensors holds whole models; leave --layer out")
        dense = _linear_names(model)
        if strange := sorted(set(layers) - dense):
            raise RequestError(
                f"{strange[0]} is no torch.nn.Linear in the model library, so readers of"
                " compressed-tensors would not find it"
            )
        if any(layer.neuron is not None for layer in layers.values()):
            self.not_expressed = (*NOT_EXPRESSED, _SPIKES)
        tensors: dict[str, Tensor] = {}
        groups, rounded = defaultdict(list), 0.0
        for name, layer in layers.items():
            scheme = _scheme_of(layer)
            groups[scheme].append(name)
            own, error = _tensors_of(layer, model.dtype, packed=scheme.packed)
            rounded = max(rounded, error)
            tensors |= {f"{name}.{key}": value for key, value in own.items()}
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.detach().to(model.dtype)
        tensors |= _others(model, layers)
        data = model.config.to_dict()
        data["quantization_config"] = _configuration(groups, sorted(dense - set(layers)))
        text = json.dumps(data, indent=2, sort_keys=True, default=str) + "\n"
        write_atomically(folder / "config.json", lambda path: path.write_text(text, "utf-8"))
        kept = {key: value.contiguous().cpu() for key, value in tensors.items()}
        write_atomically(
            folder / _WEIGHTS, lambda path: save_file(kept, path, metadata={"format": "pt"})
        )
        source.tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        return [
            {
                "file": _WEIGHTS,
                "layers": len(layers),
                "bytes": sum(one.nbytes for one in kept.values()),
                "scales_rounded_by": rounded,
            }
        ]


def _unfit(layer: SpikingLinear) -> str | None:
    """Why a layer cannot be written; None if it can."""
    layout = layer.layout()
    widths = {stop - start for start, stop in layout.weight_groups}
    if layer.neuron is not None and (why := _unfit_inputs(layer)) is not None:
        return why
    if layer.format.name != "affine":
        return f"weights are {layer.format.name}, not integers with zero-points"
    if layout.order is not None or max(layout.weight_steps) > 1:
        return "columns take different numbers of steps"
    if len(widths) > 1:
        return f"{layer.in_features} inputs are no multiple of the group"
    return None


def _unfit_inputs(layer: SpikingLinear) -> str | None:
    """Why coded inputs cannot be said in the format; None if they can."""
    spec = layer.spec()
    if len(spec.bounds) > 1 or spec.steps != (1,) or spec.massive is not None:
        return "channels or tokens of the inputs take different ranges or numbers of steps"
    if spec.thresholds != "asymmetric" or spec.threshold_source != "range" or spec.share(0) != 1:
        return (
            "thresholds of the inputs are not those of the whole range with a zero-point, the"
            " only ones that compressed-tensors has words for"
        )
    assert spec.neuron is not None
    if not keeps(spec.neuron, "top", "encode") or _input_bits(layer) is None:
        return f"neuron {layer.settings.activations.neuron} has codes of its own"
    return None


def _input_bits(layer: SpikingLinear) -> int | None:
    """Bits of the inputs, whose codes take all of them; None where some stay unused."""
    top = layer.spec().tops[0]
    return top.bit_length() if top + 1 == 1 << top.bit_length() else None


class _Scheme(NamedTuple):
    """Bits of weights, columns of a group (None: a row has one scale), bits of inputs that are
    coded.
    """

    bits: int
    width: int | None
    inputs: int | None

    @property
    def packed(self) -> bool:
        """Whether codes lie in words of 32 bits, not in bytes."""
        return self.inputs is None

    @property
    def format(self) -> str:
        """What the format calls that."""
        return "pack-quantized" if self.packed else "int-quantized"


def _scheme_of(layer: SpikingLinear) -> _Scheme:
    groups = layer.layout().weight_groups
    width = groups[0][1] - groups[0][0] if len(groups) > 1 else None
    inputs = None if layer.neuron is None else _input_bits(layer)
    return _Scheme(layer.settings.weights.bits, width, inputs)


def _tensors_of(
    layer: SpikingLinear, dtype: torch.dtype, *, packed: bool
) -> tuple[dict[str, Tensor], float]:
    """What is stored of a layer, and the most that a scale was rounded by, as a share of it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, (codes, zero) = layer.settings.weights.bits, layer.packed_codes()
    middle, count = 2 ** (bits - 1), len(layer.layout().weight_groups)
    integers = unpack(codes, bits, layer.in_features).to(torch.int16) - middle
    zeros = zero[:, :count].to(torch.int16) - middle
    scale = layer.weight_scale[:, :count].float()
    kept = scale.to(dtype)
    error = float(((kept.float() - scale).abs() / scale).max())
    if not packed:
        own = {"weight": integers, "weight_zero_point": zeros}
        return {"weight_scale": kept, **{k: v.to(torch.int8) for k, v in own.items()}}, error
    return {
        "weight_packed": pack_to_int32(integers.to(torch.int8), bits),
        "weight_scale": kept,
        "weight_zero_point": pack_to_int32(zeros.to(torch.int8), bits, packed_dim=0),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }, error


def _others(model: Any, layers: dict[str, SpikingLinear]) -> dict[str, Tensor]:
    """Parameters and saved buffers of all that is not converted; tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        key: value
        for key, value in model.state_dict().items()
        if key.rpartition(".")[0] not in layers and key not in tied
    }


def _linear_names(model: Any) -> set[str]:
    """Linear layers of the model as the library builds it."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.__dict__.pop("quantization_config", None)
    outline = outline_of(config)
    return {name for name, one in outline.named_modules() if type(one) is nn.Linear}


def _configuration(groups: dict[_Scheme, list[str]], ignored: list[str]) -> dict[str, Any]:
    """What readers go by."""
    schemes = {
        f"group_{number}": {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": False,
                "strategy": "channel" if scheme.width is None else "group",
                "group_size": scheme.width,
                "dynamic": False,
            },
            "input_activations": None
            if scheme.inputs is None
            else {
                "num_bits": scheme.inputs,
                "type": "int",
                "symmetric": False,
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
            "format": scheme.format,
        }
        for number, (scheme, names) in enumerate(groups.items())
    }
    formats = {scheme.format for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
