"""vLLM's own layers and loader with the plugin, on a CPU; `make test-vllm` installs what it needs.

A whole model is served by vLLM on a GPU alone: `benchmarks/vllm_gpu.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spikellm
from conftest import BUNDLED
from spikellm.checkpoint.config import read_config
from spikellm.core.errors import CheckpointError, UnsupportedModelError

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")

from spikellm.serving.vllm_plugin import register  # noqa: E402

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """vLLM's groups of devices, of one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK="0", WORLD_SIZE="1")
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
        initialize_model_parallel()
        yield
    torch.distributed.destroy_process_group()


def config_of(folder: Path) -> Any:
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    found = read_config(folder)
    assert found is not None
    config = get_quantization_config("spikellm").from_config(found.to_dict())
    config.packed_modules_mapping = PACKED
    return config


class Block(nn.Module):
    """The linear layers of a block, as vLLM has them."""

    def __init__(self, sizes: Any, config: Any) -> None:
        from vllm.model_executor.layers import linear

        super().__init__()
        self.quant_config = config
        hidden, inner, heads, kv = sizes
        given = {"bias": False, "quant_config": config, "params_dtype": torch.bfloat16}
        at = "model.layers.0"
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = linear.QKVParallelLinear(
            hidden, hidden // heads, heads, kv, **given, prefix=f"{at}.self_attn.qkv_proj"
        )
        self.self_attn.o_proj = linear.RowParallelLinear(
            hidden, hidden, **given, prefix=f"{at}.self_attn.o_proj"
        )
        self.mlp.gate_up_proj = linear.MergedColumnParallelLinear(
            hidden, [inner, inner], **given, prefix=f"{at}.mlp.gate_up_proj"
        )
        self.mlp.down_proj = linear.RowParallelLinear(
            inner, hidden, **given, prefix=f"{at}.mlp.down_proj"
        )


class Model(nn.Module):
    """One block under the names of a checkpoint."""

    def __init__(self, sizes: Any, config: Any) -> None:
        super().__init__()
        self.quant_config, self.model = config, nn.Module()
        self.model.layers = nn.ModuleList([Block(sizes, config)])

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        from vllm.model_executor.models.llama import LlamaModel
        from vllm.model_executor.models.utils import AutoWeightsLoader

        mine = {name: one for name, one in tensors.items() if name.startswith("model.layers.0.")}
        linears = ((n, one) for n, one in sorted(mine.items()) if "_proj." in n)
        AutoWeightsLoader(self).load_weights(linears, mapper=LlamaModel.hf_to_vllm_mapper)
        for module in self.modules():
            if (method := getattr(module, "quant_method", None)) is not None:
                method.process_weights_after_loading(module)


def sizes_of(model: Any) -> tuple[int, int, int, int]:
    config = model.config
    return (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )


def test_registered_twice_is_registered_once() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    register()
    register()
    assert QUANTIZATION_METHODS.count("spikellm") == 1
    assert get_quantization_config("spikellm").__name__ == "SpikeQuantizationConfig"


def test_layers_give_the_same_bits(one_process: None, converted_folder: Path) -> None:
    """Fused ones give what their parts give, side by side."""
    model, _ = spikellm.load(converted_folder)
    found = Model(sizes_of(model), config_of(converted_folder))
    found.load(load_file(converted_folder / "model.safetensors"))
    own, block = model.model.layers[0], found.model.layers[0]
    pairs = (
        (block.self_attn.qkv_proj, [getattr(own.self_attn, f"{one}_proj") for one in "qkv"]),
        (block.self_attn.o_proj, [own.self_attn.o_proj]),
        (block.mlp.gate_up_proj, [own.mlp.gate_proj, own.mlp.up_proj]),
        (block.mlp.down_proj, [own.mlp.down_proj]),
    )
    generator = torch.Generator().manual_seed(0)
    for layer, parts in pairs:
        x = torch.randn(7, layer.input_size, generator=generator).to(model.dtype)
        with torch.no_grad():
            output = layer(x)[0]
            assert torch.equal(output, torch.cat([part(x) for part in parts], -1))
        assert not [one for one in layer.parameters() if not one.numel()], "no placeholder is left"


def test_layers_on_the_meta_device(one_process: None, converted_folder: Path) -> None:
    """What vLLM does before memory is there."""
    model, _ = spikellm.load(converted_folder)
    with torch.device("meta"):
        found = Model(sizes_of(model), config_of(converted_folder))
    layer = found.model.layers[0].mlp.down_proj
    spiking = layer.get_submodule("spiking.0")
    assert {one.device.type for one in spiking.buffers()} == {"meta"}
    assert {name for name, _ in spiking.named_buffers()} == {
        name for name, _ in model.model.layers[0].mlp.down_proj.named_buffers()
    }


@pytest.mark.parametrize("damage", ["missing", "shape", "value"])
def test_damaged_checkpoints_are_refused(
    one_process: None, converted_folder: Path, damage: str
) -> None:
    model, _ = spikellm.load(converted_folder)
    tensors = load_file(converted_folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][1:] if damage == "shape" else -tensors[name]
    found = Model(sizes_of(model), config_of(converted_folder))
    with pytest.raises(CheckpointError, match=r"weight_scale|damaged"):
        found.load(tensors)


def test_what_vllm_would_compute_itself_is_refused(tmp_path: Path, text_file: Path) -> None:
    for number, settings in enumerate((["attention.query={bits: 8}"], ["vocabulary={bits: 8}"])):
        model, tokenizer = spikellm.load(BUNDLED)
        spikellm.convert(
            model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, settings=settings
        )
        folder = spikellm.save(model, tokenizer, tmp_path / str(number))
        with pytest.raises(UnsupportedModelError, match="vLLM computes in its own way"):
            config_of(folder)


def test_other_layers_are_left_as_they_are(one_process: None, converted_folder: Path) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    config = config_of(converted_folder)
    layer = ReplicatedLinear(8, 8, quant_config=config, prefix="model.other")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    config.config.modules = [one for one in config.config.modules if "k_proj" not in one]
    config._modules = set(config.config.modules)
    with pytest.raises(UnsupportedModelError, match="only some are converted"):
        config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
