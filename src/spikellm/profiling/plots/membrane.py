"""Membrane potential of single neurons, with the thresholds at which they fire."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikellm.neurons import SoftResetNeuron
from spikellm.neurons.phase import edges, places
from spikellm.profiling.plots.canvas import GRID, INK, MUTED, SERIES

_NEVER = torch.tensor(torch.nan, dtype=torch.float64)


class Course(NamedTuple):
    """One neuron moment after moment, in units of its threshold; all ``(moments,)``.

    Attributes:
        potential: before firing at each moment, float64.
        spikes: what fires then, int64.
        high, low: from where on it fires, upwards and downwards, float64; NaN where it cannot.
    """

    potential: Tensor
    spikes: Tensor
    high: Tensor
    low: Tensor


def membrane_in_moments(
    neuron: SoftResetNeuron, current: Tensor, theta: Tensor, baseline: Tensor, steps: int
) -> Course:
    """One neuron in binary execution, all charge arriving at the start.

    Args:
        current, theta, baseline: scalars.

    Returns:
        ``steps · L`` moments. A step of a GIF neuron is L moments in which a plain
        integrate-and-fire neuron gives off at most one spike each; after its last one it waits for
        the next step.
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
    high = torch.ones(len(potential), dtype=torch.float64)
    return _course(neuron, torch.tensor(potential, dtype=high.dtype), torch.tensor(spikes), high)


def membrane_by_phase(
    neuron: SoftResetNeuron,
    current: Tensor,
    theta: Tensor,
    baseline: Tensor,
    steps: int,
    longest: int | None = None,
) -> Course:
    """The same in phase execution, one moment for each power of two.

    Args:
        longest: steps of the neuron that takes most, whose moments all neurons of a layer have.
    """
    longest = longest or steps
    # a second neuron beside it, of as many steps as any takes, sets the moments
    both = torch.tensor([steps, longest], device=current.device)
    trace = neuron.simulate_phase(current.expand(2), theta, baseline, both)
    found = [
        edges(place, neuron.recoding)
        for place in reversed(range(places(longest * neuron.levels, neuron.recoding)))
    ]
    high = torch.tensor([up for up, _ in found]).double()
    low = torch.tensor([torch.nan if down is None else down for _, down in found]).double()
    potential = trace.charged[:, 0] / theta.double()
    return _course(neuron, potential, trace.spikes[:, 0].long(), high, low)


def _course(
    neuron: SoftResetNeuron, potential: Tensor, spikes: Tensor, high: Tensor, low: Tensor = _NEVER
) -> Course:
    """A course with the thresholds of the positive neuron turned over where it is the negative one
    that is charged.
    """
    low = low.expand(high.shape)
    if neuron.both_signs and bool(potential[0] < 0):
        high, low = -low, -high
    return Course(potential, spikes, high, low)


def draw_membrane(axis: Any, course: Course, title: str, levels: int) -> None:
    """Potential of one neuron with its thresholds; a dot where it fires.

    Args:
        levels: moments of a step; steps are parted by thin lines. 0 for phase execution, which
            knows no steps.
    """
    from matplotlib.ticker import MaxNLocator

    moments = torch.arange(1, len(course.potential) + 1)
    axis.step(
        moments.numpy(),
        course.potential.numpy(),
        where="mid",
        color=SERIES[0],
        linewidth=1.2,
        label="membrane potential",
    )
    words = "threshold"
    for edge in (course.high, course.low):
        if not bool(edge.isnan().all()):
            axis.step(
                moments.numpy(),
                edge.numpy(),
                where="mid",
                color=MUTED,
                linewidth=0.9,
                linestyle="--",
                label=words,
            )
            words = ""  # named once
    for border in range(levels, len(moments), levels) if levels else ():
        axis.axvline(border + 0.5, color=GRID, linewidth=1.2, zorder=0)
    fired = course.spikes != 0
    axis.scatter(
        moments[fired].numpy(),
        course.potential[fired].numpy(),
        s=12,
        color=SERIES[1],
        zorder=3,
        label="spike",
    )
    axis.set_title(title, fontsize=8, loc="left", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
