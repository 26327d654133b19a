"""Time of coding each layer with the gptq algorithm, against its Cholesky and error-feedback
products alone, written straight with LAPACK and BLAS calls.

    python benchmarks/gptq.py MODEL TEXT [--recipe gptq-w4a16] [--samples 64] [--threads 1] [--gptq
    CHECKOUT]

"products" calls what torch calls LAPACK and BLAS by: potrf, potri and potrf in float64, then gemv a
column and gemm a block of 128 in float32, over the same weights and Hessian in the same order, as
many times as the algorithm feeds errors back; each weight keeps its value, so nothing is coded,
searched, sorted or packed. "GPTQ" is ``fasterquant`` of a checkout of IST-DASLab/gptq (needs its
imports: numpy) with activation order, 4-bit rows and their plain ranges. All take turns on every
layer. Prints seconds by kind of layer, the whole conversion, and ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import spikellm
from spikellm.algorithms import gptq
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.models.families import weight_and_bias
from spikellm.nn.channels import Groups
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import LinearRecipe

BLOCK = 128


def products(weight: Tensor, hessian: Tensor, damping: float, rounds: int) -> None:
    """The linear algebra of error feedback, without a code."""
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian[order][:, order]
    damped.diagonal().add_(damping * float(hessian.diagonal().mean()))
    lower = torch.linalg.cholesky(damped)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    for _ in range(rounds):
        rows = weight[:, order].T.contiguous()
        columns = len(rows)
        for first in range(0, columns, BLOCK):
            last = min(first + BLOCK, columns)
            errors = torch.empty(last - first, rows.shape[1])
            for column in range(first, last):
                place = column - first
                if place:
                    rows[column].addmv_(errors[:place].T, factor[first:column, column], alpha=-1)
                torch.div(rows[column], factor[column, column], out=errors[place])
            if last < columns:
                rows[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)


Peer = Callable[[Tensor, Tensor, float, int], None]


def published(checkout: str) -> Peer:
    """GPTQ's own coding of a layer."""
    sys.path.insert(0, checkout)
    import gptq as original  # type: ignore[import-not-found]
    from quant import Quantizer  # type: ignore[import-not-found]

    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # it waits for a GPU, also where there is none

    def code(weight: Tensor, hessian: Tensor, damping: float, rounds: int) -> None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        work = original.GPTQ(linear)
        work.H = hessian.float().clone()
        work.quantizer = Quantizer()
        work.quantizer.configure(4, perchannel=True, sym=False)
        with contextlib.redirect_stdout(io.StringIO()):
            work.fasterquant(percdamp=damping, actorder=True)

    return code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gptq", help="folder of a checkout of IST-DASLab/gptq")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    peers: dict[str, Peer] = {"products": products}
    if arguments.gptq:
        peers["GPTQ"] = published(arguments.gptq)
    spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    feedbacks: list[int] = []
    original, propagate_error = gptq.fit_layer, gptq.propagate_error

    def counted(*details: Any, **named: Any) -> Tensor:
        feedbacks[-1] += 1
        return propagate_error(*details, **named)

    def timed(
        name: str,
        module: nn.Module,
        settings: LinearRecipe,
        groups: Groups,
        hessian: Tensor,
        options: GptqOptions,
    ) -> tuple[SpikingLinear, float]:
        feedbacks.append(0)
        started = time.perf_counter()
        fitted = original(name, module, settings, groups, hessian, options)
        kind = spent[name.rpartition(".")[2]]
        kind["spikellm"].append(time.perf_counter() - started)
        weight = weight_and_bias(module)[0].detach().float()
        for peer, run in peers.items():
            started = time.perf_counter()
            run(weight, hessian, options.percdamp, feedbacks[-1])
            kind[peer].append(time.perf_counter() - started)
        return fitted

    gptq.fit_layer, gptq.propagate_error = timed, counted
    model, tokenizer = spikellm.load(arguments.model)
    started = time.perf_counter()
    spikellm.convert(
        model, tokenizer, arguments.recipe, arguments.text, samples=arguments.samples, seqlen=256
    )
    whole = time.perf_counter() - started
    theirs = 0.0
    for kind in spent.values():
        theirs += sum(sum(times) for peer, times in kind.items() if peer != "spikellm")
    print(
        f"{arguments.recipe}, {arguments.samples} windows of 256, {arguments.threads} thread(s);"
        " median of the layers of a kind"
    )
    print(
        f"the whole conversion: {whole - theirs:.1f} s; errors fed back"
        f" {statistics.fmean(feedbacks):.1f} times a layer"
    )
    for kind, times in spent.items():
        ours = statistics.median(times["spikellm"])
        ratios = "   ".join(
            f"{peer} {statistics.median(times[peer]) * 1e3:.1f} ms (spikellm takes"
            f" {ours / statistics.median(times[peer]):.2f} of it)"
            for peer in peers
        )
        print(f"{kind:<10} spikellm {ours * 1e3:.1f} ms   {ratios}")
    for peer in peers:
        own = sum(sum(kind["spikellm"]) for kind in spent.values())
        theirs = sum(sum(kind[peer]) for kind in spent.values())
        print(f"all layers: {own / theirs:.2f} of {peer}")


if __name__ == "__main__":
    main()
