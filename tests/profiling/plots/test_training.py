from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import spikellm
from conftest import first_blocks
from spikellm.profiling.plots.training import training


def test_losses_of_a_trained_model_are_drawn(text_file: Path) -> None:
    model, tokenizer = first_blocks(1)
    text = str(text_file)
    spikellm.convert(model, tokenizer, "rtn-w4a4", text, samples=2, seqlen=64)
    report = spikellm.report(model, tokenizer, text, tokens=64, seqlen=64)
    assert training(report) is None, "it was not trained"
    checks = [{"update": update, "loss": loss} for update, loss in ((0, 0.3), (2, 0.2))]
    record = {"losses": [0.4, 0.25], "checks": checks, "best": 2}
    assert report.origin is not None
    origin = report.origin._replace(record={**report.origin.record, "training": record})
    picture = training(replace(report, origin=origin))
    assert picture is not None
    assert picture.description == "update 0: 0.3000; update 2: 0.2000"
    for words in ("held out", "kept", "loss a token, nats"):
        assert f">{words}</text>" in picture.svg
