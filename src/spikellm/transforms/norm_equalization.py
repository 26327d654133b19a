"""Scales between a norm and the layers that read it, fused into the norm's gain:

    gain / s,  W · s        s⁴ = E[x²] / Σ‖W‖²

(:func:`spikellm.transforms.equalization.even_scale`), x what the norm gives, its gain included.
What is rotated behind the norm then shares one range in which no channel is louder than its weights
deserve. Unlike a rotated residual stream this needs nothing of what lies between blocks: embeddings
stay tied, and norms may stand anywhere.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from spikellm.models.families import INPUT_SITES
from spikellm.transforms.base import Transform, transforms
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.equalization import even_scale
from spikellm.transforms.fusion import OFFSETS, Fusion, readers_of_norms
from spikellm.transforms.options import NormEqualizationOptions

_SITES = ("attention-input", "feedforward-input")


@transforms.register("norm-equalization")
class NormEqualization(Transform[NormEqualizationOptions]):
    """Of every norm whose readers are all known; a block that lets no scale through says so."""

    Options = NormEqualizationOptions

    def observes(self, state: BlockState) -> Collection[str]:
        return [role for site in _SITES for role in INPUT_SITES[site] if role in state.roles]

    def in_words(self) -> str:
        return "gains of norms equalized with the layers that read them (fused)"

    def prepare_block(self, state: BlockState) -> None:
        width = state.hidden.shape[-1]
        seen = readers_of_norms(
            state.module, lambda: state.forward(state.module, state.hidden), width
        )
        if not any(seen.values()):
            state.notes.append("norm-equalization: no linear layer of this block reads a norm")
        for norm, readers in seen.items():
            if readers and not _equalize(state, norm, readers):
                state.notes.append(
                    f"norm-equalization: {norm} lets no scale through to the layers behind it, so"
                    " its gain stays as it is"
                )


def _equalize(state: BlockState, norm: str, readers: tuple[str, ...]) -> bool:
    """Scale one norm and its readers, at once; whether they let the scale through."""
    parameters = dict(state.module.get_submodule(norm).named_parameters(recurse=False))
    roles = [role for role in state.inputs if state.roles.get(role) in readers]
    if "weight" not in parameters or not roles:
        return False
    fusions = [Fusion(state.module) for _ in OFFSETS]
    energy = torch.stack([fusions[0].weight(name).square().sum(0) for name in readers]).sum(0)
    scale = even_scale(state.power(roles[0]), energy)
    for fusion, offset in zip(fusions, OFFSETS, strict=True):
        for name in readers:
            fusion.columns(name, lambda x: x * scale)
        gain = parameters["weight"].detach().double() + offset
        fusion.vectors[f"{norm}.weight"] = gain / scale - offset
        if "bias" in parameters:
            fusion.vectors[f"{norm}.bias"] = parameters["bias"].detach().double() / scale
        if state.put_if_equal(fusion):
            for role in roles:
                state.inputs[role] = state.inputs[role] / scale
            return True
    return False
