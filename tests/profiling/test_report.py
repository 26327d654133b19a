from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.core.errors import DependencyError, RequestError
from spikellm.profiling import page
from spikellm.profiling.operations import count_operations
from spikellm.profiling.report import PARTS, Report
from spikellm.profiling.work import ROWS

PICTURES = [
    "accuracy",
    "stored",
    "energy",
    "steps",
    "channels",
    "firing",
    "spread",
    "raster",
    "error",
    "sizes",
]
CONTRACT = {
    "average_steps",
    "ace",
    "dense_ace",
    "spike_rate",
    "sops",
    "additive_share",
    "energy_pj",
    "bytes",
    "layers",
}


def reported(recipe: str, text_file: Path, *settings: str) -> Report:
    model, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(
        model, tokenizer, recipe, str(text_file), samples=2, seqlen=64, settings=settings
    )
    return spikellm.report(model, tokenizer, str(text_file), tokens=256, seqlen=64)


@pytest.fixture(scope="module")
def t2(text_file: Path) -> Report:
    return reported("w4a4-t2", text_file)


def test_steps_and_effort_of_the_paper_s_rule(t2: Report, text_file: Path) -> None:
    t1 = reported("rtn-w4a4", text_file)
    assert t2.average_steps == pytest.approx(1.10, abs=0.005)
    assert t2.ace / t1.ace == pytest.approx(t2.average_steps, rel=1e-6)
    assert t1.average_steps == 1
    assert t2.sops["binary"] >= t2.sops["stepped"] >= t2.sops["merged"] > 0
    assert t2.dense_ace == t1.dense_ace == t2.part("linear").macs * 256


def test_ternary_weights_are_additive_throughout(text_file: Path) -> None:
    report = reported("ternary-1.0", text_file)
    assert report.additive_share == 1.0
    assert report.spike_rate == 0, "inputs are not coded"
    assert report.energy_pj["stepped"] < report.energy_pj["dense"]


def test_coded_probabilities_have_one_rate(text_file: Path) -> None:
    """Their last dimension are keys, one more with every token that is decoded."""
    report = reported(
        "rtn-w4a4",
        text_file,
        "attention={key: {bits: 4}, value: {bits: 4}, probabilities: {bits: 8}}",
    )
    for counts in (report.prefill, report.decode):
        firing = counts.firing["model.layers.0.self_attn.probabilities"]
        assert firing.rates.shape == (1,)
        assert float(firing.rates) == pytest.approx(
            firing.spikes["binary"] / (firing.slots * 255), rel=1e-5
        )
    assert json.dumps(report.to_data())
    assert "probabilities" in page.render(report)


def test_data_has_the_keys_of_the_contract_and_sums_agree(t2: Report) -> None:
    data = json.loads(json.dumps(t2.to_data()))
    assert data.keys() >= CONTRACT
    assert data["sops"].keys() == {"merged", "stepped", "binary", "phase"}
    for mode in data["sops"]:
        assert data["spikes"][mode] < data["spikes_from_zero"][mode]
        assert data["sops"][mode] < data["sops_from_zero"][mode]
    assert data["sops"]["phase"] < data["sops"]["binary"] < data["sops_from_zero"]["binary"]
    assert data["bytes"].keys() >= {"weights", "dense"}
    for key in ("ace", "dense_ace", "macs"):
        kinds = sum(data["parts"][part][key] for part in ("linear", "attention", "head"))
        assert kinds == pytest.approx(data["parts"]["whole"][key])
        assert sum(layer[key] for layer in data["layers"]) == pytest.approx(kinds)
    assert data["ace"] == sum(layer["ace"] for layer in data["layers"] if layer["kind"] == "linear")
    assert data["energy_pj"]["binary"] == t2.energy_pj["binary"]
    assert data["decode"]["tokens"] == 16
    assert len(data["blocks"]) == 5
    assert data["recipe"]["name"] == "w4a4-t2"


def test_counts_and_perplexity_are_those_of_the_other_commands(
    text_file: Path, converted_folder: Path
) -> None:
    model, tokenizer = spikellm.load(converted_folder)
    report = spikellm.report(model, tokenizer, str(text_file), tokens=200, seqlen=64)
    assert report.text.windows == 3
    assert (
        report.text.perplexity
        == spikellm.perplexity(model, tokenizer, str(text_file), seqlen=64, limit=3).value
    )
    windows = torch.cat(
        [torch.tensor(tokenizer(text_file.read_text()).input_ids[:192]).view(3, 64)]
    )
    assert report.prefill.total().ace == count_operations(model, [windows])["prefill"].total().ace


