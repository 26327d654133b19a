"""Operations of what runs with the model before something is coded: rotations, centers, maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from spikellm.models.plain_attention import Operands
from spikellm.nn.rotation import Rotation
from spikellm.profiling.counts import DENSE_BITS, Operations
from spikellm.quantization.hadamard import largest_power
from spikellm.recipe import AttentionRecipe


def operations_of_rotation(rotation: Rotation, vectors: int) -> Iterator[Operations]:
    """Of a rotation before a linear layer, for so many tokens."""
    if rotation.rotated:
        yield operations_of_mix(rotation.rotated, vectors)
    if rotation.offset is not None:
        yield _additions(vectors * len(rotation.signs))


def operations_before_coding(seen: Operands, settings: AttentionRecipe) -> Iterator[Operations]:
    """Of what centers, maps and rotates Q and K, once for every new token."""
    batch, heads, queries, channels = seen.query.shape
    keys = batch * queries * seen.key.shape[1]
    vectors = batch * queries * heads + keys
    if settings.center:
        yield _additions(keys * channels)
    if settings.balance:  # two products for every channel
        yield Operations(0, Counter({(DENSE_BITS, DENSE_BITS): 2 * vectors * channels}))
    if settings.rotate:
        yield operations_of_mix(channels, vectors)


def operations_of_mix(channels: int, vectors: int) -> Operations:
    """Operations of :func:`spikellm.quantization.hadamard.mix`."""
    power = largest_power(channels)
    passes = 1 if power == channels else 2
    return _additions(vectors * power * (power.bit_length() - 1) * passes)


def _additions(count: int) -> Operations:
    """Additions of uncoded operands."""
    return Operations(0, Counter({(DENSE_BITS, 1): count}), count)
