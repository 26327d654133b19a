"""The coder of one of Q, K and V: what its settings and groups say of heads, and the kernels that
code them. The codes themselves are described in :mod:`spikellm.kernels.torch.heads`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.base import select
from spikellm.kernels.prepared import PreparedHeads
from spikellm.kernels.spec import HeadSpec
from spikellm.kernels.torch.heads import HeadCodes, TorchHeads
from spikellm.nn.wide_rows import MassiveValues, WideRows
from spikellm.recipe import ActivationRecipe


class HeadCoder:
    """Codes one of Q, K, V.

    Kernels are chosen at first use and kept: a coder lives as long as the groups that it was made
    from.

    Args:
        settings: how it is coded.
        group: uint8 ``(heads, channels)``, group of every channel of every head (see
            ``ActivationRecipe.group_ranges``).
        axis: ``"token"``: ranges over the channels of one token; ``"sequence"``: over all tokens of
            one channel, as published for K, which lets a code depend on what follows.
        price: of a spike, see :mod:`spikellm.neurons.price`.
        share: see :func:`spikellm.quantization.thresholds.coded_range`; that of the settings by
            default.
    """

    def __init__(
        self,
        settings: ActivationRecipe,
        group: Tensor,
        axis: str = "token",
        price: float = 0.0,
        share: float | None = None,
    ) -> None:
        self.settings, self.spec = settings, head_spec(settings, group, axis, price, share)
        self.neuron = self.spec.neuron
        self.steps = self.spec.channel_steps.unsqueeze(1)  # (heads, 1, channels)
        self.reference = TorchHeads(self.spec)
        self._channels, self._device = self.spec.channels, group.device
        self._chosen: PreparedHeads | None = None

    def kernels(self, x: Tensor) -> PreparedHeads:
        """What runs on heads ``(batch, heads, tokens, channels)``: the chosen backend's state.

        The reference where a gradient is asked for, while a model is compiled, and where there are
        more channels than groups (one coder for all keys).
        """
        if (
            x.shape[-1] != self._channels
            or torch.compiler.is_compiling()
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return self.reference
        return self.chosen()

    def chosen(self) -> PreparedHeads:
        """The chosen backend's state."""
        if self._chosen is None:
            self._chosen = select(self.spec, self._device).prepare_heads(self.spec)
        return self._chosen

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``decode(encode(x))`` in fewer passes."""
        return self.kernels(x).fake_quantize(x)

    def to_rows(self, x: Tensor) -> Tensor:
        """``pack(encode(x))``."""
        return self.kernels(x).to_rows(x)

    def range_ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the whole range of every value, which broadcast to ``(batch, heads, tokens,
        channels)``.
        """
        return self.reference.range_ends(x.float())

    def encode(self, x: Tensor) -> HeadCodes:
        """Codes of ``(batch, heads, tokens, channels)``."""
        return self.reference.encode(x)

    def decode(self, coded: HeadCodes) -> Tensor:
        """Values that codes stand for, float32."""
        return self.reference.decode(coded)

    def pack(self, coded: HeadCodes) -> Tensor:
        """One row of bytes a token and head: uint8 ``(batch, heads, tokens, row_bytes)``."""
        return self.reference.pack(coded)

    def unpack(self, rows: Tensor, channels: int) -> HeadCodes:
        """Inverse of :meth:`pack`."""
        return self.reference.unpack(rows, channels)

    def steps_of(self, coded: HeadCodes) -> Tensor:
        """Steps T of every channel, which broadcast to its codes."""
        return self.steps

    def baselines(self, coded: HeadCodes) -> Tensor:
        """T·z of every channel, which broadcast to its codes."""
        return self.reference.baselines(coded)

    def store(self, x: Tensor, wide: WideRows) -> Tensor:
        """Rows for a cache, see :meth:`pack`; what is too wide for them goes into ``wide``."""
        return self.to_rows(x)

    def fetch(self, rows: Tensor, channels: int, wide: WideRows) -> HeadCodes:
        """Inverse of :meth:`store`."""
        return self.unpack(rows, channels)

    def massive_values(self, rows: Tensor, wide: WideRows) -> MassiveValues | None:
        """Values of the massive tokens among stored rows; None where there are none."""
        return None

    def row_bytes(self, channels: int) -> int:
        """Bytes of one cached token and head."""
        return self.spec.row_bytes(channels)


def head_spec(
    settings: ActivationRecipe,
    group: Tensor,
    axis: str,
    price: float = 0.0,
    share: float | None = None,
) -> HeadSpec:
    """A coder as kernels see it; arguments as for :class:`HeadCoder`."""
    index, device = group.long(), group.device
    steps = torch.tensor(settings.group_steps, device=device)[index]
    salient = steps > settings.steps
    # ordinary channels first
    order = torch.sort(salient.to(torch.uint8), dim=1, stable=True).indices
    counts = salient.sum(1)
    return HeadSpec(
        neuron=settings.make_neuron(price),
        symmetric=settings.symmetric,
        steps=settings.steps,
        salient_steps=settings.salient_steps,
        axis=axis,
        ranges=len(set(settings.group_ranges)),
        range_of=torch.tensor(settings.group_ranges, device=device)[index],
        channel_steps=steps,
        order=order,
        ordinary=int((~salient[0]).sum()) if len(salient) else 0,
        uniform=bool((counts == counts[:1]).all()),
        share=settings.coded_share if share is None else share,
        threshold_source=settings.threshold_from,
    )
