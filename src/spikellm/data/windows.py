"""Windows of tokens: for calibration drawn at random, for perplexity disjoint."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.models.families import longest_window

DEFAULT_SEQLEN = 2048


def window_length(config: object, seqlen: int | None) -> int:
    """Tokens of a window: as asked, else the smaller of 2048 and what the model can attend to.

    Raises:
        RequestError: longer than the model's maximum, or too short to predict anything.
    """
    longest = longest_window(config)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN)
    if longest is not None and seqlen > longest:
        raise RequestError(
            f"seqlen {seqlen} is above the model's maximum of {longest} tokens; give --seqlen"
            f" {longest} or less"
        )
    if seqlen < 2:
        raise RequestError(
            f"seqlen {seqlen} is too short; a window needs at least 2 tokens to predict one from"
            " another"
        )
    return seqlen


def disjoint_windows(tokens: Tensor, seqlen: int, source: str) -> Tensor:
    """Consecutive windows, the tail dropped: ``(windows, seqlen)``.

    Raises:
        RequestError: the text is shorter than one window.
    """
    _require_window(tokens, seqlen, source)
    return tokens[: tokens.shape[0] // seqlen * seqlen].view(-1, seqlen)


def random_windows(tokens: Tensor, seqlen: int, samples: int, seed: int, source: str) -> Tensor:
    """Windows at random places, ``(samples, seqlen)``; the same seed gives the same windows.

    Raises:
        RequestError: the text is shorter than one window, or so many windows do not fit into
            memory.
    """
    import psutil

    _require_window(tokens, seqlen, source)
    needed, free = samples * seqlen * tokens.element_size(), int(psutil.virtual_memory().available)
    if needed > free:
        raise RequestError(
            f"{samples} windows of {seqlen} tokens take {needed:,} bytes and {free:,} are free;"
            " give fewer --samples"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.shape[0] - seqlen + 1, (samples,), generator=generator)
    return torch.stack([tokens[start : start + seqlen] for start in starts.tolist()])


def _require_window(tokens: Tensor, seqlen: int, source: str) -> None:
    if tokens.shape[0] < seqlen:
        raise RequestError(
            f"text {source!r} has {tokens.shape[0]} tokens, shorter than one window of {seqlen};"
            f" give a longer text or --seqlen {max(2, tokens.shape[0])}"
        )
