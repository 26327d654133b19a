"""The command ``spikellm generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Device, Json, Model, Trust
from spikellm.commands.inputs import sources
from spikellm.core import console
from spikellm.core.errors import RequestError
from spikellm.core.streams import encodes


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to add.")] = 64,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="0 for greedy; above 0 to sample from all tokens."),
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Decides what is sampled; 0 by default.")
    ] = None,
    json: Json = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text: the likeliest token each time, or tokens sampled.

    Penalties and limits that come with the model are left aside.

    Example: spikellm generate out/w4a4 "The history of the" --max-new-tokens 40
    """
    console.check_json_target(json, sources(models=[model]))
    if not encodes(prompt):
        raise RequestError(
            f"prompt {prompt!a} holds bytes that are no UTF-8 text; write it in UTF-8"
        )
    if seed is not None and temperature == 0:
        raise RequestError(
            "--seed has no effect without --temperature: the likeliest token is chosen each time"
        )
    from spikellm import api

    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    text = api.generate(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed or 0,
    )
    if json:
        console.write_json({"model": model, "prompt": prompt, "text": text}, json)
    if json != "-":
        print(text)
