"""The engine takes on what its limits allow, and one failure is nobody else's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from spikellm.serving.engine import Engine, FullError, Limits, StoppedError
from spikellm.serving.generation import Asked, Generation, Piece
from spikellm.serving.sampling import Sampling

GREEDY = Sampling(temperature=0)


class Watched:
    """A watcher that remembers, and holds the engine up until it is let go."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.prompts: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def prompt(self, tokens: int) -> None:
        self.prompts.append(tokens)

    def step(self, generations: int) -> None:
        self.steps.append(generations)

    def ended(self, generation: Generation) -> None:
        pass

    def idle(self, model: Any) -> None:
        self.gate.wait(60)


class Answer:
    """One generation, and what it says."""

    def __init__(self, tokenizer: Any, text: str, most: int = 8, **options: Any) -> None:
        self.pieces: list[Piece] = []
        self._done = threading.Event()
        tokens = tokenizer(text)["input_ids"]
        asked = Asked(prompt=tokens, most=most, sampling=GREEDY, **options)
        self.generation = Generation(asked, tokenizer, self._heard)

    def _heard(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.last:
            self._done.set()

    def wait(self) -> Piece:
        assert self._done.wait(60)
        return self.pieces[-1]

    def wait_for_a_token(self) -> None:
        while not self.generation.new:
            time.sleep(0.01)

    @property
    def text(self) -> str:
        self.wait()
        return "".join(piece.text for piece in self.pieces)


@pytest.fixture(scope="module")
def loaded(converted_folder: Path) -> tuple[Any, Any]:
    return spikellm.load(converted_folder)


@contextmanager
def working(model: Any, watched: Watched, **limits: Any) -> Iterator[Engine]:
    engine = Engine(model, Limits(**limits), watched)
    engine.start()
    try:
        yield engine
    finally:
        watched.gate.set()
        engine.stop()


@torch.no_grad()
def in_pieces(model: Any, tokenizer: Any, prompt: str, size: int) -> str:
    """What follows a prompt that the model reads in pieces, greedily, 8 tokens."""
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    cache, new = None, []
    for piece in tokens.split(size, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    for _ in range(8):
        new.append(int(output.logits[0, -1].argmax()))
        output = model(torch.tensor([new[-1:]]), past_key_values=cache)
    return str(tokenizer.decode(new))


def test_long_prompts_go_in_pieces_between_steps(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    watched = Watched()
    long = "Return the number of items in the list. " * 12
    with working(model, watched, chunk=16) as engine:
        first = Answer(tokenizer, "Raise an error", 60)
        engine.submit([first.generation])
        second = Answer(tokenizer, long)
        engine.submit([second.generation])
        assert second.text == in_pieces(model, tokenizer, long, 16)
        first.wait()
    count = len(second.generation.asked.prompt)
    assert max(watched.prompts) == 16 < count
    assert sum(watched.prompts) == count + len(first.generation.asked.prompt)
    assert set(watched.steps) == {1, 2}, "the first goes on while the second is read"


def test_no_more_are_taken_than_may_wait(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    watched = Watched()
    watched.gate.clear()
    with working(model, watched, parallel=2, queue=1) as engine:
        answers = [Answer(tokenizer, "Return") for _ in range(4)]
        engine.submit([answers[0].generation])
        with pytest.raises(FullError):
            engine.submit([one.generation for one in answers[1:]])
        engine.submit([one.generation for one in answers[1:3]])
        with pytest.raises(FullError):
            engine.submit([answers[3].generation])
        watched.gate.set()
        assert {one.text for one in answers[:3]} == {answers[0].text}
    assert max(watched.steps) == 2
    with pytest.raises(StoppedError):
        engine.submit([answers[3].generation])


def test_time_is_limited(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    watched = Watched()
    with working(model, watched, parallel=1, seconds=0.3) as engine:
        longest = Answer(tokenizer, "Return", 100_000)
        waiting = Answer(tokenizer, "Return")
        waiting.generation.arrived = longest.generation.arrived
        engine.submit([longest.generation, waiting.generation])
        assert longest.wait().finish == "length"
        assert 0 < len(longest.generation.new) < 100_000
        assert "too busy" in (waiting.wait().error or "")


def test_what_is_given_up_stops(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with working(model, Watched()) as engine:
        answer = Answer(tokenizer, "Return", 100_000)
        engine.submit([answer.generation])
        answer.wait_for_a_token()
        engine.cancel([answer.generation])
        while engine.running:
            time.sleep(0.01)
        assert answer.generation.cache is None
        assert not any(piece.last for piece in answer.pieces)


def test_failures_stay_with_their_own(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    with working(model, Watched()) as engine:
        broken = Answer(tokenizer, "Return")
        monkeypatch.setattr(
            broken.generation, "read", lambda *_: (_ for _ in ()).throw(MemoryError("none left"))
        )
        sound = Answer(tokenizer, "Return")
        engine.submit([broken.generation, sound.generation])
        assert broken.wait().error == "MemoryError: none left"
        assert sound.wait().finish == "length"
        nan = Answer(tokenizer, "Return")
        read = nan.generation.read
        monkeypatch.setattr(
            nan.generation, "read", lambda first, logits: read(first, logits * torch.nan)
        )
        engine.submit([nan.generation])
        assert "NaN" in (nan.wait().error or "")
        assert engine.alive


def test_stopping_says_so(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with working(model, Watched()) as engine:
        answer = Answer(tokenizer, "Return", 100_000)
        engine.submit([answer.generation])
        answer.wait_for_a_token()
        engine.stop()
        assert "being stopped" in (answer.wait().error or "")
        assert not engine.alive


def test_one_that_cannot_go_on_stops_alone(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step that others share."""
    model, tokenizer = loaded
    with working(model, Watched()) as engine:
        victim, broken = Answer(tokenizer, "Return", 40), Answer(tokenizer, "Raise", 40)
        take = broken.generation.take

        def failing(logits: torch.Tensor) -> None:
            if len(broken.generation.new) == 3:
                raise RuntimeError("no token can be drawn")
            take(logits)

        monkeypatch.setattr(broken.generation, "take", failing)
        engine.submit([victim.generation, broken.generation])
        assert broken.wait().error == "RuntimeError: no token can be drawn"
        assert victim.wait().finish == "length"
        assert len(victim.generation.new) == 40


def test_figures_that_fail_cost_no_answer(loaded: tuple[Any, Any]) -> None:
    class Broken(Watched):
        def step(self, generations: int) -> None:
            raise MemoryError

        def ended(self, generation: Generation) -> None:
            raise MemoryError

        def idle(self, model: Any) -> None:
            raise MemoryError

    model, tokenizer = loaded
    with working(model, Broken()) as engine:
        answer = Answer(tokenizer, "Return")
        engine.submit([answer.generation])
        assert answer.wait().finish == "length"
        assert engine.alive
