"""What an algorithm sees of a layer before any block is converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from spikellm.models.families import weight_and_bias
from spikellm.recipe import LinearRecipe


@dataclass(frozen=True)
class SurveyedLayer:
    """One linear layer to be converted.

    Attributes:
        name: its full name.
        module: the layer, in full precision.
        settings: its recipe.
        hessian: ``XᵀX`` of its inputs in the full-precision model, float64, ``(in, in)``; None
            where nobody asked for it.
        sensitivity: of its outputs (see :mod:`spikellm.observers.sensitivity`), float32,
            ``(out,)``.
        sample: some of its inputs, float32, ``(tokens, in)``.
        shared_input_layers: the layers that read the same tensor and code it by the same settings,
            itself included.
    """

    name: str
    module: nn.Module
    settings: LinearRecipe
    hessian: Tensor | None
    sensitivity: Tensor
    sample: Tensor
    shared_input_layers: tuple[str, ...]

    @property
    def sensitive_weight(self) -> Tensor:
        """Its weight, float32, ``(out, in)``, rows scaled so that the square of what it gives is
        what the final loss makes of it.
        """
        weight = weight_and_bias(self.module)[0].detach().float()
        return weight * self.sensitivity.sqrt().unsqueeze(1)


def by_tensor(layers: Iterable[SurveyedLayer]) -> Iterator[list[SurveyedLayer]]:
    """Layers that read the same tensor and code it by the same settings, together."""
    found: dict[tuple[str, ...], list[SurveyedLayer]] = {}
    for layer in layers:
        found.setdefault(layer.shared_input_layers, []).append(layer)
    yield from found.values()
