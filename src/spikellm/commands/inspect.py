"""The verb ``inspect``: layers, bits, steps and sizes of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from spikellm.commands.support.options import Model, Trust
from spikellm.commands.support.verb import verbs
from spikellm.core import console

if TYPE_CHECKING:
    from spikellm.models.stored_bits import StoredBits


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """How a model is loaded to be looked at."""

    trust_remote_code: Trust = False


_DEFAULT = InspectOptions()


@verbs.register("inspect")
def inspect(model: Model, options: InspectOptions = _DEFAULT) -> dict[str, Any]:
    """Show layers, bits, steps and sizes of a model, converted or not.

    Example: spikellm inspect out/w4a4

    Returns:
        ``{"model", "kind", "recipe", "record", "average_steps", "additive_share",
        "weight_density", "bytes": {"weights", "dense", "total"}, "stored": {"bits_a_weight",
        "bits_a_parameter", "bytes", "bits": {kind: bits}, "weights", "parameters"}, "layers":
        [...], "attention": [...], "trains": [...], "prices": {layer, or attention module and
        part: price of a spike},
        "vocabulary": {"embedding", "head", "shared", "bits", "bytes"} or None, "kernels": [...],
        "decoder_step": "native", or why tokens are decoded by the model library}``.
    """
    from spikellm import api
    from spikellm.checkpoint.save import spike_config
    from spikellm.checkpoint.vocabulary import shown_vocabulary
    from spikellm.models.kernel_summary import summarize_kernels
    from spikellm.models.train_summary import spike_prices, summarize_trains
    from spikellm.runtime.decoder_step.summary import tried_step

    loaded, _ = api.load(model, trust_remote_code=options.trust_remote_code)
    summary, config = api.summarize(loaded, density=True), spike_config(loaded)
    return {
        "model": model,
        "kind": summary.kind,
        "recipe": config.recipe if config else None,
        "record": config.record if config else None,
        "average_steps": summary.average_steps,
        "additive_share": summary.additive_share,
        "weight_density": summary.weight_density,
        "bytes": {
            "weights": summary.weight_bytes,
            "dense": summary.dense_bytes,
            "total": summary.total_bytes,
        },
        "stored": summary.stored.to_data(),
        "layers": [{**asdict(layer), "stored_bits": layer.stored_bits} for layer in summary.layers],
        "attention": [asdict(attention) for attention in summary.attentions],
        "trains": [asdict(one) for one in summarize_trains(loaded)],
        "prices": spike_prices(loaded),
        "vocabulary": shown_vocabulary(loaded),
        "kernels": [asdict(one) for one in summarize_kernels(loaded)],
        "decoder_step": tried_step(loaded),
    }


def show(result: dict[str, Any]) -> None:
    """Print the layers as a table, and beneath it what is stored and what holds of the whole
    model.
    """
    from spikellm.models.stored_bits import TABLE, table_rows

    recipe = result["recipe"]["name"] if result["recipe"] else "not converted"
    console.table(
        f"{result['model']}: {result['kind']}, {recipe}",
        list(_COLUMNS),
        [[cell(layer) for cell in _COLUMNS.values()] for layer in result["layers"]],
    )
    console.table(
        "stored bits, tensors that are shared once", TABLE, table_rows(_stored(result["stored"]))
    )
    for line in _converted(result) if result["recipe"] else _ordinary(result):
        console.out.print(line, highlight=False, soft_wrap=True)


def _stored(data: dict[str, Any]) -> StoredBits:
    from spikellm.models.stored_bits import StoredBits

    return StoredBits(data["bits"], data["weights"], data["parameters"])


def _weights(layer: dict[str, Any]) -> str:
    """Bits of the weights, and their code where it is another than whole numbers."""
    code, bits = layer["weight_code"], layer["weight_bits"]
    return str(bits) if code in (None, "affine") else f"{code} {bits}"


def _spikes(layer: dict[str, Any]) -> str:
    """The neuron before a layer, and the bits that its spikes stand for; clusters of its channels,
    and whether its thresholds are constants.
    """
    if not layer["neuron"]:
        return "-"
    parts = [
        f"{layer['neuron']} {layer['spike_bits']}",
        f"{layer['clusters']} clusters" if layer["clusters"] > 1 else "",
        "static" if layer["static"] else "",
    ]
    return ", ".join(filter(None, parts))


def _steps(layer: dict[str, Any]) -> str:
    return f"{layer['average_steps']:.3f}" if layer["neuron"] or layer["salient_columns"] else "-"


def _salient(layer: dict[str, Any]) -> str:
    """Salient channels of the inputs, those with a range of their own in brackets, and of the
    weights.
    """
    channels, columns = layer["salient_channels"], layer["salient_columns"]
    parts = [
        f"{channels} ({layer['own_range_channels']})" if channels else "",
        f"{columns} of weights" if columns else "",
    ]
    return ", ".join(filter(None, parts)) or "-"


def _rotated(layer: dict[str, Any]) -> str:
    return str(layer["rotated_channels"] or "-")


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": lambda layer: str(layer["name"]),
    "out × in": lambda layer: f"{layer['out_features']} × {layer['in_features']}",
    "weight bits": _weights,
    "density": lambda layer: density_in_words(layer["weight_density"]),
    "spike bits": _spikes,
    "steps": _steps,
    "salient (own range)": _salient,
    "rotated": _rotated,
    "stored bits": lambda layer: f"{layer['stored_bits']:.3f}",
    "bytes": lambda layer: console.size(layer["weight_bytes"]),
}


def _ordinary(result: dict[str, Any]) -> list[str]:
    return [f"whole model {console.size(result['bytes']['total'])}; no spiking layer"]


def _converted(result: dict[str, Any]) -> list[str]:
    """Lines about a converted model: averages and sizes, rotations, attention."""
    sizes = result["bytes"]
    whole = (
        f"average steps {result['average_steps']:.3f}; additive share of the products of"
        f" converted layers {result['additive_share']:.3f}; of the weights"
        f" {density_in_words(result['weight_density'])} are not zero; converted weights"
        f" {console.size(sizes['weights'])}, {sizes['weights'] / sizes['dense']:.3f} of 16 bits"
        f" a weight; whole model {console.size(sizes['total'])}"
    )
    transformed = transforms_in_words(result["recipe"])
    kernels = [f"kernels: {kernels_in_words(one)}" for one in result["kernels"]]
    return [
        whole,
        *([f"transformed: {transformed}"] if transformed else []),
        *_massive(result["layers"]),
        _attention(result["attention"]),
        *([trains_in_words(result["trains"])] if result["trains"] else []),
        *([prices_in_words(result["prices"])] if result["prices"] else []),
        *([vocabulary_in_words(result["vocabulary"])] if result["vocabulary"] else []),
        *kernels,
        f"decoder step: {result['decoder_step']}",
    ]


def _massive(layers: list[dict[str, Any]]) -> list[str]:
    """Where massive tokens take more steps, if anywhere."""
    found = [layer for layer in layers if layer["token_steps"]]
    if not found:
        return []
    most = max(found, key=lambda layer: float(layer["massive_share"]))
    return [
        f"massive tokens take {most['token_steps']} steps in {len(found)} layers: at most"
        f" {most['massive_share']:.2%} of the calibration text's ({most['name']})"
    ]


def _attention(modules: list[dict[str, Any]]) -> str:
    if not modules:
        return "attention does not spike"
    one = modules[0]
    cache = (
        f"a cached token and key-value head takes {one['cache_bytes']} bytes,"
        f" {one['dense_cache_bytes']} at 16 bits"
        if one["cache_bytes"]
        else "K and V are not cached as spikes"
    )
    return (
        f"attention spikes in {len(modules)} modules: query {one['query_bits']}, key"
        f" {one['key_bits']}, value {one['value_bits']} bits; {cache}"
    )


def density_in_words(share: float | None) -> str:
    """Share of the weights that are not zero; a dash where there are no integers to count."""
    return "-" if share is None else f"{share:.3f}"


def prices_in_words(prices: dict[str, float]) -> str:
    """Between which prices of a spike values are rounded."""
    found, free = sorted(prices.values()), sum(price == 0 for price in prices.values())
    return (
        f"price of a spike {found[0]:.3g} to {found[-1]:.3g} squared thresholds in {len(found)}"
        f" places, none in {free} of them"
    )


def vocabulary_in_words(vocabulary: dict[str, Any]) -> str:
    """Which tables of the vocabulary are coded, in what and how large they are."""
    names = [vocabulary[one] for one in ("embedding", "head") if vocabulary[one]]
    tables = "one table" if vocabulary["shared"] else f"{len(names)} tables"
    tables = "a table" if len(names) == 1 else tables
    return (
        f"vocabulary: {' and '.join(names)} have {tables} of {vocabulary['bits']}-bit rows,"
        f" {console.size(vocabulary['bytes'])}"
    ).replace(" have a table", " has a table")


def trains_in_words(trains: list[dict[str, Any]]) -> str:
    """Which trains neurons fire, and where."""
    words = {
        "centered": "about the baseline (nothing fires at rest)",
        "published": "of whole codes, as published (the baseline fires at rest)",
    }
    digits = {"binary": "bits", "signed-digit": "signed digits"}
    found = [
        f"{words[one['train']]}, {digits[one['recoding']]} in phase execution:"
        f" {', '.join(one['parts'])}"
        for one in trains
    ]
    return f"trains {'; '.join(found)}"


def transforms_in_words(recipe: dict[str, Any]) -> str:
    """What a recipe transforms, fused or while the model runs; nothing if nothing."""
    from spikellm.recipe import recipe_from
    from spikellm.transforms import transforms_of

    parsed = recipe_from(recipe, "recipe of the model")
    found = [transform.in_words() for transform in transforms_of(parsed)]
    return ", ".join([*found, *(["Q and K rotated"] if parsed.attention.rotate else [])])


def kernels_in_words(one: dict[str, Any]) -> str:
    """Which backend runs some modules, and why others do not."""
    count = one["modules"]
    which = one["example"] if count == 1 else f"{one['example']} and {count - 1} more"
    against = "; ".join(f"not {name}: {why}" for name, why in one["against"].items())
    return f"{one['backend']} runs {which}" + (f" ({against})" if against else "")
