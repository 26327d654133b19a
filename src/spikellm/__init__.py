"""spikellm: spike-driven large language models, made after training.

Importing this package loads neither torch nor transformers; it arranges that the checkpoint format
is registered as soon as transformers is imported, so that ``AutoModelForCausalLM.from_pretrained``
reloads converted models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from spikellm.core.version import __version__

if TYPE_CHECKING:
    from spikellm.api import (
        Conversion,
        ReportContext,
        convert,
        generate,
        load,
        perplexity,
        report,
        save,
        set_execution_mode,
        summarize,
        zero_shot,
    )

__all__ = [
    "Conversion",
    "ReportContext",
    "__version__",
    "convert",
    "generate",
    "load",
    "perplexity",
    "report",
    "save",
    "set_execution_mode",
    "summarize",
    "zero_shot",
]


def _register_format(_: Any) -> None:
    import spikellm.checkpoint.save  # noqa: F401


register_post_import_hook(_register_format, "transformers.quantizers.auto")


def __getattr__(name: str) -> Any:
    if name in __all__:
        from spikellm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
