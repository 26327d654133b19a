"""Running converted models."""
