"""Fields of a recipe that hold the options of parts: of whatever class the name in the data stands
for (discriminated unions whose members are registered).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from spikellm.recipe.base import (
    AlgorithmOptions,
    PartOptions,
    TransformOptions,
    WeightOptions,
)
from spikellm.recipe.training import StageOptions

SECTIONS: dict[str, type[PartOptions]] = {
    "algorithm": AlgorithmOptions,
    "weights": WeightOptions,
    "training": StageOptions,
}
DEFAULTS = {"algorithm": "rtn", "weights": "affine", "training": "end-to-end"}


def as_mapping(kind: type[PartOptions], value: Any) -> Any:
    """A bare name as the mapping that it is short for."""
    return {kind.tag: value} if isinstance(value, str) else value


def default_part(section: str) -> Any:
    """Options of the part that a recipe has where it names none."""
    return SECTIONS[section].registry[DEFAULTS[section]]()


def changed_options(
    kind: type[PartOptions], before: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain options with some of them changed; where another part is chosen, those stay that both
    have.
    """
    name = changes.get(kind.tag, before.get(kind.tag))
    if name != before.get(kind.tag) and isinstance(name, str) and name in kind.registry:
        own = kind.registry[name].model_fields
        before = {key: value for key, value in before.items() if key in own}
    return {**before, **changes}


def _parser(kind: type[PartOptions], default: str | None) -> Callable[[Any], Any]:
    """Validator of a field that holds options of a kind."""

    def parse(value: Any) -> Any:
        data = as_mapping(kind, value)
        if not isinstance(data, Mapping):
            return value  # options already, or refused by the field itself
        name = data.get(kind.tag, default)
        if name is None:
            raise ValueError(f"names no {kind.registry.kind}; set {kind.tag}")
        if not isinstance(name, str) or name not in kind.registry:
            raise ValueError(kind.registry.unknown(str(name)))
        return kind.registry[name].model_validate({kind.tag: name, **data})

    return parse


AlgorithmField = Annotated[
    SerializeAsAny[AlgorithmOptions],
    BeforeValidator(_parser(AlgorithmOptions, DEFAULTS["algorithm"])),
]
WeightField = Annotated[
    SerializeAsAny[WeightOptions], BeforeValidator(_parser(WeightOptions, DEFAULTS["weights"]))
]
StageField = Annotated[
    SerializeAsAny[StageOptions] | None,
    BeforeValidator(_parser(StageOptions, DEFAULTS["training"])),
]
TransformField = Annotated[
    SerializeAsAny[TransformOptions], BeforeValidator(_parser(TransformOptions, None))
]
