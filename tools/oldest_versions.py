"""Print the oldest versions that the package's dependencies may have, as constraints for pip, all
taken together by a resolver (`pip install uv`); torch stays at its documented version.

    python tools/oldest_versions.py > oldest.txt
    python -m venv oldest && oldest/bin/pip install -c oldest.txt '.[report,serve,gguf,nir,lora]'
    oldest/bin/spikellm demo
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]
EXTRAS = ("report", "serve", "gguf", "nir", "lora")
_ACCELERATORS = re.compile(r"^(nvidia|cuda|triton|torch)\b")


def main() -> None:
    """Resolve, and leave out what belongs to a GPU."""
    torch = re.search(r"^torch==\S+", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch
    version = ".".join(map(str, sys.version_info[:2]))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
        pinned.write(f"{torch[0]}\n")
        pinned.flush()
        command = ["uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct"]
        command += ["--override", pinned.name, "--python-version", version]
        command += [part for extra in EXTRAS for part in ("--extra", extra)]
        done = subprocess.run(
            [*command, *sys.argv[1:], str(PROJECT / "pyproject.toml")],
            check=True,
            capture_output=True,
            text=True,
        )
    lines = [line for line in done.stdout.splitlines() if re.match(r"[a-z]", line)]
    print("\n".join([*(line for line in lines if not _ACCELERATORS.match(line)), torch[0]]))


if __name__ == "__main__":
    main()
