"""Kernels in C11, whose sources lie here; compiled on first use by
:mod:`spikellm.kernels.native.build`.
"""

from spikellm.kernels.native.backend import NativeBackend

__all__ = ["NativeBackend"]
