"""The sections of a recipe that say what is coded, and how: weights, activations, attention,
calibration, overrides.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from spikellm.core.registry import unknown_name
from spikellm.neurons import make_neuron, neurons
from spikellm.recipe.base import Section
from spikellm.recipe.patterns import ways
from spikellm.saliency import criteria

MAX_STEPS = 255  # steps are stored in one byte
MAX_TOP_CODE = 4095  # T·L; keeps sums of products exact and codes in two bytes


class WeightRecipe(Section):
    """How weights become integer codes."""

    code: Literal["affine", "ternary", "partly-binary"] = Field(
        "affine",
        description=(
            "integers with zero-point; ternary spikes (bits: 2); or one bit, and `bits` for salient"
            " weights (PB-LLM)"
        ),
    )
    bits: int = Field(4, ge=2, le=8, description="bits of a weight code", strict=True)
    symmetric: bool = Field(
        False,
        description="zero-point fixed in the middle instead of placed by the range",
        strict=True,
    )
    group_size: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="columns that share a scale; null for the whole row",
        strict=True,
    )
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
    budget: float | None = Field(
        None,
        ge=1.0,
        le=8.0,
        description="average steps of ternary weights, spent where a step gains most",
    )
    budget_over: Literal["layer", "model"] = Field(
        "layer",
        description=(
            "each layer spends its own budget, or all spend one by what they cost the loss (takes a"
            " backward pass)"
        ),
    )

    def top(self, steps: int) -> int:
        """Largest code of a weight of T steps: T·L with L = 2**bits − 1, or T if it is ternary."""
        return steps if self.code == "ternary" else steps * ((1 << self.bits) - 1)

    @property
    def salient_bits(self) -> int:
        """Bits of the code of a salient column."""
        return self.top(self.salient_steps).bit_length()

    @model_validator(mode="after")
    def _fits_together(self) -> WeightRecipe:
        if self.saliency not in criteria.names():
            raise ValueError(unknown_name("saliency", self.saliency, criteria.names()))
        if self.saliency == "layer-loss":
            raise ValueError(
                "layer-loss chooses ranges of inputs; for weights take second-order, rms or another"
                " ranking"
            )
        if self.code == "ternary" and (self.bits != 2 or not self.symmetric):
            raise ValueError(
                "a ternary weight takes 2 bits a step and has no zero-point; set bits to 2 and"
                " symmetric to true"
            )
        if self.code == "partly-binary":
            self._check_partly_binary()
        else:
            self._check_salient_columns()
        if self.budget is not None and (self.code != "ternary" or self.salient_rate > 0):
            raise ValueError(
                "budget is spent by ternary weights without salient_rate; set code to ternary, or"
                " leave budget out"
            )
        if self.budget_over == "model" and self.budget in (None, 1):
            raise ValueError(
                "budget_over has no effect without a budget above 1; set budget, or leave"
                " budget_over out"
            )
        return self

    def _check_partly_binary(self) -> None:
        if (
            not 0 < self.salient_rate < 1
            or self.salient_steps != 1
            or self.saliency != "second-order"
            or self.invert
            or self.symmetric
        ):
            raise ValueError(
                "code partly-binary takes salient_rate (share of weights that keep `bits` bits),"
                " bits and group_size; salient_steps, saliency, invert and symmetric have no effect"
                " on it"
            )

    def _check_salient_columns(self) -> None:
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
        if self.top(self.salient_steps) > 255:
            raise ValueError(
                f"{self.salient_steps} steps of {self.bits}-bit weights reach code"
                f" {self.top(self.salient_steps)}; at most 255 is supported"
            )


class ActivationRecipe(Section):
    """How inputs of linear layers become spikes. ``bits: 16`` leaves them as they are."""

    bits: int = Field(4, description="bits of one spike, 1 to 8; 16 for no spikes", strict=True)
    neuron: str = Field(
        "gif",
        description=(
            "if (1-bit spikes), gif, ternary (2-bit spikes, symmetric), or gif-published (top code"
            " as in the published code)"
        ),
    )
    symmetric: bool = Field(
        False, description="range of a token symmetric around zero", strict=True
    )
    steps: int = Field(
        1, ge=1, le=MAX_STEPS, description="steps T of an ordinary channel", strict=True
    )
    salient_rate: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of channels that are salient (OBSpiking)"
    )
    salient_steps: int = Field(
        1, ge=1, le=MAX_STEPS, description="steps T of a salient channel", strict=True
    )
    saliency: str = Field("layer-loss", description="criterion that ranks channels")
    invert: bool = Field(False, description="take the lowest-ranked channels instead: a control")
    thresholds: Literal["split", "shared"] = Field(
        "split",
        description=(
            "salient channels may have a range of their own, or one range for all (as published)"
        ),
    )

    salient_for: Literal["input", "layer"] = Field(
        "input",
        description=(
            "salient channels chosen once for all layers that read the same tensor, or for each"
            " layer (as published)"
        ),
    )

    salient_over: Literal["layer", "model"] = Field(
        "layer",
        description=(
            "salient_rate is that of every layer, or the mean over all, spent where it lowers the"
            " loss most (takes a backward pass)"
        ),
    )

    @property
    def spiking(self) -> bool:
        return self.bits != 16

    @property
    def allocated_over_model(self) -> bool:
        """Whether the number of salient channels is decided over all layers."""
        return self.salient_over == "model"

    @property
    def group_ranges(self) -> tuple[int, ...]:
        """Which range each channel group is coded in.

        Groups: ordinary channels, then salient ones in the common range, then salient ones with
        a range of their own (with split thresholds)."""
        if self.salient_rate == 0:
            return (0,)
        return (0, 0, 1) if self.thresholds == "split" else (0, 0)

    @property
    def group_steps(self) -> tuple[int, ...]:
        """Steps T of each channel group."""
        return (self.steps, self.salient_steps, self.salient_steps)[: len(self.group_ranges)]

    @model_validator(mode="after")
    def _fits_together(self) -> ActivationRecipe:
        if self.neuron not in neurons.names():
            raise ValueError(unknown_name("neuron", self.neuron, neurons.names()))
        if self.saliency not in criteria.names():
            raise ValueError(unknown_name("saliency", self.saliency, criteria.names()))
        if self.spiking:
            self._check_spikes()
            self._check_salient()
        elif idle := self._changed(set(type(self).model_fields) - {"bits"}):
            raise ValueError(
                f"{', '.join(idle)} would have no effect: bits is 16, so inputs are not coded; set"
                " bits to 1 … 8"
            )
        return self

    def _changed(self, names: set[str]) -> list[str]:
        """Fields that differ from their defaults."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if name in names and getattr(self, name) != field.default
        ]

    def _check_spikes(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; expected 1 to 8, or 16 for no spikes")
        neuron = make_neuron(self.neuron, self.bits)
        if neuron.signed and not self.symmetric:
            raise ValueError(
                f"neuron {self.neuron!r} fires both signs, so its range is symmetric; set symmetric"
                " to true"
            )
        steps = max(self.steps, self.salient_steps)
        if (top := neuron.top(steps)) > MAX_TOP_CODE:
            raise ValueError(
                f"{steps} steps of up to {neuron.levels} spikes reach code {top}; at most"
                f" {MAX_TOP_CODE} is supported"
            )
        if not neuron.unrolls and steps == 1:
            raise ValueError(
                f"neuron {self.neuron!r} differs from gif only where a channel takes more than one"
                " step; use gif"
            )
        if self.symmetric and not neuron.signed and neuron.top(self.steps) < 2:
            raise ValueError(
                "a symmetric range needs a top code T·L of at least 2; raise bits or steps"
            )

    def _check_salient(self) -> None:
        if self.salient_rate == 0:
            if idle := self._changed(
                {"salient_steps", "invert", "saliency", "thresholds", "salient_for", "salient_over"}
            ):
                raise ValueError(
                    f"{', '.join(idle)} would have no effect while salient_rate is 0; set"
                    " salient_rate above 0"
                )
            return
        if self.salient_steps < self.steps:
            raise ValueError(
                f"salient_steps ({self.salient_steps}) is below steps ({self.steps}); salient"
                " channels get at least as many"
            )
        if self.allocated_over_model and self.salient_for == "layer":
            raise ValueError(
                "salient_over: model shares steps out to the tensors that layers read; leave"
                " salient_for at input"
            )
        if self.allocated_over_model and self.salient_rate > 0.5:
            raise ValueError(
                "salient_over: model gives a tensor's channels up to half of them more steps, so"
                f" salient_rate {self.salient_rate} cannot be its mean; expected at most 0.5"
            )
        if self.invert and self.saliency == "layer-loss":
            raise ValueError(
                "layer-loss searches the best split and ranks nothing, so it cannot be inverted;"
                " choose another saliency"
            )
        if self.thresholds == "shared" and self.salient_steps == self.steps:
            raise ValueError(
                "with shared thresholds and equal steps salient channels are coded like all others;"
                " raise salient_steps or use split"
            )


class CalibrationRecipe(Section):
    """The text from which channels are ranked and errors measured."""

    text: str = Field(
        "wikitext2",
        description="wikitext2, c4, ptb (hub), stdlib (built in) or a path: .txt, .jsonl, folder",
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


class LinearRecipe(Section):
    """What one linear layer becomes."""

    weights: WeightRecipe = WeightRecipe()
    activations: ActivationRecipe = ActivationRecipe()

    @model_validator(mode="after")
    def _weights_can_meet_spikes(self) -> LinearRecipe:
        if self.weights.code == "partly-binary" and self.activations.spiking:
            raise ValueError(
                "weights.code partly-binary takes inputs as they are (its two kinds of weights"
                " have scales of their own, and no integers to add up); set activations.bits to"
                f" 16, not {self.activations.bits}"
            )
        return self


_NOT_CODED = ActivationRecipe(bits=16)


class AttentionRecipe(Section):
    """How attention becomes spikes; each part with ``bits: 16`` stays as it is.

    Channels are those of one head.
    """

    query: ActivationRecipe = _NOT_CODED
    key: ActivationRecipe = _NOT_CODED
    value: ActivationRecipe = _NOT_CODED
    probabilities: ActivationRecipe = _NOT_CODED
    key_axis: Literal["token", "sequence"] = Field(
        "token",
        description="ranges of K over a token, or over the sequence as published (evaluation only)",
    )
    center: bool = Field(
        False,
        description=(
            "take the mean of each channel of K off before it is coded, which the softmax does"
            " not see"
        ),
        strict=True,
    )
    rotate: bool = Field(
        False,
        description=(
            "rotate Q and K of each head after rotary embedding, which leaves their products as"
            " they are"
        ),
        strict=True,
    )

    @property
    def spiking(self) -> bool:
        """Whether any part is coded."""
        return any(part.spiking for part in (self.query, self.key, self.value, self.probabilities))

    @model_validator(mode="after")
    def _parts_fit_together(self) -> AttentionRecipe:
        for name in ("query", "probabilities"):
            if getattr(self, name).salient_rate > 0:
                raise ValueError(
                    f"{name} takes one step in every channel; salient channels are for key and"
                    " value"
                )
            if (steps := getattr(self, name).steps) != 1:
                raise ValueError(
                    f"{name} takes one step, not {steps}: steps are for key and value; raise"
                    f" {name}.bits for finer spikes"
                )
        for name in ("query", "key", "value", "probabilities"):
            part: ActivationRecipe = getattr(self, name)
            if part.spiking and not make_neuron(part.neuron, part.bits).unrolls:
                raise ValueError(
                    f"{name}.neuron {part.neuron!r} is for linear layers; attention takes gif, if"
                    " or ternary"
                )
        for name in ("key", "value"):
            if getattr(self, name).allocated_over_model:
                raise ValueError(
                    f"{name}.salient_over has no effect: steps are shared out over linear layers;"
                    " leave it out"
                )
            if getattr(self, name).salient_for != "input":
                raise ValueError(
                    f"{name}.salient_for has no effect: every head chooses its own channels; leave"
                    " it out"
                )
        if self.key.spiking != self.value.spiking:
            raise ValueError(
                "key and value are coded together, since they share a cache; set bits of both, or"
                " of neither"
            )
        if self.rotate and not (self.query.spiking or self.key.spiking):
            raise ValueError(
                "rotate has no effect: neither query nor key is coded; set bits of one, or leave"
                " rotate out"
            )
        if self.center and not self.key.spiking:
            raise ValueError(
                "center has no effect: key is not coded; set its bits, or leave center out"
            )
        if self.key_axis == "sequence" and (
            not self.key.spiking or (self.key.salient_rate > 0 and self.key.thresholds == "split")
        ):
            raise ValueError(
                "key_axis: sequence gives every channel of K a range of its own over all tokens; K"
                " must spike, with shared thresholds"
            )
        return self


class Override(Section):
    """Other settings for the modules whose full name matches a regular expression (see
    :func:`spikellm.recipe.patterns.ways` for what it may cost).
    """

    match: str
    skip: bool = Field(False, description="leave these modules as they are")
    weights: dict[str, Any] = Field(default_factory=dict)
    activations: dict[str, Any] = Field(default_factory=dict)

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        ways(value)
        return value

    @model_validator(mode="after")
    def _has_an_effect(self) -> Override:
        if self.skip == bool(self.weights or self.activations):
            raise ValueError(
                f"the override for {self.match!r} must either skip or set weights / activations"
            )
        return self
