"""The window (`DynamicInverseFisher`) and the optimizer (`MFAC`) against dense float64 oracles."""

import copy
import inspect
import io
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reference import dense_inverse, ring, woodbury_column
from sklearn.datasets import load_digits
from torch import nn

import checks
from optim import MFAC, DampTooSmallError, DynamicInverseFisher, NonFiniteGradientError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def relative_error(x, reference):
    return float((x.double() - reference).norm() / reference.norm())


def dense(fisher):
    """The window (m, d) in float64."""
    return torch.cat(list(fisher.window.tiles()), 1)


# --- DynamicInverseFisher -------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, ["cpu"] * 3])
@pytest.mark.parametrize(("m", "d"), [(1, 6), (7, 40), (33, 33), (20, 9), (1, 1), (5, 2)])
def test_every_exchange_gives_the_dense_inverse(m, d, shards):
    fisher = DynamicInverseFisher(m, d, 1e-2, shards=shards)
    x, gradients = torch.randn(d), []
    torch.testing.assert_close(fisher.matvec(x), 100 * x)
    for _ in range(3 * m + 2):
        gradients.append(torch.randn(d))
        inverse = dense_inverse(ring(gradients, m), 1e-2)
        result = fisher.update_matvec(gradients[-1])
        assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5
        assert relative_error(fisher.matvec(x), inverse @ x.double()) < 1e-6
    torch.testing.assert_close(fisher.diagonal(), inverse.diagonal())


@pytest.mark.parametrize("m", [31, 1025])
def test_any_window_size_is_accepted(m):
    """Neither a multiple of 32 nor at most 1024."""
    fisher, gradients = DynamicInverseFisher(m, 50, 0.1), list(torch.randn(20, 50))
    for g in gradients:
        result = fisher.update_matvec(g)
    inverse = dense_inverse(ring(gradients, m), 0.1)
    assert relative_error(result, inverse @ g.double()) < 1e-5


@pytest.mark.parametrize("common", [0.0, 1.0, 2.0])
def test_ten_rounds_of_exchanges_stay_in_float32_and_within_1e_5(common):
    """Gradients with a mean as large as their noise, and larger: sums with few sign changes."""
    m, d, damp = 32, 20_000, 1e-5
    fisher, mean, G = DynamicInverseFisher(m, d, damp), torch.randn(d), torch.zeros(m, d)
    for t in range(10 * m):
        G[t % m] = 0.01 * (common * mean + torch.randn(d))
        result = fisher.update_matvec(G[t % m])
        if t % 61 == 0 or t >= 10 * m - 2:
            assert relative_error(result, woodbury_column(G, damp, t % m)) < 1e-5
    assert not fisher.precision.exact


@pytest.mark.parametrize(
    ("m", "d", "strength"), [(64, 50_000, 1e9), (256, 2000, 0.3), (256, 2000, 8.0)]
)
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_nearly_parallel_gradients(m, d, strength, noise):
    """Of squared norm strength·mλ. Where they are large, K summed in float32 has negative
    eigenvalues; about as large as the damping, the terms of Gᵀz cancel to one part in m."""
    damp = 1e-5
    fisher = DynamicInverseFisher(m, d, damp)
    common, G = nn.functional.normalize(torch.randn(d), dim=0), torch.zeros(m, d)
    for t in range(m + 2):
        g = common + noise * nn.functional.normalize(torch.randn(d), dim=0)
        G[t % m] = g * (strength * m * damp) ** 0.5
        result = fisher.update_matvec(G[t % m])
    assert relative_error(result, woodbury_column(G, damp, t % m)) < 2e-5


def test_gradients_far_larger_than_the_damping():
    """P falls from 1/mλ by 18 orders of magnitude; the rest of the old column must not stay."""
    m, d, damp = 6, 40, 1e-10
    fisher, gradients = DynamicInverseFisher(m, d, damp), list(1e4 * torch.randn(2 * m, d))
    for t, g in enumerate(gradients):
        result = fisher.update_matvec(g)
        G = ring(gradients[: t + 1], m)
        assert relative_error(result, woodbury_column(G, damp, t % m)) < 1e-5
    A = m * damp * torch.eye(m).double() + G.double() @ G.double().T
    expected = torch.linalg.inv(A)
    error = (fisher.coefficients.P - expected).abs().max()
    assert error < 1e-5 * expected.max()


