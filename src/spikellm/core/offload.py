"""Which weights stay in memory: tensors that are read from a file lazily can be offloaded again and
are read anew when they are needed.

The model library maps safetensors shards into memory, so a model takes memory as its weights are
looked at. Offloading is advice to the system (Linux: ``MADV_PAGEOUT``, since 5.4) to take out of
memory what has a file behind it; nothing is lost. Where there is no such advice, and for tensors
whose memory torch allocated itself, nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from torch import Tensor, nn

_PAGEOUT = 21
_LEAST = 1 << 16  # bytes of a tensor that are worth the asking


def release(module: nn.Module) -> None:
    """Say that the weights of a module are not needed for a while."""
    for tensor in (*module.parameters(), *module.buffers()):
        offload(tensor)


def offload(tensor: Tensor) -> None:
    """Say that a tensor is not needed for a while."""
    advise = _advice()
    if advise is None or tensor.device.type != "cpu" or tensor.nbytes < _LEAST:
        return
    if tensor.untyped_storage().resizable():
        return  # torch's own memory; a mapped file, and other memory from outside, has a fixed size
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(start, end - start, _PAGEOUT)  # an old system that does not know it says so, no more


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc keeps what was freed in
    small pieces).
    """
    if (
        sys.platform == "linux"
        and (release := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None
    ):
        release(0)


@contextmanager
def released_after_forward(modules: nn.ModuleList) -> Iterator[None]:
    """While this holds, each of the modules is offloaded after its forward pass."""
    handles = [
        module.register_forward_hook(lambda module, *_: release(module)) for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@cache
def _advice() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
