"""A look at the whole full-precision model before any block is converted, for pipelines that decide over all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spikellm.calibration.activations import ActivationStore, SampledInputs
from spikellm.calibration.plan import BlockPlan
from spikellm.calibration.ranks import OwnWindows
from spikellm.calibration.replay import BlockReplay
from spikellm.calibration.sensitivity import output_sensitivity
from spikellm.modeling.experts import every_expert_sees_every_token
from spikellm.modeling.families import Blocks
from spikellm.recipe import LinearRecipe


@dataclass(frozen=True)
class SurveyedLayer:
    """One linear layer to be converted.

    Attributes:
        name: its full name.
        module: the layer, in full precision.
        settings: its recipe.
        hessian: ``XᵀX`` of its inputs in the full-precision model, float64, ``(in, in)``.
        sensitivity: of its outputs (see :mod:`spikellm.calibration.sensitivity`), float32, ``(out,)``.
    """

    name: str
    module: nn.Module
    settings: LinearRecipe
    hessian: Tensor
    sensitivity: Tensor


def survey(
    model: nn.Module,
    part: OwnWindows,
    blocks: Blocks,
    plan: Sequence[BlockPlan],
    replay: BlockReplay,
    device: torch.device,
    wanted: Callable[[LinearRecipe], bool],
    on_stage: Callable[[str], object] = lambda _: None,
    folder: Path | None = None,
) -> Iterator[SurveyedLayer]:
    """The wanted layers, block after block; Hessians live for one block.

    Args:
        part: calibration tokens of this rank.
        replay: runs the blocks on those windows.
        device: where blocks run; the backward pass runs where the model is.
        on_stage: called with a few words before the backward pass and before every block.
        folder: where hidden states are kept; RAM by default.

    Raises:
        NumericalError, RequestError: see :func:`spikellm.calibration.sensitivity.output_sensitivity`.
    """
    names = [name for block in plan for name, settings in block.linears.items() if wanted(settings)]
    on_stage("weighing layers against each other: a backward pass of the whole model, then a look at each block")
    sensitivity = output_sensitivity(model, part, names)
    states = ActivationStore(replay.first_inputs(), folder)
    for index, (block, module) in enumerate(zip(plan, blocks.modules, strict=True)):
        on_stage(f"looking at block {index + 1}/{len(plan)}")
        layers = {name: model.get_submodule(name) for name in block.linears if name in sensitivity}
        home = next(module.parameters()).device
        module.to(device)
        samples = SampledInputs(layers, part.whole, 1, hessian=True, before=part.before)
        with samples.watching(), every_expert_sees_every_token():
            for batch in range(len(states)):
                states[batch] = replay.forward(index, module, states[batch])
        samples.put_together()
        for name, layer in layers.items():
            hessian = samples.hessian(name)
            if hessian is not None:
                yield SurveyedLayer(name, layer, block.linears[name], hessian, sensitivity[name].to(hessian.device))
        module.to(home)
