"""How fast transposable masks are found for all of ResNet-50, and how much of the best sum of magnitudes they keep.

    python benchmarks/transposable.py --json benchmarks/results/transposable.json

Own: all 52 prunable convolutions (23.4 million weights; the first convolution and the classifier stay dense), median
of several rounds. Baselines: the paper's min-cost flow and 2-approximation, tile by tile, written in
`baselines.py`, timed on some tiles in turns with our own rounds, and multiplied up to all tiles. Ratio =
own time / time of the baseline. Shares are of the exact sum, mean and worst tile, over the same tiles: Gaussian ones, and
heavy-tailed ones as trained weights are (Student's t with 3 degrees of freedom).

Published, on other machines: 155 s for one search over ResNet-50 on an A100 (Bi-Mask, ICML 2023, table 6).
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baselines
import record
import shapes
import torch
from timing import timed

from nmgraph.nm.grouping import canonical
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.transposable import transposable_mask

SEED = 0
PATTERNS = ("2:4", "1:4", "4:8", "2:8", "1:8", "8:16", "1:16", "16:32")
KINDS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "gaussian": lambda shape: torch.randn(shape),
    "student_t_3": lambda shape: torch.distributions.StudentT(3.0).sample(shape),
}


def own_masks(w_TMM: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    tiles, m, _ = w_TMM.shape
    return transposable_mask(w_TMM.reshape(tiles * m, 1, m), pattern).reshape(w_TMM.shape)


def shares(w_TMM: torch.Tensor, pattern: Pattern) -> dict[str, float]:
    """Give the kept share of the exact sum, and the 2-approximation's share of places that it fills."""
    w_TMM = w_TMM.abs().double()
    tiles = w_TMM.numpy()
    best = (tiles * baselines.exact_transposable(tiles, pattern)).sum((1, 2))
    own = (tiles * own_masks(w_TMM, pattern).numpy()).sum((1, 2)) / best
    mask = baselines.two_approximation(tiles, pattern)
    published = (tiles * mask).sum((1, 2)) / best
    return {
        "own_mean": own.mean(),
        "own_worst": own.min(),
        "two_approximation_mean": published.mean(),
        "two_approximation_worst": published.min(),
        "two_approximation_filled": mask.mean() / pattern.density,
    }


def measure(weights: list[torch.Tensor], pattern: Pattern, sample: int, rounds: int) -> dict[str, Any]:
    views = [canonical(weight) for weight in weights]
    total = sum(weight.numel() for weight in weights) // pattern.m**2
    samples = {kind: draw((sample, pattern.m, pattern.m)) for kind, draw in KINDS.items()}
    tiles = samples["gaussian"].abs().double().numpy()
    part = tiles[: max(1, sample // 5)]  # the slow baselines
    work = {
        "own": (1, lambda: [transposable_mask(w_OSC, pattern) for w_OSC in views]),
        "two_approximation": (total / len(part), lambda: baselines.two_approximation(part, pattern)),
        "exact": (total / len(part), lambda: baselines.exact_transposable(part, pattern)),
    }
    taken = [{name: timed(each)[1] for name, (_, each) in work.items()} for _ in range(rounds + 1)]
    taken = taken[1:]  # the first warms up
    wall = {name: times * statistics.median(t[name][0] for t in taken) for name, (times, _) in work.items()}
    return {
        "pattern": str(pattern),
        "weights": sum(weight.numel() for weight in weights),
        "tiles": total,
        "tiles_timed_for_baselines": len(part),
        "tiles_for_shares": sample,
        "rounds": rounds,
        **{f"{name}_s": seconds for name, seconds in wall.items()},
        "own_processor_s": statistics.median(t["own"][1] for t in taken),
        **{f"ratio_to_{name}": wall["own"] / wall[name] for name in ("two_approximation", "exact")},
        "own_all_s": [t["own"][0] for t in taken],
        "share": {kind: shares(w_TMM, pattern) for kind, w_TMM in samples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="the figures are medians of so many")
    parser.add_argument(
        "--sample", type=int, default=500, help="tiles for the shares; a fifth of them times the baselines"
    )
    parser.add_argument("--quick", action="store_true", help="three patterns, few tiles, few rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()
    patterns, sample, rounds = PATTERNS, args.sample, args.rounds
    if args.quick:
        patterns, sample, rounds = ("2:4", "4:8", "1:16"), 50, 3

    torch.manual_seed(SEED)
    weights = shapes.resnet50()
    print(f"{'':<6}{'exact':>11}{'2-approx.':>11}{'own':>9}{'own, cpu':>9}{'ratio to exact, 2-approx.':>27}", end="")
    print(f"   {'own share: Gaussian':>20}{'heavy-tailed':>17}{'2-approx.':>11}")
    results = []
    for pattern in patterns:
        found = measure(weights, Pattern.parse(pattern), sample, rounds)
        results.append(found)
        gaussian, heavy = found["share"].values()
        print(
            f"{found['pattern']:<6}{found['exact_s']:>9.0f} s{found['two_approximation_s']:>9.1f} s{found['own_s']:>7.2f} s"
            f"{found['own_processor_s']:>7.2f} s{found['ratio_to_exact']:>14.5f}{found['ratio_to_two_approximation']:>13.5f}"
            f"   {gaussian['own_mean']:>12.6f} {gaussian['own_worst']:>7.4f}{heavy['own_mean']:>9.6f} "
            f"{heavy['own_worst']:>7.4f}{gaussian['two_approximation_mean']:>11.3f}",
            flush=True,
        )
    print("mean and worst tile; the paper's search of ResNet-50 is reported to take 155 s on an A100")
    if args.json:
        baseline = "min-cost flow and 2-approximation of Hubara et al. (2021), tile by tile, extrapolated"
        published = {"resnet50_search_s": 155, "on": "A100", "by": "Bi-Mask, ICML 2023, table 6"}
        record.write(args.json, {"baseline": baseline, "published": published, "results": results}, seed=SEED)


if __name__ == "__main__":
    main()
