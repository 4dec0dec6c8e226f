"""The static inverse Fisher, paged and blocked: what the common contract does not cover."""

import os
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dense_fisher, independent_removal, joint_removal

import blocks
import memory
import prun
from blocks import float32_sums
from pages import Pages
from prun import BlockedInverseFisher, PagedInverseFisher, inverse_bytes


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def relative_error(x, reference):
    return float((x.double() - reference).norm() / reference.norm())


def diagonal_by_woodbury(G, damp):
    """diag(F⁻¹) all in float64, where a (d, d) matrix is too large."""
    G = G.double()
    L = torch.linalg.cholesky(len(G) * damp * torch.eye(len(G), dtype=torch.float64) + G @ G.T)
    W = torch.linalg.solve_triangular(L, G, upper=False)
    return (1 - W.square().sum(0)) / damp


def block_diagonal(F, size):
    block = torch.arange(len(F)) // size
    return F * (block[:, None] == block)


# --- precision ------------------------------------------------------------------------------------


def test_ordinary_gradients_take_the_fast_way_within_1e_5():
    G = 0.05 * torch.randn(1, 30_000) + torch.randn(300, 30_000) * torch.randn(30_000).exp()
    fisher = PagedInverseFisher(G, 1e-4, pages=3)
    error = fisher.diagonal() / diagonal_by_woodbury(G, 1e-4) - 1
    assert error.abs().max() < 1e-5
    assert fisher.dtype == torch.float32


def test_products_of_ordinary_gradients_take_the_fast_way_within_1e_5():
    G = 0.05 * torch.randn(1, 700) + torch.randn(50, 700) * torch.randn(700).exp()
    fisher, x = PagedInverseFisher(G, 1e-3), torch.randn(700, dtype=torch.float64)
    inverse = torch.linalg.inv(dense_fisher(G, 1e-3))
    for some in (x, x + 0.1 * G.sum(0)):
        assert relative_error(fisher.matvec(some), inverse @ some) < 1e-5
    assert fisher.dtype == torch.float32


@pytest.mark.parametrize("m", [8, 64])
@pytest.mark.parametrize("norm", [1.0, 100.0])
def test_nearly_parallel_gradients_are_resolved_in_float64(m, norm):
    d = 30_000
    G = torch.randn(1, d) + 1e-3 * torch.randn(m, d)
    G *= norm / d**0.5
    fisher = PagedInverseFisher(G, 1e-5)
    error = fisher.diagonal() / diagonal_by_woodbury(G, 1e-5) - 1
    assert error.abs().max() < 1e-5
    x = torch.randn(d, dtype=torch.float64)
    A = m * 1e-5 * torch.eye(m, dtype=torch.float64) + G.double() @ G.double().T
    reference = (x - G.double().T @ torch.linalg.solve(A, G.double() @ x)) / 1e-5
    assert relative_error(fisher.matvec(x), reference) < 1e-5


def test_an_update_with_nearly_parallel_gradients_is_resolved_in_float64():
    G, w = torch.ones(8, 64) + 1e-3 * torch.randn(8, 64), torch.randn(64)
    expected = PagedInverseFisher(G.double(), 1e-5).joint_update(range(5), w.double())
    assert relative_error(PagedInverseFisher(G, 1e-5).joint_update(range(5), w), expected) < 1e-5


def test_a_weight_whose_inverse_diagonal_cancels_is_resolved_in_float64():
    """One weight gets nearly all of the gradients: 1 − c is about 1e-4."""
    G = torch.randn(20, 5_000)
    G[:, 7] *= 1e3
    fisher = PagedInverseFisher(G, 1.0)
    error = fisher.diagonal() / diagonal_by_woodbury(G, 1.0) - 1
    assert fisher.dtype == torch.float64
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_any_precision_are_taken_as_they_are(dtype):
    G = torch.randn(10, 60, dtype=torch.float64).to(dtype)
    reference = torch.linalg.inv(dense_fisher(G, 1e-3))
    for fisher in (PagedInverseFisher(G, 1e-3), BlockedInverseFisher(G, 60, 1e-3)):
        assert relative_error(fisher.diagonal(), reference.diagonal()) < 1e-6
    whole = BlockedInverseFisher(iter(G), 60, 1e-3)
    assert relative_error(whole.diagonal(), reference.diagonal()) < 1e-9


