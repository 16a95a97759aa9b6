"""Train a residual network on scikit-learn's digits, dense and with LBC 2:4; export the sparse one and prove it.

    python examples/demo_digits.py --out demo-output

Both runs share the network, its initial weights, the order of the images and the loop. Two lines differ: `convert`
makes the layers sparse-trainable, `attach` lets the method take its step before each of the optimizer's. A third one
records what the masks do, for the report. Nothing is downloaded. The exit code is 1 if a check does not hold.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from live import LiveTable
from networks import ResNet
from plots import draw_curves, draw_mask
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import nmgraph
from nmgraph.training.run_log import RunLog

SEED = 0
EPOCHS = 20
BATCH = 64
PEAK_RATE = 0.1
REQUIRED_ACCURACY = 0.97
RECORD_EVERY = 3  # steps
WATCHED = "stages.0.0.conv2"  # the layer whose mask is drawn


@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits, 8x8 gray values in 0..1; a quarter of them is held out."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor

    @classmethod
    def load(cls) -> "Digits":
        found = load_digits()
        images, labels = found.images[:, None].astype("float32") / 16, found.target
        images, held_out, labels, held_out_labels = map(
            torch.from_numpy, train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=SEED)
        )
        return cls(images, labels, held_out, held_out_labels)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.images) // BATCH

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=generator)
        for batch in order[: self.batches_per_epoch * BATCH].split(BATCH):
            yield self.images[batch], self.labels[batch]

    def accuracy(self, logits: Tensor) -> float:
        """Share of the held-out images that got their label."""
        return float((logits.argmax(1) == self.held_out_labels).float().mean())


@dataclass
class History:
    """What a run looked like, for the plots."""

    losses: list[float] = field(default_factory=list)  # mean of each epoch
    accuracies: list[float] = field(default_factory=list)  # on the held-out images, after each epoch


@dataclass(frozen=True)
class Contender:
    """A row of the table at the end."""

    name: str
    accuracy: float
    kept: int
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.accuracy > REQUIRED_ACCURACY and all(self.checks.values())


def train(digits: Digits, *, sinks: Sequence[Any], step_done: Callable[[], None]) -> tuple[nn.Module, History]:
    """Train dense, or sparse if there is something to record that to."""
    torch.manual_seed(SEED)
    model = ResNet(depth=8, width=32, channels_in=1)
    total_steps = EPOCHS * digits.batches_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), PEAK_RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=total_steps, pct_start=0.1)

    telemetry = None
    if sinks:
        nmgraph.convert(model, method="lbc", pattern="2:4", example_inputs=digits.images[:1])  # the first line
        controller = nmgraph.attach(
            model, optimizer, total_steps=total_steps
        )  # and the second; the loop stays as it is
        telemetry = nmgraph.record(controller, *sinks, every=RECORD_EVERY)

    history = History()
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        model.train()
        losses = []
        for images, labels in digits.batches(generator):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if telemetry:
                telemetry.note(loss=losses[-1])
            step_done()
        history.losses.append(sum(losses) / len(losses))
        history.accuracies.append(digits.accuracy(predict(model, digits.held_out)))
        if telemetry:
            telemetry.note(held_out_accuracy=history.accuracies[-1])
    if telemetry:
        telemetry.close()
    return model, history


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def predict_with_onnx_runtime(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


def kept_weights(verification) -> int:
    checks = [check for check in verification.checks if check.expected]
    return sum(round(check.density * math.prod(check.shape)) for check in checks)


def train_both(digits: Digits, log: Path, console: Console) -> list[tuple[nn.Module, History]]:
    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    runs, progress, watch = [], Progress(*columns), LiveTable()
    with Live(Group(progress, watch), console=console):
        for name, sinks in (("training dense", ()), ("training LBC 2:4", (log, watch))):
            bar = progress.add_task(name, total=EPOCHS * digits.batches_per_epoch)
            runs.append(train(digits, sinks=sinks, step_done=lambda bar=bar: progress.advance(bar)))
    return runs


def summarize(contenders: list[Contender], total: int, images: int) -> Table:
    title = f"{images} held-out digits; {total:,} weights in converted layers"
    table = Table("model", "accuracy", "weights kept", "checks", title=title, header_style="bold")
    for row in contenders:
        accuracy = f"{'[green]' if row.accuracy > REQUIRED_ACCURACY else '[red]'}{row.accuracy:.2%}"
        checks = "\n".join(f"{'[green]yes' if holds else '[red]NO'}[/] {check}" for check, holds in row.checks.items())
        table.add_row(row.name, accuracy, f"{row.kept:,} ({row.kept / total:.0%})", checks)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="where to write")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the same figures on any number of cores, and steady times on a busy machine
    console = Console()
    digits = Digits.load()

    log = out / "run.jsonl"
    log.unlink(missing_ok=True)  # of an earlier demo
    (dense, dense_history), (model, history) = train_both(digits, log, console)
    manifest, trained = nmgraph.manifest(model), nmgraph.verify(model)
    with console.status("exporting"):
        report = nmgraph.export(model, out / "export", example_inputs=digits.held_out, overwrite=True)
        onnx_file = report.directory / "model.onnx"
        exported = nmgraph.verify(onnx_file)
    with console.status("drawing"):
        recorded = RunLog.read(log)
        draw_curves(out / "curves.png", dense_history, history, recorded, digits.batches_per_epoch)
        draw_mask(out / "mask.png", WATCHED, recorded, digits.batches_per_epoch)
        page = nmgraph.report(model, out / "report.html", log=log, export=report.directory, overwrite=True)

    total = sum(site.parameters for site in manifest.converted)
    contenders = [
        Contender("dense, PyTorch", digits.accuracy(predict(dense, digits.held_out)), total),
        Contender(
            "LBC 2:4, PyTorch",
            digits.accuracy(predict(model, digits.held_out)),
            kept_weights(trained),
            {f"2:4 in all {len(manifest.converted)} layers": trained.holds},
        ),
        Contender(
            "LBC 2:4, ONNX Runtime",
            digits.accuracy(predict_with_onnx_runtime(onnx_file, digits.held_out)),
            kept_weights(exported),
            {"2:4 in the file": exported.holds, f"parity error {report.parity.worst:.0e}": report.parity.holds},
        ),
    ]

    console.print(f"\n{manifest}", *(f"; {site.name} stays dense: {site.reason}" for site in manifest.skipped), sep="")
    console.print(summarize(contenders, total, len(digits.held_out)))
    compressed = kept_weights(trained) * (4 + 2 / 8)  # a float, and two bits for its place in the block
    console.print(
        f"These weights take {4 * total / 1e3:,.0f} kB dense, and {compressed / 1e3:,.0f} kB as 2:4 values with their "
        f"places. ONNX has no such form: {onnx_file.name} stores the zeros, {onnx_file.stat().st_size / 1e3:,.0f} kB.\n"
    )
    for file in (onnx_file, out / "curves.png", out / "mask.png", page):
        console.print(str(file), soft_wrap=True)
    return 0 if report.holds and all(contender.holds for contender in contenders) else 1


if __name__ == "__main__":
    sys.exit(main())
