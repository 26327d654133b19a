"""What a forward pass does: multiply-accumulates by operand bits, arithmetic effort, spikes and
synaptic operations, counted while it runs.

    ACE  = Σ over multiply-accumulates of bits(a) · bits(b); a channel of T steps counts T times
    SOPs = Σ over non-zero spikes of their fan-out

A code q of T steps of at most L is one spike in merged form, ``⌈|q|/L⌉`` in stepped form (the
drained train) and |q| in binary form. The fan-out of an input spike is the layer's outputs, or the
weight spikes of its column where weights are ternary spikes; the baseline's charge belongs to the
code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spikellm.models.attention_interface import (
    IMPLEMENTATION,
    Observation,
    observing,
    use_interface,
)
from spikellm.models.families import is_linear, weight_and_bias
from spikellm.models.prepare import evaluating
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotation, layer_name
from spikellm.profiling.counts import DENSE_BITS, FORMS, Counts, Firing, Operations
from spikellm.quantization.hadamard import largest_power
from spikellm.recipe.sections import MAX_TOP_CODE

_EXACT_ROWS = 2**24 // MAX_TOP_CODE


def count_spikes(codes: Tensor, levels: int) -> dict[str, Tensor]:
    """Non-zero spikes of every form, summed over all but the last dimension: int64 ``(channels,)``.

    The spikes of a drained train are full but for the last.

    Args:
        codes: merged codes, ``(…, channels)``.
        levels: L.
    """
    flat = codes.reshape(-1, codes.shape[-1])
    found = {
        form: torch.zeros(codes.shape[-1], dtype=torch.int64, device=codes.device) for form in FORMS
    }
    for part in flat.split(
        _EXACT_ROWS
    ):  # float32 sums of integers below 2**24 are exact, and far faster than integer ones
        size = part.abs().float()
        found["binary"] += size.sum(0).long()
        found["stepped"] += (size + (levels - 1)).div_(levels).floor_().sum(0).long()
        found["merged"] += size.clamp_(max=1).sum(0).long()
    return found


class OperationCounter:
    """Counts the operations of every forward pass while it is entered.

    The model and its outputs do not change.

    Args:
        model: converted or not.

    Example:
        >>> with OperationCounter(model) as counter:
        ...     model(tokens)
        >>> counter.take().total().ace
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {module: layer_name(name) for name, module in model.named_modules()}
        self._counts = Counts(0)
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._linears = {
            module: "head" if module is head else "linear"
            for module in self._names
            if isinstance(module, SpikingLinear) or is_linear(module)
        }
        self._rotations = [module for module in self._names if isinstance(module, Rotation)]
        self._trains: dict[tuple[nn.Module, str], SpikeTrain] = {}
        self._fan_out: dict[nn.Module, dict[str, Tensor]] = {}

    def take(self) -> Counts:
        """Counts since the last call."""
        found, self._counts = self._counts, Counts(0)
        return found

    def __enter__(self) -> OperationCounter:
        self._before = str(self._model.config._attn_implementation)  # type: ignore[union-attr]
        if self._before != IMPLEMENTATION and self._model._can_set_attn_implementation():  # type: ignore[operator]
            use_interface(self._model)
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        self._handles = [module.register_forward_hook(self._linear) for module in self._linears]
        self._handles += [
            module.register_forward_hook(self._rotation) for module in self._rotations
        ]
        self._handles.append(embedding.register_forward_hook(self._tokens))
        self._contexts = [observing(self._attention), observe_spikes(self._spikes)]
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        for context in self._contexts:
            context.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        if str(self._model.config._attn_implementation) != self._before:  # type: ignore[union-attr]
            self._model.set_attn_implementation(self._before)  # type: ignore[operator]

    def _tokens(self, module: nn.Module, arguments: object, output: Tensor) -> None:
        self._counts.tokens += output.shape[:-1].numel()

    def _entry(self, name: str, kind: str) -> Operations:
        self._counts.kinds[name] = kind
        return self._counts.layers.setdefault(name, Operations())

    def _spikes(self, train: SpikeTrain) -> None:
        self._trains[train.source, train.part] = train

    def _linear(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        entry = self._entry(self._names[module], self._linears[module])
        tokens = output.shape[:-1].numel()
        if not isinstance(module, SpikingLinear):
            macs = tokens * weight_and_bias(module)[0].numel()
            entry.add(Operations(macs, Counter({(DENSE_BITS, DENSE_BITS): macs})))
            return
        macs = tokens * module.in_features * module.out_features
        executed = Counter(
            {bits: round(macs * share) for bits, share in products_of(module).items()}
        )
        counted = module.format.average_steps(module)  # of itself, beyond what is executed
        extra = 0.0 if counted is None else macs * counted - executed.total()
        entry.add(
            Operations(macs, executed, module.additive_share * executed.total(), extra_steps=extra)
        )
        if module not in self._fan_out:
            self._fan_out[module] = fan_out(module)
        reach = self._fan_out[module]
        train = self._trains.pop((module, "input"), None)
        if train is not None:
            fired = self._fire(entry, f"{self._names[module]}.input", train)
            entry.sops.update({form: int((fired[form] * reach[form]).sum()) for form in FORMS})
        elif module.format.unrolls:
            entry.sops.update({form: tokens * int(reach[form].sum()) for form in FORMS})

    def _rotation(self, module: Rotation, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if module.rotated:
            self._entry(self._names[module], "rotation").add(
                operations_of_mix(module.rotated, output.shape[:-1].numel())
            )

    def _attention(self, module: nn.Module, seen: Observation) -> None:
        name = self._names[module]
        spikes = getattr(module, "spikes", None)
        batch, heads, queries, channels = seen.query.shape
        keys, shared, outputs = seen.key.shape[2], seen.key.shape[1], seen.value.shape[-1]
        pairs, group = batch * heads * queries * keys, heads // shared
        if isinstance(spikes, SpikingAttention) and spikes.settings.rotate:
            self._entry(f"{name} rotation", "rotation").add(
                operations_of_mix(channels, batch * queries * (heads + shared))
            )
        scores, values = (
            self._entry(f"{name} scores", "attention"),
            self._entry(f"{name} values", "attention"),
        )
        for entry, part, other, width in (
            (scores, "key", "query", channels),
            (values, "value", "probabilities", outputs),
        ):
            macs, bits, other_bits, steps = pairs * width, DENSE_BITS, DENSE_BITS, 1.0
            if isinstance(spikes, SpikingAttention):
                own, opposite = getattr(spikes.settings, part), getattr(spikes.settings, other)
                bits, other_bits = own.bits, opposite.bits
                steps = self._mean_steps(spikes, part)
            entry.add(Operations(macs, Counter({(other_bits, bits): round(macs * steps)})))
            trains = (
                {which: self._trains.pop((spikes, which), None) for which in (part, other)}
                if spikes is not None
                else {}
            )
            fired = {
                which: self._fire(entry, f"{name}.{which}", train)
                for which, train in trains.items()
                if train is not None
            }
            reach = {
                "query": keys,
                "key": queries * group,
                "probabilities": outputs,
                "value": queries * group,
            }
            through = (
                other if other in fired else part
            )  # the spikes that arrive; the other operand is what they meet
            if through in fired:
                entry.sops.update(
                    {form: int(fired[through][form].sum()) * reach[through] for form in FORMS}
                )

    @staticmethod
    def _mean_steps(spikes: SpikingAttention, part: str) -> float:
        if not getattr(spikes.settings, part).spiking:
            return 1.0
        coder = spikes.key_coder() if part == "key" else spikes.value_coder()
        return float(coder.steps.float().mean())

    def _fire(self, entry: Operations, name: str, train: SpikeTrain) -> dict[str, Tensor]:
        fired = count_spikes(train.codes, train.neuron.levels)
        steps = train.steps.expand(*train.steps.shape[:-1], train.codes.shape[-1])
        slots = steps.reshape(-1, steps.shape[-1]).sum(0, dtype=torch.int64) * (
            train.codes.numel() // steps.numel()
        )
        entry.slots += int(slots.sum())
        entry.spikes.update({form: int(count.sum()) for form, count in fired.items()})
        binary, most = fired["binary"], slots * train.neuron.levels
        if train.part == "probabilities":  # of keys, which become more as tokens come
            binary, most = binary.sum(0, keepdim=True), most.sum(0, keepdim=True)
        rates = binary / most.clamp(min=1)
        firing = Firing(
            train.codes.numel(),
            int(slots.sum()),
            {form: int(count.sum()) for form, count in fired.items()},
            rates.float(),
        )
        self._counts.add(Counts(0, firing={name: firing}))
        return fired


def operations_of_mix(channels: int, vectors: int) -> Operations:
    """Operations of :func:`spikellm.quantization.hadamard.mix`: additions of operands that are not
    coded.
    """
    power = largest_power(channels)
    additions = vectors * power * (power.bit_length() - 1) * (1 if power == channels else 2)
    return Operations(0, Counter({(DENSE_BITS, 1): additions}), additions)


def products_of(layer: SpikingLinear) -> dict[tuple[int, int], float]:
    """Multiply-accumulates executed for each of the original ones, by bits of input and weight."""
    activations = layer.settings.activations
    a = activations.bits if activations.spiking else DENSE_BITS
    products = layer.format.products(layer, layer.average_steps)
    return {(a, bits): share for bits, share in products.items()}


def fan_out(layer: SpikingLinear) -> dict[str, Tensor]:
    """Synapses of every stored column, int64 ``(in,)``, by form: its outputs, or its non-zero
    weight spikes where weights are spikes.
    """
    if not layer.format.unrolls:
        every = torch.full(
            (layer.in_features,), layer.out_features, device=layer.channel_group.device
        )
        return dict.fromkeys(FORMS, every)
    size = layer.integer_weights().abs()
    merged, unrolled = (size > 0).sum(0), size.sum(0, dtype=torch.int64)
    return {"merged": merged, "stepped": unrolled, "binary": unrolled}


def count_operations(
    model: nn.Module, windows: Iterable[Tensor], decode: int = 0
) -> dict[str, Counts]:
    """Operations of a forward pass over every batch of windows.

    Args:
        windows: tokens, ``(windows, tokens)`` each.
        decode: of the tokens of each window how many come one at a time, after the others, from a
            cache.

    Returns:
        ``prefill``, and ``decode`` if there is any.
    """
    device = next(model.parameters()).device
    found = {"prefill": Counts(0), **({"decode": Counts(0)} if decode else {})}
    with torch.no_grad(), evaluating(model), OperationCounter(model) as counter:
        for window in windows:
            whole, single = window.to(device).tensor_split([window.shape[1] - decode], dim=1)
            past = getattr(model(whole, use_cache=decode > 0), "past_key_values", None)
            found["prefill"].add(counter.take())
            for place in range(decode):
                past = model(
                    single[:, place : place + 1], past_key_values=past, use_cache=True
                ).past_key_values
                found["decode"].add(counter.take())
    return found
