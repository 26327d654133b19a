"""A training to a folder, step by step: look, lock, load, train, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikellm import api
from spikellm.checkpoint.config import SpikeConfig, read_config
from spikellm.checkpoint.save import spike_config
from spikellm.checkpoint.training import training_recipe
from spikellm.commands.support import progress
from spikellm.commands.support.folder_work import FolderWork, locked_for_all
from spikellm.commands.support.options import TrainFolderOptions
from spikellm.conversion.journal import forget
from spikellm.conversion.record import TrainingRecord
from spikellm.core import console, distributed
from spikellm.core.devices import find_device
from spikellm.core.files import remove_leftovers


class FolderTraining(FolderWork):
    """One training to a folder; its state is kept beside it until all is done."""

    kind = "training"

    def __init__(self, model: str, out: Path, options: TrainFolderOptions) -> None:
        super().__init__(model, out, options)
        self.options = options

    def run(self) -> dict[str, Any]:
        """Train; gives what came of it.

        Raises:
            RequestError: see :func:`spikellm.commands.train.train`.
        """
        options = self.options
        reads = [one for one in (self.model, options.original, options.calibration) if one]
        self.require_target(reads)
        place = find_device(options.device) if options.device else None
        with locked_for_all(self.out):
            finished = self._finished()
            if finished is None:
                self.clear_the_way()
            console.note(f"loading {self.model}")
            model, tokenizer = api.load(self.model, trust_remote_code=options.trust_remote_code)
            if finished is not None:
                if (told := self._is_finished(finished, model)) is not None:
                    return told
                self.clear_the_way()
            record = api.train(
                model,
                tokenizer,
                options.original,
                options.calibration,
                steps=options.steps,
                settings=options.settings,
                device=place,
                journal=self.partial,
                on_step=progress.report_step(),
                on_stage=console.note,
                trust_remote_code=options.trust_remote_code,
                replaces=self.overwrite,
            )
            console.note(f"writing {self.out}")
            if distributed.is_main():
                api.save(model, tokenizer, self.out, overwrite=self.overwrite)
                forget(self.partial)
            distributed.barrier()
        return self._told(api.Conversion.of(model).recipe.name, record)

    def _finished(self) -> SpikeConfig | None:
        """What a finished training in OUT says of itself, where one is to be gone on with."""
        if self.overwrite or not self.options.resume:
            return None
        found = read_config(self.out)
        return found if found is not None and found.record.get("training") else None

    def _is_finished(self, found: SpikeConfig, model: Any) -> dict[str, Any] | None:
        """What came of a finished training, if it was of this model and went by the same."""
        options, record = self.options, TrainingRecord.model_validate(found.record["training"])
        recipe = training_recipe(model, options.calibration, options.steps, options.settings)
        own = spike_config(model)
        assert own is not None
        before = {key: value for key, value in found.record.items() if key != "training"}
        if found.recipe != recipe.model_dump(mode="json") or before != own.record:
            return None
        console.note(f"{self.out} is finished already")
        if distributed.is_main():
            forget(self.partial)
            remove_leftovers(self.out)
        return self._told(recipe.name, record)

    def _told(self, recipe: str, record: TrainingRecord | None) -> dict[str, Any]:
        checks = [] if record is None else record.checks
        after = [one.loss for one in checks if record is not None and one.update == record.best]
        return {
            "out": str(self.out),
            "recipe": recipe,
            "steps": 0 if record is None else len(record.losses),
            "trained": 0 if record is None else record.trained,
            "held_out": {
                "before": checks[0].loss if checks else None,
                "after": after[-1] if after else None,
            },
            "best": 0 if record is None else record.best,
            "notes": [] if record is None else record.notes,
        }
