"""Draws results/scaling.png from results/scaling.json and results/gpu_rows.json.

    python benchmarks/scaling.py --busy --rounds 7 --json benchmarks/results/scaling.json
    python benchmarks/figures.py

Top: the time of a step against m, against d, and on a GPU against the size of the window. The
dashed line is two reads of the window. Bottom: memory against m, d and the number of processes.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
STYLES = {  # colours that the colour-blind tell apart, and shapes that print does
    "float32": {"color": "#0072B2", "marker": "o"},
    "bfloat16": {"color": "#D55E00", "marker": "s"},
    "float8": {"color": "#CC79A7", "marker": "D"},
    "compressed, 1 %": {"color": "#009E73", "marker": "^"},
    "two reads": {"color": "0.3", "linestyle": "--", "linewidth": 1},  # of float32, if on a CPU
}
NUMBER = {"float32": 4, "bfloat16": 2, "float8": 1}  # bytes


def in_thousands(number: int) -> str:
    return f"{number:,}" if number < 10_000 else f"{number / 1000:,.0f} k"


def draw_sweep(
    time: Axes, memory: Axes, points: dict[int, dict[str, Any]], label: str, clock: str
) -> None:
    """Both against one of m and d, with the figures of each window at the points."""
    x = sorted(points)
    for kind in points[x[0]]:
        figures, style = [points[value][kind] for value in x], STYLES[kind]
        milliseconds = [1e3 * statistics.median(f["seconds"]) for f in figures]
        time.plot(x, milliseconds, markersize=4, label=kind, **style)
        if kind != "two reads":
            memory.plot(x, [f["peak"] / 1e6 for f in figures], markersize=4, **style)
    time.set(ylabel=clock, title="Step, CPU")
    memory.set(ylabel="Peak (MB)", title="Memory")
    for axes in (time, memory):
        axes.set_xlabel(label)
        axes.set_xticks(x, [in_thousands(value) for value in x])
        axes.minorticks_off()


def draw_gpu(axes: Axes, rows: dict[str, dict[str, float]]) -> None:
    """`update_matvec` for each dense window, and a step of `MFAC` for ResNet-20 as a graph."""
    lines: dict[str, list[tuple[float, dict[str, float]]]] = {kind: [] for kind in NUMBER}
    for name, row in rows.items():
        pattern = r"m = (\d+)(?:, d = ([\d,]+))?, torch\.([a-z]+\d+)\w* ?"
        if match := re.fullmatch(pattern, name):
            m, d, kind = int(match[1]), int((match[2] or "272,474").replace(",", "")), match[3]
            lines[kind].append((m * d * NUMBER[kind] / 1e9, row))
    for kind, points in lines.items():
        points.sort(key=lambda point: point[0])
        times = [(size, row["update_matvec"]) for size, row in points]
        graphs = [(size, row["graph"]) for size, row in points if "graph" in row]
        style = {**STYLES[kind], "markersize": 4}
        axes.plot(*zip(*times, strict=True), label=kind, **style)
        axes.plot(*zip(*graphs, strict=True), **style | {"linestyle": "", "fillstyle": "none"})
    floor = sorted((size, row["two reads"]) for points in lines.values() for size, row in points)
    axes.plot(*zip(*floor, strict=True), label="two reads", **STYLES["two reads"])
    axes.set(xlabel="Window (GB)", ylabel="Time (ms)", title="Step, H100; open: as a CUDA graph")


def draw(result: dict[str, Any], gpu_rows: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    grid = figure.subplots(2, 3, subplot_kw={"xscale": "log", "yscale": "log"})
    against_m, against_d = {}, {}
    for name, figures in result.items():
        if match := re.fullmatch(r"m = (\d+), d = (\d+)", name):
            m, d = map(int, match.groups())
            if d == 272_474:
                against_m[m] = figures
            if m == 256:
                against_d[d] = figures
    clock = "Processor time of one thread (ms)" if result["busy"] else "Time (ms)"
    draw_sweep(*grid[:, 0], against_m, "m, at d = 272,474", clock)
    draw_sweep(*grid[:, 1], against_d, "d, at m = 256", clock)
    draw_gpu(grid[0, 2], gpu_rows)
    for kind, shares in result["shares"].items():
        x, y = [int(n) for n in shares], [share["peak"] / 1e6 for share in shares.values()]
        grid[1, 2].plot(x, y, markersize=4, **STYLES[kind])
        grid[1, 2].set_xticks(x, list(shares))
    grid[1, 2].set(xlabel="Processes, at m = 1,024, d = 272,474", ylabel="Peak of each (MB)")
    grid[1, 2].set_title("Memory")
    grid[1, 2].minorticks_off()
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    for axes in grid[0, ::2]:
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    files = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("scaling", "gpu_rows"))
    draw(*files).savefig(RESULTS / "scaling.png", dpi=150)


if __name__ == "__main__":
    main()
