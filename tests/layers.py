"""Single spiking layers, fitted without a model around them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from native import additive, planes
from spikellm.models.rounding import fit_layer
from spikellm.nn.channels import Groups, Sample, group_of, salient_channels, salient_columns
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.massive_tokens import MassiveTokens
from spikellm.quantization.thresholds import FULL_RANGE
from spikellm.recipe import ActivationRecipe, LinearRecipe

BEYOND = 3.0
"""Width of its range beyond which a token is massive, where a layer has massive tokens."""


def fit(
    dense: nn.Linear,
    settings: LinearRecipe,
    sample: Tensor | None = None,
    seed: int = 0,
    name: str = "layer",
) -> SpikingLinear:
    """Round to nearest; salient channels from ``sample``, and tokens that are massive beyond
    :data:`BEYOND`, where the settings ask for them. The budget of spikes is taken for their price.
    """
    group, column_steps = torch.zeros(dense.in_features, dtype=torch.uint8), None
    if settings.activations.salient_rate > 0:
        assert sample is not None
        group = group_of(
            salient_channels(Sample(sample, dense.weight), settings.activations, seed, name)
        )
    if settings.weights.salient_rate > 0:
        assert sample is not None
        column_steps = salient_columns(Sample(sample, dense.weight), settings, seed, name)
    share = 53 if settings.activations.search_range else FULL_RANGE
    steps = settings.activations.token_steps
    massive = MassiveTokens(steps, BEYOND, 0.25) if steps else None
    price = settings.activations.spikes
    return fit_layer(dense, settings, Groups(group, column_steps, share, massive, price))


NOT_PRICED = {"spikes": 0.0, "spikes_of": "phase"}
PRICED = st.one_of(
    st.just(NOT_PRICED),
    st.fixed_dictionaries(
        {
            "spikes": st.sampled_from([0.01, 0.5, 1.0, 2.7, 40.0, 3000.0]),
            "spikes_of": st.sampled_from(["binary", "phase"]),
        }
    ),
)
"""Prices of spikes, see :func:`fit`."""


PLANES: dict[str, dict[str, Any]] = {
    "bcq": {"format": "bcq", "group_size": 100},
    "mixed": {"format": "bcq", "budget": 1.5, "scale_bits": 32},
    "billm": {"format": "billm", "group_size": 64, "scale_terms": 2},
}
KINDS = ["affine", "affine", "steps", "ternary", *PLANES]

ELASTIC = ["elastic", "elastic-published"]
SIGNED = st.sampled_from(["ternary", "ternary", *ELASTIC])


@st.composite
def activation_recipes(
    draw: st.DrawFn, bits: st.SearchStrategy[int], symmetric: st.SearchStrategy[bool]
) -> ActivationRecipe:
    """Neurons and trains of every kind, with and without salient channels."""
    rate = draw(st.sampled_from([0.0, 0.1, 0.5]))
    chosen: dict[str, Any] = {}
    if rate:
        thresholds = draw(st.sampled_from(["shared", "split"]))
        chosen = {
            "salient_rate": rate,
            "salient_steps": draw(st.integers(2, 4)),
            "thresholds": thresholds,
            "saliency": "rms",
        }
    signed = draw(st.booleans())
    kind = (
        {"neuron": draw(SIGNED), "bits": 2, "symmetric": True}
        if signed
        else {"bits": draw(bits), "symmetric": draw(symmetric)}
    )
    kind["search_range"] = draw(st.booleans())
    if kind.get("symmetric") and draw(st.booleans()):
        kind["threshold_from"] = "mean"
        if not kind["search_range"]:
            kind["mean_factor"] = draw(st.sampled_from([0.0625, 1.5, 2.0, 4.0, 15.9375]))
    kind["train"] = draw(st.sampled_from(["centered", "published"]))
    kind["recoding"] = draw(st.sampled_from(["binary", "signed-digit"]))
    kind["token_steps"] = draw(st.sampled_from([0, 0, 5, 8]))
    kind |= draw(PRICED)
    if kind.get("neuron") in ELASTIC or (kind["train"] == "published" and not signed):
        kind |= NOT_PRICED
    return ActivationRecipe.model_validate({**kind, **chosen})


@st.composite
def coded_layers(draw: st.DrawFn) -> tuple[SpikingLinear, Tensor]:
    """Any layer that codes its inputs, and any inputs, extreme ones too."""
    columns, outputs, tokens = (
        draw(st.integers(1, 300)),
        draw(st.integers(1, 70)),
        draw(st.one_of(st.integers(0, 9), st.integers(15, 70))),  # more than a tile, and fewer
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    activations = draw(activation_recipes(st.integers(2, 6), st.booleans()))
    bias, kind = draw(st.booleans()), draw(st.sampled_from(KINDS))
    if kind in PLANES:
        layer: SpikingLinear = planes(
            columns, outputs, PLANES[kind], generator, bias=bias, activations=activations
        )
    elif kind == "ternary":
        steps = torch.randint(1, draw(st.integers(1, 4)) + 1, (columns,), generator=generator).to(
            torch.uint8
        )
        layer = additive(columns, outputs, steps, generator, bias=bias, activations=activations)
    else:
        group = draw(st.sampled_from([None, 16, 100])) if kind == "affine" else None
        several = (
            {"salient_rate": 0.2, "salient_steps": draw(st.integers(2, 4)), "saliency": "rms"}
            if kind == "steps"
            else {}
        )
        bits = draw(st.integers(2, 6 if several else 8))
        weights = {
            "bits": bits,
            "symmetric": draw(st.booleans()),
            "group_size": group,
            **several,
        }
        dense = nn.Linear(columns, outputs, bias=bias)
        nn.init.normal_(dense.weight, generator=generator)
        layer = fit(
            dense,
            LinearRecipe(weights=weights, activations=activations),
            sample=torch.randn(40, columns, generator=generator),
        )
    x = torch.randn(tokens, columns, generator=generator) * 10.0 ** draw(st.integers(-4, 4))
    if tokens and draw(st.booleans()):
        x[0] = draw(st.sampled_from([0.0, 1.0, -2.5, 3e38, -3e38, 1e-44]))
    return layer, x
