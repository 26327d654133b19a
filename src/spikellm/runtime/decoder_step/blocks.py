"""A whole decoder as a list of operations, from the structure of its blocks and one pass that was
looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from spikellm.kernels.native.step_plan import Place, StepProgram
from spikellm.models.decoder_capture import AttentionCall, Captured
from spikellm.models.families import (
    block_parts,
    block_roles,
    decoder_of,
    final_norm,
    find_blocks,
)
from spikellm.runtime.decoder_step.heads import Heads, attention_of
from spikellm.runtime.decoder_step.parts import (
    UndescribedError,
    activation_of,
    add_linear,
    add_norm,
)


class Reading(NamedTuple):
    """What the structure of a block leaves open.

    Attributes:
        parallel: attention and the feed-forward part read the same tensor.
        by_head: of a fused layer, Q, K and V of one head stand together.
        behind: norms stand behind the parts, not before them.
    """

    parallel: bool = False
    by_head: bool = False
    behind: bool = False


@dataclass
class Built:
    """A decoder as operations.

    Attributes:
        starts: the first operation of each block, then the one behind the last block.
        layers: linear layers whose inputs the program shows, in order.
        tables: of each table of rotary embedding, a block that is given it.
        kept: what the program points to.
        projects: whether the program ends with the output projection.
    """

    program: StepProgram
    starts: list[int] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    projects: bool = False


def build(model: Any, seen: Captured, reading: Reading) -> Built:
    """The decoder of a model as operations.

    Raises:
        UndescribedError: a part that there is no operation for.
    """
    blocks, decoder = find_blocks(model).modules, decoder_of(model)
    hidden, head = seen.given[0], model.get_output_embeddings()
    assert seen.projected is not None
    program = StepProgram(hidden.shape[-1], seen.projected.shape[-1], hidden.dtype)
    built = Built(program)
    windows = _windows(decoder, len(blocks))
    stream = program.input
    for index, block in enumerate(blocks):
        built.starts.append(program.length)
        _Block(built, block, seen, index, windows[index], reading).add(stream)
    built.starts.append(program.length)
    norm = final_norm(decoder)
    source = stream
    if norm is not None:
        source = program.place("normed", stream.size)
        add_norm(program, source, stream, norm)
    add_linear(program, built.layers, program.output, source, head)
    built.projects = True
    return built


def _windows(decoder: Any, blocks: int) -> list[int]:
    """Sliding window of each block as the library's cache has them; 0 where there is none."""
    layers = DynamicCache(config=decoder.config).layers
    found = [int(getattr(layer, "sliding_window", 0) or 0) for layer in layers]
    return found if len(found) == blocks else [0] * blocks


