"""How accurate ResNet-20 gets on CIFAR-10 in the time that is left, dense and under each method, the data on the GPU.

JPEG loses a little of CIFAR-10, and one seed of a short training is no ranking: it is to see that all of them learn.
"""

import math
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import record
import torch
from bench import Bench, Piece
from steps import compile_masks
from torch import Tensor, nn
from torch.nn import functional as F

import nmgraph

sys.path.insert(0, str(record.ROOT / "examples"))
METHODS = (None, "srste", "lbc", "bimask", "bame", "tmask")
KEPT_DENSE = ("stem", "classifier")
JPEG = "CIFAR-10 as JPEG, which loses a little: accuracies differ slightly from those of the original images"
LONGEST = 100  # epochs
TIMED = 20  # steps, from which the number of epochs follows


def pieces(bench: Bench) -> Iterator[Piece]:
    if bench.cifar is None and not bench.dry:
        yield "skipped", lambda: "no --cifar was given"
        return
    compile_masks(bench)
    data = cache(partial(images, bench))
    plan = cache(lambda: epochs_that_fit(bench, data()))
    yield "data", lambda: "random" if bench.cifar is None else JPEG if bench.cifar.suffix == ".npz" else "CIFAR-10"
    yield "epochs", plan
    for name in methods(bench):
        yield name or "dense", lambda name=name: train(bench, data(), name, epochs=plan())


def methods(bench: Bench) -> tuple[str | None, ...]:
    return (None, "tmask") if bench.quick else METHODS


def images(bench: Bench) -> dict[str, tuple[Tensor, Tensor]]:
    if bench.cifar is None:
        both = ((torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (n,))) for n in (64, 32))
        return dict(zip(("train", "test"), both, strict=True))
    from cifar10 import load  # needs Pillow

    limit = bench.pick(None, 5000, 64)
    loaded = {split: load(bench.cifar, split, limit) for split in ("train", "test")}
    return {split: (x.to(bench.device), y.to(bench.device)) for split, (x, y) in loaded.items()}


def epochs_that_fit(bench: Bench, data: dict[str, tuple[Tensor, Tensor]]) -> int:
    """Give the epochs for which the time suffices for all methods alike."""
    seconds = 0.0
    for name in methods(bench):
        train(bench, data, name, steps=bench.pick(3, 3, 1))
        timed = train(bench, data, name, steps=bench.pick(TIMED, TIMED, 2))
        seconds += timed["train_s"] / timed["steps"]
    per_epoch = seconds * math.ceil(len(data["train"][0]) / _batch(bench))
    return max(1, min(bench.pick(LONGEST, LONGEST, 1), int(0.8 * bench.left / per_epoch)))


def train(
    bench: Bench, data: dict[str, tuple[Tensor, Tensor]], name: str | None, *, epochs: int = 1, steps: int | None = None
) -> dict[str, Any]:
    """Train for some epochs, or so many steps, and give the accuracy on the test images."""
    from cifar10 import augment, normalize
    from networks import ResNet
    from train_cifar10 import warm_up_then_cosine

    pixels, labels = data["train"]
    steps = steps or epochs * math.ceil(len(pixels) / _batch(bench))
    torch.manual_seed(0)
    model: nn.Module = ResNet(20).to(bench.device, memory_format=torch.channels_last)
    if name is not None:
        nmgraph.convert(model, method=name, pattern="2:4", skip=KEPT_DENSE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_up_then_cosine, total_steps=steps))
    if name is not None:
        nmgraph.attach(model, optimizer, total_steps=steps)
    draws = torch.Generator(bench.device).manual_seed(0)  # all see the same images
    began = time.monotonic()
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (_batch(bench),), generator=draws, device=bench.device)
        shifts = torch.randint(9, (len(chosen), 2), generator=draws, device=bench.device)
        flips = torch.rand(len(chosen), generator=draws, device=bench.device) < 0.5
        x = normalize(augment(pixels[chosen], shifts, flips)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found: dict[str, Any] = {"steps": steps, "loss": float(loss.detach()), "train_s": time.monotonic() - began}
    if name is not None:
        model = nmgraph.finalize(model, force=True)  # a few steps, for timing, may be too few to finish in
        found["holds"] = nmgraph.verify(model).holds
    return found | {"accuracy": _accuracy(model.eval(), normalize, *data["test"])}


@torch.no_grad()
def _accuracy(model: nn.Module, normalize: Any, pixels: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([model(normalize(part)).argmax(1) for part in pixels.split(1000)])
    return float((predicted == labels).double().mean())


def _batch(bench: Bench) -> int:
    return bench.pick(256, 256, 16)
