"""What masks, operands, compression and searches take of a training step, piece by piece."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import steps
import torch
from bench import Bench, Piece

from nmgraph.layers.hardware import Route, _make, _matrix
from nmgraph.layers.masked import MaskedWeight, masked_weights
from nmgraph.layers.sparse_product import compress
from nmgraph.methods.contract import Clock

TOTAL = 1_000_000
METHODS = {"t-mask": "tmask", "bi-mask": "bimask"}


def pieces(bench: Bench) -> Iterator[Piece]:
    steps.compile_masks(bench)
    for model, blocks in (("vit_l", bench.pick(4, 2, 1)), ("llama", 1))[: 1 if bench.quick else None]:
        for variant in METHODS:
            yield f"{model}, {variant}", partial(shares, bench, model, blocks, variant)


def shares(bench: Bench, name: str, blocks: int, variant: str) -> dict[str, Any]:
    """Time each piece for all layers of a few blocks, one after the other as in a step, and their whole step.

    What is shared between steps, a search, is charged to each with its part.
    """
    run = steps.Run(bench, name, blocks, (METHODS[variant], "force"))
    for _ in range(bench.pick(3, 3, 1)):
        run.step()
    step_ms = sorted(run.step()[1] for _ in range(bench.pick(10, 10, 3)))[bench.pick(5, 5, 1)]
    weights = list(masked_weights(run.model).values())
    method: Any = weights[0].told.method
    kept = [w.state for w in weights]
    grads = [w.raw_OSC.detach().clone() for w in weights]

    def each(work: Callable[[MaskedWeight, int], object]) -> float:
        with torch.no_grad():
            return bench.milliseconds(lambda: [work(w, i) for i, w in enumerate(weights)])

    def update(step: int) -> Callable[[MaskedWeight, int], object]:
        clock = Clock(step, TOTAL, 1e-4)
        return lambda w, i: method.update(w.raw_OSC.detach(), grads[i], kept[i], w.told.pattern, clock)

    decided = [w.hardware.latest.route for w in weights]
    # Both products are sparse here, whatever was decided; the way of making their operands is the decided one.
    routes = [Route(torch.bfloat16, max(r.forward, 0), max(r.input_gradient, 0), r.fused) for r in decided]
    forwards = [_matrix(w, w.forward_weight()).detach() for w in weights]
    with torch.no_grad():
        each_made = (_make(w, f, r, True, packed=False) for w, f, r in zip(weights, forwards, routes, strict=True))
        made = [(m.forward, m.backward) for m in each_made]
    ms = {
        "forward_mask": each(lambda w, i: w.forward_weight()),
        "compression": each(lambda w, i: [compress(t) for t in made[i]]),
        "operands_and_compression": each(lambda w, i: _make(w, forwards[i], routes[i], True, packed=True)),
        "update": each(update(method.interval + 1)),
        "update_with_search": each(update(method.interval)),
    }
    search = max(0.0, ms["update_with_search"] - ms["update"])
    overhead = ms["forward_mask"] + ms["operands_and_compression"] + ms["update"] + search / method.interval
    return {
        "blocks": blocks, "layers": len(weights), "interval": method.interval, "ms": ms,
        "fused": [r.fused for r in routes], "search_ms": search, "overhead_ms": overhead, "step_ms": step_ms, "share": overhead / step_ms,
        "share_without_update": (ms["forward_mask"] + ms["operands_and_compression"]) / step_ms,
    }  # fmt: skip
