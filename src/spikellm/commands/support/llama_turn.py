"""One turn of llama.cpp on the clock: its own ``llama-bench`` as a process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spikellm.core.errors import SpikeLLMError
from spikellm.core.memory import memory_of

if TYPE_CHECKING:
    from spikellm.commands.support.timing import Run, Work

KIND = "llama-bench"
_LOOK = 0.25  # seconds between two looks at the memory of the program, which cost it time


class Peer(NamedTuple):
    """What is run.

    Attributes:
        name: of its row.
        matrices: how many of the file have which type; None of a file that was there.
    """

    program: str
    file: Path
    name: str
    matrices: dict[str, int] | None

    def turn(self, work: Work) -> Run:
        """One turn: the prompt, then tokens after as long a prompt, each behind a pass to warm up.
        Memory is that of the whole process. No layer is put on a GPU.

        Raises:
            SpikeLLMError: the program failed, or says something else than expected.
        """
        import torch

        from spikellm.commands.support.timing import Run

        threads = work.threads or torch.get_num_threads()
        command = [self.program, "-m", str(self.file), "-t", str(threads), "-ngl", "0"]
        command += ["-r", "1", "-o", "json"]
        prefill, first_peak = _measured([*command, "-p", str(work.prompt), "-n", "0"])
        decode, later_peak = _measured(
            [*command, "-p", "0", "-n", str(work.new), "-d", str(work.prompt)]
        )
        peaks = [peak for peak in (first_peak, later_peak) if peak is not None]
        return Run(
            KIND,
            work.prompt / prefill["avg_ts"],
            work.new / decode["avg_ts"],
            max(peaks, default=None),
            f"llama.cpp {decode.get('build_number', '')}: {self._contents(decode)}",
            None,
            None,
        )

    def _contents(self, found: dict[str, Any]) -> str:
        if self.matrices is None:
            return str(found.get("model_type", ""))
        return ", ".join(f"{count} {kind}" for kind, count in self.matrices.items())


def _measured(command: list[str]) -> tuple[dict[str, Any], int | None]:
    """The one record that the program prints, and the largest memory of its process, bytes."""
    code, printed, said, peak = _run(command)
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    if code != 0:
        raise SpikeLLMError(f"{command[0]} ended with {code}: {last[:200]}")
    try:
        (record,) = json.loads(printed)
        if record["avg_ts"] > 0:
            return record, peak
    except (ValueError, TypeError, KeyError):
        pass
    raise SpikeLLMError(
        f"{command[0]} printed no rate of one test as JSON; expected llama.cpp's llama-bench of"
        " 2025 or later"
    )


def _run(command: list[str]) -> tuple[int, str, str, int | None]:
    """Exit code, standard output, standard error and largest memory seen of a program."""
    pipe = subprocess.PIPE
    peak = None
    try:
        process = subprocess.Popen(  # noqa: S603  the user's program, no shell
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
    except OSError as error:
        raise SpikeLLMError(f"{command[0]} cannot be run: {error.strerror}") from None
    with process:
        try:
            while True:
                peak = memory_of(process.pid) or peak
                try:
                    printed, said = process.communicate(timeout=_LOOK)
                    return process.returncode, printed, said, peak
                except subprocess.TimeoutExpired:
                    pass
        finally:
            process.kill()
