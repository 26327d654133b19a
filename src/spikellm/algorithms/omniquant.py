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

from spikellm.algorithms.base import Algorithm, BlockContext, FittedBlock, algorithms
from spikellm.algorithms.channel_choice import choose_groups
from spikellm.algorithms.learning import Learned, Learning, check_share
from spikellm.algorithms.omniquant_options import OmniQuantOptions
from spikellm.core import distributed
from spikellm.models.attention_interface import uncoded
from spikellm.models.families import is_linear, weight_and_bias
from spikellm.models.swap import replace_module, spiking_like
from spikellm.nn.channels import Groups, coding_of
from spikellm.nn.fake_quant import FakeQuantLinear, InputCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.ste import fake_quantize_weight
from spikellm.recipe import LinearRecipe, Recipe
from spikellm.transforms.clipping import initial_logits
from spikellm.transforms.pairs import find_pairs
from spikellm.transforms.smoothing import (
    Factors,
    Pair,
    State,
    apply_pairs,
    factors_of,
    smooth_scale,
)


@algorithms.register("omniquant")
class OmniQuant(Algorithm):
    """LET and LWC, each switchable."""

    def needs_inputs(self, settings: LinearRecipe) -> bool:
        return True

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
        self.pairs, self.dropped = self._find_pairs()
        scales = {pair.name: self._initial_scale(pair) for pair in self.pairs}
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
        state = self._scaled(self._settled_scales())
        scaled = {scaling.parameter for pair in self.pairs for scaling in pair.scalings}
        inside = {f"{name}.{part}" for name in self.full for part in ("weight", "bias")}
        dense = {f"{self.context.name}.{name}": state[name].detach() for name in scaled - inside}
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

    # equivalent scalings

    def _find_pairs(self) -> tuple[list[Pair], list[str]]:
        if not self.options.let:
            return [], []
        hidden = distributed.broadcast(0, {"hidden": self.context.inputs[0]})[
            "hidden"
        ]  # what one rank drops all drop
        with uncoded(self.block):  # its linear layers have no coders yet
            kept, dropped = find_pairs(
                self.block,
                self.context.heads,
                self.options.pairs,
                lambda _, state: self._forward(state, hidden),
                self.context.recipe.seed,
            )
        touching = {
            pair.name
            for pair in kept
            if any(self._stays(scaling.parameter) for scaling in pair.scalings)
        }
        return [pair for pair in kept if pair.name not in touching], [*dropped, *sorted(touching)]

    def _stays(self, parameter: str) -> bool:
        """Whether a parameter belongs to a linear layer that the recipe leaves as it is."""
        return is_linear(self.block.get_submodule(parameter.rpartition(".")[0]))

    def _initial_scale(self, pair: Pair) -> Tensor:
        """SmoothQuant's scale where layers read the scaled channels; 1 between q and k."""
        ones = torch.ones(pair.length, device=self.context.device)
        if not pair.consumers:
            return ones
        spread = {scaling.parameter: scaling.spread for scaling in pair.scalings}
        input_max, weight_max = torch.zeros_like(ones), torch.zeros_like(ones)
        for name in pair.consumers:
            index = spread[f"{name}.weight"].to(ones.device)
            inputs = self.context.sample(self.full[name]).abs().amax(0)
            weights = self.state[f"{name}.weight"].abs().amax(0)
            input_max = torch.maximum(
                input_max, torch.zeros_like(ones).scatter_reduce(0, index, inputs, "amax")
            )
            weight_max = torch.maximum(
                weight_max, torch.zeros_like(ones).scatter_reduce(0, index, weights, "amax")
            )
        return smooth_scale(input_max, weight_max, self.options.alpha)

    def _scaled(self, log_scales: dict[str, Tensor]) -> State:
        return apply_pairs(
            self.state, self.pairs, {name: log.exp() for name, log in log_scales.items()}
        )

    def _settled_scales(self) -> dict[str, Tensor]:
        """Learned scales, moved to where the vectors that stay dense end up once rounded to the
        model's own type, so that rounding cancels.
        """
        scaled, settled = self._scaled(self.learned.scales), dict(self.learned.scales)
        for pair in self.pairs:
            first = pair.scalings[0]
            if scaled[first.parameter].dim() != 1 or first.power > 0:
                continue
            own = self.context.module.get_parameter(first.parameter)
            rounded = scaled[first.parameter].to(own.dtype).float() + first.offset
            ratio = (self.state[first.parameter] + first.offset) / rounded
            usable = torch.isfinite(ratio) & (ratio > 0)
            settled[pair.name] = torch.where(
                usable, ratio.clamp(min=1e-30).log(), settled[pair.name]
            )
        return settled

    def _input_scale(self, name: str, scales: dict[str, Tensor]) -> Tensor | None:
        """What the inputs of a layer are divided by."""
        for pair in self.pairs:
            if name in pair.consumers:
                index = next(
                    scaling.spread
                    for scaling in pair.scalings
                    if scaling.parameter == f"{name}.weight"
                )
                return scales[pair.name][index]
        return None

    # salient channels

    def _choose_channels(self, scales: dict[str, Tensor]) -> dict[str, Groups]:
        """Groups of every layer's channels; layers that share a choice share a coder."""
        smoothed = self._scaled({name: scale.log() for name, scale in scales.items()})
        after, inside = (
            self.options.saliency_after_smoothing,
            {full: name for name, full in self.full.items()},
        )

        def evidence(full: str) -> tuple[Tensor, Tensor]:
            name, x = inside[full], self.context.sample(full)
            scale = self._input_scale(name, scales) if after else None
            return (
                (x, self.state[f"{name}.weight"])
                if scale is None
                else (x / scale, smoothed[f"{name}.weight"])
            )

        groups = {}
        for names, shared in choose_groups(self.context, evidence):
            activations = self.context.settings[names[0]].activations
            coder = (
                InputCoder(activations, shared[names[0]].channel) if activations.spiking else None
            )
            for full, own in shared.items():
                groups[inside[full]], self.fake_quant_layers[inside[full]].coder = own, coder
        return groups

    # training

    def _state(self, learned: Learned) -> State:
        """Parameters of the copy: scaled, and weights as their codes will stand for them."""
        factors = factors_of(self.pairs, {name: log.exp() for name, log in learned.scales.items()})
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
        layer = spiking_like(
            self.context.layers[full], self.context.settings[full], self.context.device
        )
        layer.set_groups(*self.groups[name])
        layer.set_weights(
            self.codings[name].code(state[f"{name}.weight"], self.learned.logits.get(name))
        )
        if layer.bias is not None:
            layer.bias.data.copy_(state[f"{name}.bias"])
        return layer
