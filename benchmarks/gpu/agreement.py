"""Whether a GPU computes what the CPU does, and sparse tensor cores what masked weights do."""

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bench import Bench, Piece, relative
from torch import Tensor, nn
from torch.nn import functional as F

import nmgraph
from nmgraph.layers.masked import masked_weights

STEPS = 5
FORCED: dict[str, dict[str, Any]] = {
    "tmask": {"interval": 2},
    "bimask": {"interval": 2},
    "srste": {},
    "asp": {},
    "lbc": {"t_i": 0.0, "t_f": 0.0},  # it concludes in the first step
}


def pieces(bench: Bench) -> Iterator[Piece]:
    torch.backends.cudnn.allow_tf32 = False
    for name in ("tmask", "bimask", "lbc") if bench.quick else nmgraph.METHODS:
        yield f"cpu, {name}", partial(against_cpu, bench, name)
    for name, options in FORCED.items():
        yield f"force, {name}", partial(against_masked, bench, name, options, convolution=False)
    for name in ("tmask", "bimask"):
        yield f"force, {name}, 1x1 convolutions", partial(against_masked, bench, name, FORCED[name], convolution=True)


def against_cpu(bench: Bench, name: str) -> dict[str, Any]:
    """Train a copy on either side in float32."""
    often = {"interval": 2} if "interval" in {f.name for f in dataclasses.fields(nmgraph.METHODS[name])} else {}
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 16),
    )  # fmt: skip
    nmgraph.convert(reference, method=name, hardware="off", **often)
    model = copy.deepcopy(reference).to(bench.device)
    return compare(model, reference, (32, 16, 4, 4), torch.float32)


def against_masked(bench: Bench, name: str, options: dict[str, Any], *, convolution: bool) -> dict[str, Any]:
    """Train with ``hardware="force"`` and ``"off"`` in bfloat16."""
    width, rows = bench.pick((256, 512), (256, 512), (32, 16))
    pair = []
    for mode in ("force", "off"):
        torch.manual_seed(0)
        if convolution:
            layers = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 1))
            model = layers.to(bench.device, memory_format=torch.channels_last)
        else:
            layers = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            model = layers.to(bench.device)
        pair.append(nmgraph.convert(model, method=name, hardware=mode, **options))
    shape = (rows // 16, width, 4, 4) if convolution else (rows, width)
    found = compare(pair[0], pair[1], shape, torch.bfloat16)
    return found | {"hardware": str(nmgraph.hardware(pair[0]))}


def compare(model: nn.Module, reference: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Give the largest relative differences of a step, and of weights and masks after some more."""
    pair = (model, reference)
    optimizers = [torch.optim.SGD(m.parameters(), 0.0, momentum=0.9) for m in pair]
    for m, optimizer in zip(pair, optimizers, strict=True):
        nmgraph.attach(m, optimizer, total_steps=2 * STEPS)
    draws = torch.Generator().manual_seed(1)

    def step() -> dict[str, float]:
        x = torch.randn(shape, generator=draws)
        seen = [_step(m, o, x, dtype) for m, o in zip(pair, optimizers, strict=True)]
        return {name: relative(seen[0][name], expected) for name, expected in seen[1].items()}

    step()  # nothing moves yet, but masks are known to be N:M after it
    found: dict[str, Any] = {"differences": step(), "masks_differ": _masks_differ(pair)}
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.05
    for _ in range(STEPS):
        found["differences after steps"] = step()
    weights = [{n: p.detach() for n, p in m.named_parameters()} for m in pair]
    found["weights differ after steps"] = max(relative(p, weights[1][n]) for n, p in weights[0].items())
    found["masks_differ after steps"] = _masks_differ(pair)
    return found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    x = x.to(device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    optimizer.zero_grad()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = model(x)
    F.mse_loss(y.float(), torch.ones_like(y, dtype=torch.float32)).backward()
    assert x.grad is not None
    seen = {"forward": y.detach(), "input gradient": x.grad}
    seen |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return seen


def _masks_differ(pair: tuple[nn.Module, ...]) -> float:
    """Give the share of the masks' places that are not alike."""
    masks = [torch.cat([w.mask().flatten().cpu() for w in masked_weights(m).values()]) for m in pair]
    return float((masks[0] != masks[1]).double().mean())
