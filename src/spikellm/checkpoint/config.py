"""What is written under ``quantization_config`` in ``config.json``: the recipe, the converted
modules, and what converting them did.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikellm.conversion.record import ConversionRecord, Count, Line, Lines, explain
from spikellm.core.errors import CheckpointError
from spikellm.core.io import read_json
from spikellm.recipe import Recipe, current_data, recipe_from

METHOD = "spikellm"
CONFIG_VERSION = 1

HeadSizes = Annotated[list[Annotated[Count, Field(gt=0)]], Field(min_length=3, max_length=3)]


class StoredVocabulary(BaseModel):
    """Full names of coded embedding and output projection, and whether both have one table."""

    model_config = ConfigDict(strict=True, extra="forbid")

    embedding: Line | None
    head: Line | None
    shared: bool


class _Content(BaseModel):
    """Types and bounds of what a configuration holds; see :class:`SpikeConfig`."""

    model_config = ConfigDict(strict=True)

    recipe: dict[str, Any]
    modules: Lines
    record: ConversionRecord
    attention: dict[Line, HeadSizes]
    sizes: dict[Line, Annotated[list[Count], FailFast()]]
    vocabulary: StoredVocabulary | None = None


class SpikeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Configuration of a converted model: plain data, as the model library wants it.

    Attributes:
        recipe: the whole recipe.
        modules: full names of the converted layers.
        sizes: of layers whose buffers have shapes that the recipe does not decide (see
            ``SpikingLinear.sizes``).
        attention: spiking attention modules: key-value heads, channels of a key and of a value
            head.
        vocabulary: coded tables, see :class:`StoredVocabulary`; only where there are any.
        record: see :class:`spikellm.conversion.record.ConversionRecord`.

    Raises:
        CheckpointError: written by a newer version of the package, or damaged.
    """

    recipe: dict[str, Any]
    modules: list[str]
    record: dict[str, Any]
    attention: dict[str, list[int]]
    sizes: dict[str, list[int]]

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        modules: list[str] | None = None,
        record: dict[str, Any] | None = None,
        attention: dict[str, list[int]] | None = None,
        sizes: dict[str, list[int]] | None = None,
        vocabulary: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        version, method = rest.pop("version", CONFIG_VERSION), rest.pop("quant_method", METHOD)
        if version != CONFIG_VERSION or rest or method != METHOD:
            raise CheckpointError(
                f"quantization_config has version {reprlib.repr(version)} and keys"
                f" {reprlib.repr(sorted(rest))} that this spikellm does not know (expected version"
                f" {CONFIG_VERSION}); upgrade spikellm"
            )
        content = {
            "recipe": recipe,
            "modules": modules,
            "record": record,
            "attention": {} if attention is None else attention,
            "sizes": {} if sizes is None else sizes,
            **({} if vocabulary is None else {"vocabulary": vocabulary}),
        }
        try:
            _Content.model_validate(content)
        except ValidationError as error:
            raise CheckpointError(
                "quantization_config in config.json is not what a conversion writes"
                f" ({explain(error)}); the folder is damaged"
            ) from None
        self.quant_method, self.version = METHOD, version
        for key, value in content.items():
            setattr(self, key, value)
        self.recipe = current_data(recipe or {}, "recipe in config.json")

    def parsed_recipe(self) -> Recipe:
        """The recipe as an object."""
        return recipe_from(self.recipe, "recipe in config.json")


def read_config(folder: Path) -> SpikeConfig | None:
    """Configuration of the converted model in a folder.

    None where there is none that can be read.
    """
    try:
        found = read_json(folder / "config.json")["quantization_config"]
        return SpikeConfig(**found) if found["quant_method"] == METHOD else None
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None
