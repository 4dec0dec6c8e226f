"""Time of one exchange with one preconditioned gradient (`update_matvec`) on a GPU.

    python benchmarks/gpu_step.py [--m 256 1024 4096] [--d 300000 25000000] [--json FILE]
    python benchmarks/gpu_step.py --kernels          each kernel on its own, checked, then timed

Medians for both `coefficients`, with the kernels of hinv_cuda and with torch operations alone, also
as multiples of the floor: two reads of the window (4md bytes each) at the bandwidth of a copy.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor


def seconds(device: str, rounds: int, run: Callable[[], object]) -> float:
    """Median seconds of `run`, until the device has finished."""
    from optim_step import medians

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


# --- each kernel on its own ---------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
RESNET20 = 272_474
LARGE = [
    (1024, 11_000_000, torch.float32),
    (1024, 25_600_000, torch.bfloat16),
    (1024, 25_600_000, torch.float8_e4m3fn),
    (256, 25_600_000, torch.float32),
]
BLOCK = 4096


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median time on the device of `run`, by CUDA events."""
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda._sleep(10**7)  # the host is ahead from here on: no launch is waited for
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


class Case:
    """A full window of random numbers in padded rows, and what a step makes of it."""

    def __init__(self, m: int, d: int, dtype: torch.dtype):
        self.m, self.d, self.dtype = m, d, dtype
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        stride = -(-d * dtype.itemsize // 512) * 512 // dtype.itemsize
        self.G = torch.empty(m, stride, dtype=dtype, device="cuda")[:, :d]
        for row in self.G:
            row.copy_(torch.randn(d, device="cuda"))
        self.scales = None
        if dtype in (torch.float16, torch.float8_e4m3fn):
            shape = m, -(-d // BLOCK)
            self.scales = torch.exp2(torch.randint(-3, 3, shape, device="cuda").float())
        self.x = torch.randn(d, device="cuda").to(dtype).to(self.real)
        self.z = torch.randn(m, device="cuda", dtype=torch.float64)
        self.count = torch.tensor(5 * m + m // 3, device="cuda")
        self.one = torch.ones((), dtype=torch.int64, device="cuda")

    def rows(self, columns: slice) -> Tensor:
        """Some columns of the window, in float64."""
        G = self.G[:, columns].to(self.real).double()
        if self.scales is not None:
            blocks = torch.arange(self.d, device="cuda")[columns] // BLOCK
            G *= self.scales[:, blocks]
        return G

    def check(self, kernels: Any) -> None:
        """All products, against float64 in torch: some rows in full, some columns in full."""
        k = kernels.hinv_times(self.G, self.x, self.count, self.scales)
        j = int(self.count) % self.m
        expected, size = torch.zeros_like(k), torch.zeros_like(k)
        for start in range(0, self.d, 2**16):
            columns = slice(start, min(start + 2**16, self.d))
            G, x = self.rows(columns), self.x[columns].double()
            G[j] = x
            expected += G @ x
            size += G.abs() @ x.abs()
        assert ((k - expected).abs() <= 1e-13 * size).all(), "hinv_times is wrong"
        u = kernels.hinv_transposed_times(
            self.G, self.z, self.scales, 2.0, self.x, self.count, self.one
        )
        for columns in (slice(0, 5000), slice(max(0, self.d - 5000), self.d)):
            G = self.rows(columns)
            expected, size = 2 * (self.z @ G), 2 * (self.z.abs() @ G.abs())
            error = (u[columns].double() - expected).abs()
            allowed = 2.0**-24 * expected.abs() * (self.real == torch.float32)
            assert (error <= allowed + 1e-13 * size).all(), "hinv_transposed_times is wrong"

    def runs(self, kernels: Any) -> dict[str, Callable[[], object]]:
        new = self.x, self.count, self.one
        return {
            "times": lambda: kernels.hinv_times(self.G, self.x, self.count, self.scales),
            "transposed_times": lambda: kernels.hinv_transposed_times(
                self.G, self.z, self.scales, 1.0, *new
            ),
        }

    @property
    def bytes(self) -> int:
        return self.m * self.d * self.dtype.itemsize


class Compressed:
    """The same with 1 % of the entries."""

    def __init__(self, m: int, d: int, dtype: torch.dtype):
        self.m, self.d, self.dtype = m, d, dtype
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        parts = []
        for start in range(0, d, BLOCK):
            size = min(BLOCK, d - start)
            some = torch.rand(m, size, device="cuda").topk(max(1, round(0.01 * size))).indices
            parts.append(some.sort().values + start)
        self.columns = torch.cat(parts, 1).int()
        self.values = torch.randn(self.columns.shape, device="cuda").to(dtype)
        self.X = torch.randn(2, d, device="cuda", dtype=self.real)
        self.y = torch.randn(m, device="cuda", dtype=torch.float64)
        self.count = torch.tensor(3 * m, device="cuda")

    def check(self, kernels: Any) -> None:
        values = self.values.to(self.real).double()
        indices = self.columns.long()
        y = kernels.hinv_sparse_times(self.columns, self.values, self.X, self.count)
        for x, row in zip(self.X.double(), y, strict=True):
            error = (row - (x[indices] * values).sum(1)).abs()
            assert (error <= 1e-13 * (x[indices] * values).abs().sum(1)).all(), "sparse_times"
        u = kernels.hinv_sparse_transposed_times(self.columns, self.values, self.y, self.d)
        terms = (values * self.y[:, None]).flatten()
        zeros = torch.zeros(self.d, dtype=torch.float64, device="cuda")
        expected = zeros.index_add(0, indices.flatten(), terms)
        size = zeros.index_add(0, indices.flatten(), terms.abs())
        allowed = 2.0**-24 * expected.abs() * (self.real == torch.float32)
        error = (u.double() - expected).abs()
        assert (error <= allowed + 1e-13 * size).all(), "sparse_transposed_times is wrong"

    def runs(self, kernels: Any) -> dict[str, Callable[[], object]]:
        window = self.columns, self.values
        return {
            "sparse_times, two": lambda: kernels.hinv_sparse_times(*window, self.X, self.count),
            "sparse_transposed_times": lambda: kernels.hinv_sparse_transposed_times(
                *window, self.y, self.d
            ),
        }

    @property
    def bytes(self) -> int:
        return self.columns.numel() * (4 + self.dtype.itemsize)


class Exchange:
    """hinv_update, for random gradients or nearly parallel ones."""

    def __init__(self, m: int, parallel: bool):
        self.m, self.parallel, self.damp = m, parallel, 1e-5 if parallel else 1e-3
        G = torch.randn(m, m + 5, device="cuda", dtype=torch.float64)
        if parallel:
            G = 100 * (torch.randn_like(G[0]) + 1e-3 * G)
        G /= G.shape[1] ** 0.5
        self.K = G @ G.T
        self.k = self.K[m // 3].clone()
        self.count = torch.tensor(m + m // 3, device="cuda")
        self.P = torch.linalg.inv(self.K + m * self.damp * torch.eye(m, device="cuda").double())
        self.P = ((self.P + self.P.T) / 2).contiguous()
        self.out = torch.empty_like(self.k), self.k.new_empty(1), torch.ones_like(self.count)

    def check(self, kernels: Any) -> None:
        self.runs(kernels)["update"]()
        z, amplification, accepted = self.out
        A = self.K + self.m * self.damp * torch.eye(self.m, device="cuda").double()
        residual = A @ z
        residual[self.m // 3] -= 1
        units = (A[self.m // 3, self.m // 3] / A.diagonal()).sqrt()
        solved = 1e-6 if self.parallel else 1e-11
        assert (residual * units).abs().max() < solved, "hinv_update is wrong"
        assert accepted == 1 and 0 < amplification < torch.inf, "hinv_update is wrong"

    def runs(self, kernels: Any) -> dict[str, Callable[[], object]]:
        arguments = self.P, self.K, self.k, self.count, self.damp, 1e300, *self.out
        return {"update": lambda: kernels.hinv_update(*arguments)}

    bytes = 0


def table_of_kernels(rounds: int) -> None:
    """Checks each kernel in both ways in, then prints a row for each kernel and size."""
    import kernels

    start = time.perf_counter()
    ways = {"NVRTC": kernels.Compiled(torch.cuda.current_device())}
    print(f"NVRTC: {time.perf_counter() - start:.1f} s to compile or load")
    extension, why = kernels._extension()
    if extension:
        ways["extension"] = extension
    else:
        print(f"no extension: {why}")
    for dtype, (way, interface) in itertools.product(DTYPES, ways.items()):
        for case in (Case(40, 9001, dtype), Case(7, 130, dtype), Compressed(40, 9001, dtype)):
            case.check(interface)
        Exchange(96, dtype == torch.float32).check(interface)
        print(f"{way}: {dtype} is right")

    source, target = torch.zeros(2, 2**28, device="cuda")
    bandwidth = 8 * len(source) / milliseconds(lambda: target.copy_(source), rounds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ", end="")
    print(f"copy bandwidth {bandwidth / 1e6:.0f} GB/s\n")
    small = [(m, RESNET20, dtype) for m in (512, 1024) for dtype in DTYPES]
    cases: list[tuple[Any, tuple]] = [(Case, sizes) for sizes in small + LARGE]
    cases += [(Compressed, (1024, RESNET20, dtype)) for dtype in DTYPES]
    cases += [(Exchange, (m, parallel)) for m in (512, 1024, 4096) for parallel in (False, True)]
    print(
        "| kernel | sizes | bare read, ms | " + " | ".join(f"{w}, ms (ratio)" for w in ways) + " |"
    )
    print("|---|---|---|" + "---|" * len(ways))
    for kind, sizes in cases:
        case = kind(*sizes)
        case.check(ways["NVRTC"])
        floor = case.bytes / bandwidth
        times = [
            {name: milliseconds(run, rounds) for name, run in case.runs(interface).items()}
            for interface in ways.values()
        ]
        for name in times[0]:
            cells = [
                f"{t[name]:.3f} ({t[name] / floor:.2f})" if floor else f"{t[name]:.3f}"
                for t in times
            ]
            label = ", ".join(str(size).removeprefix("torch.") for size in sizes)
            print(f"| {name} | {label} | {floor:.3f} | {' | '.join(cells)} |", flush=True)
        del case
        torch.cuda.empty_cache()


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
    parser.add_argument("--kernels", action="store_true", help="each kernel on its own instead")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if args.kernels:
        return table_of_kernels(args.rounds)
    if args.device == "cuda" and importlib.util.find_spec("hinv_cuda") is None:
        parser.error("hinv_cuda is not installed; python setup_cuda.py build_ext --inplace first")
    from optim_step import environment

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
