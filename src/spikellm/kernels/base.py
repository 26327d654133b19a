"""What a kernel backend is, and which one runs what.

A layer describes itself as plain data (:class:`LinearSpec`, :class:`HeadSpec`, :class:`MixSpec`,
:class:`RowSpec`); :func:`select` walks the list of backends once and gives the first that has no
reason against the description. What a backend prepares belongs to whoever asked for it and is
called without any further lookup.

``SPIKELLM_KERNELS`` is read when kernels are chosen: ``auto`` (the default) takes the best backend
that works here, a backend's name makes its absence an error (what it does not support still runs
in torch), ``torch`` leaves all others off.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from spikellm.core.errors import DependencyError
from spikellm.core.registry import Registry
from spikellm.kernels.spec import HeadSpec, LinearSpec, MixSpec, RowSpec, Spec

REFERENCE = "torch"
"""Name of the backend that runs everything, and that all others must equal."""


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

    def dense_weight(self) -> Tensor:
        """Float32 ``(out, in)``, columns in their original order."""
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


class Backend(ABC):
    """Kernels of one kind. What :meth:`supports` never accepts needs no method that prepares it.

    Attributes:
        name: in the registry and in ``SPIKELLM_KERNELS``.
        preference: backends are asked in falling order.
        devices: types of device it runs on; None for every one.
    """

    name: ClassVar[str]
    preference: ClassVar[int]
    devices: ClassVar[frozenset[str] | None] = None

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine at all; None if it can."""
        return None

    @abstractmethod
    def supports(self, spec: Spec) -> str | None:
        """The reason why it does not run what is described, in words; None if it does."""

    @abstractmethod
    def prepare_linear(self, spec: LinearSpec, weights: LinearWeights) -> PreparedLinear:
        """A layer that is supported, ready to run."""

    def prepare_heads(self, spec: HeadSpec) -> PreparedHeads:
        """A coder of heads that is supported, ready to run."""
        raise self._unprepared("prepare_heads", spec)

    def prepare_rows(self, spec: RowSpec, weights: LinearWeights) -> PreparedRows:
        """Rows that are supported, ready to be looked up."""
        raise self._unprepared("prepare_rows", spec)

    def prepare_mix(self, spec: MixSpec) -> Transform:
        """:func:`spikellm.quantization.hadamard.mix`, ready to run."""
        raise self._unprepared("prepare_mix", spec)

    def _unprepared(self, method: str, spec: Spec) -> DependencyError:
        return DependencyError(
            f"kernel backend {self.name!r} supports {type(spec).__name__} and has no {method}; let"
            f" supports() give a reason, or leave it out with SPIKELLM_KERNELS={REFERENCE}"
        )

    def describe(self) -> str:
        """The backend in words."""
        return self.name


backends: Registry[Backend] = Registry("kernels")


def register(backend: type[Backend]) -> type[Backend]:
    """Decorator that enters a backend under its name."""
    backends.register(backend.name)(backend())
    return backend


def in_order() -> list[Backend]:
    """Backends in the order in which they are asked."""
    return sorted((backends[name] for name in backends.names()), key=lambda b: -b.preference)


def choice() -> str:
    """What the user asked for.

    Raises:
        DependencyError: ``SPIKELLM_KERNELS`` is something else.
    """
    found, valid = os.environ.get("SPIKELLM_KERNELS") or "auto", ["auto", *backends.names()]
    if found not in valid:
        raise DependencyError(
            f"SPIKELLM_KERNELS is {found!r}; expected auto, or a name: {backends.unknown(found)}"
        )
    return found


def select(spec: Spec, device: torch.device | str) -> Backend:
    """The first backend that runs what is described on a device.

    Raises:
        DependencyError: the backend that the user asked for does not work on this machine.
    """
    for backend, reason in _asked(spec, device):
        if reason is None:
            return backend
    raise DependencyError(f"no kernel backend runs {spec}; the reference {REFERENCE} should")


def reasons(spec: Spec, device: torch.device | str) -> dict[str, str | None]:
    """Why each backend does not run what is described; None of one that could.

    Raises:
        DependencyError: see :func:`choice`.
    """
    return {backend.name: reason for backend, reason in _asked(spec, device, strict=False)}


def _asked(
    spec: Spec, device: torch.device | str, *, strict: bool = True
) -> Iterator[tuple[Backend, str | None]]:
    wanted, kind = choice(), torch.device(device).type
    for backend in in_order():
        if wanted not in ("auto", backend.name) and backend.name != REFERENCE:
            yield backend, f"SPIKELLM_KERNELS is {wanted}"
        elif backend.devices is not None and kind not in backend.devices:
            yield backend, f"it runs on {', '.join(sorted(backend.devices))}, not on {kind}"
        elif (problem := backend.missing()) is not None:
            if strict and wanted == backend.name:
                raise DependencyError(problem)
            yield backend, problem
        else:
            yield backend, backend.supports(spec)


def describe() -> str:
    """The kernels in use on the CPU, in words.

    Raises:
        DependencyError: those that the user asked for cannot be had.
    """
    wanted = choice()
    problems: list[str] = []
    for backend in in_order():
        if wanted in ("auto", backend.name) or backend.name == REFERENCE:
            problem = backend.missing()
            if problem is None:
                return backend.describe() + "".join(f" ({one})" for one in problems)
            if wanted == backend.name:
                raise DependencyError(problem)
            if backend.devices is None or "cpu" in backend.devices:
                problems.append(problem)
    return REFERENCE


def plain(x: Tensor) -> bool:
    """Whether a kernel may read a tensor's memory: neither a subclass nor watched by a dispatch
    mode, which has to see operators.
    """
    return type(x) is Tensor and not _modes()


_modes: Callable[[], Any] = torch._C._len_torch_dispatch_stack
