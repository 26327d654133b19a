"""Fitting the layers of a block one after the other, on inputs as the spikes bring them, towards
what the full-precision stream gives.

A layer with weights Ŵ is fed q, the coded inputs of the converted stream, and should give ``W x``,
x the inputs of the full-precision stream. Of all weights

    W* = W · E[x qᵀ] · E[q qᵀ]⁻¹

come nearest, and ``E‖W x − Ŵ q‖² = E‖(Ŵ − W*) q‖² + const``: error feedback on W* with the Hessian
of q finds codes for the whole error, that of the inputs' coding and of all layers before included
(the asymmetric calibration of GPTAQ, here with spikes). ``E[(x − q) qᵀ]`` is damped, so that what a
short text happens to show is not learned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.base import BlockContext
from spikellm.algorithms.kept_outputs import KeptOutputs
from spikellm.core import distributed
from spikellm.core.errors import NumericalError
from spikellm.models.attention_interface import uncoded
from spikellm.models.experts import every_expert_sees_every_token, is_unfused
from spikellm.models.families import weight_and_bias
from spikellm.models.swap import replace_module
from spikellm.nn.channels import Groups
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.hooks import first_input
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name

KEPT = 1 << 29
"""Bytes of a block's exact inputs, and of outputs of its converted layers, that are kept."""


class Moments(NamedTuple):
    """Of a layer's inputs, float64 ``(in, in)``: ``Σ q qᵀ``, and ``Σ (x − q) qᵀ``."""

    hessian: Tensor
    cross_moment: Tensor


