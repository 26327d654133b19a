"""Measuring accuracy."""
