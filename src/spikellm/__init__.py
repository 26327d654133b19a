"""spikellm: spike-driven large language models, made after training.

Importing this package loads neither torch nor transformers; it arranges that other libraries know
spiking models as soon as they are imported: ``AutoModelForCausalLM.from_pretrained`` reloads them,
``lm_eval`` evaluates them (``--model spikellm``), and ``peft`` adapts their layers.

Where the package is installed, torch imports it by itself: entry points of the group
``torch.backends`` are loaded whenever torch is, unless ``TORCH_DEVICE_BACKEND_AUTOLOAD`` is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook, wrap_function_wrapper

from spikellm.core.version import __version__

if TYPE_CHECKING:
    from spikellm.api import (
        Conversion,
        convert,
        generate,
        load,
        perplexity,
        report,
        save,
        set_execution_mode,
        summarize,
        train,
        zero_shot,
    )

__all__ = [
    "Conversion",
    "__version__",
    "convert",
    "generate",
    "load",
    "perplexity",
    "report",
    "save",
    "set_execution_mode",
    "summarize",
    "train",
    "zero_shot",
]


def _autoload() -> None:
    """What torch calls once it has imported this package, which is all there is to do."""


def _register_format(quantizers: Any) -> None:
    if hasattr(quantizers, "register_quantizer"):
        _import_format(quantizers)
    else:  # still at its own imports, of which torch has imported this package
        register_post_import_hook(_import_format, "transformers.modeling_utils")


def _import_format(_: Any) -> None:
    import spikellm.checkpoint.save  # noqa: F401


def _register_evaluation(_: Any) -> None:
    from lm_eval.api.registry import model_registry

    model_registry.register("spikellm", target="spikellm.evaluation.harness_model:SpikeLM")


def _register_adapters(lora: Any) -> None:
    def with_spiking_layers(
        wrapped: Any, config: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        wrapped(*arguments, **keywords)
        from spikellm.nn.lora import ADAPTED

        config._register_custom_module(ADAPTED)

    wrap_function_wrapper(lora, "LoraConfig.__post_init__", with_spiking_layers)


register_post_import_hook(_register_format, "transformers.quantizers.auto")
register_post_import_hook(_register_evaluation, "lm_eval.models")
register_post_import_hook(_register_adapters, "peft.tuners.lora.model")


def __getattr__(name: str) -> Any:
    if name in __all__:
        from spikellm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
