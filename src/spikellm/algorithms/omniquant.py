"""OmniQuant with spikes in the loop: equivalent scalings (LET) and weight clipping (LWC) learned
block by block (SpikeLLM §4, OmniQuant).

A float32 copy of the block, whose linear layers code their inputs as the spiking layers will, is
run on the converted stream; scales and clipping logits follow the gradient of the mean squared
error to the full-precision stream. Only they are trained. The best state is kept; a loss that is
not finite restores it and halves the rates. With no epochs and no clipping this is SmoothQuant.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spikellm.algorithms.base import (
    MOMENT_TOKENS,
    Algorithm,
    BlockContext,
    FittedBlock,
    algorithms,
)
from spikellm.algorithms.channel_choice import choose_groups
from spikellm.algorithms.learning import Learned, Learning, check_share
from spikellm.algorithms.omniquant_options import OmniQuantOptions
from spikellm.algorithms.omniquant_scalings import BlockScalings, pairs_that_hold
from spikellm.models.families import weight_and_bias
from spikellm.models.swap import fitted_layer, replace_module
from spikellm.nn.channels import Groups, coding_of
from spikellm.nn.fake_quant import FakeQuantLinear, InputCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.ste import fake_quantize_weight
from spikellm.recipe import LinearRecipe, Recipe
from spikellm.transforms.clipping import initial_logits
from spikellm.transforms.smoothing import Factors, State


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


class _Functional(nn.Module):
    """A block run with other parameters than its own."""

    def __init__(self, block: nn.Module, state: State) -> None:
        super().__init__()
        self.block, self.state = block, state

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return functional_call(self.block, self.state, arguments, keywords)


class _Fit:
    """The fit of one block. Names of layers are those within the block."""

    def __init__(self, context: BlockContext) -> None:
        self.context, self.options = context, context.recipe.options(OmniQuantOptions)
        self.full = {name.removeprefix(f"{context.name}."): name for name in context.layers}
        self.block = copy.deepcopy(context.module).float()
        self.fake_quant_layers: dict[str, FakeQuantLinear] = {}
        precision = getattr(torch, self.options.precision)
        for name in self.full:
            self.fake_quant_layers[name] = FakeQuantLinear(
                *weight_and_bias(self.block.get_submodule(name)), precision
            )
            replace_module(self.block, name, self.fake_quant_layers[name])
        for parameter in self.block.parameters():
            parameter.requires_grad_(False)
        self.state: State = dict(self.block.named_parameters())
        pairs, self.dropped = pairs_that_hold(context, self.block, self._forward)
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

    def _forward(self, state: State, hidden: Tensor) -> Tensor:
        try:
            return self.context.forward(_Functional(self.block, state), hidden.float())
        finally:
            for layer in self.fake_quant_layers.values():
                if layer.coder is not None:
                    layer.coder.forget()

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
                InputCoder(activations, first.channel, first.range_share, price=first.price)
                if activations.spiking
                else None
            )
            for full, own in shared.items():
                groups[inside[full]], self.fake_quant_layers[inside[full]].coder = own, coder
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
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in range(len(self.context.inputs)):
                parts = (
                    store[batch].split(self.options.batch_size)
                    for store in (self.context.inputs, self.context.fp_output)
                )
                yield from zip(*parts, strict=True)

        learning = Learning(self.context.name, self.options, batches, self._state, self._forward)
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
