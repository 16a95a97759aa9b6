"""What `benchmarks/masks.py` measures on the CPU, on the GPU: nmgraph's functions of masks beside published formulations.

Compiled and not compiled; all layers of a network one after the other. Ratio = baseline's time / own time.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import baselines
import masks
import shapes
import torch
from bench import Bench, Piece, void
from torch import Tensor

from nmgraph.compilation import SWITCH
from nmgraph.nm.grouping import canonical
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import best_permutation, swap_rows
from nmgraph.nm.transposable import transposable_mask

Works = list[masks.Work]


def pieces(bench: Bench) -> Iterator[Piece]:
    for network in ("vit_l", "resnet50"):
        for text in bench.pick(("2:4", "1:4", "1:16"), ("2:4",), ("2:4",)):
            for kind, make in {"mask": masks.mask_work, "SR-STE weight": masks.srste_work}.items():
                yield f"{kind}, {text}, {network}", partial(compare, bench, network, make, Pattern.parse(text))
        for kind, make in {"transposable mask": transposable_work, "permutation": permutation_work}.items():
            yield f"{kind}, 2:4, {network}", partial(compare, bench, network, make, Pattern(2, 4))
        yield f"LBC removal, 4:8, {network}", partial(compare, bench, network, masks.removal_work, Pattern(4, 8))


def layers(bench: Bench, network: str) -> list[Tensor]:
    with torch.device(bench.device):
        if bench.dry:
            return [torch.randn(64, 32, 1, 1), torch.randn(32, 64, 3, 3)]
        if network == "resnet50":
            return shapes.resnet50()[:: bench.pick(1, 8, 8)]
        one = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]
        return [torch.randn(*shape, 1, 1) for shape in one * bench.pick(4, 1, 1)]


def transposable_work(weight: Tensor, pattern: Pattern) -> masks.Work:
    """Search; the published ones run on the CPU, for minutes (`benchmarks/transposable.py`)."""
    return {"own": lambda: transposable_mask(canonical(weight), pattern)}


def permutation_work(weight: Tensor, pattern: Pattern) -> masks.Work:
    """Choose the best of 10 random orders of the rows as published, and by our own two searches."""
    mask = masks.magnitude_mask(canonical(weight), pattern)
    masked_OK, identity = (canonical(weight) * mask).flatten(1), torch.arange(mask.shape[0], device=weight.device)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def published() -> None:
        with torch.device("cpu"):  # where its generator is
            void(baselines.best_permutation(masked_OK, pattern, 10, "kept", draws()))

    return {
        "baseline": published,
        "own": lambda: best_permutation(mask, pattern, 10, "kept", draws()),
        "swap": lambda: swap_rows(mask, identity, pattern, 100, "kept", draws()),
    }


def compare(bench: Bench, network: str, make: Callable[[Tensor, Pattern], masks.Work], pattern: Pattern) -> Any:
    os.environ[SWITCH] = "never"
    with torch.device(bench.device):  # what the work draws for itself
        works = [make(weight, pattern) for weight in layers(bench, network)]
    found: dict[str, Any] = {"weights": sum(w.numel() for w in layers(bench, network))}
    for name in works[0]:
        found[f"{name}_ms"] = _all(bench, works, name)
    os.environ[SWITCH] = bench.pick("always", "always", "auto")
    began = time.monotonic()
    _once(works, "own")
    bench.synchronize()
    found["compiling_s"] = time.monotonic() - began
    found["own_compiled_ms"] = _all(bench, works, "own")
    os.environ[SWITCH] = "auto"
    if "baseline_ms" in found:
        found |= {
            "ratio": found["baseline_ms"] / found["own_ms"],
            "ratio_compiled": found["baseline_ms"] / found["own_compiled_ms"],
        }
    return found


def _once(works: Works, name: str) -> None:
    for work in works:
        work[name]()


def _all(bench: Bench, works: Works, name: str) -> float:
    return bench.milliseconds(partial(_once, works, name))
