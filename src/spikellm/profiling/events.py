"""Spikes as events in a file for other tools, with thresholds to decode them.

Arrays of ``events.npz``, read with ``numpy.load(path, allow_pickle=False)``:

- ``names``: of the populations, text. ``tokens``: of the window, a number.
- One entry for each spike, ordered by population, time, token and channel: ``population``, uint16;
  ``time``, uint16, moment of the train, from 0; ``token`` and ``channel``, uint32; ``sign``, int8,
  1 or −1; in phase form ``place``, uint8, the k of the 2^k that the spike is worth.
- Of population I: ``steps.I``, T of every channel, uint8; ``levels.I``, L; ``group.I``, group of
  every channel, uint8; ``theta.I`` and ``baseline.I``, float32 ``(tokens, groups)``, absent for
  Q, K and V; ``code_steps.I``, T of every code, uint8 ``(tokens, channels)``, where massive tokens
  take more; ``centered.I``, present where spikes are about the baseline.

The count of a channel is the sum of its signs over time, each times 2^place where there is one. Its
value is ``θ[token, group] · count`` of a centered population, and ``θ[token, group] · (count −
z[token, group])`` of another.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from spikellm.core.errors import CheckpointError
from spikellm.core.files import write_atomically
from spikellm.profiling.event_run import events_of
from spikellm.profiling.population import EventForm, Population


def write_events(populations: list[Population], path: Path, form: EventForm = "binary") -> int:
    """Write a file of events; returns how many there are.

    Raises:
        SpikeLLMError: the file system refused.
    """
    import numpy as np

    names = ("population", "time", "token", "channel", "sign")
    columns: dict[str, list[Any]] = {
        name: [] for name in (*names, *(("place",) if form == "phase" else ()))
    }
    arrays: dict[str, Any] = {
        "tokens": np.array(len(populations[0].codes), np.uint32),
        "names": np.array([population.name for population in populations]),
    }
    for index, population in enumerate(populations):
        events = events_of(population, form)
        columns["population"].append(np.full(len(events.time), index, np.uint16))
        columns["time"].append(events.time.numpy().astype(np.uint16))
        columns["token"].append(events.token.numpy().astype(np.uint32))
        columns["channel"].append(events.channel.numpy().astype(np.uint32))
        columns["sign"].append(events.sign.numpy())
        if form == "phase":
            columns["place"].append(events.place.numpy().astype(np.uint8))
        if population.neuron.centered:
            arrays[f"centered.{index}"] = np.array(True)
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
    """Counts of every population, int64 ``(tokens, channels)``, added up from events: merged codes,
    less their baselines of a centered population.

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
            worth = found["sign"][own].astype(np.int64)
            if "place" in found:
                worth <<= found["place"][own].astype(np.int64)
            np.add.at(sums, (found["token"][own], found["channel"][own]), worth)
            codes[name] = torch.from_numpy(sums)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is not a file of events"
            f" ({' '.join(str(error).split()) or type(error).__name__}); write one with spikellm"
            " trace"
        ) from None
    return codes
