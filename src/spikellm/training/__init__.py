"""Training after conversion, with the spikes in the loop."""
