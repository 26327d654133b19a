"""The verb ``generate``: continue a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from spikellm.commands.support.options import Execution, LoadOptions, Model
from spikellm.commands.support.verb import Argument, Option, verbs
from spikellm.core.errors import RequestError
from spikellm.core.streams import encodes


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(LoadOptions):
    """How a text goes on."""

    max_new_tokens: Annotated[int, Option("Tokens to add.")] = 64
    temperature: Annotated[float, Option("0 for greedy; above 0 to sample from all tokens.")] = 0.0
    seed: Annotated[int | None, Option("Decides what is sampled; 0 by default.")] = None
    execution: Execution = None


_DEFAULT = GenerateOptions()


@verbs.register("generate")
def generate(
    model: Model,
    prompt: Annotated[str, Argument("Text to continue.")],
    options: GenerateOptions = _DEFAULT,
) -> dict[str, Any]:
    """Continue a text: the likeliest token each time, or tokens sampled.

    Penalties and limits that come with the model are left aside.

    Example: spikellm generate out/w4a4 "The history of the" --max-new-tokens 40

    Returns:
        ``{"model", "prompt", "text"}``; ``text`` begins with the prompt.

    Raises:
        RequestError: the prompt is no text, a seed where nothing is sampled, and whatever
            :func:`spikellm.generate` and :func:`spikellm.set_execution_mode` raise.
    """
    if not encodes(prompt):
        raise RequestError(
            f"prompt {prompt!a} holds bytes that are no UTF-8 text; write it in UTF-8"
        )
    if options.seed is not None and options.temperature == 0:
        raise RequestError(
            "--seed has no effect without --temperature: the likeliest token is chosen each time"
        )
    from spikellm import api

    loaded, tokenizer = api.load(
        model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    if options.execution is not None:
        api.set_execution_mode(loaded, options.execution)  # type: ignore[arg-type]
    text = api.generate(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed or 0,
    )
    return {"model": model, "prompt": prompt, "text": text}


def show(result: dict[str, Any]) -> None:
    """Print the text."""
    print(result["text"])
