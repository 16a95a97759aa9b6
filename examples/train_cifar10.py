"""Train a ResNet on CIFAR-10 under N:M sparsity, continue where it stopped, export it and prove it.

    python examples/train_cifar10.py --data DATA --network resnet32 --width 32 --method lbc --pattern 2:4 --out runs/lbc

The defaults are the papers' recipe for CIFAR-10. For a first try on a CPU add `--epochs 2 --limit 5000`.

What nmgraph needs stands between two rules in `main`: a call that converts and one that attaches. All else is an
ordinary training script. A checkpoint in particular is the usual one, since all of a method's state lives in
`model.state_dict()`: with `--resume` a run goes on bit for bit as if it had never stopped.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar10 import augment, load, normalize
from networks import ResNet
from torch import Tensor, nn

import nmgraph

DEPTHS = {"resnet20": 20, "resnet32": 32}
WARM_UP = 0.05  # of all steps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    images, labels = (t.to(DEVICE) for t in load(args.data, "train", args.limit))
    test_images, test_labels = (t.to(DEVICE) for t in load(args.data, "test"))
    total_steps = args.epochs * math.ceil(len(images) / args.batch)

    model = ResNet(DEPTHS[args.network], args.width).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, total_steps))

    # ---- nmgraph: from here on ... ---------------------------------------------------------------------------
    if args.method != "dense":
        nmgraph.convert(model, method=args.method, pattern=args.pattern, **dict(args.set))
        nmgraph.attach(model, optimizer, total_steps=total_steps)
        print(nmgraph.manifest(model))
    # ---- ... to here; then train as ever -----------------------------------------------------------------------

    checkpoint = Checkpoint(args.out / "checkpoint.pt", settings(args), model, optimizer, schedule)
    epochs = checkpoint.load() if args.resume else []
    for epoch in range(len(epochs), args.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, optimizer, schedule, images, labels, args)
        accuracy = evaluate(model, test_images, test_labels)
        epochs.append({"loss": loss, "accuracy": accuracy, "seconds": time.perf_counter() - began})
        checkpoint.save(epochs)
        print(f"epoch {epoch + 1:3} of {args.epochs}: loss {loss:.4f}, test accuracy {accuracy:.2%}")

    result = {"accuracy": epochs[-1]["accuracy"], "wall_time_s": sum(e["seconds"] for e in epochs), "epochs": epochs}
    if args.method != "dense":
        result |= export(model, args.out / "export", test_images, test_labels)
    write_result(args, result)
    if not result.get("export_holds", True):
        sys.exit("A check of the export did not hold; see export/report.json.")


def train_epoch(model: nn.Module, optimizer, schedule, images: Tensor, labels: Tensor, args) -> float:
    """Train on every image once; give the mean loss."""
    # Drawn on the CPU, from the one generator whose state a checkpoint keeps.
    order = torch.randperm(len(images)).to(DEVICE)
    shifts = torch.randint(0, 9, (len(images), 2)).to(DEVICE)
    flips = (torch.rand(len(images)) < 0.5).to(DEVICE)

    model.train()
    total = torch.zeros((), device=DEVICE)
    for batch in order.split(args.batch):
        x = normalize(augment(images[batch], shifts[batch], flips[batch]))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=args.amp):
            loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(batch)
    return float(total) / len(images)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    predicted = torch.cat([model(normalize(batch)).argmax(1) for batch in images.split(500)])
    return float((predicted == labels).double().mean())


def warm_up_then_cosine(step: int, total_steps: int) -> float:
    """Give the factor of the learning rate: rising over the first 5 % of all steps, then half a cosine down to 0."""
    warm_up = max(1, round(WARM_UP * total_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total_steps - warm_up)))


class Checkpoint:
    """Everything a run depends on, as plain state_dicts in one file that is replaced in one step."""

    def __init__(self, path: Path, settings: dict[str, Any], model: nn.Module, optimizer, schedule) -> None:
        self.path, self.settings = path, settings
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}

    def save(self, epochs: list[dict[str, float]]) -> None:
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"settings": self.settings, "epochs": epochs, "rng": torch.get_rng_state()}
        content["rng_cuda"] = torch.cuda.get_rng_state_all()
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def load(self) -> list[dict[str, float]]:
        """Bring everything to where it stopped; give the epochs done. Without a file, that is the beginning."""
        if not self.path.exists():
            return []
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        begun = content["settings"]
        changed = [f"{k} {begun.get(k)}, now {v}" for k, v in self.settings.items() if begun.get(k) != v]
        if changed:
            sys.exit(f"{self.path} was begun with {'; '.join(changed)}. Keep the settings, or choose another --out.")
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        torch.set_rng_state(content["rng"])
        torch.cuda.set_rng_state_all(content["rng_cuda"])
        return content["epochs"]


def export(model: nn.Module, directory: Path, images: Tensor, labels: Tensor) -> dict[str, Any]:
    finished = nmgraph.finalize(model)  # ordinary layers with exact zeros; refuses masks that are not N:M yet
    report = nmgraph.export(finished, directory, example_inputs=normalize(images[:1]).cpu(), overwrite=True)
    print(report)
    return {"finalized_accuracy": evaluate(finished, images, labels), "export_holds": report.holds}


def write_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "nmgraph": nmgraph.__version__}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count()}
    if DEVICE == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    about = {"command": shlex.join(["python", *sys.argv]), "settings": settings(args), "data": args.data.name}
    path = args.out / "result.json"
    path.write_text(json.dumps({**about, "versions": versions, "machine": machine, **result}, indent=2) + "\n")
    print(f"Wrote {path}")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the outcome: a resumed run has to have the same."""
    decisive = {name: value for name, value in vars(args).items() if name not in ("data", "out", "resume")}
    return {**decisive, "set": dict(args.set)}


def method_option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)  # a number, true or false


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    option = parser.add_argument
    option("--data", type=Path, required=True, help="an .npz of JPEGs, or a directory with cifar-10-batches-py")
    option("--out", type=Path, required=True, metavar="DIR", help="where to write")
    option("--resume", action="store_true", help="go on from DIR/checkpoint.pt if there is one")
    option("--network", choices=DEPTHS, default="resnet32")
    option("--width", type=int, default=16, help="channels of the first stage; the N:M papers' ResNet-32 has 32")
    option("--method", choices=["dense", *nmgraph.METHODS], default="lbc")
    option("--pattern", default="2:4", metavar="N:M", help="N of every M input channels are kept")
    option("--set", type=method_option, action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    option("--epochs", type=int, default=300)
    option("--batch", type=int, default=256)
    option("--lr", type=float, default=0.1)
    option("--weight-decay", type=float, default=1e-3)
    option("--limit", type=int, metavar="N", help="train on the first N images only")
    option("--seed", type=int, default=0)
    option("--amp", action="store_true", help="compute in bfloat16 where autocast does")
    args = parser.parse_args()
    if args.method == "dense" and args.set:
        parser.error("--set is for a method, and --method is dense")
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "checkpoint.pt").exists() and not args.resume:
        parser.error(f"{args.out} holds a run already: go on with --resume, or choose another --out")
    return args


if __name__ == "__main__":
    try:
        main()
    except nmgraph.NMGraphError as error:
        sys.exit(f"nmgraph: {error}")
