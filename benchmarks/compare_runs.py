"""A table and the curves of several training runs, from the CSV files that main_optim.py writes.

python benchmarks/compare_runs.py sgd.csv adam.csv mfac.csv --out curves.png
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart; the markers help in print.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="CSV files; their stems name the runs")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    print("| run | epochs | training loss | test accuracy |")
    print("|---|---|---|---|")
    for path, (color, marker) in zip(args.runs, STYLES, strict=False):
        with open(path) as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        style = {"color": color, "marker": marker, "markersize": 3, "label": path.stem}
        epochs = [row["epoch"] for row in rows]
        loss.plot(epochs, [row["train_loss"] for row in rows], **style)
        accuracy.plot(epochs, [row["test_accuracy"] for row in rows], **style)
        last = rows[-1]
        print(
            f"| {path.stem} | {len(rows)} | {last['train_loss']:.4f} "
            f"| {last['test_accuracy']:.2f} % |"
        )
    loss.set(xlabel="Epoch", ylabel="Training loss")
    accuracy.set(xlabel="Epoch", ylabel="Test accuracy (%)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
