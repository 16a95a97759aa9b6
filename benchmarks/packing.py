"""How fast weights are compressed and decompressed, beside a clone of the same weights.

    python benchmarks/packing.py --json benchmarks/results/packing.json

Compressing takes a dense N:M weight apart into kept values and packed positions; decompressing checks the positions
and makes the dense weight again. The baseline is `torch.clone`, the least that reads and writes every weight once.
Rounds of all three take turns, so that noise meets them alike; the figures are medians of wall-clock time with torch's
usual number of threads, in bytes of dense weights per second. Ratio = own time / time of the clone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch

from nmgraph.nm.masks import random_mask
from nmgraph.nm.packing import compress, decompress
from nmgraph.nm.pattern import Pattern

SEED = 0
SHAPE = (4096, 1, 4096)
PATTERNS = ("2:4", "1:4", "4:8", "1:16")
DTYPES = (torch.float16, torch.float32)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(pattern: Pattern, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    w_OSC = torch.randn(SHAPE, generator=generator) * random_mask(SHAPE, pattern, generator) + 0.0
    w_OSC = w_OSC.to(dtype)
    values, packed = compress(w_OSC, pattern)
    assert torch.equal(decompress(values, packed, pattern), w_OSC)
    work = {
        "clone": w_OSC.clone,
        "pack": lambda: compress(w_OSC, pattern),
        "unpack": lambda: decompress(values, packed, pattern),
    }
    taken = [{name: seconds(each) for name, each in work.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    median = {name: statistics.median(t[name] for t in taken) for name in work}
    return {
        "pattern": str(pattern),
        "dtype": str(dtype).removeprefix("torch."),
        "shape_OSC": list(SHAPE),
        "bytes_to_dense": (values.nbytes + packed.nbytes) / w_OSC.nbytes,
        "rounds": rounds,
        **{f"{name}_gb_per_s": w_OSC.nbytes / median[name] / 1e9 for name in work},
        **{f"{name}_ratio_to_clone": median[name] / median["clone"] for name in ("pack", "unpack")},
        **{f"{name}_all_s": [t[name] for t in taken] for name in work},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="the figures are medians of so many")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()

    print(f"{'':<15} {'bytes':>7}   {'baseline: clone':>15} {'pack':>11} {'ratio':>6} {'unpack':>11} {'ratio':>6}")
    results = []
    for dtype in DTYPES:
        for pattern in PATTERNS:
            found = measure(Pattern.parse(pattern), dtype, args.rounds)
            results.append(found)
            print(
                f"{found['pattern']:<6} {found['dtype']:<8} {found['bytes_to_dense']:>7.2%}   "
                f"{found['clone_gb_per_s']:>10.2f} GB/s {found['pack_gb_per_s']:>6.2f} GB/s "
                f"{found['pack_ratio_to_clone']:>6.1f} {found['unpack_gb_per_s']:>6.2f} GB/s "
                f"{found['unpack_ratio_to_clone']:>6.1f}"
            )
    if args.json:
        record.write(args.json, {"baseline": "torch.clone of the same dense weights", "results": results}, seed=SEED)


if __name__ == "__main__":
    main()