def test_a_huge_gradient_enters_and_leaves():
    m, d, damp = 8, 60, 1e-4
    fisher, gradients = DynamicInverseFisher(m, d, damp), torch.randn(3 * m + 3, d)
    gradients[m] *= 1e6
    for t, g in enumerate(gradients):
        result = fisher.update_matvec(g)
        expected = woodbury_column(ring(gradients[: t + 1], m), damp, t % m)
        assert relative_error(result, expected) < 1e-5


def test_a_damping_too_small_is_refused_with_advice_that_works_and_nothing_changes():
    fisher, g, x = DynamicInverseFisher(4, 30, 1e-12), 1e6 * torch.randn(30), torch.randn(30)
    fisher.update(g)
    before = copy.deepcopy(fisher.state_dict())
    for call in (fisher.update, fisher.update_matvec):
        for _ in range(2):  # the second time is no different
            with pytest.raises(
                DampTooSmallError,
                match=r"damp = 1e-12 is too small .* even in float64; raise damp to about \S+ or",
            ) as refusal:
                call(g)
    after = fisher.state_dict()
    assert torch.equal(after["window"][0]["G"], before["window"][0]["G"])
    for name in ("K", "P"):  # may have been computed anew, in float64
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=0)
    assert (after["count"], after["damp"]) == (before["count"], before["damp"])
    fisher.damp = float(str(refusal.value).split()[-1])
    fisher.update(g)
    inverse = dense_inverse(torch.stack([g, g]) / 2**0.5, fisher.damp)
    assert relative_error(fisher.matvec(x), inverse @ x.double()) < 2e-5


def test_a_product_that_cancels_altogether_is_refused():
    fisher = DynamicInverseFisher(4, 30, 1e-10)
    g = 1e4 * torch.randn(30)
    expected = 4 * g / (4e-10 + g.double() @ g.double())
    assert relative_error(fisher.update_matvec(g), expected) < 1e-5
    with pytest.raises(DampTooSmallError, match="too small"):
        fisher.matvec(g)


def test_float64_is_left_after_a_round():
    m, d = 8, 100
    fisher, g, exact = DynamicInverseFisher(m, d, 1e-6), torch.randn(d), []
    for t in range(3 * m):
        fisher.update((g if t < m else 0) + 1e-3 ** (t < m) * torch.randn(d))
        exact.append(fisher.precision.exact)
    assert any(exact[:m]) and not any(exact[2 * m :])


def test_at_most_a_twentieth_of_training_on_digits_is_in_float64():
    """A small CNN, λ = 1e-5, m = 256: 300 steps to a loss near zero, with the errors of a few."""
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8).expand(-1, 3, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, 32)
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten()
    model, m = nn.Sequential(*layers, nn.Linear(16 * 49, 10)), 256
    optimizer = MFAC(model.parameters(), lr=1e-3, momentum=0.9, ngrads=m, damp=1e-5)
    fisher, exact, losses = optimizer.fisher, 0, []
    for t in range(300):
        rows = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        losses.append(float(loss.detach()))
        if t % 60 == 59:
            g = torch.cat([p.grad.flatten() for p in model.parameters()])
            result = copy.deepcopy(fisher).update_matvec(g)
            G = fisher.window.blocks[0].G.clone()
            G[t % m] = g
            assert relative_error(result, woodbury_column(G, 1e-5, t % m)) < 2e-5
        optimizer.step()
        exact += bool(fisher.precision.exact)
    assert sum(losses[-20:]) / 20 < 0.3 and optimizer.raised_steps == 0
    assert exact <= 0.05 * 300


def test_damp_can_change_at_any_time_and_costs_nothing_where_it_does_not():
    m, d = 5, 14
    fisher, gradients = DynamicInverseFisher(m, d, 1e-1), []
    for t in range(3 * m):
        if t % 4 == 3:
            fisher.damp = 10.0 ** -(t % 3)
        P = fisher.coefficients.P
        fisher.damp = fisher.damp
        assert fisher.coefficients.P is P
        gradients.append(torch.randn(d))
        result = fisher.update_matvec(gradients[-1])
        inverse = dense_inverse(ring(gradients, m), fisher.damp)
        assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5
    with pytest.raises(ValueError, match="Invalid damp: 0"):
        fisher.damp = 0


