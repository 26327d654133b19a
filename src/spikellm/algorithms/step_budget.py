"""How many steps each column of ternary weights gets from a budget: over the columns of a layer, or
over those of all layers by what they cost the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.models.families import weight_and_bias
from spikellm.quantization.column_update import inverse_factor
from spikellm.quantization.pruning import lowest
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


class WeighedLayer(NamedTuple):
    """What errors in the weights of a surveyed layer cost.

    Attributes:
        importance: of a squared error in each column, ``(in,)``, see :func:`importance_of`.
        fires: whether the input of each column is ever other than 0, ``(in,)``.
    """

    layer: SurveyedLayer
    importance: Tensor
    fires: Tensor

    @classmethod
    def of(cls, layer: SurveyedLayer, damping: float, *, by_power: bool) -> WeighedLayer:
        """Weigh a layer, and let go of its Hessian.

        Raises:
            NumericalError: see :func:`spikellm.quantization.column_update.inverse_factor`.
        """
        assert layer.hessian is not None
        order = order_of_coding(layer.hessian, by_power=by_power)
        factor, _ = inverse_factor(layer.hessian, damping, layer.name, order)
        fires = layer.hessian.diagonal() > 0
        return cls(replace(layer, hessian=None), importance_of(factor, order), fires)

    @property
    def weight(self) -> Tensor:
        """Float32, ``(out, in)``."""
        weight = weight_and_bias(self.layer.module)[0].detach()
        return weight.float().to(self.importance.device)

    def zero_losses(self) -> Tensor:
        """What the expected loss grows by if a weight were zero, ``(out, in)``."""
        costs = torch.where(self.fires, self.importance, 0.0)
        rows = self.layer.sensitivity.to(costs.device).unsqueeze(1)
        return self.weight.square_() * costs * rows


def spend_over_model(
    layers: Iterable[WeighedLayer],
    errors_of: Callable[[WeightOptions], StepErrors],
    zeros: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Steps of every column of all layers, uint8 ``(in,)`` each: a step goes where it lowers the
    expected loss most for the weights it takes.

    Layers with different budgets, or weight formats, spend each their own.

    Args:
        errors_of: how the columns of a layer with such weights err.
        zeros: share of the weights of a layer that are zero whatever the steps.
    """
    tables: dict[tuple[float, str], dict[str, tuple[Tensor, int]]] = {}
    for weighed in layers:
        layer, weight = weighed.layer, weighed.weight
        settings = layer.settings.weights
        budget = settings.budget
        assert budget is not None
        if count := round((zeros or {}).get(layer.name, 0.0) * weight.numel()):
            weight = weight.masked_fill(lowest(weighed.zero_losses(), count), 0.0)
        errors = errors_of(settings)(weight, weighed.importance, settings, layer.sensitivity)
        tables.setdefault((budget, settings.format), {})[layer.name] = errors.cpu(), weight.shape[0]
    steps: dict[str, Tensor] = {}
    for (budget, _), table in tables.items():
        widths = [errors.shape[1] for errors, _ in table.values()]
        costs = [outputs for errors, outputs in table.values() for _ in range(errors.shape[1])]
        found = spend(torch.cat([errors for errors, _ in table.values()], 1), budget, costs).to(
            torch.uint8
        )
        steps.update(zip(table, found.split(widths), strict=True))
    return steps
