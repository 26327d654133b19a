"""Text, activations and the block loop."""