def test_rows_beside_products_add_up_and_can_be_left_out(t2: Report, text_file: Path) -> None:
    data = json.loads(json.dumps(t2.to_data()))
    assert list(data["rows"]) == list(ROWS)
    for mode in ("dense", "merged", "binary"):
        parts = [data["parts"][part]["energy_pj"][mode] for part in PARTS if part != "whole"]
        rows = [row["energy_pj"][mode] for row in data["rows"].values()]
        known = [found for found in (*parts, *rows) if found is not None]
        assert data["parts"]["whole"]["energy_pj"][mode] == pytest.approx(sum(known))
    assert data["rows"]["routing"]["energy_pj"]["binary"] is None
    assert data["parts"]["whole"]["energy_pj"]["unknown"]["binary"] == ["routing"]
    spikes = sum(firing["spikes"]["binary"] for firing in data["firing"].values())
    assert data["rows"]["routing"]["operations"]["binary"] == {"spike": spikes}
    assert data["rows"]["coding"]["energy_pj"]["dense"] == 0 < t2.energy["coding"].modes["merged"]
    page_text = page.render(t2)
    assert "coding: ranges, thresholds, rounding" in page_text
    assert "without what the table does not know: routing (stepped); routing (binary)" in page_text
    model, tokenizer = spikellm.load(BUNDLED)
    options = {"tokens": 64, "seqlen": 64, "without": ["coding", "norms"]}
    fewer = spikellm.report(model, tokenizer, str(text_file), **options)
    assert set(ROWS) - set(fewer.energy) == {"coding", "norms"}
    assert fewer.to_data()["energy_table"]["without"] == ["coding", "norms"]
    assert "Left out: coding, norms." in page.render(fewer)


def test_density_of_weights_and_spikes(t2: Report) -> None:
    density = t2.to_data()["density"]
    linear = t2.part("linear")
    assert 0.5 < density["weights"] < 1
    for mode, share in density["product"].items():
        assert share == linear.sops[mode] / linear.macs
        assert share < density["spikes"][mode]
    merged = density["weights"] * density["spikes"]["merged"]
    assert merged == pytest.approx(density["product"]["merged"])


def test_a_table_that_knows_events_alone(text_file: Path) -> None:
    model, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=64)
    report = spikellm.report(
        model, tokenizer, str(text_file), tokens=64, seqlen=64, energy_table="loihi-14nm"
    )
    assert report.energy_pj["binary"] == pytest.approx(report.sops["binary"] * 23.6)
    assert report.energy_pj["merged"] is report.energy_pj["dense"] is None
    text = page.render(report)
    assert "not known" in text
    assert "Not known to it: " in text
    assert text.count("linear layers not known</text>") == 4, "all modes but binary"
    assert json.dumps(report.to_data())


def test_energy_of_weights_read(t2: Report) -> None:
    """Weights of the blocks come from memory once a window."""
    spiking = sum(layer.weight_bytes for layer in t2.summary.layers if layer.spiking)
    assert t2.energy_pj["weight_traffic"] == pytest.approx(
        spiking * t2.text.windows * t2.table.picojoules.dram_byte
    )


