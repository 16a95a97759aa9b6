"""N:M along the rows of a weight, under a permutation of its rows: what an accelerated input gradient needs.

``dX = dY W`` sums over the rows (output channels) of W, and permuting rows of W along with columns of dY changes
nothing about it. So a backward mask may form its blocks of any M rows: those that are neighbours in ``W[P]``.
Where M does not divide the rows, the last block is shorter.

A permutation is scored on packed masks ``rows_OW``, 32 columns to a word: where at least t of a block's M rows
hold a weight is a plane of bits, found for 32 columns by a few ANDs and ORs. All of it is whole numbers, so every device,
rank and number of threads decides alike, and nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmgraph.compilation import Compiled, is_plain
from nmgraph.nm.fused import Blockwise, zero_outside
from nmgraph.nm.grouping import in_memory_order, memory_order, out_of_memory_order
from nmgraph.nm.masks import LARGEST
from nmgraph.nm.pattern import Pattern

OBJECTIVES = ("kept", "blocks")
SEARCHES = ("swap", "random")

_PAYS = 1 << 33  # words counted until compiling costs less than going on
_WORDS = 2**20  # of permuted masks at once: of fewer the calls cost most, more leave a processor's cache

_best = Blockwise(
    lambda w, scores: torch.where(w != 0, scores, -1.0).to(scores.dtype),
    lambda kept, w, scores: zero_outside(kept, w),
)


def column_sparse(
    w_OSC: Tensor,
    permutation_O: Tensor,
    pattern: Pattern,
    keep: int | Tensor | None = None,
    scores_OSC: Tensor | None = None,
) -> Tensor:
    """Zero, per column, all but the N best weights of every M rows that are neighbours under the permutation.

    Args:
        w_OSC: a weight, zero where the forward mask is: these places are never among the best.
        permutation_O: int64, row ``i`` of the permuted weight is row ``permutation_O[i]`` of the weight.
        pattern: N:M.
        keep: how many to keep of M, if not N.
        scores_OSC: what to rank by, >= 0; by default the magnitude.

    Returns:
        ``[O, S, C]`` in the weight's own row and memory order.

    >>> column_sparse(torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]), torch.tensor([0, 3, 1, 2]), Pattern(1, 2)).flatten()
    tensor([0., 0., 3., 4.])
    """
    order = memory_order(w_OSC)
    rows = order.index(0)
    given = [in_memory_order(t, order) for t in (w_OSC.detach(), scores_OSC) if t is not None]
    permuted = [_filled_up(t.index_select(rows, permutation_O), rows, pattern.m) for t in given]
    kept = (LARGEST if scores_OSC is None else _best)(
        pattern.m, pattern.n if keep is None else keep, *permuted, dim=rows
    )
    found = kept.index_select(rows, permutation_O.argsort())
    return out_of_memory_order(found, order)


def eligible_blocks(mask_OSC: Tensor, permutation_O: Tensor, pattern: Pattern) -> int:
    """Count the blocks of M permuted rows with at most N weights, which a backward mask leaves whole."""
    return int(_scores(mask_OSC, permutation_O[None], pattern, "blocks"))


def kept_weights(mask_OSC: Tensor, permutation_O: Tensor, pattern: Pattern) -> int:
    """Count the weights that a backward mask of the permuted rows leaves."""
    return int(_scores(mask_OSC, permutation_O[None], pattern, "kept"))


def find_permutation(
    mask_OSC: Tensor,
    permutation_O: Tensor,
    pattern: Pattern,
    search: str,
    candidates: int,
    objective: str,
    generator: torch.Generator,
) -> Tensor:
    """Find a row permutation that leaves a backward mask more; int64 ``[O]`` on the mask's device.

    Args:
        mask_OSC: bool, the forward mask.
        permutation_O: int64, the present one, on the mask's device.
        pattern: N:M.
        search: ``"random"``, the :func:`best_permutation` of some, whatever the present one is (Bi-Mask);
            ``"swap"``, :func:`swap_rows` of the present one.
        candidates: how many to try.
        objective: ``"blocks"``, most :func:`eligible_blocks`; ``"kept"``, most :func:`kept_weights`.
        generator: on the CPU.
    """
    if search == "random":
        return best_permutation(mask_OSC, pattern, candidates, objective, generator)
    return swap_rows(mask_OSC, permutation_O, pattern, candidates, objective, generator)


def best_permutation(
    mask_OSC: Tensor, pattern: Pattern, candidates: int, objective: str, generator: torch.Generator
) -> Tensor:
    """Draw row permutations and take the best, of equals the first; int64 ``[O]`` on the mask's device.

    Args:
        mask_OSC: bool, the forward mask.
        pattern: N:M.
        candidates: how many to draw.
        objective: ``"blocks"``, most :func:`eligible_blocks`; ``"kept"``, most :func:`kept_weights`.
        generator: on the CPU.
    """
    drawn = [torch.randperm(mask_OSC.shape[0], generator=generator) for _ in range(candidates)]
    drawn_KO = torch.stack(drawn).to(mask_OSC.device)
    return drawn_KO.index_select(0, _scores(mask_OSC, drawn_KO, pattern, objective).argmax(0, keepdim=True))[0]


def swap_rows(
    mask_OSC: Tensor, permutation_O: Tensor, pattern: Pattern, rounds: int, objective: str, generator: torch.Generator
) -> Tensor:
    """Swap rows between blocks while that gains: never worse than before; int64 ``[O]`` on the mask's device.

    A round pairs the blocks at random and makes in every pair the one swap of two rows that gains most, of equals the
    first. As pairs share no block, their gains add up.

    Args:
        mask_OSC: bool, the forward mask.
        permutation_O: int64, where to start, on the mask's device.
        pattern: N:M.
        rounds: how many, at least 1; each counts the bits of M packed masks.
        objective: ``"blocks"``, most :func:`eligible_blocks`; ``"kept"``, most :func:`kept_weights`.
        generator: on the CPU.

    >>> mask = torch.tensor([[[True]], [[True]], [[False]], [[False]]])
    >>> swap_rows(mask, torch.arange(4), Pattern(1, 2), 1, "kept", torch.Generator())
    tensor([2, 1, 0, 3])
    """
    m, rows = pattern.m, mask_OSC.shape[0]
    rows_OW = _packed(mask_OSC, m)
    order_O = _whole(permutation_O[None], m)[0]
    blocks = order_O.numel() // m
    if blocks < 2:
        return permutation_O
    drawn_RG = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(rounds)]).to(mask_OSC.device)
    for pairs_P2 in drawn_RG[:, : blocks // 2 * 2].reshape(rounds, -1, 2):
        order_P2M = order_O.reshape(-1, m)[pairs_P2]
        gain_PMM = _gains(_gathered(rows_OW, order_P2M), pattern, objective)
        if rows % m:  # where the last block has no rows, it stays so
            empty_P2M = order_P2M >= rows
            gain_PMM.masked_fill_(empty_P2M[:, 0, :, None] | empty_P2M[:, 1, None], 0)
        gain_P, swap_P = gain_PMM.flatten(1).max(1)
        slots_P2 = pairs_P2 * m + torch.stack((swap_P // m, swap_P % m), 1)
        swapped_P2 = order_O[slots_P2]
        order_O[slots_P2] = torch.where((gain_P > 0)[:, None], swapped_P2.flip(1), swapped_P2)
    return order_O[:rows]


def _gains(x_P2MW: Tensor, pattern: Pattern, objective: str) -> Tensor:
    """Give what swapping each row of a block with each row of the other gains; int64 ``[P, M, M]``.

    A row in a slot costs its weights in the columns that the block's other rows have filled: there each is one weight
    more that is lost, or makes an eligible block ineligible. What it adds elsewhere it adds in any slot.
    """
    full_P2W, full_without_P2W = _full(x_P2MW.unbind(2), pattern.n, objective)
    filled_P2MW = (full_P2W[:, :, None] & ~x_P2MW) | (full_without_P2W[:, :, None] & x_P2MW)
    own_P2M = _popcount(filled_P2MW & x_P2MW)
    swapped_P2MM = _popcount(filled_P2MW[:, :, :, None] & x_P2MW.flip(1)[:, :, None])  # slot, row of the other block
    return own_P2M[:, 0, :, None] + own_P2M[:, 1, None] - swapped_P2MM[:, 0] - swapped_P2MM[:, 1].mT


def _full(planes: Sequence[Tensor], n: int, objective: str) -> tuple[Tensor, Tensor]:
    """Mark where one weight more counts against the objective: beside all of these, and beside all of these but one."""
    at_least = _at_least(planes, n, n + 1 if objective == "kept" else n + 2)
    if objective == "kept":
        return at_least[n], at_least[n + 1]
    return at_least[n] & ~at_least[n + 1], at_least[n + 1] & ~at_least[n + 2]


def _scores(mask_OSC: Tensor, permutations_KO: Tensor, pattern: Pattern, objective: str) -> Tensor:
    """Count what each permutation leaves, by the objective; int64 ``[K]``."""
    rows_OW, order_KO = _packed(mask_OSC, pattern.m), _whole(permutations_KO, pattern.m)
    order_MKG = order_KO.reshape(len(order_KO), -1, pattern.m).movedim(-1, 0).contiguous()
    counted = _counting(pattern, objective)
    found_K = counted.in_one_pass(rows_OW, order_MKG)
    if found_K is None:
        chunks = torch.split(order_MKG, max(1, _WORDS // rows_OW.numel()), dim=1)
        found_K = torch.cat([counted.in_passes(rows_OW, some_MKG) for some_MKG in chunks])
    blocks = order_MKG.shape[2] * mask_OSC[0].numel()
    return blocks - found_K if objective == "blocks" else found_K


class _Counting:
    """Count the bits that so many rows of a block, or more, have in common: in passes of torch, or in a compiled one."""

    def __init__(self, pattern: Pattern, objective: str) -> None:
        self._least, self._most = (pattern.n + 1, pattern.n + 1) if objective == "blocks" else (1, pattern.n)
        self._kernel = Compiled(self._written(), _PAYS)

    def in_passes(self, rows_OW: Tensor, order_MKG: Tensor) -> Tensor:
        """Count for each of K orders; int64 ``[K]``."""
        planes = [_gathered(rows_OW, order_KG) for order_KG in order_MKG]
        at_least = _at_least(planes, self._least, self._most)
        return torch.stack([_popcount(words_KGW.flatten(1)) for words_KGW in at_least.values()]).sum(0)

    def in_one_pass(self, rows_OW: Tensor, order_MKG: Tensor) -> Tensor | None:
        """Do :meth:`in_passes`; None where it does not pay or work."""
        if not is_plain(rows_OW, order_MKG):
            return None

        def work() -> Tensor:
            out_KG = torch.empty(order_MKG.shape[1:], dtype=torch.int32, device=rows_OW.device)
            self._kernel(out_KG, rows_OW, order_MKG)
            return out_KG.sum(1, dtype=torch.int64)

        return self._kernel.attempt(work, order_MKG.numel() * rows_OW.shape[1], rows_OW.device)

    def _written(self) -> Callable[..., None]:
        least, most = self._least, self._most

        def kernel(out_KG: Tensor, rows_OW: Tensor, order_MKG: Tensor) -> None:
            at_least = _at_least([rows_OW[order_KG] for order_KG in order_MKG.unbind()], least, most)
            counts_KGW = [_popcount_of_words(words_KGW) for words_KGW in at_least.values()]
            out_KG.copy_(functools.reduce(torch.add, counts_KGW).sum(-1, dtype=torch.int32))

        return kernel


@functools.lru_cache(maxsize=64)
def _counting(pattern: Pattern, objective: str) -> _Counting:
    return _Counting(pattern, objective)


def _popcount_of_words(words: Tensor) -> Tensor:
    """Count the bits of each int32 word: of 2, 4, 8 and all 32 of them."""
    twos = words - ((words >> 1) & 0x55555555)
    fours = (twos & 0x33333333) + ((twos >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    return (eights * 0x01010101) >> 24


def _packed(mask_OSC: Tensor, m: int) -> Tensor:
    """Pack 32 columns into a word, in whatever order; int32 ``[O', W]``, W even, with empty rows up to whole blocks."""
    rows, columns = mask_OSC.shape[0], mask_OSC[0].numel()
    whole = mask_OSC.new_zeros(-(-rows // m) * m, -(-columns // 64) * 64)
    whole[:rows, :columns] = mask_OSC.flatten(1)
    # The product moves the lowest bit of eight bytes into the highest byte, each to a place of its own.
    return ((whole.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int32)


def _whole(permutations_KO: Tensor, m: int) -> Tensor:
    """Add the empty rows, in their place."""
    count, rows = permutations_KO.shape
    empty = torch.arange(rows, -(-rows // m) * m, device=permutations_KO.device)
    return torch.cat((permutations_KO, empty.expand(count, -1)), 1)


def _gathered(rows_OW: Tensor, order: Tensor) -> Tensor:
    # Four times as fast as indexing, on the CPU.
    return rows_OW.index_select(0, order.flatten()).reshape(*order.shape, -1)


def _at_least(planes: Sequence[Tensor], least: int, most: int) -> dict[int, Tensor]:
    """Count planes of bits: for each number from ``least`` to ``most``, mark where so many of them or more are set."""
    if len(planes) == 1:
        return {1: planes[0]}
    half = len(planes) // 2
    first = _at_least(planes[:half], max(1, least - len(planes) + half), min(most, half))
    second = _at_least(planes[half:], max(1, least - half), min(most, len(planes) - half))
    found = {}
    for t in range(least, most + 1):
        ways = [first[i] & second[t - i] for i in first if t - i in second]
        ways += [marked[t] for marked in (first, second) if t in marked]
        found[t] = functools.reduce(torch.bitwise_or, ways) if ways else torch.zeros_like(planes[0])
    return found


def _popcount(words: Tensor) -> Tensor:
    """Count the bits along the last axis, an even number of int32 words; int64. The words are used up."""
    # In place, as fresh memory costs more than the arithmetic: counts of 2, 4 and 8 bits, then of all four bytes.
    upper = words >> 1
    words.sub_(upper.bitwise_and_(0x55555555))
    torch.bitwise_right_shift(words, 2, out=upper).bitwise_and_(0x33333333)
    words.bitwise_and_(0x33333333).add_(upper)
    words.add_(torch.bitwise_right_shift(words, 4, out=upper)).bitwise_and_(0x0F0F0F0F)
    words.mul_(0x01010101).bitwise_right_shift_(24)
    both = words.view(torch.int64).sum(-1)  # two words at once
    return (both & 0xFFFFFFFF) + (both >> 32)


def _filled_up(t: Tensor, axis: int, m: int) -> Tensor:
    """Fill the last block along an axis up with zeros."""
    missing = -t.shape[axis] % m
    shape = [missing if place == axis else size for place, size in enumerate(t.shape)]
    return torch.cat([t, t.new_zeros(shape)], axis) if missing else t
