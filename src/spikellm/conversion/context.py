"""What goes through a conversion from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from spikellm.algorithms import InputCoding
from spikellm.conversion.block_runner import BlockRunner, batch_windows
from spikellm.conversion.estimate import estimate
from spikellm.conversion.options import RunOptions
from spikellm.conversion.plan import ConversionPlan
from spikellm.core import distributed
from spikellm.models.placement import placed
from spikellm.observers.activation_store import ActivationStore
from spikellm.transforms import ModelState
from spikellm.transforms.block_state import BlockState

_WALKED = 8  # batches, about 16,000 tokens: what second moments of a stream take


class Allocated(NamedTuple):
    """What is decided over the whole model before its first block is converted, by full name of
    layers, and of K and V (:func:`spikellm.conversion.attention.part_name`).

    Attributes:
        salient: how many channels, of K and V of a head, are salient.
        coding: in which share of their range inputs are coded, and at which price of a spike.
    """

    salient: Mapping[str, int] = MappingProxyType({})
    coding: Mapping[str, InputCoding] = MappingProxyType({})


@dataclass(frozen=True)
class ConversionContext(ConversionPlan):
    """A conversion that is under way.

    Attributes:
        runner: runs blocks on the windows of this rank.
        folder: where hidden states are kept; RAM if None.
        options: how it runs.
        allocated: what was decided over the whole model.
    """

    runner: BlockRunner
    folder: Path | None
    options: RunOptions
    allocated: Allocated = field(default_factory=Allocated)

    @classmethod
    def begin(cls, plan: ConversionPlan, options: RunOptions) -> ConversionContext:
        """Find out where hidden states are kept, then how blocks are called.

        Raises:
            UnsupportedModelError: see :class:`spikellm.conversion.block_runner.BlockRunner`.
        """
        store = options.store
        place = store(estimate(plan)) if callable(store) else store
        sizes = plan.transforms.batch_sizes()
        sizes |= plan.algorithm.batch_sizes(plan.batches, plan.recipe)
        runner = BlockRunner(plan.model, plan.blocks, plan.shard.windows, sizes)
        folder = None if place is None else Path(place)
        return cls(**vars(plan), runner=runner, folder=folder, options=options)

    def forward(self, index: int) -> Callable[[nn.Module, Tensor], Tensor]:
        """What runs block ``index``, or another in its place, on some windows."""
        return partial(self.runner.forward, index)

    def first_states(self) -> ActivationStore:
        """What the first block is fed."""
        return ActivationStore(self.runner.first_inputs(), self.folder)

    def prepare_model(self) -> None:
        """Let transforms change what is outside the blocks."""
        self.transforms.prepare_model(
            ModelState(self.model, self.blocks, self.recipe, self.shard.windows[:1], self.walk)
        )

    def spread(self, wanted: int) -> range:
        """Those of this rank, one at least, of about so many batches of the text, evenly spread."""
        seqlen = self.windows.shape[1]
        size = batch_windows(seqlen) * seqlen
        stride = max(1, -(-self.shard.whole // size) // max(wanted, distributed.world_size()))
        return range(-(self.shard.before // size) % stride, len(self.batches), stride)

    def walk(self) -> Iterator[tuple[nn.Module, Callable[[], object]]]:
        """See :class:`spikellm.transforms.base.ModelState`: some batches of the text, evenly
        spread, and of them those of this rank, which has one at least.
        """
        some = self.spread(_WALKED)
        inputs = islice(self.runner.first_inputs(), some.start, None, some.step)
        states = ActivationStore(inputs, self.folder)
        for index, module in enumerate(self.blocks.modules):
            forward = partial(self.runner.forward, index, module)
            with placed(module, self.options.device):
                yield module, partial(states.advance, forward)

    def block_state(self, index: int, states: ActivationStore) -> BlockState:
        """Block ``index`` as transforms see it, with a stream in front of it."""
        return BlockState(
            self.plan[index],
            self.blocks.modules[index],
            states,
            self.forward(index),
            self.shard,
            self.recipe,
        )
