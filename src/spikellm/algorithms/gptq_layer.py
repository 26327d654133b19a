"""One layer fitted by GPTQ: the columns of the largest inputs first, with error feedback."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.gptq_coders import column_coders
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.algorithms.gptq_pruning import Pruning, order_of_groups
from spikellm.algorithms.step_budget import importance_of, order_of_coding
from spikellm.core.errors import RequestError
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
        RequestError: a coder does not keep what is pruned zero.
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
    weight, power, order = weight[:, stored], hessian.diagonal()[stored].float(), place[coding]
    if options.zeros_of is not None:
        m = options.zeros_of[1]
        order = order_of_groups(power, m, by_power=options.activation_order)
        factor, damping = inverse_factor(hessian, options.percdamp, name, stored[order])
    pruning = Pruning(weight, power, order, factor, options) if options.zero_share else None
    if pruning is not None and pruning.decided:
        weight = weight.masked_fill(pruning.marks.T, 0.0)
    problem = GPTQProblem(
        weight,
        hessian if layout.order is None else permuted(hessian, stored),
        order,
        factor,
        layout.weight_groups,
        owner,
        layout.weight_steps,
        settings,
        options,
        pruning,
    )
    fitted = fitted_layer(
        module, settings, groups._replace(column_steps=steps), coder.code(problem)
    )
    if pruning is not None and bool((fitted.integer_weights().T[pruning.marks] != 0).any()):
        raise RequestError(
            f"layer {name}: the coder of {format_of(settings.weights).coding!r} made weights that"
            " are pruned other than zero; leave algorithm.sparsity out, or mend the coder"
        )
    return fitted, damping
