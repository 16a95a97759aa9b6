"""What looking costs: telemetry as a share of a training step, and inspect on a small and on a large model.

    python benchmarks/seeing.py --json benchmarks/results/seeing.json

A record is measured by itself, file included; it is shared by the steps between two records: 50, the fewest by default. What
a step between two records adds is measured by itself, too, as it drowns in the noise of a step. Seconds are the processor's, on one thread. Promised: under 2 % of a step; ResNet-50 inspected in 3 s, a model of a
billion weights without values in 20 s.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from step_time import MODELS
from timing import timed

import nmgraph
from nmgraph.training.telemetry import _SELDOM, Telemetry

LIMIT, SECONDS = 0.02, {"resnet50": 3.0, "llama 1.1 B, meta": 20.0}
STEPS = 1_000_000
CALLS = 200
METHODS = ("srste", "lbc", "bame", "bimask")
QUICK_METHODS = ("srste",)


def measure(quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    rounds = {"resnet20": 4} if quick else {"resnet20": 15, "deit_small": 4}
    rows = [
        telemetry(model, method, count)
        for model, count in rounds.items()
        for method in (QUICK_METHODS if quick else METHODS)
    ]
    return {"telemetry": rows, "inspect": [] if quick else inspect()}


def telemetry(name: str, method: str, rounds: int) -> dict[str, Any]:
    make, side, batch = MODELS[name]
    model = nmgraph.convert(make(), method=method)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    log = Path(tempfile.mkdtemp()) / "run.jsonl"
    seconds: dict[str, list[float]] = {"step": [], "between": [], "record": []}
    for round_ in range(rounds + 2):
        taken = {"step": timed(step)[1][1]}
        watching = nmgraph.record(controller, log, every=STEPS)
        taken["between"] = timed(lambda watching=watching: between(watching))[1][1] / CALLS
        taken["record"] = timed(lambda watching=watching: watching._look(controller.step))[1][1]
        watching.close()
        if round_ > 1:
            for what, each in taken.items():
                seconds[what].append(each)
    medians = {what: statistics.median(each) for what, each in seconds.items()}
    share = (medians["between"] + medians["record"] / _SELDOM) / medians["step"]
    return {
        "model": name, "method": method, "batch": batch, "step_s": medians["step"], "record_s": medians["record"],
        "record_over_step": medians["record"] / medians["step"], "between_over_step": medians["between"] / medians["step"],
        "share": share,
    }  # fmt: skip


def between(watching: Telemetry) -> None:
    """Do what a step without a record adds, many times: note a loss, and see that no record is due."""
    loss = torch.tensor(1.0)
    for _ in range(CALLS):
        watching.note(loss=loss)
        watching._after_step(1)


def inspect() -> list[dict[str, Any]]:
    from torchvision.models import resnet50
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
    rows = []
    for name, model in (("resnet50", resnet50(weights=None)), ("llama 1.1 B, meta", llama)):
        found, (wall, processor) = timed(lambda model=model: nmgraph.inspect(model))
        weights = sum(p.numel() for p in model.parameters())
        rows.append(
            {"model": name, "weights": weights, "sites": len(found.manifest.entries), "wall_s": wall, "s": processor}
        )
    return rows


def report(found: dict[str, Any]) -> bool:
    for row in found["telemetry"]:
        print(
            f"{row['model']:<12}{row['method']:<10}a record {row['record_over_step']:6.1%} of a step, in between "
            f"{row['between_over_step']:6.3%}; all in all {row['share']:6.2%} (promised: {LIMIT:.0%})"
        )
    for row in found["inspect"]:
        print(
            f"{row['model']:<20}{row['sites']:>5} sites inspected in {row['s']:.1f} s (promised: {SECONDS[row['model']]:.0f})"
        )
    return all(row["share"] < LIMIT for row in found["telemetry"]) and all(
        row["s"] < SECONDS[row["model"]] for row in found["inspect"]
    )


if __name__ == "__main__":
    record.run(__doc__, measure, report, seed=0)
