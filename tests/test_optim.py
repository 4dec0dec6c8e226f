"""The window (`DynamicInverseFisher`) and the optimizer (`MFAC`) against dense float64 oracles."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from reference import dense_inverse
from torch import nn

import optim
from coefficients import IncrementalCoefficients
from optim import MFAC, DynamicInverseFisher, NonFiniteGradientError, window_bytes
from windows import DenseWindow

WAYS = ["incremental", "paper"]


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def relative_error(x, reference):
    return float((x.double() - reference).norm() / reference.norm())


def ring(gradients, m):
    """The window (m, d) that the gradients so far leave behind, zeros where none was yet."""
    G = torch.zeros(m, gradients[0].numel(), dtype=gradients[0].dtype)
    for t, g in enumerate(gradients):
        G[t % m] = g
    return G


def woodbury_column(G, damp, j):
    """F⁻¹gⱼ by an m × m Cholesky solve in float64: an oracle where a (d, d) matrix is too large, or
    too ill-conditioned (a gradient scaled by c scales a row and a column here, no more)."""
    G = G.double()
    m = len(G)
    identity = torch.eye(m, dtype=torch.float64)
    L = torch.linalg.cholesky(m * damp * identity + G @ G.T)
    return m * G.T @ torch.cholesky_solve(identity[:, j : j + 1], L).squeeze()


# --- DynamicInverseFisher -------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, ["cpu", "cpu"], ["cpu"] * 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("m", "d"), [(1, 6), (7, 40), (33, 33), (20, 9), (1, 1), (5, 2)])
def test_every_exchange_gives_the_dense_inverse(m, d, way, shards):
    fisher = DynamicInverseFisher(m, d, 1e-2, coefficients=way, shards=shards)
    assert fisher.shape == (d, d)
    gradients = []
    for _ in range(3 * m + 2):
        gradients.append(torch.randn(d))
        inverse = dense_inverse(ring(gradients, m), 1e-2)
        result = fisher.update_matvec(gradients[-1])
        assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5
        x = torch.randn(d)
        assert relative_error(fisher.matvec(x), inverse @ x.double()) < 1e-5
    torch.testing.assert_close(fisher.diagonal().double(), inverse.diagonal(), rtol=1e-5, atol=0)


def test_before_the_first_gradient_it_is_the_damping_alone():
    fisher = DynamicInverseFisher(4, 10, 0.5)
    x = torch.randn(10)
    torch.testing.assert_close(fisher.matvec(x), 2 * x)
    torch.testing.assert_close(fisher.diagonal(), torch.full((10,), 2.0))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("m", [31, 1025])
def test_any_window_size_is_accepted(m, way):
    """Neither a multiple of 32 nor at most 1024."""
    d, damp = 50, 0.1
    fisher = DynamicInverseFisher(m, d, damp, coefficients=way)
    gradients = [torch.randn(d) for _ in range(20)]
    for g in gradients:
        result = fisher.update_matvec(g)
    inverse = dense_inverse(ring(gradients, m), damp)
    assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5


@pytest.mark.parametrize("common", [0.0, 1.0, 2.0])
def test_ten_rounds_of_exchanges_stay_within_1e_5(common):
    """Gradients with a mean as large as their noise, and larger: sums with few sign changes."""
    m, d, damp = 64, 50_000, 1e-5
    fisher = DynamicInverseFisher(m, d, damp)
    mean, G = torch.randn(d), torch.zeros(m, d)
    for t in range(10 * m):
        g = 0.01 * (common * mean + torch.randn(d))
        G[t % m] = g
        result = fisher.update_matvec(g)
        if t % 61 == 0 or t >= 10 * m - 2:
            assert relative_error(result, woodbury_column(G, damp, t % m)) < 1e-5
    assert fisher.compute_dtype == torch.float32


@pytest.mark.parametrize(("m", "d"), [(64, 270_000), (256, 30_000)])
def test_nearly_parallel_gradients_of_norm_100(m, d):
    """Where K summed in float32 has negative eigenvalues, the result is right all the same."""
    damp = 1e-5
    fisher = DynamicInverseFisher(m, d, damp)
    common = torch.randn(d)
    G = torch.zeros(m, d)
    for t in range(m + 1):
        g = 100 * common / common.norm()
        noise = torch.randn(d)
        g += 0.1 * noise / noise.norm()
        G[t % m] = g
        result = fisher.update_matvec(g)
    assert relative_error(result, woodbury_column(G, damp, t % m)) < 1e-3


def test_gradients_far_larger_than_the_damping():
    """P falls from 1/mλ by 18 orders of magnitude; the rest of the old column must not stay."""
    m, d, damp = 6, 40, 1e-10
    fisher = DynamicInverseFisher(m, d, damp)
    gradients = []
    for _ in range(2 * m):
        gradients.append(1e4 * torch.randn(d))
        result = fisher.update_matvec(gradients[-1])
        G = ring(gradients, m).double()
        A = m * damp * torch.eye(m, dtype=torch.float64) + G @ G.T
        filled = A.diagonal() > 1
        expected = torch.linalg.inv(A[filled][:, filled])
        torch.testing.assert_close(
            fisher.coefficients.P[filled][:, filled],
            expected,
            rtol=1e-5,
            atol=1e-5 * expected.max(),
        )
        j = (len(gradients) - 1) % m
        assert relative_error(result, woodbury_column(G, damp, j)) < 1e-5


def test_exchanges_among_nearly_parallel_gradients_need_no_rebuilding():
    """P stays a good inverse for a whole round, at m = 64, with a condition of about 1e6."""
    m, d, damp = 64, 3000, 1e-5
    coefficients = IncrementalCoefficients(m, damp, torch.device("cpu"))
    common = 100 * torch.nn.functional.normalize(torch.randn(d).double(), dim=0)
    G = torch.zeros(m, d, dtype=torch.float64)
    ages = []
    for t in range(3 * m):
        G[t % m] = common + 0.1 * torch.nn.functional.normalize(torch.randn(d).double(), dim=0)
        z, _ = coefficients.exchange(t % m, G @ G[t % m])
        ages.append(coefficients.age)
        if t % 20 == 19:
            A = m * damp * torch.eye(m, dtype=torch.float64) + G @ G.T
            # Products of A (1e4) and z (1e2), over m = 64 terms, are rounded to about 1e-8.
            torch.testing.assert_close(A @ z, torch.eye(m).double()[t % m], rtol=0, atol=1e-7)
    assert ages == [(t + 1) % m for t in range(3 * m)]


def test_damping_too_small_for_float64_is_refused_with_advice_that_works():
    fisher = DynamicInverseFisher(4, 30, 1e-12)
    g = 1e6 * torch.randn(30)
    fisher.update(g)
    with pytest.raises(ValueError, match=r"damp = 1e-12 is too small .* raise damp to about") as e:
        fisher.update(g)
    fisher.damp = float(str(e.value).split()[-1])
    inverse = dense_inverse(torch.stack([g, g, 0 * g, 0 * g]), fisher.damp)
    x = torch.randn(30)
    assert relative_error(fisher.matvec(x), inverse @ x.double()) < 1e-4


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_scales_at_which_float32_products_leave_their_range(scale):
    m, d = 6, 40
    damp = scale**2 / 10
    fisher = DynamicInverseFisher(m, d, damp)
    gradients = [scale * torch.randn(d) for _ in range(2 * m)]
    for g in gradients:
        result = fisher.update_matvec(g)
    inverse = dense_inverse(ring(gradients, m), damp)
    assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5
    assert relative_error(fisher.diagonal(), inverse.diagonal()) < 1e-5


def test_a_huge_gradient_enters_and_leaves():
    m, d, damp = 8, 60, 1e-4
    fisher = DynamicInverseFisher(m, d, damp)
    gradients = [torch.randn(d) for _ in range(m + 3)]
    gradients[m] *= 1e6
    gradients += [torch.randn(d) for _ in range(2 * m)]
    for t, g in enumerate(gradients):
        result = fisher.update_matvec(g)
        expected = woodbury_column(ring(gradients[: t + 1], m), damp, t % m)
        assert relative_error(result, expected) < 1e-5


def test_float64_is_left_when_the_gradients_allow():
    m, d = 8, 100
    fisher = DynamicInverseFisher(m, d, 1e-6)
    g = torch.randn(d)
    for _ in range(m):
        fisher.update(g + 1e-3 * torch.randn(d))
    assert fisher.compute_dtype == torch.float64
    for _ in range(2 * m + 1):
        fisher.update(torch.randn(d))
    assert fisher.compute_dtype == torch.float32


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("strength", [0.3, 8.0])
def test_parallel_gradients_about_as_large_as_the_damping(strength, noise):
    """A is well conditioned then, but the terms of Gᵀz cancel to one part in m."""
    m, d, damp = 256, 2000, 1e-5
    fisher = DynamicInverseFisher(m, d, damp)
    mean = torch.nn.functional.normalize(torch.randn(d), dim=0) * (strength * m * damp) ** 0.5
    gradients = [mean + noise * mean.norm() / d**0.5 * torch.randn(d) for _ in range(m + 2)]
    for g in gradients:
        result = fisher.update_matvec(g)
    expected = woodbury_column(ring(gradients, m), damp, (m + 1) % m)
    assert relative_error(result, expected) < 1e-5


def test_where_terms_cancel_float64_takes_over_and_needs_two_reads_again(monkeypatch):
    """The result in which float32 turns out to be too short takes more, once."""
    reads = []
    for name in ("times", "transposed_times"):
        call = getattr(DenseWindow, name)
        monkeypatch.setattr(DenseWindow, name, lambda *a, c=call: reads.append(None) or c(*a))
    m, d, damp = 64, 500, 1e-5
    fisher = DynamicInverseFisher(m, d, damp)
    mean = torch.nn.functional.normalize(torch.randn(d), dim=0) * (8 * m * damp) ** 0.5
    counts = []
    for _ in range(m):
        reads.clear()
        fisher.update_matvec(mean)
        counts.append(len(reads))
    assert max(counts) > 2
    assert sorted(counts)[:-1] == [2] * (m - 1)


@pytest.mark.parametrize("way", WAYS)
def test_after_a_refused_gradient_every_answer_is_refused(way):
    fisher = DynamicInverseFisher(4, 30, 1e-12, coefficients=way)
    g = 1e6 * torch.randn(30)
    fisher.update(g)
    for method in (fisher.update, fisher.update_matvec, fisher.matvec):
        with pytest.raises(ValueError, match="too small"):
            method(g)
    with pytest.raises(ValueError, match="too small"):
        fisher.diagonal()


def test_a_product_that_cancels_altogether_is_refused():
    fisher = DynamicInverseFisher(4, 30, 1e-10)
    g = 1e4 * torch.randn(30)
    expected = 4 * g / (4e-10 + g.double() @ g.double())
    assert relative_error(fisher.update_matvec(g), expected) < 1e-5
    with pytest.raises(ValueError, match="too small"):
        fisher.matvec(g)


def test_order_of_the_gradients_is_irrelevant():
    m, d = 12, 30
    G, x = torch.randn(m, d), torch.randn(d)
    results = []
    for order in (torch.arange(m), torch.randperm(m)):
        fisher = DynamicInverseFisher(m, d, 1e-2)
        for g in G[order]:
            fisher.update(g)
        results.append(fisher.matvec(x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_inverse_is_positive_and_bounded_by_the_damping():
    fisher = DynamicInverseFisher(10, 25, 1e-3)
    for _ in range(17):
        fisher.update(torch.randn(25))
        x = torch.randn(25)
        assert 0 < float(x @ fisher.matvec(x)) <= float(x @ x) / 1e-3 * (1 + 1e-6)
        assert 0 < fisher.diagonal().min() and fisher.diagonal().max() <= 1e3 * (1 + 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_damp_can_change_at_any_time(way):
    m, d = 5, 14
    fisher = DynamicInverseFisher(m, d, 1e-1, coefficients=way)
    gradients = []
    for t in range(3 * m):
        if t % 4 == 3:
            fisher.damp = 10.0 ** -(t % 3)
        gradients.append(torch.randn(d))
        result = fisher.update_matvec(gradients[-1])
        inverse = dense_inverse(ring(gradients, m), fisher.damp)
        assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_never_enters(bad):
    fisher = DynamicInverseFisher(3, 5)
    fisher.update(torch.randn(5))
    before = copy.deepcopy(fisher.state_dict())
    g = torch.randn(5)
    g[2] = bad
    for method in (fisher.update, fisher.update_matvec):
        with pytest.raises(NonFiniteGradientError, match="NaN or Inf"):
            method(g)
    assert_same_state(fisher.state_dict(), before)


def test_a_gradient_that_overflows_the_window_is_non_finite():
    fisher = DynamicInverseFisher(3, 5, dtype=torch.float16)
    with pytest.raises(NonFiniteGradientError):
        fisher.update(torch.full((5,), 1e6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_window_types_are_exact_for_the_rounded_gradients(dtype):
    m, d = 9, 30
    fisher = DynamicInverseFisher(m, d, 1e-2, dtype=dtype)
    gradients = [torch.randn(d, dtype=torch.float64) for _ in range(2 * m)]
    for g in gradients:
        result = fisher.update_matvec(g)
    rounded = ring([g.to(dtype) for g in gradients], m)
    reference = dense_inverse(rounded, 1e-2) @ rounded[(len(gradients) - 1) % m].double()
    assert relative_error(result, reference) < (1e-12 if dtype == torch.float64 else 1e-5)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same_state(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            assert torch.equal(torch.cat(value, 1), torch.cat(b[key], 1)), key
        elif isinstance(value, list):
            assert len(value) == len(b[key])
        else:
            assert value == b[key], key


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shards", [None, ["cpu", "cpu", "cpu"]])
def test_a_restored_window_goes_on_bit_for_bit(way, shards):
    m, d = 6, 17
    fisher = DynamicInverseFisher(m, d, 1e-2, coefficients=way)
    for _ in range(m + 2):
        fisher.update(torch.randn(d))
    file = io.BytesIO()
    torch.save(fisher.state_dict(), file)
    file.seek(0)
    other = DynamicInverseFisher(3, 4, 1.0, coefficients=way, shards=shards)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(m + 1):
        g = torch.randn(d)
        expected, result = fisher.update_matvec(g), other.update_matvec(g)
        if shards is None:
            assert torch.equal(result, expected)
        else:  # sums over shards are rounded in another order
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_loaded_window_shares_nothing_with_its_source():
    fisher, other = DynamicInverseFisher(3, 5), DynamicInverseFisher(3, 5)
    fisher.update(torch.randn(5))
    other.load_state_dict(fisher.state_dict())
    before = copy.deepcopy(other.state_dict())
    fisher.update(torch.randn(5))
    assert_same_state(other.state_dict(), before)


def test_the_two_ways_of_the_coefficients_load_each_other():
    a = DynamicInverseFisher(4, 9, 1e-1)
    b = DynamicInverseFisher(4, 9, 1e-1, coefficients="paper")
    for _ in range(6):
        a.update(torch.randn(9))
    b.load_state_dict(a.state_dict())
    c = DynamicInverseFisher(4, 9, 1e-1)
    c.load_state_dict(b.state_dict())
    x = torch.randn(9)
    torch.testing.assert_close(b.matvec(x), a.matvec(x))
    torch.testing.assert_close(c.matvec(x), a.matvec(x))


def test_new_columns_have_a_history_of_zero():
    m, d, more = 5, 8, 3
    for shards in (None, ["cpu", "cpu"]):
        fisher = DynamicInverseFisher(m, d, 1e-2, shards=shards)
        gradients = [torch.cat([torch.randn(d), torch.zeros(more)]) for _ in range(m + 1)]
        for g in gradients:
            fisher.update(g[:d])
        fisher.grow(more)
        gradients.append(torch.randn(d + more))
        result = fisher.update_matvec(gradients[-1])
        inverse = dense_inverse(ring(gradients, m), 1e-2)
        assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5


def test_the_result_does_not_depend_on_autocast_or_matmul_precision():
    gradients = [torch.randn(500) for _ in range(12)]

    def run():
        fisher = DynamicInverseFisher(8, 500, 1e-3)
        return [fisher.update_matvec(g) for g in gradients]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, run(), expected))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("options", [{}, {"coefficients": "paper"}, {"compress": 0.3}])
def test_the_default_device_of_torch_does_not_matter(options):
    """As after torch.set_default_device("cuda"), with a model on the CPU."""
    weights, gradients = torch.randn(12), torch.randn(7, 12)

    def run():
        p = nn.Parameter(weights.clone())
        optimizer = MFAC([p], lr=0.1, momentum=0.5, ngrads=4, damp=0.1, **options)
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
            twin = MFAC([p], ngrads=2, **options)
            twin.load_state_dict(optimizer.state_dict())
            optimizer = twin
        optimizer.damp = 0.2
        return p, optimizer.fisher.matvec(p), optimizer.fisher.diagonal()

    expected = run()
    with torch.device("meta"):
        found = run()
    assert all(map(torch.equal, found, expected))


def test_inputs_are_not_changed():
    g, x = torch.randn(6), torch.randn(6)
    copies = g.clone(), x.clone()
    fisher = DynamicInverseFisher(3, 6)
    fisher.update_matvec(g)
    fisher.matvec(x)
    assert torch.equal(g, copies[0]) and torch.equal(x, copies[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_grads": 0}, "num_grads: 0"),
        ({"num_grads": 2.5}, "num_grads: 2.5"),
        ({"dim": -1}, "dim: -1"),
        ({"damp": 0.0}, "damp: 0.0"),
        ({"damp": -1e-5}, "damp: -1e-05"),
        ({"damp": float("nan")}, "damp: nan"),
        ({"damp": float("inf")}, "damp: inf"),
        ({"dtype": torch.int32}, "dtype: torch.int32"),
        ({"coefficients": "fast"}, "coefficients: 'fast'"),
    ],
)
def test_wrong_arguments_of_the_window(arguments, message):
    with pytest.raises(ValueError, match=f"Invalid {message}"):
        DynamicInverseFisher(**{"num_grads": 3, "dim": 4, **arguments})


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_vectors_of_another_shape_are_refused(shape):
    fisher = DynamicInverseFisher(3, 4)
    for method in (fisher.update, fisher.update_matvec, fisher.matvec):
        with pytest.raises(ValueError, match=r"Expected a vector of shape \(4,\), got"):
            method(torch.ones(shape))


def test_setting_an_impossible_damp_is_refused():
    fisher = DynamicInverseFisher(3, 4)
    with pytest.raises(ValueError, match="Invalid damp: 0"):
        fisher.damp = 0


def test_the_way_back_from_float64_is_open_once_a_round():
    fisher = DynamicInverseFisher(3, 8, 1e-2)
    fisher.update(torch.randn(8))
    fisher.compute_dtype = torch.float64  # as after a gradient that strained float32
    seen = []
    for _ in range(4):
        fisher.update(torch.randn(8))
        seen.append(fisher.compute_dtype)
    assert seen == [torch.float64, torch.float64, torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("damp", "dtype"),
    [(1e-3, torch.float32), (1e-16, torch.float64), (1e16, torch.float64)],
)
def test_only_an_extreme_damp_takes_products_to_float64(damp, dtype, monkeypatch):
    seen, times = [], DenseWindow.transposed_times
    monkeypatch.setattr(
        DenseWindow, "transposed_times", lambda *given: seen.append(given[2]) or times(*given)
    )
    fisher = DynamicInverseFisher(2, 4, damp)
    fisher.update_matvec(damp**0.5 * torch.eye(4)[0])
    assert seen == [dtype]


def test_columns_may_come_from_several_shards():
    fisher = DynamicInverseFisher(2, 7, shards=["cpu"] * 3)
    g = torch.randn(7)
    fisher.update(g)
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(fisher.columns(start, stop)[0], g[start:stop])


# --- memory and import ----------------------------------------------------------------------------


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_is_one_window_in_memory():
    """Peak resident memory while a window of 256 MB is filled and exchanged."""
    grown = run_python(
        "import resource, torch, optim\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "fisher = optim.DynamicInverseFisher(2, 1000)\n"
        "for _ in range(3): fisher.update_matvec(torch.randn(1000))\n"
        "start = peak()\n"
        "fisher = optim.DynamicInverseFisher(64, 1_000_000)\n"
        "print(peak() - start)\n"
        "for _ in range(66): fisher.update_matvec(torch.randn(1_000_000))\n"
        "print(peak() - start)\n"
    )
    constructed, used = map(int, grown.split())
    assert constructed < 32e6  # pages are not touched before gradients come
    assert used < 1.25 * window_bytes(64, 1_000_000)


def test_importing_optim_changes_nothing_global():
    run_python(
        "import torch\n"
        "def settings():\n"
        "    return (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,\n"
        "            torch.get_float32_matmul_precision(), torch.get_num_threads(),\n"
        "            torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.get_rng_state().tolist(), torch.backends.cudnn.benchmark)\n"
        "before = settings()\n"
        "import optim\n"
        "assert settings() == before\n"
    )


# --- MFAC -----------------------------------------------------------------------------------------


class DenseMFAC:
    """The docstring of MFAC in float64, with a dense inverse. Groups are dicts with 'params'."""

    def __init__(self, groups, ngrads, damp):
        self.groups, self.m, self.damp = groups, ngrads, damp
        self.gradients = []
        self.weights = [p.detach().double().clone() for g in groups for p in g["params"]]
        self.v = [torch.zeros_like(w) for w in self.weights]

    def step(self, grads):
        """`grads`: one a parameter, or None."""
        settings = [g for g in self.groups for _ in g["params"]]
        flat = [
            torch.zeros_like(w) if g is None else g.double() + s.get("weight_decay", 0) * w
            for w, g, s in zip(self.weights, grads, settings, strict=True)
        ]
        self.gradients.append(torch.cat([g.flatten() for g in flat]))
        inverse = dense_inverse(ring(self.gradients, self.m), self.damp)
        update = inverse @ self.gradients[-1]
        sizes = [w.numel() for w in self.weights]
        for i, u in enumerate(update.split(sizes)):
            if grads[i] is not None:
                beta = settings[i].get("momentum", 0)
                self.v[i] = beta * self.v[i] + (1 - beta) * u.view_as(self.weights[i])
                self.weights[i] -= settings[i]["lr"] * self.v[i]


def assert_weights(parameters, reference, tolerance=1e-5):
    for p, w in zip(parameters, reference, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gpus", [None, [], ["cpu", "cpu"]])
@pytest.mark.parametrize("way", WAYS)
def test_steps_follow_the_definition_group_by_group(way, gpus):
    a, b, c = (nn.Parameter(torch.randn(s)) for s in ((4, 3), (5,), (2, 3, 2)))
    groups = [
        {"params": [a, b], "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
        {"params": [c], "lr": 3e-2},
    ]
    reference = DenseMFAC(groups, ngrads=5, damp=0.1)
    optimizer = MFAC([dict(g) for g in groups], ngrads=5, damp=0.1, coefficients=way, gpus=gpus)
    for _ in range(13):
        grads = [torch.randn_like(p) for p in (a, b, c)]
        for p, g in zip((a, b, c), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        reference.step(grads)
        assert_weights((a, b, c), reference.weights)


def test_old_calls_of_the_paper_code_work():
    device = torch.device("cpu")
    p = nn.Parameter(torch.randn(6))
    optimizer = MFAC([p], 1e-2, 0.9, 1e-4, 8, 1e-4, device, device, [device, device], False)
    p.grad = torch.randn(6)
    optimizer.step()
    assert optimizer.fisher.num_grads == 8 and len(optimizer.fisher.windows) == 2
    MFAC([p])  # every default


def test_a_parameter_without_gradient_has_a_zero_column_and_stays():
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    group = {"params": [a, b], "lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}
    reference = DenseMFAC([group], ngrads=4, damp=0.1)
    optimizer = MFAC([a, b], lr=0.1, momentum=0.5, weight_decay=0.2, ngrads=4, damp=0.1)
    for t in range(9):
        grads = [torch.randn(4), torch.randn(3) if t % 3 else None]
        before = b.detach().clone()
        a.grad, b.grad = grads
        optimizer.step()
        reference.step(grads)
        assert_weights((a, b), reference.weights)
        assert t % 3 or torch.equal(b, before)


def test_without_any_gradient_nothing_happens():
    p = nn.Parameter(torch.randn(4))
    before = p.detach().clone()
    optimizer = MFAC([p], ngrads=4, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(p, before) and optimizer.fisher.count == 0


def test_a_group_added_later_has_zero_history():
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 2))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2, "momentum": 0.3}]
    reference = DenseMFAC(groups, ngrads=4, damp=0.1)
    optimizer = MFAC([a], lr=0.1, ngrads=4, damp=0.1)
    for t in range(11):
        if t == 6:
            optimizer.add_param_group(groups[1])
        # Before b is there, its gradient is zero and it does not move: as if it were None.
        grads = [torch.randn(4), torch.randn(3, 2) if t >= 6 else None]
        a.grad, b.grad = grads
        optimizer.step()
        reference.step(grads)
        assert_weights((a, b), reference.weights)


def test_damp_changes_between_steps():
    p = nn.Parameter(torch.randn(5))
    group = {"params": [p], "lr": 0.1}
    reference = DenseMFAC([group], ngrads=3, damp=1.0)
    optimizer = MFAC([p], lr=0.1, ngrads=3, damp=1.0)
    for t in range(8):
        optimizer.damp = reference.damp = 2.0**-t
        p.grad = torch.randn(5)
        reference.step([p.grad])
        optimizer.step()
        assert_weights([p], reference.weights)


def test_learning_rates_may_be_scheduled_and_tensors():
    weights = torch.randn(5)
    grads = [torch.randn(5) for _ in range(6)]

    def run(lr):
        p = nn.Parameter(weights.clone())
        optimizer = MFAC([p], lr=lr, ngrads=3, damp=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        for g in grads:
            p.grad = g
            optimizer.step()
            scheduler.step()
        return p.detach()

    group = {"params": [weights], "lr": 0.1}
    reference = DenseMFAC([group], ngrads=3, damp=0.1)
    for t, g in enumerate(grads):
        group["lr"] = 0.1 * 0.1 ** (t // 2)
        reference.step([g])
    assert_weights([run(0.1), run(torch.tensor(0.1))], reference.weights * 2)


def test_a_closure_runs_under_grad_and_its_loss_is_returned():
    p = nn.Parameter(torch.ones(3))
    optimizer = MFAC([p], lr=0.1, ngrads=2, damp=1.0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 3.0 and not torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_types(dtype):
    p = nn.Parameter(torch.randn(6).to(dtype))
    group = {"params": [p], "lr": 0.5, "momentum": 0.5, "weight_decay": 0.1}
    optimizer = MFAC([p], lr=0.5, momentum=0.5, weight_decay=0.1, ngrads=3, damp=1.0)
    reference = DenseMFAC([group], ngrads=3, damp=1.0)
    for _ in range(5):
        reference.weights = [p.detach().double().clone()]
        p.grad = torch.randn(6).to(dtype)
        reference.step([p.grad])
        optimizer.step()
        assert p.dtype == dtype
        assert_weights([p], reference.weights, 4 * max(torch.finfo(dtype).eps, 1e-6))


def test_a_window_in_float64_keeps_all_digits_of_gradients_in_float64():
    p = nn.Parameter(torch.randn(6).double())
    reference = DenseMFAC([{"params": [p], "lr": 0.5, "momentum": 0.5}], ngrads=3, damp=1.0)
    optimizer = MFAC([p], 0.5, 0.5, ngrads=3, damp=1.0, window_dtype=torch.float64)
    for _ in range(5):
        p.grad = torch.randn(6).double() + 1e-10 * torch.randn(6).double()
        reference.step([p.grad])
        optimizer.step()
    assert_weights([p], reference.weights, 1e-13)


def test_parameters_of_mixed_types_share_a_window():
    a, b = nn.Parameter(torch.randn(3).bfloat16()), nn.Parameter(torch.randn(3).double())
    optimizer = MFAC([a, b], lr=0.1, ngrads=2)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert optimizer.fisher.shape == (6, 6)


# sparse


def test_sparse_keeps_zero_weights_of_matrices_out_of_the_window():
    weight, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        weight[torch.rand(4, 3) < 0.5] = 0
    zero = weight.detach() == 0
    group = {"params": [weight.detach()[~zero], bias], "lr": 0.1, "momentum": 0.9}
    reference = DenseMFAC([group], ngrads=3, damp=0.1)
    optimizer = MFAC([weight, bias], lr=0.1, momentum=0.9, ngrads=3, damp=0.1, sparse=True)
    assert optimizer.fisher.shape[0] == int((~zero).sum()) + 4
    for _ in range(7):
        weight.grad, bias.grad = torch.randn(4, 3), torch.randn(4)
        reference.step([weight.grad[~zero], bias.grad])
        optimizer.step()
        assert_weights([weight[~zero], bias], reference.weights)
        assert bool((weight[zero] == 0).all())
    assert bool((bias != 0).all()), "a bias that starts at zero is trained"


def test_sparse_may_be_masks_and_differ_by_group():
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(5))
    mask = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        a[0] = 0
    optimizer = MFAC(
        [{"params": [a], "sparse": False}, {"params": [b], "sparse": [mask]}],
        sparse=True,
        ngrads=2,
        lr=0.1,
    )
    assert optimizer.fisher.shape[0] == 6 + 3
    assert [group["sparse"] for group in optimizer.param_groups] == [False, True]
    before = b.detach().clone()
    a.grad, b.grad = torch.ones(2, 3), torch.ones(5)
    optimizer.step()
    assert torch.equal(b[~mask], before[~mask]) and bool((b[mask] != before[mask]).all())
    assert bool((a[0] != 0).all())


def test_a_list_of_masks_may_leave_parameters_whole():
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))
    with torch.no_grad():
        a[0] = 0  # no mask, although it has zeros
    mask = torch.tensor([True, False, True, True])
    group = {"params": [a.detach(), b.detach()[mask]], "lr": 0.1}
    reference = DenseMFAC([group], ngrads=3, damp=0.1)
    optimizer = MFAC([a, b], lr=0.1, ngrads=3, damp=0.1, sparse=[None, mask])
    assert optimizer.fisher.shape == (9, 9)
    still = b.detach()[~mask]
    for _ in range(5):
        a.grad, b.grad = torch.randn(2, 3), torch.randn(4)
        reference.step([a.grad, b.grad[mask]])
        optimizer.step()
        assert_weights([a, b[mask]], reference.weights)
    assert torch.equal(b.detach()[~mask], still)


def test_parameters_with_nothing_in_the_window():
    a, b, c = (
        nn.Parameter(torch.zeros(2, 2)),
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.ones(0)),
    )
    optimizer = MFAC([a, b, c], sparse=True, ngrads=2, lr=torch.tensor([0.1]))
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = MFAC([a, b, c], sparse=True, ngrads=2)
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert bool((a == 0).all())


def test_masks_are_copied():
    p, mask = nn.Parameter(torch.randn(4)), torch.tensor([True, False, True, True])
    optimizer = MFAC([p], sparse=[mask], ngrads=2)
    mask.zero_()
    p.grad = torch.ones(4)
    optimizer.step()


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    optimizer = MFAC([nn.Parameter(torch.randn(4))], ngrads=numpy.int64(3), damp=numpy.float64(0.1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_masks_in_the_constructor_do_not_concern_groups_added_later():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    optimizer = MFAC([a], sparse=[torch.tensor([True, False, True, False])], ngrads=2)
    optimizer.add_param_group({"params": [b]})
    assert optimizer.fisher.shape[0] == 4


# faults


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_skips_the_step(bad):
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([p], lr=0.1, momentum=0.9, ngrads=3)
    for _ in range(4):
        p.grad = torch.randn(4)
        optimizer.step()
    before = copy.deepcopy((p.detach(), optimizer.state_dict()))
    p.grad = torch.tensor([1.0, bad, 0.0, 2.0])
    with pytest.warns(UserWarning, match="NaN or Inf"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert torch.equal(p, before[0])
    state = optimizer.state_dict()
    state["state"][0]["fisher"]["skipped_steps"] = 0
    assert_same_state(state, before[1])


def test_a_gradient_that_does_not_fit_changes_nothing():
    fisher = DynamicInverseFisher(3, 4)
    fisher.update(torch.randn(4))
    before = copy.deepcopy(fisher.state_dict())
    for call in (fisher.update, fisher.update_matvec):
        for wrong in (torch.randn(5), torch.ones(4, dtype=torch.complex64)):
            with pytest.raises(ValueError, match="Expected a vector"):
                call(wrong)
    assert_same_state(fisher.state_dict(), before)


def test_a_non_finite_gradient_raises_if_asked():
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([p], ngrads=3, on_nonfinite="raise")
    p.grad = torch.full((4,), float("nan"))
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()


def test_a_gradient_scaler_decides_about_its_steps():
    """It unscales the gradients that enter the window, and an overflow never reaches it."""
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([p], lr=0.1, ngrads=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.square().sum()).backward()
    expected = 2 * p.detach()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(optimizer.fisher.columns(0, 4)[0], expected)
    before = p.detach().clone()
    optimizer.zero_grad()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before) and optimizer.fisher.count == 1
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"momentum": 1.0}, "Invalid momentum: 1.0"),
        ({"momentum": -0.1}, "Invalid momentum: -0.1"),
        ({"weight_decay": -1e-4}, "Invalid weight_decay: -0.0001"),
        ({"ngrads": 0}, "Invalid num_grads: 0"),
        ({"damp": 0}, "Invalid damp: 0"),
        ({"on_nonfinite": "ignore"}, "Invalid on_nonfinite: 'ignore'"),
        ({"coefficients": "none"}, "Invalid coefficients: 'none'"),
        ({"sparse": [None, None]}, "2 masks for 1 parameters"),
        ({"sparse": [torch.ones(3, dtype=torch.bool)]}, r"mask \(torch.bool, \(3,\)\)"),
        ({"sparse": [torch.ones(4)]}, r"mask \(torch.float32"),
        ({"sparse": [[True] * 4]}, "mask .*list"),
        ({"sparse": None}, "Invalid sparse: None"),
        ({"damp": "small"}, "Invalid damp: 'small'"),
        ({"ngrads": True}, "Invalid num_grads: True"),
        ({"lr": torch.ones(2)}, "1-element"),
    ],
)
def test_wrong_arguments_of_the_optimizer(arguments, message):
    with pytest.raises(ValueError, match=message):
        MFAC([nn.Parameter(torch.randn(4))], **arguments)


def test_a_wrong_group_is_refused_and_leaves_the_optimizer_as_it_was():
    p, q = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    optimizer = MFAC([p], ngrads=3)
    for wrong in ({"lr": -1}, {"momentum": 2}, {"sparse": [None, None]}):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": [q], **wrong})
    assert len(optimizer.param_groups) == 1 and optimizer.fisher.shape == (4, 4)
    p.grad = torch.randn(4)
    optimizer.step()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = MFAC(embedding.parameters(), ngrads=2)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        optimizer.step()


# state


def small_model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def train(model, optimizer, batches, scheduler=None):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def optimizer_for(model, way="incremental"):
    return MFAC(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 1e-3},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "lr": 1e-2},
        ],
        lr=3e-3,
        momentum=0.9,
        ngrads=6,
        damp=1e-4,
        sparse=True,
        coefficients=way,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [0, 4, 15])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(before, way):
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(25)]
    model = small_model()
    with torch.no_grad():
        model[4].weight[:, ::2] = 0
    optimizer = optimizer_for(model, way)
    train(model, optimizer, batches[:before])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    optimizer.damp = 1e-3
    train(model, optimizer, batches[before:])

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = small_model()
    resumed.load_state_dict(weights)
    # Another window size and damping than the saved ones, and no zero weights to find masks by.
    other = MFAC(resumed.parameters(), ngrads=2)
    with pytest.raises(ValueError):
        other.load_state_dict(state)  # other groups
    other = optimizer_for(resumed, way)
    other.load_state_dict(state)
    other.damp = 1e-3
    train(resumed, other, batches[before:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(other.state_dict(), optimizer.state_dict())


def test_masks_momentum_and_window_size_come_from_the_state():
    p = nn.Parameter(torch.randn(3, 3))
    with torch.no_grad():
        p[0] = 0
    optimizer = MFAC([p], lr=0.1, momentum=0.9, ngrads=4, damp=0.3, sparse=True)
    for _ in range(6):
        p.grad = torch.randn(3, 3)
        optimizer.step()
    q = nn.Parameter(p.detach().clone() + 1)
    other = MFAC([q], ngrads=9)
    other.load_state_dict(optimizer.state_dict())
    assert other.fisher.num_grads == 4 and other.damp == 0.3
    assert other.fisher.shape == (6, 6) and other.param_groups[0]["momentum"] == 0.9
    assert_same_state(other.state_dict(), optimizer.state_dict())


def test_columns_of_all_weights_are_taken_where_a_mask_has_fewer():
    """Sharded parameters are saved so, and may be made whole for a run of one process."""
    p, mask = nn.Parameter(torch.randn(3, 4)), torch.rand(3, 4) < 0.5
    optimizer, other = (MFAC([p], ngrads=4, sparse=[mask]) for _ in range(2))
    for _ in range(5):
        p.grad = torch.randn(3, 4)
        optimizer.step()
    state = optimizer.state_dict()
    entries = state["state"][0]
    whole = torch.zeros(4, 3, 4)
    whole[:, mask] = entries["grads"]
    state["state"][0] = {**entries, "grads": whole}
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), optimizer.state_dict())


def test_low_precision_models_keep_float32_momentum_on_resume():
    p = nn.Parameter(torch.randn(5).bfloat16())
    optimizer = MFAC([p], momentum=0.9, ngrads=3)
    p.grad = torch.randn(5).bfloat16()
    optimizer.step()
    other = MFAC([nn.Parameter(p.detach().clone())], ngrads=3)
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(other.state_dict(), optimizer.state_dict())


def test_a_learning_rate_of_zero_fills_the_window_alone():
    p = nn.Parameter(torch.randn(4))
    before, optimizer = p.detach().clone(), MFAC([p], lr=0, weight_decay=0, ngrads=3)
    p.grad = torch.randn(4)
    optimizer.step()
    assert torch.equal(p, before) and torch.equal(optimizer.fisher.columns(0, 4)[0], p.grad)


def test_without_momentum_none_is_kept():
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([p], ngrads=3)
    p.grad = torch.randn(4)
    optimizer.step()
    assert "momentum_buffer" not in optimizer.state[p]


def test_a_loaded_optimizer_shares_nothing_with_its_source():
    p, q = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    optimizer, other = (MFAC([w], momentum=0.9, ngrads=3) for w in (p, q))
    p.grad = torch.randn(4)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(other.state_dict())
    optimizer.step()
    assert_same_state(other.state_dict(), before)


def test_the_state_of_another_model_or_optimizer_is_refused():
    optimizer = MFAC([nn.Parameter(torch.randn(4))], ngrads=3)
    with pytest.raises(ValueError, match="belongs to another model"):
        optimizer.load_state_dict(MFAC([nn.Parameter(torch.randn(5))], ngrads=3).state_dict())
    with pytest.raises(ValueError, match="not one of MFAC"):
        optimizer.load_state_dict(torch.optim.SGD([nn.Parameter(torch.randn(4))]).state_dict())


def test_what_a_state_lacks_of_frozen_parameters_is_zero():
    """torch.distributed.checkpoint may leave them out; what all share is of all columns."""
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    optimizer, gradients = MFAC([a, b], ngrads=4, damp=0.1), []
    for _ in range(6):
        a.grad, b.grad = torch.randn(4), torch.randn(3)
        gradients.append(torch.cat([a.grad, torch.zeros(3)]))
        optimizer.step()
    state = optimizer.state_dict()
    del state["state"][1]
    other = MFAC([a, b], ngrads=4, damp=0.1)
    other.load_state_dict(state)
    for _ in range(3):
        gradients.append(torch.randn(7))
        inverse = dense_inverse(ring(gradients, 4), 0.1)
        result = other.fisher.update_matvec(gradients[-1])
        assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(duplicate):
    model = small_model()
    optimizer = optimizer_for(model)
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(9)]
    train(model, optimizer, batches)
    model2, optimizer2 = duplicate((model, optimizer))
    train(model, optimizer, batches)
    train(model2, optimizer2, batches)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p, q)


def test_window_bytes_counts_the_window_and_the_two_small_matrices():
    optimizer = MFAC([nn.Parameter(torch.randn(50))], ngrads=6)
    fisher = optimizer.fisher
    tensors = [
        *(window.G for window in fisher.windows),
        fisher.coefficients.K,
        fisher.coefficients.P,
    ]
    assert window_bytes(6, 50) == sum(t.numel() * t.element_size() for t in tensors)


def test_the_condition_limit_separates_the_types():
    """Both ways must agree on when float32 suffices, or they would differ in cost and result."""
    G = torch.randn(6, 40) + 2
    conditions = []
    for way in WAYS:
        fisher = DynamicInverseFisher(6, 40, 1e-3, coefficients=way)
        for g in G:
            fisher.update(g)
        conditions.append(float(fisher.coefficients.condition()))
    assert conditions[0] == pytest.approx(conditions[1], rel=1e-9)
    P = torch.linalg.inv(6e-3 * torch.eye(6).double() + G.double() @ G.double().T)
    A = torch.linalg.inv(P)
    assert conditions[0] == pytest.approx(float((P.diagonal() * A.diagonal()).max()), rel=1e-6)
    assert optim.CONDITION_LIMIT[torch.float32] < optim.CONDITION_LIMIT[torch.float64]


# --- late checks, as on a GPU, where nothing waits for the device; a CPU can do so too -----------


def lazily(optimizer_or_fisher):
    """The same object, reading its checks a step late."""
    fisher = getattr(optimizer_or_fisher, "fisher", optimizer_or_fisher)
    fisher.lazy = True
    return optimizer_or_fisher


@pytest.mark.parametrize("coefficients", ["incremental", "paper"])
def test_late_checks_change_no_result(coefficients):
    m, d = 6, 40
    now = DynamicInverseFisher(m, d, 1e-3, coefficients=coefficients)
    late = lazily(DynamicInverseFisher(m, d, 1e-3, coefficients=coefficients))
    for _ in range(3 * m):
        g = torch.randn(d)
        assert torch.equal(now.update_matvec(g), late.update_matvec(g))
        g = torch.randn(d)
        now.update(g)
        late.update(g)
    assert torch.equal(now.matvec(g), late.matvec(g))
    assert (now.count, now.condition) == (late.count, late.condition)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("filled", [1, 4, 7])
def test_a_late_refusal_moves_nothing_and_leaves_the_window_alone(bad, filled):
    m, d = 4, 30
    now, late = DynamicInverseFisher(m, d, 1e-3), lazily(DynamicInverseFisher(m, d, 1e-3))
    gradients = torch.randn(filled + 3, d)
    for g in gradients[:filled]:
        now.update(g)
        late.update(g)
    broken = torch.randn(d)
    broken[3] = bad
    assert not late.update_matvec(broken).any()
    assert late.accepted == 0
    with pytest.raises(optim.NonFiniteGradientError):
        late.settle()
    assert late.count == filled
    assert torch.equal(late.windows[0].G, now.windows[0].G)
    for g in gradients[filled:]:
        torch.testing.assert_close(late.update_matvec(g), now.update_matvec(g))
        assert late.accepted == 1
    assert torch.equal(late.windows[0].G, now.windows[0].G)


def test_a_late_skip_leaves_weights_and_momentum_alone():
    """The run is the one without the broken gradient, to the bits; the skip is counted."""
    runs = []
    start = [torch.randn(5, 4), torch.randn(7)]
    steps = [[torch.randn(5, 4), torch.randn(7)] for _ in range(12)]
    for late in (False, True):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = MFAC(params, lr=0.1, momentum=0.9, weight_decay=0.01, ngrads=4, damp=1e-2)
        if late:
            lazily(optimizer)
        for i, grads in enumerate(steps):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            if i in (5, 6, 9):
                params[0].grad[2, 1] = float("nan")
            before = [p.detach().clone() for p in params]
            if i == (6 if late else 5):  # the first one warns, when it is read
                with pytest.warns(UserWarning, match="NaN or Inf"):
                    optimizer.step()
            else:
                optimizer.step()
            moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
            assert all(moved) if i not in (5, 6, 9) else not any(moved)
        assert optimizer.skipped_steps == 3
        assert optimizer.fisher.count == 9
        runs.append(params)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("compress", [None, 0.5])
def test_a_late_zero_gradient_is_accepted(compress):
    """Else it would leave the momentum as it was."""
    fisher = lazily(DynamicInverseFisher(3, 8, 1e-2, compress=compress))
    for g in (torch.randn(8), torch.zeros(8)):
        result = fisher.update_matvec(g)
        assert fisher.accepted == 1
    assert not result.any()


def test_late_updates_whose_result_nobody_asks_for_are_seen_to():
    """Nearly parallel gradients, of which float32 gives no A⁻¹ that will do."""
    m, d, damp = 5, 300, 1e-5
    fisher, x = lazily(DynamicInverseFisher(m, d, damp)), torch.randn(d)
    gradients = [1 + 1e-3 * torch.randn(d) for _ in range(2 * m)]
    for g in gradients:
        fisher.update(g)
    inverse = dense_inverse(ring(gradients, m), damp)
    assert relative_error(fisher.matvec(x), inverse @ x.double()) < 1e-5


def test_a_late_refusal_is_raised_if_asked_for():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = lazily(MFAC([p], ngrads=2, on_nonfinite="raise"))
    p.grad = torch.tensor([1.0, float("inf"), 0.0])
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(optim.NonFiniteGradientError):
        optimizer.step()
    optimizer.step()
    assert not torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize("spread", [1e-3, 1e-1, 10.0])
def test_late_checks_let_no_wrong_result_through(spread):
    """Parallel gradients of norm 100 with λ = 1e-5: each result is right to 1e-3, or zero and not
    accepted. What was read makes later ones right."""
    m, d, damp = 16, 2000, 1e-5
    common = 100 * torch.nn.functional.normalize(torch.randn(d).double(), dim=0)
    fisher, G, refused = lazily(DynamicInverseFisher(m, d, damp)), torch.zeros(m, d).double(), 0
    for t in range(4 * m):
        g = common + spread * torch.nn.functional.normalize(torch.randn(d).double(), dim=0)
        G[t % m] = g.float()
        result = fisher.update_matvec(g.float())
        if fisher.accepted == 0:
            assert not result.any()
            refused += 1
            continue
        A = m * damp * torch.eye(m).double() + G @ G.T
        expected = m * G.T @ torch.linalg.solve(A, torch.eye(m).double()[t % m])
        assert (result - expected).norm() <= 1e-3 * expected.norm()
    assert refused <= 3


def test_a_late_failure_of_the_update_is_seen_to(monkeypatch):
    """P becomes NaN: the step moves nothing, and the next one is right again."""
    m, d, damp = 5, 30, 1e-3
    fisher, G = lazily(DynamicInverseFisher(m, d, damp)), torch.randn(m + 2, d)
    for g in G[:m]:
        fisher.update(g)
    fisher.settle()
    fisher.coefficients.P.fill_(torch.nan)
    assert not fisher.update_matvec(G[m]).any()
    result = fisher.update_matvec(G[m + 1])
    expected = dense_inverse(G[2:], damp) @ G[m + 1].double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def test_too_little_damping_is_said_a_step_late():
    m, d = 4, 50
    fisher = lazily(DynamicInverseFisher(m, d, 1e-30))
    g = torch.ones(d)
    with pytest.raises(ValueError, match="raise damp"):
        for _ in range(m + 2):
            fisher.update_matvec(g)
            assert fisher.accepted == 0 or fisher.count == 1


def test_a_state_of_an_optimizer_that_reads_late_has_read():
    p = torch.nn.Parameter(torch.randn(6))
    optimizer = lazily(MFAC([p], ngrads=3))
    p.grad = torch.full((6,), float("nan"))
    optimizer.step()
    with pytest.warns(UserWarning, match="NaN or Inf"):
        state = optimizer.state_dict()
    other = MFAC([torch.nn.Parameter(p.detach().clone())], ngrads=3)
    other.load_state_dict(state)
    assert other.skipped_steps == optimizer.skipped_steps == 1
    assert other.fisher.count == 0


def test_copies_of_an_optimizer_that_reads_late_have_read():
    p = torch.nn.Parameter(torch.randn(6))
    optimizer = lazily(MFAC([p], ngrads=3))
    p.grad = torch.full((6,), float("nan"))
    optimizer.step()
    with pytest.warns(UserWarning, match="NaN or Inf"):
        twin = copy.deepcopy(optimizer)
    assert twin.skipped_steps == optimizer.skipped_steps == 1
    assert twin.fisher.count == 0


def test_masks_are_looked_up_once(monkeypatch):
    """On a GPU, counting the True of a mask waits for the device."""
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = MFAC([p], ngrads=3, sparse=[torch.rand(4, 4) > 0.5])
    p.grad = torch.randn(4, 4)
    optimizer.step()

    def waits(*_):
        raise AssertionError("nonzero() waits for the device")

    monkeypatch.setattr(torch.Tensor, "nonzero", waits)
    monkeypatch.setattr(torch.Tensor, "__int__", waits)
    optimizer.step()
