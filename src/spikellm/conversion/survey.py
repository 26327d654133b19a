"""A look at the whole full-precision model before any block is converted, for pipelines that decide
over all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.block_runner import BlockRunner
from spikellm.data.shards import WindowShard
from spikellm.models.experts import every_expert_sees_every_token
from spikellm.models.families import Blocks
from spikellm.models.plan import BlockPlan
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.input_stats import SampledInputs
from spikellm.observers.sensitivity import output_sensitivity
from spikellm.recipe import LinearRecipe

if TYPE_CHECKING:
    from spikellm.transforms.residual_rotation import ModelRotation


def survey(
    model: nn.Module,
    part: WindowShard,
    blocks: Blocks,
    plan: Sequence[BlockPlan],
    runner: BlockRunner,
    rotation: ModelRotation,
    device: torch.device,
    wanted: Callable[[LinearRecipe], bool],
    on_stage: Callable[[str], object] = lambda _: None,
    folder: Path | None = None,
    *,
    sampled: int = 1,
    hessian: bool = True,
) -> Iterator[list[SurveyedLayer]]:
    """The wanted layers, block after block; Hessians and samples live for one block.

    Where the recipe rotates, all blocks are rotated first.

    Args:
        part: calibration tokens of this rank.
        replay: runs the blocks on those windows.
        rotating: lets them work on a rotated stream, where the recipe says so.
        device: where blocks run; the backward pass runs where the model is.
        on_stage: called with a few words before the backward pass and before every block.
        folder: where hidden states are kept; RAM by default.
        sampled: tokens of each sample.
        hessian: whether Hessians are wanted.

    Raises:
        NumericalError, RequestError: see :func:`spikellm.observers.sensitivity.output_sensitivity`.
    """
    names = {
        name: settings
        for block in plan
        for name, settings in block.linears.items()
        if wanted(settings)
    }
    rotation.ends(part.windows[:1])
    if rotation.active:
        on_stage("rotating all blocks, which stay in memory")
        states = ActivationStore(runner.first_inputs(), folder)
        for index, (block, module) in enumerate(zip(plan, blocks.modules, strict=True)):
            forward = partial(runner.forward, index)
            rotation.stream(index, module, states[0][:1], forward)
            rotation.inside(block, module, states, forward, part)
            states.advance(partial(forward, module))
    on_stage(
        "weighing layers against each other: a backward pass of the whole model, then a look at"
        " each block"
    )
    sensitivity = output_sensitivity(model, part, names)
    states = ActivationStore(runner.first_inputs(), folder)
    for index, (block, module) in enumerate(zip(plan, blocks.modules, strict=True)):
        on_stage(f"looking at block {index + 1}/{len(plan)}")
        layers = {name: model.get_submodule(name) for name in block.linears if name in names}
        home = next(module.parameters()).device
        module.to(device)
        samples = SampledInputs(layers, part.whole, sampled, hessian=hessian, before=part.before)
        with samples.hooks(), every_expert_sees_every_token():
            states.advance(partial(runner.forward, index, module))
        samples.all_gather()
        yield [
            SurveyedLayer(
                name,
                layer,
                names[name],
                samples.hessian(name),
                sensitivity[name].to(sample.device),
                sample,
                _readers(name, samples, names),
            )
            for name, layer in layers.items()
            if (sample := samples.get(name)) is not None
        ]
        module.to(home)


def _readers(
    name: str, samples: SampledInputs, names: Mapping[str, LinearRecipe]
) -> tuple[str, ...]:
    return tuple(
        sorted(
            other
            for other in samples.readers(name)
            if names[other].activations == names[name].activations
        )
    )
