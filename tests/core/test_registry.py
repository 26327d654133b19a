from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spikellm.commands.doctor import doctor
from spikellm.core import registry
from spikellm.core.errors import RequestError
from spikellm.core.registry import Registry, load_parts
from spikellm.neurons import neurons
from spikellm.recipe.base import AlgorithmOptions
from spikellm.recipe.load import load_recipe
from spikellm.saliency import criteria

PLUGIN = """
from typing import Literal

from pydantic import Field

from spikellm.neurons import neurons
from spikellm.recipe import AlgorithmOptions, register_options
from spikellm.saliency.base import ranks


@ranks("first-channels")
def first_channels(evidence):
    return -evidence.column_energy * 0


@register_options
class Options(AlgorithmOptions):
    name: Literal["outside"] = "outside"
    rate: float = Field(0.5, gt=0.0)


def enter():
    neurons.register("outside")(neurons["gif"])
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a distribution with entry points; all that it registers is taken out afterwards."""
    load_parts()
    changed: list[Registry] = [neurons, criteria, AlgorithmOptions.registry]
    before = [dict(one._entries) for one in changed]
    monkeypatch.setattr(registry, "_loader", registry._Loader())
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(source: str, *points: str, name: str = "outside_parts") -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("\n".join(["[spikellm.plugins]", *points]))

    yield put
    for one, entries in zip(changed, before, strict=True):
        one._entries = entries
    for name in [name for name in sys.modules if name.endswith("_parts")]:
        del sys.modules[name]


def test_parts_of_another_distribution(install: Install) -> None:
    install(PLUGIN, "a = outside_parts", "b = outside_parts:enter")
    recipe = load_recipe(
        "w4a4-t2",
        [
            "activations.neuron=outside",
            "activations.saliency=first-channels",
            "algorithm={name: outside, rate: 0.25}",
        ],
    )
    assert recipe.algorithm.model_dump() == {"name": "outside", "rate": 0.25}
    assert "outside" in neurons.names()
    load_parts()  # and nothing is registered twice


def test_plugins_are_asked_only_for_what_is_not_there(install: Install) -> None:
    install("raise RuntimeError('broken')", "bad = outside_parts")
    assert load_recipe("best-w4a4").algorithm.name == "gptq"
    assert neurons["gif"](4).levels == 15


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\nraise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
    ],
)
def test_a_plugin_that_cannot_be_loaded(
    source: str, reason: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays what is wrong, and is in the way of nothing else."""
    install(source, "bad = outside_parts")
    told = (
        "the plugin 'bad' of outside_parts 1.2 (outside_parts) cannot be loaded:"
        f" {reason}; repair or uninstall it"
    )
    assert "gif" in neurons.names()
    assert "lif" not in neurons
    for lookup in (
        lambda: load_recipe("w4a4-t2", ["activations.neuron=lif"]),
        lambda: load_recipe("w4a4-t2", ["algorithm=none-such"]),
        lambda: neurons["lif"],
    ):
        with pytest.raises(RequestError, match="unknown .*valid: .*; " + re.escape(told)):
            lookup()
    assert [record.getMessage() for record in caplog.records] == [f"spikellm: {told}"]
    assert doctor()["plugin, bad"] == told


def test_doctor_lists_plugins(install: Install) -> None:
    install(PLUGIN, "a = outside_parts")
    assert doctor()["plugin, a"] == "loaded from outside_parts 1.2 (outside_parts)"


def test_a_plugin_that_takes_a_name(install: Install) -> None:
    install(
        "from spikellm.neurons import neurons\nneurons.register('gif')(neurons['if'])",
        "bad = outside_parts",
    )
    assert "gif" in neurons.names()
    with pytest.raises(RequestError, match="neuron 'gif' is registered twice"):
        neurons["lif"]


def test_a_registry() -> None:
    shapes: Registry[int] = Registry("shape")
    shapes.register("round")(1)
    assert shapes["round"] == 1
    assert "square" not in shapes
    with pytest.raises(
        RequestError, match=r"unknown shape 'rund', did you mean 'round'\? .valid: r"
    ):
        shapes["rund"]
    with pytest.raises(ValueError, match="shape 'round' is registered twice"):
        shapes.register("round")(2)
