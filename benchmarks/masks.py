"""How fast masks are made and weights of a training step computed, beside the published formulations.

    python benchmarks/masks.py --json benchmarks/results/masks.json --plot docs/images/masks.png

All layers are ResNet-50's convolutions but the first, 23.4 million weights, one after the other. The baselines are in
`baselines.py`; baseline and own go through all layers in turns, so that noise meets both alike. Seconds are
sums over the layers, medians of the rounds, wall-clock and of the processor. Ratio = baseline's time / own time.

Own is measured twice: compiled, and not compiled, which is what happens where there is no compiler and until compiling
pays. What compiling took is reported, too. The plot has the time for one weight of growing size, for both ways and for a
single pass of `torch.abs`.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baselines
import record
import shapes
import torch
from timing import timed
from torch import Tensor, nn

import nmgraph
from nmgraph.compilation import SWITCH
from nmgraph.methods.lbc import LBC
from nmgraph.methods.srste import refined_by_magnitude
from nmgraph.nm.grouping import canonical, restore
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import largest_straight_through

SEED = 0
DECAY = 2e-4
PATTERNS = ("2:4", "1:4", "4:8", "1:16")
SIZES = (10**5, 10**6, 10**7, 10**8)

Work = dict[str, Callable[[], Any]]


def own_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    return restore(magnitude_mask(canonical(weight), pattern), tuple(weight.shape))


def mask_work(weight: Tensor, pattern: Pattern) -> Work:
    buffer = torch.empty_like(weight)
    # Of equals they may keep different ones, but as much in all.
    kept = [
        (weight * mask).abs().sum(dtype=torch.float64)
        for mask in (own_mask(weight, pattern), baselines.magnitude_mask(weight, pattern))
    ]
    assert torch.allclose(*kept, rtol=1e-12)
    return {
        "baseline": lambda: baselines.magnitude_mask(weight, pattern),
        "own": lambda: own_mask(weight, pattern),
        "abs": lambda: torch.abs(weight, out=buffer),
    }


def srste_work(weight: Tensor, pattern: Pattern) -> Work:
    """Forward and backward of the weight alone: what a step adds to that of the dense layer."""
    weight.requires_grad_()
    upstream = torch.randn_like(weight)

    def published() -> None:
        weight.grad = None
        baselines.SparseWeight.apply(weight, pattern, DECAY).backward(upstream)

    def own() -> None:
        weight.grad = None
        restore(largest_straight_through(canonical(weight), pattern), tuple(weight.shape)).backward(upstream)
        with torch.no_grad():
            refined = refined_by_magnitude(canonical(weight.grad), canonical(weight), pattern, DECAY)
            weight.grad.copy_(restore(refined, tuple(weight.shape)))

    grads = []
    for step in (published, own):
        step()
        grads.append(weight.grad.clone())
    # Of equals they may keep different ones.
    assert torch.isclose(*grads, rtol=1e-5, atol=1e-7).float().mean() > 0.9999
    return {"baseline": published, "own": own}


def removal_work(weight: Tensor, pattern: Pattern) -> Work:
    """Remove one more combination of every block, when half of them are gone."""
    method, w_OSC = LBC(criterion="score"), canonical(weight)
    state = method.init(w_OSC, pattern)._replace(accumulator=torch.randn(w_OSC.shape))
    half = pattern.combinations // 2
    state = method._remove(w_OSC, state, half, pattern)
    scores = torch.randn(weight.numel() // pattern.m, pattern.combinations)
    members = torch.randint(2, (pattern.combinations, pattern.m)).float()
    return {
        "baseline": lambda: baselines.lbc_removal(scores, members, pattern.combinations - half + 1),
        "own": lambda: method._remove(w_OSC, state, half - 1, pattern),
    }


def bimask_work(batch: int = 32, width: int = 256, side: int = 14) -> Work:
    """One step of a 3 x 3 convolution: forward, backward, and the method's update."""
    pattern = Pattern(2, 4)
    layer = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False))
    weight = nn.Parameter(layer[0].weight.detach().clone())
    x, upstream = torch.randn(batch, width, side, side, requires_grad=True), torch.randn(batch, width, side, side)
    order = torch.arange(width)
    nmgraph.convert(layer, method="bimask", decay=DECAY)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    nmgraph.attach(layer, optimizer, total_steps=10**6)

    def published() -> None:
        weight.grad = x.grad = None
        baselines.UnfoldedConvolution.apply(x, weight, pattern, order, DECAY, 1).backward(upstream)
        with torch.no_grad():
            weight.sub_(weight.grad, alpha=0.0)

    def own() -> None:
        optimizer.zero_grad()
        x.grad = None
        layer(x).backward(upstream)
        optimizer.step()

    dense = nn.Conv2d(width, width, 3, padding=1, bias=False)
    plain = torch.optim.SGD(dense.parameters(), 0.0)

    def without() -> None:
        plain.zero_grad()
        x.grad = None
        dense(x).backward(upstream)
        plain.step()

    return {"baseline": published, "own": own, "dense": without}


