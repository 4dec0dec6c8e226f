"""Time of one exchange with one preconditioned gradient (`update_matvec`) on a GPU.

    python benchmarks/gpu_step.py [--m 256 1024 4096] [--d 300000 25000000] [--json FILE]

Medians for both `coefficients`, with the kernels of hinv_cuda and with torch operations alone, also
as multiples of the floor: two reads of the window (4md bytes each) at the bandwidth of a copy.
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


def exchange(device: str, rounds: int, m: int, d: int, coefficients: str) -> float | None:
    """Median seconds of `update_matvec` with a full window; None if that does not fit."""
    from optim import DynamicInverseFisher  # not before `without_extension`

    try:
        fisher = DynamicInverseFisher(m, d, device=device, coefficients=coefficients)
        fisher.count = m  # full, of zeros: times don't depend on values, and m exchanges take long
        g = torch.randn(d, device=device)
        return seconds(device, rounds, lambda: fisher.update_matvec(g))
    except torch.OutOfMemoryError:
        return None


def without_extension() -> None:
    """Makes the import of hinv_cuda fail in this process."""
    sys.modules["hinv_cuda"] = None


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
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as kernels, context.Pool(1, without_extension) as torch_alone:
        pools = {"kernels": kernels, "torch": torch_alone}
        bandwidth = kernels.apply(copy_bandwidth, (args.device, args.rounds))
        result = {"environment": environment(), "rounds": args.rounds, "bandwidth": bandwidth}
        if args.device == "cuda":
            result["environment"]["gpu"] = torch.cuda.get_device_name()
        print("  ".join(f"{k}: {v}" for k, v in result["environment"].items()))
        print(f"copy bandwidth: {bandwidth / 1e9:.0f} GB/s\n")
        ways = list(itertools.product(["incremental", "paper"], pools))
        print(f"| m | d | floor, ms | {' | '.join(', '.join(way) for way in ways)} |")
        print("|---|---|---|" + "---|" * len(ways))
        for d, m in itertools.product(args.d, args.m):
            floor = 2 * 4 * m * d / bandwidth
            times = {"floor": floor}
            cells = []
            for coefficients, pool in ways:
                arguments = (args.device, args.rounds, m, d, coefficients)
                time = times[f"{coefficients}, {pool}"] = pools[pool].apply(exchange, arguments)
                cells.append(
                    "does not fit" if time is None else f"{1e3 * time:.2f} ({time / floor:.2f} ×)"
                )
            result[f"m = {m}, d = {d}"] = times
            print(f"| {m} | {d} | {1e3 * floor:.2f} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
