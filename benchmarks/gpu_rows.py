"""Time on a GPU: steps of MFAC, `update_matvec` for large d, the static inverse, a pruning.

    python benchmarks/gpu_rows.py [--large] [--json FILE]

First, results are compared with float64, and 3m replays of a captured step with 3m eager steps.

Rows of steps are for the parameters of ResNet-20 and a full window: median milliseconds with fresh
random gradients, eager and replayed as a CUDA graph, and the time of two reads of the window at the
bandwidth of a copy. Rows of the static inverse are for random gradients, on the GPU or in main
memory. Rows of a pruning are for ResNet-20 and random images: gradients, one batch after the other
and several at once, F⁻¹, and a level.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import kernels
import models
from optim import MFAC, DynamicInverseFisher
from prun import BlockedInverseFisher, MFACPruner, PagedInverseFisher

DEVICE = "cuda"
DTYPES = torch.float32, torch.bfloat16, torch.float8_e4m3fn
LARGE = [
    (1024, 11_000_000, torch.float32),
    (256, 25_600_000, torch.float32),
    (1024, 25_600_000, torch.bfloat16),
    (1024, 25_600_000, torch.float8_e4m3fn),
]


def milliseconds(run: Callable[[], object], rounds: int = 9, repeats: int = 20) -> float:
    """Median over rounds of the mean time of `repeats` runs in a row."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / repeats * 1e3)
    return statistics.median(times[1:])


def bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / milliseconds(lambda: target.copy_(source), 5, 10) * 1e3


def launches(run: Callable[[], object]) -> int:
    """The number of kernels, copies and fills that a run launches."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in found.events())


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph. The capture does not run it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def on_side_stream(run: Callable[[], object], times: int) -> None:
    """Warms up on another stream, which torch requires before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(side)


def check_results(m: int = 96, d: int = 20_001, damp: float = 1e-3) -> None:
    """Prints relative errors against float64, also for nearly parallel gradients."""
    for dtype, noise in itertools.product((*DTYPES, torch.float16), (1.0, 1e-2)):
        fisher = DynamicInverseFisher(m, d, damp, device=DEVICE, dtype=dtype)
        base, rows = torch.randn(d, device=DEVICE), []
        for _ in range(m + 40):
            g = (base + noise * torch.randn(d, device=DEVICE)) / d**0.5
            rows.append(fisher.window.entry(g)[0].vectors[0].double())
            u = fisher.update_matvec(g)
        G = torch.stack(rows[-m:])
        A = G @ G.T + m * damp * torch.eye(m, device=DEVICE, dtype=torch.float64)
        exact = (rows[-1] - G.T @ torch.linalg.solve(A, G @ rows[-1])) / damp
        error = float((u - exact).norm() / exact.norm())
        print(f"  error, {dtype}, noise {noise}: {error:.1e}", "" if error < 2e-5 else "WRONG")


