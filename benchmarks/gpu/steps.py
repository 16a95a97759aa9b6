"""Whole training steps: forward, backward and AdamW, in bfloat16 autocast; dense and sparse in turns."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import models
import torch
from bench import Bench, Piece, say
from torch import nn
from torch._dynamo.utils import counters

import nmgraph
from nmgraph.compilation import SWITCH

# A method with the mode of its hardware; None is the mode that is to be measured.
VARIANTS: dict[str, tuple[str, str | None] | None] = {
    "dense": None,
    "t-mask": ("tmask", None),
    "bi-mask": ("bimask", None),
    "sr-ste, masked": ("srste", "off"),
}
SPARSE = ("t-mask", "bi-mask")
LEAST, MOST = 10, 30  # rounds
WARM_UP = 3


def pieces(bench: Bench) -> Iterator[Piece]:
    compile_masks(bench)
    few = bench.pick(2, 2, 1)  # compiling takes its time for each block
    order = [
        ("vit_l_mlp", bench.pick(12, 6, 1), False),
        ("llama", bench.pick(4, 2, 1), False),
        ("vit_l_mlp", few, True),
        ("vit_l", bench.pick(24, 6, 1), False),
        ("llama", 1, True),
        ("vit_l", few, True),
    ][: 3 if bench.quick else None]
    for place, (name, blocks, compiles) in enumerate(order):
        kind = "compiled" if compiles else "eager"
        yield f"{name} {kind}", partial(_piece, bench, name, blocks, compiles, len(order) - place)


def compile_masks(bench: Bench) -> None:
    """Compile functions of masks from the first step on, which a longer run does by itself."""
    os.environ[SWITCH] = bench.pick("always", "always", "auto")


def _piece(bench: Bench, name: str, blocks: int, compiles: bool, pieces_left: int) -> dict[str, Any]:
    until = time.monotonic() + max(0.0, bench.left) / pieces_left
    while True:
        try:
            return compare(bench, name, blocks, compiles, until)
        except torch.OutOfMemoryError:
            if blocks == 1:
                raise
        blocks //= 2
        say(f"    too little memory: {blocks} blocks")
        gc.collect()
        torch.cuda.empty_cache()


class Run:
    """A model in training."""

    def __init__(self, bench: Bench, name: str, blocks: int, variant: tuple[str, str | None] | None) -> None:
        self.bench = bench
        self.model = models.made(name, blocks, bench.device, bench.dry)
        if variant is not None:
            nmgraph.convert(self.model, method=variant[0], hardware=variant[1] or bench.mode)
        self.call: Callable[..., Any] = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        if variant is not None:
            nmgraph.attach(self.model, self.optimizer, total_steps=1_000_000)
        self.x = bench.draw(*models.batch(name, bench.dry)).requires_grad_()

    def step(self) -> tuple[float, float]:
        """Take one; give the milliseconds of forward and backward, and of all of it."""
        began = self.bench.mark()
        with torch.autocast(self.bench.device.type, dtype=torch.bfloat16):
            loss = self.call(self.x).float().square().mean()
        loss.backward()
        back = self.bench.mark()
        self.optimizer.step()
        ended = self.bench.mark()
        self.optimizer.zero_grad()  # gradients of all variants at once would be too much
        self.x.grad = None
        return self.bench.between(began, back), self.bench.between(began, ended)


def compare(bench: Bench, name: str, blocks: int, compiles: bool, until: float) -> dict[str, Any]:
    """Let all variants take a step in turns, until the time is over; give medians, and ratios to the dense step."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # all variants share the code of a forward
    runs = {variant: Run(bench, name, blocks, how) for variant, how in VARIANTS.items()}
    started = {}
    for variant, run in list(runs.items()):
        if bench.left < 0 and started:
            del runs[variant]
            continue
        began = time.monotonic()
        for _ in range(bench.pick(WARM_UP, WARM_UP, 1)):  # from the first optimizer step on products may be sparse
            run.step()
        if compiles:
            counters.clear()
            run.call = bench.compiled(run.model)
            for _ in range(bench.pick(WARM_UP, WARM_UP, 1)):
                run.step()
        started[variant] = {"warm_up_s": time.monotonic() - began}
        if compiles:
            breaks = {str(why)[:300]: count for why, count in counters["graph_break"].items()}
            started[variant] |= {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}
    counters.clear()
    taken: dict[str, list[tuple[float, float]]] = {variant: [] for variant in runs}
    rounds = 0
    while rounds < bench.pick(LEAST, LEAST, 2) or (rounds < bench.pick(MOST, LEAST, 2) and time.monotonic() < until):
        for variant, run in runs.items():
            taken[variant].append(run.step())
        rounds += 1
        if bench.left < 0 and rounds >= 3:
            break
    found: dict[str, Any] = {"blocks": blocks, "compiled": compiles, "rounds": rounds}
    found |= {"batch": list(models.batch(name, bench.dry)), "mode": bench.mode}
    for variant, run in runs.items():
        found[variant] = started[variant] | _medians(taken[variant], taken["dense"]) | _hardware(run.model, variant)
    if compiles:
        found["graphs_made_while_timed"] = counters["stats"]["unique_graphs"]
    if bench.device.type == "cuda":
        found["memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _medians(own: list[tuple[float, float]], dense: list[tuple[float, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, what in enumerate(("forward_backward", "step")):
        times = [each[place] for each in own]
        found[f"{what}_ms"] = statistics.median(times)
        found[f"{what}_quartiles_ms"] = [q for i, q in enumerate(statistics.quantiles(times, n=4)) if i != 1]
        found[f"{what}_speedup"] = statistics.median(d[place] for d in dense) / found[f"{what}_ms"]
    return found


def _hardware(model: nn.Module, variant: str) -> dict[str, Any]:
    if variant not in SPARSE:
        return {}
    report = nmgraph.hardware(model)
    first = [each for each in report.to_dict()["layers"] if each["name"].startswith("0.")]  # all blocks are alike
    return {"hardware": str(report), "layers_of_the_first_block": first}
