"""What writes converted models for other tools, by the name of the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spikellm.core.registry import Registry


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        layers: full names of the layers to write; all that the format can express by default.
    """

    model: Any
    tokenizer: Any
    layers: tuple[str, ...] = ()


class Exporter(Protocol):
    """One format; made before the model is loaded, by its class without arguments.

    Making one raises :class:`spikellm.core.errors.DependencyError` where a package that it needs is
    not installed.

    Attributes:
        not_expressed: what a converted model has and the format has no words for.
    """

    not_expressed: tuple[str, ...]

    def refuses(self, model: Any) -> str | None:
        """Why a model cannot be written, in a line that ends what ``MODEL:`` begins; None if it
        can.
        """

    def export(self, source: Source, folder: Path) -> list[dict[str, Any]]:
        """Write the model into an empty folder, which is there.

        Returns:
            A record of every file: ``{"file": its name in the folder, …}``.

        Raises:
            RequestError: there is no such layer, or one that the format cannot express.
            SpikeLLMError: the file system refused.
        """


exporters: Registry[type[Exporter]] = Registry("format")
"""Classes of exporters by the name of their format."""
