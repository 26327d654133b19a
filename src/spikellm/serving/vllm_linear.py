"""Spiking linear layers within vLLM: one :class:`spikellm.nn.linear.SpikingLinear` for each layer
of the checkpoint, also where vLLM fuses several, whose spikes have thresholds of their own.

Imported by vLLM's plugin alone (:mod:`spikellm.serving.vllm_plugin`). Layers run as anywhere else:
on a GPU on the Triton kernels, without a graph compiler (``enforce_eager=True``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import regex
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.models.utils import WeightsMapper

from spikellm.checkpoint.config import METHOD, SpikeConfig
from spikellm.core.errors import CheckpointError, UnsupportedModelError
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name
from spikellm.nn.validation import validation_error

_BIAS = "spiking_bias"
"""Where biases of spiking layers are read to: the kernels add them, and vLLM's own layer may have
none where a conversion has put one.
"""
_EXTRA = ("group_share",)
_MODULE = "spiking"
_SHARDS: dict[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}


class SpikeQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """A converted model's configuration as vLLM asks for it."""

    def __init__(self, config: SpikeConfig) -> None:
        super().__init__()
        self.config, self._modules = config, set(config.modules)
        self._recipe = config.parsed_recipe()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpikeQuantizationConfig:
        """From what stands in ``config.json``.

        Raises:
            UnsupportedModelError: something spikes that vLLM computes itself.
        """
        found = SpikeConfig(**config)
        rotated = [name for name in found.modules if layer_name(name) != name]
        for part, there in (
            ("attention", found.attention),
            ("a coded vocabulary", getattr(found, "vocabulary", None)),
            ("rotations before layers", rotated),
        ):
            if there:
                raise UnsupportedModelError(
                    f"the checkpoint has {part}, which vLLM computes in its own way; convert a"
                    " model with spikes in its linear layers alone (w4a4-t2, for example), or use"
                    " `spikellm serve`"
                )
        return cls(found)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is computed: by spikes if the checkpoint has it so.

        Raises:
            UnsupportedModelError: of layers that vLLM fuses only some are converted, or a bias is
                added elsewhere.
        """
        if not isinstance(layer, LinearBase):
            return None
        names = self._names(prefix)
        converted = [name in self._modules for name in names]
        if not any(converted):
            return UnquantizedLinearMethod()
        if not all(converted):
            raise UnsupportedModelError(
                f"vLLM fuses {', '.join(names)}, of which only some are converted; convert all of"
                " them or none"
            )
        if layer.skip_bias_add and layer.has_bias:
            raise UnsupportedModelError(
                f"{prefix} adds its bias elsewhere, which spiking layers do themselves"
            )
        return SpikeLinearMethod(self, names)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Biases of converted layers go to the spiking layers."""
        own = "|".join(regex.escape(name) for name in sorted(self._modules))
        return WeightsMapper(
            orig_to_new_regex={regex.compile(rf"^({own})\.bias$"): rf"\1.{_BIAS}"} if own else {}
        )

    def _names(self, prefix: str) -> list[str]:
        """Layers of the checkpoint that a layer of vLLM is made of."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def layer(self, name: str, columns: int, rows: int) -> SpikingLinear:
        """An empty spiking layer.

        Raises:
            CheckpointError: the recipe does not convert it.
        """
        settings = self._recipe.for_module(name)
        if settings is None:
            raise CheckpointError(
                f"config.json lists {name!r} as converted, but its recipe says otherwise; the"
                " folder is damaged"
            )
        sizes = tuple(self.config.sizes.get(name, ()))
        return SpikingLinear(columns, rows, settings, bias=False, sizes=sizes)


class SpikeLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer of vLLM as spiking layers side by side."""

    def __init__(self, config: SpikeQuantizationConfig, names: Sequence[str]) -> None:
        self._config, self._names = config, list(names)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Empty spiking layers, and a parameter for each of their buffers that loads into them.

        Raises:
            UnsupportedModelError: tensor parallelism, or layers fused in another way.
        """
        whole = (input_size_per_partition, sum(output_partition_sizes)) == (input_size, output_size)
        if not whole or len(output_partition_sizes) != len(self._names):
            raise UnsupportedModelError(
                f"{', '.join(self._names)}: spiking layers are not split over devices; use"
                " tensor_parallel_size=1"
            )
        shards = _Shards(
            self._config.layer(name, input_size, rows)
            for name, rows in zip(self._names, output_partition_sizes, strict=True)
        )
        layer.add_module(_MODULE, shards)
        names = {name for _, name in shards.missing}
        for name in (*sorted(names), _BIAS, *_EXTRA):
            place = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            place.weight_loader = partial(shards.load, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, place)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all was there and is sound.

        Raises:
            CheckpointError: it was not.
        """
        shards = layer.get_submodule(_MODULE)
        assert isinstance(shards, _Shards)
        if shards.missing:
            index, name = min(shards.missing)
            raise CheckpointError(
                f"the checkpoint lacks {self._names[index]}.{name}; it is incomplete, convert again"
            )
        if problem := validation_error(layer):
            raise CheckpointError(f"{problem}; the checkpoint is damaged")
        for name in [name for name, one in layer.named_parameters(recurse=False) if not len(one)]:
            delattr(layer, name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs of all of them, one behind the other; biases are theirs."""
        outputs = [shard(x) for shard in layer.get_submodule(_MODULE).children()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


class _Shards(nn.ModuleList):
    """Spiking layers side by side, and which of their buffers were not loaded yet."""

    def __init__(self, layers: Iterable[SpikingLinear]) -> None:
        super().__init__(layers)
        self.missing = {
            (index, name) for index, one in enumerate(self) for name, _ in one.named_buffers()
        }

    def load(
        self, name: str, place: nn.Parameter, loaded: Tensor, shard: str | int | None = None
    ) -> None:
        """Put a tensor of the checkpoint into the layer that it belongs to; vLLM says by an
        argument, or by an attribute of the tensor, of which one of several it is.
        """
        found = getattr(loaded, "shard_id", None) if shard is None else shard
        index = found if isinstance(found, int) else _SHARDS[found]
        own = self[index]
        assert isinstance(own, SpikingLinear)
        if name == _BIAS:
            own.bias = nn.Parameter(loaded.to(place), requires_grad=False)
            return
        if name in _EXTRA and not hasattr(own, name):
            own.share_ranges()
        target = own.get_buffer(name)
        if target.shape != loaded.shape or target.dtype != loaded.dtype:
            raise CheckpointError(
                f"{name} of a converted layer is {loaded.dtype} {tuple(loaded.shape)}, expected"
                f" {target.dtype} {tuple(target.shape)}; the checkpoint is damaged"
            )
        target.copy_(loaded)
        own.forget()
        self.missing.discard((index, name))