@pytest.mark.parametrize("shards", [None, ["cpu", "cpu"]])
def test_new_columns_have_a_history_of_zero(shards):
    m, d, more = 5, 8, 3
    fisher = DynamicInverseFisher(m, d, 1e-2, shards=shards)
    gradients = [torch.cat([torch.randn(d), torch.zeros(more)]) for _ in range(m + 1)]
    for g in gradients:
        fisher.update(g[:d])
    fisher.grow(more)
    gradients.append(torch.randn(d + more))
    result = fisher.update_matvec(gradients[-1])
    inverse = dense_inverse(ring(gradients, m), 1e-2)
    assert relative_error(result, inverse @ gradients[-1].double()) < 1e-5


# --- the rest of the process ----------------------------------------------------------------------


PRECISIONS = {
    "torch.backends": ["none", "ieee", "tf32"],
    "torch.backends.mkldnn.matmul": ["none", "ieee", "tf32", "bf16"],
    "torch.backends.cuda.matmul": ["none", "ieee", "tf32"],
}


def settings():
    return [eval(name).fp32_precision for name in PRECISIONS], torch.is_grad_enabled()


def check_training():
    """Steps of nearly parallel gradients, against the oracle."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(500, generator=generator) + 0.1 * torch.randn(20, 500, generator=generator)
    p = nn.Parameter(torch.zeros(500))
    optimizer = MFAC([p], lr=1.0, ngrads=8, damp=1e-2)
    for t, g in enumerate(G):
        p.detach().zero_()
        p.grad = g.clone()
        optimizer.step()
        assert relative_error(-p.detach(), woodbury_column(ring(G[: t + 1], 8), 1e-2, t % 8)) < 2e-5
    x = torch.ones(500)
    expected = dense_inverse(ring(G, 8), 1e-2) @ x.double()
    assert relative_error(optimizer.fisher.matvec(x), expected) < 2e-5


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in PRECISIONS for v in PRECISIONS[n]])
def test_precision_of_the_process_is_neither_trusted_nor_changed(name, value):
    place = eval(name)
    before = place.fp32_precision
    try:
        place.fp32_precision = value
        during = settings()
        check_training()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_training()
        assert settings() == during
    finally:
        place.fp32_precision = before


def test_two_threads_do_not_meet():
    before = settings()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: check_training(), range(10)))
    assert settings() == before


@pytest.mark.parametrize("options", [{}, {"compress": 0.3}, {"window_dtype": "float8_e4m3fn"}])
def test_the_default_device_of_torch_does_not_matter(options):
    """As after torch.set_default_device("cuda"), with a model on the CPU."""
    weights, gradients = torch.randn(12), torch.randn(7, 12)

    def run():
        p = nn.Parameter(weights.clone())
        optimizer = MFAC([p], lr=0.1, momentum=0.5, ngrads=4, damp=0.1, **options)
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
            twin = MFAC([p], ngrads=4, damp=0.1, **options)
            twin.load_state_dict(optimizer.state_dict())
            optimizer = twin
        optimizer.damp = 0.2
        return p, optimizer.fisher.matvec(p), optimizer.fisher.diagonal()

    expected = run()
    with torch.device("meta"):
        found = run()
    assert all(map(torch.equal, found, expected))


def test_importing_optim_changes_nothing_global():
    code = (
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
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert end.returncode == 0, end.stderr


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1e-5, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["num_grads", "dim", "damp"])
def test_wrong_arguments_of_the_window(name, bad):
    with pytest.raises(ValueError, match=f"Invalid {name}: {bad}"):
        DynamicInverseFisher(**{"num_grads": 3, "dim": 4, name: bad})


def test_vectors_that_do_not_fit_change_nothing():
    fisher = DynamicInverseFisher(3, 4)
    fisher.update(torch.randn(4))
    before = copy.deepcopy(fisher.state_dict())
    for call in (fisher.update, fisher.update_matvec, fisher.matvec):
        for shape in (3, 5, (4, 1), ()):
            with pytest.raises(ValueError, match=r"Expected a vector of shape \(4,\) .*got"):
                call(torch.ones(shape))
        with pytest.raises(ValueError, match="Expected a vector"):
            call(torch.ones(4, dtype=torch.complex64))
    after = fisher.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("K", "P"))
    assert after["count"] == 1 and torch.equal(after["window"][0]["G"], before["window"][0]["G"])


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


def assert_same_state(a, b):
    """Equal to the bits."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, (dict, list)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same_state(a[key], b[key])
    else:
        assert a == b


