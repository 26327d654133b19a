"""The section of a recipe that says how attention is coded."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from spikellm.neurons import make_neuron, unrolling
from spikellm.recipe.base import GrownSection
from spikellm.recipe.sections import ActivationRecipe

_MOST_BASELINE = 255  # one byte of a cached row
_NOT_CODED = ActivationRecipe(bits=16)


class AttentionRecipe(GrownSection):
    """How attention becomes spikes; each part with ``bits: 16`` stays as it is.

    Channels are those of one head.
    """

    added: ClassVar[tuple[str, ...]] = ("balance",)

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
            "take the mean of each channel of K, as it is attended to, off before it is coded,"
            " which the softmax does not see"
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

    balance: bool = Field(
        False,
        description=(
            "map pairs of channels of Q and K (i and i + half of a head) so that both lose least"
            " when they are coded, which leaves their products as they are"
        ),
        strict=True,
    )

    @property
    def spiking(self) -> bool:
        """Whether any part is coded."""
        return any(part.spiking for part in self.parts.values())

    @property
    def parts(self) -> dict[str, ActivationRecipe]:
        """What may be coded, by its key in a recipe."""
        names = ("query", "key", "value", "probabilities")
        return {f"attention.{name}": getattr(self, name) for name in names}

    @property
    def priced_parts(self) -> list[str]:
        """Of ``key`` and ``value``, those whose spikes have a price."""
        return [part for part in ("key", "value") if getattr(self, part).spikes]

    def check_budget(self, activations: ActivationRecipe) -> None:
        """Refuse a budget of spikes that counts other spikes than that of the linear layers.

        Raises:
            ValueError: says which.
        """
        budgets = {"activations": activations, "key": self.key, "value": self.value}
        forms = {name: part.spikes_of for name, part in budgets.items() if part.spikes}
        if len(set(forms.values())) > 1:
            found = ", ".join(f"{name} counts {form} spikes" for name, form in forms.items())
            raise ValueError(f"spikes are one budget, and {found}; give all the same spikes_of")

    @property
    def allocated_parts(self) -> list[str]:
        """Of ``key`` and ``value``, those whose steps are shared out over the model."""
        return [part for part in ("key", "value") if getattr(self, part).allocated_over_model]

    @model_validator(mode="after")
    def _parts_fit_together(self) -> AttentionRecipe:
        for name in ("query", "probabilities"):
            if getattr(self, name).salient_rate > 0:
                raise ValueError(
                    f"{name} takes one step in every channel; salient channels are for key and"
                    " value"
                )
            if getattr(self, name).spikes:
                raise ValueError(
                    f"{name}.spikes has no effect: the budget is shared out over inputs of linear"
                    " layers, key and value; leave it out"
                )
            if getattr(self, name).token_steps:
                raise ValueError(
                    f"{name}.token_steps has no effect: every {name} is used once, while keys and"
                    " values stay; set it for key or value"
                )
            if (steps := getattr(self, name).steps) != 1:
                raise ValueError(
                    f"{name} takes one step, not {steps}: steps are for key and value; raise"
                    f" {name}.bits for finer spikes"
                )
        for name in ("query", "key", "value", "probabilities"):
            part: ActivationRecipe = getattr(self, name)
            for field, is_set in (
                ("search_range", part.search_range),
                ("clusters", part.clusters > 1),
                ("threshold_from: calibration", part.static),
            ):
                if is_set:
                    raise ValueError(f"{name}.{field} is for linear layers; leave it out")
            if part.spiking and not make_neuron(part.neuron, part.bits).unrolls:
                raise ValueError(
                    f"{name}.neuron {part.neuron!r} is for linear layers: no train of spikes"
                    f" reaches its codes; with {part.bits} bits attention takes"
                    f" {' or '.join(unrolling(part.bits))}"
                )
        for name in ("key", "value"):
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
        if self.balance and not (self.rotate and self.key.spiking):
            raise ValueError(
                "balance has no effect unless K is coded behind a rotation; set rotate and"
                " key.bits, or leave balance out"
            )
        if self.center and not self.key.spiking:
            raise ValueError(
                "center has no effect: key is not coded; set its bits, or leave center out"
            )
        for name in ("key", "value"):
            part = getattr(self, name)
            steps = max(part.steps, part.token_steps)
            top = make_neuron(part.neuron, part.bits).top(steps) if part.spiking else 0
            if int(top) > _MOST_BASELINE:
                raise ValueError(
                    f"{name} takes up to {steps} steps of {part.bits} bits, which reach code {top};"
                    f" a cached row keeps a baseline of at most {_MOST_BASELINE}: lower steps,"
                    " token_steps or bits"
                )
        if self.key_axis == "sequence" and self.key.threshold_from == "mean":
            raise ValueError(
                "key.threshold_from is mean, which is that of a token; leave key_axis out"
            )
        if self.key_axis == "sequence" and self.key.token_steps:
            raise ValueError(
                "key.token_steps needs ranges of K over a token, not over the sequence; leave"
                " key_axis out"
            )
        if self.key_axis == "sequence" and (
            not self.key.spiking or (self.key.salient_rate > 0 and self.key.thresholds == "split")
        ):
            raise ValueError(
                "key_axis: sequence gives every channel of K a range of its own over all tokens; K"
                " must spike, with shared thresholds"
            )
        return self
