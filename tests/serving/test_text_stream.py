"""Text that is given out piece by piece is the text of all tokens together."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from conftest import BUNDLED
from spikellm.serving.text import TextStream, plain_text

TOKENS = st.lists(st.integers(3, 2000), max_size=30)


def stream_of(tokenizer: Any, before: list[int], new: list[int], *stops: str) -> list[str]:
    stream = TextStream(tokenizer, before, stops)
    found = []
    for token in new:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()]


def loaded() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(BUNDLED)


TOKENIZER = loaded()
_LATIN = [TOKENIZER.convert_tokens_to_ids(name) for name in map(chr, range(0xA1, 0x100))]
BYTES = st.lists(
    st.sampled_from(
        [
            *(token for token in _LATIN if token is not None),  # single bytes of characters
            *TOKENIZER("🙂é日 ok", add_special_tokens=False)["input_ids"],
        ]
    ),
    max_size=12,
)


@example(before=[158], new=[96])  # the prompt ends within a character that never becomes whole
@example(before=[158], new=[96, 96, 96, 96])
@given(before=TOKENS, new=TOKENS | BYTES)
def test_pieces_are_the_whole(before: list[int], new: list[int]) -> None:
    whole = plain_text(TOKENIZER, [*before[-6:], *new])
    assert (
        "".join(stream_of(TOKENIZER, before, new))
        == whole[len(plain_text(TOKENIZER, before[-6:])) :]
    )


def test_characters_of_several_tokens_wait_until_they_are_whole() -> None:
    new = TOKENIZER("naïve café 日本 🙂", add_special_tokens=False)["input_ids"]
    pieces = stream_of(TOKENIZER, [], new)
    assert "".join(pieces) == TOKENIZER.decode(new)
    assert len(new) > 10, "some characters take several tokens"
    assert not any("�" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_let_go() -> None:
    broken = TOKENIZER("🙂", add_special_tokens=False)["input_ids"][:1] * 40
    stream = TextStream(TOKENIZER, [])
    given_early = "".join(stream.push(token) for token in broken)
    assert len(given_early) > 20
    assert given_early + stream.finish() == TOKENIZER.decode(broken)


@given(new=TOKENS.filter(lambda tokens: len(tokens) > 4), data=st.data())
def test_nothing_behind_a_stop_and_nothing_of_it(new: list[int], data: Any) -> None:
    whole = plain_text(TOKENIZER, new)
    first = data.draw(st.integers(0, max(0, len(whole) - 2)))
    stop = whole[first : first + data.draw(st.integers(1, 4))]
    pieces = stream_of(TOKENIZER, [], new, stop, "never there")
    found = "".join(pieces)
    if stop and "�" not in whole:
        assert found == whole[: whole.find(stop)]
        assert all(whole.startswith("".join(pieces[:count])) for count in range(len(pieces)))
