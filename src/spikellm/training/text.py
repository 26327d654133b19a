"""Windows that are trained on, and those that are held out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.data.windows import random_windows
from spikellm.recipe.training import StageOptions

_STREAM = 1_000_003  # keeps draws apart from those of calibration with the same seed


class TrainingText(NamedTuple):
    """Tokens of a training.

    Attributes:
        windows: ``(updates · batch, seqlen)``, in the order in which they are trained on.
        held_out: ``(windows, seqlen)``, from the end of the text.
    """

    windows: Tensor
    held_out: Tensor


def training_text(
    tokens: Tensor, length: int, options: StageOptions, seed: int, source: str, bos: int | None
) -> TrainingText:
    """Windows drawn at random from a text but for its end, which is held out.

    Args:
        tokens: of the whole text, ``(tokens,)``.
        length: of a window.
        seed: decides the draw.
        source: name of the text, for errors.
        bos: see :func:`spikellm.data.windows.random_windows`.

    Raises:
        RequestError: the text is too short.
    """
    own = length if bos is None else length - 1
    end = len(tokens) - options.held_out * own
    if end < own + 1:
        raise RequestError(
            f"text {source!r} has {len(tokens)} tokens; training on windows of {length} takes"
            f" {own + 1} and holding {options.held_out} of them out {options.held_out * own} more;"
            " give a longer text, or set training.held_out or training.seqlen lower"
        )
    count = max(1, options.steps * options.batch)
    windows = random_windows(tokens[:end], length, count, seed + _STREAM, source, bos)
    rest = tokens[end:].view(options.held_out, own)
    if bos is not None:
        rest = torch.cat([rest.new_full((len(rest), 1), bos), rest], 1)
    return TrainingText(windows, rest)
