"""What codes the columns of a layer under error feedback: one coder for each kind of codes that
weight formats store (:attr:`spikellm.nn.formats.WeightFormat.coding`).

Adding a kind is adding a file with a class under ``@column_coders.register(kind)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from spikellm.algorithms.gptq_options import limit_option, refuse_zeros
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.algorithms.step_budget import ternary_errors
from spikellm.core.registry import Registry
from spikellm.recipe.base import WeightOptions


class ColumnCoder(ABC):
    """How weights become codes of one kind.

    Attributes:
        options: those of :class:`spikellm.algorithms.gptq_options.GptqOptions` that have an effect
            only on kinds whose coder names them.
        has_zero: whether a weight can be zero, so that weights may be pruned. A coder that codes
            columns by :meth:`GPTQProblem.propagate_error` then keeps zeros without knowing of them,
            if it codes 0 (what :meth:`GPTQProblem.lifted` makes of it) as zero.
    """

    options: ClassVar[tuple[str, ...]] = ()
    has_zero: ClassVar[bool] = True

    def column_steps(
        self, chosen: Tensor | None, weight: Tensor, importance: Tensor, settings: WeightOptions
    ) -> Tensor | None:
        """Steps T of the weights of every column, uint8 ``(in,)``; None where all take one.

        Args:
            chosen: those that saliency, or a budget over the model, gives; None without.
            weight: float32, ``(out, in)``.
            importance: what a squared error in each column costs, ``(in,)``.
        """
        return chosen

    def step_errors(
        self, weight: Tensor, importance: Tensor, settings: WeightOptions, rows: Tensor | None
    ) -> Tensor:
        """Error of every column if all columns took 1, 2, … steps, from which a budget is spent:
        ``(most, in)``.

        Args:
            rows: what an error in each output costs, ``(out,)``; 1 each by default.
        """
        return ternary_errors(weight, importance, settings, rows)

    @abstractmethod
    def code(self, problem: GPTQProblem) -> Any:
        """Coded weights, as formats of this kind take them over."""


class _ColumnCoders(Registry[type[ColumnCoder]]):
    def register(self, name: str) -> Callable[[type[ColumnCoder]], type[ColumnCoder]]:
        enter = super().register(name)

        def enter_with_options(coder: type[ColumnCoder]) -> type[ColumnCoder]:
            enter(coder)
            for option in coder.options:
                limit_option(option, name)
            if not coder.has_zero:
                refuse_zeros(name)
            return coder

        return enter_with_options


column_coders = _ColumnCoders("kind of weight codes")
"""Column coders by the kind of their codes."""
