"""Time of one exchange with one preconditioned gradient (`update_matvec`), and of a step of MFAC.

    python benchmarks/optim_step.py [--json FILE]

Three questions, each answered by the median of the ratios in `--rounds` rounds, in which the
contestants take turns:

1. How far from the floor, one `G @ x` and one `z @ G` on the same window? And the paper's way?
2. How does the time grow with m? (m² would be 16 from 1024 to 4096, m³ 64.)
3. What does `MFAC.step` add to `update_matvec`, for the parameters of ResNet-20?
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads disturb each other
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import models
from optim import MFAC, DynamicInverseFisher


def environment() -> dict[str, str | int]:
    """What a timing depends on."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")), processor)
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def timed(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each in every round; they take turns, and the first round is not counted."""
    seconds = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if i > 0:
                seconds[name].append(clock() - start)
    return seconds


def medians(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    return {name: statistics.median(x) for name, x in timed(contestants, rounds).items()}


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median over the rounds of a / b: steadier than a ratio of medians on a noisy machine."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def filled(m: int, d: int, coefficients: str) -> DynamicInverseFisher:
    """A window full of gradients, without the time that m exchanges would take."""
    fisher = DynamicInverseFisher(m, d, coefficients=coefficients)
    G = torch.randn(m, d)
    state = {"K": (G @ G.T).double(), "damp": fisher.damp}
    fisher.load_state_dict({"window": [G], "count": m, "exact": False, "coefficients": state})
    return fisher


def floor_and_steps(rounds: int) -> dict[str, list[float]]:
    m = 1024
    model = models.build("resnet20", 10)
    d = sum(p.numel() for p in model.parameters())
    gradients = iter(torch.randn(3 * (rounds + 1), d))
    fisher, paper = filled(m, d, "incremental"), filled(m, d, "paper")
    optimizer = MFAC(model.parameters(), ngrads=1, lr=0.0)
    optimizer.fisher = fisher
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    sizes = [p.numel() for p in model.parameters()]

    def step():
        for p, g in zip(model.parameters(), next(gradients).split(sizes), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()

    G, z = fisher.windows[0].G, torch.randn(m)
    x = torch.randn(d)
    return timed(
        {
            "floor": lambda: (G @ x, z @ G),
            "incremental": lambda: fisher.update_matvec(next(gradients)),
            "MFAC.step": step,
            "paper": lambda: paper.update_matvec(next(gradients)),
        },
        rounds,
    )


def growth(rounds: int) -> dict[str, list[float]]:
    d = 20_000
    gradients = iter(torch.randn(4 * (rounds + 1), d))

    def exchange(fisher: DynamicInverseFisher) -> Callable[[], object]:
        return lambda: fisher.update_matvec(next(gradients))

    times = {}
    for way, repetitions in (("incremental", rounds), ("paper", min(rounds, 3))):
        contestants = {f"{way}, m = {m}": exchange(filled(m, d, way)) for m in (1024, 4096)}
        times |= timed(contestants, repetitions)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed runs of each contestant")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    result = {"environment": environment(), "rounds": args.rounds}
    print("  ".join(f"{k}: {v}" for k, v in result["environment"].items()))

    result["m = 1024, d = 272474"] = times = floor_and_steps(args.rounds)
    print("\nm = 1024, d = 272,474, float32        median ms   of the floor")
    for name, seconds in times.items():
        ratio = median_ratio(seconds, times["floor"])
        print(f"  {name:34s} {1e3 * statistics.median(seconds):10.1f}   {ratio:.2f}")
    ratio = median_ratio(times["MFAC.step"], times["incremental"])
    print(f"  MFAC.step is {ratio:.3f} of update_matvec")

    result["d = 20000"] = times = growth(args.rounds)
    print("\nd = 20,000                            median ms   m = 4096 / m = 1024")
    for way in ("incremental", "paper"):
        small, large = times[f"{way}, m = 1024"], times[f"{way}, m = 4096"]
        print(f"  {way + ', m = 1024':34s} {1e3 * statistics.median(small):10.1f}")
        ratio = median_ratio(large, small)
        print(f"  {way + ', m = 4096':34s} {1e3 * statistics.median(large):10.1f}   {ratio:.1f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
