"""How much magnitude a channel permutation saves, and how long the search takes.

    python benchmarks/permutation.py --threads 1 --json benchmarks/results/permutation.json

Efficacy as apex's permutation_tests count it: the share of what could be gained at most, (kept - kept in the given
order) / (kept if every row kept its largest half - kept in the given order), at 2:4. The matrices are random, 128 rows
of 64 channels; the first is the one of apex's README, where its search is published with 35.5 %. The baseline, in
the same run: the best of 1000 random permutations.

ResNet-50 is torchvision's, newly initialised: no trained weights are fetched. Trained ones have more to gain.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
import torchvision

from nmgraph import api
from nmgraph.layers.recipe import Recipe
from nmgraph.methods import make_method
from nmgraph.nm.channel_permutation import best_order, kept_magnitude
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.permute_channels import plan_permutation

SEED = 0
PATTERN = Pattern(2, 4)
PUBLISHED = 0.355  # apex, optimize_stripe_groups,8,100, on the first matrix


def matrices(count: int) -> dict[str, torch.Tensor]:
    apex = torch.from_numpy(np.random.RandomState(1).rand(128, 64))
    drawn = (torch.rand(128, 64, generator=torch.Generator().manual_seed(SEED + i)) for i in range(count))
    return {"apex's example": apex} | {f"seed {SEED + i}": w for i, w in enumerate(drawn)}


def measure(name: str, w_RC: torch.Tensor) -> dict[str, Any]:
    began = time.perf_counter()
    found = best_order([(w_RC, PATTERN)])
    seconds = time.perf_counter() - began
    generator = torch.Generator().manual_seed(SEED)
    began = time.perf_counter()
    drawn = (torch.randperm(w_RC.shape[1], generator=generator) for _ in range(1000))
    best = max(kept_magnitude(w_RC[:, order], PATTERN) for order in drawn)
    return {
        "matrix": name,
        "kept_before": found.before,
        "kept_after": found.after,
        "ideal": found.ideal,
        "efficacy": found.efficacy,
        "seconds": seconds,
        "random_1000_efficacy": max(0.0, best - found.before) / (found.ideal - found.before),
        "random_1000_seconds": time.perf_counter() - began,
    }


def measure_network() -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = torchvision.models.resnet50()
    decisions = api.plan(model, Recipe(make_method("srste"), PATTERN)).decisions
    began, cpu = time.perf_counter(), time.process_time()
    regions = plan_permutation(model, decisions).report.regions
    return {
        "model": "torchvision resnet50, newly initialised",
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "regions": [
            {
                "readers": list(r.readers), "channels": r.channels, "kept_before": r.before, "kept_after": r.after,
                "ideal": r.ideal, "gain": r.gain, "efficacy": r.efficacy,
            }
            for r in regions
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matrices", type=int, default=10, help="how many random ones")
    parser.add_argument("--threads", type=int, help="of torch; default its usual number")
    parser.add_argument("--no-network", action="store_true", help="leave ResNet-50 away")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{'128 x 64, 2:4':<16} {'search':>8} {'s':>6}   {'best of 1000 random':>20} {'s':>6}")
    results = []
    for name, w_RC in matrices(args.matrices).items():
        found = measure(name, w_RC)
        results.append(found)
        print(
            f"{name:<16} {found['efficacy']:>8.1%} {found['seconds']:>6.2f}   "
            f"{found['random_1000_efficacy']:>20.1%} {found['random_1000_seconds']:>6.2f}"
        )
    means = {key: sum(r[key] for r in results) / len(results) for key in ("efficacy", "random_1000_efficacy")}
    print(f"{'mean':<16} {means['efficacy']:>8.1%} {'':>6}   {means['random_1000_efficacy']:>20.1%}")
    network = None if args.no_network else measure_network()
    if network:
        print(f"{network['model']}: {network['seconds']:.1f} s, {network['cpu_seconds']:.1f} s of CPU time")
        for r in network["regions"]:
            print(f"  {r['channels']:>5} channels  +{r['gain']:.2%}  {r['efficacy']:>4.0%}  {', '.join(r['readers'])}")
    if args.json:
        about = {"baseline": "best of 1000 random permutations", "published_efficacy_on_apex_example": PUBLISHED}
        record.write(args.json, {**about, "results": results, "mean": means, "network": network}, seed=SEED)


if __name__ == "__main__":
    main()
