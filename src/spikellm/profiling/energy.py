"""Energy, estimated from operation counts with a table of energies per operation.

An estimate is never a measurement.

- dense: every multiply-accumulate of the original at 16 bits.
- merged: every multiply-accumulate as executed; integers by the product of their widths, 16-bit
  inputs with coded weights as floating point, additions where weights have one bit.
- stepped: event-driven, one multiplication of a spike's width for each synaptic operation (one
  addition where weights are ternary).
- binary: event-driven, one addition for each synaptic operation.
- phase: event-driven, one shift and one addition for each synaptic operation.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spikellm.core.errors import RequestError
from spikellm.core.io import PlainDataError, read_text, read_yaml
from spikellm.profiling.counts import DENSE_BITS, EXECUTION_MODES, Counts, Operations

DEFAULT = "horowitz-45nm"
OMITTED = (
    "coding inputs (ranges, thresholds, comparisons), scaling of sums, softmax, norms, embeddings,"
    " control and routing; zero spikes are taken to cost nothing in stepped and binary"
    " execution; memory traffic is apart"
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Picojoules(_Section):
    """Energy of one operation, pJ."""

    fp16_multiply: float = Field(gt=0)
    fp16_add: float = Field(gt=0)
    int8_multiply: float = Field(gt=0)
    int32_add: float = Field(gt=0)
    int8_shift: float | None = Field(None, gt=0)
    dram_byte: float = Field(gt=0)


class EnergyTable(_Section):
    """A table with its source."""

    name: str
    source: str
    picojoules: Picojoules

    def multiply_accumulate(self, a: int, b: int) -> float:
        """Energy of a product of operands of a and b bits and its accumulation, pJ.

        16 bits are floating point.
        """
        if DENSE_BITS in (a, b):
            return self.picojoules.fp16_multiply + self.picojoules.fp16_add
        return self.picojoules.int8_multiply * a * b / 64 + self.picojoules.int32_add

    def addition(self, bits: int) -> float:
        """Energy of adding an operand of so many bits to a sum, pJ."""
        return self.picojoules.fp16_add if bits == DENSE_BITS else self.picojoules.int32_add

    def shift_and_add(self, bits: int) -> float:
        """Energy of shifting an integer weight and adding it to a sum, pJ, for a spike that comes
        from codes of so many bits; inputs that are not coded are never shifted. A table without
        shifts counts an addition for each.
        """
        if bits == DENSE_BITS:
            return self.addition(bits)
        shift = self.picojoules.int8_shift
        return self.addition(bits) + (self.picojoules.int32_add if shift is None else shift)


class Energy(NamedTuple):
    """Estimated energy, pJ.

    Attributes:
        dense: arithmetic of the original.
        merged, stepped, binary, phase: arithmetic of each execution mode.
        weight_traffic: reading the weights.
    """

    dense: float
    merged: float
    stepped: float
    binary: float
    phase: float
    weight_traffic: float


def load_table(source: str | Path | None = None) -> EnergyTable:
    """A table by name of a built-in one, or from a YAML file.

    Raises:
        RequestError: no such file, or not a table.
    """
    folder = resources.files("spikellm.profiling") / "energy_tables"
    own = sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )
    name = str(source or DEFAULT)
    try:
        text = (
            (folder / f"{name}.yaml").read_text("utf-8") if name in own else read_text(Path(name))
        )
        return EnergyTable.model_validate(read_yaml(text))
    except OSError:
        raise RequestError(
            f"energy table {name!r}: no such file, and no built-in table of that name"
            f" ({', '.join(own)})"
        ) from None
    except PlainDataError as error:
        raise RequestError(f"energy table {name}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise RequestError(
            f"energy table {name}: {place}: {first['msg']}; expected name, source and picojoules"
            f" with {', '.join(Picojoules.model_fields)}"
        ) from None


def estimate(counts: Counts, table: EnergyTable, weight_bytes: int = 0, passes: int = 1) -> Energy:
    """Estimated energy of counted passes.

    Args:
        weight_bytes: bytes of all weights, read from memory once a pass.
        passes: forward passes that were counted.
    """
    by_mode = dict.fromkeys(EXECUTION_MODES, 0.0)
    for mode in EXECUTION_MODES:
        by_mode[mode] = sum(layer_energy(layer, table, mode) for layer in counts.layers.values())
    dense = counts.total().macs * table.multiply_accumulate(DENSE_BITS, DENSE_BITS)
    return Energy(
        dense,
        by_mode["merged"],
        by_mode["stepped"],
        by_mode["binary"],
        by_mode["phase"],
        weight_bytes * passes * table.picojoules.dram_byte,
    )


def layer_energy(layer: Operations, table: EnergyTable, mode: str) -> float:
    """Estimated energy of one layer's arithmetic in one execution mode, pJ."""
    (a, b), _ = max(layer.by_bits.items(), key=lambda item: item[1])
    adds = layer.additive_share > 0.999
    # Weights that are spikes have synaptic operations in merged mode too: one multiplication for
    # each weight that is not zero.
    if layer.sops and (mode != "merged" or not layer.slots):
        if mode == "phase":
            event = table.shift_and_add(a)
        elif mode == "binary" or (adds and mode == "stepped"):
            event = table.addition(a)
        else:
            event = table.multiply_accumulate(a, b)
        return layer.sops[mode] * event
    multiplied = sum(
        count * table.multiply_accumulate(*bits) for bits, count in layer.by_bits.items()
    )
    return multiplied * (1 - layer.additive_share) + layer.additions * table.addition(a)
