"""A finished block out of the journal of an interrupted conversion.

Journals are files like others: nothing in them is used that a conversion would not have written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms import FittedBlock
from spikellm.conversion.journal import Journal
from spikellm.conversion.record import BlockRecord, record_from
from spikellm.core.errors import CheckpointError
from spikellm.models.plan import BlockPlan
from spikellm.nn.validation import own_buffers, validation_error


class Restored(NamedTuple):
    """A finished block: modules by full name, parameters that stayed dense, and its record."""

    modules: dict[str, nn.Module]
    fitted: FittedBlock
    record: BlockRecord


def restore(journal: Journal, index: int, model: nn.Module, plan: BlockPlan) -> Restored | None:
    """A block as the journal has it; None if it is not there.

    Raises:
        CheckpointError: the file is damaged: something is missing in it or too much, of another
            shape or type, or of a value that no conversion writes.
    """
    known = journal.read(index)
    if known is None:
        return None
    with _blaming(journal.path(index)):
        modules, dense = _fill(model, plan, known.tensors)
        return Restored(
            modules, FittedBlock({}, dense), record_from(known.record, plan.name, modules)
        )


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        ValueError,
        RuntimeError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise CheckpointError(
            f"{path} is damaged ({' '.join(str(error).split())[:300]}); delete it to convert that"
            " block again"
        ) from None


def _fill(
    model: nn.Module, plan: BlockPlan, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    for name, outline in plan.empty_modules(
        model, tensors, "meta"
    ).items():  # nothing is made of a size that the file only declares
        types = {own: expected for own, _, expected in own_buffers(outline, name)}
        for key, own in outline.state_dict(prefix=f"{name}.").items():
            _require_like(key, tensors.get(key), own.shape, types.get(key, own.dtype))
    modules, left = plan.empty_modules(model, tensors), dict(tensors)
    for name, module in modules.items():
        state = {key: left.pop(key) for key in list(left) if key.startswith(f"{name}.")}
        module.load_state_dict(
            {key.removeprefix(f"{name}."): tensor for key, tensor in state.items()}, strict=True
        )
        if problem := validation_error(module, name):
            raise ValueError(problem)
    own_parameters = dict(model.get_submodule(plan.name).named_parameters(prefix=plan.name))
    for name, tensor in left.items():
        if name not in own_parameters:
            raise ValueError(f"it holds {name}, which is no parameter of {plan.name}")
        _require_like(name, tensor, own_parameters[name].shape, own_parameters[name].dtype)
    return modules, left


def _require_like(name: str, found: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> None:
    if found is None:
        raise ValueError(f"it lacks {name}")
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"{name} holds {found.dtype} of shape {tuple(found.shape)}, expected {dtype} of"
            f" {tuple(shape)}"
        )
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} holds values that are not finite")
