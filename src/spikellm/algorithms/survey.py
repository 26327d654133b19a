"""What an algorithm sees of a layer before any block is converted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

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
