"""The reference in torch."""
