"""What keeps the model library from loading a converted model on its own.

A library that does not know the format warns, leaves the packed weights aside and fills the layers
with random numbers. So ``config.json`` names, in place of a weight file, a notice that is none: the
library stops at it and prints it. :func:`lift` takes it away where the format is known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from wrapt import wrap_function_wrapper

from spikellm.checkpoint.config import SpikeConfig

KEY = "transformers_weights"  # the library never writes it, and reads a file of this name only
NOTICE = (
    "this is a spiking model, which transformers alone cannot read; pip install spikellm, and"
    " `import spikellm` before from_pretrained"
)


def lift(config: Any) -> None:
    """Take the notice out of a configuration in memory."""
    if getattr(config, KEY, None) == NOTICE:
        delattr(config, KEY)


def _guarded(
    wrapped: Any, config: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Write a configuration, with the notice if it is of a converted model: whoever saves it."""
    wrapped(*arguments, **keywords)
    if isinstance(getattr(config, "quantization_config", None), SpikeConfig):
        file = Path(arguments[0] if arguments else keywords["json_file_path"])
        data = {**json.loads(file.read_text(encoding="utf-8")), KEY: NOTICE}
        file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


wrap_function_wrapper(PreTrainedConfig, "to_json_file", _guarded)