def assert_weights(parameters, reference, tolerance=1e-5):
    for p, w in zip(parameters, reference, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gpus", [None, [], ["cpu", "cpu"]])
def test_steps_follow_the_definition_group_by_group(gpus):
    a, b, c = (nn.Parameter(torch.randn(s)) for s in ((4, 3), (5,), (2, 3, 2)))
    groups = [
        {"params": [a, b], "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
        {"params": [c], "lr": 3e-2},
    ]
    reference = DenseMFAC(groups, ngrads=5, damp=0.1)
    optimizer = MFAC([dict(g) for g in groups], ngrads=5, damp=0.1, gpus=gpus)
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
    assert optimizer.fisher.num_grads == 8 and len(optimizer.fisher.window.blocks) == 2
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
    assert optimizer.fisher.shape == (3, 3) and not a.any()


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


# --- faults ---------------------------------------------------------------------------------------


def stop(call, line, error):
    """Raises `error` before line number `line` that `call` reaches in the project; False if it ends
    before that."""
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if Path(frame.f_code.co_filename).parent != ROOT:
            return None
        left -= event == "line"
        if left == 0 and event == "line":
            raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except type(error):
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize(
    ("every", "options"),
    [(1, {}), (5, {"gpus": ["cpu"] * 2}), (5, {"window_dtype": "float16"}), (5, {"compress": 0.5})],
)
def test_after_an_exception_anywhere_in_a_step_later_ones_are_right(every, options):
    """As when Ctrl-C is pressed, or memory runs out and the loop goes on."""
    m, d = 2, 12
    p = nn.Parameter(torch.zeros(d))
    optimizer = MFAC([p], lr=1.0, ngrads=m, damp=0.1, **options)
    gradients, x = torch.randn(m + 1 + 1 + m, d), torch.randn(d).double()

    def step(optimizer, g):
        (p,) = optimizer.param_groups[0]["params"]
        p.detach().zero_()
        p.grad = g.clone()
        optimizer.step()
        return -p.detach()

    for g in gradients[: m + 1]:
        step(optimizer, g)
    line, stopped = 0, True
    while stopped:
        line += every
        twin = copy.deepcopy(optimizer)
        error = KeyboardInterrupt() if line % 2 else torch.OutOfMemoryError("CUDA out of memory")
        stopped = stop(lambda twin=twin: step(twin, gradients[m + 1]), line, error)
        result = copy.deepcopy(twin.fisher).matvec(x)
        assert relative_error(result, dense_inverse(dense(twin.fisher), 0.1) @ x) < 2e-5
        for g in gradients[m + 2 :]:
            before = twin.fisher.count
            u = step(twin, g)
            G = dense(twin.fisher)
            assert twin.fisher.count == before + 1
            newest = g.double() if "compress" in options else G[before % m]
            torch.testing.assert_close(newest.float(), g, rtol=1e-3, atol=1e-3)
            assert relative_error(u, dense_inverse(G, 0.1) @ newest) < 2e-5, f"line {line}"
        K = twin.fisher.coefficients.K
        torch.testing.assert_close(K, G @ G.T, rtol=1e-5, atol=1e-5)
    assert line > 60


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
    state["param_groups"][0]["fisher"]["skipped_steps"] = 0
    assert_same_state(state, before[1])


def test_a_model_that_has_become_nan_is_not_skipped_for_ever():
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([p], ngrads=3)

    def step(value):
        p.grad = torch.full((4,), value)
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(99):
            step(float("nan"))
        step(1.0)
        for _ in range(99):
            step(float("inf"))
    assert optimizer.skipped_steps == 198
    with pytest.raises(
        NonFiniteGradientError, match="100 gradients in a row have NaN or Inf; look"
    ):
        step(float("nan"))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("fault", [float("nan"), 1e8])
def test_a_warning_points_at_the_line_of_the_user(fault, wrapped):
    p = nn.Parameter(torch.ones(4))
    optimizer = MFAC([p], lr=1e-3, ngrads=3, damp=1e-12)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if wrapped else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            p.grad = torch.full((4,), fault)
            optimizer.step(); line = inspect.currentframe().f_lineno  # fmt: skip  # noqa: E702
            if scheduler:
                scheduler.step()
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]


def test_damp_is_raised_as_far_and_as_long_as_needed():
    """For gradients that are equal, and 1e12 times as long as λ^½: at least two of them."""
    m, d, damp = 3, 20, 1e-12
    p, g = nn.Parameter(torch.zeros(d)), 1e6 * torch.randn(d)
    optimizer = MFAC([p], lr=1.0, ngrads=m, damp=damp)
    rows = [torch.randn(d), *[g] * 4, *torch.randn(2 * m + 1, d)]
    raised = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t, row in enumerate(rows):
            p.detach().zero_()
            p.grad = row.clone()
            before = copy.deepcopy(optimizer.fisher)
            optimizer.step()
            used, G = optimizer.damp_in_use, ring(rows[: t + 1], m)
            assert relative_error(-p.detach(), woodbury_column(G, used, t % m)) < 2e-5
            raised += used > damp
            if used > before.damp:
                assert 10 ** round(
                    torch.tensor(used / damp).log10().item()
                ) * damp == pytest.approx(used)
                before.precision.raises_damp = False
                before.damp = used / 10
                with pytest.raises(DampTooSmallError):  # the smallest that will do
                    before.update(row)
    assert optimizer.damp == damp == optimizer.damp_in_use
    assert 0 < raised == optimizer.raised_steps < len(rows)
    (warning,) = caught
    assert re.match(
        "damp = 1e-12 is too small for these gradients: .* is used", str(warning.message)
    )
    state = optimizer.state_dict()
    other = MFAC([nn.Parameter(torch.zeros(d))], ngrads=m, damp=damp)
    other.load_state_dict(state)
    assert other.raised_steps == raised


def test_a_damp_that_is_set_is_raised_too_and_holds_once_it_suffices():
    p = nn.Parameter(torch.zeros(4))
    optimizer = MFAC([p], lr=0.1, ngrads=3, damp=1e-2)
    for scale in (1.0, 2.0):
        p.grad = torch.full((4,), scale)
        optimizer.step()
    optimizer.damp = 1e-25
    assert optimizer.damp == 1e-25 < optimizer.damp_in_use < 1e-2
    with pytest.warns(UserWarning, match="damp = 1e-25 is too small"):
        optimizer.step()
    optimizer.damp = 1e-2
    assert optimizer.damp == optimizer.damp_in_use == 1e-2


def test_a_non_finite_gradient_raises_if_asked_and_may_be_tried_again():
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([p], lr=0.1, ngrads=3, on_nonfinite="raise")
    p.grad = torch.full((4,), float("nan"))
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    before, p.grad = p.detach().clone(), torch.randn(4)
    optimizer.step()
    assert optimizer.fisher.count == 1 and not torch.equal(p, before)


def test_a_layer_that_was_resized_is_named():
    p, q = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 2))
    optimizer = MFAC([p, q], ngrads=3)
    q.data = torch.randn(5, 2)
    p.grad, q.grad = torch.randn(4), torch.randn(5, 2)
    said = r"group 0 has shape \(5, 2\), but had shape \(3, 2\) .*; build the optimizer anew"
    with pytest.raises(ValueError, match=said):
        optimizer.step()


