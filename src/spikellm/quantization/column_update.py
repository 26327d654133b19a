"""Error feedback (GPTQ; Frantar et al., ICLR 2023): columns are coded one after the other, and the
error of a column is compensated in the columns after it.

With ``H = 2XᵀX + λI`` and U the upper Cholesky factor of H⁻¹, coding column j as ``q_j`` adds ``Σ_i
(w_ij − q_ij)² / U_jj²`` to the squared error of the layer's output, and the columns after it change
by ``−(w_j − q_j)/U_jj · U_j,:``. Columns are worked on as rows of the transposed matrix, which are
contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import NumericalError

BLOCK = 128
_RAISES = 8
CodeColumn = Callable[[int, Tensor, Tensor], object]
"""``code(column, w, error)`` codes ``w`` ``(out,)`` and writes the error ``w − value`` into
``error``; called once for each column, in the order of coding.
"""


class Windows(NamedTuple):
    """What looks at columns before they are coded.

    Attributes:
        width: columns of a window, at most :data:`BLOCK`; the last one may be narrower.
        look: ``look(first, w)`` is called when column ``first`` is next, with the weights of the
            window as error feedback has left them, ``(columns, out)``.
    """

    width: int
    look: Callable[[int, Tensor], object]


class InverseFactor(NamedTuple):
    """Upper Cholesky factor of the inverse of a damped Hessian, float32, ``(in, in)``, and the
    damping that it took.
    """

    upper: Tensor
    damping: float


def permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a square matrix in another order, as a copy."""
    return matrix[order.unsqueeze(1), order]


def inverse_factor(
    hessian: Tensor, damping: float, name: str, order: Tensor | None = None
) -> InverseFactor:
    """The factor that error feedback works with. Takes twice the memory of the Hessian beside it.

    Args:
        hessian: ``XᵀX`` up to a factor, float64 or float32, ``(in, in)``. Channels that never fire
            (zero on the diagonal) count as independent.
        damping: λ as a share of the mean diagonal.
        name: of the layer, for messages.
        order: channels in the order of coding; as they are by default.

    Raises:
        NumericalError: not positive definite, also after damping was raised tenfold eight times.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal() if order is None else hessian.diagonal()[order]
    mean = float(diagonal[diagonal > 0].mean()) if bool((diagonal > 0).any()) else 1.0
    if not bool(torch.isfinite(hessian.sum())):  # one bad entry spoils it
        raise NumericalError(
            f"layer {name}: the Hessian of its inputs holds NaN or infinity; the model's"
            " activations overflow on this text"
        )
    for _ in range(_RAISES + 1):
        # One name for all matrices frees each of them as soon as the next one exists.
        matrix = hessian.clone() if order is None else permuted(hessian, order)
        matrix.diagonal().add_(damping * mean)
        matrix.diagonal()[diagonal == 0] = mean
        matrix, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            matrix = torch.cholesky_inverse(matrix)
            matrix, info = torch.linalg.cholesky_ex(matrix, upper=True)
            if int(info) == 0:
                return InverseFactor(matrix.float(), damping)
        damping *= 10
    raise NumericalError(
        f"layer {name}: its Hessian is not positive definite, even with damping {damping / 10:.2g}"
        " of the mean diagonal; give more calibration text or raise algorithm.percdamp"
    )


def propagate_error(
    weight: Tensor, factor: Tensor, code: CodeColumn, windows: Windows | None = None
) -> Tensor:
    """Code a weight matrix column by column.

    Args:
        weight: ``(out, in)``, columns in the order of coding; not changed.
        factor: ``upper`` of :func:`inverse_factor`, in the same order.
        code: codes one column.
        windows: what looks at columns ahead of that.

    Returns:
        The squared output error that coding added, by row, ``(out,)``.
    """
    rows = weight.float().T.contiguous()  # (in, out)
    columns, outputs = rows.shape
    diagonal = factor.diagonal().unsqueeze(1)
    shares = (factor / diagonal).T.contiguous()  # [j, i]: share of column i's error moved to j
    loss = rows.new_zeros(outputs)
    block = BLOCK if windows is None else BLOCK // windows.width * windows.width
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = rows.new_empty(last - first, outputs)
        made, now = errors.T, slice(first, last)
        for place, (row, error, share) in enumerate(
            zip(rows[now].unbind(), errors.unbind(), shares[now, now].unbind(), strict=True)
        ):
            if windows is not None and place % windows.width == 0:
                ahead = slice(first + place, min(first + place + windows.width, last))
                moved = shares[ahead, now][:, :place] @ errors[:place]
                windows.look(first + place, rows[ahead] - moved)
            if place:
                row.addmv_(made[:, :place], share[:place], alpha=-1)
            code(first + place, row, error)
        loss += (errors / diagonal[now]).square_().sum(0)
        if last < columns:
            rows[last:].addmm_(shares[last:, now], errors, alpha=-1)
    return loss
