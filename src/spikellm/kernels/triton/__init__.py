"""Kernels for GPUs, in Triton. It comes with torch on CUDA (else ``pip install 'spikellm[gpu]'``),
and is imported when a layer is first prepared for them.

What Triton compiles lies in :mod:`spikellm.kernels.triton.jit`; the modules here launch it.
"""

from spikellm.kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
