from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spikellm
from conftest import BUNDLED
from spikellm.checkpoint.save import spike_config
from spikellm.core.errors import (
    CheckpointError,
    DependencyError,
    RequestError,
    UnsupportedModelError,
)
from spikellm.nn.execution import spiking_linears


@pytest.fixture
def copy(converted_folder: Path, tmp_path: Path) -> Path:
    """A converted model to damage."""
    return Path(shutil.copytree(converted_folder, tmp_path / "copy"))


def change_tensor(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    result = change(tensors[name])
    if result is None:
        del tensors[name]
    else:
        tensors[name] = result
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.0.mlp.up_proj"


def test_fresh_process_gives_the_same_logits(
    converted_folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Through the model library's own loader.

    The import of spikellm comes before it and loads nothing by itself.
    """
    model, _ = spikellm.load(converted_folder)
    with torch.no_grad():
        torch.save(model(tokens).logits, tmp_path / "logits.pt")
    torch.save(tokens, tmp_path / "tokens.pt")
    script = """
import sys
import spikellm
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
folder = sys.argv[2]
with torch.no_grad():
    logits = model(torch.load(folder + "/tokens.pt")).logits
assert torch.equal(logits, torch.load(folder + "/logits.pt")), "logits differ"
assert type(model.model.layers[0].mlp.up_proj).__name__ == "SpikingLinear"
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(converted_folder), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"


def test_import_order_does_not_matter(converted_folder: Path) -> None:
    script = (
        "import sys, transformers, spikellm; m ="
        " transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        " print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(converted_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "SpikingLinear", done.stderr


def test_saved_again_and_sharded(
    converted_folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model, tokenizer = spikellm.load(converted_folder)
    spikellm.save(model, tokenizer, tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    again, _ = spikellm.load(tmp_path / "sharded")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    spikellm.save(again, tokenizer, tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        converted_folder / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "twice" / "config.json").read_bytes() == (
        converted_folder / "config.json"
    ).read_bytes()


def test_each_header_is_read_once(
    converted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikellm.checkpoint import shards

    model, tokenizer = spikellm.load(converted_folder)
    spikellm.save(model, tokenizer, tmp_path / "sharded", max_shard_size="500KB")
    read: list[str] = []

    def counted(path: Path, **options: Any) -> Any:
        read.append(path.name)
        return safe_open(path, **options)

    monkeypatch.setattr(shards, "safe_open", counted)
    for _ in range(2):
        spikellm.load(tmp_path / "sharded")
        files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
        assert len(files) > 1
        assert sorted(read) == files, "once a load, and anew for the next"
        read.clear()


def test_a_model_over_several_places_gives_the_same_logits(
    converted_folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """accelerate's device map: some blocks in memory, the others read from disk when they are
    needed.
    """
    import transformers

    whole, _ = spikellm.load(converted_folder)
    places: dict[str, str] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    places |= {f"model.layers.{block}": "cpu" if block < 3 else "disk" for block in range(5)}
    spread = transformers.AutoModelForCausalLM.from_pretrained(
        converted_folder, device_map=places, offload_folder=tmp_path
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(
            spread(tokens, use_cache=False).logits, whole(tokens, use_cache=False).logits
        )


def test_another_type_keeps_the_integers(converted_folder: Path) -> None:
    import transformers

    saved = load_file(converted_folder / "model.safetensors")
    for dtype in (torch.float32, torch.float16):
        model = transformers.AutoModelForCausalLM.from_pretrained(converted_folder, dtype=dtype)
        assert model.model.norm.weight.dtype == dtype
        for name, tensor in saved.items():
            if name.split(".")[-1] in {
                "weight_codes",
                "weight_scale",
                "weight_zero",
                "channel_group",
                "group_steps",
            }:
                assert torch.equal(model.get_buffer(name), tensor), name


def test_card_and_record_tell_what_was_done(converted_folder: Path) -> None:
    card = (converted_folder / "README.md").read_text(encoding="utf-8")
    assert "import spikellm" in card
    assert "salient_steps: 2" in card
    assert "| `model.layers.4` |" in card
    model, _ = spikellm.load(converted_folder)
    stored = spikellm.summarize(model).stored
    assert f"- stored bits: {stored.bits_a_weight:.3f} a weight of converted layers" in card
    assert f"codes of weights {stored.share('codes'):.3f}" in card
    assert "masks" not in card
    config = spike_config(model)
    assert config is not None
    assert config.parsed_recipe().calibration.samples == 2
    assert config.modules == list(spiking_linears(model))
    assert len(config.record["blocks"]) == 5


def test_blocks_take_a_quarter(converted_folder: Path) -> None:
    model, _ = spikellm.load(converted_folder)
    summary, names = spikellm.summarize(model), spiking_linears(model)
    assert summary.spiking_layers == 35
    assert summary.weight_bytes <= 0.30 * summary.dense_bytes
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in load_file(converted_folder / "model.safetensors").items()
        if name.rpartition(".")[0] in names
    )
    assert stored == summary.weight_bytes


@pytest.mark.parametrize("buffer", ["weight_codes", "weight_scale", "channel_group"])
def test_missing_tensors_are_an_error_not_random_numbers(copy: Path, buffer: str) -> None:
    import transformers

    change_tensor(copy, f"{LAYER}.{buffer}", lambda tensor: None)
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        spikellm.load(copy)
    with pytest.raises(CheckpointError, match=f"{LAYER}.{buffer}"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("buffer", "change", "message"),
    [
        ("channel_group", lambda t: t + 3, "names group"),
        ("group_steps", lambda t: t + 1, "the recipe says"),
        ("weight_scale", lambda t: t * 0, "not finite and positive"),
        ("weight_scale", lambda t: t / 0, "not finite and positive"),
        ("weight_zero", lambda t: t + 100, "exceeds the largest code, 15"),
        ("weight_codes", lambda t: t[:, :-1].contiguous(), "weight_codes"),
        ("weight_codes", lambda t: t.float(), "stored as F32, expected U8"),
        ("channel_group", lambda t: t * torch.nan, "stored as F32, expected U8"),
        ("weight_scale", lambda t: t.double(), "stored as F64, expected F32"),
    ],
)
def test_damaged_state_is_refused(copy: Path, buffer: str, change: Any, message: str) -> None:
    change_tensor(copy, f"{LAYER}.{buffer}", change)
    with pytest.raises(CheckpointError, match=message):
        spikellm.load(copy)


def test_unexpected_tensors_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{LAYER}.weight"] = torch.zeros(3, 3)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="unexpected"):
        spikellm.load(copy)


def edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(version=99), "upgrade spikellm"),
        (lambda c: c["quantization_config"].update(colour="red"), "upgrade spikellm"),
        (
            lambda c: c["quantization_config"]["modules"].append("model.layers.9.mlp.up_proj"),
            "does not have",
        ),
        (lambda c: c["quantization_config"]["modules"].append("model.norm"), "says otherwise"),
        (
            lambda c: c["quantization_config"]["recipe"]["weights"].update(bits=99),
            "less than or equal to 8",
        ),
        (lambda c: c["quantization_config"]["modules"].pop(), "lacks 1 tensors"),
        (
            lambda c: c["quantization_config"].update(modules=None),
            "modules: Input should be a valid list, found None",
        ),
        (lambda c: c["quantization_config"].update(record={}), "record.blocks: Field required"),
        (
            lambda c: c["quantization_config"]["record"].update(blocks=[1, 2]),
            "record.blocks.0: Input should be a valid dictionary",
        ),
        (
            lambda c: c["quantization_config"]["record"].update(blocks=3),
            "record.blocks: Input should be a valid list, found 3",
        ),
        (
            lambda c: c["quantization_config"]["record"]["blocks"][1].update(loss=None),
            "record.blocks.1.loss: Input should be a valid number, found None",
        ),
        (
            lambda c: c["quantization_config"]["record"]["blocks"][1].update(relative_loss="a"),
            "record.blocks.1.relative_loss: Input should be a valid number",
        ),
        (
            lambda c: c["quantization_config"]["record"]["blocks"][1].update(more=1),
            "record.blocks.1.more: Extra inputs are not permitted",
        ),
        (
            lambda c: c["quantization_config"]["record"]["blocks"][1].update(name="\x1b[2J"),
            "record.blocks.1.name: Input should be one line of printable text",
        ),
        (
            lambda c: c["quantization_config"]["record"].update(calibration=5),
            "record.calibration: Input should be a valid dictionary",
        ),
        (
            lambda c: c["quantization_config"]["record"]["calibration"].pop("sha256"),
            "record.calibration.sha256: Field required",
        ),
        (
            lambda c: c["quantization_config"]["record"].update(versions=7),
            "record.versions: Input should be a valid dictionary",
        ),
        (
            lambda c: c["quantization_config"]["record"].update(model=[]),
            "record.model: Input should be a valid string",
        ),
        (lambda c: c["quantization_config"].pop("recipe"), "recipe: Input should be a valid dict"),
        (lambda c: c.update(hidden_size=-4), "cannot be loaded"),
        (lambda c: c.update(hidden_size="x"), "cannot be loaded"),
        (lambda c: c.update(num_attention_heads=0), "cannot be loaded"),
        (lambda c: c.update(model_type="nonesuch"), "not a causal language model"),
    ],
)
def test_damaged_configuration_is_refused(copy: Path, change: Any, message: str) -> None:
    edit_config(copy, change)
    with pytest.raises((CheckpointError, RequestError), match=message) as caught:
        spikellm.load(copy)
    assert "\n" not in str(caught.value)


def test_damaged_shards(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-10], whole + b"\0", whole[:100], b"", b"\xff" * 64):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            spikellm.load(copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        spikellm.load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="may run code"):
        spikellm.load(copy)


@pytest.mark.parametrize("kind", ["TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer", None])
def test_a_missing_tokenizer_is_named(kind: str | None, copy: Path) -> None:
    """Of some kinds the library would make one of three words up."""
    (copy / "tokenizer.json").unlink()
    settings = copy / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text(encoding="utf-8")), "tokenizer_class": kind}),
        encoding="utf-8",
    )
    if kind is None:
        settings.unlink()
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer\.json \(nor another vocabulary\); copy"
    ):
        spikellm.load(copy)


