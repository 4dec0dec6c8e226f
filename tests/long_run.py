"""Long runs with faults, and many exchanges. Prints counts; see `python tests/long_run.py --help`.

training: a small model learns the digits with `MFAC`. Some gradients are NaN, None or huge, `damp`
changes, groups are added, and the optimizer is saved and loaded. The window must have the bits of
one that is rebuilt from a log of the gradients, F⁻¹x must be right, and memory must not grow after
the first part.
exchanges: P after 100, 1,000 and 10,000 exchanges against A⁻¹, for adversarial gradients.
"""

import argparse
import copy
import gc
import io
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from reference import dense_inverse
from sklearn.datasets import load_digits
from torch import nn

from optim import MFAC

DAMPS = (1e-2, 1e-3, 1e-1)


def resident():
    """Bytes of memory of this process, or 0 if the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def make(model, groups, ngrads, **options):
    """An optimizer of the first `groups` layers."""
    layers = [{"params": list(layer.parameters())} for layer in (model[0], model[2], model[4])]
    for layer in layers[1::2]:
        layer["weight_decay"] = 1e-4
    optimizer = MFAC(layers[:1], lr=1e-2, momentum=0.9, ngrads=ngrads, damp=DAMPS[0], **options)
    for layer in layers[1:groups]:
        optimizer.add_param_group(layer)
    return optimizer, layers


def train(steps=2000, ngrads=32, seed=0, check_every=50, **options):
    """Trains. Returns how often each fault occurred, and {step: (bytes, tensors)}."""
    generator = torch.Generator().manual_seed(seed)

    def chance(probability):
        return float(torch.rand((), generator=generator)) < probability

    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10)
    )
    groups = 1
    optimizer, layers = make(model, groups, ngrads, **options)
    log = []  # the rows that the window must have, with their length at that time
    names = ["nan", "none", "all_none", "damp", "group", "loaded", "huge", "checked"]
    counts, memory = dict.fromkeys(["steps", *names], 0), {}
    for step in range(steps):
        if groups < len(layers) and step >= steps // 8 * groups:
            optimizer.add_param_group(layers[groups])
            groups += 1
            counts["group"] += 1
        if chance(0.02):
            optimizer.damp = DAMPS[step % len(DAMPS)]
            counts["damp"] += 1
        if chance(0.01):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer, _ = make(model, groups, ngrads, **options)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            counts["loaded"] += 1
        rows = torch.randint(len(images), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        victim = parameters[int(torch.randint(len(parameters), (), generator=generator))]
        bad = chance(0.03)
        if chance(0.03):
            victim.grad = None
            counts["none"] += 1
        elif bad:
            victim.grad.view(-1)[0] = float("nan") if chance(0.5) else float("inf")
            counts["nan"] += 1
        elif chance(0.01):
            victim.grad.mul_(1e4)
            counts["huge"] += 1
        if chance(0.01):
            optimizer.zero_grad()
            counts["all_none"] += 1
        decays = [g["weight_decay"] for g in optimizer.param_groups for _ in g["params"]]
        row = torch.cat(
            [
                torch.zeros(p.numel()) if p.grad is None else p.grad.add(p, alpha=c).flatten()
                for p, c in zip(parameters, decays, strict=True)
            ]
        ).detach()
        before = copy.deepcopy([p.detach() for p in parameters])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            optimizer.step()
        counts["steps"] += 1
        moved = any(p.grad is not None for p in parameters) and bool(row.isfinite().all())
        if moved:
            log = [*log[-(ngrads - 1) :], row]
        same = all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
        assert same != moved, f"step {step}: weights moved: {not same}, expected: {moved}"
        assert all(bool(p.isfinite().all()) for p in parameters), f"step {step}"
        if step % check_every == 0 or step == steps - 1:
            counts["checked"] += 1
            check(optimizer.fisher, log, step)
            memory[step] = resident(), tensors()
    return counts, memory


def check(fisher, log, step):
    """Checks that the window has the rows of the log, and F⁻¹x against the dense inverse."""
    d = fisher.shape[0]
    expected = torch.zeros(fisher.num_grads, d)
    for age, row in enumerate(reversed(log)):
        expected[(fisher.count - 1 - age) % fisher.num_grads, : len(row)] = row
    expected = expected.to(fisher.dtype)
    G = torch.cat(list(fisher.window.tiles()), 1)
    assert torch.equal(G, expected.double()), f"step {step}: the window differs from the log"
    if d < 1500:  # with more weights the dense inverse is too slow
        x = torch.linspace(-1, 1, d, dtype=torch.float64)
        reference = dense_inverse(expected, fisher.damp) @ x
        error = (fisher.matvec(x) - reference).norm() / reference.norm()
        assert error < 2e-5, f"step {step}: off by {error:.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["training", "exchanges"])
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of training")
    args = parser.parse_args()
    if args.what == "exchanges":
        from test_numerics import ADVERSARIES, drifts

        for kind in ADVERSARIES:
            found, condition = drifts(kind, [100, 1000, 10_000])
            errors = ", ".join(f"{n:,}: {error:.1e}" for n, error in found.items())
            print(f"{kind}, condition {condition:.1e}; {errors}", flush=True)
        return
    for seed in range(args.seeds):
        for dtype in (torch.float32, torch.bfloat16):
            counts, memory = train(args.steps, seed=seed, window_dtype=dtype)
            print(seed, dtype, *(f"{name} {count}" for name, count in counts.items()))
            late = [m for step, m in memory.items() if step >= args.steps // 2]
            print(f"  from half-way: MiB {late[0][0] / 2**20:.1f} to {late[-1][0] / 2**20:.1f},")
            print(f"  tensors {late[0][1]} to {late[-1][1]}", flush=True)


if __name__ == "__main__":
    main()
