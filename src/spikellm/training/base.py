"""What a training stage is: which numbers of a converted model are trained, and by which loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from spikellm.core.registry import Registry
from spikellm.recipe.training import StageOptions

__all__ = ["Stage", "StageOptions", "Trainable", "stages"]


@dataclass(frozen=True)
class Trainable:
    """A tensor of a model that is trained in place, in the type in which it is saved.

    Training moves a *position* p, float32, from 0: the tensor is ``start + unit · p``, rounded to
    its own type, and the gradient passes straight through that rounding. One rate then serves all
    kinds.

    Attributes:
        name: full name in the model.
        tensor: a parameter or buffer of a floating-point type.
        unit: how far the tensor moves with its position, float32, broadcasts to it.
        least: what it may not fall below, float32, broadcasts to it; None for no bound.
    """

    name: str
    tensor: Tensor
    unit: Tensor
    least: Tensor | None = None


class Stage(ABC):
    """What is trained, and towards what; the loop around it (:mod:`spikellm.training.loop`) is the
    same for all stages.

    Attributes:
        needs_original: whether :meth:`loss` is given what the original says.
    """

    needs_original: ClassVar[bool] = True

    @abstractmethod
    def parameters(self, model: Any, options: Any) -> list[Trainable]:
        """What is trained of a converted model.

        Everything else stays as it is, bit for bit. New buffers and parameters may be put into the
        model, if they change nothing yet and a saved model reloads with them.

        Raises:
            RequestError: there is nothing to train.
        """

    @abstractmethod
    def loss(self, logits: Tensor, wanted: Tensor | None, targets: Tensor, options: Any) -> Tensor:
        """Loss summed over some tokens, one number with a gradient.

        Args:
            logits: of the converted model, ``(tokens, vocabulary)``.
            wanted: of the original, the same shape; None unless :attr:`needs_original`.
            targets: the tokens that follow, int64 ``(tokens,)``.
        """

    def finish(self, model: Any, options: Any) -> None:  # noqa: B027  not every stage has to
        """Put the model, whose best state is in place, into the form in which it is saved."""

    def undo(self, model: Any) -> None:  # noqa: B027  not every stage adds something
        """Take away again what :meth:`parameters` added, where training lowered no loss."""


stages: Registry[type[Stage]] = Registry("training stage")
