"""Whether several processes train as one does.

    python benchmarks/faults_ranks.py --json benchmarks/results/faults_ranks.json

A small network (a convolution and two linear layers) is trained by one process, and by two and four that share every
batch, with DistributedDataParallel and with `fully_shard`, over gloo. At every step all processes have to have the
same masks and clocks (`controller.check_ranks()`); at the end the largest difference of a weight from the one of a
single process is given, over the weight's norm, and the share of mask entries that differ.

In float64 the order in which gradients are added up decides nothing, and the difference has to stay under 1e-6. In float32 a
weight may win its place in a block by a rounding error, after which two runs part; that is reported, too.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nmgraph
from nmgraph.layers.masked import masked_weights

sys.path.append(str(record.ROOT / "tests"))
from ranks import on_ranks
from variants import VARIANTS

SEED = 0
STEPS = 200
BATCH = 16
LIMIT = 1e-6
DTYPES = {"float64": torch.float64, "float32": torch.float32}
KINDS = ("ddp", "fully_shard")


def batches(dtype: torch.dtype, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        x = torch.randn(BATCH, 8, 4, 4, generator=generator, dtype=dtype)
        yield x, torch.randint(8, (BATCH,), generator=generator)


def network(variant: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(SEED)
    method, options = VARIANTS[variant]
    options = {key: 10 if key == "interval" else value for key, value in options.items()}
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    return nmgraph.convert(net.to(dtype), method=method, **options)


def train(model: nn.Module, dtype: torch.dtype, steps: int, rank: int = 0, world: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    controller = nmgraph.attach(model, optimizer, total_steps=steps)
    for x, y in batches(dtype, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        controller.check_ranks()


def outcome(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, weight in masked_weights(model).items():
        raw: Any = weight.raw.detach()
        whole = raw.full_tensor() if hasattr(raw, "full_tensor") else raw
        found[name.removeprefix("module.")] = (whole, weight.mask())
    return found


def alone(dtype: torch.dtype, variant: str, steps: int) -> dict[str, tuple[Tensor, Tensor]]:
    model = network(variant, dtype)
    train(model, dtype, steps)
    return outcome(model)


def measure_on_ranks(
    rank: int, world: int, kind: str, steps: int, references: dict[str, dict[str, Any]], answers: Any
) -> None:
    for name, dtype in DTYPES.items():
        for variant, wanted in references[name].items():
            model: Any = network(variant, dtype)
            model = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
            train(model, dtype, steps, rank, world)
            found = outcome(model)
            if rank == 0:
                differs = max(float((found[n][0] - w).norm() / w.norm()) for n, (w, _) in wanted.items())
                masks = sum(int((found[n][1] ^ m).sum()) for n, (_, m) in wanted.items())
                share = masks / sum(m.numel() for _, m in wanted.values())
                answers.put({"dtype": name, "variant": variant, "difference": differs, "masks": share})


def measure(quick: bool) -> dict[str, Any]:
    """Train all methods with two and four processes; quick ones with two, and fewer steps."""
    steps, runs, began = STEPS // 10 if quick else STEPS, [], time.perf_counter()
    references = {name: {v: alone(dtype, v, steps) for v in VARIANTS} for name, dtype in DTYPES.items()}
    for world in (2,) if quick else (2, 4):
        for kind in KINDS:
            answers = multiprocessing.get_context("fork").SimpleQueue()
            on_ranks(world, measure_on_ranks, kind, steps, references, answers)
            while not answers.empty():
                runs.append({"ranks": world, "kind": kind, **answers.get()})
    return {"steps": steps, "seconds": time.perf_counter() - began, "runs": runs}


def report(found: dict[str, Any]) -> bool:
    print(
        f"{len(VARIANTS)} variants of methods, {found['steps']} steps; masks and clocks were equal on all ranks at every step"
    )
    print(f"{'':<22}{'largest relative difference of a weight':>44}{'mask entries that differ':>28}")
    for world in sorted({run["ranks"] for run in found["runs"]}):
        for kind in KINDS:
            for dtype in DTYPES:
                runs = [r for r in found["runs"] if (r["ranks"], r["kind"], r["dtype"]) == (world, kind, dtype)]
                worst = max(runs, key=lambda run: run["difference"])
                kept = sum(run["difference"] <= LIMIT for run in runs)
                told = f"{worst['difference']:.1e} ({worst['variant']}), {kept} of {len(runs)} within {LIMIT:.0e}"
                print(f"{world} {kind:<12}{dtype:<8}{told:>60}{max(r['masks'] for r in runs):>12.2%}")
    return all(run["difference"] <= LIMIT for run in found["runs"] if run["dtype"] == "float64")


if __name__ == "__main__":
    record.run(__doc__, measure, report, seed=SEED)
