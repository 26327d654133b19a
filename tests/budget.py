"""What a test may cost: few examples and few families at first, all of them in `make test-slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings

THOROUGH = 60
"""Examples a test in the profile ``thorough`` of conftest.py."""


def examples(many: int, **more: Any) -> settings:
    """So many examples of a property in the thorough profile, the same share in another."""
    return settings(max_examples=max(1, many * settings.default.max_examples // THOROUGH), **more)


def mostly_slow(names: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test, slow unless they are among ``quick``."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
