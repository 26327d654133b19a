"""What is written under ``quantization_config`` in ``config.json``: the recipe, the converted
modules, and what converting them did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from spikellm.conversion.record_schema import wrong_in_record
from spikellm.core.errors import CheckpointError
from spikellm.core.io import read_json
from spikellm.recipe import Recipe, current_data, recipe_from

METHOD = "spikellm"
CONFIG_VERSION = 1


class SpikeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Configuration of a converted model.

    Attributes:
        recipe: the whole recipe, as plain data.
        modules: full names of the converted layers.
        sizes: of layers whose buffers have shapes that the recipe does not decide (see
            ``SpikingLinear.sizes``).
        attention: spiking attention modules: key-value heads, channels of a key and of a value
            head.
        record: errors behind each block, fingerprint of the calibration text, versions.

    Raises:
        CheckpointError: written by a newer version of the package, or damaged.
    """

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        modules: list[str] | None = None,
        record: dict[str, Any] | None = None,
        attention: dict[str, list[int]] | None = None,
        sizes: dict[str, list[int]] | None = None,
        version: int = CONFIG_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if version != CONFIG_VERSION or unknown or quant_method != METHOD:
            raise CheckpointError(
                f"quantization_config has version {version} and keys {sorted(unknown)} that this"
                f" spikellm does not know (expected version {CONFIG_VERSION}); upgrade spikellm"
            )
        if not (
            isinstance(recipe, dict)
            and isinstance(modules, list)
            and all(isinstance(name, str) for name in modules)
        ):
            raise CheckpointError(
                "quantization_config in config.json has no valid recipe and list of modules; the"
                " folder is damaged"
            )
        problem = wrong_in_record(record)
        if record is None or problem:
            raise CheckpointError(
                "quantization_config in config.json has no valid record of the conversion"
                f" ({problem}); the folder is damaged"
            )
        attention = {} if attention is None else attention
        if not (
            isinstance(attention, dict)
            and all(
                isinstance(shape, list)
                and len(shape) == 3
                and all(isinstance(n, int) and n > 0 for n in shape)
                for shape in attention.values()
            )
        ):
            raise CheckpointError(
                "quantization_config in config.json has no valid shapes of attention heads; the"
                " folder is damaged"
            )
        sizes = {} if sizes is None else sizes
        if not (
            isinstance(sizes, dict)
            and all(
                isinstance(one, list) and all(isinstance(n, int) and 0 <= n < 2**40 for n in one)
                for one in sizes.values()
            )
        ):
            raise CheckpointError(
                "quantization_config in config.json has no valid sizes of layers; the folder is"
                " damaged"
            )
        self.quant_method = METHOD
        self.version = version
        self.recipe = current_data(recipe, "recipe in config.json")
        self.modules = modules
        self.record = record
        self.attention = attention
        self.sizes = sizes

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
