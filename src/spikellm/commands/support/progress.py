"""How far a conversion is, in words."""

from __future__ import annotations

from spikellm.conversion.record import OnBlock, Progress
from spikellm.core import console
from spikellm.training.loop import OnStep, StepProgress


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


def report_step() -> OnStep:
    """A callback that prints a line for each update: loss, time to go."""

    def on_step(progress: StepProgress) -> None:
        parts = [f"update {progress.step}/{progress.steps}"]
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if progress.held_out is not None:
            parts.append(f"held out {progress.held_out:.4f}")
        if progress.seconds_left:
            parts.append(f"{_duration(progress.seconds_left)} to go")
        console.note("  ".join(parts))

    return on_step


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
