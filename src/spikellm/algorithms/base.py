"""What an algorithm is: which inputs it asks to see, and how it fits one block.

The block loop (:mod:`spikellm.conversion.loop`) does everything else. Adding an algorithm is
adding a file with a class under ``@algorithms.register(name)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.core.errors import UnsupportedModelError
from spikellm.core.registry import Registry
from spikellm.models.plan import BlockPlan
from spikellm.nn.attention import HeadShape
from spikellm.nn.linear import SpikingLinear
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.input_stats import SampledInputs
from spikellm.quantization.thresholds import FULL_RANGE
from spikellm.recipe import LinearRecipe, Recipe

MOMENT_TOKENS = 4
"""Tokens for each channel from which second moments are trusted. The moments of n tokens of c
channels are off by factors between ``(1 − √(c/n))²`` and ``(1 + √(c/n))²`` in some directions
(Marchenko and Pastur): with 4 tokens a channel by ¼ to 2¼, with 1 from nothing at all to 4.
"""


class Streams(NamedTuple):
    """What a block is fed and should give, batch by batch of windows.

    Attributes:
        inputs: converted stream: what the block will be fed.
        fp_output: full-precision stream: what the block should give.
        fp_input: full-precision stream in front of the block, for algorithms that ask for it
            (``needs_fp_input``); the converted one otherwise.
    """

    inputs: ActivationStore
    fp_output: ActivationStore
    fp_input: ActivationStore


class InputCoding(NamedTuple):
    """How the inputs of a layer, or K or V, are coded.

    Attributes:
        range_share: see :func:`spikellm.quantization.thresholds.coded_range`.
        price: of a spike, see :mod:`spikellm.neurons.price`.
    """

    range_share: int = FULL_RANGE
    price: float = 0.0


@dataclass(frozen=True)
class BlockContext:
    """One decoder block as an algorithm sees it.

    Attributes:
        plan: its name, and the recipe of each of its layers.
        module: the full-precision block; where attention is to spike, it codes Q, K and V already.
        layers: its linear layers to convert, by full name.
        samples: input tokens of the layers that the algorithm asked for, from the converted stream.
        streams: what the block is fed and should give.
        forward: ``forward(module, hidden)`` runs a block on the windows of a batch, or on the part
            of it that one gradient step takes.
        recipe: the whole recipe.
        device: where the block is.
        salient: how many channels of a layer are salient, where that was allocated over the model.
        coding: how inputs of a layer are coded, where spikes were allocated over the model.
    """

    plan: BlockPlan
    module: nn.Module
    layers: dict[str, nn.Module]
    samples: SampledInputs
    streams: Streams
    forward: Callable[[nn.Module, Tensor], Tensor]
    recipe: Recipe
    device: torch.device
    salient: Mapping[str, int] = field(default_factory=dict)
    coding: Mapping[str, InputCoding] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Full name of the block."""
        return self.plan.name

    @property
    def settings(self) -> dict[str, LinearRecipe]:
        """Recipe of each layer, by full name."""
        return self.plan.linears

    @property
    def heads(self) -> HeadShape | None:
        """Heads of its attention, where known."""
        return self.plan.heads

    @property
    def inputs(self) -> ActivationStore:
        """See :class:`Streams`."""
        return self.streams.inputs

    @property
    def fp_output(self) -> ActivationStore:
        """See :class:`Streams`."""
        return self.streams.fp_output

    @property
    def fp_input(self) -> ActivationStore:
        """See :class:`Streams`."""
        return self.streams.fp_input

    def sample(self, name: str) -> Tensor:
        """Sampled inputs of a layer, float32, ``(tokens, in)``.

        Raises:
            UnsupportedModelError: the layer was not run on the calibration text.
        """
        sample = self.samples.get(name)
        if sample is None:
            raise UnsupportedModelError(
                f"layer {name} was not run on the calibration text, so its channels cannot be"
                " ranked; leave it out with an override (skip: true)"
            )
        return sample

    def token_scale(self, name: str) -> Tensor | None:
        """What the sampled tokens of a layer were multiplied by, ``(tokens, 1)``; None for ones."""
        self.sample(name)
        return self.samples.token_scale(name)

    def range_widths(self, name: str) -> Tensor:
        """:func:`spikellm.quantization.massive_tokens.range_width` of all calibration inputs of a
        layer, ``(tokens,)``.

        Raises:
            UnsupportedModelError: the layer was not run on the calibration text.
        """
        self.sample(name)
        return self.samples.range_widths(name)

    def hessian(self, name: str) -> Tensor:
        """``XᵀX`` of all calibration inputs of a layer, float64, ``(in, in)``.

        For algorithms that sum it up.

        Raises:
            UnsupportedModelError: the layer was not run on the calibration text.
        """
        self.sample(name)
        found = self.samples.hessian(name)
        assert found is not None
        return found

    def turn(self, name: str) -> int:
        """The place of a layer in the order in which watched layers run.

        Behind all of them where it was not run.
        """
        return self.samples.turn(name)

    def shared_input_layers(self, name: str) -> list[str]:
        """Layers that read the same tensor as this one and code it by the same settings, this one
        first; itself alone where inputs were not watched.
        """
        if self.samples.get(name) is None:
            return [name]
        same = self.samples.shared_input_layers(name) & {
            other
            for other in self.layers
            if self.settings[other].activations == self.settings[name].activations
        }
        return [name, *(other for other in self.layers if other in same and other != name)]


