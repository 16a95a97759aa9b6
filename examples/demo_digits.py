"""Train a residual network on scikit-learn's digits, dense and with LBC 2:4; export the sparse one and prove it.

    python examples/demo_digits.py --out demo-output

Both runs share the network, its initial weights, the order of the images and the loop. Two lines differ: `convert`
makes the layers sparse-trainable, `attach` lets the method take its step before each of the optimizer's. Nothing is
downloaded. The exit code is 1 if a check does not hold.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from networks import ResNet
from plots import draw_curves, draw_mask
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import nmgraph

SEED = 0
EPOCHS = 20
BATCH = 64
PEAK_RATE = 0.1
REQUIRED_ACCURACY = 0.97
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

    layers: dict[str, nn.Module]  # converted ones; of a dense model none
    losses: list[float] = field(default_factory=list)  # mean of each epoch
    accuracies: list[float] = field(default_factory=list)  # on the held-out images, after each epoch
    kept: list[float] = field(default_factory=list)  # share of the layers' weights, before each step
    masks: list[tuple[int, Tensor]] = field(default_factory=list)  # (steps done, WATCHED's mask), when it changed

    def observe_masks(self) -> None:
        """A converted layer's `weight` is what it multiplies by: zero where it is masked."""
        masks = {name: layer.weight.detach() != 0 for name, layer in self.layers.items()}
        if not masks:
            return
        if not self.masks or not torch.equal(masks[WATCHED], self.masks[-1][1]):
            self.masks.append((len(self.kept), masks[WATCHED]))
        self.kept.append(sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()))


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


def train(digits: Digits, *, sparse: bool, step_done: Callable[[], None]) -> tuple[nn.Module, History]:
    torch.manual_seed(SEED)
    model = ResNet(depth=8, width=32, channels_in=1)
    total_steps = EPOCHS * digits.batches_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), PEAK_RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=total_steps, pct_start=0.1)

    if sparse:
        nmgraph.convert(model, method="lbc", pattern="2:4")  # the first line
        nmgraph.attach(model, optimizer, total_steps=total_steps)  # and the second; the loop stays as it is

    layers = {site.name: model.get_submodule(site.name) for site in nmgraph.manifest(model).converted} if sparse else {}
    history = History(layers)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        model.train()
        losses = []
        for images, labels in digits.batches(generator):
            history.observe_masks()
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            step_done()
        history.losses.append(sum(losses) / len(losses))
        history.accuracies.append(digits.accuracy(predict(model, digits.held_out)))
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


def train_both(digits: Digits, console: Console) -> list[tuple[nn.Module, History]]:
    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    runs = []
    with Progress(*columns, console=console) as progress:
        for name, sparse in (("training dense", False), ("training LBC 2:4", True)):
            bar = progress.add_task(name, total=EPOCHS * digits.batches_per_epoch)
            runs.append(train(digits, sparse=sparse, step_done=lambda bar=bar: progress.advance(bar)))
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

    (dense, dense_history), (model, history) = train_both(digits, console)
    manifest, trained = nmgraph.manifest(model), nmgraph.verify(model)
    with console.status("exporting"):
        report = nmgraph.export(model, out / "export", example_inputs=digits.held_out, overwrite=True)
        onnx_file = report.directory / "model.onnx"
        exported = nmgraph.verify(onnx_file)
    with console.status("drawing"):
        draw_curves(out / "curves.png", dense_history, history, digits.batches_per_epoch)
        draw_mask(out / "mask.png", WATCHED, history.masks, digits.batches_per_epoch)

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
    for file in (onnx_file, out / "curves.png", out / "mask.png"):
        console.print(str(file), soft_wrap=True)
    return 0 if report.holds and all(contender.holds for contender in contenders) else 1


if __name__ == "__main__":
    sys.exit(main())
