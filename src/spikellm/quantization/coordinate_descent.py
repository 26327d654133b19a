"""Coordinate descent on codes (QuantEase; Behdin et al., 2023): what error feedback leaves is
lowered further, one column after the other, each given all others.

The squared error ``(w − v) H (w − v)ᵀ`` of a row, as a function of one coded weight ``v_j``, is
least at ``v_j + [(w − v) H]_j / H_jj``; the code nearest to it is the best one, so no step raises
the error and the codes come to rest. Error feedback decides each column before it has seen the
errors of those after it; here every column is decided again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spikellm.quantization.column_update import BLOCK

Recode = Callable[[int, Tensor, Tensor], object]
"""``recode(column, wanted, value)`` codes ``wanted`` ``(out,)`` to nearest and writes the coded
weights into ``value``; called once for each column, in the order of coding.
"""


def pull_of(hessian: Tensor, damping: float = 0.0) -> Tensor:
    """What an error in column i asks of column j, float32 ``[j, i]``: ``H_ji / H_jj``.

    Args:
        hessian: ``XᵀX`` up to a factor, ``(in, in)``, columns in the order of coding; a column that
            never fires (zero on the diagonal) stays, or is rounded to nearest where the Hessian is
            damped.
        damping: added to the Hessian's diagonal, as a share of its mean, as error feedback does.
    """
    diagonal = hessian.diagonal().float()
    power = diagonal + damping * (diagonal[diagonal > 0].mean() if bool(diagonal.any()) else 1.0)
    pull = hessian.float() / power.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    pull.diagonal().copy_((power > 0).float())
    return pull


def descend(weight: Tensor, values: Tensor, pull: Tensor, recode: Recode) -> tuple[Tensor, int]:
    """One sweep over all columns.

    Args:
        weight: ``(out, in)``, columns in the order of coding.
        values: the coded weights so far, likewise; not changed.
        pull: see :func:`pull_of`.
        recode: codes one column.

    Returns:
        The coded weights, ``(out, in)``, and how many of them changed.
    """
    coded = values.float().T.contiguous()  # (in, out)
    errors = weight.float().T - coded
    changed = 0
    for first in range(0, len(coded), BLOCK):
        now = slice(first, first + BLOCK)
        wanted = torch.addmm(coded[now], pull[now], errors)
        steps = torch.empty_like(wanted)  # what the columns of this strip changed by
        moved, within = steps.T, pull[now, now]
        for place, (want, step) in enumerate(zip(wanted.unbind(), steps.unbind(), strict=True)):
            if place:
                want.addmv_(moved[:, :place], within[place, :place], alpha=-1)
            recode(first + place, want, step)
            step.sub_(coded[first + place])
        changed += int(torch.count_nonzero(steps))
        coded[now] += steps
        errors[now] -= steps
    return coded.T, changed
