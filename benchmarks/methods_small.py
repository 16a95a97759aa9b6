"""How accurate every training method is beside the dense network, at a budget that two CPU cores manage in an hour.

    python benchmarks/methods_small.py --data cifar10_jpeg.npz --json benchmarks/results/methods_small.json

A ResNet-20 learns CIFAR-10 in few steps, and every 2x2 pixels come to it as one of 12 channels (`--fold 2`): a quarter
of the work. Stem and classifier stay dense, as in the papers. All runs of a seed begin with the same weights and see
the same images in the same order, cropped and mirrored alike. Every run is one thread of its own process. After each
the JSON is replaced as a whole, so that the rest can wait for `--resume`.

So short a training ranks the methods at *this* budget: none of them is published for a thousand steps, and with more
steps they part further (`--arch resnet8 --epochs 8`). Intervals that
the papers give in steps are shortened where a run is short, see `SHORT_RUN`; the JSON holds every option of each run.
`--quick` tries the script out. The papers' own length, on a GPU, takes the same path:

    python benchmarks/methods_small.py --data cifar10_jpeg.npz --json methods_long.json --device cuda \
        --arch resnet32 --widths 32,64,128 --epochs 300
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nmgraph
from nmgraph.methods import make_method

sys.path.insert(0, str(record.ROOT / "examples"))
from cifar10 import augment, load, normalize
from networks import ResNet
from train_cifar10 import warm_up_then_cosine

KEPT_DENSE = ("stem", "classifier")
DEPTHS = {"resnet8": 8, "resnet14": 14, "resnet20": 20, "resnet32": 32}
CPU = {"arch": "resnet20", "widths": (16, 32, 64), "fold": 2, "max_shift": 2, "batch": 64, "epochs": 2.75}
CPU |= {"amp": True, "limit": 50_000, "test_limit": 10_000, "seeds": (0, 1, 2), "workers": 2}
CUDA = CPU | {"fold": 1, "max_shift": 4, "batch": 256, "epochs": 300.0, "amp": False, "workers": 1}
QUICK = {"limit": 4096, "test_limit": 1000, "epochs": 1.0, "seeds": (0,)}
SHORT_RUN = 10_000  # steps; the papers' intervals are for runs that are longer


@dataclass(frozen=True)
class Variant:
    """A method with its options; without a method it is the dense network.

    Attributes:
        short: options for a run that is short, instead of the published ones.
        trained_first: it begins with the dense network after its whole training, and so has twice the budget.
    """

    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    short: dict[str, Any] = field(default_factory=dict)
    trained_first: bool = False

    def all_options(self, steps: int) -> dict[str, Any]:
        if self.method is None:
            return {}
        return make_method(self.method, self.options | (self.short if steps < SHORT_RUN else {})).options()


VARIANTS = {
    "dense": Variant(),
    "asp": Variant("asp", trained_first=True),
    "static": Variant("static"),
    "rigl": Variant("rigl", short={"interval": 20}),
    "srste": Variant("srste"),
    "ste": Variant("srste", {"decay": 0.0}),
    "tmask": Variant("tmask"),
    "lbc": Variant("lbc"),
    "bimask": Variant("bimask", short={"interval": 20}),
    "bame": Variant("bame", short={"interval": 20}),
    "bame-bi": Variant("bame", {"bidirectional": True}, short={"interval": 20}),  # BAME†
    "maxq": Variant("maxq"),
    "gradual": Variant("gradual", short={"interval": 20}),
    "sste": Variant("sste"),
    "decaying-mask": Variant("decaying-mask"),
}
SPARSE = tuple(name for name in VARIANTS if name != "dense")
RUNS = (("1:16", SPARSE), ("2:4", ("static", "srste", "tmask", "bimask", "lbc", "bame")))


class Task(NamedTuple):
    """One run. The dense network has the pattern ``dense``."""

    pattern: str
    name: str
    seed: int


# ---- One run, in a worker -------------------------------------------------------------------------------------------


def begin_worker(settings: dict[str, Any], images: Path) -> None:
    """Set a worker up: its settings and data are the same for all of its runs."""
    global SETTINGS, DATA
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    if settings["device"] == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    torch.backends.cudnn.deterministic = True
    SETTINGS = settings
    limits = {"train": settings["train_images"], "test": settings["test_images"]}
    loaded = torch.load(images, mmap=True, weights_only=True)
    DATA = {split: [t[: limits[split]].to(settings["device"]) for t in loaded[split]] for split in limits}


def run(task: Task) -> tuple[Task, dict[str, Any]]:
    try:
        return task, measure(task)
    except Exception as error:  # one method's failure leaves the others
        return task, {"error": f"{type(error).__name__}: {error}"}


def measure(task: Task) -> dict[str, Any]:
    variant, steps = VARIANTS[task.name], SETTINGS["steps"]
    began, began_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(task.seed)
    model = ResNet(DEPTHS[SETTINGS["arch"]], SETTINGS["widths"][0], channels_in=3 * SETTINGS["fold"] ** 2)
    model = model.to(SETTINGS["device"], memory_format=torch.channels_last)
    found: dict[str, Any] = {"method": variant.method, "options": variant.all_options(steps)}
    if variant.trained_first:
        train(model, task.seed, converted=False)
        found["accuracy_before"] = evaluate(model)
    if variant.method is not None:
        nmgraph.convert(model, method=variant.method, pattern=task.pattern, skip=KEPT_DENSE, **found["options"])
    found["final_loss"] = train(model, task.seed, converted=variant.method is not None)
    if variant.method is not None:
        converted = nmgraph.manifest(model).converted
        model = nmgraph.finalize(model)
        found |= {"holds": nmgraph.verify(model).holds, "layers": len(converted)}
        found["sparse_weights"] = sum(entry.parameters for entry in converted)
    found |= {"accuracy": evaluate(model), "steps": steps * (1 + variant.trained_first)}
    return found | {"wall_time_s": time.perf_counter() - began, "cpu_time_s": time.process_time() - began_cpu}


def train(model: nn.Module, seed: int, *, converted: bool) -> float:
    """Train for the whole budget; give the mean loss of its last tenth."""
    images, labels = DATA["train"]
    steps, batch, device, shift = (SETTINGS[key] for key in ("steps", "batch", "device", "max_shift"))
    draws = torch.Generator().manual_seed(seed)  # its own, so that no method's draws change what is seen
    epochs = math.ceil(steps * batch / len(images))
    order = torch.cat([torch.randperm(len(images), generator=draws) for _ in range(epochs)])

    optimizer = torch.optim.SGD(
        model.parameters(), SETTINGS["lr"], momentum=SETTINGS["momentum"], weight_decay=SETTINGS["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, steps))
    if converted:
        nmgraph.attach(model, optimizer, total_steps=steps)
    model.train()
    losses = torch.zeros(steps, device=device)
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        shifts = torch.randint(4 - shift, 5 + shift, (len(chosen), 2), generator=draws).to(device)
        flips = (torch.rand(len(chosen), generator=draws) < 0.5).to(device)
        chosen = chosen.to(device)
        x = prepare(augment(images[chosen], shifts, flips))
        with torch.autocast(device, torch.bfloat16, enabled=SETTINGS["amp"]):
            loss = F.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
    return float(losses[-max(1, steps // 10) :].mean())


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    images, labels = DATA["test"]
    model.eval()
    predicted = torch.cat([model(prepare(part)).argmax(1) for part in images.split(500)])
    return float((predicted == labels).double().mean())


def prepare(images: Tensor) -> Tensor:
    return F.pixel_unshuffle(normalize(images), SETTINGS["fold"]).contiguous(memory_format=torch.channels_last)


# ---- All runs -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments()
    settings, console = decide_settings(args), Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended; go on with --resume"))  # takes the workers along
    torch.set_num_threads(1)
    commit, runs = record.commit(), read(args.json, settings) if args.resume else {}
    tasks = [task for task in all_tasks(args) if not is_done(runs.get(task), task, settings["steps"])]
    console.print(f"{len(tasks)} runs of {settings['steps']} steps to do, {len(runs)} there", highlight=False)
    console.print(about_options(settings["steps"]), highlight=False)

    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        images = decoded(args.data, args.cache or Path(scratch))
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(args.workers, max(1, len(tasks))), begin_worker, (settings, images)) as pool:
            for number, (task, found) in enumerate(pool.imap_unordered(run, tasks), 1):
                said = f"{number:3} of {len(tasks)}: {task.pattern:>5} {task.name:<14} seed {task.seed}: "
                if "error" in found:
                    failed += 1
                    console.print(said + found["error"], highlight=False, markup=False)
                    continue
                console.print(f"{said}{found['accuracy']:.2%}, {found['wall_time_s']:.0f} s", highlight=False)
                runs[task] = task._asdict() | found | {"commit": commit}
                write(args.json, settings, args.workers, commit, runs)
    console.print(table(runs))
    broken = [" ".join(map(str, task)) for task, found in runs.items() if not found.get("holds", True)]
    if failed or broken:
        sys.exit(f"{failed} runs failed; the pattern does not hold in {', '.join(broken) or 'none of the others'}")


def all_tasks(args: argparse.Namespace) -> list[Task]:
    """List the runs, a whole seed after the other: whenever they are interrupted, all methods have about as many."""
    one_seed = [("dense", "dense"), *((pattern, name) for pattern, names in args.runs for name in names)]
    return [Task(pattern, name, seed) for seed in args.seeds for pattern, name in one_seed]


def is_done(found: dict[str, Any] | None, task: Task, steps: int) -> bool:
    return found is not None and found["options"] == VARIANTS[task.name].all_options(steps)


def decoded(data: Path, directory: Path) -> Path:
    """Decode the images once, into a file that all workers map."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{data.stem}-decoded.pt"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        torch.save({split: load(data, split) for split in ("train", "test")}, temporary)
        temporary.replace(path)
    return path


