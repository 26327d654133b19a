"""The rotation of :mod:`spikellm.quantization.hadamard`, one row a program: the additions of
``walsh`` in its order, so the same bits as there on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def walsh(
    x, y, signs, size, offset, root, SIGNED: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr
):
    """Columns ``offset … offset + POWER`` of every row of x, times signs, transformed into those of
    y, which may be x; where SIGNED it is, else the others are copied. STAGES: log2 of POWER.
    """
    row = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, POWER)
    value = tl.load(x + row + offset + lane)
    if SIGNED:
        value = value * tl.load(signs + lane)
    else:
        for start in range(POWER, size, POWER):
            rest = start + lane
            tl.store(y + row + rest, tl.load(x + row + rest, mask=rest < size), mask=rest < size)
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(value, (POWER // (2 << stage), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
        both = tl.join(first + second, first - second)
        value = tl.reshape(tl.permute(both, (0, 2, 1)), (POWER,))
    tl.store(y + row + offset + lane, tl.div_rn(value, root))
