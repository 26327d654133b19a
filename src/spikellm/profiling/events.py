"""Binary spikes as events in a file for other tools, with thresholds to decode them.

Arrays of ``events.npz``, read with ``numpy.load(path, allow_pickle=False)``:

- ``names``: of the populations, text. ``tokens``: of the window, a number.
- One entry for each spike, ordered by population, time, token and channel: ``population``, uint16;
  ``time``, uint16, moment of the binary mode, from 0; ``token`` and ``channel``, uint32; ``sign``,
  int8, 1 or −1.
- Of population I: ``steps.I``, T of every channel, uint8; ``levels.I``, L; ``group.I``, group of
  every channel, uint8; ``theta.I`` and ``baseline.I``, float32 ``(tokens, groups)``, absent for
  Q, K and V; ``code_steps.I``, T of every code, uint8 ``(tokens, channels)``, where massive tokens
  take more.

The code of a channel is the sum of its signs over time, its value ``θ[token, group] · (code −
z[token, group])``.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from spikellm.core.errors import CheckpointError
from spikellm.core.files import write_atomically
from spikellm.profiling.population import Population


def write_events(populations: list[Population], path: Path) -> int:
    """Write a file of events; returns how many there are.

    Raises:
        SpikeLLMError: the file system refused.
    """
    import numpy as np

    columns: dict[str, list[Any]] = {
        name: [] for name in ("population", "time", "token", "channel", "sign")
    }
    arrays: dict[str, Any] = {
        "tokens": np.array(len(populations[0].codes), np.uint32),
        "names": np.array([population.name for population in populations]),
    }
    for index, population in enumerate(populations):
        for time, plane in enumerate(population.planes()):
            token, channel = plane.nonzero().unbind(1)
            columns["sign"].append(plane[token, channel].numpy())
            columns["token"].append(token.numpy().astype(np.uint32))
            columns["channel"].append(channel.numpy().astype(np.uint32))
            columns["time"].append(np.full(len(token), time, np.uint16))
            columns["population"].append(np.full(len(token), index, np.uint16))
        arrays[f"steps.{index}"] = population.steps.numpy().astype(np.uint8)
        if bool((population.code_steps != population.steps).any()):
            arrays[f"code_steps.{index}"] = population.code_steps.numpy().astype(np.uint8)
        arrays[f"group.{index}"] = population.group.numpy().astype(np.uint8)
        arrays[f"levels.{index}"] = np.array(population.neuron.levels, np.uint16)
        if population.thresholds is not None:
            arrays[f"theta.{index}"], arrays[f"baseline.{index}"] = (
                pair.numpy() for pair in population.thresholds
            )
    arrays.update({name: np.concatenate(parts) for name, parts in columns.items()})

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)
    return len(arrays["time"])


def read_codes(path: Path) -> dict[str, torch.Tensor]:
    """Merged codes of every population, int64 ``(tokens, channels)``, added up from events.

    Raises:
        CheckpointError: not a file of events.
    """
    import numpy as np

    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        codes = {}
        for index, name in enumerate(found["names"].tolist()):
            own = found["population"] == index
            sums = np.zeros((int(found["tokens"]), len(found[f"steps.{index}"])), np.int64)
            np.add.at(sums, (found["token"][own], found["channel"][own]), found["sign"][own])
            codes[name] = torch.from_numpy(sums)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is not a file of events"
            f" ({' '.join(str(error).split()) or type(error).__name__}); write one with spikellm"
            " trace"
        ) from None
    return codes
