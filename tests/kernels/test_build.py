from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heads import coder_and_heads
from layers import fit
from native import additive, best_level, forget, needs_compiler
from spikellm.core.errors import DependencyError
from spikellm.kernels import MixSpec, RowSpec, describe, select
from spikellm.kernels.native import build, ops
from spikellm.kernels.native.backend import NativeHeads
from spikellm.kernels.native.rotation import NativeRotation
from spikellm.kernels.native.weight_only_plan import make_weight_only_plan
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.packed_kv import PackedKV
from spikellm.quantization import hadamard
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


class In(NamedTuple):
    """An array that a kernel reads."""

    array: Tensor


class Out(NamedTuple):
    """An array that a kernel writes, as it has to be afterwards."""

    array: Tensor


Call = tuple[str, list[Any]]


def linear_calls() -> Iterator[Call]:
    """Layers of awkward sizes: function, then its arguments without the number of threads."""
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (1, 1, 1, 2),
        (65, 33, 1, 3),
        (65, 33, 7, 3),
        (130, 5, 1, 4),
        (129, 64, 6, 4),
        (257, 31, 1, 8),
        (257, 31, 13, 8),
        (77, 9, 3, 5),
        (300, 40, 1, 2),
        (130, 70, 33, 4),
        (257, 31, 40, 8),
    ]
    for columns, outputs, tokens, bits in sizes:
        activations = ActivationRecipe(bits=4, salient_rate=0.2, salient_steps=2, saliency="rms")
        recipe = LinearRecipe(weights={"bits": bits}, activations=activations)
        layer = fit(
            nn.Linear(columns, outputs),
            recipe,
            sample=torch.randn(30, columns, generator=generator),
        )
        x = torch.randn(tokens, columns, generator=generator)
        yield from calls_of("spikellm_spike_linear", layer, x)
    for columns, outputs, tokens in [(1, 1, 1), (19, 65, 2), (90, 64, 1), (55, 130, 3)]:
        layer = additive(
            columns,
            outputs,
            torch.randint(1, 4, (columns,), generator=generator).to(torch.uint8),
            generator,
            bias=True,
        )
        x = torch.randint(-9, 9, (tokens, columns), generator=generator).float()
        yield from calls_of("spikellm_additive_linear", layer, x)


def weight_only_calls() -> Iterator[Call]:
    """Weights on inputs that are not coded, of every width: sums, strips, and rows."""
    generator = torch.Generator().manual_seed(1)
    for bits, (columns, outputs, tokens) in itertools.product(
        range(2, 9), [(1, 1, 1), (77, 35, 5), (129, 9, 1)]
    ):
        weights = {"bits": bits, "group_size": 50}
        recipe = LinearRecipe(weights=weights, activations=ActivationRecipe(bits=16))
        layer = fit(nn.Linear(columns, outputs), recipe)
        x = torch.randn(tokens, columns, generator=generator)
        yield from calls_of("spikellm_weight_only_linear", layer, x)
        assert layer._kernels is not None
        plan, codes, scale, zero, _ = layer._kernels.chosen.operands
        stored = [In(plan), In(codes), In(scale), In(zero)]
        spec = RowSpec(layer.spec())
        rows = torch.randint(0, outputs, (4,), generator=generator)
        for kind, dtype in enumerate((torch.float32, torch.bfloat16)):
            found = select(spec, "cpu").prepare_rows(spec, layer)(rows, dtype)
            yield "spikellm_weight_only_rows", [In(rows), 4, *stored, Out(found), kind]
        places = make_weight_only_plan(layer.spec()).order
        k, strip = torch.empty(outputs, len(places)), build.load_library()
        pointers = [plan.data_ptr(), codes.data_ptr(), None, zero.data_ptr()]
        strip.spikellm_weight_only_strip(*pointers, 0, outputs, k.data_ptr(), 1)
        real = places < columns  # at others inputs are zero
        assert torch.equal(k[:, real], layer.integer_weights().float()[:, places[real]])
        yield "spikellm_weight_only_strip", [*stored[:2], None, stored[3], 0, outputs, Out(k)]