class Page(HTMLParser):
    """What a page refers to, its figures, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.described = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "figure":
            self.figures.append(found["id"] or "")
        if tag == "desc":
            self.described += 1
        assert tag not in (
            "script",
            "iframe",
            "link",
            "object",
        ), "nothing runs and nothing is loaded"
        self.references += [
            value or "" for name, value in attributes if name in ("src", "href", "xlink:href")
        ]
        self.ids += [value or "" for name, value in attributes if name == "id"]


def test_page_is_whole_and_refers_to_nothing_outside(t2: Report) -> None:
    text = page.render(t2)
    found = Page(text)
    assert found.figures == PICTURES
    assert found.described == len(PICTURES), "every picture is told in words"
    assert all(
        reference.startswith(("#", "data:image/png;base64,")) for reference in found.references
    )
    assert len(found.ids) == len(set(found.ids))
    assert "estimated from operation counts" in text
    assert "http" not in text.replace("http://www.w3.org/", "")


def test_names_are_escaped(t2: Report) -> None:
    from dataclasses import replace

    text = page.render(replace(t2, name="<script>alert(1)</script>"))
    assert "<script" not in text


def test_page_of_an_original(bundled: tuple[Any, Any], text_file: Path) -> None:
    report = spikellm.report(*bundled, str(text_file), tokens=64, seqlen=64)
    assert report.ace == report.dense_ace
    assert Page(page.render(report)).figures == ["accuracy", "stored", "energy", "sizes"]
    assert "no spiking layer" in page.verdict(report)


def test_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path, converted_folder: Path
) -> None:
    out = tmp_path / "report.html"
    arguments = [
        "report",
        str(converted_folder),
        "--text",
        str(text_file),
        "--tokens",
        "128",
        "--seqlen",
        "64",
        "--out",
        str(out),
        "--json",
        "-",
        "--beside",
        str(BUNDLED),
    ]
    assert main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["beside"][0]["converted"] is False
    original, tokenizer = spikellm.load(BUNDLED)
    assert (
        data["beside"][0]["perplexity"]
        == spikellm.perplexity(original, tokenizer, str(text_file), seqlen=64, limit=2).value
    )
    assert "times that of stdlib-2m" in out.read_text()
    assert '<figure id="stored">' in out.read_text()
    assert "tables of the vocabulary" in out.read_text()
    assert data["beside"][0]["stored"]["bits_a_weight"] == 16
    assert 4 < data["stored"]["bits_a_weight"] < 5
    assert data["stored"]["bytes"] == data["bytes"]["total"]
    assert list(tmp_path.iterdir()) == [out]
    assert (
        main(
            [
                "report",
                str(converted_folder),
                "--text",
                str(text_file),
                "--tokens",
                "64",
                "--seqlen",
                "64",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "average steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "/nowhere/at/all.html"], "in a folder that exists"),
        (["--tokens", "0"], "tokens is 0"),
        (["--seqlen", "100000"], "maximum"),
        (["--text", "nothing.txt"], "nothing.txt"),
        (["--energy-table", "nothing"], "energy table"),
        (["--without", "coding,norm"], "'norm' is no row of the energy estimate"),
        (["--without", ""], "--without is empty; expected names of rows"),
        (["--without", " ,"], "--without is empty; expected names of rows"),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str],
    converted_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    given = arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path / "x.html")]
    assert main(["report", str(converted_folder), *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert not list(tmp_path.iterdir())


def test_another_vocabulary_is_refused(bundled: tuple[Any, Any], text_file: Path) -> None:
    from families import build

    other = build("llama")
    other.resize_token_embeddings(100)
    beside = [("other", other)]
    with pytest.raises(RequestError, match="other has 100 tokens in its vocabulary"):
        spikellm.report(*bundled, str(text_file), tokens=64, seqlen=64, beside=beside)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DependencyError, match=r"jinja2.*spikellm\[report\]"):
        page.require_page()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme", "media"),
    [
        (400, "light", "screen"),
        (400, "dark", "screen"),
        (900, "light", "screen"),
        (1200, "light", "screen"),
        (800, "dark", "print"),
    ],
)
def test_page_in_a_browser(
    browser: Any, t2: Report, tmp_path: Path, width: int, scheme: str, media: str
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page.render(t2), encoding="utf-8")
    complaints, requests = [], []
    view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(file.as_uri())
    view.emulate_media(media=media, color_scheme=scheme)
    view.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    boxes = view.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => { const b ="
        " s.getBoundingClientRect(); return [b.left, b.right, b.width, b.height] })"
    )
    assert len(boxes) == len(PICTURES)
    for left, right, wide, high in boxes:
        assert left >= 0
        assert right <= width
        assert min(wide, high) > 100, "the picture has a size"
    cut = view.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('thead') &&"
        " !e.closest('svg') && (e.getBoundingClientRect().right > innerWidth + 1 || e.scrollWidth >"
        " e.clientWidth + 1 && e.clientWidth > 0)).map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    spilled = view.evaluate(
        "[...document.querySelectorAll('figure svg')].flatMap(s => { const b ="
        " s.getBoundingClientRect(); return [...s.querySelectorAll('text')].filter(t => { const c ="
        " t.getBoundingClientRect(); return c.width && (c.left < b.left - 2 || c.right > b.right +"
        " 2 || c.bottom > b.bottom + 2 || c.top < b.top - 2) }).map(t => t.textContent) })"
    )
    broken = view.evaluate(
        "[...document.querySelectorAll('table th, table td')].flatMap(cell => [...cell.childNodes]"
        ".filter(n => n.nodeType == 3).flatMap(n => [...n.data.matchAll(/\\S+/g)].filter(word => {"
        " const r = document.createRange(); r.setStart(n, word.index); r.setEnd(n, word.index +"
        " word[0].length); return new Set([...r.getClientRects()].map(b => Math.round(b.top))).size"
        " > 1 }).map(word => word[0])))"
    )
    if width > 704:  # below, rows are lists, and names break where they must
        whole = [word for word in broken if not {"-", "."} & set(word)]
        assert whole == [], "no word of a table is broken"
    assert spilled == [], "no word is cut off at the edge of a picture"
    ink, paper = view.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = scheme == "light" or media == "print"
    assert (sum(_rgb(ink)) < sum(_rgb(paper))) == light
    view.close()


def _rgb(color: str) -> list[int]:
    return [int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
