"""Which kernels a model's modules run on, and why not on others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from spikellm.kernels import reasons, select
from spikellm.kernels.base import REFERENCE
from spikellm.kernels.spec import MixSpec, RowSpec, Spec
from spikellm.models.attention_interface import spiking_attentions
from spikellm.nn.execution import spiking_linears
from spikellm.nn.rotation import layer_name, rotations
from spikellm.nn.vocabulary import CodedEmbedding, CodedHead

_ANY_LENGTH = "probabilities"  # of attention: one coder for any number of keys
_ONLY_REFERENCE = "there are as many channels as keys"


@dataclass(frozen=True)
class KernelSummary:
    """Modules that run on one backend for the same reasons.

    Attributes:
        backend: that runs them.
        against: of each backend that does not run them, why.
        modules: how many; of attention each coded part counts as one, as rotations do that run with
            the model.
        example: full name of the first.
    """

    backend: str
    against: dict[str, str]
    modules: int
    example: str


def summarize_kernels(model: nn.Module) -> list[KernelSummary]:
    """One entry for each distinct choice: of linear layers first, then of coded
    tables, of attention, and of rotations before layers; each in the order of the model.

    Raises:
        DependencyError: the backend that the user asked for does not work on this machine.
    """
    found: dict[tuple[object, ...], KernelSummary] = {}
    for name, spec, device in _specs(model):
        if name.endswith(f".{_ANY_LENGTH}"):
            backend = REFERENCE
            against = {who: _ONLY_REFERENCE for who in reasons(spec, device) if who != REFERENCE}
        else:
            backend = select(spec, device).name
            against = {who: why for who, why in reasons(spec, device).items() if why is not None}
        key = (backend, *against.items())
        known = found.get(key, KernelSummary(backend, against, 0, name))
        found[key] = KernelSummary(backend, against, known.modules + 1, known.example)
    return list(found.values())


def _specs(model: nn.Module) -> Iterator[tuple[str, Spec, torch.device]]:
    for name, layer in spiking_linears(model).items():
        yield layer_name(name), layer.spec(), layer.weight_scale.device
    for name, module in model.named_modules():
        if isinstance(module, CodedEmbedding):
            yield name, RowSpec(module.table.spec()), module.multiplier.device
        elif isinstance(module, CodedHead):
            yield name, module.table.spec(), module.table.weight_codes.device
    for name, spikes in spiking_attentions(model).items():
        for part, spec in spikes.specs().items():
            yield f"{name}.{part}", spec, spikes.key_group.device
    for name, rotation in rotations(model).items():
        if rotation.rotated:
            yield name, MixSpec(rotation.rotated), rotation.signs.device
