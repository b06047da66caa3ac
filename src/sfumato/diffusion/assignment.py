"""The assignment problem: pair the rows of a square cost matrix with its columns at the least total cost.

>>> import torch
>>> assign(torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])).tolist()
[1, 0, 2]
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assign(cost: Tensor) -> Tensor:
    """For each row the column it gets, (N,) int64 on the CPU, so that the sum of `cost` (N, N) is least.

    Shortest augmenting paths with dual prices (Kuhn 1955; Jonker & Volgenant 1987), O(N³). One row after another
    joins the matching; column 0 of the arrays is the place that the joining row enters by.

    Raises:
        ValueError: for a matrix that is not square or not finite.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not bool(torch.isfinite(cost).all()):
        raise ValueError(f"the assignment problem needs a square matrix of finite costs, got {tuple(cost.shape)}")
    table = cost.detach().to("cpu", torch.float64).numpy()
    n = len(table)
    row_price, column_price = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, dtype=np.int64)  # 1-based row in each column, 0 for a free one
    for row in range(1, n + 1):
        row_of[0] = row
        _augment(table, row_price, column_price, row_of)
    columns = np.empty(n, dtype=np.int64)
    columns[row_of[1:] - 1] = np.arange(n)
    return torch.from_numpy(columns)


def _augment(
    table: np.ndarray, row_price: np.ndarray, column_price: np.ndarray, row_of: np.ndarray
) -> None:
    """Dijkstra over reduced costs from the row in column 0 to a free column; then shift the matching along the path."""
    n = len(table)
    distance, came_from = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
    visited = np.zeros(n + 1, dtype=bool)
    column = 0
    while row_of[column] != 0:
        visited[column] = True
        row = row_of[column]
        reduced = table[row - 1] - row_price[row] - column_price[1:]
        closer = ~visited[1:] & (reduced < distance[1:])
        distance[1:][closer], came_from[1:][closer] = reduced[closer], column
        nearest = int(np.where(visited, np.inf, distance)[1:].argmin()) + 1
        step = distance[nearest]
        row_price[row_of[visited]] += step
        column_price[visited] -= step
        distance[~visited] -= step
        column = nearest
    while column:
        row_of[column] = row_of[came_from[column]]
        column = int(came_from[column])