def decide_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the outcome and is the same for all runs, as JSON gives it back."""
    settings = {
        "device": args.device,
        "data": args.data.name + (" (JPEGs: a little is lost)" if args.data.suffix == ".npz" else ""),
        "train_images": args.limit,
        "test_images": args.test_limit,
        "fold": args.fold,
        "max_shift": args.max_shift,
        "arch": args.arch,
        "widths": list(args.widths),
        "kept_dense": list(KEPT_DENSE),
        "steps": max(1, round(args.epochs * args.limit / args.batch)),
        "batch": args.batch,
        "lr": args.lr,
        "schedule": "linear warm-up over 5 % of the steps, cosine to 0",
        "momentum": 0.9,
        "weight_decay": args.weight_decay,
        "amp": args.amp,
    }
    return json.loads(json.dumps(settings))


def read(path: Path, settings: dict[str, Any]) -> dict[Task, dict[str, Any]]:
    """Read the runs that are there; without a file, there are none."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    begun = content["settings"]
    changed = [f"{key} {begun.get(key)}, now {value}" for key, value in settings.items() if begun.get(key) != value]
    if changed:
        sys.exit(f"{path} was begun with {'; '.join(changed)}. Keep the settings, or choose another --json.")
    return {Task(found["pattern"], found["name"], found["seed"]): found for found in content["runs"]}


