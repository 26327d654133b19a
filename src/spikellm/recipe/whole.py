"""A whole recipe, and the checks that span its sections."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spikellm.core.errors import RecipeError
from spikellm.core.registry import unknown_name
from spikellm.recipe.algorithms import GptqRecipe, OmniQuantRecipe
from spikellm.recipe.base import Section
from spikellm.recipe.patterns import MOST_WAYS, ways
from spikellm.recipe.rotation import RotationRecipe
from spikellm.recipe.sections import (
    ActivationRecipe,
    AttentionRecipe,
    CalibrationRecipe,
    LinearRecipe,
    Override,
    WeightRecipe,
)

RECIPE_VERSION: Literal[1] = 1
_NOT_SHOWN = {"Cc", "Zl", "Zp"}  # control characters, ends of lines


class Recipe(Section):
    """A whole conversion."""

    version: Literal[1] = RECIPE_VERSION
    name: str = "custom"
    description: str = ""
    pipeline: str = Field("rtn", description="how weights are fitted")
    seed: int = Field(
        2,
        ge=0,
        lt=2**63,
        description="decides calibration windows and random controls",
        strict=True,
    )
    weights: WeightRecipe = WeightRecipe()
    activations: ActivationRecipe = ActivationRecipe()
    attention: AttentionRecipe = AttentionRecipe()
    rotation: RotationRecipe = RotationRecipe()
    omniquant: OmniQuantRecipe = OmniQuantRecipe()
    gptq: GptqRecipe = GptqRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    lm_head: bool = Field(False, description="convert the output projection too")
    overrides: tuple[Override, ...] = ()

    @field_validator("name", "description")
    @classmethod
    def _can_be_shown(cls, value: str, field: ValidationInfo) -> str:
        allowed = "\n\t" if field.field_name == "description" else ""
        strange = [
            one for one in value if unicodedata.category(one) in _NOT_SHOWN and one not in allowed
        ]
        if strange:
            raise ValueError(
                f"holds {strange[0]!a}, which means something to a terminal; take it out"
            )
        return value

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Recipe:
        try:
            plain = LinearRecipe(weights=self.weights, activations=self.activations)
        except ValidationError as error:
            raise ValueError(_explain(error, LinearRecipe)) from None
        if self.pipeline != "omniquant" and self.omniquant != OmniQuantRecipe():
            raise ValueError(
                f"the section omniquant has no effect on pipeline {self.pipeline!r}; set pipeline"
                " to omniquant"
            )
        ranked = (
            self.activations.salient_rate > 0
            or self.weights.salient_rate > 0
            or bool(self.overrides)
        )
        if not self.omniquant.saliency_after_smoothing and not ranked:
            raise ValueError(
                "omniquant.saliency_after_smoothing would have no effect: no channel is salient;"
                " set activations.salient_rate above 0"
            )
        if self.pipeline != "gptq" and self.gptq != GptqRecipe():
            raise ValueError(
                f"the section gptq has no effect on pipeline {self.pipeline!r}; set pipeline to"
                " gptq"
            )
        if self.rotation.equalize and not (
            self.rotation.value_output or self.rotation.online or self.attention.key.spiking
        ):
            raise ValueError(
                "rotation.equalize has no effect without value_output, online or coded keys; set"
                " one of them, or leave equalize out"
            )
        if sum(ways(override.match) for override in self.overrides) > MOST_WAYS:
            raise ValueError(
                "overrides: the patterns together may take for ever to match; leave out some of"
                " their '.*'"
            )
        for override in self.overrides:
            self._apply(override, plain)
        codes = {
            self.weights.code,
            *(
                override.weights["code"]
                for override in self.overrides
                if "code" in override.weights
            ),
        }
        for field, code in (("search_range", "affine"), ("rounds", "ternary")):
            if (
                getattr(self.gptq, field) != GptqRecipe.model_fields[field].default
                and code not in codes
            ):
                raise ValueError(
                    f"gptq.{field} would have no effect on weights of code"
                    f" {' and '.join(map(repr, sorted(codes)))}, only on {code!r}; leave it out"
                )
        return self

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Override]]:
        return [(re.compile(override.match), override) for override in self.overrides]

    def for_module(self, name: str) -> LinearRecipe | None:
        """Settings of the module with this full name, or None to leave it.

        Later overrides win field by field.
        """
        settings: LinearRecipe | None = LinearRecipe(
            weights=self.weights, activations=self.activations
        )
        for pattern, override in self._patterns:
            if pattern.fullmatch(name):
                settings = (
                    None
                    if override.skip
                    else self._apply(
                        override,
                        settings
                        or LinearRecipe(weights=self.weights, activations=self.activations),
                    )
                )
        return settings

    def attention_for(self, name: str) -> AttentionRecipe | None:
        """Settings of the attention module with this full name, or None to leave it."""
        skipped = any(
            override.skip and pattern.fullmatch(name) for pattern, override in self._patterns
        )
        return self.attention if self.attention.spiking and not skipped else None

    @staticmethod
    def _apply(override: Override, settings: LinearRecipe) -> LinearRecipe:
        merged = settings.model_dump()
        merged["weights"].update(override.weights)
        merged["activations"].update(override.activations)
        try:
            return LinearRecipe.model_validate(merged)
        except ValidationError as error:
            raise RecipeError(
                f"override {override.match!r}: {_explain(error, LinearRecipe)}"
            ) from None

    def unmatched_overrides(
        self, layers: Iterable[str], attentions: Iterable[str] = ()
    ) -> list[str]:
        """Patterns that match none of the layers.

        Of those that skip, nor of the attention modules, which take no other override.
        """
        layers, attentions = list(layers), list(attentions)
        return [
            override.match
            for pattern, override in self._patterns
            if not any(
                pattern.fullmatch(name)
                for name in (layers + attentions if override.skip else layers)
            )
        ]

    def replaced(self, values: Mapping[str, Any]) -> Recipe:
        """The same recipe with other values under dotted keys.

        Raises:
            RecipeError: a key or value is not valid.
        """
        data = self.model_dump()
        for key, value in values.items():
            place_value(data, key, value)
        return recipe_from(data, f"recipe {self.name!r}")

    def to_yaml(self, *, named: bool = True) -> str:
        """The recipe as YAML, sections that are switched off left out.

        Without name and description if it is to be changed.
        """
        idle = {
            name
            for name in ("attention", "rotation", "omniquant", "gptq")
            if getattr(self, name) == type(self).model_fields[name].default
        }
        excluded = idle if named else idle | {"name", "description"}
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude=excluded),
            sort_keys=False,
            allow_unicode=True,
            width=120,
        )


def recipe_from(data: Mapping[str, Any], where: str) -> Recipe:
    """Validate plain data into a recipe; ``where`` names its origin in the error."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None


def place_value(data: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key of plain recipe data.

    Raises:
        RecipeError: a part of the key is no section.
    """
    *sections, field = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"key {key!r}: {section!r} is no section of a recipe")
    data[field] = value


def _explain(error: ValidationError, root: type[BaseModel] = Recipe) -> str:
    """The first problem of a validation error in one line, with the valid names where a key is
    unknown.
    """
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        section: Any = root
        for part in path[:-1]:
            annotation = (
                section.model_fields[part].annotation
                if part in getattr(section, "model_fields", {})
                else Override
            )
            section = (
                annotation
                if isinstance(annotation, type) and issubclass(annotation, BaseModel)
                else Override
            )
        return unknown_name(
            "key", ".".join(path), [".".join([*path[:-1], name]) for name in section.model_fields]
        )
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(path)
    found = (
        f" (found {first['input']!r})" if not isinstance(first["input"], (dict, BaseModel)) else ""
    )
    return f"{where}: {message}{found}" if where else message
