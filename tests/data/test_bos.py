"""The BOS token in front of windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spikellm.core.errors import RequestError
from spikellm.data.tokens import bos_token, tokenize
from spikellm.data.windows import disjoint_windows, random_windows


def test_it_is_there_where_the_tokenizer_adds_it(tokenizer: Any, bos_tokenizer: Any) -> None:
    assert [bos_token(tokenizer, bos) for bos in ("auto", "always", "never")] == [None, 0, None]
    assert [bos_token(bos_tokenizer, bos) for bos in ("auto", "always", "never")] == [0, 0, None]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RequestError, match="bos is 'yes'; expected auto, always, never"):
        bos_token(object(), "yes")
    with pytest.raises(RequestError, match="has no BOS token .* leave it at auto"):
        bos_token(object(), "always")
    assert bos_token(object(), "auto") is None


def test_every_window_starts_with_it_and_the_text_is_whole(
    bos_tokenizer: Any, text_file: Path
) -> None:
    text = text_file.read_text(encoding="utf-8")[:3000]
    tokens = tokenize(bos_tokenizer, text)
    assert tokens[0] == 0
    windows = disjoint_windows(tokens, 32, "t", 0)
    assert windows.shape[1] == 32
    assert set(windows[:, 0].tolist()) == {0}
    own = windows[:, 1:].flatten()
    assert torch.equal(own, tokens[1 : 1 + len(own)]), "nothing twice, and no BOS of the text's own"
    drawn = random_windows(tokens, 32, 4, 2, "t", 0)
    assert drawn.shape == (4, 32)
    assert set(drawn[:, 0].tolist()) == {0}
    assert (drawn[:, 1:] != 0).all()


def test_a_text_of_one_window_is_enough() -> None:
    assert disjoint_windows(torch.tensor([7, 1, 2, 3]), 4, "t", 7).tolist() == [[7, 1, 2, 3]]
    assert random_windows(torch.tensor([1, 2, 3]), 4, 1, 0, "t", 7).tolist() == [[7, 1, 2, 3]]
    with pytest.raises(RequestError, match="shorter than one window of 4"):
        disjoint_windows(torch.tensor([7, 1, 2]), 4, "t", 7)
