"""Kernels for GPUs, in Triton. It comes with torch on CUDA (else ``pip install 'spikellm[gpu]'``),
and is imported when a layer is first prepared for them.

Modules that begin with ``import triton`` hold kernels; only
:mod:`spikellm.kernels.triton.linear` imports them.
"""

from spikellm.kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
