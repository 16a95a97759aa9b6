"""Whether a run that was stopped anywhere and went on in a new process ends where one that never stopped does.

    python benchmarks/faults_resume.py --json benchmarks/results/faults_resume.json

A run is trained through once, and the `state_dict`s of its model and optimizer are saved before some of its steps: the
first and the last, those around every phase boundary of the method and around a step of its interval, the rest by lot.
A new process for each of these makes the networks anew from another seed, loads the two files with `weights_only`, trains
the remaining steps, and compares every weight, buffer and optimizer state by its bits. Batches become smaller in the course of
a run. Every method with a residual network under SGD and with a small transformer under AdamW; three methods under
other optimizers, around what they do alone. Nothing may differ.

The processes are forked from a server that has imported nmgraph and done nothing else, so that many of them take minutes.
"""

import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmgraph
from nmgraph.methods import make_method

sys.path += [str(record.ROOT / folder) for folder in ("examples", "tests")]
from networks import ResNet
from variants import VARIANTS

SEED = 0
FULL = {"steps": 24, "interval": 5, "stops": 20, "every": 1}
QUICK = {"steps": 12, "interval": 4, "stops": 0, "every": 3}  # stops around what methods do, in every third run
USUAL = (("resnet", "sgd"), ("transformer", "adamw"))
FEW = ("bame", "lbc", "srste")  # one that clears moments, one with scores, one without a mask in its state


class TinyTransformer(nn.Module):
    """Patches of 4x4 pixels, two of torch's own encoder layers, and the mean of what they say."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(4, 32, 4, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def timm_lamb(parameters: Any) -> torch.optim.Optimizer:
    from conversion import import_torchvision

    import_torchvision()  # before timm does
    from timm.optim import Lamb

    return Lamb(parameters, lr=0.01)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(8, width=8, channels_in=4, classes=8),
    "transformer": TinyTransformer,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lamb": timm_lamb,
}


class Case(NamedTuple):
    """One run."""

    variant: str
    network: str
    optimizer: str
    steps: int
    interval: int


def all_cases(steps: int, interval: int) -> list[Case]:
    usual = [Case(v, *pair, steps, interval) for v in VARIANTS for pair in USUAL]
    others = [name for name in OPTIMIZERS if name not in dict(USUAL).values()]
    return usual + [Case(v, "resnet", name, steps, interval) for v in FEW for name in others]


def options_of(case: Case) -> dict[str, Any]:
    options = VARIANTS[case.variant][1]
    return options | ({"interval": case.interval} if "interval" in options else {})


def start(case: Case, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nmgraph.convert(NETWORKS[case.network](), method=VARIANTS[case.variant][0], **options_of(case))
    return model, OPTIMIZERS[case.optimizer](model.parameters())


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        size = 8 if step < case.steps // 3 else 4
        x = torch.randn(size, 4, 16, 16, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(8, (size,), generator=generator)).backward()
        optimizer.step()


def stops_of(case: Case, count: int, draws: random.Random) -> list[int]:
    """Choose steps to stop before: around what a method does, then any."""
    method = make_method(VARIANTS[case.variant][0], options_of(case))
    shares = [getattr(method, name, 0.0) for name in ("t_i", "t_f", "recompute_at")]
    events = [0, case.steps - 1, *(round(share * case.steps) for share in shares), case.interval, case.steps]
    chosen = {s for event in events for s in (event - 1, event, event + 1) if 0 <= s < case.steps}
    rest = [step for step in range(case.steps) if step not in chosen]
    missing = max(0, min(count - len(chosen), len(rest)))
    return sorted(chosen | set(draws.sample(rest, missing)))


def run_through(case: Case, stops: list[int], folder: Path) -> None:
    model, optimizer = start(case, SEED)
    nmgraph.attach(model, optimizer, total_steps=case.steps)
    for step in range(case.steps):
        if step in stops:
            torch.save((model.state_dict(), optimizer.state_dict()), folder / f"{step}.pt")
        train(case, model, optimizer, range(step, step + 1))
    torch.save((model.state_dict(), optimizer.state_dict()), folder / "end.pt")


def go_on(task: tuple[Case, int, str]) -> list[str]:
    """Resume before a step, in this process, which has to be a new one; name what differs at the end."""
    case, stop, folder = task
    torch.set_num_threads(1)
    model, optimizer = start(case, SEED + 1 + stop)  # other weights at first
    states = torch.load(Path(folder) / f"{stop}.pt", weights_only=True)
    model.load_state_dict(states[0], strict=True)
    optimizer.load_state_dict(states[1])
    nmgraph.attach(model, optimizer, total_steps=case.steps)
    train(case, model, optimizer, range(stop, case.steps))
    wanted = torch.load(Path(folder) / "end.pt", weights_only=True)
    return differences("", (model.state_dict(), optimizer.state_dict()), wanted)


def differences(path: str, one: Any, other: Any) -> list[str]:
    """Name what is not the same to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [name for key in one for name in differences(f"{path}.{key}", one[key], other[key])]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            name for i, pair in enumerate(zip(one, other, strict=True)) for name in differences(f"{path}.{i}", *pair)
        ]
    return [] if type(one) is type(other) and one == other else [path]


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def measure(quick: bool) -> dict[str, Any]:
    sizes, draws = QUICK if quick else FULL, random.Random(SEED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nmgraph", "torch._dynamo"])  # the latter is what optimizers import in a first step
    results = []
    with context.Pool(1, maxtasksperchild=1) as pool:  # a process for every task
        for case in all_cases(sizes["steps"], sizes["interval"])[:: sizes["every"]]:
            usual = (case.network, case.optimizer) in USUAL
            began, stops = time.perf_counter(), stops_of(case, sizes["stops"] if usual else 0, draws)
            with tempfile.TemporaryDirectory() as folder:
                run_through(case, stops, Path(folder))
                found = pool.map(go_on, [(case, stop, folder) for stop in stops], chunksize=1)
            differing = {stop: names for stop, names in zip(stops, found, strict=True) if names}
            results.append(
                {**case._asdict(), "options": options_of(case), "stops": stops, "differing": differing}
                | {"wall_time_s": time.perf_counter() - began}
            )
            print(
                f"{case.variant:<30} {case.network:<12} {case.optimizer:<15} {len(stops):>3} stops   "
                + (f"differs from {sorted(differing)}" if differing else "equal"),
                flush=True,
            )
    return {
        "runs": len(results),
        "resumed": sum(len(result["stops"]) for result in results),
        "differing": sum(len(result["differing"]) for result in results),
        "results": results,
    }


def report(found: dict[str, Any]) -> bool:
    seconds = sum(result["wall_time_s"] for result in found["results"])
    print(f"{found['runs']} runs, resumed {found['resumed']} times in {seconds:.0f} s; {found['differing']} differ")
    return not found["differing"]


if __name__ == "__main__":
    record.run(__doc__, measure, report, seed=SEED)
