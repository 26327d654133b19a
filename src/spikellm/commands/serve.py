"""The verb ``serve``: a model behind the OpenAI protocol."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from spikellm.commands.support.options import EnergyTable, LoadOptions, Model
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console, extras
from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.core.io import PlainDataError, read_text

_KEY = "SPIKELLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(LoadOptions):
    """Where it listens, and what it takes on.

    Attributes:
        name: that requests give as ``model``; the folder's own by default.
        api_key_file: its first line is the key that requests must carry.
        parallel: generations that are decoded together.
        queue: generations that wait beside them.
        max_prompt_tokens: of a request; what the model can attend to by default.
        max_new_tokens: of a request.
        timeout: seconds of a generation.
        grace: seconds that requests under way have to end when the server is stopped.
        spike_interval: seconds between two texts whose spikes are counted; 0 for none.
        threads: of torch.
    """

    host: Annotated[str, Option("Where to listen; the loopback by default.")] = "127.0.0.1"
    port: Annotated[int, Option("Port; 0 for any that is free.")] = 8000
    name: Annotated[
        str | None, Option("Name of the model in requests; the folder's by default.", filled="one")
    ] = None
    api_key_file: Annotated[
        Path | None,
        Option(
            f"File whose first line requests must carry as their key (or set {_KEY}).",
            "FILE",
            reads="files",
        ),
    ] = None
    chat_template: Annotated[
        Path | None,
        Option("Jinja file for chats, in the place of the tokenizer's.", "FILE", reads="files"),
    ] = None
    parallel: Annotated[int, Option("Generations that are decoded together.")] = 16
    queue: Annotated[int, Option("Generations that may wait beside them.")] = 256
    max_prompt_tokens: Annotated[
        int | None, Option("Tokens of a prompt at most; the model's own limit by default.")
    ] = None
    max_new_tokens: Annotated[int, Option("New tokens of a generation at most.")] = 1024
    timeout: Annotated[float, Option("Seconds of a generation at most.")] = 600.0
    grace: Annotated[
        float, Option("Seconds that requests have to end when the server is stopped.")
    ] = 30.0
    spike_interval: Annotated[
        float, Option("Count the spikes of a text every so many seconds, when idle; 0: never.")
    ] = 30.0
    energy_table: EnergyTable = None
    threads: Annotated[int | None, Option("Threads of torch.")] = None


_DEFAULT = ServeOptions()


@verbs.register("serve")
def serve(model: Model, options: ServeOptions = _DEFAULT) -> dict[str, Any]:
    """Serve a model to OpenAI clients until interrupted: completions, chats, streams.

    Several requests are decoded in one step where the model has native kernels. GET /metrics has
    figures for Prometheus, with spikes and estimated energy a token; GET /health says whether it
    works.

    Example: spikellm serve out/w4a4 --port 8000

    Returns:
        ``{"model", "address"}``, once it was stopped.

    Raises:
        RequestError: a limit below 1, no such host, a port that is taken, a key or template that
            cannot be read, a model that keeps no cache, and whatever :func:`spikellm.load` raises.
        SpikeLLMError: the engine failed while it ran.
        DependencyError: the extra ``serve`` is not installed.
    """
    _require_sense(options)
    extras.require("servers", "serve", "starlette", "uvicorn", "prometheus_client")
    import torch

    from spikellm import api
    from spikellm.profiling.energy_table import load_table
    from spikellm.runtime.decoder_step.summary import NATIVE, tried_step
    from spikellm.serving.app import make_app
    from spikellm.serving.engine import Engine, Limits, require_cache
    from spikellm.serving.hosts import is_loopback
    from spikellm.serving.metrics import Metrics
    from spikellm.serving.run import address_of, bound, run
    from spikellm.serving.service import Service, TokenLimits
    from spikellm.serving.spikes import SpikeSampler

    key = _key(options.api_key_file)
    template = None
    if options.chat_template is not None:
        template = _read("--chat-template", options.chat_template)
    table = load_table(options.energy_table)
    listening = bound(options.host, options.port)
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        loaded, tokenizer = api.load(
            model, device=options.device, trust_remote_code=options.trust_remote_code
        )
        require_cache(loaded)
        name = options.name or Path(model).resolve().name
        metrics = Metrics(name, SpikeSampler(table, options.spike_interval))
        engine = Engine(
            loaded,
            Limits(parallel=options.parallel, queue=options.queue, seconds=options.timeout),
            metrics,
        )
        limits = TokenLimits(prompt=options.max_prompt_tokens, new=options.max_new_tokens)
        service = Service(name, engine, tokenizer, limits, template)
        app = make_app(service, metrics, key, options.host)
        address, step = address_of(listening), tried_step(loaded)
    except BaseException:
        listening.close()
        raise

    def ready() -> None:
        console.note(f"{name} at {address}/v1, ctrl-C to stop")
        if step != NATIVE:
            console.note(f"generations are decoded one after the other; decoder step: {step}")
        if key is None and not is_loopback(options.host):
            console.note(f"anybody who reaches {options.host} may use it; set {_KEY} to ask a key")

    run(app, engine, listening, options.grace, ready)
    if engine.failure is not None:
        raise SpikeLLMError(f"the engine stopped: {engine.failure}")
    return {"model": name, "address": address}


def _require_sense(options: ServeOptions) -> None:
    counts = {
        "--parallel": options.parallel,
        "--max-new-tokens": options.max_new_tokens,
        "--max-prompt-tokens": options.max_prompt_tokens,
        "--threads": options.threads,
    }
    for option, value in counts.items():
        if value is not None and value < 1:
            raise RequestError(f"{option} {value}; expected at least 1")
    if options.queue < 0:
        raise RequestError(f"--queue {options.queue}; expected 0 or more")
    if not options.timeout > 0:
        raise RequestError(f"--timeout {options.timeout}; expected seconds above 0")
    for option, seconds in (("grace", options.grace), ("spike-interval", options.spike_interval)):
        if not 0 <= seconds < float("inf"):
            raise RequestError(f"--{option} {seconds}; expected seconds, 0 or more")


def _key(file: Path | None) -> str | None:
    """The key that requests must carry; None for none."""
    if file is None:
        return _ascii(_KEY, os.environ.get(_KEY, "").strip()) or None
    lines = _read("--api-key-file", file).splitlines()
    if not lines or not lines[0].strip():
        raise RequestError(f"--api-key-file {file} is empty; expected a key in its first line")
    return _ascii(f"--api-key-file {file}", lines[0].strip())


def _ascii(where: str, key: str) -> str:
    if not (key.isascii() and key.isprintable()):
        raise RequestError(f"{where} has characters that no header carries; expected plain ASCII")
    return key


def _read(option: str, file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, PlainDataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{option} {file}: {reason}; expected a text file") from None


def show(result: dict[str, Any]) -> None:
    """Say that it is over."""
    console.note(f"{result['model']} is not served any more")
