"""Time of a step on a GPU: MFAC on the parameters of ResNet-20, and `update_matvec` for large d.

    python benchmarks/gpu_rows.py [--json FILE]

Each row: median milliseconds of a step with fresh random gradients, eagerly and replayed as a CUDA
graph, and two reads of the window at the bandwidth of a copy. The window is full. Before times are
taken, a step's result is compared with float64, and 3m replays with as many eager steps.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import kernels
import models
from optim import MFAC, DynamicInverseFisher


def milliseconds(run, rounds=9, repeats=20):
    """Median over rounds of the time of a run, among `repeats` in a row."""
    for _ in range(5):
        run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / repeats * 1e3)
    return statistics.median(times)


def bandwidth():
    """Bytes a second of a copy, read and written."""
    source = torch.empty(2**29, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / milliseconds(lambda: target.copy_(source), 5, 10) * 1e3


def fill(fisher, d):
    """Makes the window full, of random gradients, K and P with it."""
    m = fisher.num_grads
    for _ in range(m):
        fisher.update(torch.randn(d, device="cuda"))


def optimizer(m, dtype, momentum=0.9, **options):
    model = models.build("resnet20", 10).cuda()
    params = list(model.parameters())
    sets = [[torch.randn_like(p) for p in params] for _ in range(16)]
    for p, g in zip(params, sets[0], strict=True):
        p.grad = g.clone()
    made = MFAC(params, lr=1e-6, ngrads=m, momentum=momentum, window_dtype=dtype, **options)
    fill(made.fisher, made.fisher.shape[0])
    following = itertools.cycle(sets)

    def step():
        torch._foreach_copy_([p.grad for p in params], next(following))
        made.step()

    return (
        params,
        made,
        step,
        lambda: torch._foreach_copy_([p.grad for p in params], next(following)),
    )


def captured(made):
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            made.step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        made.step()
    return graph


def launches(run):
    """Kernels, copies and fills that a run puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in found.events() if event.device_type.name == "CUDA"]
    return len(names), [name[:60] for name in names]


def check_step():
    """Relative error of a step against float64, for nearly parallel gradients too."""
    for dtype, noise in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn), (1.0, 1e-2)
    ):
        m, d = 96, 20_001
        fisher = DynamicInverseFisher(m, d, 1e-3, device="cuda", dtype=dtype)
        base = torch.randn(d, device="cuda")
        rows = []
        for _ in range(m + 40):
            g = (base + noise * torch.randn(d, device="cuda")) / d**0.5
            rows.append(fisher.window.entry(g)[0].values.double())
            u = fisher.update_matvec(g)
        G = torch.stack(rows[-m:])
        A = G @ G.T + m * 1e-3 * torch.eye(m, device="cuda", dtype=torch.float64)
        exact = (rows[-1] - G.T @ torch.linalg.solve(A, G @ rows[-1])) / 1e-3
        error = float((u - exact).norm() / exact.norm())
        print(f"  error {dtype} noise {noise}: {error:.1e}", "" if error < 2e-5 else "WRONG")


def check_graph(m=16, dtype=torch.float32, **options):
    """Whether 3m replays of a captured step give the bits of eager steps."""
    ends = []
    for replay in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5)
        ).cuda()
        lr = torch.tensor(1e-2, device="cuda")
        made = MFAC(
            model.parameters(),
            lr=lr,
            ngrads=m,
            momentum=0.9,
            weight_decay=1e-3,
            damp=1e-3,
            window_dtype=dtype,
            **options,
        )
        x, y = torch.randn(8, 20, device="cuda"), torch.randint(5, (8,), device="cuda")
        data = [torch.randn(8, 20, device="cuda") for _ in range(4 * m)]

        def train():
            made.zero_grad(set_to_none=False)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            made.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(3):
                x.copy_(data[i])
                train()
        torch.cuda.current_stream().wait_stream(side)
        if replay:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train()
        for i in range(3, 3 + 3 * m):
            x.copy_(data[i])
            lr.fill_(1e-2 / (1 + i))
            graph.replay() if replay else train()
        ends.append([p.detach().clone() for p in model.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    print(f"  graph = eager {dtype} {options}: {same}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    rate, rows = bandwidth(), {}
    print(torch.cuda.get_device_name(), torch.__version__, f"copy {rate / 1e12:.2f} TB/s")
    print("kernels:", kernels.cuda_kernels(torch.device("cuda")))
    check_step()
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        check_graph(dtype=dtype)
    check_graph(compress=0.1)
    for dtype, m in itertools.product(
        (torch.float32, torch.bfloat16, torch.float8_e4m3fn), (512, 1024)
    ):
        params, made, step, refresh = optimizer(m, dtype)
        floor = 2 * m * made.fisher.shape[0] * dtype.itemsize / rate * 1e3
        copying = milliseconds(refresh)
        eager = milliseconds(step) - copying
        only = milliseconds(lambda: made.fisher.update_matvec(made.flat.vector))
        graph = captured(made)

        def replayed():
            refresh()
            graph.replay()

        replay = milliseconds(replayed) - copying
        row = dict(eager=eager, update_matvec=only, graph=replay, floor=floor)
        rows[f"{dtype} m={m}"] = row
        print(
            f"m = {m}, {dtype}:",
            {k: round(v, 3) for k, v in row.items()},
            made.skipped_steps,
            flush=True,
        )
        del params, made, step, refresh, graph
    for momentum in (0.0, 0.9):
        params, made, step, _ = optimizer(512, torch.float32, momentum, weight_decay=1e-3)
        print(f"launches of MFAC.step, momentum {momentum}:", launches(made.step))
        del params, made, step
    for options in ({"compress": 0.01},):
        params, made, step, refresh = optimizer(1024, torch.float32, **options)
        copying = milliseconds(refresh)
        print(
            "compressed 1 %:",
            round(milliseconds(step) - copying, 3),
            round(milliseconds(lambda: made.fisher.update_matvec(made.flat.vector)), 3),
            flush=True,
        )
        del params, made, step
    if args.large:
        for m, d, dtype in (
            (1024, 11_000_000, torch.float32),
            (256, 25_600_000, torch.float32),
            (1024, 25_600_000, torch.bfloat16),
            (1024, 25_600_000, torch.float8_e4m3fn),
        ):
            torch.cuda.empty_cache()
            fisher = DynamicInverseFisher(m, d, device="cuda", dtype=dtype)
            for _ in range(m):
                fisher.update(torch.randn(d, device="cuda"))
            gradients = itertools.cycle([torch.randn(d, device="cuda") for _ in range(4)])
            ms = milliseconds(lambda: fisher.update_matvec(next(gradients)), 5, 3)
            floor = 2 * m * d * dtype.itemsize / rate * 1e3
            rows[f"{dtype} m={m} d={d}"] = dict(update_matvec=ms, floor=floor)
            print(
                f"m = {m}, d = {d}, {dtype}: {ms:.2f} ms, two reads {floor:.2f}, {ms / floor:.3f}",
                flush=True,
            )
            del fisher, gradients
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
