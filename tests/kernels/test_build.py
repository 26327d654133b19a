from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kernel_calls import In, Out, array_of, kernel_calls
from layers import fit
from native import best_level, forget, needs_compiler
from spikellm.core.errors import DependencyError
from spikellm.kernels import MixSpec, describe, select
from spikellm.kernels.native import build
from spikellm.recipe import ActivationRecipe, LinearRecipe

pytestmark = pytest.mark.usefixtures("native_kernels")


def test_without_a_compiler_torch_is_used_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer = fit(
        nn.Linear(20, 6),
        LinearRecipe(weights={"bits": 4}, activations=ActivationRecipe(bits=4)),
    )
    x = torch.randn(2, 20)
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    expected = layer(x)
    layer.forget()
    monkeypatch.setenv("SPIKELLM_KERNELS", "auto")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert torch.equal(layer(x), expected)
    layer.forget()
    assert torch.equal(layer(x), expected)
    assert [
        record.message for record in caplog.records if "native kernels are off" in record.message
    ] == [caplog.records[0].message]
    assert "torch (native kernels need a C compiler" in describe()
    monkeypatch.setenv("SPIKELLM_KERNELS", "native")
    layer.forget()
    with pytest.raises(DependencyError, match="C compiler"):
        layer(x)


@needs_compiler
def test_a_cache_that_cannot_be_written_or_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for folder, words in (
        (tmp_path / "file", "cannot be kept"),
        (tmp_path / "open", "written to by others"),
    ):
        if folder.name == "open":
            folder.mkdir()
            folder.chmod(0o777)
        monkeypatch.setenv("SPIKELLM_CACHE", str(folder))
        forget()
        with pytest.raises(DependencyError, match=words):
            select(MixSpec(8), "cpu")
        monkeypatch.setenv("SPIKELLM_KERNELS", "auto")
        assert select(MixSpec(8), "cpu").name == "torch"
        monkeypatch.setenv("SPIKELLM_KERNELS", "native")


@needs_compiler
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("SPIKELLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DependencyError, match="fails on the kernels"):
        build.load_library()


@needs_compiler
@pytest.mark.slow
def test_a_compiler_that_knows_no_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if best_level() < build.LEVELS.index("amx"):
        return
    own, fake = build.compiler(), tmp_path / "cc"
    fake.write_text(f"""#!/bin/sh
case "$*" in *amx*) echo unknown option >&2; exit 1;; esac
exec {own} "$@" -O0
""")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("SPIKELLM_CACHE", str(tmp_path / "cache"))
    forget()
    assert build.level_of(build.load_library()) == "avx512"
    forget()
    monkeypatch.setenv("SPIKELLM_KERNELS_LEVEL", "amx")
    with pytest.raises(DependencyError, match="fails on the kernels"):
        build.load_library()


@pytest.mark.parametrize(
    ("name", "value"), [("SPIKELLM_KERNELS", "fast"), ("SPIKELLM_KERNELS_LEVEL", "sse")]
)
def test_unknown_choices(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(DependencyError, match=f"{name} is '{value}'"):
        select(MixSpec(8), "cpu") if name == "SPIKELLM_KERNELS" else build.load_library()


@needs_compiler
def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    told = "build.compile_level('portable', ('-O0',))"  # soon done
    script = f"from spikellm.kernels.native import build; print({told})"
    surroundings = {**os.environ, "SPIKELLM_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=surroundings, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert [path.name for path in tmp_path.iterdir()] == [Path(paths.pop()).name], (
        "no temporary folder is left"
    )


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", build.LEVELS)
def test_no_byte_is_read_or_written_out_of_bounds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer, on arrays of exact
    size.
    """
    if build.LEVELS.index(name) > best_level():
        return
    compiler = build.compiler()
    assert compiler is not None
    monkeypatch.setenv("SPIKELLM_CACHE", str(tmp_path / "cache"))
    library = build.compile_level(
        name, ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    )
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    calls = kernel_calls()
    for index, (_, arguments) in enumerate(calls):
        arrays = {
            str(place): array_of(one)
            for place, one in enumerate(arguments)
            if isinstance(one, (In, Out))
        }
        np.savez(tmp_path / f"{index}.npz", **arrays)
    kinds = [
        (
            function,
            [
                one if isinstance(one, (int, float, type(None))) else type(one).__name__
                for one in arguments
            ],
        )
        for function, arguments in calls
    ]
    (tmp_path / "calls.json").write_text(json.dumps(kinds))
    script = f"""
import ctypes, json, numpy as np
library = ctypes.CDLL({str(library)!r})
library.spikellm_best_level()  # asks the system for tiles
for index, (function, arguments) in enumerate(json.load(open({str(tmp_path / "calls.json")!r}))):
    with np.load(f"{tmp_path}/{{index}}.npz") as file:
        arrays = {{int(key): file[key] for key in file.files}}
    found, passed = {{}}, []
    for place, kind in enumerate(arguments):
        if kind == "Out":
            found[place] = np.empty_like(arrays[place])
        array = found.get(place, arrays.get(place))
        passed.append(
            ctypes.c_void_p(array.ctypes.data)
            if isinstance(kind, str)
            else None
            if kind is None
            else ctypes.c_double(kind)
            if isinstance(kind, float)
            else ctypes.c_int64(kind)
        )
    assert getattr(library, function)(*passed, ctypes.c_int32(2)) == 0
    for place, array in found.items():
        assert np.array_equal(array, arrays[place]), (function, index)
print("clean")
"""
    surroundings = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "PYTHONMALLOC": "malloc",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "clean"


@needs_compiler
@pytest.mark.slow
def test_sources_compile_without_a_warning(tmp_path: Path) -> None:
    folder = Path(build.__file__).parent
    for tool in filter(None, (shutil.which("gcc"), shutil.which("clang"))):
        for level in build.LEVELS if best_level() else ("portable",):
            command = [
                tool,
                *build.COMMON,
                *build._FLAGS[level],
                "-Wall",
                "-Wextra",
                "-Werror",
                *(
                    ("-fopenmp",)
                    if build._has_openmp(tool)
                    else ("-Wno-unknown-pragmas", "-Wno-unused-parameter")
                ),
                *sorted(map(str, folder.glob("*.c"))),
                "-o",
                str(tmp_path / "k.so"),
                "-lm",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
