"""What is learned of a block, and how: by gradient steps over the calibration text, shared by all
ranks.

The best state is kept; a loss that is not finite restores it and halves the rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.omniquant_options import OmniQuantOptions
from spikellm.core import distributed
from spikellm.core.errors import NumericalError, RequestError
from spikellm.transforms.smoothing import State

_RETRIES = 3
_LONGEST_STEP = 1.0  # norm that the gradient is clipped to


class Learned(NamedTuple):
    """What is learned of a block: logarithms of scales by pair, logits γ and β by layer."""

    scales: dict[str, Tensor]
    logits: dict[str, tuple[Tensor, Tensor]]

    def clone(self) -> Learned:
        """A copy that later steps do not touch."""
        return Learned(
            {name: tensor.detach().clone() for name, tensor in self.scales.items()},
            {
                name: (gamma.detach().clone(), beta.detach().clone())
                for name, (gamma, beta) in self.logits.items()
            },
        )


def check_share(options: OmniQuantOptions, windows: Sequence[int]) -> None:
    """Refuse a share of the text that does not let ranks take the steps that one would take.

    See :meth:`spikellm.algorithms.Pipeline.check_share`.
    """
    found = distributed.gather_counts(sum(-(-count // options.batch_size) for count in windows))
    if options.epochs == 0:
        return
    if options.accumulate % distributed.world_size():
        raise RequestError(
            f"algorithm.accumulate is {options.accumulate}: {distributed.world_size()} ranks share"
            f" the batches of each step, so it must be a multiple of {distributed.world_size()};"
            f" add --set algorithm.accumulate={distributed.world_size()}, or run it without"
            " torchrun"
        )
    if len(set(found)) > 1 or found[0] % (options.accumulate // distributed.world_size()):
        raise RequestError(
            f"ranks would learn from {', '.join(map(str, found))} batches of {options.batch_size}"
            " windows; each needs the same number, a multiple of"
            f" {options.accumulate // distributed.world_size()}, so give another number of"
            " --samples, or run it without torchrun"
        )


class Learning:
    """Gradient steps on one block.

    Attributes:
        notes: what a user should know of how it went.

    Args:
        name: of the block, for errors.
        batches: inputs and targets, a step's part at a time; of this rank.
        state_of: parameters of the block with what was learned.
        run: ``run(state, hidden)`` is the output of the block with these parameters.
    """

    def __init__(
        self,
        name: str,
        options: OmniQuantOptions,
        batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
        state_of: Callable[[Learned], State],
        run: Callable[[State, Tensor], Tensor],
    ) -> None:
        self._name, self._options, self._batches, self._state_of, self._run = (
            name,
            options,
            batches,
            state_of,
            run,
        )
        self.notes: list[str] = []

    def from_start(self, start: Learned) -> Learned:
        """The best of the start, of the ends of all epochs and of the last step.

        Raises:
            NumericalError: the loss is NaN or infinite at ever lower rates.
        """
        start = start.clone()
        best, best_loss, factor = start.clone(), math.inf, 1.0
        for _ in range(_RETRIES + 1):
            current = best.clone()
            optimizer = self._optimizer(current, factor)
            for epoch in range(self._options.epochs):  # noqa: B007  named in the error below
                loss = self._epoch(current, optimizer)
                if not math.isfinite(loss):
                    break
                if loss < best_loss:
                    best, best_loss = current.clone(), loss
            else:
                losses = [
                    (self._loss(state), place, state)
                    for place, state in enumerate((start, best, current.clone()))
                ]
                _, place, found = min(
                    (entry for entry in losses if math.isfinite(entry[0])), default=(0.0, 0, start)
                )
                if place == 0:
                    self.notes.append(
                        "learning lowered no loss, so the start is kept; lower omniquant.let_rate"
                        " and omniquant.lwc_rate"
                    )
                return found
            factor /= 2
            self.notes.append(
                f"the loss was NaN or infinite in epoch {epoch + 1}; learned again at {factor:g} of"
                " the rates"
            )
            if not math.isfinite(
                self._loss(best)
            ):  # its own loss was measured before its last step
                best, best_loss = start.clone(), math.inf
        raise NumericalError(
            f"omniquant: the loss of block {self._name} is NaN or infinite in epoch {epoch + 1},"
            f" also after lowering the rates {_RETRIES} times; lower omniquant.let_rate and"
            " omniquant.lwc_rate, or set omniquant.let to false"
        )

    @torch.no_grad()
    def _loss(self, learned: Learned) -> float:
        """Mean loss over the batches with these scales and logits.

        Infinite where it is not finite.
        """
        state = self._state_of(learned)
        losses = [float(self._error(state, hidden, target)) for hidden, target in self._batches()]
        mean = distributed.sum_scalar(
            math.fsum(losses) if all(map(math.isfinite, losses)) else math.inf
        ) / distributed.sum_scalar(len(losses))
        return mean if math.isfinite(mean) else math.inf

    def _error(self, state: State, hidden: Tensor, target: Tensor) -> Tensor:
        output = self._run(state, hidden)
        return nn.functional.mse_loss(output, target.to(output.device).float())

    def _optimizer(self, learned: Learned, factor: float) -> torch.optim.Optimizer:
        scales, logits = (
            list(learned.scales.values()),
            [tensor for pair in learned.logits.values() for tensor in pair],
        )
        for tensor in (*scales, *logits):
            tensor.requires_grad_(True)
        groups = [
            {"params": scales, "lr": self._options.let_rate * factor},
            {"params": logits, "lr": self._options.lwc_rate * factor},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)

    def _epoch(self, learned: Learned, optimizer: torch.optim.Optimizer) -> float:
        """One pass over the batches; mean loss, measured before each step.

        The batches of a step lie evenly over the text, so that several ranks, which share the text,
        share each step.
        """
        total, batches = 0.0, list(self._batches())
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        steps = -(-len(batches) * distributed.world_size() // self._options.accumulate)
        for place in range(steps):
            step, lost = batches[place::steps], 0.0
            for hidden, target in step:
                loss = self._error(self._state_of(learned), hidden, target)
                lost += float(loss.detach())
                (loss / (len(step) * distributed.world_size())).backward()
            total += distributed.sum_scalar(lost)
            if not math.isfinite(total):
                return total
            distributed.all_reduce_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, _LONGEST_STEP * max(1.0, len(parameters) ** 0.5))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total / (len(batches) * distributed.world_size())
