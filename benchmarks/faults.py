"""What must not lose anything: runs that stop, runs on many processes, files that are damaged, hostile or interrupted.

    python benchmarks/faults.py --record

Runs `faults_resume.py` (6 minutes on two cores), `faults_ranks.py` (25 on busy ones) and `faults_files.py` (6), each of which says
what it tries and fails if a promise does not hold; `--quick` does a part of each. `--record` writes their results.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("resume", "ranks", "files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of everything")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/faults_*.json")
    args = parser.parse_args()
    failed = []
    for part in PARTS:
        print(f"\n{part}", flush=True)
        options = ["--quick"] * args.quick + ["--json", str(HERE / "results" / f"faults_{part}.json")] * args.record
        if subprocess.run([sys.executable, str(HERE / f"faults_{part}.py"), *options]).returncode:
            failed.append(part)
    sys.exit(f"not held: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
