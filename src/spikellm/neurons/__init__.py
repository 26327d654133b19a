"""Spiking neurons: encoding of currents as spike counts, and their unrolling in time."""

from spikellm.core.registry import import_parts
from spikellm.neurons.base import (
    Drive,
    Recoding,
    SoftResetNeuron,
    Trace,
    TrainForm,
    make_neuron,
    neurons,
    unrolling,
    with_train,
)
from spikellm.neurons.raster import spike_raster

__all__ = [
    "Drive",
    "Recoding",
    "SoftResetNeuron",
    "Trace",
    "TrainForm",
    "make_neuron",
    "neurons",
    "spike_raster",
    "unrolling",
    "with_train",
]

import_parts(__name__, __path__)