def calls_of(function: str, layer: SpikingLinear, x: Tensor) -> Iterator[Call]:
    """A layer's call with inputs of either type."""
    for kind, dtype in enumerate((torch.float32, torch.bfloat16)):
        values = x.to(dtype)
        y, counts = layer(values), []
        assert layer._kernels is not None
        operands = list(map(In, layer._kernels.chosen.operands))
        if function == "spikellm_spike_linear":
            shown = len(layer.spec().bounds)
            found = ops.spike_linear(values, *layer._kernels.chosen.operands, shown)
            counts = [Out(one) for one in found[1:]]
            plan = layer._kernels.chosen.operands[0]
            size = build.load_library().spikellm_coded_bytes(plan.data_ptr(), len(x))
            memory = [In(torch.full((size,), 255, dtype=torch.uint8)), 0]
            counts += [None, 0]
            shared = [In(values), len(x), *operands, Out(y.detach()), None, None, *memory, kind]
            yield function, shared
        yield function, [In(values), len(x), *operands, Out(y.detach()), *counts, kind]


def head_calls() -> Iterator[Call]:
    """Coders of awkward sizes."""
    for bits, extra in [
        (4, {}),
        (4, {"thresholds": "split"}),
        (3, {"thresholds": "shared"}),
        (8, {}),
    ]:
        for channels in (2, 35, 70):
            chosen = (
                {"salient_rate": 0.3, "salient_steps": 2, "saliency": "rms", **extra}
                if extra
                else {}
            )
            coder, x, _ = coder_and_heads(
                ActivationRecipe.model_validate({"bits": bits, **chosen}), channels, 7
            )
            query, weights = torch.randn(2, 6, 3, channels), torch.rand(2, 6, 3, 5)
            kernels = coder.chosen()
            assert isinstance(kernels, NativeHeads)
            plan, cached = kernels.plan, PackedKV(coder.to_rows(x), kernels, channels)
            sizes, shared = (
                (2, 3, 5),
                (
                    2,
                    3,
                    2,
                    3,
                ),
            )  # batch, heads, tokens; batch, heads, query heads to each, queries
            yield "spikellm_code_heads", [In(x), *sizes, In(plan), Out(cached.rows), None]
            yield (
                "spikellm_code_heads",
                [
                    In(x),
                    *sizes,
                    In(plan),
                    None,
                    Out(coder.fake_quantize(x)),
                ],
            )
            yield (
                "spikellm_key_scores",
                [
                    In(query),
                    *shared,
                    In(cached.rows),
                    5,
                    In(plan),
                    Out(cached.scores(query)),
                ],
            )
            yield (
                "spikellm_value_sums",
                [
                    In(weights),
                    *shared,
                    In(cached.rows),
                    5,
                    In(plan),
                    Out(cached.sums(weights)),
                ],
            )


def rotation_calls() -> Iterator[Call]:
    """Inputs of either type, with and without what is taken away."""
    generator = torch.Generator().manual_seed(3)
    for channels, tokens, dtype in [(1, 1, torch.float32), (70, 3, torch.bfloat16)]:
        signs, offset = torch.ones(channels), torch.randn(channels, generator=generator)
        x = torch.randn(tokens, channels, generator=generator).to(dtype)
        power = hadamard.largest_power(channels)
        for taken in (None, offset):
            yield (
                "spikellm_rotate",
                [
                    *(In(x), tokens, channels, power, math.sqrt(power)),
                    *(In(hadamard.shapiro(power)), In(signs)),
                    None if taken is None else In(taken),
                    Out(NativeRotation(signs, taken)(x)),
                    ops.TYPES[dtype],
                ],
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
    calls = [*linear_calls(), *weight_only_calls(), *head_calls(), *rotation_calls()]
    for index, (_, arguments) in enumerate(calls):
        arrays = {
            str(place): (
                one.array.view(torch.int16) if one.array.dtype == torch.bfloat16 else one.array
            ).numpy()
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
