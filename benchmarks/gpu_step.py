"""Time of one exchange with one preconditioned gradient (`update_matvec`) on a GPU.

    python benchmarks/gpu_step.py [--m 256 1024 4096] [--d 300000 25000000] [--json FILE]

Medians, in a process of its own for each figure, of

- both `coefficients`, with the CUDA extension and with torch operations only, and
- the floor: two reads of the window (4md bytes each) at the bandwidth that a copy reaches.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from optim_step import environment, medians

WAYS = list(itertools.product(["incremental", "paper"], [True, False]))


def seconds(device: str, rounds: int, run: Callable[[], object]) -> float:
    """Median seconds of `run`, until the device has finished."""

    def finish() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return medians({"": finish}, rounds)[""]


def copy_bandwidth(device: str, rounds: int) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / seconds(device, rounds, lambda: target.copy_(source))


def exchange(
    device: str, rounds: int, m: int, d: int, coefficients: str, extension: bool
) -> float | None:
    """Median seconds of `update_matvec` with a full window; None if that does not fit."""
    if not extension:
        sys.modules["hinv_cuda"] = None  # importing it fails now
    from optim import DynamicInverseFisher

    try:
        fisher = DynamicInverseFisher(m, d, device=device, coefficients=coefficients)
        fisher.count = m  # full, of zeros: times don't depend on values, and m exchanges take long
        g = torch.randn(d, device=device)
        return seconds(device, rounds, lambda: fisher.update_matvec(g))
    except torch.OutOfMemoryError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--d", type=int, nargs="+", default=[300_000, 25_000_000])
    parser.add_argument("--rounds", type=int, default=21, help="timed runs for each figure")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if args.device == "cuda" and importlib.util.find_spec("hinv_cuda") is None:
        parser.error("hinv_cuda is not installed; python setup_cuda.py build_ext --inplace first")
    # A process a figure, so that none inherits another's memory, or its choice about the extension.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        bandwidth = pool.apply(copy_bandwidth, (args.device, args.rounds))
        result = {"environment": environment(), "rounds": args.rounds, "bandwidth": bandwidth}
        if args.device == "cuda":
            result["environment"]["gpu"] = torch.cuda.get_device_name()
        print("  ".join(f"{k}: {v}" for k, v in result["environment"].items()))
        print(f"copy bandwidth: {bandwidth / 1e9:.0f} GB/s\n")
        names = [f"{way}, {'kernels' if kernels else 'torch'}" for way, kernels in WAYS]
        print(f"| m | d | floor, ms | {' | '.join(names)} |")
        print("|---|---|---|" + "---|" * len(names))
        for d, m in itertools.product(args.d, args.m):
            floor = 2 * 4 * m * d / bandwidth
            times = [pool.apply(exchange, (args.device, args.rounds, m, d, *way)) for way in WAYS]
            result[f"m = {m}, d = {d}"] = dict(zip(["floor", *names], [floor, *times], strict=True))
            shown = [
                "does not fit" if t is None else f"{1e3 * t:.2f} ({t / floor:.2f} × floor)"
                for t in times
            ]
            print(f"| {m} | {d} | {1e3 * floor:.2f} | {' | '.join(shown)} |", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
