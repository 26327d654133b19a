"""Memory of processes."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if (
        sys.platform == "linux"
    ):  # getrusage would count what the parent held when this process was started
        peak = _high_water_mark("self")
        if peak is not None:
            return peak
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def memory_of(process: int) -> int | None:
    """Largest resident memory of another process so far, bytes; where the system does not keep
    that, what is resident now. None where the process has ended.
    """
    peak = _high_water_mark(str(process)) if sys.platform == "linux" else None
    if peak is not None:
        return peak
    import psutil

    try:
        found = psutil.Process(process).memory_info()
    except psutil.Error:
        return None
    return int(getattr(found, "peak_wset", found.rss))


def _high_water_mark(process: str) -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