class _Block:
    """One block on its way into a program."""

    def __init__(
        self,
        built: Built,
        block: nn.Module,
        seen: Captured,
        index: int,
        window: int,
        reading: Reading,
    ) -> None:
        self.built, self.program, self.block, self.reading = built, built.program, block, reading
        self.index, self.window = index, window
        self.parts, self.roles = block_parts(block), block_roles(block)
        attention = self.parts.get("attention")
        if attention is None or attention not in seen.attention:
            raise UndescribedError(
                f"{type(block).__name__} computes attention in a way that it does not know"
            )
        self.attention, self.call = attention, seen.attention[attention]
        self.pair = seen.embeddings[index]

    def add(self, stream: Place) -> None:
        """Operations that take what stands in ``stream`` through the block."""
        program, size, parts = self.program, stream.size, self.parts
        behind = self.reading.behind
        if behind and not {"attention_norm", "feedforward_norm"} <= set(parts):
            raise UndescribedError(f"{type(self.block).__name__} has no norms behind its parts")
        normed = self._normed("attention_norm", stream) if not behind else stream
        attended = self._behind("attention_post_norm", self._attend(normed, size))
        if self.reading.parallel:
            shared = "feedforward_norm" not in parts
            source = normed if shared else self._normed("feedforward_norm", stream)
            fed = self._feed(source, size)
            program.add(fed, fed, attended)
            program.add(stream, fed, stream)
            return
        program.add(stream, stream, attended)
        if behind:
            add_norm(program, stream, stream, parts["attention_norm"])
        fed = self._feed(self._normed("feedforward_norm", stream) if not behind else stream, size)
        program.add(stream, stream, self._behind("feedforward_post_norm", fed))
        if behind:
            add_norm(program, stream, stream, parts["feedforward_norm"])

    def _normed(self, role: str, source: Place) -> Place:
        norm = self.parts.get(role)
        if norm is None:
            return source
        place = self.program.place("normed", source.size)
        add_norm(self.program, place, source, norm)
        return place

    def _behind(self, role: str, place: Place) -> Place:
        if (norm := self.parts.get(role)) is not None:
            add_norm(self.program, place, place, norm)
        return place

    def _linear(self, role: str, into: Place, source: Place) -> None:
        name = self.roles[role]
        wrapper = name.rpartition(".")[0]  # of a layer behind a rotation
        owner = self.block.get_submodule(wrapper) if wrapper else self.block
        module = owner if hasattr(owner, "rotated_linear") else self.block.get_submodule(name)
        add_linear(self.program, self.built.layers, into, source, module)

    def _attend(self, source: Place, columns: int) -> Place:
        program, call = self.program, self.call
        query, key, value = self._projections(source, call)
        for role, place in (("query_norm", query), ("key_norm", key)):
            if (norm := self.parts.get(role)) is not None:
                add_norm(program, place, place, norm)
        scaling = float(getattr(self.attention, "scaling", call.scaling))
        if call.scaling == 1.0 and scaling != 1.0:
            program.scale(query, scaling)
        if self.pair is not None:
            table = self._table(self.pair)
            for place in (query, key):
                program.rope(place, table, self.pair[0].shape[-1])
        width = call.value.shape[-1]
        attended = program.place("attended", query.heads * width)
        spread = program.columns_of(attended, 0, width, query.heads)
        attention = attention_of(
            program, self.attention, call, Heads(query, key, value, self.window)
        )
        program.attend(spread, query, key, attention)
        into = program.place("output", columns)
        self._linear("output", into, attended)
        return into

    def _feed(self, source: Place, columns: int) -> Place:
        program, roles = self.program, self.roles
        if "up" not in roles or "down" not in roles or "activation" not in self.parts:
            raise UndescribedError(f"{type(self.block).__name__} has no feed-forward part it knows")
        kind = activation_of(self.parts["activation"], program.dtype)
        width = _columns(self.block.get_submodule(roles["down"]))
        rows = _rows(self.block.get_submodule(roles["up"]))
        up = program.place("up", rows)
        fed = program.place("fed", width)
        if "gate" in roles:
            gate = program.place("gate", width)
            self._linear("gate", gate, source)
            self._linear("up", up, source)
            program.activate(fed, gate, kind, up)
        elif rows == 2 * width:
            self._linear("up", up, source)
            halves = [program.columns_of(up, first, width) for first in (0, width)]
            program.activate(fed, halves[0], kind, halves[1], by_row=True)
        else:
            self._linear("up", up, source)
            program.activate(fed, up, kind, None)
        into = program.place("output", columns)
        if self.reading.parallel:
            into = program.place("feed-forward", columns)
        self._linear("down", into, fed)
        return into

    def _table(self, pair: tuple[Tensor, Tensor]) -> int:
        for number, block in enumerate(self.built.tables):
            if self.built.kept[block] is pair[0]:
                return number
        while len(self.built.kept) <= self.index:
            self.built.kept.append(None)
        self.built.kept[self.index] = pair[0]
        self.built.tables.append(self.index)
        return len(self.built.tables) - 1

    def _projections(self, source: Place, call: AttentionCall) -> tuple[Place, Place, Place]:
        program = self.program
        heads, own = call.query.shape[1], call.key.shape[1]
        key_size, value_size = call.key.shape[-1], call.value.shape[-1]
        if "fused" not in self.roles:
            found = []
            sizes = ((heads, key_size), (own, key_size), (own, value_size))
            for role, (count, size) in zip(("query", "key", "value"), sizes, strict=True):
                if role not in self.roles:
                    raise UndescribedError(f"{type(self.block).__name__} has no layer for {role}")
                place = program.place(role, count * size)
                self._linear(role, place, source)
                found.append(program.columns_of(place, 0, size, count))
            return found[0], found[1], found[2]
        fused = program.place("fused", heads * key_size + own * (key_size + value_size))
        self._linear("fused", fused, source)
        if self.reading.by_head:
            apart, ends = 2 * key_size + value_size, (0, key_size, 2 * key_size)
            wide = (key_size, key_size, value_size)
            parts = [
                program.columns_of(fused, first, size, heads, apart)
                for first, size in zip(ends, wide, strict=True)
            ]
            return parts[0], parts[1], parts[2]
        first, second = heads * key_size, (heads + own) * key_size
        return (
            program.columns_of(fused, 0, key_size, heads),
            program.columns_of(fused, first, key_size, own),
            program.columns_of(fused, second, value_size, own),
        )


def _rows(layer: nn.Module) -> int:
    """Outputs of a linear layer of any kind."""
    found = getattr(layer, "out_features", None)
    return int(layer.nf if found is None else found)  # type: ignore[arg-type]


def _columns(layer: nn.Module) -> int:
    """Inputs of a linear layer of any kind."""
    found = getattr(layer, "in_features", None)
    return int(layer.nx if found is None else found)  # type: ignore[arg-type]
