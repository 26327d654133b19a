"""A server under load: so many clients at once, each asking again and again; tokens a second, the
time to the first token, and whether anything was lost.

    spikellm serve out/best --name best --threads 1
    python benchmarks/serve.py http://127.0.0.1:8000/v1 best --clients 1,8,32

Any server of the OpenAI protocol can stand at the address (llama.cpp's, for example), so that two
of them are compared on the same work. Answers are streamed, greedy, and all of one length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

import openai

PROMPTS = (
    "The history of the city begins with",
    "Water is a molecule that",
    "In the spring of 1911 the expedition",
    "A neuron fires when its membrane potential",
    "The first railway in the country was",
    "She opened the letter and read",
    "Of all the planets, Jupiter is",
    "The recipe needs flour, butter and",
)


async def ask(client: Any, model: str, number: int, tokens: int) -> tuple[float, int, str]:
    """Seconds to the first token, tokens, and the text of one answer."""
    start, first, text, used = time.monotonic(), 0.0, "", 0
    stream = await client.completions.create(
        model=model,
        prompt=PROMPTS[number % len(PROMPTS)],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for event in stream:
        if event.choices and event.choices[0].text and not first:
            first = time.monotonic() - start
        text += event.choices[0].text if event.choices else ""
        used = event.usage.completion_tokens if event.usage else used
    return first, used, text


async def load(address: str, model: str, clients: int, rounds: int, tokens: int) -> dict[str, Any]:
    """What so many clients get, all of whom ask ``rounds`` times."""
    answers: list[tuple[float, int, str]] = []
    async with openai.AsyncOpenAI(base_url=address, api_key="-", max_retries=0) as client:

        async def one(number: int) -> None:
            for turn in range(rounds):
                answers.append(await ask(client, model, number + turn * clients, tokens))

        start = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(clients)))
        seconds = time.monotonic() - start
    texts: dict[str, set[str]] = {}
    for number, (_, _, text) in enumerate(sorted(answers, key=lambda one: one[2])):
        texts.setdefault(text, set()).add(str(number))
    return {
        "clients": clients,
        "answers": len(answers),
        "whole": sum(used == tokens for _, used, _ in answers),
        "texts": len(texts),
        "tokens_per_second": sum(used for _, used, _ in answers) / seconds,
        "first_token_seconds": statistics.median(first for first, _, _ in answers),
    }


def main() -> None:
    """Measure, and print a line for each number of clients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address")
    parser.add_argument("model")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=2, help="answers for each client")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    rows = []
    for clients in map(int, arguments.clients.split(",")):
        found = asyncio.run(
            load(arguments.address, arguments.model, clients, arguments.rounds, arguments.tokens)
        )
        rows.append(found)
        print(
            f"{clients} clients: {found['tokens_per_second']:.1f} tokens/s,"
            f" {found['tokens_per_second'] / rows[0]['tokens_per_second']:.2f} times the first row,"
            f" first token after {found['first_token_seconds']:.2f} s, {found['whole']} of"
            f" {found['answers']} answers whole, {found['texts']} different texts",
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
