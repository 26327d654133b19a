"""Positions of what is trained, and AdamW on them.

Positions and moments are float32 whatever type the model has; after every step the tensors of the
model get them, rounded to their own types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spikellm.core import distributed
from spikellm.recipe.training import StageOptions
from spikellm.training.base import Trainable

_BETAS = (0.9, 0.95)


class Positions:
    """Where training stands.

    Args:
        trained: what is trained.
        options: rates, clipping and decay.
    """

    def __init__(self, trained: Sequence[Trainable], options: StageOptions) -> None:
        self._trained, self._options = trained, options
        self._starts = [one.tensor.detach().float().clone() for one in trained]
        self.values = [nn.Parameter(torch.zeros_like(start)) for start in self._starts]
        self.restart()

    def restart(self) -> None:
        """Forget the moments of all gradients."""
        self._optimizer = torch.optim.AdamW(
            self.values, lr=self._options.rate, betas=_BETAS, weight_decay=self._options.decay
        )

    def rate(self, step: int) -> float:
        """Rate of a step, from 0 on, as a share of the highest: rises in a line, falls in half a
        cosine.
        """
        options = self._options
        rising = max(1, round(options.warmup * options.steps))
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, options.steps - rising)
        last = options.last_rate
        return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2

    def collect(self) -> None:
        """Add the gradients of the model's tensors to those of positions, and clear them."""
        for one, value in zip(self._trained, self.values, strict=True):
            if one.tensor.grad is None:
                continue
            gradient = one.tensor.grad.float() * one.unit
            value.grad = gradient if value.grad is None else value.grad.add_(gradient)
            one.tensor.grad = None

    def reduce(self) -> None:
        """Sum gradients over all ranks."""
        for value in self.values:
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        distributed.all_reduce_gradients(self.values)

    def first_not_finite(self) -> str | None:
        """The first tensor whose gradient is NaN or infinite."""
        for one, value in zip(self._trained, self.values, strict=True):
            if value.grad is not None and not bool(torch.isfinite(value.grad).all()):
                return one.name
        return None

    def step(self, rate: float) -> None:
        """One update at a rate, and the model after it."""
        if self._options.clip is not None:
            nn.utils.clip_grad_norm_(self.values, self._options.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate * rate
        self._optimizer.step()
        self.drop_gradients()
        self.write()

    def drop_gradients(self) -> None:
        """Forget gradients that were collected."""
        for one, value in zip(self._trained, self.values, strict=True):
            value.grad = one.tensor.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Give the model's tensors what positions stand for."""
        for one, start, value in zip(self._trained, self._starts, self.values, strict=True):
            moved = start + one.unit * value
            if one.least is not None:
                moved = torch.maximum(moved, one.least)
            one.tensor.data.copy_(moved)

    def state(self) -> dict[str, Tensor]:
        """Positions and moments by name, to be saved."""
        found = {}
        for one, value in zip(self._trained, self.values, strict=True):
            found[f"position.{one.name}"] = value.detach().clone()
            for key, moment in self._optimizer.state.get(value, {}).items():
                found[f"{key}.{one.name}"] = torch.as_tensor(moment).clone()
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave, and write it.

        Raises:
            KeyError, RuntimeError: it is of something else.
        """
        self.restart()
        for one, value in zip(self._trained, self.values, strict=True):
            value.data.copy_(state[f"position.{one.name}"])
            moments = {
                key: state[f"{key}.{one.name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{one.name}" in state
            }
            if moments:
                device = value.device
                self._optimizer.state[value] = {
                    key: moment.clone() if key == "step" else moment.to(device).clone()
                    for key, moment in moments.items()
                }
        self.write()

    def snapshot(self) -> list[Tensor]:
        """Positions alone."""
        return [value.detach().clone() for value in self.values]

    @torch.no_grad()
    def go_to(self, positions: Sequence[Tensor]) -> None:
        """Positions of a snapshot, without moments, and the model there."""
        for value, position in zip(self.values, positions, strict=True):
            value.copy_(position)
        self.restart()
        self.write()
