"""Rotations fused into weights (QuaRot, SpinQuant): the function stays, outlier channels are spread
over all.

    residual stream   every embedding and writer gives x R, every reader takes x R: W' =
        W·diag(g)·R; gains g of norms are folded into their readers first
    value → output    V rows · R_h, O columns · R_h, one rotation R_h for all heads
    up → down         no rotation fits between them, but a scale does: up rows / s, down columns · s

R is ``S D S`` (:func:`spikellm.quantization.hadamard.turn`): symmetric, its own inverse, and it
leaves the constant vector alone, so that LayerNorm commutes with it as RMSNorm does and no mean has
to be folded. What reads and writes the stream is found by watching a block run
(:func:`readers_of_norms`), and what was fused is compared with the original by the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core.errors import UnsupportedModelError
from spikellm.models.families import is_linear, weight_and_bias
from spikellm.models.swap import replace_module, with_parameters
from spikellm.nn.hooks import first_input

Turn = Callable[[Tensor], Tensor]
"""A linear map of the last axis."""
Forward = Callable[[nn.Module, Tensor], Tensor]
"""``forward(block, hidden)`` runs a block."""

OFFSETS = (0.0, 1.0)  # norms act as w, or as 1 + w
TOLERANCE = 1e-2
"""How far a channel may be from what it was (:func:`difference`): float32 sums in another order
stay below, also beside channels a thousand times as large.
"""


class Fusion:
    """New values of the linear layers and vectors of a module, float64, into which transforms are
    fused one after the other.

    Attributes:
        weights, biases: of linear layers, by name: ``(out, in)`` and ``(out,)``.
        vectors: of other modules (norms), by name of the parameter.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """Weight of a linear layer as it is now."""
        if name not in self.weights:
            weight, _ = weight_and_bias(self._root.get_submodule(name))
            self.weights[name] = weight.detach().double()
            self.bias(name)
        return self.weights[name]

    def bias(self, name: str) -> Tensor | None:
        """Bias of a linear layer as it is now; the layer may have got its first one, from a
        transform that was put into the block at once, after its weight was read.
        """
        if name not in self.biases:
            _, bias = weight_and_bias(self._root.get_submodule(name))
            if bias is not None:
                self.biases[name] = bias.detach().double()
        return self.biases.get(name)

    def columns(self, name: str, change: Turn) -> None:
        """Change a layer along its inputs."""
        self.weights[name] = change(self.weight(name))

    def rows(self, name: str, change: Turn) -> None:
        """Change a layer along its outputs, bias included."""
        self.weights[name] = change(self.weight(name).T).T
        if (bias := self.bias(name)) is not None:
            self.biases[name] = change(bias)

    def shift(self, name: str, added: Tensor) -> None:
        """Add to a layer's bias; one that has none gets it."""
        self.weight(name)
        bias = self.bias(name)
        self.biases[name] = added if bias is None else bias + added

    def fold_norm(self, norm: str, readers: tuple[str, ...], offset: float, turn: Turn) -> None:
        """Let a norm work on a rotated stream, and its readers on what it then gives: its gain
        moves into them, its bias too, or stays if one of them has none to take it.

        Args:
            offset: as in :class:`spikellm.transforms.smoothing.Scaling`.

        Raises:
            UnsupportedModelError: the bias can neither move nor stay.
        """
        parameters = {
            name: value.detach().double()
            for name, value in self._root.get_submodule(norm).named_parameters(recurse=False)
        }
        gain: Tensor | float = 1.0
        shift = parameters.get("bias")
        if "weight" in parameters:
            gain = parameters["weight"] + offset
            self.vectors[f"{norm}.weight"] = torch.full_like(gain, 1 - offset)
        moves = shift is not None and all(
            weight_and_bias(self._root.get_submodule(name))[1] is not None for name in readers
        )
        for name in readers:
            weight = self.weight(name)
            if shift is not None and moves:
                self.biases[name] = self.biases[name] + weight @ shift
            self.weights[name] = turn(weight * gain)
        if shift is None:
            return
        stays = torch.zeros_like(shift) if moves else torch.where(shift == 0, 0.0, shift / gain)
        if not bool(torch.isfinite(stays).all()):
            raise UnsupportedModelError(
                f"{norm} adds a bias where its gain is 0, and a layer behind it has no bias to take"
                " that, so the residual stream cannot be rotated; leave residual-rotation out of"
                " the recipe"
            )
        self.vectors[f"{norm}.bias"] = turn(stays)

    def linear(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        """A new linear layer of the kind of the old one, with the new values."""
        old = self._root.get_submodule(name)
        own = dtype or weight_and_bias(old)[0].dtype
        weight = self.weight(name).to(own)
        values = {
            "weight": weight.contiguous() if type(old) is nn.Linear else weight.T.contiguous()
        }
        if (bias := self.bias(name)) is not None:
            values["bias"] = bias.to(own)
        return with_parameters(old, values)

    def put(self, root: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
        """Put the new layers in the place of the old ones, and the new vectors into theirs: in the
        module itself, or in a copy of it.
        """
        root = self._root if root is None else root
        for name in self.weights:
            replace_module(root, name, self.linear(name, dtype))
        for name, value in self.vectors.items():
            root.get_parameter(name).data.copy_(value)


class Probe(NamedTuple):
    """What a block is compared on.

    Attributes:
        hidden: states in front of it, in the stream after the change.
        forward: runs a block.
        back: from that stream to the one before the change.
    """

    hidden: Tensor
    forward: Forward
    back: Turn = lambda x: x


def difference(
    block: nn.Module,
    fusion: Fusion,
    probe: Probe,
    *,
    around: nn.Module | None = None,
    at: str | None = None,
) -> float:
    """How far a block with fused transforms is from the block as it was, in float32 (or wider): the
    channel where it is furthest, relative to the largest value there.

    Channel by channel, since one that is very large would hide what is wrong with the others.

    Args:
        around: the block with its new surroundings, if those changed too.
        at: compare what this layer is fed, instead of what the block adds to the stream.
    """
    wide = torch.promote_types(torch.float32, probe.hidden.dtype)
    hidden = probe.hidden.to(wide)
    before = copy.deepcopy(block).to(wide)
    after = copy.deepcopy(block if around is None else around).to(wide)
    fusion.put(after, wide)
    if at is not None:
        expected, found = (
            first_input(module.get_submodule(at), partial(probe.forward, module, states)).to(wide)
            for module, states in ((before, probe.back(hidden)), (after, hidden))
        )
    else:
        expected = probe.forward(before, probe.back(hidden))
        found = probe.back(probe.forward(after, hidden))
        skipped = probe.back(hidden)
        expected, found = (states - skipped.to(states.device) for states in (expected, found))
    sizes, errors = (values.abs().flatten(0, -2).amax(0) for values in (expected, found - expected))
    return float((errors / sizes.clamp(min=1e-3 * float(sizes.median()) + 1e-20)).max())


def readers_of_norms(
    root: nn.Module, run: Callable[[], object], width: int
) -> dict[str, tuple[str, ...]]:
    """Norms over ``width`` channels, with a gain or without, and the linear layers that read what
    they give, found by watching ``run``; norms that no linear layer reads have none.
    """
    given: dict[int, str] = {}
    readers: dict[str, list[str]] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def gives(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            kept.append(output)
            given[output.data_ptr()] = name

        return hook

    def reads(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            norm = given.get(arguments[0].data_ptr())
            if norm is not None and arguments[0].shape[-1] == width:
                readers[norm].append(name)

        return hook

    handles = []
    for name, module in root.named_modules():
        own = module._parameters.get("weight")
        if is_linear(module):
            handles.append(module.register_forward_pre_hook(reads(name)))
        elif not module._modules and (
            own.shape == (width,) if own is not None else type(module).__name__.endswith("Norm")
        ):
            readers[name] = []
            handles.append(module.register_forward_hook(gives(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {norm: tuple(names) for norm, names in readers.items()}


def rotate_stream(
    fusion: Fusion,
    norms: Mapping[str, tuple[str, ...]],
    writers: tuple[str, ...],
    turn: Turn,
    offset: float,
) -> None:
    """Let the readers and writers of a block work on a rotated stream."""
    for norm, readers in norms.items():
        fusion.fold_norm(norm, readers, offset, turn)
    for name in writers:
        fusion.rows(name, turn)


def by_head(turn: Turn, channels: int) -> Turn:
    """A map of each head's channels, for heads side by side."""
    return lambda x: turn(x.unflatten(-1, (-1, channels))).flatten(-2)