def test_it_shows_its_settings():
    optimizer = MFAC([nn.Parameter(torch.randn(4))], ngrads=7, damp=0.25, window_dtype="bfloat16")
    for shown in ("lr: 0.001", "ngrads: 7", "damp: 0.25", "bfloat16"):
        assert shown in repr(optimizer)


def test_a_gradient_scaler_decides_about_its_steps():
    """It unscales the gradients that enter the window, and an overflow never reaches it."""
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([p], lr=0.1, ngrads=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.square().sum()).backward()
    expected = 2 * p.detach()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(optimizer.fisher.window.blocks[0].G[0], expected)
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
        ({"ngrads": 0}, "Invalid ngrads: 0; it must be an integer of at least 1"),
        ({"damp": 0}, "Invalid damp: 0"),
        ({"on_nonfinite": "ignore"}, "Invalid on_nonfinite: 'ignore'"),
        ({"sparse": [None, None]}, "2 masks for 1 parameters"),
        ({"sparse": [torch.ones(3, dtype=torch.bool)]}, r"mask \(Tensor of torch.bool \(3,\)\)"),
        ({"sparse": [torch.ones(4)]}, r"mask \(Tensor of torch.float32"),
        ({"sparse": [[True] * 4]}, "mask .*list"),
        ({"sparse": None}, "Invalid sparse: None"),
        ({"damp": "small"}, "Invalid damp: 'small'"),
        ({"ngrads": True}, "Invalid ngrads: True"),
        ({"lr": torch.ones(2)}, "1-element"),
    ],
)
def test_wrong_arguments_of_the_optimizer(arguments, message):
    with pytest.raises(ValueError, match=message):
        MFAC([nn.Parameter(torch.randn(4))], **arguments)


