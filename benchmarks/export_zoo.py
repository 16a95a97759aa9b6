"""Export well-known architectures: parity in fp32 and fp16, the proof, Polygraphy's opinion, time and memory.

    python benchmarks/export_zoo.py --json benchmarks/results/export_zoo.json

Weights are random. Every export runs in a process of its own, so that its peak memory is its own; memory is given as
a multiple of the model's weights, above what the process held before. BERT and GPT-2 need transformers, and are left
out with the reason where it is not installed.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from conversion import import_torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nmgraph
from nmgraph.errors import NMGraphError
from nmgraph.nm.pattern import Pattern

SEED = 0
IMAGE = (1, 3, 224, 224)


class UNet(nn.Module):
    """Two scales and a skip, with transposed convolution up."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.deep = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.down(x)
        deep = self.deep(nn.functional.max_pool2d(shallow, 2))
        return self.join(torch.cat([shallow, self.up(deep)], 1))


class Logits(nn.Module):
    """A Hugging Face model that gives one tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids).logits


def vision(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (import_torchvision().models.get_model(name), torch.randn(IMAGE))


def deit() -> tuple[nn.Module, Any]:
    import_torchvision()
    import timm

    return timm.create_model("deit_small_patch16_224"), torch.randn(IMAGE)


def detection_backbone() -> tuple[nn.Module, Any]:
    models = import_torchvision().models.detection
    whole = models.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return whole.backbone, torch.randn(IMAGE)


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    return Logits(BertForSequenceClassification(BertConfig(num_hidden_layers=4))), torch.randint(100, (1, 64))


def gpt2() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(GPT2LMHeadModel(GPT2Config(n_layer=4, use_cache=False))), torch.randint(100, (1, 64))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": vision("resnet50"),
    "mobilenet_v3_large": vision("mobilenet_v3_large"),
    "convnext_tiny": vision("convnext_tiny"),
    "vit_b_16": vision("vit_b_16"),
    "deit_small": deit,
    "swin_t": vision("swin_t"),
    "bert": bert,
    "gpt2": gpt2,
    "unet": lambda: (UNet(), torch.randn(1, 3, 64, 64)),
    "fasterrcnn backbone": detection_backbone,
}


def measure(name: str, precision: str) -> dict[str, Any]:
    """Convert, export and prove one model in this process."""
    torch.manual_seed(SEED)
    model, example = MODELS[name]()
    for p in model.parameters():
        if p.dim() > 1 and not bool(p.any()):  # a head that begins at zero answers zeros, whatever comes before
            nn.init.normal_(p.data, std=0.02)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    manifest = nmgraph.manifest(nmgraph.convert(model.eval(), method="asp"))
    export_something()  # so that what is imported on the way is not counted
    before, began = peak_memory(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = nmgraph.export(model, Path(folder) / "out", example_inputs=example, precision=precision)
        took, memory = time.perf_counter() - began, peak_memory() - before
        theirs = polygraphy(Path(folder) / "out" / "model.onnx")
    assert report.onnx is not None
    assert report.parity is not None
    proved = [c for c in report.onnx.checks if c.expected and c.holds]
    return {
        "model": name,
        "precision": precision,
        "converted": len(manifest.converted),
        "of_sites": len(manifest.entries),
        "share_of_weights": manifest.coverage,
        "holds": report.holds,
        "proved_on_onnx": len(proved),
        "relative_error": report.parity.worst,
        "polygraphy_finds": theirs,
        "ready_by_our_proof": sum(not c.tensorrt for c in report.onnx.checks),
        "export_s": took,
        "memory_over_weights": memory / weights,
    }


def export_something() -> None:
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 16)), method="static")
    with tempfile.TemporaryDirectory() as folder:
        nmgraph.export(model, Path(folder) / "out", example_inputs=torch.randn(1, 16))


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def polygraphy(path: Path) -> int | None:
    """Count the weights that NVIDIA's own checker calls 2:4; None if it could not be run."""
    asked = [str(Path(sys.executable).with_name("polygraphy")), "inspect", "sparsity", str(path)]
    answer = subprocess.run(asked, capture_output=True, text=True)
    return answer.stdout.count("Found sparse tensor") if answer.returncode == 0 else None


def in_its_own_process(name: str, precision: str) -> dict[str, Any]:
    needs = "transformers" if name in ("bert", "gpt2") else None
    if needs and importlib.util.find_spec(needs) is None:
        return {"model": name, "precision": precision, "left_out": f"{needs} is not installed"}
    asked = [sys.executable, __file__, "--one", name, precision]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode:
        return {"model": name, "precision": precision, "error": answer.stderr.strip().splitlines()[-1]}
    return json.loads(answer.stdout.splitlines()[-1])


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="Export")
    for heading in ("model", "precision", "sites", "of weights", "proved", "error", "time", "memory / weights"):
        shown.add_column(heading)
    for r in results:
        if "holds" not in r:
            shown.add_row(r["model"], r["precision"], r.get("left_out") or r["error"])
            continue
        verdict = f"{'[green]' if r['holds'] else '[red]'}{r['proved_on_onnx']}"
        sites, share = f"{r['converted']} of {r['of_sites']}", f"{r['share_of_weights']:.1%}"
        memory = f"{r['memory_over_weights']:.1f}"
        shown.add_row(
            r["model"], r["precision"], sites, share, verdict, f"{r['relative_error']:.0e}", f"{r['export_s']:.1f} s", memory
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()
    if args.one:
        try:
            print(json.dumps(measure(*args.one)))
        except NMGraphError as error:
            sys.exit(str(error).replace("\n", " "))
        return
    results = [in_its_own_process(name, precision) for name in args.models for precision in ("fp32", "fp16")]
    Console().print(table(results))
    if args.json:
        record.write(args.json, {"pattern": str(Pattern(2, 4)), "results": results}, seed=SEED)


if __name__ == "__main__":
    main()
