"""The one contract of every inverse Fisher, against the dense inverse in float64."""

import re

import pytest
import torch
from reference import as_kept, dense_fisher, dense_inverse, recursion, recursion_diagonal

from optim import DynamicInverseFisher
from prun import BlockedInverseFisher, PagedInverseFisher


def dynamic(G, damp, tmp_path, **options):
    fisher = DynamicInverseFisher(*G.shape, damp, device="cpu", **options)
    for g in G:
        fisher.update(g)
    return fisher


# name -> (how it is made, block size of the Fisher that it inverts as a fraction of d)
FORMS = {
    "dynamic": (dynamic, 1),
    "dynamic, shards": (lambda *a: dynamic(*a, shards=["cpu", "cpu"]), 1),
    "dynamic, bfloat16": (lambda *a: dynamic(*a, dtype="bfloat16"), 1),
    "dynamic, float16": (lambda *a: dynamic(*a, dtype=torch.float16), 1),
    "dynamic, float8": (lambda *a: dynamic(*a, dtype=torch.float8_e4m3fn), 1),
    "dynamic, compressed": (lambda *a: dynamic(*a, compress=0.3), 1),
    "dynamic, compressed bfloat16": (
        lambda *a: dynamic(*a, compress=0.3, dtype=torch.bfloat16),
        1,
    ),
    "paged, 1": (lambda G, damp, _: PagedInverseFisher(G, damp), 1),
    "paged, odd": (
        lambda G, damp, _: PagedInverseFisher(G, damp, pages=-(-G.shape[1] * 2 // 3)),
        1,
    ),
    "paged, d": (lambda G, damp, _: PagedInverseFisher(G, damp, pages=G.shape[1]), 1),
    "paged, array": (lambda G, damp, _: PagedInverseFisher(G.numpy(), damp, pages=1), 1),
    "blocked, whole": (lambda G, damp, _: BlockedInverseFisher(G, G.shape[1], damp), 1),
    "blocked": (lambda G, damp, _: BlockedInverseFisher(G, -(-G.shape[1] // 3), damp), 3),
    "blocked, perbatch": (
        lambda G, damp, _: BlockedInverseFisher(G, -(-G.shape[1] // 7), damp, perbatch=2),
        7,
    ),
    "blocked, one by one": (
        lambda G, damp, _: BlockedInverseFisher(iter(G), -(-G.shape[1] // 3), damp),
        3,
    ),
    "blocked, in parts": (
        lambda G, damp, _: BlockedInverseFisher(iter(G.split(3)), -(-G.shape[1] // 3), damp),
        3,
    ),
}
# What these keep of the gradients; F is made of that.
KEPT = {
    "dynamic, bfloat16": lambda G: as_kept(G, dtype=torch.bfloat16)[0],
    "dynamic, float16": lambda G: as_kept(G, dtype=torch.float16)[0],
    "dynamic, float8": lambda G: as_kept(G, dtype=torch.float8_e4m3fn)[0],
    "dynamic, compressed": lambda G: as_kept(G, 0.3)[0],
    "dynamic, compressed bfloat16": lambda G: as_kept(G, 0.3, torch.bfloat16)[0],
}
SIZES = [(1, 9), (6, 40), (24, 24), (40, 16), (7, 1)]


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def kept(request):
    return KEPT.get(request.node.callspec.params["form"], lambda G: G)


@pytest.fixture(params=SIZES, ids=str)
def gradients(request):
    m, d = request.param
    generator = torch.Generator().manual_seed(100 * m + d)
    # A common part and weights of very different gradients, as in a network.
    common, spread = torch.randn(1, d, generator=generator), torch.randn(d, generator=generator)
    return (common + torch.randn(m, d, generator=generator)) * spread.exp()


def block_diagonal(F, parts):
    """F with zeros outside of the blocks, `parts` of them or fewer."""
    size = -(-len(F) // parts)
    block = torch.arange(len(F)) // size
    return F * (block[:, None] == block)


def expected(G, damp, parts):
    return torch.linalg.inv(block_diagonal(dense_fisher(G, damp), parts))


@pytest.mark.parametrize("damp", [1e-5, 1e-2, 10.0])
def test_matvec_and_diagonal_are_those_of_the_dense_inverse(form, kept, gradients, damp, tmp_path):
    make, parts = form
    m, d = gradients.shape
    try:
        make(gradients, damp, tmp_path).diagonal()
    except ValueError as refusal:
        # More gradients than weights are for the blocked form; what is advised must work.
        assert m > d
        damp = float(re.search(r"damp = (\S+) is large enough", str(refusal))[1])
    fisher = make(gradients, damp, tmp_path)
    assert fisher.shape == (d, d)
    assert fisher.damp == damp
    inverse = expected(kept(gradients), damp, parts)
    random = torch.randn(d, generator=torch.Generator().manual_seed(d))
    for x in (random, gradients[0], gradients[-1]):
        reference = inverse @ x.double()
        assert torch.linalg.norm(fisher.matvec(x) - reference) <= 2e-5 * reference.norm()
    diagonal = fisher.diagonal().double()
    torch.testing.assert_close(diagonal, inverse.diagonal(), rtol=1e-5, atol=0)


def test_it_is_a_positive_symmetric_operator_bounded_by_one_over_damp(form, gradients, tmp_path):
    damp = 1e-3
    fisher = form[0](gradients, damp, tmp_path)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, gradients.shape[1], generator=generator, dtype=torch.float64)
    Fx, Fy = fisher.matvec(x).double(), fisher.matvec(y).double()
    # Rounding is relative to 1/λ: between directions far from the gradients everything cancels.
    rounding = 1e-6 * x.norm() * y.norm() / damp
    assert abs(x @ Fy - y @ Fx) <= rounding
    assert 0 < x @ Fx <= (1 + 1e-6) * x @ x / damp
    assert torch.linalg.norm(fisher.matvec(2 * x - 3 * y).double() - (2 * Fx - 3 * Fy)) <= rounding
    assert (fisher.diagonal() > 0).all()
    assert (fisher.diagonal() <= (1 + 1e-6) / damp).all()


def test_the_order_of_the_gradients_is_irrelevant(form, gradients, tmp_path, request):
    if "compressed" in request.node.callspec.params["form"]:
        pytest.skip("what is kept of a gradient depends on those before")
    order = torch.randperm(len(gradients), generator=torch.Generator().manual_seed(2))
    fisher = form[0](gradients, 1e-3, tmp_path)
    permuted = form[0](gradients[order].contiguous(), 1e-3, tmp_path)
    torch.testing.assert_close(fisher.diagonal(), permuted.diagonal(), rtol=1e-5, atol=0)


def test_nothing_that_comes_in_is_written_to(form, gradients, tmp_path):
    G, x = gradients.clone(), torch.ones(gradients.shape[1])
    fisher = form[0](G, 1e-3, tmp_path)
    fisher.matvec(x)
    fisher.diagonal().zero_()
    assert torch.equal(G, gradients)
    assert (x == 1).all()
    assert (fisher.diagonal() > 0).all()


@pytest.mark.parametrize("scale", [10.0, 1e3, 1e-20, 1e9])
def test_cancellation_is_resolved_or_refused(form, kept, scale, tmp_path):
    """In float32 most of these inverse diagonals come out negative for the scale 10."""
    make, parts = form
    G = scale * torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    damp = 1e-5
    try:
        diagonal = make(G, damp, tmp_path).diagonal().double()
    except ValueError as error:
        assert "too small" in str(error)  # the message says what would do
        assert scale > 10
        return
    # The oracle's own error grows with its condition.
    reference = expected(kept(G), damp, parts).diagonal()
    assert (diagonal > 0).all()
    torch.testing.assert_close(diagonal, reference, rtol=1e-4, atol=0)


@pytest.mark.parametrize("damp", [0.0, -1e-5, float("inf"), float("nan")])
def test_a_damping_out_of_range_is_refused(form, damp, tmp_path):
    with pytest.raises(ValueError, match="Invalid damp"):
        form[0](torch.randn(4, 9), damp, tmp_path)


def test_a_vector_of_another_shape_is_refused(form, gradients, tmp_path):
    fisher = form[0](gradients, 1e-3, tmp_path)
    d = gradients.shape[1]
    for x in (torch.randn(d + 1), torch.randn(1, d)):
        with pytest.raises(ValueError, match=rf"shape \({d},\)"):
            fisher.matvec(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(form, bad, tmp_path):
    G = torch.randn(6, 12)
    G[3, 5] = bad
    with pytest.raises(ValueError, match="NaN"):
        form[0](G, 1e-3, tmp_path).diagonal()


@pytest.mark.parametrize("damp", [1e-5, 1.0])
def test_the_oracles_agree(gradients, damp):
    """The recursion of the paper is independent of any dense inverse."""
    V, q = recursion(gradients, damp)
    inverse = dense_inverse(gradients, damp)
    d = gradients.shape[1]
    rebuilt = torch.eye(d, dtype=torch.float64) / damp - V.T @ (V / q[:, None])
    assert torch.linalg.norm(rebuilt - inverse) <= 1e-9 * inverse.norm()
    diagonal = recursion_diagonal(gradients, damp)
    torch.testing.assert_close(diagonal, inverse.diagonal(), rtol=1e-6, atol=1e-9 / damp)
