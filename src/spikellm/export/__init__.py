"""Converted layers for other tools."""