def test_a_wrong_group_is_refused_and_leaves_the_optimizer_as_it_was():
    p, q = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    optimizer = MFAC([p], ngrads=3)
    shared = {"damp": 1e-2, "ngrads": 5, "window_dtype": "bfloat16", "compress": 0.1}
    with pytest.raises(ValueError, match=r"damp: 0\.01; it must be the same in all groups; give"):
        MFAC([{"params": [q], "damp": 1e-2}])
    for wrong in (
        {"lr": -1},
        {"momentum": 2},
        {"sparse": [None, None]},
        *({n: v} for n, v in shared.items()),
    ):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": [q], **wrong})
    assert len(optimizer.param_groups) == 1 and optimizer.fisher.shape == (4, 4)
    p.grad = torch.randn(4)
    optimizer.step()


def test_groups_of_the_caller_stay_as_they_are():
    masks = [[torch.rand(4) < 0.5], True]
    groups = [
        {"params": [nn.Parameter(torch.ones(4, 1)[:, 0])], "sparse": sparse} for sparse in masks
    ]
    before = [dict(group) for group in groups]
    for _ in range(2):
        MFAC(groups, ngrads=3, lr=0.1)
        optimizer = MFAC(groups[:1], ngrads=3)
        optimizer.add_param_group(groups[1])
        assert [group.keys() for group in groups] == [group.keys() for group in before]
        assert all(group["sparse"] is sparse for group, sparse in zip(groups, masks, strict=True))


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


def optimizer_for(model):
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
    )


@pytest.mark.parametrize("before", [0, 4, 15])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(before):
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(25)]
    model = small_model()
    with torch.no_grad():
        model[4].weight[:, ::2] = 0
    optimizer = optimizer_for(model)
    train(model, optimizer, batches[:before])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    optimizer.damp = 1e-3
    train(model, optimizer, batches[before:])

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = small_model()
    resumed.load_state_dict(weights)
    other = MFAC(resumed.parameters(), ngrads=2)
    with pytest.raises(ValueError):
        other.load_state_dict(state)  # other groups
    other = optimizer_for(resumed)
    other.load_state_dict(state)
    other.damp = 1e-3
    train(resumed, other, batches[before:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
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
    other = MFAC([nn.Parameter(p.detach().clone())], momentum=0.9, ngrads=3)
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert other.state_dict()["state"][0]["momentum_buffer"].dtype == torch.float32


def test_a_learning_rate_of_zero_fills_the_window_alone():
    p = nn.Parameter(torch.randn(4))
    before, optimizer = p.detach().clone(), MFAC([p], lr=0, weight_decay=0, ngrads=3)
    p.grad = torch.randn(4)
    optimizer.step()
    assert torch.equal(p, before) and torch.equal(optimizer.fisher.window.blocks[0].G[0], p.grad)


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


def test_a_vector_of_any_layout_is_the_numbers_it_has():
    """Kernels read numbers side by side."""
    fisher, expected = (DynamicInverseFisher(2, 8) for _ in range(2))
    assert checks.checked_vector(torch.arange(16.0)[::2], 8).is_contiguous()
    fisher.update(torch.arange(16.0)[::2])
    expected.update(torch.arange(0.0, 16.0, 2.0))
    torch.testing.assert_close(fisher.coefficients.K, expected.coefficients.K)


def test_shards_are_on_devices_of_one_type():
    with pytest.raises(ValueError, match=r"shards are on \['cpu', 'meta'\]; they must be on"):
        DynamicInverseFisher(2, 8, shards=["cpu", "meta"])
