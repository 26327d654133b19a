"""Single parts of a block as operations of a native step: norms, linear layers, activation
functions. What a module computes is found by trying, not by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spikellm.kernels.native.linear import NativeAdditive, NativeLinear, coding_of
from spikellm.kernels.native.step_plan import Place, StepProgram
from spikellm.kernels.native.step_run import StepInput, run_step
from spikellm.kernels.native.step_structs import ACTIVATIONS
from spikellm.kernels.native.weight_only import NativeWeightOnly
from spikellm.models.families import is_linear, weight_and_bias
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotated, Rotation
from spikellm.nn.vocabulary import CodedHead

_TOKENS, _CHANNELS = 3, 200
_CLOSE = 2.0**-6  # of the largest value: more than rounding in bfloat16 makes


_Norm = tuple[str, Tensor | None, Tensor | None, float, int]
"""Kind, weight, bias, epsilon, and lanes in which torch sums."""
_T = TypeVar("_T")


class UndescribedError(Exception):
    """What a native step has no operations for, in words."""


def add_norm(program: StepProgram, into: Place, source: Place, norm: nn.Module) -> None:
    """The norm that a module computes, on each head of a place.

    Raises:
        UndescribedError: it is none of the known ones.
    """

    def build(trial: StepProgram, out: Place, x: Place, how: _Norm) -> None:
        trial.norm(out, x, *how)

    how = _nearest(program.dtype, source.size, norm, build, _norms(norm))
    program.norm(into, source, *how)


def _norms(norm: nn.Module) -> list[_Norm]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    names = ("eps", "variance_epsilon", "epsilon")
    epsilon = next((float(getattr(norm, name)) for name in names if hasattr(norm, name)), 1e-5)
    found: list[_Norm] = []
    if isinstance(weight, Tensor) and bias is None:
        own = weight.detach()
        found.append(("rms", own, None, epsilon, 8))
        found.append(("rms_wide", 1.0 + own.float(), None, epsilon, 8))
        found.append(("rms_wide", own, None, epsilon, 8))
    own_bias = bias.detach() if isinstance(bias, Tensor) else None
    own_weight = weight.detach() if isinstance(weight, Tensor) else None
    return [*found, ("layer_norm", own_weight, own_bias, epsilon, 8)]


def activation_of(module: nn.Module, dtype: torch.dtype) -> str:
    """Name of the activation function that a module computes.

    Raises:
        UndescribedError: it is none of the known ones.
    """

    def build(trial: StepProgram, out: Place, x: Place, kind: str) -> None:
        trial.activate(out, x, kind, None)

    return _nearest(dtype, _CHANNELS, module, build, ACTIVATIONS)


def _nearest(
    dtype: torch.dtype,
    size: int,
    module: Callable[[Tensor], Any],
    build: Callable[[StepProgram, Place, Place, _T], None],
    candidates: Sequence[_T],
) -> _T:
    """The candidate whose operation gives what a module gives, to rounding.

    Raises:
        UndescribedError: none does.
    """
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(1, _TOKENS, size, generator=generator)).to(dtype)
    with torch.no_grad():
        wanted = module(x).float()
    errors = []
    for candidate in candidates:
        trial = StepProgram(size, size, dtype)
        build(trial, trial.output, trial.input, candidate)
        found = run_step(trial, StepInput(x.float(), None, [], None, None))[0].float()
        errors.append(float((found - wanted).abs().max()))
    least = min(errors)
    if not least <= _CLOSE * float(wanted.abs().max()):
        raise UndescribedError(f"{type(module).__name__} computes nothing that it knows")
    return candidates[errors.index(least)]


def add_linear(
    program: StepProgram,
    layers: list[nn.Module],
    into: Place,
    source: Place,
    module: nn.Module,
) -> None:
    """A linear layer of any kind; ``layers`` are those whose inputs the program shows, so far.

    Raises:
        UndescribedError: it does not run on native kernels.
    """
    if isinstance(module, Rotated):
        place = add_rotation(program, source, module.rotation)
        add_linear(program, layers, into, place, module.rotated_linear)
        return
    if isinstance(module, SpikingLinear):
        kernel = (module._kernels or module._prepare()).chosen
        before = layers[-1] if layers else None
        if isinstance(kernel, NativeLinear):
            program.linear(into, source, kernel, shared=_alike(program, source, before, kernel))
        elif isinstance(kernel, NativeAdditive):
            program.additive(into, source, kernel, shared=_alike(program, source, before, kernel))
        elif isinstance(kernel, NativeWeightOnly):
            program.weight_only(into, source, kernel, None)
        else:
            raise UndescribedError(f"{module} runs on {type(kernel).__name__}")
    elif isinstance(module, CodedHead):
        kernel = module.table.kernel()
        if not isinstance(kernel, NativeWeightOnly):
            raise UndescribedError(f"{module} runs on {type(kernel).__name__}")
        program.weight_only(into, source, kernel, module.bias)
    elif is_linear(module):
        weight, bias = weight_and_bias(module)
        kept = weight.detach().contiguous()
        program.dense(into, source, kept, None if bias is None else bias.detach())
    else:
        raise UndescribedError(f"{type(module).__name__} is no linear layer that it knows")
    program.last_source = source
    layers.append(module)


def _alike(program: StepProgram, source: Place, before: nn.Module | None, kernel: Any) -> bool:
    """Whether the layer before codes the same input to the same codes at the same places."""
    if program.last_source != source or not isinstance(before, SpikingLinear):
        return False
    other = before._kernels.chosen if before._kernels is not None else None
    for kind in (NativeLinear, NativeAdditive):
        if isinstance(kernel, kind) and isinstance(other, kind):
            return coding_of(kernel.operands[0]) == coding_of(other.operands[0])
    return False


def add_rotation(program: StepProgram, source: Place, rotation: Rotation) -> Place:
    """Where a place stands rotated; the place itself where nothing is."""
    chosen = rotation.signs.nonzero().squeeze(1)
    offset = None if rotation.offset is None else rotation.offset.float().contiguous()
    if len(chosen) == 0 and offset is None:
        return source
    signs = 3 - 2 * rotation.signs[chosen].float()
    key = rotation.signs.numpy().tobytes() + (b"" if offset is None else offset.numpy().tobytes())
    if program.last_rotation == (source, key) and program.last_rotated is not None:
        return program.last_rotated
    place = program.place(f"rotated {source.size * source.heads}", source.size * source.heads)
    some = None if len(chosen) == len(rotation.signs) else chosen
    program.rotate(place, source, signs, some, offset)
    program.last_rotation, program.last_rotated = (source, key), place
    return place
