from __future__ import annotations

from pathlib import Path

import pytest

import spikellm
from conftest import PROJECT, first_blocks
from spikellm.profiling import page
from spikellm.profiling.published import PUBLISHED, Published


def test_effort_is_that_of_the_definition() -> None:
    one = Published("a", "W4A4", (4, 4), (1.0, 1.1), 6.0, 5.0, "somewhere")
    assert one.ratio == pytest.approx(1.2)
    assert one.effort == pytest.approx((16 / 256, 17.6 / 256))


def test_documentation_has_every_published_figure() -> None:
    text = (PROJECT / "docs" / "report.md").read_text(encoding="utf-8")
    for one in PUBLISHED:
        row = next(line for line in text.splitlines() if f"| {one.system} {one.setting} |" in line)
        assert f"{one.perplexity:.4g} of {one.original}" in row
        assert one.source.split("arXiv ")[-1] in row


def test_models_stand_beside_published_systems(text_file: Path) -> None:
    model, tokenizer = first_blocks(1)
    spikellm.convert(model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=64)
    text = str(text_file)
    original, _ = first_blocks(1)
    options = {"tokens": 64, "seqlen": 64}
    report = spikellm.report(model, tokenizer, text, beside=[("original", original)], **options)
    shown = page.render(report)
    assert '<figure id="published">' in shown
    bits = report.summary.stored.bits_a_weight
    assert f'<td data-column="bits a weight">{bits:.2f} stored</td>' in shown
    ratio = report.text.perplexity / report.beside[0].perplexity
    assert f"{ratio:.3f} at {bits:.2f} bits, on the front" in shown, "it takes the fewest"
    assert f"{ratio:.3f}×" in shown
    assert "not measured here" in shown
    alone = page.render(spikellm.report(model, tokenizer, text, **options))
    assert '<figure id="published">' not in alone, "no ratio is known without the original"
    assert "SpikeLLM W4A4" in alone
    unconverted = page.render(spikellm.report(original, tokenizer, text, **options))
    assert "SpikeLLM W4A4" not in unconverted
