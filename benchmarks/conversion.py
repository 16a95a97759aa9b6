"""How long `nmgraph.convert` takes, beside a deep copy of the same model.

    python benchmarks/conversion.py --json benchmarks/results/conversion.json

The baseline is `copy.deepcopy(model)`: about the least that handles every module and every weight once. Each round
copies the dense model and converts the copy, so that noise meets both alike; the figures are medians of the
processor's time on one thread, which other programs hardly change. Ratio = conversion / copy.

Beside that, the first conversion of a fresh process, where memory has to be got from the system: its time, and by how
much the process grew at its peak, against the model and the state that the method keeps. One model of 1.1 billion
parameters is on the meta device, where nothing is to be allocated at all.
"""

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch

import nmgraph

SEED = 0
MODELS = ("resnet50", "vit_b_16", "vit_l_16")
FRESH = [(name, method) for name in ("resnet50", "vit_l_16", "llama_1b") for method in ("srste", "lbc")]


def import_torchvision() -> Any:
    """Import torchvision also beside a CPU build of torch, where its compiled operators do not load.

    It gives two of them fake kernels, and fails where they do not exist; then they are declared first.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch._nmgraph_benchmark_library = library  # a library that is collected takes its operators with it
        import torchvision
    return torchvision


def measure(name: str, method: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = import_torchvision().models.get_model(name)
    copied, copies, conversions = None, [], []
    for _ in range(rounds + 1):
        del copied  # every round finds the memory of the one before it free
        gc.collect()
        began = time.process_time()
        copied = copy.deepcopy(model)
        between = time.process_time()
        nmgraph.convert(copied, method=method)
        copies.append(between - began)
        conversions.append(time.process_time() - between)
    manifest = nmgraph.manifest(copied)
    # The first round only warms up.
    baseline, own = statistics.median(copies[1:]), statistics.median(conversions[1:])
    return {
        "model": name,
        "method": method,
        "sites_converted": len(manifest.converted),
        "weights_converted": sum(entry.parameters for entry in manifest.converted),
        "rounds": rounds,
        "deepcopy_s": baseline,
        "convert_s": own,
        "ratio": own / baseline,
        "deepcopy_all_s": copies[1:],
        "convert_all_s": conversions[1:],
    }


def make_model(name: str) -> torch.nn.Module:
    if name != "llama_1b":
        return import_torchvision().models.get_model(name)
    import_torchvision()  # transformers imports it
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4)
        )


def measure_fresh(name: str, method: str) -> dict[str, Any]:
    """Convert once, in this process, which has to be a new one."""
    model = make_model(name)
    parameters = list(model.parameters())
    before, began = _peak_bytes(), time.perf_counter()
    nmgraph.convert(model, method=method)
    seconds, grown = time.perf_counter() - began, _peak_bytes() - before
    state = [b for n, b in model.named_buffers() if n.rpartition(".")[2].startswith("nm_") and not b.is_meta]
    return {
        "model": name,
        "method": method,
        "parameters": sum(p.numel() for p in parameters),
        "convert_s": seconds,
        "model_bytes": sum(p.nbytes for p in parameters if not p.is_meta),
        "state_bytes": sum(b.nbytes for b in state),
        "peak_growth_bytes": grown,
    }


def _peak_bytes() -> int:
    # Not getrusage: its peak is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def run_fresh(name: str, method: str) -> dict[str, Any]:
    call = [sys.executable, __file__, "--fresh", name, method]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=nmgraph.METHODS, default="lbc")
    parser.add_argument("--rounds", type=int, default=7, help="the figures are medians of so many")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--fresh", nargs=2, metavar=("MODEL", "METHOD"), help="convert one model once, and print JSON")
    args = parser.parse_args()
    if args.fresh:
        print(json.dumps(measure_fresh(*args.fresh)))
        return

    print(f"{'model':<10} {'sites':>6} {'weights':>12}   {'baseline: deepcopy':>18} {'convert':>10} {'ratio':>7}")
    torch.set_num_threads(1)
    results = []
    for name in MODELS:
        found = measure(name, args.method, args.rounds)
        results.append(found)
        print(
            f"{name:<10} {found['sites_converted']:>6} {found['weights_converted']:>12,}   "
            f"{found['deepcopy_s'] * 1e3:>15.0f} ms {found['convert_s'] * 1e3:>7.0f} ms {found['ratio']:>7.2f}"
        )
    print(
        f"\n{'first conversion':<20} {'time':>7} {'model':>10} {'state':>10} {'grown by':>10} {'peak / (model + state)':>23}"
    )
    fresh = []
    for name, method in FRESH:
        found = run_fresh(name, method)
        fresh.append(found)
        sizes = [found[key] / 2**20 for key in ("model_bytes", "state_bytes", "peak_growth_bytes")]
        ratio = f"{(sizes[0] + sizes[2]) / (sizes[0] + sizes[1]):.2f}" if sizes[0] else "(meta)"
        megabytes = " ".join(f"{size:>7.0f} MB" for size in sizes)
        print(f"{name + ' ' + method:<20} {found['convert_s']:>5.2f} s {megabytes} {ratio:>23}")
    if args.json:
        found = {"baseline": "copy.deepcopy of the same dense model", "results": results, "fresh": fresh}
        record.write(args.json, found, seed=SEED)


if __name__ == "__main__":
    main()
