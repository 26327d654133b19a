"""OmniQuant with spikes in the loop: equivalent scalings (LET) and weight clipping (LWC) learned
block by block (SpikeLLM §4, OmniQuant).

A float32 copy of the block, whose linear layers code their inputs as the spiking layers will, is
run on the converted stream; scales and clipping logits follow the gradient of the mean squared
error to the full-precision stream. Only they are trained. The best state is kept; a loss that is
not finite restores it and halves the rates. With no epochs and no clipping this is SmoothQuant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.base import (
    MOMENT_TOKENS,
    Algorithm,
    BlockContext,
    FittedBlock,
    algorithms,
)
from spikellm.algorithms.block_copy import BlockCopy
from spikellm.algorithms.channel_choice import choose_groups
from spikellm.algorithms.learning import Learning, Manner, batches_of, check_share
from spikellm.algorithms.omniquant_options import OmniQuantOptions
from spikellm.algorithms.omniquant_scalings import BlockScalings, pairs_that_hold
from spikellm.models.swap import fitted_layer
from spikellm.nn.channels import Groups, coding_of
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.ste import fake_quantize_weight
from spikellm.recipe import LinearRecipe, Recipe
from spikellm.transforms.clipping import initial_logits
from spikellm.transforms.smoothing import Factors, State

_MANNER = Manner(
    "omniquant",
    "omniquant.let_rate and omniquant.lwc_rate",
    ", or set omniquant.let to false",
)


@algorithms.register("omniquant")
class OmniQuant(Algorithm):
    """LET and LWC, each switchable."""

    def needs_inputs(self, settings: LinearRecipe) -> bool:
        return True

    def tokens_per_channel(self, recipe: Recipe) -> int:
        return MOMENT_TOKENS if recipe.options(OmniQuantOptions).epochs else 0

    def batch_sizes(self, windows: Sequence[int], recipe: Recipe) -> set[int]:
        step = recipe.options(OmniQuantOptions).batch_size
        return {step, *(size % step for size in windows)}

    def check_share(self, windows: Sequence[int], recipe: Recipe) -> None:
        check_share(recipe.options(OmniQuantOptions), windows)

    def fit_block(self, context: BlockContext) -> FittedBlock:
        return _Fit(context).result()


class Learned(NamedTuple):
    """What is learned of a block: logarithms of scales by pair, logits γ and β by layer.

    ``rates`` are those of scales and of logits.
    """

    scales: dict[str, Tensor]
    logits: dict[str, tuple[Tensor, Tensor]]
    rates: tuple[float, float]

    def clone(self) -> Learned:
        """See :class:`spikellm.algorithms.learning.Learnable`."""
        return Learned(
            {name: tensor.detach().clone() for name, tensor in self.scales.items()},
            {
                name: (gamma.detach().clone(), beta.detach().clone())
                for name, (gamma, beta) in self.logits.items()
            },
            self.rates,
        )

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """See :class:`spikellm.algorithms.learning.Learnable`."""
        logits = [tensor for pair in self.logits.values() for tensor in pair]
        return list(zip((list(self.scales.values()), logits), self.rates, strict=True))


class _Fit:
    """The fit of one block. Names of layers are those within the block."""

    def __init__(self, context: BlockContext) -> None:
        self.context, self.options = context, context.recipe.options(OmniQuantOptions)
        self.copy = BlockCopy(context, self.options.precision)
        self.full, self.state = self.copy.names, self.copy.state
        pairs, self.dropped = pairs_that_hold(context, self.copy.block, self.copy.run)
        self.scalings = BlockScalings(context, self.state, pairs)
        scales = self.scalings.initial()
        self.groups = self._choose_channels(scales)
        self.codings = {
            name: coding_of(context.settings[full], self.groups[name])
            for name, full in self.full.items()
        }
        logits = {
            name: initial_logits(
                len(self.state[f"{name}.weight"]), len(coding.groups), context.device
            )
            for name, coding in self.codings.items()
        }
        self.notes = [
            f"equivalent scaling {pair} does not hold in this block and is left out"
            for pair in self.dropped
        ]
        self.learned = Learned(
            {name: scale.log() for name, scale in scales.items()},
            logits if self.options.lwc else {},
            (self.options.let_rate, self.options.lwc_rate),
        )

    def result(self) -> FittedBlock:
        """Train, then code the weights."""
        if self.options.epochs and (self.learned.scales or self.learned.logits):
            with torch.enable_grad():
                self.learned = self._train()
        state = self.scalings.applied(self.scalings.settled(self.learned.scales))
        inside = {f"{name}.{part}" for name in self.full for part in ("weight", "bias")}
        dense = {
            f"{self.context.name}.{name}": state[name].detach()
            for name in self.scalings.parameters - inside
        }
        return FittedBlock(
            {full: self._coded(name, state) for name, full in self.full.items()},
            dense,
            self.dropped,
            self.notes,
        )

    # salient channels

    def _choose_channels(self, scales: dict[str, Tensor]) -> dict[str, Groups]:
        """Groups of every layer's channels; layers that share a choice share a coder."""
        smoothed = self.scalings.applied({name: scale.log() for name, scale in scales.items()})
        after = self.options.saliency_after_smoothing
        inside = {full: name for name, full in self.full.items()}

        def evidence(full: str) -> tuple[Tensor, Tensor]:
            name, x = inside[full], self.context.sample(full)
            scale = self.scalings.input_scale(name, scales) if after else None
            return (
                (x, self.state[f"{name}.weight"])
                if scale is None
                else (x / scale, smoothed[f"{name}.weight"])
            )

        groups = {}
        for names, shared in choose_groups(self.context, evidence):
            activations = self.context.settings[names[0]].activations
            first = shared[names[0]]
            coder = (
                InputCoder(
                    activations,
                    first.channel,
                    first.range_share,
                    price=first.price,
                    fixed=first.fixed,
                )
                if activations.spiking
                else None
            )
            for full, own in shared.items():
                groups[inside[full]], self.copy.layers[inside[full]].coder = own, coder
        return groups

    # training

    def _state(self, learned: Learned) -> State:
        """Parameters of the copy: scaled, and weights as their codes will stand for them."""
        factors = self.scalings.factors(learned.scales)
        weights = {f"{name}.weight": name for name in self.full}
        state = {
            **self.state,
            **{
                name: factor.applied(self.state[name])
                for name, factor in factors.items()
                if name not in weights
            },
        }
        for parameter, name in weights.items():
            rows, columns, _ = factors.get(parameter, Factors())
            state[parameter] = fake_quantize_weight(
                self.state[parameter], self.codings[name], learned.logits.get(name), rows, columns
            )
        return state

    def _train(self) -> Learned:
        def error(learned: Learned, hidden: Tensor, target: Tensor) -> Tensor:
            output = self.copy.run(self._state(learned), hidden)
            return nn.functional.mse_loss(output, target.to(output.device).float())

        size = self.options.batch_size
        learning = Learning(
            self.context.name,
            self.options,
            lambda: batches_of(self.context, size),
            error,
            _MANNER,
        )
        learned = learning.from_start(self.learned)
        self.notes += learning.notes
        return learned

    # coding

    @torch.no_grad()
    def _coded(self, name: str, state: State) -> SpikingLinear:
        full = self.full[name]
        layer = fitted_layer(
            self.context.layers[full],
            self.context.settings[full],
            self.groups[name],
            self.codings[name].code(state[f"{name}.weight"], self.learned.logits.get(name)),
            self.context.device,
        )
        if layer.bias is not None:
            layer.bias.data.copy_(state[f"{name}.bias"])
        return layer
