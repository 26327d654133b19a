"""Time of one OmniQuant epoch over one decoder block, against the same block with fake quantization
written straight in torch.

    python benchmarks/calibration.py MODEL TEXT [--recipe spike-w4a4-t2] [--samples 16] [--threads
    1] [--omniquant CHECKOUT]

The peers run the same forward and backward passes on the same windows, with 4-bit per-token inputs
and 4-bit per-row weights with learnable clipping, straight-through rounding, plain attention; no
salient channels, no equivalent scalings, no coding of Q, K and V. "plain" is written here in ten
lines; "OmniQuant" uses QuantLinear and UniformAffineQuantizer of a checkout of OpenGVLab/OmniQuant
(needs its imports: tqdm, numpy). Prints seconds of an epoch, the epochs of all in turn, and ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import spikellm
from spikellm.algorithms import omniquant
from spikellm.algorithms.learning import Learning
from spikellm.conversion.record import Progress
from spikellm.models.families import linear_layers
from spikellm.models.swap import replace_module

REPEATS = 5


class StopAfterFirstBlockError(Exception):
    """Ends the conversion once one block has been timed."""


class PlainFakeQuant(nn.Module):
    """4-bit inputs and weights, as one would write it in ten lines."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach().float(), linear.bias
        self.clip = nn.Parameter(torch.full((linear.out_features, 1), 4.0))

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True)
        x = x + (self.fake(x.detach(), low, high) - x).detach()
        limit = torch.sigmoid(self.clip)
        weight = self.fake(
            self.weight,
            limit * self.weight.amin(1, keepdim=True),
            limit * self.weight.amax(1, keepdim=True),
        )
        return nn.functional.linear(x, weight, self.bias)

    @staticmethod
    def fake(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale = (high - low).clamp(min=1e-8) / 15
        code = x / scale
        code = code + (code.round() - code).detach()
        zero = (-low / scale).round().detach()
        return ((code + zero).clamp(0, 15) - zero) * scale


MakeLinear = Callable[[nn.Linear], nn.Module]


def omniquant_linear(checkout: str) -> MakeLinear:
    """OmniQuant's own quantized linear layer."""
    sys.path.insert(0, checkout)
    from quantize.int_linear import QuantLinear  # type: ignore[import-not-found]

    def make(linear: nn.Linear) -> nn.Module:
        weights = {
            "n_bits": 4,
            "per_channel_axes": [0],
            "symmetric": False,
            "dynamic_method": "per_channel",
            "group_size": None,
            "lwc": True,
        }
        layer = QuantLinear(
            linear.requires_grad_(False),
            weights,
            {"n_bits": 4, "symmetric": False, "dynamic_method": "per_token"},
        )
        layer.set_quant_state(weight_quant=True, act_quant=True)
        return layer  # type: ignore[no-any-return]

    return make


def peer_epoch(fit: omniquant._Fit, make: MakeLinear) -> float:
    """Seconds of one epoch of a peer over the same windows."""
    context = fit.context
    block = copy.deepcopy(context.module).float()
    for module in block.modules():
        module._modules.pop("spikes", None)
    for name, linear in linear_layers(block).items():
        assert isinstance(linear, nn.Linear)
        replace_module(block, name, make(linear))
    parameters = [
        parameter
        for name, parameter in block.named_parameters()
        if name.endswith(("clip", "bound_factor"))
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    started = time.perf_counter()
    for batch in range(len(context.inputs)):
        parts = (
            store[batch].split(fit.options.batch_size)
            for store in (context.inputs, context.fp_output)
        )
        for hidden, target in zip(*parts, strict=True):
            loss = nn.functional.mse_loss(context.forward(block, hidden.float()), target.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--recipe", default="spike-w4a4-t2")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--omniquant", help="folder of a checkout of OpenGVLab/OmniQuant")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours: list[float] = []
    peers: dict[str, MakeLinear] = {"plain": PlainFakeQuant}
    if arguments.omniquant:
        peers["OmniQuant"] = omniquant_linear(arguments.omniquant)
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    train, epoch, fits = omniquant._Fit._train, Learning._epoch, list[omniquant._Fit]()

    def training(self: omniquant._Fit) -> omniquant.Learned:
        fits.append(self)
        return train(self)

    def timed(
        self: Learning, learned: omniquant.Learned, optimizer: torch.optim.Optimizer
    ) -> float:
        started = time.perf_counter()
        loss = epoch(self, learned, optimizer)
        ours.append(time.perf_counter() - started)
        for name, make in peers.items():
            theirs[name].append(peer_epoch(fits[-1], make))  # side by side, in turn
        return loss

    def stop(progress: Progress) -> None:
        raise StopAfterFirstBlockError

    omniquant._Fit._train = training  # type: ignore[method-assign]
    Learning._epoch = timed  # type: ignore[method-assign]
    model, tokenizer = spikellm.load(arguments.model)
    settings = [f"algorithm.epochs={REPEATS}"]
    with contextlib.suppress(StopAfterFirstBlockError):
        spikellm.convert(
            model,
            tokenizer,
            arguments.recipe,
            arguments.text,
            samples=arguments.samples,
            settings=settings,
            on_block=stop,
        )
    one = statistics.median(ours)
    print(
        f"{arguments.recipe}, {arguments.samples} windows, {arguments.threads} thread(s), median of"
        f" {REPEATS} epochs over the first block"
    )
    print(f"spikellm     {one:.2f} s")
    for name, seconds in theirs.items():
        other = statistics.median(seconds)
        print(f"{name:<10} {other:6.2f} s   spikellm takes {one / other:.2f} of it")


if __name__ == "__main__":
    main()
