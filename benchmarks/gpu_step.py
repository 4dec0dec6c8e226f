"""Time of each kernel of a step on a GPU, from NVRTC and from the extension, after a check.

    python benchmarks/gpu_step.py [--large] [--rounds 21] [--json FILE]

Prints median milliseconds for full random windows, the time of one read of the window at the
bandwidth of a copy, and the ratio of both. benchmarks/gpu_rows.py has whole steps.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

DEVICE = "cuda"
SCALED = [torch.float16, torch.float8_e4m3fn]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, *SCALED]
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
    torch.cuda._sleep(10**7)  # puts the host ahead, so that no launch makes the device wait
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


class Case:
    """A full window of random numbers in padded rows, and the operands of a step."""

    def __init__(self, m: int, d: int, dtype: torch.dtype):
        self.m, self.d, self.dtype = m, d, dtype
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        stride = -(-d * dtype.itemsize // 512) * 512 // dtype.itemsize
        self.G = torch.empty(m, stride, dtype=dtype, device=DEVICE)[:, :d]
        for row in self.G:
            row.copy_(torch.randn(d, device=DEVICE))
        self.row = torch.randn(d, device=DEVICE).to(dtype)
        self.x, self.scales, self.row_scales = self.row.to(self.real), None, None
        if dtype in SCALED:
            shape = m + 1, -(-d // BLOCK)
            scales = torch.exp2(torch.randint(-3, 3, shape, device=DEVICE).float())
            self.scales, self.row_scales = scales[:m], scales[m].clone()
            self.x *= self.row_scales.repeat_interleave(BLOCK)[:d]
        self.g = torch.randn(d, device=DEVICE)
        self.z = torch.randn(m, device=DEVICE, dtype=torch.float64)
        self.count = torch.tensor(5 * m + m // 3, device=DEVICE)
        one = torch.ones((), dtype=torch.int64, device=DEVICE)
        self.new = self.row, self.row_scales, self.count, one

    def rows(self, columns: slice) -> Tensor:
        """Some columns of the window, in float64."""
        G = self.G[:, columns].to(self.real).double()
        if self.scales is not None:
            blocks = torch.arange(self.d, device=DEVICE)[columns] // BLOCK
            G *= self.scales[:, blocks]
        return G

    def check(self, kernels: Any) -> None:
        """Compares the products with float64 in torch: Gx in full, and Gᵀz for some columns."""
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
        u = kernels.hinv_transposed_times(self.G, self.z, self.scales, *self.new)
        for columns in (slice(0, 5000), slice(max(0, self.d - 5000), self.d)):
            G = self.rows(columns)
            expected, size = self.z @ G, self.z.abs() @ G.abs()
            error = (u[columns].double() - expected).abs()
            allowed = 2.0**-24 * expected.abs() * (self.real == torch.float32)
            assert (error <= allowed + 1e-13 * size).all(), "hinv_transposed_times is wrong"

    def runs(self, kernels: Any) -> dict[str, Callable[[], object]]:
        window = self.G, self.z, self.scales
        found = {
            "times": lambda: kernels.hinv_times(self.G, self.x, self.count, self.scales),
            "transposed_times": lambda: kernels.hinv_transposed_times(*window, *self.new),
        }
        if self.scales is not None:
            found["round"] = lambda: kernels.hinv_round(self.g, self.G)
        return found

    @property
    def bytes(self) -> int:
        return self.m * self.d * self.dtype.itemsize


class Compressed:
    """The same with 1 % of the entries, for types without scales."""

    def __init__(self, m: int, d: int, dtype: torch.dtype):
        self.m, self.d, self.dtype = m, d, dtype
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        parts, self.kept = [], max(1, round(0.01 * min(BLOCK, d)))
        for start in range(0, d, BLOCK):
            size = min(BLOCK, d - start)
            some = torch.rand(m + 1, size, device=DEVICE).topk(max(1, round(0.01 * size))).indices
            parts.append(some.sort().values + start)
        columns = torch.cat(parts, 1).int()
        values = torch.randn(columns.shape, device=DEVICE).to(dtype)
        self.columns, self.row_columns = columns[:m], columns[m].clone()
        self.values, self.row = values[:m], values[m].clone()
        self.X = torch.randn(2, d, device=DEVICE, dtype=torch.float64)
        self.rest = torch.randn_like(self.X[0])
        self.error, self.new_error, self.g = torch.randn(3, d, device=DEVICE, dtype=self.real)
        self.y = torch.randn(m, device=DEVICE, dtype=torch.float64)
        self.count = torch.tensor(3 * m, device=DEVICE)
        one = torch.ones((), dtype=torch.int64, device=DEVICE)
        damp = torch.tensor(2.0, dtype=torch.float64, device=DEVICE)
        self.when = damp, self.count, one

    def times(self, kernels: Any) -> Tensor:
        new = self.count, self.row_columns, self.row
        return kernels.hinv_sparse_times(self.columns, self.values, self.X, *new)

    def replace(self, kernels: Any) -> Tensor:
        new = self.error, self.row_columns, self.row, self.new_error, self.rest
        return kernels.hinv_sparse_replace(self.columns, self.values, self.y, *new, *self.when)

    def check(self, kernels: Any) -> None:
        y, u = self.times(kernels), self.replace(kernels)  # which writes the new row
        values, indices = self.values.to(self.real).double(), self.columns.long()
        assert torch.equal(self.columns[int(self.count) % self.m], self.row_columns), "no new row"
        assert torch.equal(self.error, self.new_error), "no new error"
        for x, row in zip(self.X, y, strict=True):
            error = (row - (x[indices] * values).sum(1)).abs()
            assert (error <= 1e-13 * (x[indices] * values).abs().sum(1)).all(), "sparse_times"
        terms = (values * self.y[:, None]).flatten()
        rest = self.rest / self.when[0]
        expected = rest.index_add(0, indices.flatten(), terms)
        size = rest.abs().index_add(0, indices.flatten(), terms.abs())
        allowed = 2.0**-24 * expected.abs() * (self.real == torch.float32)
        error = (u.double() - expected).abs()
        assert (error <= allowed + 1e-13 * size).all(), "sparse_replace is wrong"

    def runs(self, kernels: Any) -> dict[str, Callable[[], object]]:
        largest = self.error, self.g, self.values, self.kept
        return {
            "largest": lambda: kernels.hinv_largest(*largest),
            "sparse_times, two": lambda: self.times(kernels),
            "sparse_replace": lambda: self.replace(kernels),
        }

    @property
    def bytes(self) -> int:
        return self.columns.numel() * (4 + self.dtype.itemsize)


class Exchange:
    """hinv_update, for random gradients or nearly parallel ones."""

    def __init__(self, m: int, parallel: bool):
        self.m, self.parallel, self.damp = m, parallel, 1e-5 if parallel else 1e-3
        G = torch.randn(m, m + 5, device=DEVICE, dtype=torch.float64)
        if parallel:
            G = 100 * (torch.randn_like(G[0]) + 1e-3 * G)
        G /= G.shape[1] ** 0.5
        self.K = G @ G.T
        self.k = self.K[m // 3].clone()
        self.count = torch.tensor(m + m // 3, device=DEVICE)
        self.P = torch.linalg.inv(self.K + m * self.damp * torch.eye(m, device=DEVICE).double())
        self.P = ((self.P + self.P.T) / 2).contiguous()
        self.out = torch.empty_like(self.k), self.k.new_empty(1), torch.ones_like(self.count)

    def check(self, kernels: Any) -> None:
        self.runs(kernels)["update"]()
        z, error, accepted = self.out
        A = self.K + self.m * self.damp * torch.eye(self.m, device=DEVICE).double()
        residual = A @ z
        residual[self.m // 3] -= 1
        units = (A[self.m // 3, self.m // 3] / A.diagonal()).sqrt()
        solved = 1e-6 if self.parallel else 1e-11
        assert (residual * units).abs().max() < solved, "hinv_update is wrong"
        assert accepted == 1 and 0 < error < solved, "hinv_update is wrong"

    def runs(self, kernels: Any) -> dict[str, Callable[[], object]]:
        damp = torch.tensor(self.damp, dtype=torch.float64, device=DEVICE)
        arguments = self.P, self.K, self.k, self.count, damp, 2e-5, *self.out
        return {"update": lambda: kernels.hinv_update(*arguments)}

    bytes = 0


def table_of_kernels(rounds: int, large: bool, file: Path | None) -> None:
    """Checks each kernel, then prints a row for each kernel and size. `file` gets the rows too."""
    import kernels

    start = time.perf_counter()
    ways: dict[str, Any] = {"NVRTC": kernels.Compiled(torch.device("cuda", 0))}
    print(f"NVRTC: {time.perf_counter() - start:.1f} s to compile or load")
    if importlib.util.find_spec("hinv_cuda"):
        ways["extension"] = importlib.import_module("hinv_cuda")
    for dtype, (way, interface) in itertools.product(DTYPES, ways.items()):
        for case in (Case(40, 9001, dtype), Case(7, 130, dtype)):
            case.check(interface)
        if dtype not in SCALED:
            Compressed(40, 9001, dtype).check(interface)
        Exchange(96, dtype == torch.float32).check(interface)
        print(f"{way}: {dtype} is right")

    source, target = torch.randn(2, 2**28, device=DEVICE)
    bandwidth = 8 * len(source) / milliseconds(lambda: target.copy_(source), rounds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ", end="")
    print(f"copy bandwidth {bandwidth / 1e6:.0f} GB/s\n")
    small = [(m, RESNET20, dtype) for m in (512, 1024) for dtype in DTYPES]
    cases: list[tuple[Any, tuple]] = [(Case, sizes) for sizes in small + large * LARGE]
    cases += [(Compressed, (1024, RESNET20, dtype)) for dtype in DTYPES if dtype not in SCALED]
    cases += [(Exchange, (m, parallel)) for m in (512, 1024, 4096) for parallel in (False, True)]
    print(
        "| kernel | sizes | bare read, ms | " + " | ".join(f"{w}, ms (ratio)" for w in ways) + " |"
    )
    print("|---|---|---|" + "---|" * len(ways))
    rows = []
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
            row = {"kernel": name, "sizes": label, "bare read": floor}
            rows.append(row | {way: t[name] for way, t in zip(ways, times, strict=True)})
            if file:
                file.write_text(json.dumps(rows, indent=1))
        del case
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed runs for each figure")
    parser.add_argument("--large", action="store_true", help="windows of up to 52 GB, too")
    parser.add_argument("--json", type=Path, help="write the milliseconds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    table_of_kernels(args.rounds, args.large, args.json)


if __name__ == "__main__":
    main()
