"""Time and memory of the static inverse Fisher: F⁻¹ with its diagonal from m gradients at once.

    python benchmarks/static_fisher.py [--json FILE]

The baselines, in float32: the row-at-a-time recursion of the paper (tests/reference.py), and the
bare matrix products that are needed, 2·m²·d operations at the rate of a large float32 product
measured in the same run. Contestants take turns; each figure is the median over `--rounds`, of the
slow ones a single run. A level of pruning is in seconds of the processor. "Peak" is resident
memory in a process of its own, less what it had before.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads disturb each other
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
from optim_step import environment
from reference import recursion_diagonal

from blocks import BATCH
from masks import lowest
from prun import BlockedInverseFisher, PagedInverseFisher

DAMP = 1e-5
BLOCK = 128


def random_gradients(m: int, d: int) -> torch.Tensor:
    """With a common part, and weights of different gradients."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(d, generator=generator).exp()
    return 0.01 * (0.1 + torch.randn(m, d, generator=generator)) * spread


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def exact_diagonal(G: torch.Tensor) -> torch.Tensor:
    """diag(F⁻¹) with everything in float64."""
    A = DAMP * len(G) * torch.eye(len(G), dtype=torch.float64)
    for tile in G.split(4096, 1):
        A += tile.double() @ tile.double().T
    L = torch.linalg.cholesky(A)
    parts = [torch.linalg.solve_triangular(L, t.double(), upper=False) for t in G.split(4096, 1)]
    return (1 - torch.cat([W.square().sum(0) for W in parts])) / DAMP


def full(G: torch.Tensor, rounds: int) -> dict[str, float]:
    """Build and diagonal with several pages, in units of the baselines."""
    m, d = G.shape
    a = torch.randn(m, 2**14)
    times = {1: [], 3: [], 16: []}
    product, diagonals = [], {}
    for i in range(rounds + 1):
        rate = min(seconds(lambda: a @ a.T) for _ in range(3)) / 2**14
        for pages, measured in times.items():
            start = time.perf_counter()
            diagonals[pages] = PagedInverseFisher(G, DAMP, pages=pages).diagonal()
            if i > 0:  # the first round warms up
                measured.append(time.perf_counter() - start)
        product.append(rate * d)  # 2·m²·d operations
    medians = {pages: statistics.median(measured) for pages, measured in times.items()}
    by_recursion = seconds(lambda: recursion_diagonal(G, DAMP, dtype=torch.float32))
    exact = exact_diagonal(G)

    def error(x: torch.Tensor, reference: torch.Tensor) -> float:
        return float((x / reference - 1).abs().max())

    return {
        "recursion s": by_recursion,
        "bare products s": statistics.median(product[1:]),
        "1 page s": medians[1],
        "3 pages s": medians[3],
        "16 pages s": medians[16],
        "recursion / 1 page": by_recursion / medians[1],
        "1 page / bare products": medians[1] / statistics.median(product[1:]),
        "3 pages / 1 page": medians[3] / medians[1],
        "16 pages / 1 page": medians[16] / medians[1],
        "relative error against float64": error(diagonals[1], exact),
        "relative difference of 16 pages": error(diagonals[16], diagonals[1]),
    }


def blocked(G: torch.Tensor, rounds: int, sample: int) -> dict[str, float]:
    """Block diagonal; the recursion is run for `sample` blocks and scaled to all."""
    count = -(-G.shape[1] // BLOCK)
    blocks = G.split(BLOCK, 1)[:sample]
    run = [recursion_diagonal(blocks[0], DAMP, dtype=torch.float32)]  # warms up
    by_recursion = seconds(
        lambda: run.extend(recursion_diagonal(b, DAMP, dtype=torch.float32) for b in blocks)
    )
    by_recursion *= count / len(blocks)
    times = []
    for _ in range(rounds + 1):
        times.append(seconds(lambda: BlockedInverseFisher(G, BLOCK, DAMP).diagonal()))
    return {
        f"recursion of {count} blocks, from {len(blocks)}, s": by_recursion,
        "blocked s": statistics.median(times[1:]),
        "recursion / blocked": by_recursion / statistics.median(times[1:]),
    }


def levels(G: torch.Tensor, rounds: int) -> dict[str, float]:
    """Saliencies, choice and joint update of a level, in seconds of the processor, for a tenth and
    for half of the weights at once."""
    figures, w = {}, torch.randn(G.shape[1], generator=torch.Generator().manual_seed(1)).double()
    for name, fisher in (
        ("full", PagedInverseFisher(G, DAMP)),
        (f"blocks of {BLOCK}", BlockedInverseFisher(G, BLOCK, DAMP)),
    ):
        fisher.diagonal()
        for share in (0.1, 0.5):

            def prune(fisher=fisher, share=share) -> None:
                saliency = w.square() / (2 * fisher.diagonal())
                among = torch.ones_like(w, dtype=torch.bool)
                dropped = lowest(saliency.float(), among, round(share * len(w)))
                fisher.joint_update(dropped.nonzero()[:, 0], w)

            times = [seconds(prune, time.process_time) for _ in range(rounds + 1)]
            figures[f"{name}, {share:.0%} of the weights, s"] = statistics.median(times[1:])
    return figures


# --- memory: each in a process of its own ---------------------------------------------------------


def peak_bytes() -> int:
    """Most memory resident so far. (`resource` would start from the peak of the parent process.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def accumulate(m: int, d: int) -> dict[str, float]:
    """Gradients that come `BATCH` at a time in the same memory."""

    def gradients() -> Iterator[torch.Tensor]:
        batch = torch.empty(BATCH, d)
        for _ in range(0, m, BATCH):
            yield batch.normal_()

    BlockedInverseFisher(iter(torch.randn(2, BLOCK, BLOCK)), BLOCK, DAMP).diagonal()  # loads code
    before = peak_bytes()
    BlockedInverseFisher(gradients(), BLOCK, DAMP).diagonal()
    bound = 8 * d * BLOCK + 4 * d * BATCH
    peak = peak_bytes() - before
    return {
        "peak MB": peak / 1e6,
        "8·d·b + batch": bound / 1e6,
        "peak / that": peak / bound,
    }


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grads", type=Path, help="a .npy file with gradients (m, d), else random")
    parser.add_argument("--ngrads", type=int, default=1024, help="m, of random gradients")
    parser.add_argument("--dim", type=int, default=270_896, help="d, of random gradients")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each contestant")
    parser.add_argument("--blocks", type=int, default=100, help="blocks that the recursion does")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(accumulate(*map(int, args.child))))
        return
    if args.grads:
        G = torch.from_numpy(np.load(args.grads))
    else:
        G = random_gradients(args.ngrads, args.dim)
    m, d = G.shape
    result = {"environment": environment(), "rounds": args.rounds, "m": m, "d": d, "b": BLOCK}
    print("  ".join(f"{k}: {v}" for k, v in result["environment"].items()))
    print(f"m = {m}, d = {d}, b = {BLOCK}, float32 gradients {args.grads or '(random)'}")
    for title, part in {
        "full": lambda: full(G, args.rounds),
        "blocked": lambda: blocked(G, args.rounds, args.blocks),
        "a level": lambda: levels(G, args.rounds),
        "blocked, accumulated": lambda: in_a_process(str(m), str(d)),
    }.items():
        result[title] = figures = part()
        print(f"\n{title}")
        for name, value in figures.items():
            print(f"  {name:48s} {value:12.4g}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