class SequentialFit:
    """A block whose layers are replaced as they are fitted.

    Use as a context manager: afterwards the block is as it was.

    Args:
        wanted: names of the layers whose :meth:`moments` will be asked for. What the full-precision
            stream feeds them is seen in one pass and kept, where memory should hold it.
    """

    def __init__(self, context: BlockContext, wanted: Collection[str] = ()) -> None:
        self._context, self._wanted = context, wanted
        self._exact: dict[str, list[Tensor]] = {}
        self._outputs = KeptOutputs()
        self._inside = {full: full.removeprefix(f"{context.name}.") for full in context.layers}
        self._fitted: dict[str, SpikingLinear] = {}

    def __enter__(self) -> SequentialFit:
        return self

    def __exit__(self, *_: object) -> None:
        self._put(self._context.layers)

    def put(self, layers: dict[str, SpikingLinear]) -> None:
        """Let later layers see what these give."""
        self._fitted.update(layers)
        self._put(layers)

    def moments(self, name: str, groups: Groups) -> Moments:
        """Moments of the inputs of a layer that is fed what all layers put so far give.

        Of several ranks over all of them.
        """
        context, activations = self._context, self._context.settings[name].activations
        coder = None
        if activations.spiking:
            channel, _, share, massive, price, fixed = groups
            coder = InputCoder(activations, channel, share, massive, price, fixed)
        hessian = cross_moment = torch.zeros(())
        for batch in range(len(context.inputs)):
            exact = self._exact_input(name, batch)
            with self._kept(batch, stop=name):
                x = self._input(name, context.inputs[batch])
            q = x if coder is None else coder.values(x)
            scale = context.samples.token_weights.scale(x, fitted=True)
            if scale is not None:
                exact, q = exact * scale, q * scale
            hessian = (q.T @ q).double() + hessian
            cross_moment = ((exact - q).T @ q).double() + cross_moment
        self._exact.pop(name, None)
        return Moments(distributed.all_reduce(hessian), distributed.all_reduce(cross_moment))

    def outputs(self) -> list[Tensor] | None:
        """What the block gives behind its converted layers, batch by batch; None where it runs
        otherwise once it is converted, or memory should not hold them.
        """
        context, block = self._context, self._context.module
        inputs = [context.inputs[batch] for batch in range(len(context.inputs))]
        size = sum(x.numel() * x.element_size() for x in inputs)
        if any(map(is_unfused, block.modules())) or size + self._outputs.bytes > KEPT:
            return None  # experts see their own tokens alone then
        found = []
        for batch, hidden in enumerate(inputs):
            with self._kept(batch):
                found.append(context.forward(block, hidden))
        return found

    @contextmanager
    def _kept(self, batch: int, stop: str | None = None) -> Iterator[None]:
        """A pass over the converted stream, up to a layer, that runs only what it has to."""
        exact = sum(x.numel() * x.element_size() for every in self._exact.values() for x in every)
        self._outputs.room = KEPT - exact - self._outputs.bytes
        block = self._context.module
        # with the rotation before it, if there is one
        final = [block.get_submodule(layer_name(self._inside[name])) for name in self._fitted]
        pending = [
            block.get_submodule(self._inside[name])
            for name in self._inside
            if name not in self._fitted and name != stop
        ]
        with self._outputs.of(batch, final, pending):
            yield

    def _input(self, name: str, hidden: Tensor) -> Tensor:
        """What a layer is fed on some windows: float32, ``(tokens, in)``."""
        block = self._context.module
        with every_expert_sees_every_token():
            found = first_input(
                block.get_submodule(self._inside[name]),
                lambda: self._context.forward(block, hidden),
            )
        return found.flatten(0, -2).float()

    def _exact_input(self, name: str, batch: int) -> Tensor:
        """What the full-precision stream feeds a layer on a batch: float32, ``(tokens, in)``."""
        if not self._exact and self._wanted and not self._fitted and self._can_keep():
            self._keep_exact_inputs()
        if name in self._exact:
            return self._exact[name][batch].flatten(0, -2).float()
        with self._full_precision():
            return self._input(name, self._context.fp_input[batch])

    def _can_keep(self) -> bool:
        context = self._context
        widths = [weight_and_bias(context.layers[name])[0].shape[1] for name in self._wanted]
        tokens = sum(context.fp_input[i].shape[:-1].numel() for i in range(len(context.fp_input)))
        return tokens * sum(widths) * context.fp_input[0].element_size() <= KEPT

    def _keep_exact_inputs(self) -> None:
        block, context = self._context.module, self._context
        kept: dict[str, list[Tensor]] = {name: [] for name in self._wanted}
        handles = [
            block.get_submodule(self._inside[name]).register_forward_pre_hook(
                lambda _, fed, name=name: kept[name].append(fed[0])
            )
            for name in self._wanted
        ]
        try:
            with self._full_precision(), every_expert_sees_every_token():
                for batch in range(len(context.fp_input)):
                    context.forward(block, context.fp_input[batch])
        finally:
            for handle in handles:
                handle.remove()
        self._exact = kept

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        self._put({name: self._context.layers[name] for name in self._fitted})
        try:
            with uncoded(self._context.module):
                yield
        finally:
            self._put(self._fitted)

    def _put(self, layers: dict[str, nn.Module] | dict[str, SpikingLinear]) -> None:
        for name, layer in layers.items():
            replace_module(self._context.module, self._inside[name], layer)


def target_weight(name: str, weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """The weights W* that come nearest to the full-precision output, float32 ``(out, in)``.

    Args:
        name: of the layer, for errors.
        damping: added to the diagonal of ``Σ q qᵀ``, as a share of its mean; raised up to a
            thousandfold where that is not enough.

    Raises:
        NumericalError: it is never enough.
    """
    mean = moments.hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for share in (damping, 10 * damping, 100 * damping, 1000 * damping):
        damped = moments.hessian.clone()
        damped.diagonal().add_(share * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
    else:
        raise NumericalError(
            f"layer {name}: the second moments of its inputs are not positive definite, even with"
            f" damping {share:.2g} of their mean diagonal; give more calibration text or raise"
            " algorithm.compensation_percdamp"
        )
    cross_moment = weight.double() @ moments.cross_moment
    return (weight.double() + torch.cholesky_solve(cross_moment.T, factor).T).float()
