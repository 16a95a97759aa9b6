"""What a training step of ResNet-20 costs under each method, beside the dense step of the same run.

    python benchmarks/step_time.py --json benchmarks/results/step_time.json

The baseline is the same network, optimizer and batch without nmgraph. The variants take one step each in turn, and
every figure is a median, so that a noisy machine is noisy for all. On the CPU it is the processor's time on one
thread, which other programs hardly change; on a GPU, measured as well where there is one, the time that passes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import nn

import nmgraph

sys.path.insert(0, str(record.ROOT / "examples"))
from networks import ResNet

SEED = 0
WARM_UP = 3  # rounds before the first that counts
TOTAL_STEPS = 1_000_000  # so long a run that no schedule moves while it is measured


@dataclass(frozen=True)
class Variant:
    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    attach_each_step: bool = False  # after it, LBC brings its masks up to date at once: the cost of a removal


VARIANTS = (
    Variant("dense"),
    Variant("srste", "srste"),
    Variant("lbc, removal phase", "lbc", {"t_i": 0.0, "t_f": 1.0}),
    Variant("lbc, a step that removes", "lbc", {"t_i": 0.0, "t_f": 1.0}, attach_each_step=True),
    Variant("lbc, static phase", "lbc", {"t_i": 0.0, "t_f": 0.0}),
    Variant("asp, static", "asp"),
    Variant("bame, between adaptions", "bame", {"t_i": 0.0}),
    Variant("bame, an adaption", "bame", {"t_i": 0.0, "interval": 1}),
    Variant("bame bidirectional", "bame", {"t_i": 0.0, "bidirectional": True}),
    Variant("bimask", "bimask"),
    Variant("bimask, a permutation", "bimask", {"interval": 1}),
    Variant("decaying-mask", "decaying-mask"),
    Variant("maxq", "maxq"),
    Variant("rigl, a change", "rigl", {"interval": 1}),
    Variant("sste", "sste"),
    Variant("tmask, between searches", "tmask"),
    Variant("tmask, a search", "tmask", {"interval": 1}),
)


def prepare(variant: Variant, device: str, batch: int) -> tuple[nn.Module, Callable[[], float]]:
    """Make a variant's model, and a function that takes one step and gives its seconds."""
    torch.manual_seed(SEED)
    model = ResNet(depth=20, width=16).to(device)
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    if variant.method is not None:
        nmgraph.convert(model, method=variant.method, **variant.options)
        nmgraph.attach(model, optimizer, total_steps=TOTAL_STEPS)

    def step() -> float:
        if variant.attach_each_step:
            nmgraph.attach(model, optimizer, total_steps=TOTAL_STEPS)
        began = clock(device)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return clock(device) - began

    return model, step


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def state_bytes_per_weight(model: nn.Module) -> float:
    """Give what conversion added to the model's buffers, over the weights of the converted layers."""
    added = [b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("nm_")]
    weights = sum(entry.parameters for entry in nmgraph.manifest(model).converted)
    return sum(b.numel() * b.element_size() for b in added) / weights


def measure(device: str, rounds: int, batch: int) -> list[dict[str, Any]]:
    prepared = [prepare(variant, device, batch) for variant in VARIANTS]
    seconds: list[list[float]] = [[] for _ in VARIANTS]
    for round_ in range(WARM_UP + rounds):
        for (_, step), own in zip(prepared, seconds, strict=True):
            taken = step()
            if round_ >= WARM_UP:
                own.append(taken)
    baseline = statistics.median(seconds[0])
    return [
        {
            "device": device,
            "variant": variant.name,
            "options": variant.options,
            "step_s": statistics.median(own),
            "ratio_to_dense": statistics.median(own) / baseline,
            "quartiles_s": [q for i, q in enumerate(statistics.quantiles(own, n=4)) if i != 1],
            "state_bytes_per_weight": state_bytes_per_weight(model) if variant.method else 0.0,
        }
        for variant, (model, _), own in zip(VARIANTS, prepared, seconds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="the figures are medians of so many")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    results = []
    print(f"{'device':<6} {'variant':<25} {'step':>9} {'ratio':>7} {'state, bytes per weight':>24}")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for found in measure(device, args.rounds, args.batch):
            results.append(found)
            print(
                f"{device:<6} {found['variant']:<25} {found['step_s'] * 1e3:>6.1f} ms {found['ratio_to_dense']:>7.2f} "
                f"{found['state_bytes_per_weight']:>24.2f}"
            )
    if args.json:
        about = {"baseline": "the dense step of the same run", "rounds": args.rounds, "batch": args.batch}
        record.write(args.json, {**about, "results": results}, seed=SEED)


if __name__ == "__main__":
    main()
