"""One conversion on several processes (``torchrun``): each runs its share of the calibration text,
sums are reduced, samples gathered, and layers assigned to ranks.

Without ``torch.distributed`` there is one rank, and every function returns its argument. Ranks
exchange tensors, never pickled objects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from spikellm.core.errors import RequestError, SpikeLLMError

_START = "start ranks with torchrun, which sets it, or unset WORLD_SIZE for one process"


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the rank that writes files and prints."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks if ``torchrun`` started several.

    Raises:
        RequestError: ranks cannot be joined here, or the environment does not say where they are.
    """
    processes = _number("WORLD_SIZE", 1) if os.environ.get("WORLD_SIZE") else 1
    if processes < 2 or (dist.is_available() and dist.is_initialized()):
        yield
        return
    if not dist.is_available():
        raise RequestError("this torch has no torch.distributed; run one process")
    _number("RANK", 0, processes - 1)
    if not os.environ.get("MASTER_ADDR"):
        raise RequestError(f"MASTER_ADDR is not set, expected the machine of rank 0; {_START}")
    _number("MASTER_PORT", 0, 65535)
    _exchange(lambda: dist.init_process_group("gloo"))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _number(name: str, least: int, most: int | None = None) -> int:
    """A whole number from the environment."""
    text = os.environ.get(name)
    if text is None or not (
        text.isascii() and text.isdigit() and least <= int(text) <= (most or int(text))
    ):
        found = "not set" if text is None else repr(text)
        upper = "" if most is None else f" to {most}"
        raise RequestError(
            f"{name} is {found}, expected a whole number from {least}{upper}; {_START}"
        )
    return int(text)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if world_size() > 1:
        _exchange(lambda: dist.all_reduce(tensor))
    return tensor


def sum_scalar(number: float) -> float:
    """Sum of a number over all ranks."""
    return (
        float(all_reduce(torch.tensor(number, dtype=torch.float64))) if world_size() > 1 else number
    )


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over all ranks, in one exchange."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = all_reduce(torch.cat([gradient.flatten().cpu() for gradient in gradients]))
    for gradient, part in zip(
        gradients, whole.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def gather_counts(number: int) -> list[int]:
    """The number of every rank, in the order of ranks."""
    numbers = torch.zeros(world_size(), dtype=torch.int64)
    numbers[rank()] = number
    found: list[int] = all_reduce(numbers).tolist()
    return found


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, ``(rows, …)``, in the order of ranks."""
    if world_size() == 1:
        return tensor
    sizes = gather_counts(len(tensor))
    padded = torch.nn.functional.pad(
        tensor, (0, 0) * (tensor.dim() - 1) + (0, max(sizes) - len(tensor))
    ).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    _exchange(lambda: dist.all_gather(parts, padded))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def assign(costs: Mapping[str, float]) -> dict[str, int]:
    """Rank of every piece of work: the largest first, each to the rank with the least to do."""
    load_of, owner = [0.0] * world_size(), {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = load_of.index(min(load_of))
        load_of[owner[name]] += costs[name]
    return owner


def broadcast(owner: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Send tensors from the rank ``owner`` to all others; every rank returns them."""
    if world_size() == 1:
        return dict(tensors or {})
    data = torch.frombuffer(
        bytearray(save({key: tensor.contiguous() for key, tensor in (tensors or {}).items()})),
        dtype=torch.uint8,
    )
    size = torch.tensor([len(data)])
    _exchange(lambda: dist.broadcast(size, owner))
    data = data if rank() == owner else torch.empty(int(size), dtype=torch.uint8)
    _exchange(lambda: dist.broadcast(data, owner))
    return load(data.numpy().tobytes())


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        _exchange(dist.barrier)


def _exchange(work: Callable[[], object]) -> None:
    """Run one; a lost rank becomes the project's own error."""
    try:
        work()
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise SpikeLLMError(
            f"another rank has ended or cannot be reached ({words}); finished blocks are kept, run"
            " again with --resume"
        ) from None
