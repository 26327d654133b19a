"""Options of stages of training, ``training: {name: end-to-end, …}``: how long, on which windows
and at which rates is the same for all.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spikellm.core.registry import Registry
from spikellm.recipe.base import PartOptions


class StageOptions(PartOptions):
    """What the loop of training goes by; a stage adds its own."""

    registry: ClassVar[Registry[type[StageOptions]]] = Registry("training stage")
    name: str
    steps: int = Field(
        100, ge=0, le=1_000_000, description="updates; none leave every byte as it was", strict=True
    )
    batch: int = Field(4, ge=1, le=65536, description="windows of an update", strict=True)
    seqlen: int = Field(
        512,
        ge=2,
        le=10_000_000,
        description="tokens of a window; the model's maximum where that is less",
        strict=True,
    )
    recompute: bool = Field(
        True,
        description=(
            "keep of each block only what it is fed, and compute the rest again for gradients: less"
            " memory, a third more time"
        ),
        strict=True,
    )
    rate: float = Field(
        3e-3, gt=0, le=1, description="rate at its highest, in relative steps (AdamW)"
    )
    last_rate: float = Field(
        0.05, ge=0, le=1, description="rate of the last update, of the highest (cosine)"
    )
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the updates over which the rate rises"
    )
    clip: float | None = Field(
        1.0, gt=0, description="longest gradient, longer ones are shortened; null for none"
    )
    decay: float = Field(
        0.0, ge=0, le=1, description="weight decay towards the state before training"
    )
    held_out: int = Field(
        8,
        ge=0,
        le=65536,
        description=(
            "windows from the end of the calibration text that are not trained on, by which the"
            " best state is kept; 0 to keep the last"
        ),
        strict=True,
    )
    check_every: int = Field(
        20, ge=1, le=1_000_000, description="updates between two looks at them", strict=True
    )
    products: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="type in which products of linear layers are taken while training"
    )
    at_once: int | None = Field(
        None, ge=1, description="windows in memory at a time; null for all of an update"
    )
