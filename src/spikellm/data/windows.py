"""Windows of tokens: for calibration drawn at random, for perplexity disjoint.

With a BOS token (see :func:`spikellm.data.tokens.bos_token`) each window is that token and
``seqlen − 1`` tokens of text.
"""

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


def disjoint_windows(tokens: Tensor, seqlen: int, source: str, bos: int | None = None) -> Tensor:
    """Consecutive windows, the tail dropped: ``(windows, seqlen)``.

    Raises:
        RequestError: the text is shorter than one window.
    """
    text, length = _text_of_windows(tokens, seqlen, source, bos)
    return _started(text[: text.shape[0] // length * length].view(-1, length), bos)


def random_windows(
    tokens: Tensor, seqlen: int, samples: int, seed: int, source: str, bos: int | None = None
) -> Tensor:
    """Windows at random places, ``(samples, seqlen)``; the same seed gives the same windows.

    Raises:
        RequestError: the text is shorter than one window, or so many windows do not fit into
            memory.
    """
    import psutil

    text, length = _text_of_windows(tokens, seqlen, source, bos)
    needed, free = samples * seqlen * tokens.element_size(), int(psutil.virtual_memory().available)
    if needed > free:
        raise RequestError(
            f"{samples} windows of {seqlen} tokens take {needed:,} bytes and {free:,} are free;"
            " give fewer --samples"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(text.shape[0] - length + 1, (samples,), generator=generator)
    windows = torch.stack([text[start : start + length] for start in starts.tolist()])
    return _started(windows, bos)


def _text_of_windows(
    tokens: Tensor, seqlen: int, source: str, bos: int | None
) -> tuple[Tensor, int]:
    """Tokens that windows are cut from, and how many of them each has.

    Where windows start with BOS, the text does not bring its own.
    """
    text, length = tokens, seqlen
    if bos is not None:
        text, length = (tokens[1:] if tokens[:1].tolist() == [bos] else tokens), seqlen - 1
    if text.shape[0] < length:
        raise RequestError(
            f"text {source!r} has {tokens.shape[0]} tokens, shorter than one window of {seqlen};"
            f" give a longer text or --seqlen {max(2, tokens.shape[0])}"
        )
    return text, length


def _started(windows: Tensor, bos: int | None) -> Tensor:
    if bos is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)
