"""examples/prune_any_model.py and its peers at several sparsities: a table, a CSV file and a plot.

    python benchmarks/prune_any_model.py --csv FILE [--plot FILE] [-- --ngrads 64 ...]

Wanda and SparseGPT are those of `peers`. What follows `--` goes to M-FAC in the example. Each line
is a run in a process of its own (not on Windows): its time, also that of the processor alone, and
its peak resident memory, all with loading the model and measuring it. Lines that the CSV file has
already are not run again.
"""

import argparse
import ast
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure
from optim_step import environment

ROOT = Path(__file__).resolve().parent.parent
LEVELS = [("unstructured", 0.5), ("unstructured", 0.6), ("unstructured", 0.7), ("2:4", 0.5)]
PRUNERS = {
    "magnitude": ("magnitude", "#0072B2"),
    "wanda": ("Wanda", "#56B4E9"),
    "sparsegpt": ("SparseGPT", "#009E73"),
    "mfac": ("M-FAC", "#D55E00"),
}
FIELDS = "pruner", "pattern", "sparsity", "spearman", "neighbours"
FIELDS += "seconds", "processor_seconds", "peak_gb"


def measured(pruner: str, pattern: str, sparsity: float, options: list[str]) -> dict[str, str]:
    """One run of the example, or of a peer."""
    peer = pruner in ("wanda", "sparsegpt")
    script = ["benchmarks/peers.py"] if peer else ["-m", "examples.prune_any_model"]
    settings = {"--pruner": pruner, "--pattern": pattern, "--sparsity": str(sparsity)}
    words = [*script, *(word for setting in settings.items() for word in setting)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        text=True,
    )
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{words} ended with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        **dict(zip(FIELDS, (pruner, pattern, sparsity), strict=False)),
        **ast.literal_eval(printed.splitlines()[-1]),
        "seconds": round(time.perf_counter() - start),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_gb": round(unit * usage.ru_maxrss / 1e9, 2),
    }


def levels(rows: list[dict[str, str]], pruner: str) -> list[tuple[int, dict[str, str]]]:
    """(number of the level, row) for each row of a pruner."""
    found = ((row["pattern"], float(row["sparsity"]), row) for row in rows)
    return [
        (LEVELS.index((pattern, sparsity)), row)
        for pattern, sparsity, row in found
        if row["pruner"] == pruner
    ]


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Both measures, a bar for each pruner at each level."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    names = {"spearman": "Rank correlation", "neighbours": "Same nearest neighbour"}
    for axes, (measure, name) in zip(figure.subplots(2, 1), names.items(), strict=True):
        for i, (pruner, (label, color)) in enumerate(PRUNERS.items()):
            found = [(level, float(row[measure])) for level, row in levels(rows, pruner)]
            places, values = zip(*found, strict=True) if found else ((), ())
            bars = axes.bar([x + 0.2 * i - 0.3 for x in places], values, 0.2, color=color)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
            bars.set_label(label)
        axes.set_xticks(range(len(LEVELS)), [f"{pattern}, {level}" for pattern, level in LEVELS])
        axes.set(title=name, ylim=(0, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("options", nargs="*", help="of the example")
    args = parser.parse_args()

    print(json.dumps(environment()))
    rows = []
    if args.csv.exists():
        with open(args.csv) as file:
            rows = list(csv.DictReader(file))
    done = {(row["pruner"], row["pattern"], float(row["sparsity"])) for row in rows}
    print("|", " | ".join(FIELDS), "|\n|" + "---|" * len(FIELDS))
    for level in LEVELS:
        for pruner in PRUNERS:
            if (pruner, *level) not in done:
                options = args.options if pruner == "mfac" else []
                rows.append(measured(pruner, *level, options))
                with open(args.csv, "w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    writer.writeheader()
                    writer.writerows(rows)
    for row in rows:
        print("|", " | ".join(str(row[field]) for field in FIELDS), "|")
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
