"""Attention of a block for a native step: how it is scaled, and how Q, K and V are coded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.kernels.native.backend import NativeHeads
from spikellm.kernels.native.step_plan import Place, StepProgram, mix_signs
from spikellm.kernels.native.step_structs import Attention
from spikellm.models.attention_interface import CHILD
from spikellm.models.decoder_capture import AttentionCall
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.massive_heads import MassiveHeadCoder
from spikellm.runtime.decoder_step.parts import UndescribedError


class Heads(NamedTuple):
    """Where heads of Q, K and V stand, and the sliding window that they see; 0 for none."""

    query: Place
    key: Place
    value: Place
    window: int


def attention_of(
    program: StepProgram, module: nn.Module, call: AttentionCall, heads: Heads
) -> Attention:
    """Attention of a module as it was called.

    Raises:
        UndescribedError: part of it is not known.
    """
    if call.sinks:
        raise UndescribedError("its attention has sinks or a position bias")
    made = Attention(
        heads=heads.query.heads,
        kv_heads=heads.key.heads,
        key_size=heads.key.size,
        value_size=heads.value.size,
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        window=heads.window,
        value=heads.value.view,
        scaling=call.scaling,
        softcap=call.softcap,
    )
    spikes = getattr(module, CHILD, None)
    if spikes is not None:
        _Coding(program, made).add(spikes)
    return made


class _Coding:
    """How an attention module codes, on its way into an :class:`Attention`."""

    def __init__(self, program: StepProgram, made: Attention) -> None:
        self.program, self.made = program, made

    def add(self, spikes: SpikingAttention) -> None:
        """Coders, centers, maps and rotations."""
        settings, made = spikes.settings, self.made
        if not spikes.caches:
            raise UndescribedError("keys and values are not both cached as spikes")
        if settings.probabilities.spiking:
            raise UndescribedError("probabilities of its attention are coded")
        coders = {"key": spikes.key_coder(), "value": spikes.value_coder()}
        if settings.query.spiking:
            coders["query"] = spikes.query_coder()
        for name, coder in coders.items():
            kernel = coder.chosen()
            if not isinstance(kernel, NativeHeads):
                raise UndescribedError(f"{name} of its attention runs on {type(kernel).__name__}")
            if isinstance(coder, MassiveHeadCoder):
                raise UndescribedError(f"massive tokens of {name} take more steps")
            self._point(f"{name}_plan", kernel.plan)
        if settings.center:
            made.centered = 1
            self._point("mean", spikes.key_mean)
            self._point("center", spikes.turned_mean())
        if settings.balance:
            made.balanced = 1
            for name, maps in zip(("key_map", "query_map"), spikes.maps(), strict=True):
                self._point(name, torch.stack([one[:, 0] for one in maps], 1))
        if settings.rotate:
            made.rotated = 1
            self._point("signs", mix_signs(made.key_size))

    def _point(self, name: str, tensor: Tensor) -> None:
        kept = tensor.detach().contiguous()
        self.program.keep(kept)
        setattr(self.made, name, kept.data_ptr())
