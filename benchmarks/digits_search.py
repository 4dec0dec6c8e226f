"""The search behind the default settings for the digits: final test accuracy over a small grid.

    python benchmarks/digits_search.py [--seeds 0 1] [--epochs 10] [--json FILE]

Every run is one call of main_optim.py, whose defaults hold for what the grid leaves out.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GRID = {
    "mfac": {"--lr": ["1e-3", "3e-3", "1e-2", "3e-2"], "--damp": ["1e-5", "1e-3"]},
    "sgd": {"--lr": ["0.03", "0.1", "0.3"]},
    "adam": {"--lr": ["1e-3", "3e-3", "1e-2"]},
}
SCRIPT = Path(__file__).resolve().parent.parent / "main_optim.py"


def final_accuracy(flags: list[str]) -> float | None:
    """Test accuracy (%) after the last epoch of a run with these flags; None if it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.pth")
        command = [sys.executable, str(SCRIPT), "--save", str(path), *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 2 and "loss became" in result.stderr:
            return None
        result.check_returncode()
        with open(path.with_suffix(".csv")) as file:
            return float(list(csv.DictReader(file))[-1]["test_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optim", nargs="+", choices=GRID, default=list(GRID))
    parser.add_argument("--seeds", nargs="+", default=["0", "1"])
    parser.add_argument("--epochs", default="10")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    table = []
    for optim in args.optim:
        for values in itertools.product(*GRID[optim].values()):
            settings = dict(zip(GRID[optim], values, strict=True))
            flags = ["--optim", optim, "--epochs", args.epochs, *itertools.chain(*settings.items())]
            accuracies = [final_accuracy([*flags, "--seed", seed]) for seed in args.seeds]
            table.append({"optim": optim, **settings, "accuracies": accuracies})
            shown = "  ".join("diverged" if a is None else f"{a:6.2f} %" for a in accuracies)
            print(f"{' '.join(flags):60s} {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
