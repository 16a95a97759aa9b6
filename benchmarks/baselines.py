"""Published formulations, written out plainly: what our own are measured against.

Each function does what a paper describes, or the code that came with it, in the straightforward way: sort every block,
loop over tiles, unfold a convolution.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize, sparse
from torch import Tensor

from nmgraph.nm.pattern import Pattern


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Rank every block of a convolution along its input channels (SR-STE, Zhou et al., ICLR 2021); float, 0 and 1."""
    blocks_KM = weight.detach().abs().permute(0, 2, 3, 1).reshape(-1, pattern.m)
    dropped = blocks_KM.argsort(dim=1)[:, : pattern.m - pattern.n]
    mask_KM = torch.ones_like(blocks_KM).scatter_(1, dropped, 0)
    outputs, inputs, *kernel = weight.shape
    return mask_KM.reshape(outputs, *kernel, inputs).permute(0, 3, 1, 2)


class SparseWeight(torch.autograd.Function):
    """The weight of SR-STE: masked forward, decay of what is masked added to the gradient backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pattern: Pattern, decay: float) -> Tensor:
        mask = magnitude_mask(weight, pattern)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * (1 - mask) * weight, None, None


def lbc_removal(scores_KC: Tensor, members_CM: Tensor, removed: int) -> tuple[Tensor, Tensor]:
    """Put the lowest of every block's C scores to zero, and mask what none that is left holds (LBC, NeurIPS 2022)."""
    lowest = scores_KC.topk(removed, dim=1, largest=False).indices
    alive_KC = torch.ones_like(scores_KC).scatter_(1, lowest, 0)
    scores_KC = scores_KC * alive_KC
    return scores_KC, (scores_KC @ members_CM) != 0


class UnfoldedConvolution(torch.autograd.Function):
    """A convolution of Bi-Mask (ICML 2023): windows unfolded, a product each forward and back, rows permuted."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, pattern: Pattern, permutation: Tensor, decay: float, padding: int
    ) -> Tensor:
        outputs, *window = weight.shape
        mask = magnitude_mask(weight, pattern).reshape(outputs, -1)
        w = weight.reshape(outputs, -1)
        columns = F.unfold(x, window[1:], padding=padding)
        ctx.save_for_backward(columns, w, mask, permutation)
        ctx.about = pattern, decay, padding, x.shape, weight.shape
        size = [side + 2 * padding - k + 1 for side, k in zip(x.shape[2:], window[1:], strict=True)]
        return ((w * mask) @ columns).reshape(len(x), outputs, *size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, w, mask, permutation = ctx.saved_tensors
        pattern, decay, padding, x_shape, w_shape = ctx.about
        dy = grad.flatten(2)
        permuted = (w * mask)[permutation]
        blocks = permuted.t().reshape(-1, pattern.m).abs()
        dropped = blocks.argsort(dim=1)[:, : pattern.m - pattern.n]
        backward_mask = torch.ones_like(blocks).scatter_(1, dropped, 0).reshape(permuted.shape[1], -1).t()
        unfolded = (permuted * backward_mask).t() @ dy[:, permutation]
        dx = F.fold(unfolded, x_shape[2:], w_shape[2:], padding=padding)
        dw = (dy @ columns.transpose(1, 2)).sum(0) + decay * (1 - mask) * w
        return dx, dw.reshape(w_shape), None, None, None, None


def best_permutation(
    masked_OK: Tensor, pattern: Pattern, candidates: int, objective: str, generator: torch.Generator
) -> Tensor:
    """Gather the rows of the masked weight by every candidate, count the non-zeros of its blocks, and keep the best (Bi-Mask)."""
    best, best_score = torch.arange(masked_OK.shape[0]), -1
    for _ in range(candidates):
        permutation = torch.randperm(masked_OK.shape[0], generator=generator)
        blocks_GMK = masked_OK[permutation].reshape(-1, pattern.m, masked_OK.shape[1])
        counts_GK = torch.count_nonzero(blocks_GMK, dim=1)
        left = counts_GK <= pattern.n if objective == "blocks" else counts_GK.clamp(max=pattern.n)
        score = int(left.sum(dtype=torch.int64))
        if score > best_score:
            best, best_score = permutation, score
    return best


def exact_transposable(tiles_TMM: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Find the best transposable mask of every tile of magnitudes, ``[T, M, M]``; bool.

    Hubara et al. (NeurIPS 2021) give a min-cost flow. Here it is solved as the linear programme it is, whose corners are
    masks, and at N = 1 as an assignment.
    """
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
