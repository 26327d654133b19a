"""Tables of energies per operation, as data with their sources.

Every operation is optional. What a table does not have is *not known*: an estimate that needs it is
None, never made up. Some operations are worked out from others instead where their own entry is
missing (:mod:`spikellm.profiling.elementary` and the fields below say how).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from spikellm.core.errors import RequestError
from spikellm.core.io import PlainDataError, read_text, read_yaml
from spikellm.profiling.counts import DENSE_BITS
from spikellm.profiling.elementary import EXPANSIONS, Price, times, total

DEFAULT = "horowitz-45nm"
_MOST = 1e9  # pJ; sums stay finite


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a number or text, not true or false")
        return value


class Picojoules(_Section):
    """Energy of one operation, pJ; None where it is not known.

    Attributes:
        fp16_multiply, fp16_add: of operands of 16 bits.
        int8_multiply: 8 by 8 bits; other widths by the product of their bits.
        int32_add: addition to an integer sum.
        shift: of an integer sum by one place; if missing, an addition of the sum to itself
            (``int32_add``).
        compare: of two numbers; if missing, a subtraction whose sign is read (``int32_add``).
        round: to an integer; if missing, an addition that pushes the fraction out (``fp16_add``).
        exp, divide, root: of numbers of 16 bits, ``root`` being 1/√x; if missing, multiplications
            and additions of a published approximation.
        synaptic_operation: everything that a binary spike sets off at one synapse, on chips that
            state it as one: reading the synapse and adding it up.
        neuron_update, idle_update: a neuron at one moment, with and without a spike; if missing, a
            comparison, and where it fires a subtraction.
        spike: bringing a spike into the network, nothing if missing.
        spike_hop: moving a spike to the next core or tile.
        sram_byte: reading one byte of weights (synapses) on the chip.
        dram_byte: reading one byte from memory beside the chip.
    """

    fp16_multiply: Price = Field(None, gt=0, le=_MOST)
    fp16_add: Price = Field(None, gt=0, le=_MOST)
    int8_multiply: Price = Field(None, gt=0, le=_MOST)
    int32_add: Price = Field(None, gt=0, le=_MOST)
    shift: Price = Field(None, gt=0, le=_MOST)
    compare: Price = Field(None, gt=0, le=_MOST)
    round: Price = Field(None, gt=0, le=_MOST)
    exp: Price = Field(None, gt=0, le=_MOST)
    divide: Price = Field(None, gt=0, le=_MOST)
    root: Price = Field(None, gt=0, le=_MOST)
    synaptic_operation: Price = Field(None, gt=0, le=_MOST)
    neuron_update: Price = Field(None, gt=0, le=_MOST)
    idle_update: Price = Field(None, gt=0, le=_MOST)
    spike: Price = Field(None, gt=0, le=_MOST)
    spike_hop: Price = Field(None, gt=0, le=_MOST)
    sram_byte: Price = Field(None, gt=0, le=_MOST)
    dram_byte: Price = Field(None, gt=0, le=_MOST)


class EnergyTable(_Section):
    """A table with its source.

    Attributes:
        hops: cores or tiles that a spike crosses on its way. Where neurons lie is not decided here,
            so it is an assumption; one is the least.
    """

    name: str = Field(max_length=100)
    source: str = Field(max_length=1000)
    hops: float = Field(1.0, ge=1, le=1e6)
    picojoules: Picojoules

    @field_validator("name", "source")
    @classmethod
    def _can_be_shown(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("holds what cannot be printed on a line; take it out")
        return value

    def multiply_accumulate(self, a: int, b: int) -> Price:
        """Energy of a product of operands of a and b bits and its accumulation, pJ.

        16 bits are floating point.
        """
        own = self.picojoules
        if DENSE_BITS in (a, b):
            return total(own.fp16_multiply, own.fp16_add)
        return total(times(a * b / 64, own.int8_multiply), own.int32_add)

    def addition(self, bits: int) -> Price:
        """Energy of adding an operand of so many bits to a sum, pJ."""
        return self.picojoules.fp16_add if bits == DENSE_BITS else self.picojoules.int32_add

    def doubling(self, bits: int) -> Price:
        """Energy of doubling a sum of operands of so many bits, pJ: a shift by one place of an
        integer, an addition of the sum to itself of floating point.
        """
        shift = None if bits == DENSE_BITS else self.picojoules.shift
        return self.addition(bits) if shift is None else shift

    def whole_synapse(self, mode: str, a: int) -> Price:
        """Energy of a synaptic operation with the reading of the synapse in it, pJ; None where the
        table has none, or none of this kind: spikes of more than one level, operands of 16 bits.
        """
        if a == DENSE_BITS or mode not in ("binary", "phase"):
            return None
        return self.picojoules.synaptic_operation

    def event(self, mode: str, a: int, b: int, *, additive: bool) -> Price:
        """Energy of what one spike does at one synapse in an execution mode, pJ.

        Args:
            a, b: bits of a spike and of what it meets.
            additive: whether weights are spikes, so that a spike of several levels is added.
        """
        whole = self.whole_synapse(mode, a)
        if whole is not None:
            return whole
        if mode in ("binary", "phase") or (additive and mode == "stepped"):
            return self.addition(a)
        return self.multiply_accumulate(a, b)

    def elementary(self, operation: str) -> Price:
        """Energy of an elementary operation of :mod:`spikellm.profiling.elementary`, pJ."""
        own = self.picojoules
        match operation:
            case "multiply":
                return own.fp16_multiply
            case "add":
                return own.fp16_add
            case "compare":
                return own.int32_add if own.compare is None else own.compare
            case "round":
                return own.fp16_add if own.round is None else own.round
            case "idle":
                return self.elementary("compare") if own.idle_update is None else own.idle_update
            case "update":
                if own.neuron_update is not None:
                    return own.neuron_update
                return total(self.elementary("compare"), own.int32_add)
            case "spike":
                return total(own.spike or 0.0, times(self.hops, own.spike_hop))
        stated: Price = getattr(own, operation)
        if stated is not None:
            return stated
        steps = EXPANSIONS[operation].items()
        return total(*(times(count, self.elementary(step)) for step, count in steps))


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
            f" with any of {', '.join(Picojoules.model_fields)}"
        ) from None
