"""Spiking neurons: encoding of currents as spike counts, and their unrolling in time."""

from spikellm.core.registry import import_parts
from spikellm.neurons.base import (
    Drive,
    SoftResetNeuron,
    Trace,
    make_neuron,
    neurons,
    unrolling,
)
from spikellm.neurons.raster import spike_raster

__all__ = [
    "Drive",
    "SoftResetNeuron",
    "Trace",
    "make_neuron",
    "neurons",
    "spike_raster",
    "unrolling",
]

import_parts(__name__, __path__)
