"""Which weights stay in memory: tensors that are read from a file lazily can be let go of again,
and are read anew when they are needed.

The model library maps safetensors shards into memory, so a model takes memory as its weights are
looked at. Letting go is advice to the system (Linux: ``MADV_PAGEOUT``, since 5.4) to take out of
memory what has a file behind it; nothing is lost. Where there is no such advice, and for tensors
without a file, nothing happens.
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
_LEAST = 1 << 20  # bytes of a tensor that are worth the asking


def release(module: nn.Module) -> None:
    """Say that the weights of a module are not needed for a while."""
    for tensor in (*module.parameters(), *module.buffers()):
        offload(tensor)


def offload(tensor: Tensor) -> None:
    """Say that a tensor is not needed for a while."""
    advise = _advice()
    if advise is None or tensor.device.type != "cpu":
        return
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, end = (
        -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
        (start + size) // mmap.PAGESIZE * mmap.PAGESIZE,
    )
    if size >= _LEAST and _has_a_file(first):
        advise(
            first, end - first, _PAGEOUT
        )  # advice: an old system that does not know it says so, and that is all


def _has_a_file(address: int) -> bool:
    """Whether the memory at an address is mapped from a file."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            bounds, _, _, _, inode, *_ = line.split(maxsplit=5)
            start, stop = (int(bound, 16) for bound in bounds.split("-"))
            if start <= address < stop:
                return inode != "0"
    return False


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
    """While this holds, each of the modules is let go of after its forward pass."""
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
