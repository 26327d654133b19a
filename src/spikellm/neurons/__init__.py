"""Spiking neurons: encoding of currents as spike counts, and their unrolling in time."""

from spikellm.core.registry import import_parts
from spikellm.neurons.base import (
    Drive,
    Recoding,
    SoftResetNeuron,
    SpikeForm,
    Trace,
    TrainForm,
    make_neuron,
    neurons,
    price_misfit,
    unrolling,
    with_price,
    with_train,
)
from spikellm.neurons.raster import spike_raster

__all__ = [
    "Drive",
    "Recoding",
    "SoftResetNeuron",
    "SpikeForm",
    "Trace",
    "TrainForm",
    "make_neuron",
    "neurons",
    "price_misfit",
    "spike_raster",
    "unrolling",
    "with_price",
    "with_train",
]

import_parts(__name__, __path__)
