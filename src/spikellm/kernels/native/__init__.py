"""Sources of the native kernels, in C11.

Compiled on first use by :mod:`spikellm.kernels.native.build`.
"""
