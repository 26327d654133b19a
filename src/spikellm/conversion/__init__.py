"""The loop that converts a model block by block."""
