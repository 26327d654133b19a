"""Energy, estimated from operation counts with a table of energies per operation.

An estimate is never a measurement. Products of matrices by execution mode:

- dense: every multiply-accumulate of the original at 16 bits.
- merged: every multiply-accumulate as executed; integers by the product of their widths, 16-bit
  inputs with coded weights as floating point, additions where weights have one bit.
- stepped: event-driven, one multiplication of a spike's width for each synaptic operation (one
  addition where weights are ternary).
- binary: event-driven, one addition for each synaptic operation.
- phase: event-driven, one addition for each synaptic operation, and one shift for each doubling of
  an accumulator (:mod:`spikellm.profiling.shifts`).

What is no product has rows of its own (:data:`spikellm.profiling.work.ROWS`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from spikellm.core.errors import RequestError
from spikellm.profiling.counts import DENSE, DENSE_BITS, EXECUTION_MODES, Counts, Operations
from spikellm.profiling.elementary import Price, Work, energy_of_work, times, total
from spikellm.profiling.energy_table import EnergyTable
from spikellm.profiling.work import ROWS

OMITTED = (
    "embeddings, activation functions and their products with gates, residual sums, biases, moving"
    " values other than weights and spikes, accumulators, control and static power; zero spikes are"
    " taken to cost nothing at synapses; reading weights from memory beside the chip is apart"
)
PRODUCTS = ("linear", "attention", "head", "rotation")
"""Kinds of products of matrices, which rotations before coding go with."""
_COLUMNS = (DENSE, *EXECUTION_MODES)


@dataclass(frozen=True)
class Energy:
    """Estimated energy, pJ; None where the table does not know an operation.

    Attributes:
        dense: of the original at 16 bits.
        modes: of each execution mode.
        weight_traffic: reading the weights from memory beside the chip; part of no sum.
        unknown: of the whole, rows that are not in the sum of a column (``dense`` or an execution
            mode) since the table does not know an operation of theirs.
    """

    dense: Price
    modes: Mapping[str, Price]
    weight_traffic: Price
    unknown: Mapping[str, tuple[str, ...]]

    def columns(self) -> tuple[Price, ...]:
        """Of the original, then of each execution mode."""
        return self.dense, *self.modes.values()

    def ratio(self, mode: str) -> Price:
        """Energy of a mode over that of the original.

        Raises:
            ZeroDivisionError: the original takes none.
        """
        own = self.modes[mode]
        return None if own is None or self.dense is None else own / self.dense

    def to_data(self) -> dict[str, Any]:
        """Plain data: ``dense``, each mode, ``weight_traffic``; ``unknown`` where there are any."""
        found = {DENSE: self.dense, **self.modes, "weight_traffic": self.weight_traffic}
        unknown = {column: list(rows) for column, rows in self.unknown.items()}
        return {**found, **({"unknown": unknown} if unknown else {})}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Energy:
        """Inverse of :meth:`to_data`.

        Raises:
            KeyError: an execution mode is not there.
        """
        modes = {mode: data[mode] for mode in EXECUTION_MODES}
        unknown = {column: tuple(rows) for column, rows in data.get("unknown", {}).items()}
        return cls(data[DENSE], modes, data["weight_traffic"], unknown)


def check_rows(rows: Collection[str]) -> None:
    """Check names of rows that are to be left out.

    Raises:
        RequestError: not a row.
    """
    if strangers := [row for row in rows if row not in ROWS]:
        raise RequestError(
            f"{', '.join(map(repr, strangers))} is no row of the energy estimate that can be left"
            f" out (valid: {', '.join(ROWS)})"
        )


def energies(
    counts: Counts,
    table: EnergyTable,
    weight_bytes: Mapping[str, int] | None = None,
    without: Collection[str] = (),
) -> dict[str, Energy]:
    """Estimated energy of counted passes: of each of :data:`PRODUCTS`, of each row that is not left
    out, and of the ``whole``.

    The whole of a column is not known where its products are not; rows that are not known are left
    out of it, and named.

    Args:
        weight_bytes: of each kind of products, bytes of weights that were read from memory beside
            the chip.
        without: rows to leave out.

    Raises:
        RequestError: not a row.
    """
    check_rows(without)
    read = dict.fromkeys(PRODUCTS, 0) | dict(weight_bytes or {})
    found = {kind: _of_products(counts, table, kind, read[kind]) for kind in PRODUCTS}
    prices = {
        operation: table.elementary(operation)
        for by_mode in counts.work.values()
        for work in by_mode.values()
        for operation in work
    }
    for row in ROWS:
        if row not in without:
            by_mode = counts.work.get(row, {})
            found[row] = (
                _of_memory(counts, table)
                if row == "memory"
                else _energy(
                    {c: energy_of_work(by_mode.get(c, Work()), prices) for c in _COLUMNS}, 0.0
                )
            )
    return {**found, "whole": _whole(found)}


def estimate(
    counts: Counts,
    table: EnergyTable,
    weight_bytes: int = 0,
    passes: int = 1,
    without: Collection[str] = (),
) -> Energy:
    """Estimated energy of counted passes, all of them together.

    Args:
        weight_bytes: bytes of all weights, read from memory once a pass.
        passes: forward passes that were counted.
        without: rows to leave out.

    Raises:
        RequestError: not a row.
    """
    return energies(counts, table, {"linear": weight_bytes * passes}, without)["whole"]


def layer_energy(layer: Operations, table: EnergyTable, mode: str) -> Price:
    """Estimated energy of one layer's arithmetic in one execution mode, pJ."""
    if mode == DENSE:
        return times(layer.macs, table.multiply_accumulate(DENSE_BITS, DENSE_BITS))
    (a, b), _ = max(layer.by_bits.items(), key=lambda item: item[1])
    adds = layer.additive_share > 0.999
    # Weights that are spikes have synaptic operations in merged mode too: one multiplication for
    # each weight that is not zero.
    if layer.sops and (mode != "merged" or not layer.slots):
        events = times(layer.sops[mode], table.event(mode, a, b, additive=adds))
        return events if mode != "phase" else total(events, times(layer.shifts, table.doubling(a)))
    multiplied = total(
        *(times(count, table.multiply_accumulate(*bits)) for bits, count in layer.by_bits.items())
    )
    additions = times(layer.additions, table.addition(a))
    return total(times(1 - layer.additive_share, multiplied), additions)


