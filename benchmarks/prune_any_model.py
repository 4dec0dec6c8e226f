"""examples/prune_any_model.py at several sparsities: a table, a CSV file and a plot.

    python benchmarks/prune_any_model.py --csv FILE [--plot FILE] [-- --ngrads 64 ...]

What follows `--` goes to the example. Each line is a run in a process of its own (not on Windows):
its time, also that of the processor alone, and its peak resident memory, all with loading the model
and measuring it. Lines that the CSV file has already are not run again.
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
LEVELS = [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)]
FIELDS = "pruner", "pattern", "sparsity", "spearman", "neighbours"
FIELDS += "seconds", "processor_seconds", "peak_gb"


def measured(pruner: str, pattern: str, sparsity: float, options: list[str]) -> dict[str, str]:
    """One run of the example."""
    settings = {"--pruner": pruner, "--pattern": pattern, "--sparsity": str(sparsity)}
    words = [word for setting in settings.items() for word in setting]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.prune_any_model", *words, *options],
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


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Both measures, a pair of bars for each level."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    names = {"spearman": "Rank correlation", "neighbours": "Same nearest neighbour"}
    for axes, (measure, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for offset, (pruner, color) in enumerate((("magnitude", "#0072B2"), ("mfac", "#D55E00"))):
            values = [float(row[measure]) for row in rows if row["pruner"] == pruner]
            places = [i + 0.4 * offset - 0.2 for i in range(len(values))]
            label = {"mfac": "M-FAC"}.get(pruner, pruner)
            bars = axes.bar(places, values, 0.4, label=label, color=color)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        levels = [f"{row['pattern']}, {row['sparsity']}" for row in rows if row["pruner"] == pruner]
        axes.set_xticks(range(len(levels)), levels, fontsize=8)
        axes.set(title=name, ylim=(0, 1))
        axes.legend(fontsize=8)
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
        for pruner in ("magnitude", "mfac"):
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
