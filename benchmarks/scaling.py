"""What windows of four kinds cost: tables from the formulas of costs.py, and measurements.

    python benchmarks/scaling.py --table
    python benchmarks/scaling.py [--rounds 11] [--busy] [--json FILE]

The first prints the tables of docs/cost.md. The second measures one exchange with one gradient
(`update_matvec`) with full windows: its time, in rounds in which the kinds and two bare reads of
the float32 window take turns, as median and as median of the ratios to float32; and the memory by
which a process of its own grows (Linux), beside the size of the window by `window_bytes`. Then it
measures both for each of several processes that share a window (gloo). On a machine with other work
to do, `--busy` takes the processor time of one thread, which leaves waiting out. figures.py draws
the JSON file.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads disturb each other
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from optim_step import environment, median_ratio, timed

from optim import DynamicInverseFisher, window_bytes

KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float8": {"dtype": torch.float8_e4m3fn},
    "compressed, 1 %": {"compress": 0.01},
}
MODELS = {
    "ResNet-20": 272_474,
    "ResNet-50": 25_600_000,
    "BERT-base": 110_000_000,
    "7 B": 7_000_000_000,
}
RANKS = 1, 8, 64, 1024
MEMORY, NETWORK = 3.35e12, 50e9  # bytes a second of a device and of its connection to the others
POINTS = [(m, 272_474) for m in (128, 256, 512, 1024)]
POINTS += [(256, d) for d in (30_000, 100_000, 1_000_000, 3_000_000)]
SHARES, SHARED = (1, 2, 4), (1024, 272_474)  # processes, and the m and d of what they share


# --- tables ---------------------------------------------------------------------------------------


def in_bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def in_seconds(number: float) -> str:
    for unit, size in (("µs", 1e-6), ("ms", 1e-3), ("s", 1)):
        if number < 999.5 * size or unit == "s":
            return f"{number / size:.3g} {unit}"
    raise AssertionError


def traffic(m: int, d: int, ranks: int, options: dict) -> tuple[int, int]:
    """Bytes that a step moves on each device: (read from the window, sent over the network).

    A step reads the device's part of the window twice. A ring of devices adds up m float64 numbers,
    or 2m if compressed, and gathers the d float32 numbers of the update.
    """
    compressed = "compress" in options
    beside = 16 * m**2 + (4 * -(-d // ranks) if compressed else 0)  # K and P, and the error
    read = 2 * (window_bytes(m, d, world_size=ranks, **options) - beside)
    return read, ((32 if compressed else 16) * m + 4 * d) * (ranks - 1) // ranks


def print_tables(m: int = 1024) -> None:
    """Memory and time of a step for each model, kind and number of ranks."""

    def memory(d: int, n: int, options: dict) -> str:
        return in_bytes(window_bytes(m, d, world_size=n, **options))

    def step(d: int, n: int, options: dict) -> str:
        read, sent = traffic(m, d, n, options)
        time = in_seconds(read / MEMORY + sent / NETWORK)
        return f"{in_bytes(read)} + {in_bytes(sent)}, {time}"

    print_table(f"memory per rank, m = {m}", memory)
    print()
    print_table("step: read + sent per rank, time", step)


def print_table(title: str, cell: Callable[[int, int, dict], str]) -> None:
    """A cell for each number of ranks; "–" where a compressed window has too many columns."""
    heads = [f"{ranks} rank" + "s" * (ranks > 1) for ranks in RANKS]
    print(f"| {title} | window | {' | '.join(heads)} |")
    print("|---|---|" + "---|" * len(RANKS))
    for model, d in MODELS.items():
        for kind, options in KINDS.items():
            cells = ["–"] * len(RANKS)
            for i, n in enumerate(RANKS):
                with contextlib.suppress(ValueError):
                    cells[i] = cell(d, n, options)
            print(f"| {model} | {kind} | {' | '.join(cells)} |")


# --- measurements ---------------------------------------------------------------------------------


def filled(m: int, d: int, options: dict) -> DynamicInverseFisher:
    """A full window. Dense ones are full of zeros, on which times don't depend; what a compressed
    window holds decides which numbers its products gather."""
    fisher = DynamicInverseFisher(m, d, **options)
    if fisher.compress is None:
        for tensor in fisher.window.blocks[0].state.values():
            tensor.zero_()  # memory is there once it has been written to
        fisher.counter.fill_(m)
    else:
        for _ in range(m):
            fisher.update(torch.randn(d))
    return fisher


def seconds(m: int, d: int, rounds: int, busy: bool) -> dict[str, list[float]]:
    """Of each kind in every round, and of two reads of the window in float32."""
    fishers = {kind: filled(m, d, options) for kind, options in KINDS.items()}
    gradients = iter(torch.randn(len(KINDS) * (rounds + 1), d))
    contestants = {
        kind: lambda fisher=fisher: fisher.update_matvec(next(gradients))
        for kind, fisher in fishers.items()
    }
    G, x, z = fishers["float32"].window.blocks[0].state["G"], torch.randn(d), torch.randn(m)
    contestants["two reads"] = lambda: (G @ x, z @ G)
    return timed(contestants, rounds, time.process_time if busy else time.perf_counter)


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, those it has, or VmHWM, the most it ever had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


def peak(m: int, d: int, kind: str) -> int:
    """Bytes by which this process grows for a full window and some exchanges."""
    warm = filled(2, 1000, KINDS[kind])
    warm.update_matvec(torch.randn(1000))
    before = memory("VmRSS")
    fisher = filled(m, d, KINDS[kind])
    for _ in range(3):
        fisher.update_matvec(torch.randn(d))
    return memory("VmHWM") - before


def share(m: int, d: int, kind: str) -> tuple[int, float]:
    """Of a window that the processes of torchrun share: the bytes by which this one grows, and the
    processor time of one thread for an exchange, in seconds."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    options, d = {**KINDS[kind], "process_group": dist.group.WORLD}, -(-d // dist.get_world_size())
    before = memory("VmRSS")
    fisher, times = filled(m, d, options), []
    for g in torch.randn(11, d):
        start = time.process_time()
        fisher.update_matvec(g)
        times.append(time.process_time() - start)
    return memory("VmHWM") - before, statistics.median(times)


