"""Kernels for Arm: compiled for it here, and run by an emulator, where both programs are installed
(Debian's gcc-aarch64-linux-gnu and qemu-user).
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kernel_calls import In, Out, array_of, kernel_calls
from native import needs_compiler
from spikellm.kernels.native import build

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
SYSTEM = "/usr/aarch64-linux-gnu"  # the emulated processor's libraries
FOLDER = Path(build.__file__).parent

pytestmark = [
    pytest.mark.usefixtures("native_kernels"),
    pytest.mark.slow,
    needs_compiler,
    pytest.mark.skipif(
        COMPILER is None or EMULATOR is None, reason="no compiler for Arm, or no emulator"
    ),
]


def packed_calls(threads: int) -> bytes:
    """As ``call_kernels.c`` reads them."""

    def number(value: int) -> bytes:
        return struct.pack("<q", value)

    calls = kernel_calls()
    parts = [number(len(calls))]
    for function, arguments in calls:
        name = function.encode()
        parts += [number(len(name)), name, number(len(arguments) + 1)]
        for one in (*arguments, threads):
            if one is None:
                parts.append(b"n")
            elif isinstance(one, (In, Out)):
                content = array_of(one).tobytes()
                kind = b"r" if isinstance(one, In) else b"w"
                parts += [kind, number(len(content)), content]
            elif isinstance(one, float):
                parts += [b"d", struct.pack("<d", one)]
            else:
                parts += [b"i", number(one)]
    return b"".join(parts)


@pytest.mark.parametrize(("level", "flags"), [(0, ()), (1, build._FLAGS["dotprod"])])
def test_every_kernel_gives_the_same_bits(
    level: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    assert COMPILER is not None
    assert EMULATOR is not None
    strict = ("-Wall", "-Wextra", "-Werror", "-fopenmp")
    library, program, calls = tmp_path / "kernels.so", tmp_path / "program", tmp_path / "calls"
    sources = sorted(map(str, FOLDER.glob("*.c")))
    driver = str(Path(__file__).parent / "call_kernels.c")
    for command in (
        [COMPILER, *build.COMMON, *flags, *strict, *sources, "-o", str(library), "-lm"],
        [COMPILER, "-O1", driver, "-o", str(program), "-ldl"],
    ):
        subprocess.run(command, check=True, timeout=300)
    calls.write_bytes(packed_calls(threads=2))
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", "-L", SYSTEM, str(program), str(library), str(calls)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"level {level} of 1, ")
