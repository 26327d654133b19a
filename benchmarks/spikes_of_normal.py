"""How few phase spikes code normal values, as rotated inputs are, at how large an error.

    python benchmarks/spikes_of_normal.py

Tokens of 576 normal values are coded with every price and share of the range that is tried, with 4
to 8 bits; the fewest spikes a value are printed for errors relative to that of rounding to nearest
with 4 bits in the best share.
"""

from __future__ import annotations

import torch

from spikellm.conversion.spike_prices import mean_spikes, prices_of
from spikellm.nn.fake_quant import InputCoder
from spikellm.recipe import ActivationRecipe

ERRORS = (1, 1.5, 2, 3, 4, 6, 8, 10)
SHARES = range(32, 65, 4)


def main() -> None:
    x = torch.randn(512, 576, generator=torch.Generator().manual_seed(0))
    group = torch.zeros(576, dtype=torch.uint8)

    def coded(bits: int) -> list[tuple[float, float, float]]:
        """Error, spikes and price of every way."""
        settings = ActivationRecipe(
            bits=bits, train="centered", recoding="signed-digit", spikes=1.0
        )
        found = []
        for share in SHARES:
            for price in prices_of(settings):
                coder = InputCoder(settings, group, share, price=price)
                q = coder.values(x)
                q = q * ((x * q).sum() / (q * q).sum())  # weights make up for what is shrunk
                error = float((q - x).square().mean())
                found.append((error, mean_spikes(settings, coder.counts(x)), price))
        return found

    ways = {bits: coded(bits) for bits in range(4, 9)}
    nearest = min(error for error, _, price in ways[4] if price == 0)
    print("error".ljust(8), *(f"{bits} bits".rjust(8) for bits in ways))
    for factor in ERRORS:
        row = [
            min((spikes for error, spikes, _ in own if error <= factor * nearest), default=0.0)
            for own in ways.values()
        ]
        print(f"{factor:g}×".ljust(8), *(f"{spikes:8.2f}" for spikes in row))


if __name__ == "__main__":
    main()
