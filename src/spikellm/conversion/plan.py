"""What a conversion will do to which layer, decided and checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spikellm.algorithms import Algorithm, algorithms
from spikellm.conversion.block_runner import batch_windows
from spikellm.core import distributed
from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.data.shards import WindowShard, shard_windows
from spikellm.models.attention_interface import can_spike
from spikellm.models.families import Blocks, find_blocks
from spikellm.models.plan import BlockPlan, plan_blocks, plan_head
from spikellm.models.vocabulary import CodedVocabulary, plan_vocabulary
from spikellm.nn.formats import format_of
from spikellm.recipe import AttentionRecipe, LinearRecipe, Recipe
from spikellm.transforms import ModelState, transforms_of
from spikellm.transforms.sequence import TransformSequence


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion as it is planned.

    Attributes:
        model, blocks: the model, and its decoder blocks.
        recipe, algorithm, transforms: what to do, and how.
        plan: what each block becomes.
        head: what the output projection becomes as a spiking layer; None if it does not.
        vocabulary: whether embedding and output projection become coded tables.
        windows: all calibration tokens, ``(windows, seqlen)``.
        shard: those of this rank.
    """

    model: Any
    blocks: Blocks
    recipe: Recipe
    algorithm: Algorithm
    transforms: TransformSequence
    plan: list[BlockPlan]
    head: BlockPlan | None
    vocabulary: CodedVocabulary | None
    windows: Tensor
    shard: WindowShard

    def is_surveyed(self, settings: LinearRecipe) -> bool:
        """Whether a layer with these settings is to be seen before any block is converted."""
        activations = settings.activations
        allocated = activations.allocated_over_model or activations.spikes > 0
        return allocated or self.algorithm_looks_at(settings)

    def algorithm_looks_at(self, settings: LinearRecipe) -> bool:
        """Whether the algorithm is to see a layer with these settings before that."""
        return self.algorithm.surveys_all(self.recipe) or self.algorithm.needs_survey(settings)

    @property
    def surveyed(self) -> bool:
        """Whether the whole model is looked at before any block is converted."""
        return any(
            any(map(self.is_surveyed, block.linears.values())) or block.shares_steps_of_heads
            for block in self.plan
        )

    @property
    def batches(self) -> list[int]:
        """How many windows each batch of this rank has."""
        return _batches(self.shard)


def adapted(model: Any, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """What is left of a recipe for a model, and what was left out because it has no place for it.

    Transforms find out block by block, and say so in the records of blocks. A recipe that does not
    adapt stays as it is.
    """
    left: dict[str, object] = {}
    notes = []
    if recipe.adapt and recipe.attention.spiking and not can_spike(model):
        left["attention"] = AttentionRecipe()
        notes.append(
            f"{type(model).__name__} computes attention by itself, so Q, K, V and the cache stay as"
            " they are"
        )
    if recipe.adapt and recipe.vocabulary is not None:
        try:
            plan_vocabulary(model, recipe.vocabulary)
        except UnsupportedModelError as error:
            left["vocabulary"] = None
            notes.append(f"embedding and output projection stay as they are: {error}")
    return recipe.model_copy(update=left), notes


def require_supported(model: Any, recipe: Recipe) -> None:
    """Refuse what the structure of a model shows, before anything is computed.

    Raises:
        UnsupportedModelError: the family cannot be converted as the recipe asks.
    """
    TransformSequence(transforms_of(recipe)).require_supported(model, find_blocks(model))


def plan_conversion(
    model: Any, windows: Tensor, recipe: Recipe, algorithm: Algorithm
) -> ConversionPlan:
    """Plan a conversion; puts in what transforms will run with the model.

    Raises:
        UnsupportedModelError: the family cannot be converted exactly as asked.
        RequestError: the recipe asks for what the algorithm cannot do, for layers that are not
            there, or for more ranks than the text has batches.
    """
    blocks = find_blocks(model)
    transforms = TransformSequence(transforms_of(recipe))
    transforms.insert(ModelState(model, blocks, recipe, windows[:1]))
    plan = plan_blocks(model, blocks, recipe, untied=transforms.unties_embeddings)
    head = plan_head(model, recipe)
    vocabulary = None
    if recipe.vocabulary is not None:
        untied = transforms.unties_embeddings
        vocabulary = plan_vocabulary(model, recipe.vocabulary, untied=untied)
    for block in plan:
        _require_fits(block, algorithm, recipe)
    if head:
        _require_fits(head, algorithm, recipe)
    shard = shard_windows(windows, batch_windows(windows.shape[1]))
    if distributed.world_size() > 1:
        algorithm.check_share(_batches(shard), recipe)
    return ConversionPlan(
        model, blocks, recipe, algorithm, transforms, plan, head, vocabulary, windows, shard
    )


def head_algorithm(algorithm: Algorithm) -> Algorithm:
    """What fits the output projection: the algorithm itself, or rounding to nearest where it needs
    a block around a layer.
    """
    return algorithm if algorithm.fits_alone else algorithms["rtn"]()


def _batches(shard: WindowShard) -> list[int]:
    return [len(batch) for batch in shard.windows.split(batch_windows(shard.windows.shape[1]))]


def _require_fits(plan: BlockPlan, algorithm: Algorithm, recipe: Recipe) -> None:
    """Refuse kinds of weight codes that an algorithm does not fit, in a block or, where the plan is
    that of the output projection, alone.
    """
    alone = plan.name in plan.linears
    fitting = head_algorithm(algorithm) if alone else algorithm
    for name, settings in plan.linears.items():
        kind = format_of(settings.weights).coding
        if kind not in fitting.formats:
            instead = "" if fitting is algorithm else ", which rounds it to nearest,"
            others = [other for other in algorithms.names() if _fits(other, kind, alone=alone)]
            advice = f"set algorithm to {' or '.join(others)}, or " if others else ""
            raise RequestError(
                f"algorithm {recipe.algorithm.name!r}{instead} fits weight codes of kind"
                f" {' or '.join(fitting.formats)}, and {name} asks for format"
                f" {settings.weights.format!r}, which has kind {kind!r}; {advice}choose another"
                " format"
            )


def _fits(name: str, kind: str, *, alone: bool) -> bool:
    """Whether the algorithm of this name fits this kind of weight codes."""
    algorithm = algorithms[name]()
    return kind in (head_algorithm(algorithm) if alone else algorithm).formats