def trained(replay: bool, m: int, **options: Any) -> list[torch.Tensor]:
    """The weights of a small model after 3 eager and 3m more steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(DEVICE)
    lr = torch.tensor(1e-2, device=DEVICE)
    options = {"momentum": 0.9, "weight_decay": 1e-3, "damp": 1e-3, "ngrads": m} | options
    optimizer = MFAC(model.parameters(), lr, **options)
    batches = torch.randn(3 * m, 8, 20, device=DEVICE)
    x, y = torch.randn(8, 20, device=DEVICE), torch.randint(5, (8,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    on_side_stream(step, 3)
    run = captured(step).replay if replay else step
    for i, batch in enumerate(batches):
        x.copy_(batch)
        lr.fill_(1e-2 / (1 + i))
        run()
    return [p.detach() for p in model.parameters()]


def row(m: int, dtype: torch.dtype, rate: float, **options: Any) -> dict[str, float]:
    """Times of a step of MFAC for the parameters of ResNet-20."""
    params = list(models.build("resnet20", 10).to(DEVICE).parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = MFAC(params, 1e-6, 0.9, ngrads=m, window_dtype=dtype, **options)
    fisher = optimizer.fisher
    d = fisher.shape[0]
    for _ in range(m):
        fisher.update(torch.randn(d, device=DEVICE) / d**0.5)
    sets = itertools.cycle([[torch.randn_like(p) / d**0.5 for p in params] for _ in range(16)])
    vectors = itertools.cycle(torch.randn(16, d, device=DEVICE) / d**0.5)

    def refresh() -> None:
        torch._foreach_copy_([p.grad for p in params], next(sets))

    def eager() -> None:
        refresh()
        optimizer.step()

    copying = milliseconds(refresh)
    times = {
        "eager": milliseconds(eager) - copying,
        "update_matvec": milliseconds(lambda: fisher.update_matvec(next(vectors))),
        "launches": launches(optimizer.step),
    }
    on_side_stream(optimizer.step, 3)
    graph = captured(optimizer.step)

    def replayed() -> None:
        refresh()
        graph.replay()

    times["graph"] = milliseconds(replayed) - copying
    times["two reads"] = 2 * m * d * dtype.itemsize / rate * 1e3
    assert optimizer.skipped_steps == optimizer.raised_steps == 0
    return times


def large_row(m: int, d: int, dtype: torch.dtype, rate: float) -> dict[str, float]:
    """Times of `update_matvec`."""
    fisher = DynamicInverseFisher(m, d, device=DEVICE, dtype=dtype)
    for _ in range(m):
        fisher.update(torch.randn(d, device=DEVICE) / d**0.5)
    vectors = itertools.cycle(torch.randn(3, d, device=DEVICE) / d**0.5)
    found = milliseconds(lambda: fisher.update_matvec(next(vectors)), 5, 6)
    reads = 2 * m * d * dtype.itemsize / rate * 1e3
    return {"update_matvec": found, "two reads": reads, "ratio": found / reads}


def static_row(
    build: Callable[[torch.Tensor], Any], G: torch.Tensor, drop: torch.Tensor
) -> dict[str, float]:
    """Times of F⁻¹ of gradients G (m, d) with its diagonal, and of a joint update."""
    inverse, w = build(G), torch.randn(G.shape[1], device=DEVICE)
    return {
        "with diagonal": milliseconds(lambda: build(G).diagonal(), 3, 1),
        "joint update": milliseconds(lambda: inverse.joint_update(drop, w), 3, 1),
    }


def static_rows(m: int = 1024, d: int = 270_896) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and times of ways to store m gradients. Joint updates remove half of d weights."""
    there = torch.randn(m, d, device=DEVICE) * torch.randn(d, device=DEVICE).exp() / 100
    drop, y = torch.randperm(d, device=DEVICE)[: d // 2], torch.randn(m, m, device=DEVICE)
    least = milliseconds(lambda: (there @ there.T, y @ there), 5, 3)
    yield "static, two bare float32 products", {"with diagonal": least}
    for place, G in (("on the GPU", there), ("in main memory", there.cpu())):
        for name, build in {
            "1 page": lambda G: PagedInverseFisher(G, device=DEVICE),
            "4 pages": lambda G: PagedInverseFisher(G, pages=4, device=DEVICE),
            "blocks of 128": lambda G: BlockedInverseFisher(G, 128, device=DEVICE),
        }.items():
            yield f"static, {name}, gradients {place}", static_row(build, G, drop)


def pruning_rows(m: int = 1024, size: int = 32) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and times of ways to prune half of ResNet-20 with the gradients of m batches."""
    images, labels = torch.randn(m, size, 3, 32, 32), torch.randint(10, (m, size))
    batches = list(zip(images.to(DEVICE), labels.to(DEVICE), strict=True))
    for options in ({"batches_at_once": 1}, {}, {"blocksize": 128, "rounds": 8}):
        model = models.build("resnet20", 10).to(DEVICE)
        for ngrads in (64, m):  # the first warms up
            pruner = MFACPruner(model, batches, ngrads=ngrads, damp="relative", **options)
            pruner.recompute()
        torch.cuda.synchronize()
        start = time.perf_counter()
        pruner.prune(0.5)
        torch.cuda.synchronize()
        seconds = {**pruner.seconds, "level": time.perf_counter() - start}
        yield f"pruning, {options or 'default'}", {key: 1e3 * s for key, s in seconds.items()}


def measured(rate: float, large: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and times of all rows."""
    cases = [(m, dtype, {}) for dtype in DTYPES for m in (512, 1024)]
    for m, dtype, options in (*cases, (1024, torch.float32, {"compress": 0.01})):
        yield f"m = {m}, {dtype} {options or ''}", row(m, dtype, rate, **options)
    yield from static_rows()
    yield from pruning_rows()
    for m, d, dtype in LARGE if large else []:
        torch.cuda.empty_cache()
        yield f"m = {m}, d = {d:,}, {dtype}", large_row(m, d, dtype, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="windows of up to 52 GB, too")
    parser.add_argument("--json", type=Path, help="write the rows")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    rate, rows = bandwidth(), {}
    print(torch.cuda.get_device_name(), torch.__version__, f"copy {rate / 1e12:.2f} TB/s")
    print("kernels:", type(kernels.cuda_kernels(torch.device(DEVICE))))
    check_results()
    for options in (*({"window_dtype": dtype} for dtype in DTYPES), {"compress": 0.1}):
        ends = trained(False, 16, **options), trained(True, 16, **options)
        same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        print(f"  48 replays give the bits of eager steps, {options}: {same}")
    for name, found in measured(rate, args.large):
        rows[name] = found
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
        if args.json:  # after each row, as the next one may fail
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
