"""Compile the native kernels on first use and load them.

A library is one level (portable, avx2, avx512, amx; on Arm portable, dotprod): the same sources
with other flags, in the user's cache under a name made from sources, flags and compiler. It is
written to a temporary name and renamed, so two processes do not disturb each other. Only a library
in a folder of the user's own, which others cannot write to, is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import platformdirs

from spikellm.core.errors import DependencyError

_ON_ARM = platform.machine().lower() in ("aarch64", "arm64")
LEVELS = ("portable", "dotprod") if _ON_ARM else ("portable", "avx2", "avx512", "amx")
"""Of this kind of processor, each more than the one before."""
_AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi"))
_FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "dotprod": ("-march=armv8.2-a+dotprod",),
}
COMMON = (
    *("-std=c11", "-O3", "-fPIC", "-shared", "-pthread"),
    *("-ffp-contract=off", "-fopenmp-simd"),
)
_TIMEOUT = 120


def level_wanted() -> str | None:
    """The level that the user asked for in ``SPIKELLM_KERNELS_LEVEL``; None for the best.

    Raises:
        DependencyError: there is none of that name.
    """
    level = os.environ.get("SPIKELLM_KERNELS_LEVEL") or None
    if level is not None and level not in LEVELS:
        raise DependencyError(f"SPIKELLM_KERNELS_LEVEL is {level!r}; expected {', '.join(LEVELS)}")
    return level


def cache_folder() -> Path:
    """Where libraries are kept: ``SPIKELLM_CACHE``, or ``spikellm`` in the user's cache."""
    if own := os.environ.get("SPIKELLM_CACHE"):
        return Path(own)
    return Path(platformdirs.user_cache_dir("spikellm", appauthor=False))


def compiler() -> str | None:
    """Path of a C compiler: ``CC``, else cc, gcc or clang."""
    return next(
        (
            path
            for name in (os.environ.get("CC"), "cc", "gcc", "clang")
            if name and (path := shutil.which(name))
        ),
        None,
    )


@cache
def load_library() -> ctypes.CDLL:
    """The library of the best level that this processor and the user allow.

    Raises:
        DependencyError: no compiler, it fails, the processor lacks a level that was asked for, or
            the cache cannot be written to.
    """
    wanted = level_wanted()
    portable = _load("portable")
    best = LEVELS[portable.spikellm_best_level()]
    if wanted is not None and LEVELS.index(wanted) > LEVELS.index(best):
        raise DependencyError(
            f"SPIKELLM_KERNELS_LEVEL is {wanted}, but this processor has {best} at most"
        )
    level = wanted or best
    if level == "portable":
        return portable
    try:
        return _load(level)
    except DependencyError:
        if wanted is not None or level != "amx":
            raise
        return _load("avx512")  # of compilers that know no tiles


def level_of(library: ctypes.CDLL) -> str:
    """Level that a library was compiled for."""
    return LEVELS[library.spikellm_level()]


