"""The transforms of a recipe as one section of switches."""

from __future__ import annotations

from typing import NamedTuple


class RotationView(NamedTuple):
    """Which transforms a recipe names, and what they say.

    Attributes:
        residual, value_output: whether the residual stream, the heads of V are rotated.
        online: layers whose inputs are rotated while the model runs.
        equalize: whether channels are scaled between layers.
        choose: which channels are rotated online, ``all`` or ``loss``.
    """

    residual: bool
    value_output: bool
    online: tuple[str, ...]
    equalize: bool
    choose: str

    @property
    def active(self) -> bool:
        """Whether anything is rotated or scaled."""
        return self.residual or self.value_output or self.equalize or bool(self.online)
