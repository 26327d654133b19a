"""What a transform is: how it prepares a model and each of its blocks before they are coded.

A transform changes nothing in full precision; :class:`spikellm.transforms.block_state.BlockState`
compares a block with what it was. Adding one is adding a file with a class under
``@transforms.register(name)``, named as the ``name`` of its options.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from spikellm.core.registry import Registry
from spikellm.models.families import Blocks
from spikellm.recipe import Recipe
from spikellm.recipe.base import TransformOptions
from spikellm.transforms.block_state import BlockState

OptionsT = TypeVar("OptionsT", bound=TransformOptions)


@dataclass(frozen=True)
class ModelState:
    """A model in full precision, before its first block is converted.

    Attributes:
        model, blocks: the model and its decoder blocks.
        recipe: the whole recipe.
        tokens: a window of calibration text, ``(1, tokens)``.
        walk: every block in full precision, in order, with what runs it once on a sample of the
            calibration text; each must be run before the next is taken. None while modules are put
            in.
    """

    model: Any
    blocks: Blocks
    recipe: Recipe
    tokens: Tensor
    walk: Callable[[], Iterator[tuple[nn.Module, Callable[[], object]]]] = lambda: iter(())


class Transform(Generic[OptionsT]):
    """One entry of a recipe's ``transforms``, while one model is converted.

    Attributes:
        Options: what a recipe may say of it.
        changes_stream: whether its blocks work on another residual stream. Such a transform
            prepares every block before the full-precision stream goes through it; others prepare a
            block when it is about to be fitted.
        unties_embeddings: whether the output projection has a weight of its own afterwards.
    """

    Options: ClassVar[type[TransformOptions]]
    changes_stream: ClassVar[bool] = False
    unties_embeddings: ClassVar[bool] = False

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def require_supported(self, model: Any, blocks: Blocks) -> None:
        """Refuse what the structure of a model shows, before anything is computed.

        Raises:
            UnsupportedModelError: the transform cannot hold for this family.
        """

    def insert(self, state: ModelState) -> None:
        """Put in modules that will run with the model, and do nothing yet.

        Raises:
            UnsupportedModelError, RequestError: there is no place for them.
        """

    def prepare_model(self, state: ModelState) -> None:
        """Change what is outside the blocks.

        Raises:
            UnsupportedModelError: the family does not allow it.
        """

    def observes(self, state: BlockState) -> Collection[str]:
        """What :meth:`prepare_block` looks up in ``state.inputs``; see :class:`BlockState`."""
        return ()

    def prepare_block(self, state: BlockState) -> None:
        """Change a block: fuse into ``state.fusion``, set what runs with the model, add notes.

        Raises:
            UnsupportedModelError: the block lacks a part that the recipe names.
        """

    def in_words(self) -> str:
        """What it does to a model, for people: a few words that follow "transformed: "."""
        return self.options.name

    def record(self, block: str) -> dict[str, int]:
        """What it adds at run time to the block of this name: how many input channels of each layer
        it rotates. Nothing by default: it is fused into weights.
        """
        return {}


transforms: Registry[type[Transform[Any]]] = Registry("transform")
"""Transforms by name."""


def transforms_of(recipe: Recipe) -> list[Transform[Any]]:
    """The transforms of a recipe, in the order in which they are applied."""
    return [transforms[options.name](options) for options in recipe.transforms]
