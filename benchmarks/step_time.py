"""What a training step costs under each method, beside the dense step of the same run.

    python benchmarks/step_time.py --json benchmarks/results/step_time.json
    python benchmarks/step_time.py --model deit_small --json benchmarks/results/step_time_deit.json

The baseline is the same network, optimizer and batch without nmgraph. The variants take one step each in turn, and
every figure is a median, so that a noisy machine is noisy for all. Functions of masks are compiled from the first step
on, which a longer run does by itself. A step with a search or an adaption is measured as such, and charged to the steps of
its usual interval in the last column. On the CPU it is the processor's time on one
thread, which other programs hardly change; on a GPU, measured as well where there is one, the time that passes.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import nn

import nmgraph
from nmgraph.compilation import SWITCH

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
    removes_each_step: bool = False  # LBC has all combinations, and a tenth of the schedule done, before every step
    every: int = 1  # steps that share the extra cost of such a step, beyond that of the variant before


VARIANTS = (
    Variant("dense"),
    Variant("srste", "srste"),
    Variant("lbc, removal phase", "lbc", {"t_i": 0.0, "t_f": 1.0}),
    Variant("lbc, a step that removes", "lbc", {"t_i": 0.0, "t_f": 1.0}, removes_each_step=True),
    Variant("lbc, static phase", "lbc", {"t_i": 0.0, "t_f": 0.0}),
    Variant("asp", "asp"),
    Variant("static", "static"),
    Variant("bame, between adaptions", "bame", {"t_i": 0.0}),
    Variant("bame, an adaption", "bame", {"t_i": 0.0, "interval": 1}, every=100),
    Variant("bame bidirectional", "bame", {"t_i": 0.0, "bidirectional": True}),
    Variant("bimask", "bimask"),
    Variant("bimask, a permutation", "bimask", {"interval": 1}, every=100),
    Variant("bimask, paper's permutation", "bimask", {"interval": 1, "search": "random", "objective": "blocks"}),
    Variant("decaying-mask", "decaying-mask"),
    Variant("maxq", "maxq"),
    Variant("rigl, a change", "rigl", {"interval": 1}),
    Variant("sste", "sste"),
    Variant("tmask, between searches", "tmask"),
    Variant("tmask, a search", "tmask", {"interval": 1}, every=40),
)


def deit_small() -> nn.Module:
    import timm

    return timm.create_model("deit_small_patch16_224", pretrained=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # with the side of an image, and the usual batch
    "resnet20": (lambda: ResNet(depth=20, width=16), 32, 64),
    "deit_small": (deit_small, 224, 16),
}


def prepare(name: str, variant: Variant, device: str, batch: int) -> tuple[nn.Module, Callable[[], float]]:
    """Make a variant's model, and a function that takes one step and gives its seconds."""
    torch.manual_seed(SEED)
    make, side, _ = MODELS[name]
    model = make().to(device)
    images, labels = torch.randn(batch, 3, side, side, device=device), torch.randint(10, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    if variant.method is not None:
        nmgraph.convert(model, method=variant.method, **variant.options)
        nmgraph.attach(model, optimizer, total_steps=TOTAL_STEPS)
    at_removal = []
    if variant.removes_each_step:
        for key, buffer in model.named_buffers():
            if key.endswith(".nm_alive"):
                at_removal.append((buffer, buffer.clone()))
            elif key.endswith(".nm_clock"):
                at_removal.append((buffer, torch.tensor([TOTAL_STEPS // 10, TOTAL_STEPS], device=device)))

    def step() -> float:
        for buffer, value in at_removal:
            buffer.copy_(value)
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


def measure(name: str, device: str, rounds: int, batch: int, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    prepared = [prepare(name, variant, device, batch) for variant in variants]
    seconds: list[list[float]] = [[] for _ in variants]
    for round_ in range(WARM_UP + rounds):
        for (_, step), own in zip(prepared, seconds, strict=True):
            taken = step()
            if round_ >= WARM_UP:
                own.append(taken)
    medians = [statistics.median(own) for own in seconds]
    amortised = [
        median if variant.every == 1 else before + (median - before) / variant.every
        for variant, before, median in zip(variants, [medians[0], *medians], medians, strict=False)
    ]
    return [
        {
            "device": device,
            "variant": variant.name,
            "options": variant.options,
            "step_s": median,
            "ratio_to_dense": median / medians[0],
            "ratio_amortised": shared / medians[0],
            "quartiles_s": [q for i, q in enumerate(statistics.quantiles(own, n=4)) if i != 1],
            "state_bytes_per_weight": state_bytes_per_weight(model) if variant.method else 0.0,
        }
        for variant, (model, _), own, median, shared in zip(
            variants, prepared, seconds, medians, amortised, strict=True
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="the figures are medians of so many")
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet20")
    parser.add_argument("--batch", type=int, help="images of a step; by default what is usual for the model")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="measure these methods, beside dense")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()

    batch = args.batch or MODELS[args.model][2]
    variants = [v for v in VARIANTS if v.method is None or not args.only or v.method in args.only]
    os.environ[SWITCH] = "always"

    torch.set_num_threads(1)
    results = []
    print(f"{'device':<6} {'variant':<28} {'step':>10} {'ratio':>7} {'amortised':>10} {'state, bytes per weight':>24}")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for found in measure(args.model, device, args.rounds, batch, variants):
            results.append(found)
            print(
                f"{device:<6} {found['variant']:<28} {found['step_s'] * 1e3:>7.1f} ms {found['ratio_to_dense']:>7.2f} "
                f"{found['ratio_amortised']:>10.2f} {found['state_bytes_per_weight']:>24.2f}"
            )
    if args.json:
        about = {
            "baseline": "the dense step of the same run",
            "model": args.model,
            "rounds": args.rounds,
            "batch": batch,
        }
        record.write(args.json, {**about, "results": results}, seed=SEED)


if __name__ == "__main__":
    main()
