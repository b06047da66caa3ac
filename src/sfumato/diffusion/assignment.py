"""The assignment problem: pair the rows of a square cost matrix with its columns at the least total cost.

>>> import torch
>>> assign(torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])).tolist()
[1, 0, 2]
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import UserError


def assign(cost: Tensor) -> Tensor:
    """For each row the column it gets, (N,) int64 on the CPU, so that the sum of `cost` (N, N) is least.

    Raises:
        ValueError: for a matrix that is not square or not finite.
        UserError: without scipy (`pip install sfumato[train]`).
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not bool(torch.isfinite(cost).all()):
        raise ValueError(f"the assignment problem needs a square matrix of finite costs, got {tuple(cost.shape)}")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("immiscible training needs scipy: pip install sfumato[train]") from None
    return torch.from_numpy(linear_sum_assignment(cost.detach().to("cpu", torch.float64).numpy())[1])
