"""Functions that Triton compiles; each module imports ``triton``."""
