"""A small part of what tests/long_run.py runs, and that other ways to the same numbers agree."""

import pytest
import torch
from long_run import train

from optim import DynamicInverseFisher
from prun import BlockedInverseFisher, PagedInverseFisher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_leave_the_window_of_the_log_and_memory_is_flat(dtype):
    counts, memory = train(steps=240, ngrads=8, check_every=60, window_dtype=dtype)
    assert counts["steps"] == 240
    assert all(counts.values()), f"not all faults came: {counts}"
    halfway, *_, last = (found for step, found in memory.items() if step >= 120)
    assert last[1] <= halfway[1]  # tensors
    assert last[0] <= halfway[0] + 2**26  # the dense inverses take 2**24; more steps tell more


# --- one result, many ways ------------------------------------------------------------------------

M, D = 48, 6000


@pytest.fixture(scope="module")
def ordinary():
    """Gradients with a common part and weights of different scales, as in a network."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(M, D, generator=generator) + torch.randn(D, generator=generator)
    return 0.1 * G * torch.randn(D, generator=generator).exp()


def with_threads(number, call):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def window(G, shards):
    fisher = DynamicInverseFisher(M, D, 1e-4, shards=["cpu"] * shards)
    for g in G[:-1]:
        fisher.update(g)
    return fisher.update_matvec(G[-1]), fisher.matvec(G[0]), fisher.diagonal()


def static(fisher):
    x = torch.linspace(-1, 1, D, dtype=torch.float64)
    return fisher.matvec(x), fisher.diagonal(), fisher.joint_update(range(0, D, 3), x)


WAYS = {
    # How it is made from G and a number; the numbers; and how far they may be apart, with one
    # thread and between one and two.
    "pages": (lambda G, n: static(PagedInverseFisher(G, 1e-4, pages=n)), [1, 7, 100, D], 1e-7),
    "perbatch": (
        lambda G, n: static(BlockedInverseFisher(G, 16, 1e-4, perbatch=n)),
        [1, 5, 64, 1000],
        2e-6,
    ),
    "shards": (window, [1, 2, 7], 2e-6),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_the_division_of_the_work_does_not_matter(way, threads, ordinary):
    """With any number of threads against the first with one."""
    make, numbers, tolerance = WAYS[way]
    expected = with_threads(1, lambda: make(ordinary, numbers[0]))
    for n in numbers:
        for a, b in zip(
            with_threads(threads, lambda n=n: make(ordinary, n)), expected, strict=True
        ):
            assert (a - b).norm() <= tolerance * b.norm()
