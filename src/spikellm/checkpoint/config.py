"""What is written under ``quantization_config`` in ``config.json``: the recipe, the converted modules, and what converting them did."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from spikellm.errors import CheckpointError
from spikellm.recipe import Recipe, recipe_from

METHOD = "spikellm"
CONFIG_VERSION = 1


class SpikeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Configuration of a converted model.

    Attributes:
        recipe: the whole recipe, as plain data.
        modules: full names of the converted layers.
        record: errors behind each block, fingerprint of the calibration text, versions.

    Raises:
        CheckpointError: written by a newer version of the package, or damaged.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        modules: list[str],
        record: dict[str, Any],
        version: int = CONFIG_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if version != CONFIG_VERSION or unknown or quant_method != METHOD:
            raise CheckpointError(
                f"quantization_config has version {version} and keys {sorted(unknown)} that this spikellm does not know (expected version {CONFIG_VERSION}); upgrade spikellm"
            )
        self.quant_method = METHOD
        self.version = version
        self.recipe = recipe
        self.modules = modules
        self.record = record

    def parsed_recipe(self) -> Recipe:
        """The recipe as an object."""
        return recipe_from(self.recipe, "recipe in config.json")
