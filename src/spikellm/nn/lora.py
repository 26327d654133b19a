"""Low-rank adapters of peft beside spiking layers: the integers stay as they are, the adapter reads
the uncoded input and is trained in floating point.

``import spikellm`` makes every ``LoraConfig`` know these layers.
"""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.lora.layer import Linear
from torch import nn

from spikellm.core.errors import RequestError
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotated

_INITIAL = (True, False, "gaussian")


class SpikingLora(Linear):  # type: ignore[misc]
    """An adapter beside a :class:`SpikingLinear`, with a rotation before it or not.

    Raises:
        RequestError: the configuration asks for what needs weights in floating point (DoRA and
            other variants, initial values from weights), or trains biases.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain adapters alone."""
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **rest: Any
    ) -> None:
        """Add an adapter of rank ``r``."""
        _require_plain(config)
        super().update_layer(adapter_name, r, lora_alpha, config, **rest)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return cast(int, module.in_features), cast(int, module.out_features)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the sum would have to be coded anew.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "an adapter cannot be merged into the integer weights of a spiking layer; keep it"
            " beside the layer, or merge it into the original model and convert that"
        )


def _require_plain(config: Any) -> None:
    if config.init_lora_weights not in _INITIAL:
        raise RequestError(
            f"init_lora_weights={config.init_lora_weights!r} needs weights in floating point, and"
            " spiking layers hold integers; use True or 'gaussian'"
        )
    if config.bias != "none" or config.lora_bias:
        raise RequestError(
            f"bias={config.bias!r}, lora_bias={config.lora_bias}: biases of spiking layers are"
            " frozen; use bias='none' and lora_bias=False"
        )
    variants = [
        name
        for name, field in type(config).__dataclass_fields__.items()
        if field.metadata.get("is_lora_variant") and getattr(config, name)
    ]
    if variants:
        raise RequestError(
            f"{variants[0]} is a form of LoRA that works on weights in floating point, and spiking"
            " layers hold integers; use plain LoRA"
        )


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    SpikingLinear: SpikingLora,
    Rotated: SpikingLora,
}
"""Adapters by the kind of layer, as ``LoraConfig._register_custom_module`` takes them."""