def test_the_precision_of_float32_products_is_the_callers_affair():
    """The caller's switches for TF32, bfloat16 and autocast neither matter nor change."""
    G = torch.randn(256, 2048)
    makes = (PagedInverseFisher, lambda G, damp: BlockedInverseFisher(G, 64, damp))
    exact = [make(G.double(), 1e-2).diagonal() for make in makes]
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = [make(G, 1e-2).diagonal() for make in makes]
        assert torch.get_float32_matmul_precision() == "medium"
        assert makes[0](G, 1e-2).dtype == torch.float64  # no switch but that of the type
    finally:
        torch.set_float32_matmul_precision(found)
    torch.testing.assert_close(results, exact, rtol=1e-12, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [make(G, 1e-2).diagonal() for make in makes]
    torch.testing.assert_close(results, exact, rtol=1e-5, atol=0)


def test_damping_that_cannot_be_resolved_is_refused_with_a_value_that_can():
    G = 1e6 * torch.randn(1, 300).expand(5, 300)
    for make in (PagedInverseFisher, lambda G, damp: BlockedInverseFisher(iter(G), 4, damp)):
        with pytest.raises(ValueError, match="too small") as refusal:
            make(G, 1e-8).diagonal()
        damp = float(re.search(r"damp = (\S+) is large enough", str(refusal.value))[1])
        fisher = make(G, damp)
        error = fisher.diagonal() - 1 / damp  # nearly all directions are not in G
        assert (error <= 0).all()
        fisher.matvec(G[0])  # this one is


@pytest.mark.parametrize("form", ["full", "blocks", "large blocks"])
def test_damping_lowered_far_gives_right_numbers_or_a_true_sentence(form):
    """Blocks of stored gradients may have been summed in float32, which was enough at first."""
    G = torch.randn(40, 32) + 3

    def build(damp):
        return PagedInverseFisher(G, damp) if form == "full" else BlockedInverseFisher(G, b, damp)

    b = {"blocks": 32, "large blocks": 48}.get(form)
    G = torch.randn(40, b or 96) + 3
    fisher = build(1e2)
    fisher.damp = 1e-9
    exact = torch.linalg.inv(dense_fisher(G, 1e-9))
    if form == "blocks":
        with pytest.raises(ValueError, match="damp = 1e-09 is too small for sums of float32"):
            fisher.diagonal()
        fisher = build(1e-9)
    torch.testing.assert_close(fisher.diagonal(), exact.diagonal(), rtol=1e-5, atol=0)
    fisher.damp = 1e2
    torch.testing.assert_close(fisher.diagonal(), build(1e2).diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("damp", [-1.0, 1e-290])
def test_a_damping_that_is_refused_changes_nothing(damp):
    fisher = PagedInverseFisher(torch.randn(9).expand(4, 9), 1e-2)
    before = fisher.diagonal()
    with pytest.raises(ValueError, match=r"damp"):
        fisher.damp = damp
    assert fisher.damp == 1e-2 and torch.equal(fisher.diagonal(), before)


def test_the_default_device_of_torch_does_not_matter():
    """As after torch.set_default_device("cuda"), with gradients on the CPU."""
    G, w = torch.randn(12, 60), torch.randn(60)
    makes = [
        lambda: PagedInverseFisher(G, 1e-3, pages=3),
        lambda: BlockedInverseFisher(iter(G), 7, 1e-3),
        lambda: BlockedInverseFisher(G, 7, 1e-3),
        lambda: BlockedInverseFisher(G.double(), 25, 1e-3),
    ]

    def results():
        for make in makes:
            fisher = make()
            yield from (fisher.diagonal(), fisher.matvec(w))
            yield from (fisher.joint_update([3, 40], w), fisher.independent_update([3, 40], w))

    expected = list(results())
    with torch.device("meta"):
        found = list(results())
    assert all(map(torch.equal, found, expected))


def watch_float64_sums(monkeypatch):
    """A list of the widths of all gradients that blocks will sum in float64."""
    widths, add_block_sums_ = [], blocks.add_block_sums_

    def watched(sums, G):
        widths.append(G.shape[1])
        add_block_sums_(sums, G)

    monkeypatch.setattr(blocks, "add_block_sums_", watched)
    return widths


def block_errors(fisher, G, damp, size):
    """Of the diagonal and of products with gradients, relative to the dense inverse."""
    inverse = torch.linalg.inv(block_diagonal(dense_fisher(G, damp), size))
    products = [relative_error(fisher.matvec(g), inverse @ g) for g in G[:5].double()]
    return float((fisher.diagonal() / inverse.diagonal() - 1).abs().max()), max(products)


@pytest.mark.parametrize("m", [300, 500, 1000])
@pytest.mark.parametrize("kind", ["plain", "common part", "positive"])
def test_blocks_of_ordinary_gradients_take_the_fast_way_within_1e_5(m, kind, monkeypatch):
    G = torch.randn(m, 256) * torch.randn(256).exp()
    if kind == "common part":
        G += 0.5 * torch.randn(256)
    elif kind == "positive":
        G = G.abs()
    widths = watch_float64_sums(monkeypatch)
    fisher = BlockedInverseFisher(G, 32, 0.1)
    assert max(block_errors(fisher, G, 0.1, 32)) < 1e-5
    assert not widths


@pytest.mark.parametrize("kind", ["two alike", "one huge gradient", "nearly parallel", "of 1e20"])
def test_blocks_that_float32_does_not_resolve_are_summed_in_float64(kind, monkeypatch):
    """With others of their batch. From sums of float32 alone, the diagonal would be off by more
    than 1e-5."""
    G, size, damp = torch.randn(200, 96), 16, 1e-3
    lost = torch.zeros(6, dtype=torch.bool).index_fill_(0, torch.tensor([1, 4]), True)
    block = G.view(200, 6, 16)[:, lost]
    if kind == "two alike":
        block[:, :, 3] = block[:, :, 8] + 1e-2 * block[:, :, 3]
    elif kind == "one huge gradient":
        block[7] *= 1e3
    elif kind == "nearly parallel":
        block = torch.randn(1, 2, 16) + 1e-2 * block
    elif kind == "of 1e20":  # squares overflow
        block *= 1e20
    G.view(200, 6, 16)[:, lost] = block
    sums = float32_sums(G[:, lost.repeat_interleave(16)], size)[0]
    reference = torch.linalg.inv(block_diagonal(dense_fisher(G, damp), size)).diagonal().view(6, 16)
    if kind != "of 1e20":
        H = sums / 200 + damp * torch.eye(size, dtype=torch.float64)
        error = torch.linalg.inv(H).diagonal(dim1=1, dim2=2) / reference[lost] - 1
        assert (error.abs().amax(1) > 1e-5).all()
    for perbatch in (1, 4, 6):
        with monkeypatch.context() as context:
            widths = watch_float64_sums(context)
            fisher = BlockedInverseFisher(G, size, damp, perbatch=perbatch)
        error = fisher.diagonal().view(6, 16) / reference - 1
        assert sum(widths) == {1: 2, 4: 6, 6: 6}[perbatch] * size
        assert error[~lost].abs().max() < 1e-5
        assert error[lost].abs().max() < 1e-7
        streamed = BlockedInverseFisher(iter(G), size, damp).diagonal().view(6, 16)
        assert (streamed / reference - 1).abs().max() < 1e-7


@pytest.mark.parametrize("log_damp", range(-6, 1))
def test_blocks_of_any_damping_are_right_to_1e_5(log_damp):
    """Weights in pairs of like gradients: the smaller λ is, the less float32 resolves of them."""
    G, damp = torch.randn(200, 64), 10.0**log_damp
    G[:, 1::2] = G[:, ::2] + 0.1 * G[:, 1::2]
    assert max(block_errors(BlockedInverseFisher(G, 16, damp), G, damp, 16)) < 1e-5


def test_gradients_too_small_for_float32_products_are_summed_in_float64(monkeypatch):
    G, damp = 1e-22 * torch.randn(100, 24), 1e-44
    reference = torch.linalg.inv(block_diagonal(dense_fisher(G * 1e22, damp * 1e44), 8)) * 1e44
    widths = watch_float64_sums(monkeypatch)
    diagonal = BlockedInverseFisher(G, 8, damp).diagonal()
    assert sum(widths) == 24
    torch.testing.assert_close(diagonal, reference.diagonal(), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(65, 500),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    log_damp=st.floats(-6, 0),
    common=st.floats(0, 3),
    spread=st.floats(0, 3),
    tail=st.floats(0, 3),
)
def test_blocks_are_right_to_1e_5_of_many_gradients(m, size, seed, log_damp, common, spread, tail):
    """With a common part, weights of different gradients, and a few large gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    G = (common * normal(1, 2 * size + 1) + normal(m, 2 * size + 1)) * (tail * normal(m, 1)).exp()
    G, damp = G * (spread * normal(2 * size + 1)).exp(), 10**log_damp
    inverse = torch.linalg.inv(block_diagonal(dense_fisher(G, damp), size))
    try:
        diagonal = BlockedInverseFisher(G, size, damp).diagonal()
    except ValueError as refusal:
        assert "is too small" in str(refusal)
        assert damp < 1e-5 * float(G.double().square().sum()) / m
        return
    torch.testing.assert_close(diagonal, inverse.diagonal(), rtol=1e-5, atol=0)


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 2, 3, 16, 17, 100, 101])
def test_any_number_of_pages_gives_the_same_numbers(pages):
    """m = 10 and d = 101 are divisible by none of them."""
    G, w = torch.randn(10, 101), torch.randn(101, dtype=torch.float64)
    drop = torch.randperm(101)[:60]
    one, many = PagedInverseFisher(G, 1e-3), PagedInverseFisher(G, 1e-3, pages=pages)
    assert len(list(Pages(G, pages, G.device).tiles(torch.float32))) == pages
    torch.testing.assert_close(many.diagonal(), one.diagonal(), rtol=1e-6, atol=0)
    for method in ("joint_update", "independent_update"):
        expected = getattr(one, method)(drop, w)
        assert relative_error(getattr(many, method)(drop, w), expected) < 1e-6


@pytest.mark.parametrize("pages", [0, -1, 10, 2.0])
def test_page_counts_out_of_range_are_refused(pages):
    with pytest.raises(ValueError, match=r"Invalid pages.*from 1 to 9"):
        PagedInverseFisher(torch.randn(4, 9), pages=pages)


@pytest.mark.cuda
@pytest.mark.parametrize("pages", [1, 5])
def test_pages_travel_to_the_device_and_back(pages):
    G, w = torch.randn(300, 40_001), torch.randn(40_001)
    drop = torch.randperm(40_001)[:9_000]
    here = PagedInverseFisher(G, 1e-3)
    there = PagedInverseFisher(G, 1e-3, pages=pages, device="cuda")
    torch.testing.assert_close(there.diagonal().cpu(), here.diagonal(), rtol=1e-5, atol=0)
    expected = here.joint_update(drop, w).double()
    assert relative_error(there.joint_update(drop, w), expected) < 1e-5


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("perbatch", [None, 1, 3, 100])
@pytest.mark.parametrize(("d", "size"), [(60, 8), (64, 8), (7, 20), (30, 30), (5, 1)])
def test_blocks_are_those_of_the_dense_matrix_with_a_smaller_last_one(d, size, perbatch):
    G = torch.randn(24, d)
    inverse = torch.linalg.inv(block_diagonal(dense_fisher(G, 1e-3), size))
    eye = torch.eye(d, dtype=torch.float64)
    for grads, tolerance in ((G, 1e-5), (G.double(), 1e-9), (iter(G), 1e-9)):
        fisher = BlockedInverseFisher(grads, size, 1e-3, perbatch=perbatch)
        assert relative_error(torch.stack([fisher.matvec(e) for e in eye]), inverse) < tolerance


def test_gradients_may_come_in_any_portions_in_memory_that_is_used_again():
    G = torch.randn(50, 33)
    reference = torch.linalg.inv(block_diagonal(dense_fisher(G, 1e-3), 8)).diagonal()

    def portions(sizes):
        buffer, start = torch.empty(max(sizes), 33), 0
        for n in sizes:
            yield buffer[:n].copy_(G[start : start + n])
            buffer.fill_(float("nan"))
            start += n

    for sizes in ([50], [1] * 50, [20, 5, 25]):
        fisher = BlockedInverseFisher(portions(sizes), 8, 1e-3)
        torch.testing.assert_close(fisher.diagonal(), reference, rtol=1e-9, atol=0)
    one_by_one = BlockedInverseFisher(list(G), 8, 1e-3)
    torch.testing.assert_close(one_by_one.diagonal(), reference, rtol=1e-9, atol=0)


@pytest.mark.parametrize("d", [20, 85])
def test_a_block_size_above_the_number_of_gradients_says_nothing_of_smaller_blocks(d):
    """Below, λ is too small for the (m, m) form of 20 weights."""
    G, damp = torch.randn(64, d), 1e-7
    G[:, -20:] *= 1e4
    size = 65
    inverse = torch.linalg.inv(block_diagonal(dense_fisher(G, damp), size))
    with pytest.raises(ValueError, match="too small"):
        PagedInverseFisher(G[:, -20:], damp).diagonal()
    diagonal = BlockedInverseFisher(G, size, damp).diagonal()
    torch.testing.assert_close(diagonal, inverse.diagonal(), rtol=1e-5, atol=0)


def test_no_gradient_matrix_is_ever_held():
    """Of gradients that come one by one, at most the present one is kept."""
    memory = []

    def gradients():
        for _ in range(50):
            array = np.random.default_rng(len(memory)).standard_normal(40)
            memory.append(weakref.ref(array))  # alive as long as a tensor on it is
            yield torch.from_numpy(array)
            del array
            kept.append(sum(ref() is not None for ref in memory))

    kept = []
    BlockedInverseFisher(gradients(), 4, 1e-3)
    assert len(kept) == 50
    assert max(kept) <= 1


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([], "at least one gradient"),
        ([torch.randn(4), torch.randn(5)], "Expected gradients of 4 weights, got 5"),
        ([torch.ones(4, dtype=torch.int64)], "floating point"),
        ([torch.randn(2, 3, 4)], r"Expected gradients \(m, d\)"),
    ],
)
def test_what_cannot_be_added_up_is_refused(gradients, message):
    with pytest.raises(ValueError, match=message):
        BlockedInverseFisher(gradients, 2)


# --- removing weights -----------------------------------------------------------------------------

FISHERS = {
    "paged": (lambda G, damp: PagedInverseFisher(G, damp, pages=3), 60),
    "blocks of a few": (lambda G, damp: BlockedInverseFisher(G, 8, damp), 8),
    "blocks of many": (lambda G, damp: BlockedInverseFisher(G, 25, damp), 25),
}


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("drop", ["few", "most", "one block", "all but one", "all"])
def test_updates_are_those_of_the_dense_formulas(fisher, drop):
    make, size = FISHERS[fisher]
    d, damp = 60, 1e-3
    drop = {
        "few": torch.randperm(d)[:5],
        "most": torch.randperm(d)[:50],
        "one block": torch.arange(8, 25),
        "all but one": torch.arange(d)[torch.arange(d) != 30],
        "all": torch.randperm(d),
    }[drop]
    G, w = torch.randn(1, d) + torch.randn(20, d), torch.randn(d, dtype=torch.float64)
    F = block_diagonal(dense_fisher(G, damp), size)
    fisher = make(G, damp)
    joint = fisher.joint_update(drop, w)
    assert torch.equal(joint[drop], -w[drop])
    assert relative_error(joint, joint_removal(F, drop, w)) < 1e-5
    independent = fisher.independent_update(drop, w)
    assert torch.equal(independent[drop], -w[drop])
    assert relative_error(independent, independent_removal(F, drop, w)) < 1e-5


@pytest.mark.parametrize("fisher", FISHERS)
def test_removing_nothing_changes_nothing(fisher):
    fisher = FISHERS[fisher][0](torch.randn(20, 60), 1e-3)
    w = torch.randn(60)
    assert not fisher.joint_update([], w).any()
    assert not fisher.independent_update([], w).any()


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.6])
def test_what_is_kept_may_be_tiny_beside_what_goes(fraction):
    """The Gram matrix of the kept columns is then lost in the difference of two large ones."""
    d, damp = 3_000, 1e-6
    G = 1e-3 * torch.randn(30, d)
    drop = torch.randperm(d)[: int(fraction * d)]
    G[:, drop] *= 1e5
    w = torch.randn(d, dtype=torch.float64)
    keep = torch.ones(d, dtype=torch.bool).index_fill_(0, drop, False)
    K = G[:, keep].double() @ G[:, keep].double().T
    A = 30 * damp * torch.eye(30, dtype=torch.float64) + K
    b = G[:, drop].double() @ w[drop]
    reference = G[:, keep].double().T @ torch.linalg.solve(A, b)
    update = PagedInverseFisher(G, damp).joint_update(drop, w)
    assert relative_error(update[keep], reference) < 1e-5


def test_an_update_that_leaves_parallel_gradients_is_refused_with_a_damping_that_does():
    """It is what goes that tells the gradients apart: F itself is far from singular."""
    G, w, drop = 1e4 * torch.tensor([[1.0, 1, 0], [1, 0, 1]]), torch.randn(3).double(), [1, 2]
    fisher = PagedInverseFisher(G, 1e-8)
    fisher.joint_update([0], w)
    with pytest.raises(ValueError, match="too small") as refusal:
        fisher.joint_update(drop, w)
    damp = float(re.search(r"damp = (\S+) is large enough", str(refusal.value))[1])
    expected = joint_removal(dense_fisher(G, damp), drop, w)
    assert relative_error(PagedInverseFisher(G, damp).joint_update(drop, w), expected) < 1e-5


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(
    ("drop", "w", "message"),
    [
        ([0, 60], torch.ones(60), "indices below 60"),
        ([-1], torch.ones(60), "indices below 60"),
        ([0.5], torch.ones(60), "indices below 60"),
        (torch.ones(60, dtype=torch.bool), torch.ones(60), "indices below 60"),
        ([[0, 1]], torch.ones(60), "indices below 60"),
        ([0], torch.ones(59), r"w of shape \(60,\) .* got Tensor of torch.float32 \(59,\)"),
        ([0], torch.ones(60, dtype=torch.int64), "floating point .* got Tensor of torch.int64"),
        ([0], torch.ones(60, dtype=torch.complex64), "floating point .* got Tensor of torch.compl"),
        ([0], torch.full((60,), float("nan")), "finite numbers in w"),
    ],
)
def test_indices_and_weights_that_do_not_fit_are_refused(fisher, drop, w, message):
    fisher = FISHERS[fisher][0](torch.randn(20, 60), 1e-3)
    for update in (fisher.joint_update, fisher.independent_update):
        with pytest.raises(ValueError, match=message):
            update(drop, w)


@pytest.mark.parametrize("fisher", FISHERS)
def test_results_that_their_type_cannot_hold_are_refused(fisher):
    fisher = FISHERS[fisher][0](0.01 * torch.randn(20, 60), 1e-3)
    x = (500 * torch.randn(60)).half()
    with pytest.raises(ValueError, match=r"up to .* do not fit torch\.float16; use float64"):
        fisher.matvec(x)
    assert relative_error(fisher.matvec(x.float()), fisher.matvec(x.double())) < 1e-6


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PagedInverseFisher, lambda G: BlockedInverseFisher(G, 2)])
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (torch.randn(5), r"Expected gradients \(m, d\)"),
        (torch.randn(0, 5), "at least one gradient"),
        (torch.randn(5, 0), "at least one gradient"),
        (torch.ones(5, 5, dtype=torch.int32), "floating point"),
        (np.ones((5, 5), dtype=complex), "floating point"),
        ("no/such/file.npy", r"Expected gradients \(m, d\) .* got str"),
    ],
)
def test_gradients_that_are_no_matrix_are_refused(make, grads, message):
    with pytest.raises(ValueError, match=message):
        make(grads)


@pytest.mark.parametrize("damp", [1e-309, "1e-5", None])
@pytest.mark.parametrize(
    "make", [PagedInverseFisher, lambda G, damp: BlockedInverseFisher(G, 2, damp)]
)
def test_a_damping_without_a_reciprocal_is_refused(make, damp):
    """It would give inverse diagonals that are infinite."""
    with pytest.raises(ValueError, match=f"Invalid damp: {damp!r}; it must be a number from"):
        make(torch.randn(4, 9), damp)


@pytest.mark.parametrize(("size", "perbatch"), [(0, 1), (2.5, 1), (2, 0), (2, -1), (None, 1)])
def test_block_sizes_out_of_range_are_refused(size, perbatch):
    with pytest.raises(ValueError, match=r"Invalid (blocksize|perbatch).*at least 1"):
        BlockedInverseFisher(torch.randn(4, 9), size, perbatch=perbatch)


G, ONES = torch.randn(4, 9), torch.ones(9)
MISUSES = {
    "a list": (lambda: PagedInverseFisher(G.tolist()), r"gradients \(m, d\) as a dense.* got list"),
    "nothing": (lambda: PagedInverseFisher(None), r"gradients \(m, d\) as a dense.* got NoneType"),
    "sparse": (lambda: PagedInverseFisher(G.to_sparse()), r"as a dense tensor"),
    "float8": (lambda: PagedInverseFisher(G.to(torch.float8_e5m2)), "16 to 64 bits, got .*float8"),
    "lists": (lambda: BlockedInverseFisher(G.tolist(), 4), "dense tensor .* got list"),
    "tuples": (lambda: BlockedInverseFisher(((1.0, 2.0) for _ in "ab"), 4), "got tuple"),
    "a number": (lambda: BlockedInverseFisher(5, 4), "got int"),
    "no blocks": (lambda: BlockedInverseFisher(None, 4), "got NoneType"),
    "pages": (lambda: PagedInverseFisher(G, pages=True), "Invalid pages: True; .* from 1 to 9"),
    "blocksize": (lambda: BlockedInverseFisher(G, "4"), "Invalid blocksize: '4'; .* of at least 1"),
    "a device": (lambda: PagedInverseFisher(G, device="gpu0"), "Invalid device: 'gpu0'.* 'cpu'"),
    "no device": (lambda: BlockedInverseFisher(G, 4, device=1.5), "Invalid device: 1.5; .*'cpu'"),
    "x a list": (lambda: PagedInverseFisher(G).matvec([1.0] * 9), r"x of shape \(9,\) .* got list"),
    "x an array": (lambda: BlockedInverseFisher(G, 4).matvec(ONES.numpy()), "got ndarray"),
    "x sparse": (lambda: PagedInverseFisher(G).matvec(ONES.to_sparse()), "as a dense tensor"),
    "w nothing": (lambda: PagedInverseFisher(G).joint_update([0], None), "w of .* got NoneType"),
    **{
        f"drop {drop}": (
            lambda drop=drop: BlockedInverseFisher(G, 4).independent_update(drop, ONES),
            r"drop to be a list of indices below 9.*mask.nonzero\(\)",
        )
        for drop in (None, "0", {0}, 3, [[0], [1, 2]], [True] * 9)
    },
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_answered_with_advice(misuse):
    call, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_integers_of_numpy_are_integers():
    expected = BlockedInverseFisher(G, 4).diagonal()
    assert torch.equal(
        BlockedInverseFisher(G, np.int64(4), perbatch=np.int8(2)).diagonal(), expected
    )
    assert PagedInverseFisher(G, pages=np.int32(2)).pages == 2
    joint = PagedInverseFisher(G).joint_update
    assert torch.equal(joint(np.array([3], dtype=np.uint16), ONES), joint([3], ONES))


MEASURE = """
import ctypes, sys, torch
from prun import MFACPruner, inverse_bytes

def resident(line):
    with open("/proc/self/status") as status:
        return next(int(text.split()[1]) * 1024 for text in status if text.startswith(line))

def pruned(d, ngrads, samples=1, **options):
    model = torch.nn.Linear(d, 1, bias=False)
    loss = lambda model, batch: (model.weight @ (batch[:, :1] * torch.randn(d)).T).mean()
    batches = [torch.ones(samples, 1)] * -(-ngrads // samples)
    options |= {"ngrads": ngrads, "per_sample": samples > 1, "loss": loss}
    pruner = MFACPruner(model, batches, damp=1.0, **options)
    for target in (0.2, 0.5, 0.9):
        pruner.prune(target)

d, options = int(sys.argv[1]), eval(sys.argv[2])
pruned(100, ngrads=10)
pruned(100, ngrads=10, blocksize=4)
ctypes.CDLL(None).malloc_trim(0)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
pruned(d, **options)
print(resident("VmHWM") - before, *inverse_bytes(options.pop("ngrads"), d, **options).values())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs /proc")
@pytest.mark.parametrize(
    ("d", "options"),
    [
        (150_000, {"ngrads": 256}),
        (3_000, {"ngrads": 800}),
        (500_000, {"ngrads": 40, "blocksize": 32}),
        (100_000, {"ngrads": 128, "blocksize": 64, "perbatch": 2000}),
        (150_000, {"ngrads": 64, "blocksize": 100}),
        (200_000, {"ngrads": 96, "blocksize": 8, "samples": 64}),  # by vmap
        (200_000, {"ngrads": 96, "samples": 48}),
    ],
)
def test_memory_is_known_in_advance(d, options):
    """In a process of its own, from the gradients to the last of several levels."""
    command = [sys.executable, "-c", MEASURE, str(d), repr(options)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.path.dirname(prun.__file__),
    }
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured, known = map(int, output.stdout.split())
    assert measured <= known <= 2 * measured + 2**26


def test_memory_goes_to_the_device_but_for_the_gradients():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    m, d = 1024, 10**6
    here = inverse_bytes(m, d)
    assert here.keys() == {cpu}
    assert inverse_bytes(m, d, device="cuda").keys() == {cuda}  # gradients and all
    assert inverse_bytes(m, d, device="cuda")[cuda] > here[cpu]
    where = {"device": "cuda", "grads_device": "cpu"}
    there = {pages: inverse_bytes(m, d, pages=pages, **where) for pages in (1, 16)}
    for needed in there.values():
        assert needed.keys() == {cpu, cuda}
        assert needed[cpu] > 4 * m * d
    assert there[1][cuda] > 4 * m * d > there[16][cuda]
    assert inverse_bytes(m, d, pages=16) == here  # nothing is copied
    assert inverse_bytes(m, d, blocksize=16)[cpu] < 4 * m * d
    file = {pages: inverse_bytes(m, d, pages=pages, grads_device="file") for pages in (1, 16)}
    assert file[1] == file[16] and file[1][cpu] < here[cpu] - 4 * m * d + 1


def test_memory_of_processes_is_that_of_their_weights():
    cpu, m, d = torch.device("cpu"), 1024, 10**6
    for options in ({}, {"blocksize": 128}):
        one, four = (inverse_bytes(m, d, world_size=n, **options)[cpu] for n in (1, 4))
        assert one / 4 < four < one / 2


def test_toys_take_little():
    assert inverse_bytes(20, 100)[torch.device("cpu")] < 2**20
    cuda = torch.device("cuda")
    assert inverse_bytes(20, 100, blocksize=4, device=cuda)[cuda] < 2**20


@pytest.mark.parametrize(
    ("gigabytes", "place", "pages"),
    [
        ({"cuda": 20, "cpu": 9}, "cuda", 1),
        ({"cuda": 5.5, "cpu": 9}, "cpu", 4),
        ({"cuda": 3.1, "cpu": 9}, "cpu", 16),
        ({"cuda": 3.1, "cpu": 3, "file": 5}, "file", 16),
        ({"cuda": 3.1, "cpu": 3, "file": 4}, None, None),
        ({"cuda": 1, "cpu": 9, "file": 9}, None, None),
    ],
)
def test_gradients_go_where_they_fit_in_as_few_pages(gigabytes, place, pages, monkeypatch):
    """4.1 GB of them; the device needs 1.65 GB beside them, or beside three pages of them."""
    free = {"file": 0, **gigabytes}
    monkeypatch.setattr(memory, "available_memory", lambda device: 1e9 * free[device.type])
    monkeypatch.setattr(memory, "free_in_folder", lambda: 1e9 * free["file"])
    how = {"device": torch.device("cuda")}
    if place is None:
        with pytest.raises(ValueError, match=r"but free are .* GB on cuda and .* GB on cpu: use"):
            memory.make_plan(1024, 10**6, **how)
        return
    plan = memory.make_plan(1024, 10**6, **how)
    assert (str(plan.place), plan.pages) == (place, pages)
    assert memory.make_plan(1024, 10**6, pages=64, **how).pages == 64
    G = torch.empty(1024, 1).expand(1024, 10**6)
    if place != "cuda":
        assert memory.fewest_pages(G, torch.device("cuda")) == pages
    assert memory.fewest_pages(G, torch.device("cpu")) == 1
