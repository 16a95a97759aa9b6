"""How a published method chooses a row permutation (Bi-Mask, Zhang et al., ICML 2023), written out plainly."""

import torch

from nmgraph.nm.pattern import Pattern


def best_permutation(
    masked_OK: torch.Tensor, pattern: Pattern, candidates: int, objective: str, generator: torch.Generator
) -> torch.Tensor:
    """Gather the rows of the masked weight by every candidate, count the non-zeros of its blocks, and keep the best."""
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
