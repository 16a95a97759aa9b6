"""Whether patterns suggested per layer beat one pattern for all at the same operations: at once, and after training.

    python benchmarks/sensitivity.py --json benchmarks/results/sensitivity.json

A small residual network learns scikit-learn's digits, dense. Its harms are measured on 256 of its training images. For each
uniform pattern, a suggestion is made with as many operations at most. Both prune the same dense weights: once, by magnitude
(asp); and trained on with lbc. The seed draws weights and order of images; the images held out are the same.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import nn

import nmgraph
from nmgraph.accounting.budget import Budget, suggest
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.sensitivity import Sensitivity

sys.path.insert(0, str(record.ROOT / "examples"))
from demo_digits import Digits
from networks import ResNet

SEEDS = (0, 1, 2)
UNIFORM = ("2:4", "1:4", "1:8")
DENSE_EPOCHS, SPARSE_EPOCHS = 10, 5
DENSE_RATE, SPARSE_RATE = 0.1, 0.02
MEASURED = 256  # images


def train(model: nn.Module, digits: Digits, seed: int, *, epochs: int, rate: float, sparse: bool) -> None:
    steps = epochs * digits.batches_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    if sparse:
        nmgraph.attach(model, optimizer, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for images, labels in digits.batches(generator):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits) -> dict[str, float]:
    logits = model.eval()(digits.held_out)
    return {"loss": float(F.cross_entropy(logits, digits.held_out_labels)), "accuracy": digits.accuracy(logits)}


def share_left(measured: Sensitivity, patterns: dict[str, str]) -> float:
    """Give the share of all operations that patterns leave."""
    kept = {name: Pattern.parse(p).density for name, p in patterns.items() if p != "dense"}
    removed = sum(site.macs * (1 - kept.get(site.name, 1.0)) for site in measured.sites)
    return 1 - removed / measured.macs


def pruned(dense: nn.Module, patterns: dict[str, str], digits: Digits, seed: int) -> dict[str, dict[str, float]]:
    """Prune once, and train with lbc; give what becomes of both on the images held out."""
    layers = {name: p for name, p in patterns.items() if p != "dense"}
    skip = [name for name, p in patterns.items() if p == "dense"]
    found = {}
    for when, method in (("at once", "asp"), ("trained", "lbc")):
        model = nmgraph.convert(copy.deepcopy(dense), method=method, layers=layers, skip=skip)
        if method == "lbc":
            train(model, digits, seed, epochs=SPARSE_EPOCHS, rate=SPARSE_RATE, sparse=True)
        finished = nmgraph.finalize(model)
        assert nmgraph.verify(finished).holds
        found[when] = evaluate(finished, digits)
    return found


def measure(seed: int, digits: Digits) -> dict[str, Any]:
    torch.manual_seed(seed)
    dense = ResNet(depth=14, width=16, channels_in=1)
    train(dense, digits, seed, epochs=DENSE_EPOCHS, rate=DENSE_RATE, sparse=False)
    began = time.perf_counter()
    measured = nmgraph.sensitivity(dense, digits.images[:MEASURED], labels=digits.labels[:MEASURED])
    seconds = time.perf_counter() - began
    found: dict[str, Any] = {
        "seed": seed,
        "dense": evaluate(dense, digits),
        "seconds_to_measure": seconds,
        "budgets": [],
    }
    for pattern in UNIFORM:
        uniform = {site.name: pattern for site in measured.sites}
        share = share_left(measured, uniform)
        suggestion = suggest(measured, Budget("flops", share))
        found["budgets"].append(
            {
                "uniform_pattern": pattern,
                "operations": {"uniform": share, "suggested": suggestion.reached},
                "uniform": pruned(dense, uniform, digits, seed),
                "suggested": pruned(dense, suggestion.patterns, digits, seed),
                "patterns": suggestion.patterns,
            }
        )
    return found


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for i, pattern in enumerate(UNIFORM):
        for when in ("at once", "trained"):
            row: dict[str, Any] = {"uniform_pattern": pattern, "when": when}
            for figure in ("loss", "accuracy"):
                for whose in ("uniform", "suggested"):
                    row[f"{whose}_{figure}"] = statistics.mean(run["budgets"][i][whose][when][figure] for run in runs)
            row["seeds_with_less_loss"] = sum(
                run["budgets"][i]["suggested"][when]["loss"] < run["budgets"][i]["uniform"][when]["loss"]
                for run in runs
            )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = Digits.load()
    runs = [measure(seed, digits) for seed in SEEDS]
    rows = summarize(runs)
    print(
        f"dense accuracy {statistics.mean(run['dense']['accuracy'] for run in runs):.2%}; means of {len(SEEDS)} seeds"
    )
    print(f"{'operations of':<14} {'':<8} {'uniform':>16} {'suggested':>16}  less loss in")
    for row in rows:
        shown = (f"{row[f'{whose}_loss']:>8.3f} {row[f'{whose}_accuracy']:>7.1%}" for whose in ("uniform", "suggested"))
        print(
            f"{row['uniform_pattern']:<14} {row['when']:<8} {' '.join(shown)}  {row['seeds_with_less_loss']} of {len(SEEDS)}"
        )
    if args.json:
        settings = {
            "seeds": SEEDS,
            "dense_epochs": DENSE_EPOCHS,
            "sparse_epochs": SPARSE_EPOCHS,
            "measured_images": MEASURED,
        }
        record.write(args.json, {"settings": settings, "means": rows, "runs": runs}, seed=SEEDS[0])


if __name__ == "__main__":
    main()
