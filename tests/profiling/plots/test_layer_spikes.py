from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.neurons.phase import places
from spikellm.profiling import page
from spikellm.profiling.glimpse import Glimpse
from spikellm.profiling.plots import layer_spikes
from spikellm.profiling.plots.layer_spikes import layer_map, target_of, targets
from spikellm.profiling.report import Report

T = TypeVar("T")
BLOCKS = 30
READABLE = 10  # pixels of the smallest word


@pytest.fixture(scope="module")
def shallow(text_file: Path) -> Report:
    model, tokenizer = first_blocks(1)
    settings = ["attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}"]
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=64, settings=settings
    )
    return spikellm.report(model, tokenizer, str(text_file), tokens=64, seqlen=64)


def deepened(report: Report) -> Report:
    """The report of a model whose thirty blocks are all like the first one."""

    def spread(found: dict[str, T]) -> dict[str, T]:
        inner = {name: value for name, value in found.items() if "layers.0." in name}
        blocks = {
            name.replace("layers.0.", f"layers.{block}."): value
            for block in range(BLOCKS)
            for name, value in inner.items()
        }
        return {**blocks, **{name: own for name, own in found.items() if name not in inner}}

    layers = {layer.name: layer for layer in report.summary.layers}
    named = [replace(layer, name=name) for name, layer in spread(layers).items()]
    counts = report.prefill
    firing, kinds = spread(counts.firing), spread(counts.kinds)
    return replace(
        report,
        summary=replace(report.summary, layers=named),
        prefill=replace(counts, layers=spread(counts.layers), kinds=kinds, firing=firing),
        steps=spread(report.steps),
        own_range=spread(report.own_range),
        glimpses=spread(report.glimpses),
    )


@pytest.fixture(scope="module")
def deep(shallow: Report) -> Report:
    return deepened(shallow)


def test_everything_that_is_coded_has_a_panel(shallow: Report) -> None:
    found = layer_map(shallow)
    (row,) = found.rows
    coded = {name.removesuffix(".input") for name in shallow.prefill.firing}
    assert {cell.name for cell in row[1]} == coded == set(shallow.glimpses)
    assert [panel.target for panel in found.panels] == [cell.target for cell in row[1]]
    assert set(found.kinds[:3]) == {f"self_attn.{part}_proj" for part in "qkv"}
    assert set(found.kinds[3:6]) == {f"self_attn.{part}" for part in ("query", "key", "value")}
    assert found.kinds[-1] == "mlp.down_proj", "in the order in which a block runs them"


def test_glimpses_are_what_the_layer_fires(shallow: Report) -> None:
    for name, own in shallow.glimpses.items():
        channels = own.planes.shape[1]
        assert int(own.sizes.sum()) == channels * (own.token + 1)
        fired = own.planes.long().sum(0)
        assert own.form == "binary"
        assert int(fired.abs().max()) <= len(own.sizes) // 2
        if name in shallow.steps:
            salient = (shallow.steps[name] > shallow.steps[name].min()) | shallow.own_range[name]
            assert torch.equal(own.salient, salient)


def test_links_of_the_page_lead_somewhere(deep: Report) -> None:
    text = page.render(deep)
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    leading = re.findall(r'href="#([^"]+)"', text)
    assert set(leading) <= ids
    assert {target for target in leading if target.startswith("spikes-")} == set(
        targets(deep).values()
    )
    layers = text[text.index("<h2>Layers") :]
    for name in deep.steps:
        assert f'<a href="#{target_of(name)}">{name}</a>' in layers, "from the table of layers"
    assert len(text) < 3e6


@pytest.mark.parametrize(("channels", "levels"), [(48, 15), (4096, 30), (14336, 60)])
def test_rasters_stay_small(channels: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = (torch.randn(channels, generator=generator) * 3).round().abs().clamp(max=levels)
    planes = (torch.arange(levels)[:, None] < counts).to(torch.int8)
    own = Glimpse(0, "binary", planes, torch.zeros(channels, dtype=torch.bool), torch.ones(3))
    address, told = layer_spikes._raster(own)
    assert len(address) < 8000
    assert f"{channels:,} channels" in told
    assert ("drawn" in told) == (channels > 1536)


def test_long_trains_are_drawn_in_phases(text_file: Path) -> None:
    model, tokenizer = first_blocks(1)
    spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=2, seqlen=64)
    report = spikellm.report(model, tokenizer, str(text_file), tokens=64, seqlen=64)
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    own = next(iter(report.glimpses.values()))
    assert own.form == "phase"
    assert len(own.planes) == places(255, layer.neuron.recoding)
    assert "a spike of each moment worth half of one before" in page.render(report)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_one_click_leads_to_the_spikes_of_a_layer(
    browser: Any, deep: Report, tmp_path: Path, width: int
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page.render(deep), encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 800})
    view.goto(file.as_uri())
    scroll = "document.documentElement.scrollWidth"
    assert view.evaluate(scroll) <= width
    assert view.locator(".panels section:visible").count() == 0
    target = target_of("model.layers.17.mlp.down_proj")
    view.click(f"table.map a[href='#{target}']")
    assert view.locator(".panels section:visible").evaluate_all("all => all.map(s => s.id)") == [
        target
    ]
    box = view.locator(f"[id='{target}']").bounding_box()
    assert 0 <= box["y"] < 400, "it is what the reader sees next"
    assert view.evaluate(scroll) <= width
    picture = view.locator(f"[id='{target}'] img")
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
    view.click(f"[id='{target}'] nav a >> text='block 18'")
    assert view.locator(".panels section:visible").evaluate_all("all => all.map(s => s.id)") == [
        target_of("model.layers.18.mlp.down_proj")
    ]
    view.locator("#firing svg a rect").first.click()
    assert view.evaluate("location.hash").startswith("#spikes-0-")
    view.close()


@pytest.mark.slow
def test_words_are_readable_on_a_telephone(browser: Any, deep: Report, tmp_path: Path) -> None:
    """None is smaller than ten pixels, and no two of one axis touch each other."""
    file = tmp_path / "report.html"
    file.write_text(page.render(deep), encoding="utf-8")
    view = browser.new_page(viewport={"width": 400, "height": 800})
    view.goto(file.as_uri())
    drawn = view.evaluate(
        "[...document.querySelectorAll('figure svg')].flatMap(s => [...s.querySelectorAll('text')]"
        ".map(t => [t.textContent, parseFloat(getComputedStyle(t).fontSize) *"
        " s.getBoundingClientRect().width / s.viewBox.baseVal.width]))"
    )
    assert drawn
    assert [words for words, size in drawn if size < READABLE] == []
    touching = view.evaluate(
        "[...document.querySelectorAll('figure svg g[id*=\"axis_\"]')].flatMap(axis => { const"
        " boxes = [...axis.querySelectorAll('text')].map(t => [t.textContent,"
        " t.getBoundingClientRect()]); return boxes.flatMap(([a, p], i) =>"
        " boxes.slice(i + 1).filter(([b, q]) => p.left < q.right && q.left < p.right && p.top <"
        " q.bottom - 2 && q.top < p.bottom - 2).map(([b, q]) => [a, b])) })"
    )
    assert touching == []
    cells = view.evaluate(
        "[...document.querySelectorAll('table.map a')].map(a => [a.getBoundingClientRect().width,"
        " a.getBoundingClientRect().height, parseFloat(getComputedStyle(a).fontSize)])"
    )
    assert len(cells) == BLOCKS * len(layer_map(deep).kinds)
    assert min(min(wide, high) for wide, high, _ in cells) > 20
    assert min(size for *_, size in cells) >= READABLE
    view.close()
