"""How long the choice of a row permutation takes, and how much a backward mask then keeps.

    python benchmarks/row_permutation.py --json benchmarks/results/row_permutation.json

The layers are ResNet-50's convolutions but the first, with magnitude masks of Gaussian weights. The baseline
scores random permutations as published code does (`baselines.py`), from the same draws, and has to choose
the same ones. It and ours take turns in one run, layer by layer; seconds are sums over the layers, and the figures
medians of the rounds, wall-clock and of the processor. Ratio = baseline's time / own time. Random permutations are counted by
a compiled function, which a run makes once that pays.

Kept is the share of the forward mask's weights that a backward mask keeps: in the given order, with the best random
permutation, after the swaps, and at most. No order keeps more than N of a block in any column. Nor does one lose less
than the overlaps of rows demand: of c weights in a block's column max(c - N, 0) >= c (c - N) / M are lost, the c² count
the overlaps of every row with M - 1 others, and at best those are the M - 1 it overlaps least. The lower bound counts.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import baselines
import record
import shapes
import torch
from timing import timed

from nmgraph.compilation import SWITCH
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import OBJECTIVES, best_permutation, kept_weights, swap_rows

SEED = 0
PATTERNS = ("2:4", "1:4", "1:16")
WAYS = ("baseline", "random", "swap")


def weights(quick: bool) -> list[torch.Tensor]:
    """Give the weights as ``w_OSC``."""
    torch.manual_seed(SEED)
    return [canonical(w) for w in shapes.resnet50()[:: 8 if quick else 1]]


def most_kept(mask_OSC: torch.Tensor, pattern: Pattern) -> int:
    """Bound what any order of the rows keeps; M divides the rows."""
    live_OK = mask_OSC.flatten(1).float()
    rows, live = live_OK.shape[0], int(live_OK.sum(dtype=torch.float64))
    by_columns = int(live_OK.sum(0).clamp(max=rows // pattern.m * pattern.n).sum(dtype=torch.float64))
    overlaps_OO = (live_OK @ live_OK.T).fill_diagonal_(torch.inf)
    least = overlaps_OO.topk(pattern.m - 1, largest=False).values.sum(dtype=torch.float64)
    lost = (live * (1 - pattern.n) + float(least)) / pattern.m
    return min(by_columns, int(live - lost))


def measure_layer(
    w_OSC: torch.Tensor, pattern: Pattern, objective: str, candidates: int
) -> tuple[dict[str, int], dict[str, tuple[float, float]]]:
    """Give the weights kept by each way, and its wall-clock and processor seconds."""
    mask = magnitude_mask(w_OSC, pattern)
    masked_OK = (w_OSC * mask).flatten(1)
    identity = torch.arange(mask.shape[0])

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(SEED)

    work = {
        "baseline": lambda: baselines.best_permutation(masked_OK, pattern, candidates, objective, draws()),
        "random": lambda: best_permutation(mask, pattern, candidates, objective, draws()),
        "swap": lambda: swap_rows(mask, identity, pattern, candidates, objective, draws()),
    }
    found = {way: timed(each) for way, each in work.items()}
    assert torch.equal(found["random"][0], found["baseline"][0])
    kept = {way: kept_weights(mask, found[way][0], pattern) for way in ("random", "swap")}
    kept |= {"live": int(mask.sum()), "identity": kept_weights(mask, identity, pattern)}
    return kept, {way: found[way][1] for way in WAYS}


def measure(pattern: Pattern, objective: str, candidates: int, rounds: int, quick: bool) -> dict[str, Any]:
    layers = weights(quick)
    measure_layer(layers[0], pattern, objective, candidates)  # warms up
    runs = [[measure_layer(w, pattern, objective, candidates) for w in layers] for _ in range(rounds)]
    bounds = [most_kept(magnitude_mask(w, pattern), pattern) for w in layers]
    kept = [
        {"shape_OSC": list(w.shape), **counts, "bound": bound}
        for w, (counts, _), bound in zip(layers, runs[0], bounds, strict=True)
    ]
    assert all(layer["swap"] <= layer["bound"] for layer in kept)
    seconds = {way: [[sum(times[way][clock] for _, times in run) for run in runs] for clock in (0, 1)] for way in WAYS}
    live = sum(layer["live"] for layer in kept)
    return {
        "pattern": str(pattern),
        "objective": objective,
        "candidates": candidates,
        "rounds": rounds,
        **{f"{way}_wall_s": statistics.median(seconds[way][0]) for way in WAYS},
        **{f"{way}_processor_s": statistics.median(seconds[way][1]) for way in WAYS},
        "ratio_wall": statistics.median(
            b / r for b, r in zip(seconds["baseline"][0], seconds["random"][0], strict=True)
        ),
        "ratio_processor": statistics.median(
            b / r for b, r in zip(seconds["baseline"][1], seconds["random"][1], strict=True)
        ),
        **{f"kept_{way}": sum(layer[way] for layer in kept) / live for way in ("identity", "random", "swap", "bound")},
        "layers_where_swap_keeps_more_than_random": sum(layer["swap"] > layer["random"] for layer in kept),
        "layers": kept,
        "all_seconds_wall_processor": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=100, help="random permutations, and rounds of swaps")
    parser.add_argument("--rounds", type=int, default=3, help="the figures are medians of so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="every eighth layer, one round")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ[SWITCH] = "always"

    print(f"{'':<13} {'seconds':>36} {'ratio':>12}   {'kept':>36}  layers where")
    print(
        f"{'':<13} {'baseline':>12} {'random':>11} {'swap':>11} {'wall':>6} {'cpu':>5}   "
        f"{'identity':>9} {'random':>8} {'swap':>8} {'bound':>8}  swap keeps more"
    )
    results = []
    for text in PATTERNS:
        for objective in OBJECTIVES:
            found = measure(
                Pattern.parse(text), objective, args.candidates, 1 if args.quick else args.rounds, args.quick
            )
            results.append(found)
            print(
                f"{text:<6} {objective:<6} {found['baseline_wall_s']:>10.2f} s {found['random_wall_s']:>9.3f} s "
                f"{found['swap_wall_s']:>9.2f} s {found['ratio_wall']:>6.0f} {found['ratio_processor']:>5.0f}   "
                f"{found['kept_identity']:>9.4f} {found['kept_random']:>8.4f} {found['kept_swap']:>8.4f} "
                f"{found['kept_bound']:>8.4f}  "
                f"{found['layers_where_swap_keeps_more_than_random']} of {len(found['layers'])}"
            )
    if args.json:
        baseline = "random permutations scored by gathering the masked weight and counting non-zeros, same draws"
        record.write(args.json, {"baseline": baseline, "results": results}, seed=SEED)


if __name__ == "__main__":
    main()
