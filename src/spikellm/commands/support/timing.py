"""One turn of a model on the clock, in a process of its own, so that peak memory is its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

import torch

from spikellm import api
from spikellm.checkpoint.save import spike_config
from spikellm.core.devices import find_device
from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.core.memory import peak_memory
from spikellm.kernels.base import describe as describe_kernels
from spikellm.models.families import longest_window
from spikellm.profiling.powercap import Meter
from spikellm.runtime.decoder_step.summary import step_in_words, tried_step

R = TypeVar("R")


class Work(NamedTuple):
    """What is run: a prompt, then tokens one at a time.

    Attributes:
        prompt, new: tokens.
        threads: of torch; None leaves them.
        dtype: of an original; converted models run as they are.
        energy: read the machine's counters.
        device: where it runs; the CPU by default.
    """

    prompt: int
    new: int
    threads: int | None
    dtype: str
    energy: bool
    device: str | None = None


class Run(NamedTuple):
    """One turn of one model: seconds to the first token and for all later ones, bytes beyond those
    of the bare process (None where that could not be read; on CUDA those of the device), joules by
    phase.
    """

    kind: str
    first_token: float
    decode: float
    peak_memory: int | None
    kernels: str
    prefill_joules: float | None
    decode_joules: float | None
    converted: bool = False


def run_apart(name: str, work: Work, trust_remote_code: bool = False) -> Run:
    """One turn in a process of its own.

    Raises:
        SpikeLLMError: the process died, for want of memory for example.
    """
    return apart(name, run_once, name, work, trust_remote_code)


def apart(what: str, function: Callable[..., R], *arguments: Any) -> R:
    """What a function returns in a process of its own that ends with it.

    Raises:
        SpikeLLMError: the process died, for want of memory for example.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise SpikeLLMError(
                f"the process that ran {what} was ended by the system, most likely for want of"
                " memory; free some, or ask for fewer tokens"
            ) from None


@torch.no_grad()
def run_once(name: str, work: Work, trust_remote_code: bool = False) -> Run:
    """One turn, in this process: short passes to warm up, the prompt, then token after token from
    the cache.

    Raises:
        RequestError: more tokens than the model can attend to.
    """
    if work.threads:
        torch.set_num_threads(work.threads)
    device = find_device(work.device or "cpu")
    bare = peak_memory()
    model, _ = api.load(name, device=work.device, trust_remote_code=trust_remote_code)
    converted = spike_config(model) is not None
    if not converted:
        model = model.to(getattr(torch, work.dtype))
    longest = longest_window(model.config)
    if longest is not None and work.prompt + work.new > longest:
        raise RequestError(
            f"{work.prompt} tokens of prompt and {work.new} new ones exceed the maximum of {name},"
            f" {longest}; ask for less"
        )
    meter = Meter() if work.energy else None
    first, decode, readings = _timed(model, work, meter)
    kernels = f"{describe_kernels(device)}; decoder step {step_in_words(model)}"
    prefill_joules = decode_joules = None
    if meter and meter.counters:
        prefill_joules = meter.joules(*readings[:2])
        decode_joules = meter.joules(*readings[1:])
    return Run(
        type(model).__name__,
        first,
        decode,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory() - bare,
        kernels if converted else "torch",
        prefill_joules,
        decode_joules,
        converted,
    )


def _timed(model: Any, work: Work, meter: Meter | None) -> tuple[float, float, list[Any]]:
    """Seconds to the first token and for all later ones; readings before, between and after."""
    tokens = torch.randint(
        0, model.config.vocab_size, (1, work.prompt), generator=torch.Generator().manual_seed(0)
    ).to(next(model.parameters()).device)
    model(tokens[:, :2], use_cache=False)
    tried_step(model)
    if tokens.is_cuda:  # kernels are compiled at their first call, for many tokens and for one
        warm = model(tokens, use_cache=True, logits_to_keep=1)
        model(tokens[:, :1], past_key_values=warm.past_key_values, use_cache=True)
        del warm
    readings = [meter.read()] if meter else []
    started = _now(tokens)
    output = model(tokens, use_cache=True, logits_to_keep=1)
    first = _now(tokens) - started
    readings += [meter.read()] if meter else []
    started = _now(tokens)
    for _ in range(work.new):
        tokens = output.logits[:, -1:].argmax(-1)
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
    decode = _now(tokens) - started
    readings += [meter.read()] if meter else []
    return first, decode, readings


def _now(x: torch.Tensor) -> float:
    """Seconds on a clock, when all work on the device of a tensor is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
