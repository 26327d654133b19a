from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spikellm
from conftest import PROJECT
from layers import fit
from spikellm.errors import DependencyError
from spikellm.kernels import build, dispatch
from spikellm.kernels.plan import fits
from spikellm.modeling import fast
from spikellm.modeling.additive import AdditiveLinear, plane_sizes
from spikellm.modeling.linear import SpikingLinear
from spikellm.modeling.watching import watching_spikes
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe import ActivationRecipe, LinearRecipe, WeightRecipe

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


def forget() -> None:
    build.load_library.cache_clear()
    dispatch._problem.cache_clear()


def best_level() -> int:
    return int(build._load("portable").spikellm_best_level()) if build.compiler() else 0


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPIKELLM_KERNELS", "native")
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture(params=build.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every set of instructions that this processor bears."""
    name = str(request.param)
    monkeypatch.setenv("SPIKELLM_KERNELS_LEVEL", name)
    forget()
    if build.compiler() is None or build.LEVELS.index(name) > best_level():
        with pytest.raises(DependencyError):
            build.load_library()
        name = ""
    return name


def both(layer: SpikingLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the native kernel and of the torch path."""
    with torch.no_grad():
        assert fast.run(layer, x.reshape(-1, layer.in_features)) is not None, "the kernel is taken"
        found = layer(x)
        os.environ["SPIKELLM_KERNELS"] = "torch"
        try:
            return found, layer(x)
        finally:
            os.environ["SPIKELLM_KERNELS"] = "native"


@st.composite
def layers(draw: st.DrawFn) -> tuple[SpikingLinear, Tensor]:
    """Any layer that codes its inputs, and any inputs, extreme ones too."""
    columns, outputs, tokens = draw(st.integers(1, 300)), draw(st.integers(1, 70)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    signed = draw(st.booleans())
    rate = draw(st.sampled_from([0.0, 0.1, 0.5]))
    chosen = (
        {
            "salient_rate": rate,
            "salient_steps": draw(st.integers(2, 4)),
            "thresholds": draw(st.sampled_from(["shared", "split"])),
            "saliency": "rms",
        }
        if rate
        else {}
    )
    kind = (
        {"neuron": "ternary", "bits": 2, "symmetric": True}
        if signed
        else {"bits": draw(st.integers(2, 6)), "symmetric": draw(st.booleans())}
    )
    activations = ActivationRecipe.model_validate({**kind, **chosen})
    weights = WeightRecipe(bits=draw(st.integers(2, 8)), symmetric=draw(st.booleans()), group_size=draw(st.sampled_from([None, 16, 100])))
    dense = nn.Linear(columns, outputs, bias=draw(st.booleans()))
    nn.init.normal_(dense.weight, generator=generator)
    layer = fit(dense, LinearRecipe(weights=weights, activations=activations), sample=torch.randn(40, columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator) * 10.0 ** draw(st.integers(-4, 4))
    if tokens and draw(st.booleans()):
        x[0] = draw(st.sampled_from([0.0, 1.0, -2.5, 3e38, -3e38, 1e-44]))
    return layer, x


@needs_compiler
@given(drawn=layers())
@settings(max_examples=60)
@pytest.mark.parametrize("level_name", build.LEVELS)
def test_the_same_bits_as_torch(level_name: str, drawn: tuple[SpikingLinear, Tensor]) -> None:
    if build.LEVELS.index(level_name) > best_level():
        return
    layer, x = drawn
    os.environ["SPIKELLM_KERNELS_LEVEL"] = level_name
    forget()
    try:
        shape = fast._shape_of(layer)
        assert shape is not None
        if not fits(shape):
            assert fast.run(layer, x) is None
            return
        found, expected = both(layer, x)
        assert build.level_of(build.load_library()) == level_name
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    finally:
        del os.environ["SPIKELLM_KERNELS_LEVEL"]


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(level: str, value: float) -> None:
    if not level:
        return
    for recipe in (
        ActivationRecipe(bits=4),
        ActivationRecipe(bits=4, symmetric=True),
        ActivationRecipe(neuron="ternary", bits=2, symmetric=True),
    ):
        layer = fit(nn.Linear(40, 5), LinearRecipe(weights=WeightRecipe(bits=4), activations=recipe))
        x = torch.randn(3, 40)
        x[1, 7] = value
        found, expected = both(layer, x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert bool(found[1].isnan().all())
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


@needs_compiler
def test_extreme_codes(level: str) -> None:
    """The largest counts on the largest weights, in every width."""
    if not level:
        return
    for bits in range(2, 9):
        dense = nn.Linear(257, 9, bias=False)
        dense.weight.data = torch.where(torch.rand(9, 257) < 0.5, -1.0, 1.0)
        layer = fit(dense, LinearRecipe(weights=WeightRecipe(bits=bits), activations=ActivationRecipe(bits=6, steps=4)))
        layer.weight_codes.fill_(255)
        if 257 * bits % 8:  # what is beyond the last code stays zero
            layer.weight_codes[:, -1] = 2 ** (257 * bits % 8) - 1
        x = torch.ones(6, 257)
        x[:, ::2] = -1
        found, expected = both(layer, x)
        assert torch.equal(found, expected)


def additive(columns: int, outputs: int, steps: Tensor, generator: torch.Generator, *, bias: bool = False) -> AdditiveLinear:
    settings = LinearRecipe(weights=WeightRecipe(code="ternary", bits=2, symmetric=True), activations=ActivationRecipe(bits=16))
    layer = AdditiveLinear(columns, outputs, settings, bias=bias, sizes=plane_sizes(steps))
    layer.set_groups(torch.zeros(columns, dtype=torch.uint8), steps)
    most = layer.stored(steps).float()
    codes = (torch.rand(outputs, columns, generator=generator) * (2 * most + 1)).floor().sub(most).to(torch.int8)
    groups = len(layer.layout().weight_groups)
    layer.set_weights(
        AffineWeights(codes, torch.rand(outputs, groups, generator=generator) + 0.1, torch.zeros(outputs, groups, dtype=torch.uint8))
    )
    if layer.bias is not None:
        layer.bias.data = torch.randn(outputs, generator=generator)
    return layer


@needs_compiler
@given(st.integers(1, 90), st.integers(1, 140), st.integers(0, 6), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60)
def test_additions_of_ternary_weights(columns: int, outputs: int, tokens: int, most: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, most + 1, (columns,), generator=generator).to(torch.uint8)
    layer = additive(columns, outputs, steps, generator, bias=bias)
    whole = torch.randint(-1000, 1000, (tokens, columns), generator=generator).float()
    found, expected = both(layer, whole)
    assert torch.equal(found, expected), "sums of integers are exact in any order"
    x = torch.randn(tokens, columns, generator=generator)
    found, expected = both(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max()) if tokens else 1.0))


@needs_compiler
@pytest.mark.parametrize("code", ["affine", "ternary"])
def test_every_level_adds_alike(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = (
        additive(70, 80, torch.ones(70, dtype=torch.uint8), generator)
        if code == "ternary"
        else fit(nn.Linear(70, 80), LinearRecipe(activations=ActivationRecipe(bits=4)))
    )
    x, found = torch.randn(3, 70, generator=generator), []
    for name in build.LEVELS[: best_level() + 1]:
        monkeypatch.setenv("SPIKELLM_KERNELS_LEVEL", name)
        forget()
        found.append(fast.run(layer, x))
    assert all(torch.equal(one, found[0]) for one in found)


@needs_compiler
def test_threads_change_nothing() -> None:
    layer = fit(nn.Linear(300, 130), LinearRecipe(weights=WeightRecipe(bits=4), activations=ActivationRecipe(bits=4)))
    x, before = torch.randn(7, 300), torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(fast.run(layer, x))
    finally:
        torch.set_num_threads(before)
    assert outputs[0] is not None
    assert all(torch.equal(outputs[0], other) for other in outputs[1:] if other is not None)


@needs_compiler
def test_operators_are_sound() -> None:
    layer = fit(nn.Linear(20, 6), LinearRecipe(weights=WeightRecipe(bits=4), activations=ActivationRecipe(bits=4)))
    ready, x = fast.prepare(layer), torch.randn(3, 20)
    assert layer.bias is not None
    for bias in (None, layer.bias.float()):
        torch.library.opcheck(
            dispatch.spike_linear, (x, ready.plan, layer.weight_codes, layer.weight_scale, layer.weight_zero, ready.beside, bias, True)
        )
    other = additive(20, 6, torch.ones(20, dtype=torch.uint8), torch.Generator().manual_seed(0))
    ready = fast.prepare(other)
    torch.library.opcheck(dispatch.additive_linear, (x, ready.plan, ready.beside, other.weight_scale, None))


@needs_compiler
@pytest.mark.parametrize("signed", [False, True])
def test_spikes_are_shown_to_whoever_watches(signed: bool) -> None:
    kind: dict[str, Any] = {"neuron": "ternary", "bits": 2, "symmetric": True} if signed else {"bits": 4}
    recipe = ActivationRecipe.model_validate({**kind, "salient_rate": 0.2, "salient_steps": 3, "saliency": "rms"})
    layer = fit(nn.Linear(40, 6), LinearRecipe(weights=WeightRecipe(bits=4), activations=recipe), sample=torch.randn(50, 40))
    x, seen = torch.randn(5, 40), []
    with watching_spikes(seen.append):
        found, expected = both(layer, x)
    native, reference = seen[-2:]
    assert torch.equal(found, expected)
    assert torch.equal(native.codes, reference.codes)
    assert torch.equal(native.steps, reference.steps)
    assert native[:2] == reference[:2]


@needs_compiler
def test_changed_weights_are_seen(converted_folder: Path) -> None:
    layer = fit(nn.Linear(20, 6), LinearRecipe(weights=WeightRecipe(bits=4), activations=ActivationRecipe(bits=4)))
    x = torch.randn(2, 20)
    before = layer(x)
    layer.weight_zero += 1
    found, expected = both(layer, x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


@needs_compiler
def test_gradients_and_compiled_models_take_torch() -> None:
    layer = fit(nn.Linear(20, 6), LinearRecipe(weights=WeightRecipe(bits=4), activations=ActivationRecipe(bits=4)))
    x = torch.randn(2, 20)
    assert fast.run(layer, x.clone().requires_grad_()) is None
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager")
        assert torch.equal(compiled(x), layer(x))


@needs_compiler
def test_a_whole_model_says_the_same_words(converted_folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    model, tokenizer = spikellm.load(converted_folder)
    told, logits = [], []
    for choice in ("native", "torch"):
        monkeypatch.setenv("SPIKELLM_KERNELS", choice)
        told.append(spikellm.generate(model, tokenizer, "Return a list of", max_new_tokens=12))
        logits.append(model(tokens).logits)
    assert told[0] == told[1]
    assert torch.equal(logits[0], logits[1])


def test_without_a_compiler_torch_is_used_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer = fit(nn.Linear(20, 6), LinearRecipe(weights=WeightRecipe(bits=4), activations=ActivationRecipe(bits=4)))
    x = torch.randn(2, 20)
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    expected = layer(x)
    monkeypatch.setenv("SPIKELLM_KERNELS", "auto")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)
    assert [record.message for record in caplog.records if "native kernels are off" in record.message] == [caplog.records[0].message]
    assert "torch (native kernels need a C compiler" in dispatch.describe()
    monkeypatch.setenv("SPIKELLM_KERNELS", "native")
    with pytest.raises(DependencyError, match="C compiler"):
        layer(x)


@needs_compiler
def test_a_cache_that_cannot_be_written_or_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, words in ((tmp_path / "file", "cannot be kept"), (tmp_path / "open", "written to by others")):
        if folder.name == "open":
            folder.mkdir()
            folder.chmod(0o777)
        monkeypatch.setenv("SPIKELLM_CACHE", str(folder))
        forget()
        with pytest.raises(DependencyError, match=words):
            dispatch.native()
        monkeypatch.setenv("SPIKELLM_KERNELS", "auto")
        assert not dispatch.native()
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


@pytest.mark.parametrize(("name", "value"), [("SPIKELLM_KERNELS", "fast"), ("SPIKELLM_KERNELS_LEVEL", "sse")])
def test_unknown_choices(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(DependencyError, match=f"{name} is '{value}'"):
        dispatch.native()


@needs_compiler
def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    script = "from spikellm.kernels import build; print(build.compile_level('portable'))"
    surroundings = {**os.environ, "SPIKELLM_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", script], env=surroundings, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert [path.name for path in tmp_path.iterdir()] == [Path(paths.pop()).name], "no temporary folder is left"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", build.LEVELS)
def test_no_byte_is_read_or_written_out_of_bounds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer, on arrays of exact size."""
    if build.LEVELS.index(name) > best_level():
        return
    compiler = build.compiler()
    assert compiler is not None
    monkeypatch.setenv("SPIKELLM_CACHE", str(tmp_path / "cache"))
    library = build.compile_level(name, ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"))
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    cases: list[dict[str, Any]] = []
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    for index, (columns, outputs, tokens, bits) in enumerate(
        [
            (1, 1, 1, 2),
            (65, 33, 1, 3),
            (65, 33, 7, 3),
            (130, 5, 1, 4),
            (129, 64, 6, 4),
            (257, 31, 1, 8),
            (257, 31, 13, 8),
            (77, 9, 3, 5),
            (300, 40, 1, 2),
        ]
    ):
        recipe = LinearRecipe(
            weights=WeightRecipe(bits=bits), activations=ActivationRecipe(bits=4, salient_rate=0.2, salient_steps=2, saliency="rms")
        )
        layer = fit(nn.Linear(columns, outputs), recipe, sample=torch.randn(30, columns, generator=generator))
        ready, x = fast.prepare(layer), torch.randn(tokens, columns, generator=generator)
        assert layer.bias is not None
        arrays = [x, ready.plan, layer.weight_codes, layer.weight_scale, layer.weight_zero, ready.beside, layer.bias.detach()]
        np.savez(tmp_path / f"{index}.npz", *[array.numpy() for array in arrays], y=layer(x).detach().numpy())
        cases.append({"kernel": "spike", "file": f"{index}.npz"})
    for index, (columns, outputs, tokens) in enumerate([(1, 1, 1), (19, 65, 2), (90, 64, 1), (55, 130, 3)], start=100):
        layer = additive(columns, outputs, torch.randint(1, 4, (columns,), generator=generator).to(torch.uint8), generator, bias=True)
        ready, x = fast.prepare(layer), torch.randint(-9, 9, (tokens, columns), generator=generator).float()
        assert layer.bias is not None
        np.savez(
            tmp_path / f"{index}.npz",
            *[array.numpy() for array in (x, ready.plan, ready.beside, layer.weight_scale, layer.bias.detach())],
            y=layer(x).detach().numpy(),
        )
        cases.append({"kernel": "additive", "file": f"{index}.npz"})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = f"""
import ctypes, json, numpy as np
library = ctypes.CDLL({str(library)!r})
for case in json.load(open({str(tmp_path / "cases.json")!r})):
    with np.load({str(tmp_path)!r} + "/" + case["file"]) as file:
        arrays, y = [file[f"arr_{{i}}"] for i in range(len(file.files) - 1)], file["y"]
    found = np.empty(y.shape, np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    spike = case["kernel"] == "spike"
    counts = np.empty(arrays[0].shape, np.uint8)
    run = library.spikellm_spike_linear if spike else library.spikellm_additive_linear
    ends = [ctypes.c_void_p(found.ctypes.data), *([ctypes.c_void_p(counts.ctypes.data)] if spike else []), ctypes.c_int32(2)]
    assert run(pointers[0], ctypes.c_int64(len(y)), *pointers[1:], *ends) == 0
    assert np.array_equal(found, y), case
print("clean")
"""
    surroundings = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "PYTHONMALLOC": "malloc"}
    done = subprocess.run([sys.executable, "-c", script], env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "clean"


@needs_compiler
def test_sources_compile_without_a_warning(tmp_path: Path) -> None:
    folder = PROJECT / "src" / "spikellm" / "kernels" / "native"
    for tool in filter(None, (shutil.which("gcc"), shutil.which("clang"))):
        for level in build.LEVELS if best_level() else ("portable",):
            command = [
                tool,
                *build.COMMON,
                *build._FLAGS[level],
                "-Wall",
                "-Wextra",
                "-Werror",
                *(("-fopenmp",) if build._has_openmp(tool) else ("-Wno-unknown-pragmas", "-Wno-unused-parameter")),
                *sorted(map(str, folder.glob("*.c"))),
                "-o",
                str(tmp_path / "k.so"),
                "-lm",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
