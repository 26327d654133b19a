"""The verb ``inspect``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spikellm import api
from spikellm.checkpoint.save import spike_config
from spikellm.core import console


def inspect_model(model: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Layers, bits, steps and sizes as plain data."""
    loaded, _ = api.load(model, trust_remote_code=trust_remote_code)
    summary, config = api.summarize(loaded), spike_config(loaded)
    return {
        "model": model,
        "kind": summary.kind,
        "recipe": config.recipe if config else None,
        "record": config.record if config else None,
        "average_steps": summary.average_steps,
        "additive_share": summary.additive_share,
        "bytes": {
            "weights": summary.weight_bytes,
            "dense": summary.dense_bytes,
            "total": summary.total_bytes,
        },
        "layers": [asdict(layer) for layer in summary.layers],
        "attention": [asdict(attention) for attention in summary.attentions],
    }


def rotations_in_words(recipe: dict[str, Any]) -> str:
    """What a recipe rotates, fused or while the model runs; nothing if nothing."""
    transforms = {one["name"]: one for one in recipe.get("transforms", ())}
    online = transforms.get("online-rotation", {}).get("layers", ())
    parts = [
        "the residual stream (fused)" if "residual-rotation" in transforms else "",
        "heads of V (fused)" if "value-output-rotation" in transforms else "",
        f"inputs of {' and '.join(online)} layers" if online else "",
        "Q and K" if recipe.get("attention", {}).get("rotate") else "",
    ]
    return ", ".join(filter(None, parts))


def show_inspection(result: dict[str, Any]) -> None:
    """Print what :func:`inspect_model` found."""
    rows = []
    for layer in result["layers"]:
        spikes = f"{layer['neuron']} {layer['spike_bits']}" if layer["neuron"] else "-"
        steps = (
            f"{layer['average_steps']:.3f}" if layer["neuron"] or layer["salient_columns"] else "-"
        )
        salient = (
            f"{layer['salient_channels']} ({layer['own_range_channels']})"
            if layer["salient_channels"]
            else "-"
        )
        if layer["salient_columns"]:
            salient = (
                f"{layer['salient_columns']} of weights"
                if salient == "-"
                else f"{salient}, {layer['salient_columns']} of weights"
            )
        bits = (
            str(layer["weight_bits"])
            if layer["weight_code"] in (None, "affine")
            else f"{layer['weight_code']} {layer['weight_bits']}"
        )
        shape = f"{layer['out_features']} × {layer['in_features']}"
        turned = str(layer["rotated_channels"] or "-")
        rows.append(
            [
                layer["name"],
                shape,
                bits,
                spikes,
                steps,
                salient,
                turned,
                console.size(layer["weight_bytes"]),
            ]
        )
    recipe = result["recipe"]["name"] if result["recipe"] else "not converted"
    console.table(
        f"{result['model']}: {result['kind']}, {recipe}",
        [
            "layer",
            "out × in",
            "weight bits",
            "spike bits",
            "steps",
            "salient (own range)",
            "rotated",
            "bytes",
        ],
        rows,
    )
    sizes = result["bytes"]
    if result["recipe"]:
        console.out.print(
            f"average steps {result['average_steps']:.3f}; additive share of the products of"
            f" converted layers {result['additive_share']:.3f}; converted weights"
            f" {console.size(sizes['weights'])}, {sizes['weights'] / sizes['dense']:.3f} of 16 bits"
            f" a weight; whole model {console.size(sizes['total'])}",
            highlight=False,
            soft_wrap=True,
        )
        if rotated := rotations_in_words(result["recipe"]):
            console.out.print(f"rotated: {rotated}", highlight=False, soft_wrap=True)
        if result["attention"]:
            one = result["attention"][0]
            row = (
                f"a cached token and key-value head takes {one['cache_bytes']} bytes,"
                f" {one['dense_cache_bytes']} at 16 bits"
                if one["cache_bytes"]
                else "K and V are not cached as spikes"
            )
            console.out.print(
                f"attention spikes in {len(result['attention'])} modules: query"
                f" {one['query_bits']}, key {one['key_bits']}, value {one['value_bits']} bits;"
                f" {row}",
                highlight=False,
                soft_wrap=True,
            )
        else:
            console.out.print("attention does not spike", highlight=False)
    else:
        console.out.print(
            f"whole model {console.size(sizes['total'])}; no spiking layer", highlight=False
        )
