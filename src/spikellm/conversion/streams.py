"""The two streams of hidden states that go through a conversion, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spikellm.conversion.context import ConversionContext
from spikellm.core.errors import NumericalError
from spikellm.core.fingerprint import fingerprint
from spikellm.observers.activation_store import ActivationStore, SharedStream


@dataclass
class StreamPair:
    """Hidden states in front of the next block.

    Attributes:
        exact: of the full-precision model.
        converted: of the blocks converted so far.
        shared: keeps the full-precision stream for the next conversion of the same model.
    """

    exact: ActivationStore
    converted: ActivationStore
    shared: SharedStream | None

    @classmethod
    def begin(cls, context: ConversionContext) -> StreamPair:
        """Both streams in front of the first block."""
        exact, shared = context.first_states(), context.options.shared
        if shared:
            shared.open(stream_key(context), len(context.plan), exact)
        return cls(exact, exact.copy(), shared)

    def advance_exact(self, index: int, name: str, forward: Callable[[Tensor], Tensor]) -> None:
        """Bring the full-precision stream behind block ``index`` of this name.

        Raises:
            NumericalError: it holds NaN or infinity there.
        """
        known = self.shared.behind(index) if self.shared else None
        if known is not None:
            self.exact = known.copy()
        else:
            self.exact.advance(forward)
            if self.shared:
                self.shared.keep(index, self.exact)
        if not all(bool(torch.isfinite(self.exact[i]).all()) for i in range(len(self.exact))):
            raise NumericalError(
                f"the original model gives NaN or infinity behind block {name}; its weights or type"
                f" ({self.exact[0].dtype}) do not bear this text"
            )

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Converted and full-precision states, batch by batch."""
        return ((self.converted[i], self.exact[i]) for i in range(len(self.exact)))


def stream_key(context: ConversionContext) -> str:
    """Names the full-precision stream: what of a conversion its bits depend on."""
    recipe = context.recipe
    transformed = context.transforms.stream_key(recipe, surveyed=context.surveyed)
    text, device = fingerprint(context.shard.windows), context.options.device
    return f"{text} {recipe.attention.spiking} {transformed} {device}"
