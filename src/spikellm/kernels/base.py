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
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikellm.core.errors import DependencyError
from spikellm.core.registry import Registry
from spikellm.kernels.prepared import (
    LinearWeights,
    PreparedHeads,
    PreparedLinear,
    PreparedRotation,
    PreparedRows,
    Transform,
)
from spikellm.kernels.spec import HeadSpec, LinearSpec, MixSpec, RowSpec, Spec

REFERENCE = "torch"
"""Name of the backend that runs everything, and that all others must equal."""


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

    def prepare_rotation(self, signs: Tensor, offset: Tensor | None) -> PreparedRotation | None:
        """``mix(x · signs) − offset`` of all channels of a supported rotation in one pass; None
        where that is no faster than one operation after the other.

        Args:
            signs, offset: float32 ``(channels,)``.
        """
        return None

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
            yield backend, reason_against(backend, spec)


def reason_against(backend: Backend, spec: Spec) -> str | None:
    """Why a backend does not run what is described; None if it does, all planes of a layer at once
    or one after the other (:mod:`spikellm.kernels.planes`).
    """
    reason = backend.supports(spec)
    if reason is not None and isinstance(spec, LinearSpec) and spec.planes:
        return backend.supports(spec.of_plane())
    return reason


def describe(device: torch.device | str = "cpu") -> str:
    """The kernels in use on a device, in words.

    Raises:
        DependencyError: those that the user asked for cannot be had.
    """
    wanted, kind = choice(), torch.device(device).type
    problems: list[str] = []
    for backend in in_order():
        there = backend.devices is None or kind in backend.devices
        if there and (wanted in ("auto", backend.name) or backend.name == REFERENCE):
            problem = backend.missing()
            if problem is None:
                return backend.describe() + "".join(f" ({one})" for one in problems)
            if wanted == backend.name:
                raise DependencyError(problem)
            problems.append(problem)
    return REFERENCE


def plain(x: Tensor) -> bool:
    """Whether a kernel may read a tensor's memory: neither a subclass nor watched by a dispatch
    mode, which has to see operators.
    """
    return type(x) is Tensor and not _modes()


_modes: Callable[[], Any] = torch._C._len_torch_dispatch_stack
