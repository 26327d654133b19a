"""Elementary operations of what is no product of matrices, and sums of energies that may not be
known.
"""

from __future__ import annotations

from collections import Counter

Price = float | None
"""An energy, pJ; None where it is not known."""

Work = Counter[str]
"""How often each elementary operation is done.

Of numbers of 16 bits ``multiply``, ``add``, ``compare``, ``round``, ``exp``, ``divide`` and
``root`` (1/√x); of neurons ``update`` and ``idle``, one moment with and without a spike; ``spike``,
one on its way to its receivers.
"""

EXPANSIONS: dict[str, dict[str, int]] = {
    # I-BERT (Kim et al., ICML 2021), algorithm 2: x = -z ln 2 + p, exp(x) is 2^-z times
    # 0.3585 (p + 1.353)^2 + 0.344. Two products and a rounding find z and p, two more the
    # polynomial; z is taken off the exponent.
    "exp": {"multiply": 4, "add": 4, "round": 1},
    # Newton-Raphson: the line 48/17 - 32/17 d is right to 4 bits, x (2 - d x) doubles them, twice;
    # then the product with the numerator.
    "divide": {"multiply": 6, "add": 3},
    # The reciprocal root by Newton's method from an integer guess (Lomont 2003): y (1.5 - x/2 y^2),
    # twice, for the 11 bits of a number of 16.
    "root": {"multiply": 7, "add": 3},
}
"""Steps of operations that tables seldom have, for numbers of 16 bits."""


def times(count: float, price: Price) -> Price:
    """Energy of so many operations; nothing, whatever one costs, where there are none."""
    if count == 0:
        return 0.0
    return None if price is None else count * price


def total(*prices: Price) -> Price:
    """The sum; None where a part of it is not known."""
    found = 0.0
    for price in prices:
        if price is None:
            return None
        found += price
    return found


def energy_of_work(work: Work, price_of: dict[str, Price]) -> Price:
    """Energy of work, with the price of each operation."""
    return total(*(times(count, price_of[operation]) for operation, count in work.items()))