class FittedBlock(NamedTuple):
    """What an algorithm makes of a block.

    Attributes:
        layers: spiking layers by full name.
        dense: new values of parameters that stay dense (norms that take over scales), float32, by
            full name.
        dropped: equivalent transforms that do not hold in this block.
        notes: what a user should know of how the fit went.
        rotated: how many input channels are rotated while the model runs, by layer.
        behind: the converted stream behind the block, batch by batch, where it is known already.
    """

    layers: dict[str, SpikingLinear]
    dense: dict[str, Tensor] = {}  # noqa: RUF012  never changed
    dropped: list[str] = []  # noqa: RUF012
    notes: list[str] = []  # noqa: RUF012
    rotated: dict[str, int] = {}  # noqa: RUF012
    behind: list[Tensor] | None = None


class Algorithm(ABC):
    """How weights and channel groups of a block are fitted.

    Attributes:
        formats: kinds of weight codes (``WeightFormat.coding``) that it can fit.
        fits_alone: whether it can fit a layer without a block around it: the output projection,
            which is rounded to nearest otherwise.
    """

    formats: ClassVar[tuple[str, ...]] = ("affine",)
    fits_alone: ClassVar[bool] = False

    @abstractmethod
    def needs_inputs(self, settings: LinearRecipe) -> bool:
        """Whether a sample of the inputs of a layer with these settings is needed."""

    def needs_hessian(self, recipe: Recipe) -> bool:
        """Whether ``XᵀX`` of the sampled layers' inputs is to be summed up."""
        return False

    def needs_fp_input(self, recipe: Recipe) -> bool:
        """Whether the full-precision stream in front of a block is needed too."""
        return False

    def tokens_per_channel(self, recipe: Recipe) -> int:
        """How many calibration tokens it should have for each input channel of a layer; 0 where it
        learns nothing from them that a short text would mislead it in.
        """
        return 0

    def needs_survey(self, settings: LinearRecipe) -> bool:
        """Whether a layer with these settings is to be seen before any block is converted."""
        return False

    def surveys_all(self, recipe: Recipe) -> bool:
        """Whether all layers are to be seen before any block is converted, whatever their
        settings.
        """
        return False

    def survey(self, layers: Iterable[SurveyedLayer], recipe: Recipe) -> None:  # noqa: B027  most look at nothing
        """Look at the layers that it surveys.

        Called once, before the first block, if there are any.
        """

    def batch_sizes(self, windows: Sequence[int], recipe: Recipe) -> set[int]:
        """Numbers of windows that it runs a block on at a time, beside whole batches.

        ``windows`` are those of each batch.
        """
        return set()

    def learning_bytes(self, recipe: Recipe) -> int:
        """Bytes that it keeps for each weight of a block while it learns."""
        return 0

    def for_head(self, recipe: Recipe) -> Recipe:
        """The recipe as it fits the output projection, which has no layers beside it."""
        return recipe

    def check_share(self, windows: Sequence[int], recipe: Recipe) -> None:  # noqa: B027  most can share any text
        """Refuse a share of the calibration text that would make several ranks fit other than one.

        ``windows`` are this rank's, batch by batch.

        Raises:
            RequestError: says what would do.
        """

    @abstractmethod
    def fit_block(self, context: BlockContext) -> FittedBlock:
        """A spiking layer for every layer of the context."""


algorithms: Registry[Callable[[], Algorithm]] = Registry("algorithm")
"""Algorithms: how the weights of a block are fitted."""
