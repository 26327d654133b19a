"""Spiking neurons: how a current becomes an integer number of spikes, and how that number unrolls in time."""

from spikellm.neurons import gif as _gif
from spikellm.neurons import integrate_fire as _integrate_fire
from spikellm.neurons import ternary as _ternary
from spikellm.neurons.base import Drive, Neuron, SoftResetNeuron, Trace, make_neuron, neurons
from spikellm.neurons.raster import spike_raster

__all__ = ["Drive", "Neuron", "SoftResetNeuron", "Trace", "make_neuron", "neurons", "spike_raster"]
