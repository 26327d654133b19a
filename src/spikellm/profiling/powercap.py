"""Measured energy: the counters that Linux shows under ``/sys/class/powercap`` (RAPL and the like),
where the machine has them and lets us read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/class/powercap")


class Counter(NamedTuple):
    """One counter: its name, the file that it is read from, and where it wraps around, µJ."""

    name: str
    file: Path
    wraps_at: int


class Meter:
    """Reads all top-level counters; parts of a package, which it already contains, are left out.

    Args:
        root: folder of the counters.

    Attributes:
        missing: why there is nothing to read, in words; None where there is.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.counters: list[Counter] = []
        self.missing: str | None = None
        zones = (
            sorted(zone for zone in root.glob("*:*") if zone.name.count(":") == 1)
            if root.is_dir()
            else []
        )
        refused = []
        for zone in zones:
            try:
                name, limit = (
                    (zone / "name").read_text().strip(),
                    int((zone / "max_energy_range_uj").read_text()),
                )
                int((zone / "energy_uj").read_text())
            except PermissionError:
                refused.append(zone.name)
            except (OSError, ValueError):
                continue
            else:
                self.counters.append(Counter(name, zone / "energy_uj", limit))
        if not self.counters:
            why = f"{refused[0]} may be read by root alone" if refused else f"{root} has no counter"
            self.missing = (
                f"this machine shows no energy counter ({why}), so energy was not measured"
            )

    def read(self) -> list[int]:
        """All counters, µJ."""
        return [int(counter.file.read_text()) for counter in self.counters]

    def joules(self, before: list[int], after: list[int]) -> float:
        """Energy between two readings, J; a counter may have started again once in between."""
        spent = (
            late - early if late >= early else late - early + counter.wraps_at
            for counter, early, late in zip(self.counters, before, after, strict=True)
        )
        return sum(spent) / 1e6
