"""Rotations that run with the model: the inputs of a linear layer are spread over each other before
they are coded (QuaRot's online Hadamard transform).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikellm.kernels.base import plain, select
from spikellm.kernels.prepared import PreparedRotation, Transform
from spikellm.kernels.spec import MixSpec
from spikellm.nn.prepared import PreparedModule
from spikellm.quantization import hadamard

ROTATION, LINEAR = (
    "rotation",
    "rotated_linear",
)  # names of a wrapper's parts; no family has such a child


class _Plan(NamedTuple):
    """Channels that are rotated (None: all), their signs, what rotates them, what does all in one
    pass where there is such, and all signs as bytes: equal rotations have equal ones.
    """

    channels: Tensor | None
    signs: Tensor
    mix: Transform
    whole: PreparedRotation | None
    key: bytes


class _Shared(NamedTuple):
    """What an input was rotated to, by which rotation, and the version of the input then."""

    key: bytes
    version: int
    rotated: Tensor


_SHARED = "_spikellm_rotated"  # an attribute of the input, which lives and dies with it


class Rotation(PreparedModule):
    """Signs, then :func:`spikellm.quantization.hadamard.mix`, among some channels.

    The others pass as they are.

    Persistent state: ``signs``, uint8 ``(channels,)``: 0 for a channel that is left alone, 1 for
    the sign +1, 2 for −1; where it is centered ``offset``, float32 ``(channels,)``, which is taken
    away from what was rotated.
    """

    signs: Tensor
    offset: Tensor | None
    prepared = ("_plan",)
    _plan: _Plan | None

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        *,
        centered: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("signs", torch.zeros(channels, dtype=torch.uint8, device=device))
        none = torch.zeros(channels, dtype=torch.float32, device=device)
        self.register_buffer("offset", none if centered else None)

    @classmethod
    def of(cls, signs: Tensor) -> Rotation:
        """A rotation with these signs, as the buffer holds them."""
        made = cls(len(signs), signs.device)
        made.set_signs(signs)
        return made

    @property
    def rotated(self) -> int:
        """Channels that are rotated."""
        return int((self.signs > 0).sum())

    def set_signs(self, signs: Tensor, offset: Tensor | None = None) -> None:
        """Set which channels are rotated, and their signs, as the buffer holds them; and what is
        taken away from what was rotated, if anything.
        """
        self.signs.copy_(signs)
        self.offset = None if offset is None else offset.float().to(self.signs.device)
        self.forget()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channels)`` rotated; computed in float32, or in float64 if ``x`` is.

        The very same tensor where nothing is. Layers that read one tensor behind equal rotations
        get one tensor, which is computed once.
        """
        if self._plan is None or self.written():
            self.forget()
            self._plan = self._prepared()
        channels, signs, mix, whole, key = self._plan
        if len(signs) == 0 and self.offset is None:
            return x
        shares = not (torch.compiler.is_compiling() or x.is_inference())
        last: _Shared | None = getattr(x, _SHARED, None) if shares else None
        if last is not None and last.key == key and last.version == x._version:
            return last.rotated
        differentiates = x.requires_grad and torch.is_grad_enabled()
        if whole is not None and not differentiates and plain(x) and x.dtype in whole.dtypes:
            rotated = whole(x)
        else:
            wide = x if x.dtype == torch.float64 else x.float()
            rotated = wide
            if len(signs) > 0:
                part = mix((wide if channels is None else wide.index_select(-1, channels)) * signs)
                rotated = part if channels is None else wide.index_copy(-1, channels, part)
            if self.offset is not None:
                rotated = rotated - self.offset
            rotated = rotated.to(x.dtype)
        if shares:
            setattr(x, _SHARED, _Shared(key, x._version, rotated))
        return rotated

    def _prepared(self) -> _Plan:
        chosen, device = self.signs.nonzero().squeeze(1), self.signs.device
        signs, whole = 3 - 2 * self.signs[chosen].float(), None
        if 0 < len(chosen) == len(self.signs):
            backend = select(MixSpec(len(chosen)), device)
            whole = backend.prepare_rotation(signs, self.offset)
        return _Plan(
            None if len(chosen) == len(self.signs) else chosen,
            signs,
            prepare_mix(len(chosen), device),
            whole,
            _bytes(self.signs) + (b"" if self.offset is None else _bytes(self.offset)),
        )

    def extra_repr(self) -> str:
        centered = "" if self.offset is None else ", centered"
        return f"{self.rotated} of {len(self.signs)} channels{centered}"


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().numpy().tobytes()


class Rotated(nn.Module):
    """A linear layer behind a rotation of its inputs."""

    def __init__(self, rotation: Rotation, linear: nn.Module) -> None:
        super().__init__()
        self.rotation, self.rotated_linear = rotation, linear

    @property
    def in_features(self) -> int:
        """Channels of the inputs."""
        return cast(int, self.rotated_linear.in_features)

    @property
    def out_features(self) -> int:
        """Channels of the outputs."""
        return cast(int, self.rotated_linear.out_features)

    @property
    def qweight(self) -> Tensor:
        """See ``SpikingLinear.qweight``; of a layer that is not converted, its weight."""
        inner = self.rotated_linear
        return cast(Tensor, inner.qweight if hasattr(inner, "qweight") else inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` → ``(..., out)``."""
        found: Tensor = self.rotated_linear(self.rotation(x))
        return found


def prepare_mix(channels: int, device: torch.device) -> Transform:
    """:func:`spikellm.quantization.hadamard.mix` by the kernels for a device: the same bits.

    The reference runs where a gradient is asked for or the model is being compiled.
    """
    if channels == 0:
        return hadamard.mix
    spec = MixSpec(channels)
    chosen = select(spec, device).prepare_mix(spec)

    def mix(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return hadamard.mix(x)
        if x.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Mix.apply(x, chosen))  # type: ignore[no-untyped-call]
        return chosen(x)

    return mix


class _Mix(torch.autograd.Function):
    """A rotation, with the inverse one for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Transform) -> Tensor:
        ctx.run = run
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return hadamard.unmix(gradient, ctx.run), None


def layer_name(name: str) -> str:
    """The name that a linear layer has in its family, whether or not a rotation stands before it:
    what recipes match.
    """
    return name.removesuffix(f".{LINEAR}")


def rotation_of(name: str) -> str:
    """Full name of the rotation before a linear layer with this full name."""
    return f"{layer_name(name)}.{ROTATION}"


def rotations(root: nn.Module) -> dict[str, Rotation]:
    """Rotations of a model by full name."""
    return {name: module for name, module in root.named_modules() if isinstance(module, Rotation)}
