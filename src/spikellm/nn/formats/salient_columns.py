"""Options of formats whose salient columns take several steps."""

from __future__ import annotations

from pydantic import Field, model_validator

from spikellm.recipe.base import WeightOptions
from spikellm.recipe.sections import MAX_STEPS
from spikellm.saliency import Ranking, criteria, rankings

MAX_TOP_CODE = 255  # T·L of a weight, which is stored in one byte


class SalientColumnOptions(WeightOptions):
    """Columns that are salient, and their steps (OBSpiking)."""

    salient_rate: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of columns whose weights take several steps (OBSpiking)",
    )
    salient_steps: int = Field(
        1, ge=1, le=MAX_STEPS, description="steps T of the weights of a salient column", strict=True
    )
    saliency: str = Field("second-order", description="criterion that ranks columns")
    invert: bool = Field(
        False, description="take the lowest-ranked columns instead: a control", strict=True
    )

    @model_validator(mode="after")
    def _salient_columns_fit_together(self) -> SalientColumnOptions:
        if self.saliency not in criteria:
            raise ValueError(criteria.unknown(self.saliency))
        if not isinstance(criteria[self.saliency], Ranking):
            raise ValueError(
                f"{self.saliency} ranks nothing; for weights take a saliency that ranks:"
                f" {', '.join(rankings())}"
            )
        if self.salient_rate == 0 and (
            self.salient_steps > 1 or self.saliency != "second-order" or self.invert
        ):
            raise ValueError(
                "salient_steps, saliency and invert have no effect while salient_rate is 0; set"
                " salient_rate above 0"
            )
        if self.salient_rate > 0 and self.salient_steps == 1:
            raise ValueError(
                "salient_rate has no effect while salient_steps is 1; raise salient_steps"
            )
        if (top := self.top(self.salient_steps)) > MAX_TOP_CODE:
            raise ValueError(
                f"{self.salient_steps} steps of {self.bits}-bit weights reach code {top}; at most"
                f" {MAX_TOP_CODE} is supported"
            )
        return self
