"""GPTQ with pluggable codes: affine (plain GPTQ), ternary spikes whose columns take different
numbers of steps, and PB-LLM's partly binary ones.

The second half of SpikeLLM (§4, "GPTQ pipeline") was never released; the ternary part here is
reconstructed from the paper (see docs/additive.md). Columns are coded in falling order of their
inputs' power, with error feedback; ternary codes and their scales are fitted in turn until the
layer's error stops falling.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.base import Algorithm, BlockContext, FittedBlock, algorithms
from spikellm.algorithms.channel_choice import choose_groups
from spikellm.algorithms.compensation import Moments, SequentialFit, target_weight
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.gptq_problem import GPTQProblem, partly_binary_layer
from spikellm.algorithms.step_budget import (
    importance_of,
    order_of_coding,
    over_model,
    spend_in_layer,
    spend_over_model,
)
from spikellm.algorithms.survey import SurveyedLayer
from spikellm.core import distributed
from spikellm.models.families import weight_and_bias
from spikellm.models.swap import spiking_for, spiking_like
from spikellm.nn.channels import Groups
from spikellm.nn.formats.ternary import plane_sizes
from spikellm.nn.layout import make_layout
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import AffineWeights, codes_in_range, weight_range
from spikellm.quantization.column_update import inverse_factor, permuted
from spikellm.quantization.ternary import refit_scales, search_scale
from spikellm.recipe import LinearRecipe, Recipe

_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a range, tried where it is searched
_ENOUGH = 1e-3  # relative gain below which fitting stops


@algorithms.register("gptq")
class Gptq(Algorithm):
    """Needs the second moments of all inputs, and a survey of the model where a budget of steps is
    spent over all layers.
    """

    formats = ("affine", "ternary", "partly-binary")
    fits_alone = True

    def __init__(self) -> None:
        self._steps: dict[
            str, Tensor
        ] = {}  # of the columns of layers whose budget is spent over the model

    def needs_survey(self, settings: LinearRecipe) -> bool:
        return over_model(settings)

    def survey(self, layers: Iterable[SurveyedLayer], recipe: Recipe) -> None:
        options = recipe.options(GptqOptions)
        self._steps = spend_over_model(
            (layer for layer in layers if over_model(layer.settings)),
            options.percdamp,
            by_power=options.activation_order,
        )

    def needs_inputs(self, settings: LinearRecipe) -> bool:
        return True

    def needs_hessian(self, recipe: Recipe) -> bool:
        return not recipe.options(GptqOptions).compensate

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
        with SequentialFit(context) as block:
            for names, shared in sorted(
                chosen, key=lambda one: context.turn(one[0][0])
            ):  # as they run, which need not be as they are listed
                fitted = self._fit_together(
                    context, shared, block.moments(names[0], shared[names[0]]), notes
                )
                block.put(fitted)
                layers.update(fitted)
        return FittedBlock({name: layers[name] for name in context.layers}, notes=notes)

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
        fitted = {
            name: self._fit(context, name, own, moments)
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
        return {name: layers[name] for name in groups}

    def _fit(
        self, context: BlockContext, name: str, groups: Groups, moments: Moments | None
    ) -> tuple[SpikingLinear, float]:
        if name in self._steps:
            groups = groups._replace(column_steps=self._steps[name].to(groups.channel.device))
        layer, settings = context.layers[name], context.settings[name]
        options = context.recipe.options(GptqOptions)
        if moments is None:
            return fit_layer(name, layer, settings, groups, Target(context.hessian(name)), options)
        weight = target_weight(
            name, weight_and_bias(layer)[0].detach(), moments, options.compensation_percdamp
        )
        return fit_layer(name, layer, settings, groups, Target(moments.hessian, weight), options)


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


class Target(NamedTuple):
    """What the codes of a layer are fitted to.

    Attributes:
        hessian: ``XᵀX`` of its inputs, ``(in, in)``, channels in their own order.
        weight: ``(out, in)``; the layer's own weight where it is None.
    """

    hessian: Tensor
    weight: Tensor | None = None


def fit_layer(
    name: str,
    module: nn.Module,
    settings: LinearRecipe,
    groups: Groups,
    target: Target,
    options: GptqOptions,
) -> tuple[SpikingLinear, float]:
    """Spiking layer of one linear layer, and the damping that its Hessian took.

    Raises:
        NumericalError: see :func:`spikellm.quantization.column_update.inverse_factor`.
    """
    hessian, weight = target
    weight = (weight_and_bias(module)[0].detach() if weight is None else weight).float()
    coding = order_of_coding(hessian, by_power=options.activation_order)
    factor, damping = inverse_factor(hessian, options.percdamp, name, coding)
    column_steps = groups.column_steps
    if settings.weights.format == "ternary" and column_steps is None:
        column_steps = spend_in_layer(
            weight, importance_of(factor, coding), settings.weights.budget
        )
    layout = make_layout(groups.channel, column_steps, settings)
    stored = (
        torch.arange(len(coding), device=weight.device) if layout.order is None else layout.order
    )
    place = torch.empty_like(stored).index_copy_(
        0, stored, torch.arange(len(stored), device=stored.device)
    )  # of each channel
    owner = [
        group
        for group, (start, stop) in enumerate(layout.weight_groups)
        for _ in range(start, stop)
    ]
    problem = GPTQProblem(
        weight[:, stored],
        hessian if layout.order is None else permuted(hessian, stored),
        place[coding],
        factor,
        layout.weight_groups,
        owner,
        layout.weight_steps,
        settings,
        options,
    )
    if settings.weights.format == "partly-binary":
        return partly_binary_layer(module, problem, groups), damping
    weights = _ternary(problem) if settings.weights.format == "ternary" else _affine(problem)
    sizes = (
        ()
        if column_steps is None or settings.weights.format == "affine"
        else plane_sizes(column_steps)
    )
    layer = spiking_like(module, settings, sizes=sizes)
    layer.set_groups(groups.channel, column_steps)
    layer.set_weights(weights)
    return layer, damping


def _inverse(scale: Tensor) -> Tensor:
    return (1 / scale).clamp_(
        max=torch.finfo(scale.dtype).max
    )  # finite also for the smallest scales


def _affine(problem: GPTQProblem) -> AffineWeights:
    """GPTQ: ranges by row and group from the weights as they came, searched if the recipe says so.

    Coded from ``w + zero·scale``, so that a code is ``w/scale`` rounded.
    """
    weights = problem.settings.weights
    tops = [weights.top(steps) for steps in problem.steps]
    low, high = weight_range(problem.weight, problem.groups)
    if problem.options.search_range:
        low, high = _searched_range(problem, tops, low, high)
    _, scale, zero = codes_in_range(
        problem.weight, tops, problem.groups, low, high, symmetric=weights.symmetric
    )
    least = [top % 2 if weights.symmetric else 0 for top in tops]
    lifted = problem._replace(weight=problem.weight + (zero * scale)[:, problem.owner])
    return AffineWeights(
        _code(lifted, scale, least, tops).to(torch.uint8), scale, zero.to(torch.uint8)
    )


def _searched_range(
    problem: GPTQProblem, tops: list[int], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of each range, ``(out, groups)``, whose rounding and clipping lose least, weighted
    as error feedback weighs columns.
    """
    best, best_error = torch.ones_like(low), torch.full_like(low, torch.inf)
    for share in _SHARES:
        codes, scale, zero = codes_in_range(
            problem.weight,
            tops,
            problem.groups,
            low * share,
            high * share,
            symmetric=problem.settings.weights.symmetric,
        )
        lost = (
            (codes - zero[:, problem.owner]) * scale[:, problem.owner] - problem.weight
        ).square_() * problem.importance
        error = torch.stack([lost[:, start:stop].sum(1) for start, stop in problem.groups], 1)
        better = error < best_error
        best, best_error = torch.where(better, share, best), torch.where(better, error, best_error)
    return low * best, high * best


