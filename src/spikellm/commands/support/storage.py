"""Whether this machine has what a conversion needs, and where it goes."""

from __future__ import annotations

import shutil
from pathlib import Path

from spikellm.conversion.estimate import Needs
from spikellm.core import console
from spikellm.core.errors import RequestError

STORES = ("auto", "ram", "disk")
_SHARE = 0.5  # of free memory that hidden states may take before they go to disk


def choose_store(needs: Needs, wanted: str, folder: Path) -> Path | None:
    """Say what is needed and decide where hidden states are kept: a folder, or None for RAM.

    Args:
        wanted: one of :data:`STORES`; ``auto`` by what is free.

    Raises:
        RequestError: there is not enough memory or disk; says how much.
    """
    import psutil

    free, place = (
        int(psutil.virtual_memory().available),
        next(path for path in (folder, *folder.parents) if path.is_dir()),
    )
    room = shutil.disk_usage(place).free
    on_disk = wanted == "disk" or (
        wanted == "auto" and needs.streams > _SHARE * (free - needs.block)
    )
    memory = needs.block + (0 if on_disk else needs.streams)
    disk = needs.journal + needs.result + (needs.streams if on_disk else 0)
    kept = f"hidden states ({console.size(needs.streams)}) {'on disk' if on_disk else 'in RAM'}"
    console.note(
        f"needs about {console.size(memory)} of RAM beside the program ({console.size(free)} free)"
        f" and {console.size(disk)} of disk ({console.size(room)} free); {kept}"
    )
    if memory > free:
        advice = (
            "take fewer --samples, or --store disk"
            if not on_disk
            else "free some, or convert on a machine with more"
        )
        raise RequestError(
            f"the conversion needs about {console.size(memory)} of RAM and {console.size(free)} are"
            f" free; {advice}"
        )
    if disk > room:
        raise RequestError(
            f"the conversion needs about {console.size(disk)} of disk and {place} has"
            f" {console.size(room)}; free some, or choose another OUT"
        )
    return folder if on_disk else None
