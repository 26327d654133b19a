"""How a model's spiking layers run: their execution mode, and their kernels."""

from __future__ import annotations

from typing import get_args

from torch import nn

from spikellm.core.errors import RequestError
from spikellm.kernels.spec import ExecutionMode
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name


def spiking_linears(model: nn.Module) -> dict[str, SpikingLinear]:
    """Spiking linear layers of a model by full name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)
    }


def set_execution_mode(model: nn.Module, mode: ExecutionMode) -> None:
    """Run every spiking layer of a model in one execution mode.

    Raises:
        RequestError: unknown execution mode, no spiking layer, or a layer that does not code its
            inputs.
    """
    layers = spiking_linears(model)
    if mode not in get_args(ExecutionMode):
        raise RequestError(
            f"unknown execution mode {mode!r} (valid: {', '.join(get_args(ExecutionMode))})"
        )
    if not layers:
        raise RequestError("the model has no spiking layer; convert it first")
    silent = [
        name for name, layer in layers.items() if layer.neuron is None and not layer.format.unrolls
    ]
    if mode != "merged" and silent:
        raise RequestError(
            f"{len(silent)} layers do not code their inputs ({layer_name(silent[0])}, …:"
            f" activations.bits is 16), so they have no {mode} execution"
        )
    if mode == "phase" and all(layer.neuron is None for layer in layers.values()):
        raise RequestError(
            "phase execution gives spikes of inputs powers of two, and no layer codes its inputs"
            " (activations.bits is 16); weights that are spikes add up in 'stepped'"
        )
    flat = [
        name
        for name, layer in layers.items()
        if layer.neuron is not None and not layer.neuron.unrolls
    ]
    if mode != "merged" and flat:
        raise RequestError(
            f"{layer_name(flat[0])} codes with neuron"
            f" {layers[flat[0]].settings.activations.neuron!r}, whose codes no train of spikes"
            " reaches; it runs in merged execution only"
        )
    for layer in layers.values():
        layer.execution_mode = mode