def _ternary(problem: GPTQProblem) -> AffineWeights:
    """Ternary codes and scales in turn, from searched scales on; the best pair is kept."""
    problem, importance = problem._replace(hessian=problem.hessian.float()), problem.importance
    scale = torch.cat(
        [
            search_scale(problem.weight[:, start:stop], importance[start:stop], steps)
            for (start, stop), steps in zip(problem.groups, problem.steps, strict=True)
        ],
        dim=1,
    )
    best, best_error = (torch.zeros_like(problem.weight), scale), float("inf")
    for _ in range(problem.options.rounds):
        codes = _code(problem, scale, [-steps for steps in problem.steps], problem.steps)
        scale = refit_scales(problem.weight, codes, problem.hessian, problem.groups, scale)
        error = problem.error(codes * scale[:, problem.owner])
        gained = best_error - error
        if gained > 0:
            best, best_error = (codes, scale), error
        if gained <= _ENOUGH * error:
            break
    codes, scale = best
    return AffineWeights(codes.to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.uint8))


def _code(problem: GPTQProblem, scale: Tensor, least: list[int], most: list[int]) -> Tensor:
    """Codes ``clip(round(w/scale), least, most)`` with error feedback, float32 ``(out, in)``,
    columns in stored order; bounds are one of each group.
    """
    scales, rates = list(scale.T.contiguous()), list(_inverse(scale).T.contiguous())
    codes = problem.weight.new_empty(problem.weight.shape[::-1])  # (in, out): a column at a time
    columns = codes.unbind()

    def code(column: int, w: Tensor, error: Tensor) -> None:
        group = problem.owner[column]
        q = (
            torch.mul(w, rates[group], out=columns[column])
            .round_()
            .clamp_(least[group], most[group])
        )
        torch.addcmul(w, q, scales[group], value=-1, out=error)

    problem.propagate_error(code)
    return codes.T.contiguous()