def test_index_is_checked(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    for content, message in (
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "refused"),
        ("{", "is damaged"),
    ):
        index.write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            spikellm.load(copy)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match="does not exist; give a model folder, a GGUF file, or a hub"
    ):
        spikellm.load(tmp_path / "none")
    with pytest.raises(RequestError, match=r"has no config\.json"):
        spikellm.load(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        spikellm.load(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RequestError, match="is a file"):
        spikellm.load(tmp_path / "file")


def test_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    import transformers

    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        spikellm.load(tmp_path)


def test_no_network_names_a_way_out() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(DependencyError, match="give the path of a local model folder instead"):
        spikellm.load("organisation/model-that-is-not-here")


def test_saving_is_all_or_nothing(
    bundled: tuple[Any, Any],
    converted_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = spikellm.load(converted_folder)
    with pytest.raises(RequestError, match="was not converted"):
        spikellm.save(*bundled, tmp_path / "x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep", encoding="utf-8")
    with pytest.raises(RequestError, match="holds no config.json"):
        spikellm.save(model, tokenizer, out, overwrite=True)
    (out / "config.json").touch()
    with pytest.raises(RequestError, match="not empty"):
        spikellm.save(model, tokenizer, out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full, raising=False)
    with pytest.raises(spikellm.core.errors.SpikeLLMError, match="cannot write .*No space left"):  # type: ignore[attr-defined]
        spikellm.save(model, tokenizer, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing half-written is left"
    assert (out / "precious").read_text(encoding="utf-8") == "keep"
    monkeypatch.undo()
    spikellm.save(model, tokenizer, out, overwrite=True)
    assert not (out / "precious").exists()
    assert (out / "config.json").exists()


def test_saved_files_are_as_readable_as_the_user_wants(converted_folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in converted_folder.iterdir()} == {0o666 & ~mask}


def test_bundled_model_is_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 8 * 2**20
