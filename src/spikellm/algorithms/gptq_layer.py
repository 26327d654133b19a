"""One layer fitted by GPTQ: the columns of the largest inputs first, with error feedback."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.gptq_coders import column_coders
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.algorithms.step_budget import importance_of, order_of_coding
from spikellm.models.families import weight_and_bias
from spikellm.models.swap import fitted_layer
from spikellm.nn.channels import Groups
from spikellm.nn.formats import format_of
from spikellm.nn.layout import make_layout
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.column_update import InverseFactor, inverse_factor, permuted
from spikellm.recipe import LinearRecipe


class Target(NamedTuple):
    """What the codes of a layer are fitted to.

    Attributes:
        hessian: ``XᵀX`` of its inputs, ``(in, in)``, channels in their own order.
        weight: ``(out, in)``; the layer's own weight where it is None.
        inverse: for layers that have the Hessian in common, which is then inverted once.
    """

    hessian: Tensor
    weight: Tensor | None = None
    inverse: SharedInverse | None = None


class SharedInverse:
    """The order of coding and the factor of one Hessian, computed for the first layer that asks."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, InverseFactor] | None = None

    def of(self, name: str, hessian: Tensor, options: GptqOptions) -> tuple[Tensor, InverseFactor]:
        """Order and factor; see :func:`spikellm.quantization.column_update.inverse_factor`."""
        if self._found is None:
            coding = order_of_coding(hessian, by_power=options.activation_order)
            self._found = coding, inverse_factor(hessian, options.percdamp, name, coding)
        return self._found


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
    hessian, weight, shared = target
    weight = (weight_and_bias(module)[0].detach() if weight is None else weight).float()
    coding, (factor, damping) = (shared or SharedInverse()).of(name, hessian, options)
    coder = column_coders[format_of(settings.weights).coding]()
    steps = coder.column_steps(
        groups.column_steps, weight, importance_of(factor, coding), settings.weights
    )
    layout = make_layout(groups.channel, steps, settings)
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
    return fitted_layer(
        module, settings, groups._replace(column_steps=steps), coder.code(problem)
    ), damping
