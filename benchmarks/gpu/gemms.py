"""What each product of a layer takes, dense and on sparse tensor cores, at the shapes of known networks.

A layer's step is ``Y = X Wᵀ``, ``dX = dY W`` and ``dW = dYᵀ X``, of which the last is always dense. With T-Mask the first two
are sparse; Bi-Mask also puts dY into the order of the rows. What is compared is all of that, with casting the weight, and
where it is sparse transposing and compressing it, once per step; but without the masks, which `share` and `masks` time.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from bench import Bench, Piece

from nmgraph.layers.probe import Product, Timing, median_ms
from nmgraph.layers.probe import measure as measure_product
from nmgraph.nm.both_ways import both_ways, can_fuse
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import TENSOR_CORES
from nmgraph.nm.straight_through import largest_straight_through, straight_through

VIT_L = {"vit_l fc1": (4096, 1024), "vit_l fc2": (1024, 4096)}
VIT_L_ROWS = 64 * 197
LLAMA_7B = {"llama_7b up": (11008, 4096), "llama_7b down": (4096, 11008), "llama_7b q": (4096, 4096)}
OTHERS = {
    "vit_l qkv": (3072, 1024), "vit_l proj": (1024, 1024),
    "vit_h qkv": (3840, 1280), "vit_h proj": (1280, 1280), "vit_h fc1": (5120, 1280), "vit_h fc2": (1280, 5120),
    "deit_b qkv": (2304, 768), "deit_b proj": (768, 768), "deit_b fc1": (3072, 768), "deit_b fc2": (768, 3072),
    "deit_s qkv": (1152, 384), "deit_s proj": (384, 384), "deit_s fc1": (1536, 384), "deit_s fc2": (384, 1536),
    "llama_70b q": (8192, 8192), "llama_70b k": (1024, 8192), "llama_70b up": (28672, 8192), "llama_70b down": (8192, 28672),
    "resnet50 1.1": (64, 256), "resnet50 1.3": (256, 64), "resnet50 2.1": (128, 512), "resnet50 2.3": (512, 128),
    "resnet50 3.1": (256, 1024), "resnet50 3.3": (1024, 256), "resnet50 4.1": (512, 2048), "resnet50 4.3": (2048, 512),
}  # fmt: skip
MOST_FLOPS = 2e13  # of one product: a share of a second for the twenty that are timed


def pieces(bench: Bench) -> Iterator[Piece]:
    if bench.dry:
        sizes = [("vit_l fc1", 64, 32, 16), ("vit_l fc2", 32, 64, 16)]
    else:
        first = [(name, *shape, VIT_L_ROWS) for name, shape in VIT_L.items()]
        rest = VIT_L | LLAMA_7B | ({} if bench.quick else OTHERS)
        rows = (16384, 4096, 65536) if bench.quick else (16384, 4096, 65536, 8192, 32768)
        sizes = first + [(name, *shape, r) for r in rows for name, shape in rest.items()]
    for name, outputs, inputs, r in sizes:
        if 2.0 * outputs * inputs * r <= MOST_FLOPS:
            yield f"{name} {outputs}x{inputs}x{r}", partial(layer, bench, outputs, inputs, r)


def layer(bench: Bench, outputs: int, inputs: int, rows: int) -> dict[str, Any]:
    forward = measure_product(Product(outputs, inputs, rows, "bfloat16"), bench.device)
    back, gathered = (
        measure_product(Product(inputs, outputs, rows, "bfloat16", input_gradient=True, gathers=g), bench.device)
        for g in (False, True)
    )
    x_RC, dy_RO = bench.draw(rows, inputs), bench.draw(rows, outputs)
    w_OC = bench.draw(outputs, inputs, dtype=torch.float32)
    w_OSC = w_OC.unsqueeze(1)
    mask_OC = magnitude_mask(w_OSC, TENSOR_CORES).squeeze(1)
    order_O = torch.randperm(outputs, device=bench.device)
    masked_OC = w_OC * mask_OC
    works = {
        "weight_gradient": lambda: dy_RO.t() @ x_RC,
        "cast": w_OC.bfloat16,
        "mask_and_cast": lambda: straight_through(w_OC, mask_OC).bfloat16(),  # as T-Mask does
        "find_mask_and_cast": lambda: largest_straight_through(w_OSC, TENSOR_CORES).bfloat16(),  # as SR-STE does
        "both_operands": partial(both_ways, masked_OC, torch.bfloat16, None, None, fused=False),
        "both_operands_bi_mask": partial(both_ways, masked_OC, torch.bfloat16, order_O, TENSOR_CORES, fused=False),
    }
    if can_fuse(masked_OC, TENSOR_CORES):
        works["both_operands_fused"] = partial(both_ways, masked_OC, torch.bfloat16, None, None, fused=True)
        works["both_operands_bi_mask_fused"] = partial(
            both_ways, masked_OC, torch.bfloat16, order_O, TENSOR_CORES, fused=True
        )
    ms = {name: median_ms(work, bench.device) for name, work in works.items()}
    found: dict[str, Any] = {"forward": asdict(forward), "input_gradient": asdict(back)}
    found |= {"input_gradient_gathered": asdict(gathered), "ms": ms}
    dense = forward.dense + back.dense + ms["weight_gradient"] + ms["cast"]
    masked = dense + ms["find_mask_and_cast"] - ms["cast"]
    found |= {"dense_ms": dense, "masked_ms": masked, "masked_speedup": dense / masked}
    found["t_mask"] = _step(dense, forward, back, ms)
    found["bi_mask"] = _step(dense, forward, gathered, ms)
    return found


def _step(dense: float, forward: Timing, back: Timing, ms: dict[str, float]) -> dict[str, Any]:
    """Give what a layer's step takes with both products sparse, and with each where it wins."""
    if forward.failure or back.failure:
        return {"failure": forward.failure or back.failure}
    step = forward.whole + back.whole + ms["weight_gradient"]
    wins = [t.wins for t in (forward, back)]
    chosen = sum(t.whole if t.wins else t.dense for t in (forward, back)) + ms["weight_gradient"]
    chosen += 0.0 if all(wins) else ms["cast"]
    return {"ms": step, "speedup": dense / step, "chosen_ms": chosen, "chosen_speedup": dense / chosen, "wins": wins}


def pair_speedup(results: dict[str, Any], method: str, which: str) -> float | None:
    """Give how many times faster the step of both of ViT-L's MLP layers is, added up from its products."""
    both = [next((r for key, r in results.items() if key.startswith(name)), None) for name in VIT_L]
    if any(r is None or "failure" in r[method] for r in both):
        return None
    return float(sum(r["dense_ms"] for r in both) / sum(r[method][which] for r in both))
