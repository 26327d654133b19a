"""Block-AP with spikes in the loop: weights, scales and zero-points learned block by block
(EfficientQAT, Chen et al., ACL 2025), from rounding to nearest or from what GPTQ found.

A float32 copy of the block, whose linear layers and attention code their inputs as the spiking ones
will, runs on the converted stream; everything that its weight codes are made of follows the
gradient of the squared error to the full-precision stream, straight through all rounding. Which
codes a column may take (its steps) and how inputs are coded stay as the start chose them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.base import Algorithm, BlockContext, FittedBlock, algorithms
from spikellm.algorithms.block_ap_options import BlockApOptions
from spikellm.algorithms.block_copy import BlockCopy
from spikellm.algorithms.learned_layer import CODINGS, LearnableLayer, LearnedLayer
from spikellm.algorithms.learning import Learning, Manner, batches_of, check_share
from spikellm.algorithms.survey import SurveyedLayer
from spikellm.models.families import is_linear, weight_and_bias
from spikellm.nn.fake_quant import FakeQuantLinear, InputCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.ste import pass_through
from spikellm.recipe import LinearRecipe, Recipe

_HELD_OUT = 8  # every how many-th batch the best state is chosen by
_BYTES = 4 * 11
"""Of a weight while it is learned: itself, at the start, at its best and now; its gradient and two
moments; the value of its code and the code for the backward pass, and three of the latter's own.
"""


@algorithms.register("block-ap")
class BlockAp(Algorithm):
    """Sees what its start needs to see."""

    formats = CODINGS
    fits_alone = True

    def __init__(self) -> None:
        self._starts = {name: algorithms[name]() for name in ("rtn", "gptq")}

    def _start(self, recipe: Recipe) -> tuple[Algorithm, Recipe]:
        """What fits a block first, and the recipe that it knows."""
        options = recipe.options(BlockApOptions).start
        return self._starts[options.name], recipe.model_copy(update={"algorithm": options})

    def needs_inputs(self, settings: LinearRecipe) -> bool:
        return True

    def needs_hessian(self, recipe: Recipe) -> bool:
        start, own = self._start(recipe)
        return start.needs_hessian(own)

    def needs_fp_input(self, recipe: Recipe) -> bool:
        start, own = self._start(recipe)
        return start.needs_fp_input(own)

    def tokens_per_channel(self, recipe: Recipe) -> int:
        start, own = self._start(recipe)
        return start.tokens_per_channel(own)

    def needs_survey(self, settings: LinearRecipe) -> bool:
        return any(start.needs_survey(settings) for start in self._starts.values())

    def surveys_all(self, recipe: Recipe) -> bool:
        start, own = self._start(recipe)
        return start.surveys_all(own)

    def survey(self, layers: Iterable[SurveyedLayer], recipe: Recipe) -> None:
        start, own = self._start(recipe)
        start.survey(layers, own)

    def batch_sizes(self, windows: Sequence[int], recipe: Recipe) -> set[int]:
        step = recipe.options(BlockApOptions).batch_size
        return {step, *(size % step for size in windows)}

    def check_share(self, windows: Sequence[int], recipe: Recipe) -> None:
        check_share(recipe.options(BlockApOptions), windows, _HELD_OUT)

    def learning_bytes(self, recipe: Recipe) -> int:
        return _BYTES if recipe.options(BlockApOptions).epochs else 0

    def for_head(self, recipe: Recipe) -> Recipe:
        """Nothing is learned: there is no block around the projection."""
        start, own = self._start(recipe)
        options = recipe.options(BlockApOptions)
        update = {"epochs": 0, "start": start.for_head(own).algorithm}
        return recipe.model_copy(update={"algorithm": options.model_copy(update=update)})

    def fit_block(self, context: BlockContext) -> FittedBlock:
        start, own = self._start(context.recipe)
        fitted = start.fit_block(replace(context, recipe=own))
        if context.recipe.options(BlockApOptions).epochs == 0 or not fitted.layers:
            return fitted
        return _Fit(context, fitted).result()


class Learned(NamedTuple):
    """What is learned of a block: its layers, and shifts of its norms, by name within the block.

    ``rates`` are those of weights and of everything else.
    """

    layers: dict[str, LearnedLayer]
    norms: dict[str, Tensor]
    rates: tuple[float, float]

    def clone(self) -> Learned:
        """See :class:`spikellm.algorithms.learning.Learnable`."""
        return Learned(
            {name: layer.clone() for name, layer in self.layers.items()},
            {name: shift.detach().clone() for name, shift in self.norms.items()},
            self.rates,
        )

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """See :class:`spikellm.algorithms.learning.Learnable`."""
        weights = [layer.weight for layer in self.layers.values()]
        others = [
            one for layer in self.layers.values() for one in layer[1:] if one is not None
        ] + list(self.norms.values())
        return [
            (parameters, rate)
            for parameters, rate in zip((weights, others), self.rates, strict=True)
            if rate > 0
        ]


class _Fit:
    """Learning on one block. Names of layers are those within the block."""

    def __init__(self, context: BlockContext, fitted: FittedBlock) -> None:
        self.context, self.fitted = context, fitted
        self.options = context.recipe.options(BlockApOptions)
        self.copy = BlockCopy(context, self.options.precision)
        by_value = self.options.learn == "values"
        self.layers = {
            name: LearnableLayer(
                fitted.layers[full],
                weight_and_bias(context.layers[full])[0].detach(),
                by_value=by_value,
            )
            for name, full in self.copy.names.items()
        }
        for name, coder in input_coders(context, fitted.layers).items():
            self.copy.layers[name.removeprefix(f"{context.name}.")].coder = coder
        self.norms = norms_of(self.copy.block) if self.options.norms else []
        self.units = {
            name: 1.0 if by_value else float(self.copy.state[name].abs().mean()) or 1.0
            for name in self.norms
        }

    def result(self) -> FittedBlock:
        """The block with what was learned, or as it started where nothing was."""
        options = self.options
        start = Learned(
            {name: layer.start for name, layer in self.layers.items()},
            {name: torch.zeros_like(self.copy.state[name]) for name in self.norms},
            (options.weight_rate, options.scale_rate),
        )
        learning = Learning(
            self.context.name,
            options,
            lambda: batches_of(self.context, options.batch_size),
            self._error,
            Manner(
                "block-ap",
                "algorithm.weight_rate and algorithm.scale_rate",
                last_rate=options.last_rate,
                relative=True,
                shrink=4.0,
                held_out=_HELD_OUT,
            ),
        )
        with torch.enable_grad():
            learned = learning.from_start(start)
        notes = [*self.fitted.notes, *learning.notes]
        if learned is start:
            return self.fitted._replace(notes=notes)
        with torch.no_grad():
            layers = {
                full: self.layers[name].layer(learned.layers[name])
                for name, full in self.copy.names.items()
            }
            dense = {
                f"{self.context.name}.{name}": self._norm(name, shift)
                for name, shift in learned.norms.items()
            }
        return FittedBlock(layers, {**self.fitted.dense, **dense}, notes=notes)

    def _error(self, learned: Learned, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the block's output, tokens weighed as they are in Hessians."""
        state = {
            **self.copy.state,
            **{
                f"{name}.weight": self.layers[name].value(own)
                for name, own in learned.layers.items()
            },
            **{name: self._norm(name, shift) for name, shift in learned.norms.items()},
        }
        output = self.copy.run(state, hidden).flatten(0, -2)
        wanted = target.to(output.device).flatten(0, -2).float()
        error = output - wanted
        scale = self.context.samples.token_weights.scale(wanted, fitted=True)
        if scale is None:
            return error.square().mean()
        return (error * scale).square().sum() / (scale.square().sum() * error.shape[-1])

    def _norm(self, name: str, shift: Tensor) -> Tensor:
        """A norm's gains or offsets as the model's own type holds them."""
        value = self.copy.state[name] + self.units[name] * shift
        dtype = self.context.module.get_parameter(name).dtype
        return pass_through(value, value.detach().to(dtype).float())


