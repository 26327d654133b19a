"""How many steps each column of ternary weights gets from a budget: over the columns of a layer, or
over those of all layers by what they cost the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.models.families import weight_and_bias
from spikellm.quantization.column_update import inverse_factor
from spikellm.quantization.ternary import step_errors
from spikellm.recipe import LinearRecipe
from spikellm.recipe.base import WeightOptions
from spikellm.saliency.allocation import spend

_MOST_STEPS = 6  # of one column, or one more than the budget's average


def order_of_coding(hessian: Tensor, *, by_power: bool) -> Tensor:
    """Channels in the order in which their columns are coded, ``(in,)``: falling power of the
    inputs, or as they are.
    """
    diagonal = hessian.diagonal()
    return (
        torch.sort(diagonal, descending=True, stable=True).indices
        if by_power
        else torch.arange(len(diagonal), device=diagonal.device)
    )


def importance_of(factor: Tensor, order: Tensor) -> Tensor:
    """What a squared error in each column costs under error feedback, ``1 / U_jj²``, ``(in,)``.

    ``order`` names the channels of the factor.
    """
    costs = 1 / factor.diagonal().square()
    return torch.empty_like(costs).index_copy_(0, order, costs)


StepErrors = Callable[[Tensor, Tensor, WeightOptions, Tensor | None], Tensor]
"""``errors(weight, importance, settings, rows)``: error of every column if all columns took 1, 2, …
steps, ``(most, in)``; see :func:`spikellm.quantization.ternary.step_errors`.
"""


def ternary_errors(
    weight: Tensor, importance: Tensor, settings: WeightOptions, rows: Tensor | None
) -> Tensor:
    """Of ternary weights."""
    most = max(_MOST_STEPS, -int(-(settings.budget or 1) // 1) + 1)
    return step_errors(weight, importance, most, rows)


def spend_in_layer(
    weight: Tensor, importance: Tensor, settings: WeightOptions, errors: StepErrors
) -> Tensor:
    """Steps of every column of one layer, uint8 ``(in,)``: one each, or what the budget buys."""
    if settings.budget is None or settings.budget == 1:
        return torch.ones(weight.shape[1], dtype=torch.uint8, device=weight.device)
    table = errors(weight, importance, settings, None)
    return spend(table, settings.budget).to(torch.uint8)


def over_model(settings: LinearRecipe) -> bool:
    """Whether a layer takes part in a budget over all layers."""
    return settings.weights.budget is not None and settings.weights.allocation == "model"


def spend_over_model(
    layers: Iterable[SurveyedLayer],
    damping: float,
    errors_of: Callable[[WeightOptions], StepErrors],
    *,
    by_power: bool,
) -> dict[str, Tensor]:
    """Steps of every column of all layers that take part, uint8 ``(in,)`` each: a step goes where
    it lowers the expected loss most for the weights it takes.

    Layers with different budgets spend each their own.

    Args:
        errors_of: how the columns of a layer with such weights err.

    Raises:
        NumericalError: see :func:`spikellm.quantization.column_update.inverse_factor`.
    """
    tables: dict[float, dict[str, tuple[Tensor, int]]] = {}
    for layer in layers:
        settings = layer.settings.weights
        budget = settings.budget
        assert budget is not None
        assert layer.hessian is not None
        weight = weight_and_bias(layer.module)[0].detach().float().to(layer.hessian.device)
        order = order_of_coding(layer.hessian, by_power=by_power)
        factor, _ = inverse_factor(layer.hessian, damping, layer.name, order)
        errors = errors_of(settings)(
            weight, importance_of(factor, order), settings, layer.sensitivity
        )
        tables.setdefault(budget, {})[layer.name] = errors.cpu(), weight.shape[0]
    steps: dict[str, Tensor] = {}
    for budget, table in tables.items():
        widths = [errors.shape[1] for errors, _ in table.values()]
        costs = [outputs for errors, outputs in table.values() for _ in range(errors.shape[1])]
        found = spend(torch.cat([errors for errors, _ in table.values()], 1), budget, costs).to(
            torch.uint8
        )
        steps.update(zip(table, found.split(widths), strict=True))
    return steps
