"""A whole recipe, and the checks that span its sections."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spikellm.core.errors import RecipeError
from spikellm.neurons import Recoding, TrainForm
from spikellm.recipe.attention import AttentionRecipe
from spikellm.recipe.base import AlgorithmOptions, GrownSection, TransformOptions, WeightOptions
from spikellm.recipe.calibration import CalibrationRecipe
from spikellm.recipe.explain import explain
from spikellm.recipe.linear import LinearRecipe
from spikellm.recipe.migrate import is_old, upgraded
from spikellm.recipe.overrides import Override
from spikellm.recipe.parts import (
    AlgorithmField,
    StageField,
    TransformField,
    WeightField,
    changed_options,
    default_part,
)
from spikellm.recipe.sections import ActivationRecipe
from spikellm.recipe.short_forms import spread
from spikellm.recipe.untrained import check_untrained
from spikellm.recipe.values import place_value
from spikellm.recipe.vocabulary import VocabularyRecipe

RECIPE_VERSION: Literal[2] = 2
_NOT_SHOWN = {"Cc", "Zl", "Zp"}  # control characters, ends of lines
A = TypeVar("A", bound=AlgorithmOptions)


class Recipe(GrownSection):
    """A whole conversion."""

    added: ClassVar[tuple[str, ...]] = (
        "adapt",
        "train",
        "recoding",
        "training",
        "vocabulary",
        "untrained",
    )

    version: Literal[2] = RECIPE_VERSION
    name: str = "custom"
    description: str = ""
    seed: int = Field(
        2,
        ge=0,
        lt=2**63,
        description="decides calibration windows and random controls",
        strict=True,
    )
    algorithm: AlgorithmField = Field(
        default_factory=partial(default_part, "algorithm"), description="how weights are fitted"
    )
    weights: WeightField = Field(
        default_factory=partial(default_part, "weights"),
        description="how weights become integer codes",
    )
    activations: ActivationRecipe = ActivationRecipe()
    attention: AttentionRecipe = AttentionRecipe()
    transforms: tuple[TransformField, ...] = Field(
        (),
        description=(
            "what makes the model easier to code and leaves what it computes as it is, in order"
        ),
    )
    calibration: CalibrationRecipe = CalibrationRecipe()
    lm_head: bool = Field(False, description="convert the output projection too")
    vocabulary: VocabularyRecipe | None = Field(
        None,
        description=(
            "store input embedding and output projection as codes, inputs of the projection as they"
            " are; null to leave both"
        ),
    )
    adapt: bool = Field(
        False,
        description=(
            "leave out of transforms and attention what a model has no place for, and say so,"
            " instead of refusing it"
        ),
        strict=True,
    )
    train: TrainForm | None = Field(
        None,
        description=(
            "short for activations.train and that of every part of attention that is coded, where"
            " they do not say it themselves"
        ),
    )
    recoding: Recoding | None = Field(None, description="short for recoding, in the same places")
    training: StageField = Field(
        None, description="training after conversion, with the spikes in the loop; null for none"
    )
    untrained: bool = Field(
        False,
        description="convert to neurons that need training without it, to train afterwards",
        strict=True,
    )
    overrides: tuple[Override, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short_forms_are_spread(cls, data: Any) -> Any:
        return spread(data) if isinstance(data, Mapping) else data

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
        names = [transform.name for transform in self.transforms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"transforms names {twice!r} twice; give all its options at once")
        try:
            plain = self._plain()
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        own = {one.match: self._apply(one, plain).activations for one in self.overrides}
        self.attention.check_budget(self.activations)
        parts = {f"override {match!r}: activations": part for match, part in own.items()}
        check_untrained(
            {"activations": self.activations, **self.attention.parts, **parts},
            trains=self.training is not None,
            untrained=self.untrained,
        )
        if self.lm_head and self.vocabulary is not None and "head" in self.vocabulary.layers:
            raise ValueError(
                "lm_head is true, so the output projection becomes a spiking layer, and vocabulary"
                " would code it too; set vocabulary.layers to [embedding], or lm_head to false"
            )
        trained = () if self.training is None else (self.training,)
        for part in (self.algorithm, self.weights, *self.transforms, *trained):
            part.check(self)
        return self

    def _plain(self) -> LinearRecipe:
        return LinearRecipe(weights=self.weights, activations=self.activations)

    @property
    def formats(self) -> set[str]:
        """Names of the weight formats, those of overrides included."""
        tag = WeightOptions.tag
        return {
            self.weights.format,
            *(one.weights[tag] for one in self.overrides if tag in one.weights),
        }

    def options(self, kind: type[A]) -> A:
        """The algorithm's options, as the class that the algorithm declares."""
        assert isinstance(self.algorithm, kind)
        return self.algorithm

    def transform(self, name: str) -> TransformOptions | None:
        """Options of the transform of this name, None where the recipe has none."""
        return next((one for one in self.transforms if one.name == name), None)

    def for_module(self, name: str) -> LinearRecipe | None:
        """Settings of the module with this full name, or None to leave it.

        Later overrides win field by field.
        """
        settings: LinearRecipe | None = self._plain()
        for override in self.overrides:
            if override.pattern.matches(name):
                settings = (
                    None if override.skip else self._apply(override, settings or self._plain())
                )
        return settings

    def attention_for(self, name: str) -> AttentionRecipe | None:
        """Settings of the attention module with this full name, or None to leave it."""
        skipped = any(one.skip and one.pattern.matches(name) for one in self.overrides)
        return self.attention if self.attention.spiking and not skipped else None

    @staticmethod
    def _apply(override: Override, settings: LinearRecipe) -> LinearRecipe:
        merged = settings.model_dump()
        merged["weights"] = changed_options(WeightOptions, merged["weights"], override.weights)
        merged["activations"].update(override.activations)
        try:
            return LinearRecipe.model_validate(merged)
        except ValidationError as error:
            raise RecipeError(f"override {override.match!r}: {explain(error)}") from None

    def unmatched_overrides(
        self, layers: Iterable[str], attentions: Iterable[str] = ()
    ) -> list[str]:
        """Patterns that match none of the layers.

        Of those that skip, nor of the attention modules, which take no other override.
        """
        layers, attentions = list(layers), list(attentions)
        return [
            override.match
            for override in self.overrides
            if not any(
                override.pattern.matches(name)
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
        return validated(data, f"recipe {self.name!r}")

    def to_yaml(self, *, named: bool = True) -> str:
        """The recipe as YAML, sections that are switched off left out.

        Without name and description if it is to be changed.
        """
        excluded = set() if named else {"name", "description"}
        idle = {"attention": self.attention == AttentionRecipe(), "transforms": not self.transforms}
        excluded |= {name for name, is_idle in idle.items() if is_idle}
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude=excluded),
            sort_keys=False,
            allow_unicode=True,
            width=120,
        )


def recipe_from(data: Mapping[str, Any], where: str) -> Recipe:
    """Validate plain data into a recipe, of version 1 too; ``where`` names its origin in errors.

    Raises:
        RecipeError: unknown key or value out of range; names what is valid.
    """
    return validated(upgraded(data, where), where)


def current_data(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Plain data of a saved recipe as it is saved now; as it is where it is no valid recipe."""
    if not is_old(data):
        return data
    try:
        return recipe_from(data, where).model_dump(mode="json")
    except RecipeError:  # told where it is read
        return data


def validated(data: Mapping[str, Any], where: str) -> Recipe:
    """Validate plain data of this version into a recipe.

    Raises:
        RecipeError: see :func:`recipe_from`.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error)}") from None
