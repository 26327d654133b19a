"""The section of a recipe that says how values become spikes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from spikellm.neurons import (
    Recoding,
    SoftResetNeuron,
    SpikeForm,
    TrainForm,
    make_neuron,
    neurons,
    with_price,
    with_train,
)
from spikellm.quantization.thresholds import FULL_RANGE, MEAN_UNIT, ThresholdSource, share_of
from spikellm.recipe.activation_checks import (
    MOST_CLUSTERS,
    check_clusters,
    check_price,
    check_salient,
    check_thresholds,
    check_tokens,
)
from spikellm.recipe.base import GrownSection
from spikellm.saliency import criteria

MAX_STEPS = 255  # steps are stored in one byte
MAX_TOP_CODE = 4095  # T·L; keeps sums of products exact and codes in two bytes
_OF_SPIKES = {"bits", "train", "recoding"}  # say nothing where there are none, in whatever recipe


class ActivationRecipe(GrownSection):
    """How inputs of linear layers become spikes. ``bits: 16`` leaves them as they are."""

    added: ClassVar[tuple[str, ...]] = (
        "search_range",
        "token_steps",
        "token_factor",
        "token_rate",
        "train",
        "recoding",
        "spikes",
        "spikes_of",
        "threshold_from",
        "mean_factor",
        "clusters",
        "power_of_two",
    )

    bits: int = Field(4, description="bits of one spike, 1 to 8; 16 for no spikes", strict=True)
    neuron: str = Field(
        "gif",
        description=(
            "if (1-bit spikes), gif, ternary (2-bit spikes, symmetric), elastic (the same, leaky),"
            " or gif-published (top code as in the published code)"
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
    allocation: Literal["layer", "model"] = Field(
        "layer",
        description=(
            "salient_rate is that of every layer, or what all together spend where it lowers the"
            " loss most for the arithmetic that it takes (takes a backward pass)"
        ),
    )

    search_range: bool = Field(
        False,
        description=(
            "code each tensor in the share of a token's range, up to the multiple of its mean"
            " magnitude, or between the percentiles of calibration inputs, that loses least on a"
            " sample; what lies beyond takes the last code"
        ),
        strict=True,
    )
    token_steps: int = Field(
        0,
        ge=0,
        le=16,
        description=(
            "steps T of every channel in a massive token, whose range is far above the others'; 0"
            " for as many as in all tokens"
        ),
        strict=True,
    )
    token_factor: float = Field(
        4.0,
        gt=1.0,
        le=1e6,
        description="a token is massive if its range is this many times a tensor's median",
    )
    token_rate: float = Field(
        0.01,
        gt=0.0,
        le=0.5,
        description="share of a tensor's tokens that may be massive; the largest are",
    )
    train: TrainForm = Field(
        "published",
        description=(
            "spikes of q − z, which are silent at rest, or of the code q itself (as published, and"
            " in recipes that do not say); the same results"
        ),
    )
    recoding: Recoding = Field(
        "binary",
        description=(
            "digits of phase spikes: the bits of a count, or its signed digits, of which fewer"
            " fire; the same results"
        ),
    )

    spikes: float = Field(
        0.0,
        ge=0.0,
        le=MAX_TOP_CODE,
        description=(
            "average spikes of a value that all tensors together may take, each value counted once"
            " for every output that reads it: values are rounded so that what they lose is weighed"
            " against their spikes, and the budget goes where spikes lower the loss most (takes a"
            " backward pass); 0 to round to the nearest code"
        ),
    )
    spikes_of: SpikeForm = Field(
        "phase", description="train whose spikes are counted: phase or binary"
    )

    threshold_from: ThresholdSource = Field(
        "range",
        description=(
            "thresholds follow the smallest and largest value of a token, or its mean magnitude"
            " (mean), which suits spikes of few levels, in symmetric ranges only; or they are"
            " constants that calibration inputs decide (calibration)"
        ),
    )
    mean_factor: float = Field(
        2.0,
        gt=0.0,
        description=(
            "how many times its mean magnitude a token's range reaches, in sixteenths, where it is"
            " not searched"
        ),
    )
    clusters: int = Field(
        1,
        ge=1,
        le=MOST_CLUSTERS,
        description="clusters of channels with a range each, by their least and largest values",
        strict=True,
    )
    power_of_two: bool = Field(
        False,
        description="round thresholds that are constants to powers of two, so that they are shifts",
        strict=True,
    )

    def make_neuron(self, price: float = 0.0) -> SoftResetNeuron:
        """The neuron that fires these spikes; ``price`` is theirs, see
        :mod:`spikellm.neurons.price`.
        """
        neuron = with_train(make_neuron(self.neuron, self.bits), self.train, self.recoding)
        return with_price(neuron, price, self.spikes_of)

    @property
    def spiking(self) -> bool:
        return self.bits != 16

    @property
    def range_share(self) -> int:
        """64ths of a range, or 16ths of a mean, that are coded where nothing was searched."""
        by_mean = self.threshold_from == "mean"
        return round(self.mean_factor * MEAN_UNIT) if by_mean else FULL_RANGE

    @property
    def coded_share(self) -> float:
        """:attr:`range_share` as kernels take it."""
        return share_of(self.range_share, self.threshold_from)

    @property
    def static(self) -> bool:
        """Whether thresholds are constants."""
        return self.spiking and self.threshold_from == "calibration"

    @property
    def searches_share(self) -> bool:
        """Whether the share of a token's range is searched for every tensor."""
        return self.search_range and not self.static

    @property
    def allocated_over_model(self) -> bool:
        """Whether the number of salient channels is decided over all layers."""
        return self.allocation == "model"

    @property
    def group_ranges(self) -> tuple[int, ...]:
        """Which range each channel group is coded in.

        Groups: ordinary channels, then salient ones in the common range, then salient ones with
        a range of their own (with split thresholds). Of clusters, each has a range: its ordinary
        channels, then its salient ones."""
        if self.clusters > 1:
            kinds = 1 if self.salient_rate == 0 else 2
            return tuple(group // kinds for group in range(kinds * self.clusters))
        if self.salient_rate == 0:
            return (0,)
        return (0, 0, 1) if self.thresholds == "split" else (0, 0)

    @property
    def group_steps(self) -> tuple[int, ...]:
        """Steps T of each channel group."""
        if self.clusters > 1:
            kinds = (self.steps,) if self.salient_rate == 0 else (self.steps, self.salient_steps)
            return kinds * self.clusters
        return (self.steps, self.salient_steps, self.salient_steps)[: len(self.group_ranges)]

    @model_validator(mode="after")
    def _fits_together(self) -> ActivationRecipe:
        if self.neuron not in neurons:
            raise ValueError(neurons.unknown(self.neuron))
        if self.saliency not in criteria:
            raise ValueError(criteria.unknown(self.saliency))
        if self.spiking:
            self._check_spikes()
            check_salient(self)
            check_thresholds(self)
            check_clusters(self)
            check_tokens(self)
            check_price(self)
        elif idle := self.changed(set(type(self).model_fields) - _OF_SPIKES):
            raise ValueError(
                f"{', '.join(idle)} would have no effect: bits is 16, so inputs are not coded; set"
                " bits to 1 … 8"
            )
        return self

    def changed(self, names: set[str]) -> list[str]:
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
        steps = max(self.steps, self.salient_steps, self.token_steps)
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
