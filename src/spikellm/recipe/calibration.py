"""The section of a recipe that says what text channels are ranked and errors measured on."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spikellm.recipe.base import GrownSection


class CalibrationRecipe(GrownSection):
    """The text from which channels are ranked and errors measured."""

    added: ClassVar[tuple[str, ...]] = ("bos", "token_weights", "opening_weight")

    text: str = Field(
        "wikitext2",
        description=(
            "wikitext2, c4, ptb (hub), stdlib (built in) or a path: .txt, .jsonl, .json, folder"
        ),
    )
    samples: int = Field(128, ge=1, le=1_000_000, description="windows of text", strict=True)
    seqlen: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="tokens of a window; null for min(2048, the model's maximum)",
        strict=True,
    )
    saliency_tokens: int = Field(
        8192,
        ge=1,
        le=100_000_000,
        description="tokens from which saliency is measured, spread evenly over the windows",
        strict=True,
    )
    token_weights: Literal["equal", "robust"] = Field(
        "equal",
        description=(
            "where tokens are summed: equal, or robust, which lets no token weigh more than an"
            " ordinary one"
        ),
    )
    opening_weight: float = Field(
        1.0,
        ge=1.0,
        le=1e6,
        description=(
            "how many ordinary tokens one counts for that opens every window alike, such as a BOS"
            " token, where weights are fitted"
        ),
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto",
        description=(
            "start every window with the BOS token: always, never, or where the tokenizer adds one"
            " by itself"
        ),
    )
