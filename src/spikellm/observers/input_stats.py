"""Samples and second moments of the inputs of linear layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spikellm.core import distributed
from spikellm.observers.token_weights import SamplePlan, TokenWeights, token_scale
from spikellm.quantization.massive_tokens import range_width


def stride_of(seen: int, wanted: int) -> int:
    """Every how many of the tokens seen one is kept, so that at most ``wanted`` are."""
    return max(1, -(-seen // wanted))


class TokenSample:
    """Evenly spread sample of the input tokens of a linear layer, float32, weighed as the plan
    says.
    """

    def __init__(self, plan: SamplePlan) -> None:
        self._plan, self._stride = plan, stride_of(plan.seen, plan.wanted)
        self._position = plan.before
        self._parts: list[Tensor] = []
        self._widths: list[Tensor] = []
        self._scales: list[Tensor] = []
        self.hessian: Tensor | None = None

    def update(self, x: Tensor, *, hessian: bool = False) -> None:
        """Take what the stride picks from ``(..., channels)``.

        Args:
            hessian: add ``xᵀx`` of all tokens too, float64 sums of float32 products of a batch.
        """
        tokens = x.detach().reshape(-1, x.shape[-1])
        first = -self._position % self._stride
        self._position += tokens.shape[0]
        if self._plan.widths:
            self._widths.append(range_width(tokens.float()).flatten())
        if not hessian and self._plan.weights.rule == "equal":
            self._parts.append(tokens[first :: self._stride].float())
            return
        scale = token_scale(tokens, self._plan.weights.rule)
        tokens = tokens.float()
        if scale is not None:
            tokens = tokens * scale
            self._scales.append(scale[first :: self._stride].clone())
        self._parts.append(tokens[first :: self._stride].clone())
        if hessian:
            tokens = self._plan.weights.stressed(tokens)
            product = (tokens.T @ tokens).double()
            self.hessian = product if self.hessian is None else self.hessian.add_(product)

    def all_gather(self) -> None:
        """Take over what other ranks saw."""
        self._parts = [distributed.all_gather(self.tokens())]
        if (scale := self.scale()) is not None:
            self._scales = [distributed.all_gather(scale)]
        if self._plan.widths:
            self._widths = [distributed.all_gather(self.widths())]
        if self.hessian is not None:
            distributed.all_reduce(self.hessian)

    def tokens(self) -> Tensor:
        """The sample, ``(tokens, channels)``."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def scale(self) -> Tensor | None:
        """What its tokens were multiplied by, ``(tokens, 1)``; None for ones."""
        return torch.cat(self._scales) if self._scales else None

    def widths(self) -> Tensor:
        """Widths of the ranges of all tokens as they came, float32 ``(tokens,)``, if the plan asks
        for them.
        """
        return torch.cat(self._widths)


class SampledInputs:
    """Token samples of several linear layers.

    Layers that are fed the very same tensor (q, k and v) share one sample.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        plan: SamplePlan,
        *,
        hessian: bool = False,
    ) -> None:
        self._layers, self._plan, self._hessian = layers, plan, hessian
        self._of: dict[str, TokenSample] = {}
        # tensors that live, as they were when sampled
        self._recent: list[tuple[weakref.ref[Tensor], int, TokenSample]] = []

    @property
    def token_weights(self) -> TokenWeights:
        """How much tokens weigh."""
        return self._plan.weights

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name].tokens()

    def get(self, name: str) -> Tensor | None:
        """Sample of a layer, None if it was not watched."""
        return self[name] if name in self._of else None

    def hessian(self, name: str) -> Tensor | None:
        """``XᵀX`` over all tokens that a layer was fed, float64 ``(in, in)``.

        None if it was not asked for or the layer not watched.
        """
        return self._of[name].hessian if name in self._of else None

    def token_scale(self, name: str) -> Tensor | None:
        """What the sampled tokens of a layer were multiplied by, ``(tokens, 1)``; None for ones."""
        return self._of[name].scale()

    def range_widths(self, name: str) -> Tensor:
        """Of all tokens that a layer was fed, see :meth:`TokenSample.widths`."""
        return self._of[name].widths()

    def shared_input_layers(self, name: str) -> set[str]:
        """Watched layers that are fed the same tensor as this one, itself included."""
        return {other for other, sample in self._of.items() if sample is self._of[name]}

    def turn(self, name: str) -> int:
        """The place of a layer in the order in which watched layers first ran.

        Behind all of them where it was not watched or did not run.
        """
        return list(self._of).index(name) if name in self._of else len(self._of)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While this holds, every forward pass through the layers is sampled."""
        handles = [
            layer.register_forward_pre_hook(self._hook(name))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            self._recent = []
            for handle in handles:
                handle.remove()

    def all_gather(self) -> None:
        """Take over what other ranks saw."""
        for sample in dict.fromkeys(self._of.values()):
            sample.all_gather()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            self._recent = [entry for entry in self._recent if entry[0]() is not None]
            for tensor, version, sample in self._recent:
                if tensor() is x and version == x._version and self._of.get(name, sample) is sample:
                    self._of[name] = sample
                    return
            sample = self._of.setdefault(name, TokenSample(self._plan))
            sample.update(x, hessian=self._hessian)
            self._recent.append((weakref.ref(x), x._version, sample))

        return record
