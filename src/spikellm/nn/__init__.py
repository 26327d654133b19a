"""Spiking modules and what they are made of."""
