"""A conversion to a folder, step by step: look, lock, load, convert, save."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from spikellm import api
from spikellm.checkpoint.config import SpikeConfig, read_config
from spikellm.commands.support import progress
from spikellm.commands.support.folder_work import FolderWork, locked_for_all
from spikellm.commands.support.options import FolderOptions
from spikellm.commands.support.storage import STORES, choose_store
from spikellm.conversion.journal import forget, is_journal
from spikellm.core import console, distributed
from spikellm.core.devices import find_device
from spikellm.core.errors import RequestError
from spikellm.core.files import remove_leftovers
from spikellm.core.io import difference_in_words
from spikellm.recipe import Recipe

_SHOWN = 6  # names of dense layers


class FolderConversion(FolderWork):
    """One conversion to a folder; finished blocks are kept beside it until all is done.

    Args:
        model: folder or hub name.
        out: folder to write.
        recipe: with all values replaced that are given apart.
    """

    kind = "conversion"

    def __init__(self, model: str, out: Path, recipe: Recipe, options: FolderOptions) -> None:
        super().__init__(model, out, options)
        self.recipe, self.options = recipe, options

    def run(self, reads: Iterable[str]) -> dict[str, Any]:
        """Convert; gives what came of it.

        Args:
            reads: files and folders that are read, none of which may lie in OUT.

        Raises:
            RequestError: see :func:`spikellm.commands.convert.convert`.
        """
        self._require_sense(reads)
        place = find_device(self.options.device) if self.options.device else None
        with locked_for_all(self.out):
            finished = self._finished()
            if finished is None:
                self.clear_the_way()
            console.note(f"loading {self.model}")
            loaded, tokenizer = api.load(
                self.model, trust_remote_code=self.options.trust_remote_code
            )
            if finished is not None:
                device = place or next(loaded.parameters()).device
                if api.is_made_from(finished, loaded, tokenizer, self.recipe, device):
                    return self._is_finished()
                self.clear_the_way()
            return self._converted(loaded, tokenizer, place)

    def _require_sense(self, reads: Iterable[str]) -> None:
        """Refuse targets and options that could not be meant, before anything is touched."""
        self.require_target(reads)
        if (store := self.options.store) not in STORES:
            raise RequestError(f"--store {store!r}: expected {', '.join(STORES)}")

    def _finished(self) -> SpikeConfig | None:
        """What a finished conversion with this recipe says of itself, where it may be gone on with.

        Raises:
            RequestError: it was made with another recipe; the differing field is named.
        """
        if self.options.force or not self.options.resume:
            return None
        found, recipe = read_config(self.out), self.recipe.model_dump(mode="json")
        if found is None or found.recipe == recipe:
            return found
        if is_journal(self.partial):  # it goes on with that, or says what differs
            return None
        raise RequestError(
            f"{self.out} holds a finished conversion with another"
            f" {difference_in_words('recipe', found.recipe, recipe)}; give the same settings,"
            " choose another OUT, or overwrite it with --force instead of --resume"
        )

    def _is_finished(self) -> dict[str, Any]:
        """Nothing is left to do but to clear away."""
        console.note(f"{self.out} is finished already")
        model, _ = api.load(self.out, trust_remote_code=self.options.trust_remote_code)
        told = self._told(api.Conversion.of(model))
        if distributed.is_main():  # a result that does not load would need its journal
            forget(self.partial)
            remove_leftovers(self.out)
        return told

    def _converted(self, model: Any, tokenizer: Any, place: torch.device | None) -> dict[str, Any]:
        """Convert the loaded model and save it."""
        result = api.convert(
            model,
            tokenizer,
            self.recipe,
            device=place,
            journal=self.partial,
            replaces=self.overwrite,
            on_block=progress.report_block(),
            on_stage=console.note,
            store=lambda needs: choose_store(needs, self.options.store, self.partial),
            original=self.model,
            on_step=progress.report_step(),
            trust_remote_code=self.options.trust_remote_code,
        )
        told = self._told(result)
        if self.recipe.attention.spiking:
            console.note(f"attention spikes in {told['attention']} modules")
        console.note(_dense_in_words(told["dense"]))
        console.note(f"writing {self.out}")
        if distributed.is_main():
            api.save(model, tokenizer, self.out, overwrite=self.overwrite)
            forget(self.partial)
        distributed.barrier()
        return told

    def _told(self, result: api.Conversion) -> dict[str, Any]:
        summary = result.summary
        return {
            "out": str(self.out),
            "recipe": self.recipe.name,
            "layers": summary.spiking_layers,
            "dense": [
                layer.name
                for layer in summary.layers
                if not layer.spiking and layer.weight_code is None
            ],
            "average_steps": summary.average_steps,
            "attention": len(summary.attentions),
            "weight_ratio": summary.weight_bytes / max(summary.dense_bytes, 1),
            "blocks": [block.model_dump() for block in result.blocks],
        }


def _dense_in_words(dense: list[str]) -> str:
    if not dense:
        return "no linear layer is left dense"
    more = f" and {len(dense) - _SHOWN} more" if len(dense) > _SHOWN else ""
    return f"left dense: {', '.join(dense[:_SHOWN])}{more}"
