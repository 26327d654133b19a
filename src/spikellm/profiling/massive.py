"""Tokens that take more steps than others, where a model has such: which ones, in which inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.models.next_token import piecewise_outputs
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import layer_name

_AT_ONCE = 2048  # tokens of a forward pass


class ExtraSteps(NamedTuple):
    """Tokens that take more steps in the input of one layer, or in K or V of an attention module,
    where that is one head's at least.

    Attributes:
        steps: T of such a token.
        calibrated: what share of the calibration text's tokens they were; None of K and V.
        tokens: how many were run.
        found: window and position of each, int64 ``(found, 2)``; of experts, which see some tokens
            alone, -1 and the place among those.
    """

    steps: int
    calibrated: float | None
    tokens: int
    found: Tensor

    @property
    def share(self) -> float:
        """Share of the tokens that were run."""
        return len(self.found) / max(self.tokens, 1)

    @property
    def first(self) -> int:
        """How many of them are the first of their window."""
        return int(((self.found[:, 0] >= 0) & (self.found[:, 1] == 0)).sum())

    def to_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "steps": self.steps,
            "share_at_calibration": self.calibrated,
            "tokens": self.tokens,
            "with_extra_steps": len(self.found),
            "first_of_window": self.first,
        }


class MassiveToken(NamedTuple):
    """One token with extra steps.

    Attributes:
        window, position: where it stands.
        inputs: in how many inputs it takes more steps.
        text: what it says.
    """

    window: int
    position: int
    inputs: int
    text: str = ""


def extra_steps(model: nn.Module, windows: Tensor) -> dict[str, ExtraSteps]:
    """Tokens that take more steps, by layer (``NAME``) or module and part (``NAME.key``); without
    any pass where a model tells no tokens apart.

    Args:
        windows: tokens, ``(windows, tokens)``.
    """
    names = dict(_telling(model))
    if not names:
        return {}
    found: dict[str, ExtraSteps] = {}
    first = 0

    def note(train: SpikeTrain) -> None:
        name = names.get((train.source, train.part))
        if name is None:
            return
        own = _extra_of(train, windows.shape[1], first)
        before = found.get(name)
        if before is not None:
            seen = torch.cat((before.found, own.found))
            own = own._replace(tokens=before.tokens + own.tokens, found=seen)
        found[name] = own

    device = next(model.parameters()).device
    for batch in windows.split(max(1, _AT_ONCE // windows.shape[1])):
        with torch.no_grad(), observe_spikes(note):
            for _ in piecewise_outputs(model, batch.to(device), use_cache=False):
                pass
        first += len(batch)
    return {name: found[name] for name in names.values() if name in found}


def _telling(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], str]]:
    """Module, part and name of all inputs that tell massive tokens apart."""
    for full, module in model.named_modules():
        name = layer_name(full)
        if isinstance(module, SpikingLinear) and module.massive is not None:
            yield (module, "input"), name
        elif isinstance(module, SpikingAttention):
            for part in ("key", "value"):
                threshold = module._buffers.get(f"{part}_threshold")
                if threshold is not None and bool(threshold.isfinite().any()):
                    yield (module, part), f"{full.rpartition('.')[0]}.{part}"


def _extra_of(train: SpikeTrain, length: int, first: int) -> ExtraSteps:
    """Tokens with extra steps of a train.

    Args:
        length: tokens of a window.
        first: number of the first window.
    """
    layer, steps = train.source, train.steps.expand(train.shown.shape)
    if isinstance(layer, SpikingLinear):
        assert layer.massive is not None
        extra = (steps.amin(-1) >= layer.massive.steps).cpu()
        whole, place = len(extra) % length == 0, extra.nonzero().flatten()
        window = place // length + first if whole else torch.full_like(place, -1)
        found = torch.stack((window, place % length if whole else place), 1)
        return ExtraSteps(layer.massive.steps, layer.massive.share, len(extra), found)
    assert isinstance(layer, SpikingAttention)
    most = int(getattr(layer.settings, train.part).token_steps)
    extra = (steps.amin(-1) >= most).any(1).cpu()  # in any head, (windows, tokens)
    found = extra.nonzero() + torch.tensor([first, 0])
    return ExtraSteps(most, None, extra.numel(), found)


def most_massive(found: dict[str, ExtraSteps], most: int) -> list[MassiveToken]:
    """The tokens that take more steps in most inputs."""
    often: Counter[tuple[int, int]] = Counter()
    for extra in found.values():
        often.update((window, place) for window, place in extra.found.tolist() if window >= 0)
    ranked = sorted(often.items(), key=lambda one: (-one[1], one[0]))
    return [MassiveToken(*place, inputs) for place, inputs in ranked[:most]]
