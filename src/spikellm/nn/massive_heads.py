"""The coder of K or V whose massive tokens take more steps.

Such a token of a head is coded by a second coder of that many steps in every channel. Its codes
take more bits than a cached row has, and it is one in hundreds: its row in the cache holds the
number of a *wide row* instead, which stands in a table beside the cache. The library may then crop,
reorder and repeat rows as ever. Such a row is told by the sign of its θ, which is positive in all
others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.kernels.torch.heads import HeadCodes
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.wide_rows import MassiveValues, WideRows
from spikellm.quantization.massive_tokens import is_beyond, range_width
from spikellm.recipe import ActivationRecipe

_NUMBER_BYTES = 3  # of a wide row
_SIGN = 128  # of the last byte of θ


class MassiveHeadCoder(HeadCoder):
    """Codes one of K, V; massive tokens with more steps.

    Args:
        settings: how it is coded.
        group: uint8 ``(heads, channels)``, see :class:`spikellm.nn.head_codec.HeadCoder`.
        beyond: float32 ``(heads,)``, the width of its range beyond which a token of a head is
            massive; infinite where none is.
        price: of a spike, see :mod:`spikellm.neurons.price`.
        share: as for :class:`HeadCoder`.

    Raises:
        RequestError: heads are so small that a row cannot hold the number of another.
    """

    def __init__(
        self,
        settings: ActivationRecipe,
        group: Tensor,
        beyond: Tensor,
        price: float = 0.0,
        share: float | None = None,
    ) -> None:
        super().__init__(settings, group, price=price, share=share)
        steps = settings.token_steps
        self.token_steps, self._beyond = steps, beyond.unsqueeze(1)
        fine = settings.model_copy(update={"steps": steps, "salient_steps": steps})
        self.wide = HeadCoder(fine, group, price=price, share=share)
        self._row_bytes = self.row_bytes(self._channels)
        self._sign_byte = self._row_bytes - self.spec.ranges - 1
        if self._sign_byte < _NUMBER_BYTES:
            raise RequestError(
                f"a cached row of {self._channels} channels at {settings.bits} bits is too short to"
                " name the row of a massive token; leave token_steps of key and value out"
            )

    def massive(self, x: Tensor) -> Tensor:
        """Whether tokens of heads ``(batch, heads, tokens, channels)`` are massive, bool ``(batch,
        heads, tokens)``.
        """
        return is_beyond(range_width(x.float()).squeeze(-1), self._beyond)

    def fake_quantize(self, x: Tensor) -> Tensor:
        massive, coded = self.massive(x).unsqueeze(-1), super().fake_quantize(x)
        if torch.compiler.is_compiling():
            return torch.where(massive, self.wide.fake_quantize(x), coded)
        some = _tokens(massive)
        if len(some):
            fine = self.wide.fake_quantize(x[:, :, some])
            coded[:, :, some] = torch.where(massive[:, :, some], fine, coded[:, :, some])
        return coded

    def encode(self, x: Tensor) -> HeadCodes:
        massive, own, fine = self.massive(x), super().encode(x), self.wide.encode(x)
        where = massive.unsqueeze(-1)
        return HeadCodes(
            torch.where(where, fine.codes, own.codes),
            torch.where(where, fine.theta, own.theta),
            torch.where(where, fine.baseline, own.baseline),
            massive,
        )

    def decode(self, coded: HeadCodes) -> Tensor:
        own = super().decode(coded)
        if coded.massive is None:
            return own
        return torch.where(coded.massive.unsqueeze(-1), self.wide.decode(coded), own)

    def steps_of(self, coded: HeadCodes) -> Tensor:
        if coded.massive is None:
            return self.steps
        return torch.where(coded.massive.unsqueeze(-1), self.token_steps, self.steps)

    def baselines(self, coded: HeadCodes) -> Tensor:
        own = super().baselines(coded)
        if coded.massive is None:
            return own
        return torch.where(coded.massive.unsqueeze(-1), self.wide.baselines(coded), own)

    def store(self, x: Tensor, wide: WideRows) -> Tensor:
        rows, massive = self.to_rows(x), self.massive(x)
        some = _tokens(massive.unsqueeze(-1))
        if len(some):
            fine = self.wide.to_rows(x[:, :, some])[massive[:, :, some]]
            rows[massive] = self._naming(wide.append(fine))
        return rows

    def fetch(self, rows: Tensor, channels: int, wide: WideRows) -> HeadCodes:
        coded, massive = self.unpack(rows, channels), self._is_naming(rows)
        if not bool(massive.any()):
            return coded
        fine, (head, place) = self._fine(rows, massive, wide)
        where = massive.unsqueeze(-1)
        return HeadCodes(
            coded.codes.masked_scatter(where, fine.codes[0, head, place]),
            coded.theta.masked_scatter(where, fine.theta[0, head, place]),
            coded.baseline.masked_scatter(where, fine.baseline[0, head, place]),
            massive,
        )

    def massive_values(self, rows: Tensor, wide: WideRows) -> MassiveValues | None:
        massive = self._is_naming(rows)
        if not bool(massive.any()):
            return None
        fine, (head, place) = self._fine(rows, massive, wide)
        return MassiveValues(massive.nonzero(), self.wide.decode(fine)[0, head, place])

    def _fine(
        self, rows: Tensor, massive: Tensor, wide: WideRows
    ) -> tuple[HeadCodes, tuple[Tensor, Tensor]]:
        """Codes of the wide rows that massive tokens name, as if each stood in every head, ``(1,
        heads, rows, channels)``; head and place there of each token.
        """
        assert wide.rows is not None
        head = massive.nonzero()[:, 1]
        number = torch.zeros_like(head)
        for byte in range(_NUMBER_BYTES):
            number += rows[massive][:, byte].long() << 8 * byte
        fine = wide.rows[number]
        every = self.wide.unpack(fine.expand(1, massive.shape[1], *fine.shape), self._channels)
        return every, (head, torch.arange(len(head), device=head.device))

    def _naming(self, number: Tensor) -> Tensor:
        """Rows that name wide rows of these numbers, ``(rows, bytes)``."""
        rows = number.new_zeros(len(number), self._row_bytes, dtype=torch.uint8)
        for byte in range(_NUMBER_BYTES):
            rows[:, byte] = number >> 8 * byte & 255
        rows[:, self._sign_byte] = _SIGN
        return rows

    def _is_naming(self, rows: Tensor) -> Tensor:
        return rows[..., self._sign_byte] >= _SIGN


def _tokens(massive: Tensor) -> Tensor:
    """Tokens that are massive in some head of some sequence, int64, of ``(batch, heads, tokens,
    1)``.
    """
    return massive.flatten(0, 1).any(0).flatten().nonzero().flatten()