def compare(works: list[Work], rounds: int) -> dict[str, Any]:
    """Time all work of all layers in turns; own work compiled and not compiled."""

    def all_of(name: str) -> tuple[float, float]:
        def work() -> None:
            for layer in works:
                layer[name]()

        return timed(work)[1]

    os.environ[SWITCH] = "always"
    compiling, _ = all_of("own")
    runs: list[dict[str, tuple[float, float]]] = []
    for _ in range(rounds + 1):
        taken = {name: all_of(name) for name in works[0]}
        os.environ[SWITCH] = "never"
        taken["own_eager"] = all_of("own")
        os.environ[SWITCH] = "always"
        runs.append(taken)
    runs = runs[1:]  # the first warms up

    def ratio(of: str, to: str, clock: int) -> float:
        return statistics.median(run[of][clock] / run[to][clock] for run in runs)

    return {
        "rounds": rounds,
        "compiling_s": compiling - statistics.median(run["own"][0] for run in runs),
        **{f"{name}_s": statistics.median(run[name][0] for run in runs) for name in runs[0]},
        **{f"{name}_processor_s": statistics.median(run[name][1] for run in runs) for name in runs[0]},
        "ratio": ratio("baseline", "own", 0),
        "ratio_processor": ratio("baseline", "own", 1),
        "ratio_eager": ratio("baseline", "own_eager", 0),
        **({"own_over_abs": ratio("own", "abs", 0)} if "abs" in runs[0] else {}),
        "all_wall_and_processor_s": runs,
    }


def table(rounds: int, quick: bool) -> list[dict[str, Any]]:
    def layers() -> list[Tensor]:
        torch.manual_seed(SEED)
        return shapes.resnet50()[:: 8 if quick else 1]

    tasks: dict[tuple[str, str], Callable[[], list[Work]]] = {}
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        tasks["mask", text] = lambda pattern=pattern: [mask_work(w, pattern) for w in layers()]
        tasks["SR-STE weight, forward and backward", text] = lambda pattern=pattern: [
            srste_work(w, pattern) for w in layers()
        ]
    tasks["Bi-Mask step, 256x256x3x3 at 14x14, batch 32", "2:4"] = lambda: [bimask_work()]
    results = []
    for (what, text), make in tasks.items():
        results.append({"what": what, "pattern": text, **compare(make(), rounds)})
        show(results[-1])
    # One layer after the other: the published scores of all layers at once take 820 MB.
    removals = [compare([removal_work(w, Pattern(4, 8))], max(1, rounds // 3)) for w in layers()]
    names = [name for name in removals[0] if name.endswith("_s") and not name.startswith("all")]
    total = {name: sum(each[name] for each in removals) for name in names}
    ratios = {
        "ratio": total["baseline_s"] / total["own_s"],
        "ratio_processor": total["baseline_processor_s"] / total["own_processor_s"],
        "ratio_eager": total["baseline_s"] / total["own_eager_s"],
    }
    results.append({"what": "LBC removal", "pattern": "4:8", **total, "compiling_s": 0.0, **ratios})
    show(results[-1])
    return results


def show(found: dict[str, Any]) -> None:
    extra = f"  {found['own_over_abs']:.1f} passes of torch.abs" if "own_over_abs" in found else ""
    extra += f"  dense: {found['dense_s'] * 1e3:.1f} ms" if "dense_s" in found else ""
    print(
        f"{found['what']:<45} {found['pattern']:<5} {found['baseline_s'] * 1e3:>9.1f} ms {found['own_s'] * 1e3:>8.1f} ms "
        f"{found['ratio']:>6.1f}x {found['ratio_processor']:>5.1f}x {found['own_eager_s'] * 1e3:>9.1f} ms {found['ratio_eager']:>6.1f}x "
        f"{found['compiling_s']:>7.1f} s{extra}",
        flush=True,
    )


def scaling(rounds: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Time one mask of 2:4 for growing weights."""
    found = []
    for size in sizes:
        weight = torch.randn(size // 1000, 1000)
        work = mask_work(weight[:, :, None, None], Pattern(2, 4))
        timed = compare([work], rounds)
        found.append({"weights": weight.numel(), **{k: v for k, v in timed.items() if k.endswith("_s")}})
    return found


def plot(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "baseline_s": "published: argsort, scatter",
        "own_eager_s": "ours, not compiled",
        "own_s": "ours, compiled",
        "abs_s": "one pass of torch.abs",
    }
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, label in names.items():
        axes.loglog([f["weights"] for f in found], [f[name] for f in found], marker="o", label=label)
    axes.set(xlabel="weights", ylabel="seconds", title="A 2:4 mask by magnitude")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="the figures are medians of so many")
    parser.add_argument(
        "--quick", action="store_true", help="every eighth layer, three rounds, no weight above 10 million"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw how time grows with size")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds

    print(
        f"{'':<51} {'published':>12} {'own':>11} {'ratio':>7} {'cpu':>6} {'not compiled':>12} {'ratio':>7} {'compiling':>9}"
    )
    results = table(rounds, args.quick)
    grown = scaling(rounds, SIZES[:-1] if args.quick else SIZES)
    for each in grown:
        print(
            f"{each['weights']:>11,} weights: {each['own_s'] * 1e9 / each['weights']:.2f} ns per weight, "
            f"published {each['baseline_s'] * 1e9 / each['weights']:.2f}, torch.abs {each['abs_s'] * 1e9 / each['weights']:.2f}"
        )
    if args.plot:
        plot(grown, args.plot)
    if args.json:
        about = {"baseline": "the published formulation of each, see benchmarks/baselines.py", "decay": DECAY}
        record.write(args.json, {**about, "results": results, "scaling": grown}, seed=SEED)


if __name__ == "__main__":
    main()
