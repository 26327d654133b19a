"""The choice of BOS tokens in commands, in what they write, and in what they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import spikellm
from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.checkpoint.save import spike_config
from spikellm.core.errors import RecipeError
from spikellm.recipe.load import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bos_tokenizer: Any) -> Path:
    """The bundled model with a tokenizer that adds BOS."""
    place = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(BUNDLED, place)
    bos_tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def windows(text_file: Path) -> list[str]:
    """Options of two short windows."""
    return ["--perplexity", str(text_file), "--seqlen", "16", "--limit", "2"]


def test_eval(folder: Path, windows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for bos in ("auto", "never"):
        assert main(["eval", str(folder), *windows, "--bos", bos, "--json", "-"]) == 0
        [found[bos]] = json.loads(capsys.readouterr().out)["perplexity"].values()
    assert (found["auto"]["bos"], found["never"]["bos"]) == (True, False)
    assert found["auto"]["value"] != found["never"]["value"]
    assert main(["eval", str(folder), *windows]) == 0
    assert "BOS" in capsys.readouterr().out
    assert main(["eval", str(folder), *windows, "--bos", "yes"]) == 2
    assert "bos is 'yes'; expected auto, always, never" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_tables(
    verb: str,
    folder: Path,
    windows: list[str],
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--calibration", str(text_file), "--samples", "1"]
    recipe = ["--recipes" if verb == "compare" else "--recipe", "w4a16"]
    for bos, words in ((), True), (("--bos", "never"), False):
        assert main([verb, str(folder), *recipe, *windows, *options, *bos]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("every window starts with the BOS token" in printed) is words


def test_report(folder: Path, text_file: Path) -> None:
    model, tokenizer = spikellm.load(folder)
    found = spikellm.report(model, tokenizer, str(text_file), tokens=32, seqlen=16)
    alone = spikellm.perplexity(model, tokenizer, str(text_file), seqlen=16, limit=2)
    assert (found.text.bos, found.text.perplexity) == (True, alone.value)
    usual = spikellm.report(model, tokenizer, str(text_file), tokens=32, seqlen=16, bos="never")
    assert usual.to_data()["text"]["bos"] is False


def test_calibration_follows_the_recipe_and_says_so(
    folder: Path, tmp_path: Path, text_file: Path
) -> None:
    texts = {}
    for bos, there in (("auto", True), ("never", False)):
        model, tokenizer = spikellm.load(folder)
        spikellm.convert(
            model,
            tokenizer,
            "rtn-w4a4",
            str(text_file),
            samples=2,
            seqlen=16,
            settings=[f"calibration.bos={bos}"],
        )
        config = spike_config(model)
        assert config is not None
        assert config.record["calibration"]["bos"] is there
        assert config.parsed_recipe().calibration.bos == bos
        texts[bos] = config.record["calibration"]["sha256"]
        card = (spikellm.save(model, tokenizer, tmp_path / bos) / "README.md").read_text("utf-8")
        assert ("2 windows of 16 tokens, each starting with the BOS token" in card) is there
    assert texts["auto"] != texts["never"]


def test_the_field_is_saved_only_where_it_is_set() -> None:
    assert "bos" not in load_recipe("w4a4-t2").model_dump()["calibration"]
    recipe = load_recipe("w4a4-t2", ["calibration.bos=always"])
    assert recipe.model_dump(mode="json")["calibration"]["bos"] == "always"
    assert "bos: always" in recipe.to_yaml()
    with pytest.raises(RecipeError, match="calibration.bos"):
        load_recipe("w4a4-t2", ["calibration.bos=yes"])


def test_what_was_converted_before_there_was_a_choice_is_finished(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models of tokenizers without BOS, whose windows are what they were."""
    out = tmp_path / "out"
    command = ["convert", str(BUNDLED), str(out), "--recipe", "w4a16", "--samples", "1"]
    command += ["--calibration", str(text_file), "--seqlen", "16", "--resume"]
    assert main(command) == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for field in ("bos", "notes"):
        del config["quantization_config"]["record"]["calibration"][field]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    capsys.readouterr()
    assert main(command) == 0
    assert "is finished already" in capsys.readouterr().err
