"""Recipes: everything that decides the result of a conversion, in one frozen, versioned object that is saved with the model.

Unknown keys are refused with the valid ones. Recipes are read by :mod:`spikellm.presets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spikellm.errors import RecipeError
from spikellm.neurons import make_neuron, neurons
from spikellm.registry import unknown_name
from spikellm.saliency import criteria

RECIPE_VERSION: Literal[1] = 1
MAX_STEPS = 255  # steps are stored in one byte
MAX_TOP_CODE = 4095  # T·L; keeps sums of products exact and codes in two bytes


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightRecipe(_Section):
    """How weights become integer codes."""

    bits: int = Field(4, ge=2, le=8, description="bits of a weight code", strict=True)
    symmetric: bool = Field(False, description="zero-point fixed in the middle instead of placed by the range", strict=True)
    group_size: int | None = Field(None, ge=1, description="columns that share a scale; null for the whole row", strict=True)


class ActivationRecipe(_Section):
    """How inputs of linear layers become spikes. ``bits: 16`` leaves them as they are."""

    bits: int = Field(4, description="bits of one spike, 1 to 8; 16 for no spikes", strict=True)
    neuron: str = Field("gif", description="if (1-bit spikes), gif, or ternary (2-bit spikes, symmetric)")
    symmetric: bool = Field(False, description="range of a token symmetric around zero", strict=True)
    steps: int = Field(1, ge=1, le=MAX_STEPS, description="steps T of an ordinary channel", strict=True)
    salient_rate: float = Field(0.0, ge=0.0, lt=1.0, description="share of channels that are salient (OBSpiking)")
    salient_steps: int = Field(1, ge=1, le=MAX_STEPS, description="steps T of a salient channel", strict=True)
    saliency: str = Field("layer-loss", description="criterion that ranks channels")
    invert: bool = Field(False, description="take the lowest-ranked channels instead: a control")
    thresholds: Literal["split", "shared"] = Field(
        "split", description="salient channels may have a range of their own, or one range for all (as published)"
    )

    @property
    def spiking(self) -> bool:
        return self.bits != 16

    @property
    def group_ranges(self) -> tuple[int, ...]:
        """Which range each channel group is coded in. Groups: ordinary channels, then salient ones in the common range, then salient ones with
        a range of their own (with split thresholds)."""
        if self.salient_rate == 0:
            return (0,)
        return (0, 0, 1) if self.thresholds == "split" else (0, 0)

    @property
    def group_steps(self) -> tuple[int, ...]:
        """Steps T of each channel group."""
        return (self.steps, self.salient_steps, self.salient_steps)[: len(self.group_ranges)]

    @model_validator(mode="after")
    def _fits_together(self) -> ActivationRecipe:
        if self.neuron not in neurons.names():
            raise ValueError(unknown_name("neuron", self.neuron, neurons.names()))
        if self.saliency not in criteria.names():
            raise ValueError(unknown_name("saliency", self.saliency, criteria.names()))
        if self.spiking:
            self._check_spikes()
            self._check_salient()
        elif idle := self._changed(set(type(self).model_fields) - {"bits"}):
            raise ValueError(f"{', '.join(idle)} would have no effect: bits is 16, so inputs are not coded; set bits to 1 … 8")
        return self

    def _changed(self, names: set[str]) -> list[str]:
        """Fields that differ from their defaults."""
        return [name for name, field in type(self).model_fields.items() if name in names and getattr(self, name) != field.default]

    def _check_spikes(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; expected 1 to 8, or 16 for no spikes")
        neuron = make_neuron(self.neuron, self.bits)
        if neuron.signed and not self.symmetric:
            raise ValueError(f"neuron {self.neuron!r} fires both signs, so its range is symmetric; set symmetric to true")
        steps = max(self.steps, self.salient_steps)
        if steps * neuron.levels > MAX_TOP_CODE:
            raise ValueError(
                f"{steps} steps of up to {neuron.levels} spikes reach code {steps * neuron.levels}; at most {MAX_TOP_CODE} is supported"
            )
        if self.symmetric and not neuron.signed and self.steps * neuron.levels < 2:
            raise ValueError("a symmetric range needs a top code T·L of at least 2; raise bits or steps")

    def _check_salient(self) -> None:
        if self.salient_rate == 0:
            if idle := self._changed({"salient_steps", "invert", "saliency", "thresholds"}):
                raise ValueError(f"{', '.join(idle)} would have no effect while salient_rate is 0; set salient_rate above 0")
            return
        if self.salient_steps < self.steps:
            raise ValueError(f"salient_steps ({self.salient_steps}) is below steps ({self.steps}); salient channels get at least as many")
        if self.invert and self.saliency == "layer-loss":
            raise ValueError("layer-loss searches the best split and ranks nothing, so it cannot be inverted; choose another saliency")
        if self.thresholds == "shared" and self.salient_steps == self.steps:
            raise ValueError(
                "with shared thresholds and equal steps salient channels are coded like all others; raise salient_steps or use split"
            )


class CalibrationRecipe(_Section):
    """The text from which channels are ranked and errors measured."""

    text: str = Field("wikitext2", description="wikitext2, c4, ptb (hub), stdlib (built in) or a path: .txt, .jsonl, folder")
    samples: int = Field(128, ge=1, description="windows of text", strict=True)
    seqlen: int | None = Field(None, ge=1, description="tokens of a window; null for min(2048, the model's maximum)", strict=True)
    saliency_tokens: int = Field(
        8192, ge=1, description="tokens from which saliency is measured, spread evenly over the windows", strict=True
    )


class LinearRecipe(_Section):
    """What one linear layer becomes."""

    weights: WeightRecipe = WeightRecipe()
    activations: ActivationRecipe = ActivationRecipe()


_NOT_CODED = ActivationRecipe(bits=16)


class AttentionRecipe(_Section):
    """How attention becomes spikes; each part with ``bits: 16`` stays as it is. Channels are those of one head."""

    query: ActivationRecipe = _NOT_CODED
    key: ActivationRecipe = _NOT_CODED
    value: ActivationRecipe = _NOT_CODED
    probabilities: ActivationRecipe = _NOT_CODED
    key_axis: Literal["token", "sequence"] = Field(
        "token", description="ranges of K over a token, or over the sequence as published (evaluation only)"
    )

    @property
    def spiking(self) -> bool:
        """Whether any part is coded."""
        return any(part.spiking for part in (self.query, self.key, self.value, self.probabilities))

    @model_validator(mode="after")
    def _parts_fit_together(self) -> AttentionRecipe:
        for name in ("query", "probabilities"):
            if getattr(self, name).salient_rate > 0:
                raise ValueError(f"{name} takes one step in every channel; salient channels are for key and value")
        if self.key.spiking != self.value.spiking:
            raise ValueError("key and value are coded together, since they share a cache; set bits of both, or of neither")
        if self.key_axis == "sequence" and (not self.key.spiking or (self.key.salient_rate > 0 and self.key.thresholds == "split")):
            raise ValueError(
                "key_axis: sequence gives every channel of K a range of its own over all tokens; K must spike, with shared thresholds"
            )
        return self


class Override(_Section):
    """Other settings for the modules whose full name matches a regular expression."""

    match: str
    skip: bool = Field(False, description="leave these modules as they are")
    weights: dict[str, Any] = Field(default_factory=dict)
    activations: dict[str, Any] = Field(default_factory=dict)

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _has_an_effect(self) -> Override:
        if self.skip == bool(self.weights or self.activations):
            raise ValueError(f"the override for {self.match!r} must either skip or set weights / activations")
        return self


class Recipe(_Section):
    """A whole conversion."""

    version: Literal[1] = RECIPE_VERSION
    name: str = "custom"
    description: str = ""
    pipeline: str = Field("rtn", description="how weights are fitted")
    seed: int = Field(2, ge=0, lt=2**63, description="decides calibration windows and random controls", strict=True)
    weights: WeightRecipe = WeightRecipe()
    activations: ActivationRecipe = ActivationRecipe()
    attention: AttentionRecipe = AttentionRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    lm_head: bool = Field(False, description="convert the output projection too")
    overrides: tuple[Override, ...] = ()

    @model_validator(mode="after")
    def _overrides_are_valid(self) -> Recipe:
        for override in self.overrides:
            self._apply(override, LinearRecipe(weights=self.weights, activations=self.activations))
        return self

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Override]]:
        return [(re.compile(override.match), override) for override in self.overrides]

    def for_module(self, name: str) -> LinearRecipe | None:
        """Settings of the module with this full name, or None to leave it. Later overrides win field by field."""
        settings: LinearRecipe | None = LinearRecipe(weights=self.weights, activations=self.activations)
        for pattern, override in self._patterns:
            if pattern.fullmatch(name):
                settings = (
                    None
                    if override.skip
                    else self._apply(override, settings or LinearRecipe(weights=self.weights, activations=self.activations))
                )
        return settings

    def attention_for(self, name: str) -> AttentionRecipe | None:
        """Settings of the attention module with this full name, or None to leave it."""
        skipped = any(override.skip and pattern.fullmatch(name) for pattern, override in self._patterns)
        return self.attention if self.attention.spiking and not skipped else None

    @staticmethod
    def _apply(override: Override, settings: LinearRecipe) -> LinearRecipe:
        merged = settings.model_dump()
        merged["weights"].update(override.weights)
        merged["activations"].update(override.activations)
        try:
            return LinearRecipe.model_validate(merged)
        except ValidationError as error:
            raise RecipeError(f"override {override.match!r}: {_explain(error, LinearRecipe)}") from None

    def unmatched_overrides(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of the names."""
        names = list(names)
        return [override.match for pattern, override in self._patterns if not any(pattern.fullmatch(name) for name in names)]

    def replaced(self, values: Mapping[str, Any]) -> Recipe:
        """The same recipe with other values under dotted keys.

        Raises:
            RecipeError: a key or value is not valid.
        """
        data = self.model_dump()
        for key, value in values.items():
            place_value(data, key, value)
        return recipe_from(data, f"recipe {self.name!r}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


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
    """The first problem of a validation error in one line, with the valid names where a key is unknown."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        section: Any = root
        for part in path[:-1]:
            annotation = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else Override
            section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Override
        return unknown_name("key", ".".join(path), [".".join([*path[:-1], name]) for name in section.model_fields])
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(path)
    found = f" (found {first['input']!r})" if not isinstance(first["input"], (dict, BaseModel)) else ""
    return f"{where}: {message}{found}" if where else message
