"""Files that somebody made to do harm: always the project's own error in one line, or a model that
runs; no crash, no hang, no memory, nothing outside the folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import spikellm
from budget import examples
from conftest import BUNDLED
from spikellm.conversion.journal import Journal
from spikellm.core.errors import CheckpointError, RequestError, SpikeLLMError
from spikellm.core.io import PlainDataError, read_json
from spikellm.profiling.energy_table import load_table
from spikellm.recipe.load import load_recipe

ASSETS = Path(spikellm.__file__).parent
IDENTITY = {"recipe": {}, "text": "abc", "versions": {"torch": "2"}, "model": "a", "device": "cpu"}
IN_FIXTURES = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/dev/zero", "a" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "[" * 5000,
        "a: " + "x" * (2 << 20),
        "!!python/object/apply:os.system ['true']",
        "a: 2022-13-45",
        "\x00",
        "a: 1e99999999",
    ],
)
def test_yaml_that_means_harm(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for read in (load_recipe, load_table):
        with pytest.raises(RequestError) as caught:
            read(str(path))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_no_more_is_read_than_is_allowed(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    with open(large, "wb") as file:
        file.truncate(3 << 30)
    with limited(256 << 20):
        for source, message in (
            (large, "more than 1,048,576 bytes"),
            (Path("/dev/zero"), "neither a file nor a pipe"),
        ):
            for read in (load_recipe, load_table):
                with pytest.raises(RequestError, match=message):
                    read(str(source))
        with pytest.raises(PlainDataError, match="more than 100,000,000 bytes"):
            read_json(large)


@pytest.mark.parametrize(
    ("read", "text"), [(load_recipe, "weights: {bits: 3}"), (load_table, None)]
)
def test_pipes_are_read(read: Callable[..., Any], text: str | None, tmp_path: Path) -> None:
    text = text or (ASSETS / "profiling" / "energy_tables" / "horowitz-45nm.yaml").read_text(
        encoding="utf-8"
    )
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text, encoding="utf-8"))
    writer.start()
    assert read(str(tmp_path / "pipe")).name
    writer.join()


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@examples(200, **IN_FIXTURES)
def test_any_bytes_as_a_recipe(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    try:
        load_recipe(str(path))
    except SpikeLLMError as error:
        assert "\n" not in str(error)  # noqa: PT017


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within plain data."""
    children = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    return [path, *(place for key, value in children for place in places(value, (*path, key)))]


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The data with another value at a place."""
    if not path:
        return value
    data[path[0]] = changed(data[path[0]], path[1:], value)
    return data


@st.composite
def changes(draw: st.DrawFn, folder: Path, section: str) -> Any:
    data = json.loads((folder / "config.json").read_text())
    part = data[section] if section else data
    path = draw(st.sampled_from(places(part)))
    made = changed(part, path, draw(VALUES))
    return {**data, section: made} if section else made


def loads_or_says_why(folder: Path) -> None:
    try:
        model, _ = spikellm.load(folder)
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    except SpikeLLMError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017


@pytest.fixture
def copy(converted_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted_folder, tmp_path / "copy"))


def configurations(copy: Path, converted_folder: Path, data: Any) -> None:
    config = data.draw(changes(converted_folder, "quantization_config"))
    (copy / "config.json").write_text(json.dumps(config))
    loads_or_says_why(copy)


def shards(copy: Path, converted_folder: Path, data: Any) -> None:
    """Truncated anywhere, bytes of the header changed, lengths that lie."""
    whole = (converted_folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    kind = data.draw(st.sampled_from(["cut", "header", "length", "longer"]))
    if kind == "cut":
        made = whole[
            : data.draw(
                st.one_of(
                    st.integers(0, 16), st.integers(0, length + 8), st.integers(0, len(whole) - 1)
                )
            )
        ]
    elif kind == "header":
        at = 8 + data.draw(st.integers(0, length - 1))
        made = whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at + 1 :]
    elif kind == "length":
        made = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + whole[8:]
    else:
        made = whole + b"\0" * data.draw(st.integers(1, 100))
    (copy / "model.safetensors").write_bytes(made)
    loads_or_says_why(copy)


def tensors(copy: Path, converted_folder: Path, data: Any) -> None:
    """Other shapes, other types, any codes."""
    state = load_file(converted_folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(state)))
    kind = data.draw(st.sampled_from(["noise", "shape", "type", "missing"]))
    tensor = state[name]
    if kind == "noise":
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        state[name] = (
            torch.randint(
                0,
                256,
                (tensor.numel() * tensor.element_size(),),
                generator=generator,
                dtype=torch.uint8,
            )
            .view(tensor.dtype)
            .view(tensor.shape)
        )
    elif kind == "shape":
        state[name] = torch.zeros(
            data.draw(st.lists(st.integers(0, 7), max_size=3)), dtype=tensor.dtype
        )
    elif kind == "type":
        state[name] = tensor.to(
            data.draw(st.sampled_from([torch.float64, torch.int64, torch.bool, torch.float16]))
        )
    else:
        del state[name]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    loads_or_says_why(copy)


DAMAGE = [configurations, shards, tensors]


@pytest.mark.parametrize("damage", DAMAGE)
@given(data=st.data())
@examples(15, **IN_FIXTURES)
def test_damaged_models(
    damage: Callable[..., None], copy: Path, converted_folder: Path, data: Any
) -> None:
    damage(copy, converted_folder, data)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGE)
@given(data=st.data())
@examples(150, **IN_FIXTURES)
def test_many_damaged_models(
    damage: Callable[..., None], copy: Path, converted_folder: Path, data: Any
) -> None:
    damage(copy, converted_folder, data)


@example('{"\\n": 1}')
@example(json.dumps({**IDENTITY, "text": "other"}))
@example(json.dumps({**IDENTITY, "recipe": {"a\nb": 1}}))
@example(json.dumps({**IDENTITY, "more": 1}))
@given(st.text(max_size=50) | VALUES.map(json.dumps))
@examples(100, **IN_FIXTURES)
def test_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RequestError) as caught:
        Journal(tmp_path, IDENTITY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", 7, None]
)
def test_an_index_reads_nothing_outside_its_folder(copy: Path, name: Any) -> None:
    shutil.copy(copy / "model.safetensors", copy.parent / "outside.safetensors")
    names = list(load_file(copy / "model.safetensors"))
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)})
    )
    with pytest.raises(SpikeLLMError, match="index"):
        spikellm.load(copy)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        (
            "tokenizer_config.json",
            "fast_tokenizer_files",
            ["../outside/tokenizer.4.0.json"],
            "which is no file name in this folder",
        ),
        (
            "tokenizer_config.json",
            "merges_file",
            "/etc/passwd",
            "which is no file name in this folder",
        ),
        ("tokenizer_config.json", "vocab", "..", "which is no file name in this folder"),
        ("config.json", "attn_implementation", "somebody/kernels", "which is code from the hub"),
        (
            "config.json",
            "_attn_implementation",
            "somebody/kernels:flash@main",
            "which is code from the hub",
        ),
        (
            "config.json",
            "attn_implementation",
            {"text_config": "somebody/kernels"},
            "which is code from the hub",
        ),
        (
            "config.json",
            "text_config",
            {"_experts_implementation": "a/b"},
            "which is code from the hub",
        ),
        ("adapter_config.json", "base_model_name_or_path", "somebody/model", "merge the adapter"),
    ],
)
def test_a_folder_names_nothing_outside_it(
    file: str, key: str, value: Any, message: str, copy: Path
) -> None:
    path = copy / file
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), key: value})
    )
    with pytest.raises(SpikeLLMError, match=message):
        spikellm.load(copy)


def test_paths_that_older_tokenizers_note_are_not_read(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "special_tokens_map_file": "/elsewhere/special_tokens_map.json",
            }
        )
    )
    assert len(spikellm.load(copy)[1]) == 2048


def test_declared_sizes_take_no_memory(copy: Path) -> None:
    """A layer that says it has 2**39 salient weights is refused before anything of that size is
    made.
    """
    config = json.loads((copy / "config.json").read_text())
    name = config["quantization_config"]["modules"][0]
    config["quantization_config"]["sizes"] = {name: [2**39]}
    config["quantization_config"]["recipe"]["weights"] = {
        "code": "ternary",
        "bits": 2,
        "symmetric": True,
    }
    config["quantization_config"]["recipe"]["pipeline"] = "gptq"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpikeLLMError):
        spikellm.load(copy)


@pytest.mark.parametrize("converted", [False, True])
def test_numbers_that_the_model_does_not_use_are_no_sizes(
    converted: bool, copy: Path, tmp_path: Path
) -> None:
    """Whatever they are called: what counts is what the library builds."""
    folder = copy if converted else Path(shutil.copytree(BUNDLED, tmp_path / "original"))
    config = json.loads((folder / "config.json").read_text())
    unused = {"hash_buckets_size": 10**15, "n_layer": 10**12, "num_layers": 10**9, "n_ctx": 2**62}
    config |= {**unused, "audio_config": {"hidden_size": 10**18, "num_hidden_layers": 10**9}}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = spikellm.load(folder)
    assert len(model.model.layers) == 5


def test_layers_are_counted_by_the_names_of_their_family() -> None:
    """Of families that call them otherwise, and of parts of a model."""
    from spikellm.checkpoint.outline import require_few_layers
    from spikellm.checkpoint.shards import Shards

    for config in (
        {"model_type": "gpt2", "n_layer": 10**12},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**12}},
        {"num_hidden_layers": 10**12},
        {"model_type": "llama", "num_labels": 10**12},
    ):
        with pytest.raises(CheckpointError, match="declares n.* 1000000000000, and the shards"):
            require_few_layers(config, Shards({}, 0), "here")
    require_few_layers({"model_type": "llama", "n_layer": 10**12}, Shards({}, 0), "here")


def test_a_build_without_end_is_stopped() -> None:
    from spikellm.checkpoint.outline import bounded_build
    from spikellm.checkpoint.shards import Shards, StoredTensor

    def build(layers: int) -> None:
        torch.nn.ModuleList(torch.nn.Linear(1, 1, device="meta") for _ in range(layers))

    shards = Shards({"a": StoredTensor("F32", (1,))}, 100)
    with bounded_build(shards, "here"):
        build(2000)
        with pytest.raises(CheckpointError, match="a model of more than 4,112 parameters"):
            build(10**12)
    build(3000)  # nobody counts any more


DECLARED = [
    ("num_hidden_layers", 200_000),
    ("num_hidden_layers", 10**12),
    ("vocab_size", 300_000_000),
    ("vocab_size", 3_000_000),
    ("head_dim", 4_000_000_000),
    ("intermediate_size", 10**8),
    ("num_attention_heads", 10**9),
    ("hidden_size", 2**63),
    ("hidden_size", 1e300),
    ("hidden_size", 10**400),
    ("hidden_size", float("inf")),
    ("num_hidden_layers", 1000),
    ("num_labels", 10**10),
]


@pytest.mark.parametrize(("key", "value"), DECLARED)
@pytest.mark.parametrize("converted", [False, True])
def test_models_of_declared_sizes_are_never_made(
    converted: bool, key: str, value: Any, copy: Path, tmp_path: Path
) -> None:
    """Terabytes are refused before they are asked for.

    A limit on memory shows that they are not.
    """
    folder = copy if converted else Path(shutil.copytree(BUNDLED, tmp_path / "original"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {**config, key: value, "text_config": {key: value}}
            if value == 10**12
            else {**config, key: value}
        )
    )
    with (
        limited(4 << 30),
        pytest.raises(SpikeLLMError, match="declares|do not fit|cannot be loaded|lacks") as caught,
    ):
        spikellm.load(folder)
    assert "\n" not in str(caught.value)
    assert "memory" not in str(caught.value)


@contextmanager
def limited(more: int) -> Iterator[None]:
    """At most so many bytes of memory more than are in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_header_that_is_nested_without_end(copy: Path) -> None:
    header = b"[" * 200_000
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(SpikeLLMError, match="damaged"):
        spikellm.load(copy)


def fuzzed(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer after some code."""
    script = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport"
        f" fuzzing\n{code}\nfuzzing.main()"
    )
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *options],
        env=surroundings,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="no atheris for this machine"
)
def test_readers_bear_what_a_fuzzer_finds(tmp_path: Path) -> None:
    done = fuzzed("", tmp_path, "-max_total_time=10", "-print_final_stats=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stderr.split("stat::number_of_executed_units:")[1].split()[0]) > 500
    broken = fuzzed(
        "fuzzing.READERS[0] = lambda place, data: 1 / 0", tmp_path, "-max_total_time=10"
    )
    assert "ZeroDivisionError" in broken.stderr + broken.stdout
    assert broken.returncode != 0, "an error that is not the project's own is found"
