"""Time of one exchange with one preconditioned gradient (`update_matvec`), and of a step of MFAC.

    python benchmarks/optim_step.py [--rounds 21] [--json FILE]

Each question is answered by the median of the ratios in `--rounds` rounds, in which the contestants
take turns in the same process:

1. How far is `update_matvec` from the floor, one `G @ x` and one `z @ G` on the same window? What
   does `MFAC.step` add to it, for the parameters of ResNet-20?
2. How does the time grow with m? (m² would be 16 from 1024 to 4096, m³ 64.)
3. How long does a step keep the host, where there is next to nothing to compute, against
   `torch.optim.Adam(foreach=True)`?
4. How many kernels would a step launch? Operations are counted as they are dispatched, views and
   the like not, a foreach call as one for each type of its tensors and each 100 of them. Without
   the kernels of this project, which replace several operations by one.
5. Which part of the steps of an ordinary training falls back to float64, and what does a window of
   8 bits take?
"""

import argparse
import collections
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads disturb each other
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
from optim import MFAC, DynamicInverseFisher, window_bytes

M, D = 1024, 272_474  # of ResNet-20


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


def fill(fisher: DynamicInverseFisher) -> DynamicInverseFisher:
    """Fills the window with gradients, without the time that m exchanges would take."""
    state, m, d = fisher.state_dict(), fisher.num_grads, fisher.shape[0]
    G = torch.randn(m, d)
    K = (G @ G.T).double()
    A = K + m * fisher.damp * torch.eye(m, dtype=torch.float64)
    P = torch.cholesky_inverse(torch.linalg.cholesky(A))
    fisher.load_state_dict({**state, "window": [{"G": G}], "count": m, "K": K, "P": P})
    return fisher


def filled(m: int, d: int) -> DynamicInverseFisher:
    return fill(DynamicInverseFisher(m, d))


def resnet20(ngrads: int) -> tuple[list[nn.Parameter], MFAC]:
    """Parameters with gradients, and their optimizer."""
    params = list(models.build("resnet20", 10).parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    return params, MFAC(params, ngrads=ngrads, lr=0.0, momentum=0.9)


def floor_and_steps(rounds: int) -> dict[str, list[float]]:
    gradients = iter(torch.randn(rounds + 1, D))
    params, optimizer = resnet20(M)
    of_params = iter([[torch.randn_like(p) for p in params] for _ in range(rounds + 1)])
    fisher = fill(optimizer.fisher)  # one window for all, since memory differs
    G, z, x = fisher.window.blocks[0].G, torch.randn(M), torch.randn(D)

    def step() -> None:
        for p, g in zip(params, next(of_params), strict=True):
            p.grad = g
        optimizer.step()

    return timed(
        {
            "G @ x and z @ G": lambda: (G @ x, z @ G),
            "update_matvec": lambda: fisher.update_matvec(next(gradients)),
            "MFAC.step": step,
        },
        rounds,
    )


def growth(rounds: int) -> dict[str, list[float]]:
    d = 20_000
    gradients = iter(torch.randn(2 * (rounds + 1), d))
    fishers = {f"update_matvec, m = {m}": filled(m, d) for m in (1024, 4096)}
    return timed(
        {name: lambda f=f: f.update_matvec(next(gradients)) for name, f in fishers.items()},
        rounds,
    )


def host(rounds: int) -> dict[str, list[float]]:
    """Of 100 steps, each with other gradients, which are there before."""
    contestants = {}
    for count in (65, 1):
        for name, make in {
            "MFAC": lambda params: MFAC(params, ngrads=8, momentum=0.9),
            "Adam": lambda params: torch.optim.Adam(params, foreach=True),
        }.items():
            params = [nn.Parameter(torch.randn(100)) for _ in range(count)]
            sets = [[torch.randn(100) for _ in params] for _ in range(100)]
            contestants[f"{name}, {count} x 100"] = functools.partial(
                take_steps, make(params), params, sets
            )
    return timed(contestants, rounds)


def take_steps(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], sets: list[list[torch.Tensor]]
) -> None:
    for gradients in sets:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()


VIEWS = {"as_strided", "view", "_unsafe_view", "reshape", "alias", "detach", "diagonal", "t"}
VIEWS |= {"slice", "select", "split", "split_with_sizes", "unsqueeze", "expand", "permute"}
VIEWS |= {"transpose", "unbind", "narrow", "empty", "empty_like", "new_empty", "empty_strided"}
VIEWS |= {"_local_scalar_dense", "unfold", "squeeze", "lift_fresh", "is_pinned", "resize_"}


class Launches(TorchDispatchMode):
    """Counts the operations that would be kernels."""

    def __init__(self):
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name.startswith("_foreach"):
            self.counts[name] += len({x.dtype for x in args[0]}) * -(-len(args[0]) // 100)
        elif name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches() -> dict[str, int]:
    """Operations of a step by name, in a full window of the parameters of ResNet-20."""
    params, optimizer = resnet20(8)
    sets = [[torch.randn_like(p) for p in params] for _ in range(11)]
    take_steps(optimizer, params, sets[:10])
    with Launches() as mode:
        take_steps(optimizer, params, sets[10:])
    return dict(mode.counts.most_common())


def digits_steps(steps: int, m: int = 256) -> Iterator[MFAC]:
    """The optimizer after each step of a small CNN on the handwritten digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images).float().view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    optimizer = MFAC(model.parameters(), lr=1e-3, momentum=0.9, ngrads=m)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        yield optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed runs of each contestant")
    parser.add_argument("--steps", type=int, default=600, help="of training, for the float64 share")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    result = {"environment": environment(), "rounds": args.rounds, "seconds": {}, "ratios": {}}
    print("  ".join(f"{k}: {v}" for k, v in result["environment"].items()))

    def show(title: str, times: dict[str, list[float]], *ratios: tuple[str, str]) -> None:
        print(f"\n{title}")
        for name, seconds in times.items():
            print(f"  {name:34s} {1e3 * statistics.median(seconds):10.2f} ms")
        for a, b in ratios:
            result["ratios"][f"{a} / {b}"] = ratio = median_ratio(times[a], times[b])
            print(f"  {a} / {b}: {ratio:.3f}")
        result["seconds"] |= times

    names = "G @ x and z @ G", "update_matvec", "MFAC.step"
    title = f"m = {M:,}, d = {D:,}, float32"
    show(title, floor_and_steps(args.rounds), names[1::-1], names[:0:-1])
    names = "update_matvec, m = 4096", "update_matvec, m = 1024"
    show("d = 20,000", growth(args.rounds), names)
    pairs = [("MFAC, 65 x 100", "Adam, 65 x 100"), ("MFAC, 1 x 100", "Adam, 1 x 100")]
    show("m = 8, parameters of 100 numbers, 100 steps", host(args.rounds), *pairs)

    result["launches"] = counts = launches()
    print(f"\nA step would launch {sum(counts.values())} kernels: {counts}")
    exact = [optimizer.fisher.precision.exact for optimizer in digits_steps(args.steps)]
    result["float64"] = sum(exact) / len(exact)
    print(f"Steps in float64: {result['float64']:.1%} of {len(exact)}")
    sizes = [window_bytes(M, D, dtype=x) for x in (torch.float8_e4m3fn, torch.float32)]
    result["float8"] = sizes[0] / sizes[1]
    print(f"A window in float8 takes {result['float8']:.3f} of one in float32")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
