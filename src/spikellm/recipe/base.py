"""What the sections of a recipe are made of: frozen models of plain data, and options of parts that
are chosen by name.

The options of a part lie beside the part, in a class that derives from one of those here and is
entered by :func:`register_options`. A recipe looks the class up by the name that it finds, so that
an option of another part is an unknown key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from spikellm.core.registry import Registry

UNKNOWN_KEY = "unknown_key"  # type of the error for a key that a section does not have


class Section(BaseModel):
    """Frozen; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_such_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        UNKNOWN_KEY,
                        "unknown key {key}",
                        {
                            "key": str(key),
                            "valid": list(cls.model_fields),
                            "owners": cls._owners(key),
                        },
                    )
        return data

    @classmethod
    def _owners(cls, key: str) -> list[str]:
        """Other parts of the same kind that have such a key."""
        return []

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_for_a_number(cls, value: Any, field: ValidationInfo) -> Any:
        own = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and float in (own, *get_args(own)):
            raise ValueError("a number is expected, not true or false")
        return value

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        if isinstance(value, str) and any("\ud800" <= one <= "\udfff" for one in value):
            raise ValueError("holds half a character, which no file can hold; take it out")
        return value


class GrownSection(Section):
    """A section that got fields after recipes of its version were saved.

    A new field that is not set is left out when a recipe is saved: what was saved before stays
    equal to what is saved now, so that it can be resumed.

    Attributes:
        added: names of the new fields.
    """

    added: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = serialize(self)
        for name in self.added:
            if name in data and data[name] == type(self).model_fields[name].default:
                del data[name]
        return data


class PartOptions(Section):
    """Options of one part that a recipe chooses by name; each part defines its own subclass.

    Attributes:
        tag: the field that holds the name: ``name`` of algorithms and transforms, ``format`` of
            weights. Subclasses declare it as a ``Literal`` with a default.
        registry: the classes of this kind by name.
    """

    tag: ClassVar[str] = "name"
    registry: ClassVar[Registry[Any]]

    @classmethod
    def part_name(cls) -> str:
        """The name under which a recipe chooses the part."""
        return str(cls.model_fields[cls.tag].default)

    def check(self, recipe: Any) -> None:
        """Refuse what has no effect, or cannot be, beside the other sections of a recipe.

        Args:
            recipe: the whole :class:`spikellm.recipe.Recipe`.

        Raises:
            ValueError: one line that names the field with its section.
        """

    @classmethod
    def _owners(cls, key: str) -> list[str]:
        return [name for name in cls.registry.names() if key in cls.registry[name].model_fields]


class AlgorithmOptions(PartOptions):
    """Options of an algorithm: ``algorithm: {name: gptq, …}``."""

    registry: ClassVar[Registry[type[AlgorithmOptions]]] = Registry("algorithm")
    name: str


class TransformOptions(PartOptions):
    """Options of a transform: an entry of ``transforms: [{name: residual-rotation}, …]``."""

    registry: ClassVar[Registry[type[TransformOptions]]] = Registry("transform")
    name: str

    @property
    def centers(self) -> tuple[str, ...]:
        """Sites whose inputs it takes the mean away from."""
        return ()


class WeightOptions(PartOptions):
    """Options of a weight format: ``weights: {format: ternary, …}``.

    A format has only its own fields; what it does not have reads as below, so that whoever asks
    need not know the format.

    Attributes:
        meets_spikes: whether weights are integers that meet the spikes of inputs; otherwise inputs
            must stay as they are.
        bits: of an ordinary column's code; every format has it, as a field or a property.
        symmetric: whether the zero-point is fixed in the middle.
        group_size: columns that share a scale; None for the whole row.
        scale_bits: of a scale.
        scale_terms: signed powers of two that a scale is the sum of; None for any.
        salient_rate, salient_steps, saliency, invert: columns whose weights take several steps.
        budget, allocation: average steps of all columns, and over what they are spent.
    """

    tag: ClassVar[str] = "format"
    registry: ClassVar[Registry[type[WeightOptions]]] = Registry("weight format")
    meets_spikes: ClassVar[bool] = True
    format: str

    def top(self, steps: int) -> int:
        """Largest code of a weight of T steps: T·L, with L = 2**bits − 1."""
        return steps * ((1 << self.bits) - 1)

    @property
    def salient_bits(self) -> int:
        """Bits of the code of a salient column."""
        return self.top(self.salient_steps).bit_length()

    if TYPE_CHECKING:

        @property
        def bits(self) -> int: ...

        @property
        def symmetric(self) -> bool: ...

        @property
        def group_size(self) -> int | None: ...

        @property
        def scale_bits(self) -> int: ...

        @property
        def scale_terms(self) -> int | None: ...

        @property
        def salient_rate(self) -> float: ...

        @property
        def salient_steps(self) -> int: ...

        @property
        def saliency(self) -> str: ...

        @property
        def invert(self) -> bool: ...

        @property
        def budget(self) -> float | None: ...

        @property
        def allocation(self) -> str: ...

    else:

        def __getattr__(self, name: str) -> Any:
            # attributes of this class would be shadowed by the fields of formats
            return _ABSENT[name] if name in _ABSENT else super().__getattr__(name)


_ABSENT = {
    "symmetric": False,
    "group_size": None,
    "scale_bits": 32,
    "scale_terms": None,
    "salient_rate": 0.0,
    "salient_steps": 1,
    "saliency": "second-order",
    "invert": False,
    "budget": None,
    "allocation": "layer",
}
Options = TypeVar("Options", bound=PartOptions)


def register_options(options: type[Options]) -> type[Options]:
    """Class decorator that enters the options of a part under the name that their tag field has.

    Raises:
        ValueError: another class of the kind has that name.
    """
    options.registry.register(options.part_name())(options)
    return options
