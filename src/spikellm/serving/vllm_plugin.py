"""What vLLM calls before it loads a model (entry point ``vllm.general_plugins``)."""

from __future__ import annotations


def register() -> None:
    """Tell vLLM what a spiking checkpoint is; a second call changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from spikellm.checkpoint.config import METHOD
    from spikellm.serving.vllm_linear import SpikeQuantizationConfig

    register_quantization_config(METHOD)(SpikeQuantizationConfig)
