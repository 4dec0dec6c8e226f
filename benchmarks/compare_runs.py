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

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, by_epoch, by_time = figure.subplots(1, 3)
    print("| run | epochs | test accuracy | seconds an epoch | of these in the optimizer |")
    print("|---|---|---|---|---|")
    for path, (color, marker) in zip(args.runs, STYLES, strict=False):
        with open(path) as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        style = {"color": color, "marker": marker, "markersize": 3, "label": path.stem}
        epochs = [row["epoch"] for row in rows]
        minutes = [sum(r["seconds"] for r in rows[: i + 1]) / 60 for i in range(len(rows))]
        accuracy = [row["test_accuracy"] for row in rows]
        loss.plot(epochs, [row["train_loss"] for row in rows], **style)
        by_epoch.plot(epochs, accuracy, **style)
        by_time.plot(minutes, accuracy, **style)
        seconds, optimizer = (
            sum(row[name] for row in rows) / len(rows) for name in ("seconds", "optimizer_seconds")
        )
        name = path.stem
        print(f"| {name} | {len(rows)} | {accuracy[-1]:.2f} % | {seconds:.0f} | {optimizer:.0f} |")
    loss.set(xlabel="Epoch", ylabel="Training loss")
    by_epoch.set(xlabel="Epoch", ylabel="Test accuracy (%)")
    by_time.set(xlabel="Training time (minutes)", ylabel="Test accuracy (%)")
    for axes in (loss, by_epoch, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
