"""How long `nmgraph.convert` takes, beside a deep copy of the same model.

    python benchmarks/conversion.py --json benchmarks/results/conversion.json

The baseline is `copy.deepcopy(model)`: about the least that handles every module and every weight once. Each round
copies the dense model and converts the copy, so that noise meets both alike; the figures are medians of the
processor's time on one thread, which other programs hardly change. Ratio = conversion / copy.
"""

import argparse
import copy
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import record
import torch

import nmgraph

SEED = 0
MODELS = ("resnet50", "vit_b_16")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=nmgraph.METHODS, default="lbc")
    parser.add_argument("--rounds", type=int, default=7, help="the figures are medians of so many")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()

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
    if args.json:
        record.write(args.json, {"baseline": "copy.deepcopy of the same dense model", "results": results}, seed=SEED)


if __name__ == "__main__":
    main()
