"""Spiking modules and what the package knows of model families."""
