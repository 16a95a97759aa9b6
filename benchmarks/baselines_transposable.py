"""The searches for transposable masks that the paper describes, written as it describes them: one tile after another.

Hubara et al. (NeurIPS 2021) give a min-cost flow, which is exact, and a 2-approximation. Here the flow is solved as the
linear programme it is, whose corners are masks, and at N = 1 as an assignment.
"""

import numpy as np
from scipy import optimize, sparse

from nmgraph.nm.pattern import Pattern


def exact(tiles_TMM: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Find the best mask of every tile of magnitudes, ``[T, M, M]``; bool."""
    if pattern.n == 1:
        return np.stack([assignment(w_MM) for w_MM in tiles_TMM])
    ones, eye = np.ones((1, pattern.m)), sparse.eye(pattern.m)
    sums = sparse.csr_array(sparse.vstack([sparse.kron(eye, ones), sparse.kron(ones, eye)]))  # of rows, of columns
    return np.stack([flow(w_MM, sums, pattern.n) for w_MM in tiles_TMM])


def assignment(w_MM: np.ndarray) -> np.ndarray:
    mask_MM = np.zeros(w_MM.shape, dtype=bool)
    mask_MM[optimize.linear_sum_assignment(w_MM, maximize=True)] = True
    return mask_MM


def flow(w_MM: np.ndarray, sums: sparse.csr_array, n: int) -> np.ndarray:
    found = optimize.linprog(-w_MM.ravel(), A_eq=sums, b_eq=np.full(sums.shape[0], n), bounds=(0, 1), method="highs-ds")
    return found.x.reshape(w_MM.shape) > 0.5


def two_approximation(tiles_TMM: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Prune by ascending magnitude wherever a row or a column still lacks prunings.

    What is pruned is at most twice the least possible; but rows and columns may lose more than M - N.
    """
    masks_TMM = np.ones(tiles_TMM.shape, dtype=bool)
    for w_MM, mask_MM in zip(tiles_TMM, masks_TMM, strict=True):
        rows = [pattern.m - pattern.n] * pattern.m
        columns = rows.copy()
        for place in w_MM.argsort(axis=None, kind="stable").tolist():
            row, column = divmod(place, pattern.m)
            if rows[row] > 0 or columns[column] > 0:
                mask_MM[row, column] = False
                rows[row] -= 1
                columns[column] -= 1
            if max(rows) <= 0 and max(columns) <= 0:
                break
    return masks_TMM
