"""Saving and loading converted models."""