def measure_shares() -> dict[str, dict]:
    """Of each kind with each number of processes, those of the first one."""
    figures: dict[str, dict] = {}
    (m, d), python = SHARED, [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for n in SHARES:
        for kind, options in KINDS.items():
            command = [*python, f"--nproc-per-node={n}", __file__, "--share", str(m), str(d), kind]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peak, seconds = output.split()
            figures.setdefault(kind, {})[n] = {
                "peak": int(peak),
                "seconds": float(seconds),
                "window": window_bytes(m, d, world_size=n, **options),
            }
    return figures


def measure(m: int, d: int, rounds: int, busy: bool) -> dict[str, dict]:
    """All figures of all kinds, and the time of two reads."""
    times = seconds(m, d, rounds, busy)
    figures = {"two reads": {"seconds": times["two reads"]}}
    for kind, options in KINDS.items():
        command = [sys.executable, __file__, "--peak", str(m), str(d), kind]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        figures[kind] = {
            "seconds": times[kind],
            "ratio": median_ratio(times[kind], times["float32"]),
            "peak": int(output),
            "window": window_bytes(m, d, **options),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--rounds", type=int, default=11, help="timed runs of each kind")
    parser.add_argument("--busy", action="store_true", help="measure processor time, one thread")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("--share", nargs=3, help=argparse.SUPPRESS)  # of one of several
    args = parser.parse_args()
    if args.table:
        print_tables()
        return
    if args.peak:
        print(peak(int(args.peak[0]), int(args.peak[1]), args.peak[2]))
        return
    if args.share:
        figures = share(int(args.share[0]), int(args.share[1]), args.share[2])
        if dist.get_rank() == 0:
            print(*figures)
        dist.destroy_process_group()
        return
    if args.busy:
        torch.set_num_threads(1)
    result = {"environment": environment(), "rounds": args.rounds, "busy": args.busy}
    print("  ".join(f"{k}: {v}" for k, v in result["environment"].items()) + "\n")
    print("| m | d | window | time, ms | of float32 | peak memory | of float32 | window_bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for m, d in dict.fromkeys(POINTS):
        figures = result[f"m = {m}, d = {d}"] = measure(m, d, args.rounds, args.busy)
        for kind in KINDS:
            f = figures[kind]
            time = 1e3 * statistics.median(f["seconds"])
            part = f["peak"] / figures["float32"]["peak"]
            print(
                f"| {m} | {d:,} | {kind} | {time:.1f} | {f['ratio']:.2f} | {in_bytes(f['peak'])} "
                f"| {part:.3f} | {in_bytes(f['window'])} |",
                flush=True,
            )
    result["shares"] = measure_shares()
    print("\n| processes | window | time of each, ms | peak memory of each | window_bytes |")
    print("|---|---|---|---|---|")
    for n in SHARES:
        for kind in KINDS:
            f = result["shares"][kind][n]
            sizes = f"{in_bytes(f['peak'])} | {in_bytes(f['window'])}"
            print(f"| {n} | {kind} | {1e3 * f['seconds']:.1f} | {sizes} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
