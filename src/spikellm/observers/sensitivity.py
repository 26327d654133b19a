"""What the loss makes of an error in the output of a linear layer: the mean squared gradient of
each output (a diagonal empirical Fisher information).

To second order an error e in the output y of a token costs ``½ eᵀ F e`` of the loss, F ≈ E[g gᵀ], g
= ∂loss/∂y; of F the diagonal is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.core.distributed import all_reduce, sum_scalar
from spikellm.core.errors import NumericalError, RequestError
from spikellm.data.shards import WindowShard
from spikellm.models.families import decoder_of, is_linear, weight_and_bias
from spikellm.models.next_token import loss_backward
from spikellm.models.prepare import frozen

_TOKENS = 2048  # four times as many move 0 to 6% of the steps that are shared out


def output_sensitivity(
    model: nn.Module, part: WindowShard, names: Iterable[str]
) -> dict[str, Tensor]:
    """Mean over tokens of the squared gradient of the next-token loss, by output of each layer.

    The whole model runs forward and backward where it is, a window at a time; only activations take
    memory beside it. Ranks share the windows.

    Args:
        part: calibration tokens; evenly spread windows are used, up to 2,048 tokens in all.
        names: full names of linear layers, or of attention modules, which give hidden states.

    Returns:
        float32 ``(out,)`` a layer; zeros for a layer that was not run (an expert without tokens).

    Raises:
        NumericalError: a gradient is NaN or infinite; names the layer.
        RequestError: the backward pass does not fit into memory.
    """
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def forward(module: nn.Module, arguments: object, given: Any) -> None:
            output = given[0] if isinstance(given, tuple) else given

            def backward(gradient: Tensor) -> None:
                sums[name] = (
                    sums.get(name, 0)
                    + gradient.float().reshape(-1, gradient.shape[-1]).square().sum(0).double()
                )

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    layers = {name: model.get_submodule(name) for name in names}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    handles.append(
        embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_())
    )
    stride = max(1, -(-part.whole // _TOKENS))
    chosen = part.windows[-(part.before // part.windows.shape[1]) % stride :: stride].to(device)
    try:
        with frozen(model), torch.enable_grad():
            for window in chosen.split(1):
                loss_backward(model, window)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RequestError(
            "the backward pass that weighs layers against each other does not fit into memory; set"
            " weights.allocation and activations.allocation to layer, or shorten seqlen"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    found, tokens = {}, sum_scalar(chosen.numel())
    hidden = int(decoder_of(model).config.hidden_size)
    for name, layer in layers.items():
        outputs = len(weight_and_bias(layer)[0]) if is_linear(layer) else hidden
        nothing = torch.zeros(outputs, dtype=torch.float64)
        squares = all_reduce(sums.get(name, nothing).cpu())
        if not bool(torch.isfinite(squares).all()):
            raise NumericalError(
                f"layer {name}: the gradient of the loss is NaN or infinite; load the model in"
                " float32 or bfloat16"
            )
        found[name] = (squares / tokens).float().to(device)
    return found
