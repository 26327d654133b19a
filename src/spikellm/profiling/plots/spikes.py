"""Spikes to look at: rasters, and the membrane potential of single neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikellm.neurons import SoftResetNeuron
from spikellm.profiling.plots.canvas import GRID, INK, MUTED, SERIES, label


def draw_raster(axis: Any, planes: Tensor, salient: Tensor | None = None) -> None:
    """Binary spikes over time.

    Args:
        planes: {−1, 0, 1}, ``(moments, channels)``.
        salient: bool ``(channels,)``: channels with more steps, or a range of their own, drawn in
            another colour.
    """
    moments, channels = planes.shape
    salient = torch.zeros(channels, dtype=torch.bool) if salient is None else salient
    kinds = [
        ("a channel", ~salient, 1, SERIES[0]),
        ("a salient channel", salient, 1, SERIES[1]),
        ("negative", torch.ones_like(salient), -1, SERIES[2]),
    ]
    for words, members, sign, color in kinds:
        time, channel = ((planes == sign) & members).nonzero().unbind(1)
        if len(time):
            axis.scatter(
                channel.numpy(),
                time.numpy() + 1,
                marker="|",
                s=9,
                linewidths=0.8,
                color=color,
                label=words,
            )
    axis.set_xlim(-1, channels)
    axis.set_ylim(moments + 0.7, 0.3)
    axis.grid(visible=False)
    label(axis, "channel", "moment")


def membrane_in_moments(
    neuron: SoftResetNeuron, current: Tensor, theta: Tensor, baseline: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Membrane potential of one neuron in units of its threshold, moment after moment of binary
    execution, all charge arriving at the start.

    Args:
        current, theta, baseline: scalars.

    Returns:
        ``(potential, spikes)``: before firing at each moment, float64, and what fires then, int64;
        ``(steps · L,)``. A step of a GIF neuron is L moments in which a plain integrate-and-fire
        neuron gives off at most one spike each; after its last one it waits for the next step.
    """
    trace = neuron.simulate(current, theta, baseline, steps)
    potential, spikes = [], []
    for charged, fired in zip(
        (trace.charged / theta.double()).tolist(), trace.spikes.tolist(), strict=True
    ):
        for moment in range(neuron.levels):
            given = min(moment, abs(fired))
            potential.append(charged - given * (1 if fired >= 0 else -1))
            spikes.append((1 if fired > 0 else -1) if moment < abs(fired) else 0)
    return torch.tensor(potential, dtype=torch.float64), torch.tensor(spikes)


def membrane_by_phase(
    neuron: SoftResetNeuron, current: Tensor, theta: Tensor, baseline: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The same for phase execution, one moment for each power of two."""
    trace = neuron.simulate_phase(current, theta, baseline, steps)
    return trace.charged / theta.double(), trace.spikes


def draw_membrane(axis: Any, potential: Tensor, spikes: Tensor, title: str, levels: int) -> None:
    """Potential of one neuron with its threshold; a dot where it fires.

    Args:
        potential, spikes: see :func:`membrane_in_moments`.
        levels: moments of a step; steps are parted by thin lines. 0 for phase execution, in which
            the threshold halves from moment to moment.
    """
    moments = torch.arange(1, len(potential) + 1)
    axis.step(
        moments.numpy(),
        potential.numpy(),
        where="mid",
        color=SERIES[0],
        linewidth=1.2,
        label="membrane potential",
    )
    threshold = torch.ones(len(potential)) if levels else 2.0 ** (len(potential) - moments)
    drawn: dict[str, Any] = {"where": "mid", "color": MUTED, "linewidth": 0.9, "linestyle": "--"}
    axis.step(moments.numpy(), threshold.numpy(), label="threshold", **drawn)
    if bool((spikes < 0).any()):
        axis.step(moments.numpy(), -threshold.numpy(), **drawn)
    for border in range(levels, len(potential), levels) if levels else ():
        axis.axvline(border + 0.5, color=GRID, linewidth=1.2, zorder=0)
    fired = spikes != 0
    axis.scatter(
        moments[fired].numpy(),
        potential[fired].numpy(),
        s=12,
        color=SERIES[1],
        zorder=3,
        label="spike",
    )
    axis.set_title(title, fontsize=8, loc="left", color=INK)
    axis.set_xlim(0.3, len(potential) + 0.7)