def write(path: Path, settings: dict[str, Any], workers: int, commit: str, runs: dict[Task, dict[str, Any]]) -> None:
    about = {"command": record.command(), "commit": commit, "seeds": sorted({task.seed for task in runs})}
    about |= {"machine": record.machine(), "versions": record.versions(), "workers": workers}
    content = {**about, "settings": settings, "summary": summarize(runs), "runs": [runs[t] for t in in_order(runs)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def in_order(runs: dict[Task, Any]) -> list[Task]:
    names = list(VARIANTS)
    return sorted(runs, key=lambda task: (task.name != "dense", task.pattern, names.index(task.name), task.seed))


def summarize(runs: dict[Task, dict[str, Any]]) -> list[dict[str, Any]]:
    """Give mean and sample standard deviation over the seeds, and the mean distance to the same seed's dense run."""
    summary = []
    for pattern, name in dict.fromkeys(task[:2] for task in in_order(runs)):
        own = {task.seed: found for task, found in runs.items() if task[:2] == (pattern, name)}
        dense = {seed: runs.get(Task("dense", "dense", seed)) for seed in own}
        apart = [found["accuracy"] - dense[seed]["accuracy"] for seed, found in own.items() if dense[seed]]
        accuracies = [found["accuracy"] for found in own.values()]
        summary.append(
            {
                "pattern": pattern,
                "name": name,
                "runs": len(own),
                "accuracy_mean": statistics.mean(accuracies),
                "accuracy_std": statistics.stdev(accuracies) if len(own) > 1 else None,
                "minus_dense_mean": statistics.mean(apart) if apart else None,
                "final_loss_mean": statistics.mean(found["final_loss"] for found in own.values()),
                "wall_time_s_mean": statistics.mean(found["wall_time_s"] for found in own.values()),
            }
        )
    return summary


def table(runs: dict[Task, dict[str, Any]]) -> Table:
    shown = Table(title="Held-out accuracy, %")
    for heading in ("pattern", "method"):
        shown.add_column(heading)
    for heading in ("mean ± std", "- dense", "loss", "s/run", "runs"):
        shown.add_column(heading, justify="right")
    for row in summarize(runs):
        mark = " (twice)" if VARIANTS[row["name"]].trained_first else ""
        std = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
        apart = "" if row["minus_dense_mean"] is None else f"{100 * row['minus_dense_mean']:+.2f}"
        shown.add_row(
            row["pattern"],
            row["name"] + mark,
            f"{100 * row['accuracy_mean']:.2f}{std}",
            apart,
            f"{row['final_loss_mean']:.3f}",
            f"{row['wall_time_s_mean']:.0f}",
            str(row["runs"]),
        )
    return shown


def about_options(steps: int) -> str:
    twice = "asp: trained dense first, then again: twice the steps of the others."
    if steps >= SHORT_RUN:
        return f"Intervals as published.\n{twice}"
    changed = [f"{name} {key}={value}" for name, v in VARIANTS.items() for key, value in v.short.items()]
    return f"So short a run has shorter intervals than the papers: {', '.join(changed)}.\n{twice}"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def pattern_and_names(text: str) -> tuple[str, tuple[str, ...]]:
    pattern, _, names = text.partition("=")
    chosen = SPARSE if names == "all" else tuple(name for name in names.split(",") if name)
    unknown = [name for name in chosen if name not in SPARSE]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: it knows {', '.join(SPARSE)}")
    return str(nmgraph.Pattern.parse(pattern)), chosen


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data", type=Path, required=True, help="an .npz of JPEGs, or a directory with cifar-10-batches-py")
    option("--json", type=Path, required=True, metavar="PATH", help="where results are kept, after every run")
    option("--resume", action="store_true", help="keep the runs that are in PATH, and do the others")
    option("--quick", action="store_true", help="two minutes, to try the script out; the figures mean nothing")
    option("--cache", type=Path, metavar="DIR", help="keep the decoded images there, for the next time")
    option("--device", choices=["cpu", "cuda"], default="cpu", help="cuda has the papers' budget as its default")
    option("--runs", type=pattern_and_names, action="append", metavar="N:M=NAMES", help="e.g. 2:4=bame,lbc or 1:8=all")
    option("--seeds", type=numbers, help="e.g. 0,1,2")
    option("--arch", choices=DEPTHS)
    option("--widths", type=numbers, help="channels of the three stages: w,2w,4w")
    option("--fold", type=int, choices=[1, 2, 4], help="side of the squares of pixels that are folded into channels")
    option("--max-shift", type=int, choices=range(5), help="of the random crops, in pixels; half are mirrored as well")
    option("--limit", type=int, help="train on the first so many images")
    option("--test-limit", type=int, help="evaluate on the first so many test images")
    option("--epochs", type=float, help="through those images; may be a fraction")
    option("--batch", type=int)
    option("--lr", type=float, default=0.1)
    option("--weight-decay", type=float, default=5e-4)
    option("--amp", action=argparse.BooleanOptionalAction, help="compute in bfloat16 where autocast does")
    option("--workers", type=int, help="runs at a time, of one thread each on the CPU")
    args = parser.parse_args(words)
    for name, value in ((CUDA if args.device == "cuda" else CPU) | (QUICK if args.quick else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.runs = args.runs or RUNS
    width = args.widths[0]
    if args.widths != (width, 2 * width, 4 * width):
        parser.error("--widths: these networks double their channels from stage to stage: w,2w,4w")
    if args.json.exists() and not args.resume:
        parser.error(f"{args.json.name} holds runs already: go on with --resume, or choose another --json")
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; go on with --resume")
