"""How far a conversion is, in words."""

from __future__ import annotations

from spikellm.conversion.record import OnBlock, Progress
from spikellm.core import console


def report_block() -> OnBlock:
    """A callback that prints a line for each block: error, time, memory."""

    def on_block(progress: Progress) -> None:
        record = progress.record
        place = f"block {progress.index + 1}/{progress.total}"
        if not record.layers:
            console.note(f"{place}  skipped, as the recipe says")
            return
        for note in record.notes:
            console.note(note)
        kept = "  (from the interrupted run)" if progress.resumed else ""
        console.note(
            f"{place}  loss {record.loss:.3e} ({record.relative_loss:.2%})"
            f"  {progress.seconds:.1f} s  peak {console.size(progress.peak_memory)}{kept}"
        )

    return on_block
