"""Whether patterns suggested per layer beat one pattern for all at the same operations: at once, and after training.

    python benchmarks/sensitivity.py --json benchmarks/results/sensitivity.json

A small residual network learns scikit-learn's digits, dense. Its harms are measured on 256 of its training images. For each
uniform pattern, suggestions are made with as many operations at most: by the loss, and by how far answers move. Beside them
stands the uniform pattern with the classifier dense, as most papers leave it, which is slightly more. All prune the same
dense weights: once, by magnitude (asp); and trained on with lbc. The seed draws weights and order of images; the images held
out are the same.
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
WHO = ("uniform", "head dense", "by loss", "by answers")
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
    images, labels = digits.images[:MEASURED], digits.labels[:MEASURED]
    by = {
        "by loss": nmgraph.sensitivity(dense, images, labels=labels),
        "by answers": nmgraph.sensitivity(dense, images),
    }
    seconds = (time.perf_counter() - began) / len(by)
    measured = by["by loss"]
    found: dict[str, Any] = {
        "seed": seed,
        "dense": evaluate(dense, digits),
        "seconds_to_measure": seconds,
        "budgets": [],
    }
    for pattern in UNIFORM:
        uniform = {site.name: pattern for site in measured.sites}
        share = share_left(measured, uniform)
        chosen = {"uniform": uniform, "head dense": uniform | {"classifier": "dense"}}
        chosen |= {who: suggest(found_by, Budget("flops", share)).patterns for who, found_by in by.items()}
        found["budgets"].append(
            {
                who: {"operations": share_left(measured, ps), "patterns": ps, **pruned(dense, ps, digits, seed)}
                for who, ps in chosen.items()
            }
        )
    return found


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give means over the seeds, and in how many of them the loss is less than with the uniform pattern."""
    rows = []
    for i, pattern in enumerate(UNIFORM):
        for when in ("at once", "trained"):
            for who in WHO:
                pairs = [(run["budgets"][i][who][when], run["budgets"][i]["uniform"][when]) for run in runs]
                means = {key: statistics.mean(own[key] for own, _ in pairs) for key in ("loss", "accuracy")}
                better = sum(own["loss"] < uniform["loss"] for own, uniform in pairs)
                rows.append(
                    {"operations_of": pattern, "when": when, "who": who, **means, "seeds_with_less_loss": better}
                )
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
    print(f"{'operations of':<14} {'':<8} {'patterns':<11} {'loss':>6} {'accuracy':>9}  less loss than uniform in")
    for row in rows:
        better = "" if row["who"] == "uniform" else f"  {row['seeds_with_less_loss']} of {len(SEEDS)}"
        print(
            f"{row['operations_of']:<14} {row['when']:<8} {row['who']:<11} {row['loss']:>6.3f} {row['accuracy']:>9.1%}{better}"
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
