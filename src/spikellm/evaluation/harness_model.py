"""Spiking models for the evaluation harness's own command: ``lm_eval --model spikellm``.

``import spikellm`` enters the class into the harness's registry.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from spikellm.checkpoint.load import load
from spikellm.core.errors import RequestError
from spikellm.kernels.spec import ExecutionMode
from spikellm.nn.execution import set_execution_mode

_log = logging.getLogger(__name__)
_PASSED_ON = {
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}


class SpikeLM(HFLM):  # type: ignore[misc]
    """A model, converted or not, loaded as strictly as :func:`spikellm.load` does.

    Args:
        pretrained: folder, or name on the hub.
        device: where the model runs; the CPU by default, and where the harness's own default,
            a CUDA device, is missing.
        dtype: type of what is not converted; ``"auto"`` as saved.
        execution: how spikes are summed: merged (default), stepped, binary or phase.
        trust_remote_code: run Python code that comes with the model.
        rest: what the harness's own class takes beside a loaded model.

    Raises:
        RequestError: an argument that would have no effect, and whatever :func:`spikellm.load`
            raises.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        execution: ExecutionMode | None = None,
        trust_remote_code: bool = False,
        **rest: Any,
    ) -> None:
        unknown = sorted(set(rest) - _PASSED_ON)
        if unknown:
            names = ("device", "dtype", "execution", "pretrained", "trust_remote_code")
            raise RequestError(
                f"model argument {unknown[0]!r} has no effect on a spikellm model (valid:"
                f" {', '.join(sorted({*names, *_PASSED_ON}))})"
            )
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("device %s is not available here; the model runs on the CPU", device)
            device = "cpu"
        model, tokenizer = load(
            pretrained, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if execution is not None:
            set_execution_mode(model, execution)
        super().__init__(pretrained=model, tokenizer=tokenizer, **rest)
