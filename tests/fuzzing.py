"""Coverage-guided fuzzing of what reads files that nobody vouches for.

Needs atheris; arguments are libFuzzer's.

    python tests/fuzzing.py -max_total_time=600

The first byte says which reader gets the rest. Anything but a result or the project's own error in
one line is a crash, and is written to a file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["spikellm", "yaml"]):
    import spikellm
    from spikellm.checkpoint.config import SpikeConfig, read_config
    from spikellm.checkpoint.integrity import check_folder
    from spikellm.conversion.journal import Journal
    from spikellm.core.errors import SpikeLLMError
    from spikellm.core.io import PlainDataError, read_json
    from spikellm.profiling.energy_table import load_table
    from spikellm.recipe.load import load_recipe

IDENTITY = {"recipe": {}, "text": "abc", "versions": {"torch": "2"}, "model": "a", "device": "cpu"}
ASSETS = Path(spikellm.__file__).parent


def _recipe(place: Path, data: bytes) -> None:
    (place / "recipe.yaml").write_bytes(data)
    load_recipe(str(place / "recipe.yaml"))


def _table(place: Path, data: bytes) -> None:
    (place / "table.yaml").write_bytes(data)
    load_table(place / "table.yaml")


def _manifest(place: Path, data: bytes) -> None:
    (place / "manifest.json").write_bytes(data)
    Journal(place, IDENTITY)


def _configuration(place: Path, data: bytes) -> None:
    (place / "config.json").write_bytes(data)
    read_config(place)
    try:
        found = read_json(place / "config.json")
    except PlainDataError:
        return
    if isinstance(found, dict) and found.keys() <= {
        "recipe",
        "modules",
        "record",
        "attention",
        "sizes",
        "version",
        "quant_method",
    }:
        SpikeConfig(**found).parsed_recipe()


def _shard(place: Path, data: bytes) -> None:
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(data)
    check_folder(place)


def _index(place: Path, data: bytes) -> None:
    (place / "config.json").write_text("{}")
    (place / "model.safetensors.index.json").write_bytes(data)
    check_folder(place)


READERS: list[Callable[[Path, bytes], None]] = [
    _recipe,
    _table,
    _manifest,
    _configuration,
    _shard,
    _index,
]


def seeds(folder: Path) -> None:
    """Sound files to start from."""
    recipes = [path.read_bytes() for path in sorted((ASSETS / "presets").glob("*.yaml"))]
    tables = [
        path.read_bytes()
        for path in sorted((ASSETS / "profiling" / "energy_tables").glob("*.yaml"))
    ]
    header = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    found = [
        *((0, data) for data in recipes),
        *((1, data) for data in tables),
        (2, json.dumps({**IDENTITY, "text": "other"}).encode()),
        (
            3,
            (
                b'{"recipe": {"version": 1}, "modules": ["a"], "record": {"blocks": [],'
                b' "calibration": {"windows": 1, "seqlen": 2, "sha256": "a"}, "versions": {}},'
                b' "attention": {"a": [1, 2, 3]}, "sizes": {"a": [1]}}'
            ),
        ),
        (4, len(header).to_bytes(8, "little") + header + b"ab"),
        (5, b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}'),
    ]
    for number, (reader, data) in enumerate(found):
        (folder / f"seed-{number}").write_bytes(bytes([reader]) + data)


def main() -> None:
    """Run until libFuzzer's limits are reached."""
    with tempfile.TemporaryDirectory() as temporary:
        corpus, work = Path(temporary) / "corpus", Path(temporary) / "work"
        corpus.mkdir()
        seeds(corpus)

        def one(data: bytes) -> None:
            work.mkdir(exist_ok=True)
            try:
                READERS[data[0] % len(READERS) if data else 0](work, data[1:])
            except SpikeLLMError as error:
                if "\n" in str(error) or len(str(error)) > 2000:
                    raise AssertionError(f"no single line: {error}") from error
            finally:
                for path in work.iterdir():
                    path.unlink()

        atheris.Setup(
            [sys.argv[0], str(corpus), "-timeout=20", "-rss_limit_mb=4096", *sys.argv[1:]], one
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