def bytes_read(layer: Operations, table: EnergyTable, mode: str) -> float:
    """Bytes of weights, or of cached keys and values, that are read on the chip.

    A product of matrices reads each once a call, for all tokens of it. Events read one a synaptic
    operation, unless the table has that in its synaptic operation. Where a cached operand spikes
    itself, what it meets is read.
    """
    if mode == DENSE:
        return layer.operands * DENSE_BITS / 8
    (a, b), _ = max(layer.by_bits.items(), key=lambda item: item[1])
    if mode == "merged" or not layer.slots:
        return layer.operands * b / 8
    if table.whole_synapse(mode, a) is not None:
        return 0.0
    return layer.sops[mode] * (DENSE_BITS if a == DENSE_BITS else b) / 8


def _of_products(counts: Counts, table: EnergyTable, kind: str, read: int) -> Energy:
    layers = [layer for name, layer in counts.layers.items() if counts.kinds[name] == kind]
    columns = {
        column: total(*(layer_energy(layer, table, column) for layer in layers))
        for column in _COLUMNS
    }
    return _energy(columns, times(read, table.picojoules.dram_byte))


def _of_memory(counts: Counts, table: EnergyTable) -> Energy:
    layers = [layer for layer in counts.layers.values() if layer.by_bits]
    columns = {
        column: times(
            sum(bytes_read(layer, table, column) for layer in layers), table.picojoules.sram_byte
        )
        for column in _COLUMNS
    }
    return _energy(columns, 0.0)


def _whole(parts: Mapping[str, Energy]) -> Energy:
    columns: dict[str, Price] = {}
    unknown: dict[str, tuple[str, ...]] = {}
    for column in _COLUMNS:
        own = {name: _column(energy, column) for name, energy in parts.items()}
        known = {name: value for name, value in own.items() if value is not None}
        products = total(*(own[kind] for kind in PRODUCTS))
        columns[column] = None if products is None else sum(known.values())
        if products is not None and len(known) < len(own):
            unknown[column] = tuple(name for name in own if name not in known)
    return _energy(columns, total(*(part.weight_traffic for part in parts.values())), unknown)


def _column(energy: Energy, column: str) -> Price:
    return energy.dense if column == DENSE else energy.modes[column]


def _energy(
    columns: Mapping[str, Price],
    weight_traffic: Price,
    unknown: Mapping[str, tuple[str, ...]] | None = None,
) -> Energy:
    modes = {mode: columns[mode] for mode in EXECUTION_MODES}
    return Energy(columns[DENSE], modes, weight_traffic, unknown or {})