def input_coders(
    context: BlockContext, layers: dict[str, SpikingLinear]
) -> dict[str, InputCoder | None]:
    """What codes the inputs of every layer, by full name; layers that read the same tensor in the
    same way share one.
    """
    found: dict[str, InputCoder | None] = {}
    for name, layer in layers.items():
        activations = layer.settings.activations
        if not activations.spiking:
            found[name] = None
            continue
        same = (
            found[other]
            for other in context.shared_input_layers(name)
            if other in found and _coded_alike(layer, layers[other])
        )
        own = layer.channel_group, layer.range_share, layer.massive, layer.price, layer.fixed
        found[name] = next(same, None) or InputCoder(activations, *own)
    return found


def _coded_alike(one: SpikingLinear, other: SpikingLinear) -> bool:
    facts = [(each.range_share, each.massive, each.price) for each in (one, other)]
    tensors = [(each.channel_group, *(each.fixed or ())) for each in (one, other)]
    return facts[0] == facts[1] and all(map(torch.equal, *tensors))


def norms_of(block: nn.Module) -> list[str]:
    """Names of the parameters of norms: of modules without children that hold vectors alone."""
    return [
        f"{name}.{own}"
        for name, module in block.named_modules()
        if not (isinstance(module, FakeQuantLinear) or is_linear(module) or list(module.children()))
        and all(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
        for own, _ in module.named_parameters(recurse=False)
    ]
