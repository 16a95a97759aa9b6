"""What sparse tensor cores are worth on this machine's GPU: one run on a bare machine, one JSON file.

    python benchmarks/gpu/run.py --json gpu.json
    python benchmarks/gpu/run.py --dry-run --json dry.json

Nothing has to be installed beside torch and what nmgraph needs; README.md beside this file says what each section answers.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Name, module, and share of the time. A section's generator is `pieces(bench)` of its module.
SECTIONS = {
    "probes": 0.10,
    "agreement": 0.10,
    "gemms": 0.22,
    "steps": 0.32,
    "share": 0.07,
    "masks": 0.07,
    "accuracy": 0.12,
}
MODULES = {"masks": "mask_kernels"}  # benchmarks/masks.py has the other name


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # so that a look does not take the GPU from the sections' processes
    )
    with tempfile.TemporaryDirectory() as scratch:
        sys.path[:0] = [str(ROOT), str(HERE.parent)]
        if args.wheels:
            unpack(args.wheels, Path(scratch) / "wheels")
        require_packages()
        os.environ["NMGRAPH_CACHE"] = str(Path(scratch) / "timings")  # measured here and now
        sys.exit(measure(args))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", required=True, help="written anew after every piece")
    parser.add_argument("--only", metavar="SECTION,..", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for all of it; by default 540")
    parser.add_argument("--quick", action="store_true", help="a part of everything")
    parser.add_argument("--cifar", type=Path, metavar="PATH", help="CIFAR-10, as examples/cifar10.py takes it")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that are not installed here")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, with a stand-in for the kernels")
    args = parser.parse_args()
    args.only = list(SECTIONS) if args.only is None else args.only.split(",")
    unknown = [name for name in args.only if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {', '.join(map(repr, unknown))}. Use {', '.join(SECTIONS)}.")
    if not args.budget > 0:
        parser.error(f"--budget {args.budget:g} leaves no time. Give seconds: 540 is enough for most of it.")
    for path in (args.cifar, args.wheels):
        if path is not None and not path.exists():
            parser.error(f"there is no {path}.")
    return args


def unpack(wheels: Path, place: Path) -> None:
    """Put wheels where Python finds them, behind what is installed; unpacked, so that compiled ones work as well."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    sys.path.append(str(place))


def require_packages() -> None:
    """End, with what to do, if a package is missing that nmgraph needs."""
    names = [re.split(r"[^\w-]", need)[0] for need in dependencies()]
    missing = [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]
    if not missing:
        try:
            import nmgraph  # noqa: F401
        except ModuleNotFoundError as error:  # what those need in turn
            missing = [str(error.name)]
        except ImportError as error:
            end(f"nmgraph can't be imported by {sys.executable}: {error}. Bring other versions with --wheels.")
    if missing:
        version = ".".join(map(str, sys.version_info[:2]))
        end(
            f"nmgraph needs {', '.join(missing)}, not found by {sys.executable}. Elsewhere, with network, run\n"
            f"    python -m pip download -d wheels --only-binary=:all: --python-version {version} "
            f"--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 {' '.join(missing)}\n"
            "bring the folder here, and add --wheels wheels."
        )


def dependencies() -> list[str]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def measure(args: argparse.Namespace) -> int:
    import record
    import torch
    from bench import Bench, say
    from pieces import carry_out

    from nmgraph.files import written_atomically

    until = time.monotonic() + args.budget
    args.json.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "command": record.command(),
        "commit": record.commit(),
        "dry_run": args.dry_run,
        "figures": "made with a stand-in" if args.dry_run else "measured",
        "quick": args.quick,
        "budget_s": args.budget,
        "seed": 0,
        "machine": {},
        "sections": {},
    }

    def save() -> None:
        with written_atomically(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")

    carry_out(loaded("machine"), Bench(torch.device("cpu")), found["machine"], lambda: None, until)
    machine = found["machine"]["results"]
    if not (args.dry_run or machine.get("cuda")):
        end(
            f"torch {torch.__version__} sees no NVIDIA GPU here, and every figure is one of a GPU. Run it where "
            "nvidia-smi shows one, or try the script out with --dry-run."
        )
    save()
    for name in [name for name in SECTIONS if name in args.only]:
        say(f"{name}, {until - time.monotonic():.0f} s left")
        section = found["sections"][name] = {}
        ends = time.monotonic() + share(name, args, until - time.monotonic())
        device = torch.device("cpu" if args.dry_run else "cuda")
        bench = Bench(device, args.dry_run, args.quick, ends, args.cifar)
        carry_out(loaded(name), bench, section, save, until)
    import goals

    lines = goals.lines(found["sections"])
    # What a stand-in meets is nothing.
    found["goals"] = [re.sub("^(met|missed) +", "made up        ", line) for line in lines] if args.dry_run else lines
    save()
    say("\n".join(["", f"Figures are {found['figures']}.", *found["goals"], f"wrote {args.json}"]))
    return 0


def share(name: str, args: argparse.Namespace, left: float) -> float:
    """Give the seconds for a section, of what is left for it and for those behind it."""
    order = list(SECTIONS)
    behind = [other for other in order[order.index(name) :] if other in args.only]
    parts = {other: SECTIONS[other] if other != "accuracy" or args.cifar or args.dry_run else 0.01 for other in behind}
    return left * parts[name] / sum(parts.values())


def loaded(name: str) -> Callable[..., Any]:
    """Give a section's pieces. Its module is imported in the process that runs it, as even that may fail."""

    def pieces(bench: Any) -> Any:
        yield from importlib.import_module(MODULES.get(name, name)).pieces(bench)

    return pieces


def end(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
