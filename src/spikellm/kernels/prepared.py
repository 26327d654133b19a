"""What backends are given of a layer, and what they prepare: protocols, no code of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spikellm.kernels.spec import LinearSpec


class PackedCodes(NamedTuple):
    """Weight codes of one width, ``k = code − zero``.

    Attributes:
        codes: uint8, packed, ``(out, bytes)``, columns in stored order.
        zero: uint8, ``(out, weight groups)``.
    """

    codes: Tensor
    zero: Tensor


class LinearWeights(Protocol):
    """Weights of a layer as a backend reads them.

    Attributes:
        weight_scale: float32 or bfloat16, ``(out, weight groups)``; products are in float32.
        bias: ``(out,)``, any float type; None if there is none.
    """

    @property
    def weight_scale(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    def integer_weights(self, rows: slice = ...) -> Tensor:
        """Integers of some outputs, int16 ``(out, in)``, columns in stored order."""
        ...

    def packed_codes(self) -> PackedCodes:
        """Codes of ``LinearSpec.weight_bits`` bits each."""
        ...

    def planes(self) -> Sequence[LinearWeights]:
        """Planes of ternary weights, without a bias, whose sum these are; else they alone."""
        ...

    def dense_weight(self) -> Tensor:
        """Float32 ``(out, in)``, columns in their original order."""
        ...

    def get_buffer(self, target: str, /) -> Tensor:
        """What is saved under a name."""
        ...

    def release_codes(self) -> None:
        """Say that a backend has a layout of its own, so that what is saved may leave memory."""
        ...


class Observed(NamedTuple):
    """What a layer gave, and the codes of its inputs.

    Attributes:
        y: ``(..., out)``, bias included, in the type of the input.
        codes: int32 or uint8 ``(tokens, in)`` in stored order; None where inputs are not coded.
        baseline: z of every code, integers that broadcast to ``codes``; None where it is to be
            found from the inputs.
    """

    y: Tensor
    codes: Tensor | None = None
    baseline: Tensor | None = None


def by_column(groups: Sequence[Tensor], bounds: Sequence[tuple[int, int]]) -> Tensor:
    """What activation groups have, ``(tokens,)`` or ``(1,)`` each, for every stored column:
    ``(tokens, in)``, or ``(tokens, 1)`` where there is one group.
    """
    if len(groups) == 1:
        return groups[0].unsqueeze(1)
    tokens = max(map(len, groups))
    parts = [
        one.unsqueeze(1).expand(tokens, stop - start)
        for one, (start, stop) in zip(groups, bounds, strict=True)
    ]
    return torch.cat(parts, dim=1)


def raised_by(spec: LinearSpec) -> Tensor | None:
    """By how much kernels raise counts of signed neurons, int32 ``(in,)``, columns in stored order;
    None where counts have no signs.
    """
    if spec.neuron is None or not spec.neuron.signed:
        return None
    parts = [
        torch.full((stop - start,), spec.massive_top or top, dtype=torch.int32)
        for top, (start, stop) in zip(spec.tops, spec.bounds, strict=True)
    ]
    return torch.cat(parts)


def shown_codes(
    counts: Tensor, z: Tensor, raised: Tensor | None, bounds: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Codes and baselines, see :class:`Observed`, of what a kernel gives.

    Args:
        counts: uint8 ``(tokens, in)`` in stored order.
        z: int32 ``(tokens, activation groups)``.
        raised: see :func:`raised_by`.
        bounds: stored columns of each activation group.
    """
    if raised is not None:  # and then there is no baseline
        return counts.to(torch.int32) - raised, z.new_zeros(1, 1)
    # Baselines fit a byte as codes do, which saves whoever counts both a few passes.
    return counts, by_column(z.to(torch.uint8).unbind(1), bounds)


class PreparedLinear(Protocol):
    """A linear layer, ready to run."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """``(..., in)`` → ``(..., out)``, bias included, in the type of ``x``."""
        ...

    def observed(self, x: Tensor, /) -> Observed:
        """The same, with codes."""
        ...


class PreparedHeads(Protocol):
    """A coder of attention heads, ready to run.

    Attributes:
        most_queries: new tokens up to which products with packed rows are taken; 0 where this
            backend takes none.
    """

    @property
    def most_queries(self) -> int: ...

    def fake_quantize(self, x: Tensor, /) -> Tensor:
        """Values of ``(batch, heads, tokens, channels)`` after coding, float32."""
        ...

    def to_rows(self, x: Tensor, /) -> Tensor:
        """Packed rows, uint8 ``(batch, heads, tokens, row bytes)``."""
        ...

    def key_scores(self, query: Tensor, rows: Tensor, /) -> Tensor:
        """``query @ keys.T`` for ``(batch, heads, queries, channels)``."""
        ...

    def value_sums(self, weights: Tensor, rows: Tensor, /) -> Tensor:
        """``weights @ values`` for ``(batch, heads, queries, tokens)``."""
        ...


class PreparedRows(Protocol):
    """Rows of weights, ready to be looked up."""

    def __call__(self, rows: Tensor, dtype: torch.dtype, /) -> Tensor:
        """Integer ``(...)`` → ``(..., in)``, channels in their order.

        Raises:
            IndexError: there is no such row.
        """
        ...


Transform = Callable[[Tensor], Tensor]


class PreparedRotation(Protocol):
    """A rotation in one pass: ``(..., channels)`` → the same, in the type of the inputs.

    Attributes:
        dtypes: of inputs that it takes.
    """

    dtypes: frozenset[torch.dtype]

    def __call__(self, x: Tensor) -> Tensor: ...