def _load(level: str) -> ctypes.CDLL:
    path = compile_level(level)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise DependencyError(
            f"the compiled kernels cannot be loaded ({error}); delete {path} to compile them again"
        ) from None
    pointer = ctypes.c_void_p
    library.spikellm_spike_linear.argtypes = [
        pointer,
        ctypes.c_int64,
        *[pointer] * 10,
        *[ctypes.c_int32] * 3,
    ]
    library.spikellm_column_sums.argtypes = [*[pointer] * 4, ctypes.c_int32]
    library.spikellm_coded_bytes.argtypes = [pointer, ctypes.c_int64]
    library.spikellm_coded_bytes.restype = ctypes.c_int64
    library.spikellm_additive_linear.argtypes = [
        pointer,
        ctypes.c_int64,
        *[pointer] * 5,
        *[ctypes.c_int32] * 2,
    ]
    scalars = [ctypes.c_int32] * 2
    wide = ctypes.c_int64
    library.spikellm_weight_only_linear.argtypes = [pointer, wide, *[pointer] * 6, *scalars]
    library.spikellm_weight_only_strip.argtypes = [*[pointer] * 4, wide, wide, pointer, scalars[0]]
    library.spikellm_weight_only_rows.argtypes = [pointer, wide, *[pointer] * 5, *scalars]
    library.spikellm_partly_binary_linear.argtypes = [pointer, wide, *[pointer] * 10, *scalars]
    library.spikellm_partly_binary_strip.argtypes = [
        *[pointer] * 8,
        *[wide] * 2,
        pointer,
        scalars[0],
    ]
    library.spikellm_code_heads.argtypes = [
        pointer,
        *[ctypes.c_int64] * 3,
        *[pointer] * 3,
        ctypes.c_int32,
    ]
    sizes, trained = (ctypes.c_int64, pointer, pointer), [ctypes.c_int32] * 3
    library.spikellm_code_values.argtypes = [pointer, *sizes, pointer, *trained]
    library.spikellm_code_gradients.argtypes = [*[pointer] * 2, *sizes, *[pointer] * 2, *trained]
    library.spikellm_attend.argtypes = [*[pointer] * 6, *[ctypes.c_float] * 2]
    library.spikellm_step.argtypes = [pointer, pointer]
    strided = (pointer, ctypes.c_int64, ctypes.c_int64)
    library.spikellm_sum_by_channel.argtypes = [*strided * 3, pointer, ctypes.c_int32]
    for mix in (library.spikellm_mix, library.spikellm_mix_double):
        lengths = [ctypes.c_int64] * 3
        mix.argtypes = [pointer, *lengths, ctypes.c_double, pointer, pointer, ctypes.c_int32]
    library.spikellm_rotate.argtypes = [
        pointer,
        *[ctypes.c_int64] * 3,
        ctypes.c_double,
        *[pointer] * 4,
        *[ctypes.c_int32] * 2,
    ]
    for product in (library.spikellm_key_scores, library.spikellm_value_sums):
        product.argtypes = [
            pointer,
            *[ctypes.c_int64] * 4,
            pointer,
            ctypes.c_int64,
            pointer,
            pointer,
            ctypes.c_int32,
        ]
    return library


def sources() -> dict[str, str]:
    """Sources by file name."""
    folder = resources.files("spikellm.kernels.native")
    return {
        entry.name: entry.read_text("utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith((".c", ".h"))
    }


def compile_level(level: str, extra: tuple[str, ...] = ()) -> Path:
    """Path of the library of a level, compiled if it is not in the cache.

    Args:
        extra: more flags, for example a sanitizer's.

    Raises:
        DependencyError: see :func:`load_library`.
    """
    tool = compiler()
    if tool is None:
        raise DependencyError(
            "native kernels need a C compiler, and none was found (cc, gcc, clang, or CC); on"
            " Debian: apt-get install gcc"
        )
    flags = [*COMMON, *_FLAGS[level], *(("-fopenmp",) if _has_openmp(tool) else ()), *extra]
    files = sources()
    told = "\0".join(
        [
            tool,
            _version(tool),
            platform.machine(),
            *flags,
            *(name + files[name] for name in sorted(files)),
        ]
    )
    folder = cache_folder()
    path = folder / f"kernels-{level}-{hashlib.sha256(told.encode()).hexdigest()[:20]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(folder)
        if path.exists():
            _require_private(path)
            return path
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
            for name, text in files.items():
                (Path(work) / name).write_text(text, encoding="utf-8")
            units = sorted(name for name in files if name.endswith(".c"))
            result = Path(work) / "kernels.so"
            _run([tool, *flags, *units, "-o", result.name, "-lm"], work)
            result.chmod(0o700)
            result.replace(path)
    except OSError as error:
        raise DependencyError(
            f"kernels cannot be kept in {folder} ({error.strerror or error}); name a folder of your"
            " own in SPIKELLM_CACHE"
        ) from None
    return path


def _require_private(path: Path) -> None:
    """Refuse what others could have written."""
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DependencyError(
            f"{path} may be written to by others, so no code is loaded from there; chmod go-w it,"
            " or name a folder of your own in SPIKELLM_CACHE"
        )


@cache
def _version(tool: str) -> str:
    return _run([tool, "--version"], None)


@cache
def _has_openmp(tool: str) -> bool:
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "probe.c").write_text(
            "#include <omp.h>\nint probe(void) { return omp_get_max_threads(); }\n",
            encoding="utf-8",
        )
        try:
            _run([tool, "-fopenmp", "-fPIC", "-shared", "probe.c", "-o", "probe.so"], work)
        except DependencyError:
            return False
        return True


def _run(command: list[str], folder: str | None) -> str:
    try:
        done = subprocess.run(  # noqa: S603  a compiler, no shell
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DependencyError(
            f"the compiler {command[0]} does not run ({error}); name another one in CC"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DependencyError(
            f"the compiler {command[0]} fails on the kernels ({lines[0][:200]}); name another one"
            " in CC"
        )
    return done.stdout
