"""Seeing what happens while a model runs: whoever codes shows its spike trains to an observer, if
there is one; what a module is fed can be caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikellm.neurons.base import SoftResetNeuron


class SpikeTrain(NamedTuple):
    """Spikes of one population of neurons in one forward pass, to be read: tensors are shared with
    other trains.

    Attributes:
        source: module that coded: a spiking linear layer, or the spikes of an attention module.
        part: ``input``, ``query``, ``key``, ``value`` or ``probabilities``.
        shown: merged codes as the kernel gave them, int32 or uint8, ``(tokens, channels)`` of a
            layer in stored order, ``(batch, heads, tokens, channels)`` of attention; of a cached
            key or value all tokens that take part.
        shown_baseline: z of every code as the kernel gave it; broadcasts to codes.
        steps: T of every channel, and where some tokens take more, of every token; broadcasts to
            codes.
        neuron: what fired them.
    """

    source: nn.Module
    part: str
    shown: Tensor
    shown_baseline: Tensor
    steps: Tensor
    neuron: SoftResetNeuron

    @property
    def codes(self) -> Tensor:
        """Merged codes, int32."""
        return self.shown.to(torch.int32)

    @property
    def baseline(self) -> Tensor:
        """z of every code, int32; broadcasts to :attr:`codes`."""
        return self.shown_baseline.to(torch.int32)

    @property
    def fired(self) -> Tensor:
        """Spikes less negative spikes of every code, int32, see
        :meth:`spikellm.neurons.SoftResetNeuron.fired`.
        """
        return self.neuron.fired(self.codes, self.baseline)


_observer: ContextVar[Callable[[SpikeTrain], None] | None] = ContextVar(
    "spikellm_spike_observer", default=None
)


@contextmanager
def observe_spikes(observer: Callable[[SpikeTrain], None]) -> Iterator[None]:
    """While this holds, every spike train is shown to ``observer``."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def spike_observer() -> Callable[[SpikeTrain], None] | None:
    """Who wants to see spikes now."""
    return _observer.get()


class _Stop(Exception):  # noqa: N818  a signal, not an error
    """Ends a pass once the wanted input has been seen."""


@contextmanager
def replaced_forward(
    modules: Iterable[nn.Module], make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While this holds, modules run what ``make`` gives of their own forward pass."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in before:
        module.forward = make(module.forward)
    try:
        yield
    finally:
        for module, own in before:
            del module.forward
            if own is not None:  # it was set on the module itself, by hooks for example
                module.forward = own


def first_input(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What a module is fed first while ``run`` runs; what comes behind it is not run."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else keywords["hidden_states"])
        raise _Stop

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    _run_until_stopped(run, handle)
    return seen[0]


def first_output(module: nn.Module, run: Callable[[], object]) -> Any:
    """What a module gives first while ``run`` runs, None if it is not run; what comes behind it is
    not run.
    """
    seen: list[Any] = []

    def stop(module: nn.Module, arguments: object, output: Any) -> None:
        seen.append(output)
        raise _Stop

    _run_until_stopped(run, module.register_forward_hook(stop))
    return seen[0] if seen else None


def _run_until_stopped(run: Callable[[], object], handle: RemovableHandle) -> None:
    try:
        run()
    except _Stop:
        pass
    finally:
        handle.remove()
