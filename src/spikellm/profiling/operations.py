"""What a forward pass does: multiply-accumulates by operand bits, arithmetic effort, spikes and
synaptic operations, counted while it runs.

    ACE  = Σ over multiply-accumulates of bits(a) · bits(b); a channel of T steps counts T times
    SOPs = Σ over non-zero spikes of their fan-out

A count n of T steps of at most L is one spike in merged mode, ``⌈|n|/L⌉`` in stepped mode (the
drained train), |n| in binary mode, and as many as n has digits in phase mode. It is the code q of a
published train, and ``q − z`` of a centered one. The fan-out of an input spike is the number of the
layer's weights in its column that are not zero, or of the weight spikes there where weights are
ternary spikes; the charge of the baseline, which only published trains have, belongs to the code.
What is no product of matrices is counted by :mod:`spikellm.profiling.work_counter`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from spikellm.models.attention_interface import (
    IMPLEMENTATION,
    use_interface,
    watching_heads,
)
from spikellm.models.families import decoder_of, is_linear, weight_and_bias
from spikellm.models.next_token import piecewise_outputs
from spikellm.models.plain_attention import Operands, library_computes, watching_plain
from spikellm.models.prepare import evaluating
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotation, layer_name
from spikellm.nn.vocabulary import CodedHead
from spikellm.profiling.attention_products import (
    AttentionProduct,
    operations_of_product,
    products_of_attention,
)
from spikellm.profiling.before_coding import operations_before_coding, operations_of_rotation
from spikellm.profiling.counted_layer import counted_layer
from spikellm.profiling.counts import DENSE_BITS, EXECUTION_MODES, Counts, Operations
from spikellm.profiling.firing import Fired, LastFired
from spikellm.profiling.linear_products import products_of
from spikellm.profiling.shifts import doublings, shifts_of_product
from spikellm.profiling.work_counter import WorkCounter


class OperationCounter:
    """Context manager that counts the operations of every forward pass within it.

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
            if isinstance(module, (SpikingLinear, CodedHead)) or is_linear(module)
        }
        self._last_rotated: Callable[[], Tensor | None] = lambda: None
        self._rotations = [module for module in self._names if isinstance(module, Rotation)]
        self._trains: dict[tuple[nn.Module, str], SpikeTrain] = {}
        self._fired = LastFired()
        self._work = WorkCounter(lambda: self._counts)

    def take(self) -> Counts:
        """Counts since the last call."""
        found, self._counts = self._counts, Counts(0)
        self._fired = LastFired()
        return found

    def __enter__(self) -> OperationCounter:
        decoder = self._decoder = decoder_of(self._model)
        self._before = str(decoder.config._attn_implementation)
        self._contexts: list[AbstractContextManager[None]] = []
        if self._before != IMPLEMENTATION and library_computes(self._before):
            # Of plain attention only sizes are needed, so it runs as it is.
            self._contexts.append(watching_plain(decoder, self._attention))
        elif self._before != IMPLEMENTATION and decoder._can_set_attn_implementation():
            use_interface(self._model)
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        self._handles = [module.register_forward_hook(self._linear) for module in self._linears]
        self._handles += [
            module.register_forward_hook(self._rotation) for module in self._rotations
        ]
        self._handles += self._work.handles(self._model)
        self._handles.append(embedding.register_forward_hook(self._tokens))
        self._contexts += [watching_heads(self._heads), observe_spikes(self._spikes)]
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        for context in self._contexts:
            context.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        if str(self._decoder.config._attn_implementation) != self._before:
            self._decoder.set_attn_implementation(self._before)

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
            bits = DENSE_BITS
            if isinstance(module, CodedHead):
                bits, weights = module.table.settings.bits, module.in_features * module.out_features
            else:
                weights = weight_and_bias(module)[0].numel()
            macs = tokens * weights
            entry.add(Operations(macs, Counter({(DENSE_BITS, bits): macs}), operands=weights))
            return
        facts = counted_layer(module)
        self._work.linear(module, tokens)
        macs = tokens * module.in_features * module.out_features
        train = self._trains.pop((module, "input"), None)
        products = products_of(module, train) if facts.massive else facts.products
        executed = Counter({bits: round(macs * share) for bits, share in products.items()})
        counted = facts.average_steps  # of the format itself, beyond what is executed
        extra = 0.0 if counted is None else macs * counted - executed.total()
        entry.macs += macs
        entry.by_bits.update(executed)
        entry.additions += facts.additive_share * executed.total()
        entry.extra_steps += extra
        entry.operands += macs // max(tokens, 1)
        if train is not None:
            fired = self._fire(entry, f"{self._names[module]}.input", train)
            self._work.fired(train, fired.firing)
            doubled = facts.doublings * tokens
            if facts.massive:
                doubled = int(doublings(train.neuron, train.steps, facts.accumulators).sum())
            entry.shifts += doubled * module.out_features
            for mode, spikes in fired.firing.spikes.items():
                entry.reached[mode] += spikes * module.out_features
            own, zero = fired.synapses(facts.reach)
            entry.sops.update(own)
            entry.sops_from_zero.update(zero)
        elif module.format.unrolls:
            sums = (tokens * facts.reach.sum(0)).expand(len(EXECUTION_MODES)).tolist()
            each = dict(zip(EXECUTION_MODES, sums, strict=True))
            entry.sops.update(each)
            entry.sops_from_zero.update(each)
            entry.reached.update(dict.fromkeys(EXECUTION_MODES, macs))

    def _rotation(self, module: Rotation, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        works = module.rotated or module.offset is not None
        if works and self._last_rotated() is not output:  # else another layer's, shared
            self._last_rotated = weakref.ref(output)
            entry = self._entry(self._names[module], "rotation")
            for operations in operations_of_rotation(module, output.shape[:-1].numel()):
                entry.add(operations)

    def _heads(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        self._attention(module, Operands(query, key, value))

    def _attention(self, module: nn.Module, seen: Operands) -> None:
        name, child = self._names[module], getattr(module, "spikes", None)
        spikes = child if isinstance(child, SpikingAttention) else None
        if spikes is not None and (spikes.settings.rotate or spikes.settings.center):
            entry = self._entry(f"{name} rotation", "rotation")
            for operations in operations_before_coding(seen, spikes.settings):
                entry.add(operations)
        self._work.attention(seen, spikes)
        for product in products_of_attention(seen):
            entry = self._entry(f"{name} {product.name}", "attention")
            train = None if spikes is None else self._trains.get((spikes, product.cached))
            entry.add(operations_of_product(product, spikes, train))
            if spikes is not None:
                self._fire_into_product(entry, name, product, spikes)

    def _fire_into_product(
        self, entry: Operations, name: str, product: AttentionProduct, spikes: SpikingAttention
    ) -> None:
        """Count the spikes of both operands, and what one of them sets off."""
        driving: SpikeTrain | None = None
        for part in (product.cached, product.arriving):
            train = self._trains.pop((spikes, part), None)
            if train is not None:
                # The operand that arrives drives the other one, where it spikes.
                driving, firing = train, self._fire(entry, f"{name}.{part}", train).firing
        if driving is None:
            return
        self._work.fired(driving, firing)
        entry.shifts += shifts_of_product(product, driving, spikes)
        each = product.fan_out[driving.part]
        own = {mode: spikes * each for mode, spikes in firing.spikes.items()}
        entry.sops.update(own)
        entry.reached.update(own)
        entry.sops_from_zero.update({m: spikes * each for m, spikes in firing.from_zero.items()})

    def _fire(self, entry: Operations, name: str, train: SpikeTrain) -> Fired:
        """Count a train's spikes."""
        fired = self._fired.of(train)
        firing = fired.firing
        entry.slots += firing.slots
        entry.codes += firing.codes
        entry.spikes.update(firing.spikes)
        entry.spikes_from_zero.update(firing.from_zero)
        self._counts.add(Counts(0, firing={name: firing}))
        return fired


def count_operations(
    model: nn.Module, windows: Iterable[Tensor], decode: int = 0
) -> dict[str, Counts]:
    """Operations of a forward pass over every batch of windows.

    Args:
        windows: tokens, ``(windows, tokens)`` each.
        decode: how many of the last tokens of each window are processed one at a time, with a
            cache.

    Returns:
        ``prefill``, and ``decode`` if there is any.
    """
    device = next(model.parameters()).device
    found = {"prefill": Counts(0), **({"decode": Counts(0)} if decode else {})}
    with torch.no_grad(), evaluating(model), OperationCounter(model) as counter:
        for window in windows:
            whole, single = window.to(device).tensor_split([window.shape[1] - decode], dim=1)
            past = None
            for _, output in piecewise_outputs(model, whole, use_cache=decode > 0):
                past = getattr(output, "past_key_values", None)
            found["prefill"].add(counter.take())
            for place in range(decode):
                past = model(
                    single[:, place : place + 1], past_key_values=past, use_cache=True
                ).past_key_values
                found["decode"].add(counter.take())
    return found
