"""GPTQ with pluggable codes: error feedback over a layer's columns, whatever a format stores.

Each kind of codes has a coder (:mod:`spikellm.algorithms.gptq_coders`): affine (plain GPTQ),
ternary spikes whose columns take different numbers of steps, and PB-LLM's partly binary ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spikellm.algorithms.base import (
    MOMENT_TOKENS,
    Algorithm,
    BlockContext,
    FittedBlock,
    algorithms,
)
from spikellm.algorithms.channel_choice import choose_groups
from spikellm.algorithms.compensation import Moments, SequentialFit, target_weight
from spikellm.algorithms.gptq_coders import column_coders
from spikellm.algorithms.gptq_layer import SharedInverse, Target, fit_layer
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.step_budget import WeighedLayer, over_model, spend_over_model
from spikellm.algorithms.survey import SurveyedLayer
from spikellm.algorithms.zero_budget import share_zeros
from spikellm.core import distributed
from spikellm.models.families import weight_and_bias
from spikellm.models.swap import spiking_for
from spikellm.nn.channels import Groups
from spikellm.nn.formats import format_of
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import LinearRecipe, Recipe


@algorithms.register("gptq")
class Gptq(Algorithm):
    """Needs the second moments of all inputs, and a survey of the model where a budget of steps is
    spent over all layers.
    """

    fits_alone = True

    def __init__(self) -> None:
        self._steps: dict[str, Tensor] = {}  # of columns whose budget is spent over the model
        self._zeros: dict[str, float] = {}  # shares, likewise

    @property
    def formats(self) -> tuple[str, ...]:  # type: ignore[override]  # plugins add coders
        """Kinds of codes that have a coder."""
        return tuple(column_coders.names())

    def needs_survey(self, settings: LinearRecipe) -> bool:
        return over_model(settings)

    def surveys_all(self, recipe: Recipe) -> bool:
        return recipe.options(GptqOptions).sparsity_over == "model"

    def survey(self, layers: Iterable[SurveyedLayer], recipe: Recipe) -> None:
        options = recipe.options(GptqOptions)
        weighed: Iterable[WeighedLayer] = (
            WeighedLayer.of(layer, options.percdamp, by_power=options.activation_order)
            for layer in layers
            if self.surveys_all(recipe) or over_model(layer.settings)
        )
        if self.surveys_all(recipe):
            weighed = list(weighed)
            self._zeros = share_zeros(weighed, options.sparsity)
        self._steps = spend_over_model(
            (one for one in weighed if over_model(one.layer.settings)),
            lambda weights: column_coders[format_of(weights).coding]().step_errors,
            self._zeros,
        )

    def needs_inputs(self, settings: LinearRecipe) -> bool:
        return True

    def needs_hessian(self, recipe: Recipe) -> bool:
        return not recipe.options(GptqOptions).compensate

    def tokens_per_channel(self, recipe: Recipe) -> int:
        return MOMENT_TOKENS

    def needs_fp_input(self, recipe: Recipe) -> bool:
        return recipe.options(GptqOptions).compensate

    def for_head(self, recipe: Recipe) -> Recipe:
        alone = recipe.options(GptqOptions).model_copy(update={"compensate": False})
        return recipe.model_copy(update={"algorithm": alone})

    def fit_block(self, context: BlockContext) -> FittedBlock:
        chosen = list(
            choose_groups(
                context,
                lambda name: (context.sample(name), weight_and_bias(context.layers[name])[0]),
            )
        )
        layers: dict[str, SpikingLinear] = {}
        notes: list[str] = []
        if not context.recipe.options(GptqOptions).compensate:
            groups = {name: own for _, shared in chosen for name, own in shared.items()}
            return FittedBlock(self._fit_together(context, groups, None, notes), notes=notes)
        with SequentialFit(context, [names[0] for names, _ in chosen]) as block:
            for names, shared in sorted(
                chosen, key=lambda one: context.turn(one[0][0])
            ):  # as they run, which need not be as they are listed
                fitted = self._fit_together(
                    context, shared, block.moments(names[0], shared[names[0]]), notes
                )
                block.put(fitted)
                layers.update(fitted)
            behind = block.outputs()
        ordered = {name: layers[name] for name in context.layers}
        return FittedBlock(ordered, notes=notes, behind=behind)

    def _fit_together(
        self,
        context: BlockContext,
        groups: dict[str, Groups],
        moments: Moments | None,
        notes: list[str],
    ) -> dict[str, SpikingLinear]:
        """Layers that do not wait for each other, dealt out to ranks.

        ``moments`` of their inputs where these are not the context's.
        """
        layers: dict[str, SpikingLinear] = {}
        owners = distributed.assign(
            {name: _work(weight_and_bias(context.layers[name])[0]) for name in groups}
        )
        inverse = None if moments is None else SharedInverse()
        fitted = {
            name: self._fit(context, name, own, moments, inverse)
            for name, own in groups.items()
            if owners[name] == distributed.rank()
        }
        for name, owner in owners.items():
            layers[name], damping = _exchanged(
                context.layers[name], context.settings[name], owner, fitted.get(name)
            )
            if damping > context.recipe.options(GptqOptions).percdamp:
                notes.append(
                    f"the Hessian of {name} is not positive definite; damping was raised to"
                    f" {damping:.2g} of its mean diagonal"
                )
            if over_model(context.settings[name]) and name not in self._steps:
                notes.append(
                    f"{name} spends its budget of steps by itself: weights.allocation: model"
                    " spends over the layers of the blocks"
                )
            if self.surveys_all(context.recipe) and name not in self._zeros:
                notes.append(
                    f"{name} has the recipe's share of zeros: algorithm.sparsity_over: model shares"
                    " them out over the layers of the blocks"
                )
        return {name: layers[name] for name in groups}

    def _fit(
        self,
        context: BlockContext,
        name: str,
        groups: Groups,
        moments: Moments | None,
        inverse: SharedInverse | None,
    ) -> tuple[SpikingLinear, float]:
        if name in self._steps:
            groups = groups._replace(column_steps=self._steps[name].to(groups.channel.device))
        layer, settings = context.layers[name], context.settings[name]
        options = context.recipe.options(GptqOptions)
        if name in self._zeros:
            options = options.model_copy(update={"sparsity": self._zeros[name]})
        if moments is None:
            return fit_layer(name, layer, settings, groups, Target(context.hessian(name)), options)
        weight = target_weight(
            name, weight_and_bias(layer)[0].detach(), moments, options.compensation_percdamp
        )
        target = Target(moments.hessian, weight, inverse)
        return fit_layer(name, layer, settings, groups, target, options)


def _work(weight: Tensor) -> float:
    """Work of a fit, about: factors of the Hessian, and error feedback."""
    outputs, columns = weight.shape
    return float(columns) ** 2 * (columns + 3 * outputs)


def _exchanged(
    module: nn.Module,
    settings: LinearRecipe,
    owner: int,
    fitted: tuple[SpikingLinear, float] | None,
) -> tuple[SpikingLinear, float]:
    """A fitted layer and its damping, from the rank that fitted it."""
    if distributed.world_size() == 1 and fitted is not None:
        return fitted
    state = distributed.broadcast(
        owner,
        (
            None
            if fitted is None
            else {**fitted[0].state_dict(), "damping": torch.tensor(fitted[1], dtype=torch.float64)}
        ),
    )
    damping = float(state.pop("damping"))
    layer = spiking_for(module, settings, state)
    layer.load_state_dict(state)
    return layer, damping
