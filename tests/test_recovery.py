"""What an optimizer goes on with after refusals, where they are read late too."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

from optim import MFAC, DampTooSmallError, DynamicInverseFisher, NonFiniteGradientError
from precision import Precision


class Arrived:
    """An event on CUDA that has come."""

    def synchronize(self):
        pass


@pytest.fixture(params=["at once", "late"])
def when(request, monkeypatch):
    """When refusals are read: late, as on CUDA, before the fifth call after it, where products are
    always exact, as of windows in float64."""

    def is_late(self, error):
        if not self.fresh:
            self.unread.append((torch.tensor(error), Arrived()))
        return not self.fresh

    if request.param == "late":
        monkeypatch.setattr(Precision, "_is_late", is_late)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return request.param


def equal_gradients(optimizer, p, steps):
    torch.manual_seed(0)
    g = torch.randn_like(p)
    for _ in range(steps):
        p.grad = g.clone()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:damp")
def test_a_raised_damp_stays_raised_for_a_round(when):
    p = nn.Parameter(torch.zeros(5))
    optimizer = MFAC([p], ngrads=8, damp=1e-20, window_dtype="float64")
    equal_gradients(optimizer, p, 300)
    assert optimizer.damp == 1e-20
    taken = 300 if when == "at once" else 294  # until the first refusal is read
    assert optimizer.raised_steps >= taken - 1 and optimizer.fisher.count == taken


def test_an_operator_refuses_where_a_repair_does_not_help_and_changes_nothing(when):
    fisher, g = DynamicInverseFisher(4, 5, 1e-20, dtype="float64"), torch.ones(5).double()
    with pytest.raises(DampTooSmallError):
        for _ in range(12):
            fisher.update(g)
    assert fisher.count == 1 and fisher.damp == 1e-20
    fisher.damp = 1e-2
    for _ in range(12):
        u = fisher.update_matvec(g)
    torch.testing.assert_close(u, g / (1e-2 + 5))
    assert fisher.count == 13


@pytest.mark.filterwarnings("ignore:damp")
def test_a_state_with_raised_damp_goes_on_to_the_same_bits():
    p = nn.Parameter(torch.zeros(5))
    optimizer = MFAC([p], ngrads=4, damp=1e-20)
    equal_gradients(optimizer, p, 6)
    assert optimizer.damp_in_use > 1e-20
    q = nn.Parameter(p.detach().clone())
    other = MFAC([q], ngrads=4, damp=1e-20)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.damp_in_use == optimizer.damp_in_use
    for each, made in ((p, optimizer), (q, other)):
        equal_gradients(made, each, 9)
    assert torch.equal(p, q)


def test_nan_is_counted_whatever_comes_before_it_is_read(when):
    p = nn.Parameter(torch.ones(3))
    optimizer = MFAC([p], ngrads=4, damp=1e-2, on_nonfinite="skip")
    p.grad = torch.tensor([1.0, torch.nan, 0.0])
    with pytest.warns(UserWarning, match="NaN or Inf"):
        optimizer.step()
        optimizer.damp = 1.0
        p.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.skipped_steps == 1


def test_what_is_found_out_by_saving_is_raised_by_the_next_step(when):
    p = nn.Parameter(torch.ones(3))
    optimizer = MFAC([p], ngrads=4, damp=1e-2, on_nonfinite="raise")
    p.grad = torch.tensor([1.0, torch.nan, 0.0])
    if when == "late":
        optimizer.step()
        optimizer.state_dict()
        p.grad = torch.ones(3)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()


def test_a_group_of_another_type_without_gradients_has_zeros_in_the_window():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MFAC([{"params": [a]}, {"params": [b]}], ngrads=3, damp=0.1, lr=1.0)
    a.grad, b.grad = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    optimizer.step()
    a.grad, b.grad = torch.ones(2), None
    optimizer.step()
    (G,) = optimizer.fisher.window.tiles()
    assert G[1].tolist() == [1, 1, 0, 0]


def test_a_parameter_of_another_type_without_gradient_has_zeros_in_the_window_with_decay_too():
    params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = MFAC(params, ngrads=3, damp=0.1, weight_decay=0.5)
    for grads in ([torch.ones(2)] * 2, [torch.ones(2), None]):
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.to(p.dtype)
        optimizer.step()
    (G,) = optimizer.fisher.window.tiles()
    assert (G[1, :2] > 1).all() and G[1, 2:].tolist() == [0, 0]


def test_momentum_stays_that_of_its_weights_when_their_memory_is_ordered_anew():
    p = nn.Parameter(torch.randn(2, 3, 4, 4))
    optimizer = MFAC([p], ngrads=3, damp=0.1, momentum=0.9)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = optimizer.state[p]["momentum_buffer"].clone()
    p.data = p.data.to(memory_format=torch.channels_last)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert torch.equal(optimizer.state[p]["momentum_buffer"], before)


def test_a_change_of_damp_reaches_a_captured_step():
    """Which reads λ, K and P where they were when it was captured."""
    p = nn.Parameter(torch.zeros(9))
    optimizer = MFAC([p], ngrads=4, damp=1.0)
    p.grad = torch.randn(9)
    optimizer.step()
    side = optimizer.fisher.coefficients
    places = [x.data_ptr() for x in (side.damping, side.K, side.P)]
    optimizer.damp = 0.5
    assert [x.data_ptr() for x in (side.damping, side.K, side.P)] == places
    assert float(side.damping) == side.damp == 0.5
    A = side.K + 4 * 0.5 * torch.eye(4)
    torch.testing.assert_close(side.P @ A, torch.eye(4, dtype=torch.float64))


def test_a_resumed_run_raises_damp_when_the_uninterrupted_one_does():
    """After a round of raised steps, λ itself is tried again: at the same step."""
    torch.manual_seed(0)
    grads = [torch.ones(6)] * 7 + list(torch.randn(11, 6))

    def run(save_after=None):
        p = nn.Parameter(torch.zeros(6))
        optimizer, used = MFAC([p], lr=1e-3, ngrads=4, damp=1e-17), []
        for i, g in enumerate(grads):
            p.grad = g.clone()
            optimizer.step()
            used.append(optimizer.damp_in_use)
            if i == save_after:
                state, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
                p = nn.Parameter(weights)
                optimizer = MFAC([p], lr=1e-3, ngrads=4, damp=1e-17)
                optimizer.load_state_dict(state)
        return used, p.detach()

    with pytest.warns(UserWarning, match="too small"):
        expected, weights = run()
        assert len(set(expected)) > 1
        for save_after in range(len(grads) - 1):
            used, resumed = run(save_after)
            assert used == expected, save_after
            assert torch.equal(resumed, weights)


@pytest.mark.parametrize("how", ["skip", "raise"])
def test_other_groups_are_heard_where_the_window_has_no_gradients(how):
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "algorithm": "adamw"}]
    optimizer = MFAC(groups, ngrads=4, on_nonfinite=how)
    for step in range(1, 4):
        q.grad = torch.full((3,), torch.nan)
        if how == "raise":
            with pytest.raises(NonFiniteGradientError):
                optimizer.step()
        else:
            with pytest.warns(UserWarning) if step == 1 else contextlib.nullcontext():
                optimizer.step()
        assert optimizer.skipped_steps == step
        assert torch.equal(q, torch.ones(3))
    q.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.skipped_steps == 3
    assert bool((q < 1).all())


@pytest.mark.filterwarnings("ignore:damp")
def test_loading_another_window_counts_no_steps():
    p, q = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer, other = MFAC([p], ngrads=4, damp=1e-20), MFAC([q], ngrads=8, damp=1e-20)
    equal_gradients(optimizer, p, 4)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.raised_steps == optimizer.raised_steps > 0


@pytest.mark.filterwarnings("ignore:damp")
def test_large_gradients_that_have_left_raise_damp_no_more():
    p = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    used = []
    for large in (12, 0):
        optimizer = MFAC([p], lr=0.0, ngrads=4, damp=1e-20, window_dtype="float64")
        unit = torch.eye(8, dtype=torch.float64)
        every = [1e4 * unit[0]] * large + [unit[i % 4] for i in range(40)] + [0.1 * unit[0]] * 2
        for g in every:
            p.grad = g.clone()
            optimizer.step()
        used.append(optimizer.damp_in_use)
    assert used[0] == used[1] > 1e-20


def test_gradients_too_large_for_any_damp_are_skipped():
    p = nn.Parameter(torch.zeros(4))
    optimizer = MFAC([p], ngrads=4)
    with pytest.warns(UserWarning, match="skipped"):
        for _ in range(99):
            p.grad = torch.full((4,), 1e30)
            optimizer.step()
    before, damp = optimizer.skipped_steps, optimizer.damp_in_use
    assert before > 90 and damp == optimizer.damp
    with pytest.raises(NonFiniteGradientError, match="100 gradients in a row"):
        for _ in range(99):
            optimizer.step()


def test_nan_does_not_use_up_the_schedule_of_a_relative_damp():
    used = []
    for refused in (0, 5):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(50))
        optimizer = MFAC([p], lr=0.0, ngrads=64, damp="relative:0.1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in range(refused + 8):
                p.grad = torch.full((50,), torch.nan) if i < refused else 100 * torch.randn(50)
                optimizer.step()
                used.append(optimizer.damp_in_use)
    assert used[:8] == used[-8:] and len(set(used)) > 2


def test_a_refused_gradient_does_not_end_the_round_of_float64():
    def run(refused):
        torch.manual_seed(0)
        fisher, recomputed = DynamicInverseFisher(8, 3000, 1e-7), []
        gram = fisher.precision.gram
        fisher.precision.gram = lambda: recomputed.append(1) or gram()
        base = torch.randn(3000)
        for i in range(16):
            for _ in range(refused if i == 8 else 0):
                with pytest.raises(NonFiniteGradientError):
                    fisher.update(torch.full((3000,), torch.nan))
            fisher.update_matvec(base + 1e-3 * torch.randn(3000))
        return len(recomputed), fisher.state_dict()["K"]

    (plain, K), (after, K_after) = run(0), run(2)
    assert plain == after > 0 and torch.equal(K, K_after)


def test_a_relative_damp_begins_again_with_an_empty_window():
    p, q = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))
    optimizer, fresh = MFAC([p], ngrads=64, damp="relative"), MFAC([q], ngrads=64, damp="relative")
    for _ in range(7):
        p.grad = 100 * torch.randn(50)
        optimizer.step()
    other = nn.Parameter(torch.zeros(50))
    optimizer.param_groups[0]["params"][0] = other
    with pytest.warns(UserWarning, match="starts anew"):
        for _ in range(5):
            other.grad = torch.randn(50)
            q.grad = other.grad.clone()
            optimizer.step()
            fresh.step()
            assert optimizer.damp_in_use == fresh.damp_in_use


@pytest.mark.parametrize(("damp", "m"), [("relative:0.5", 16), ("relative:0.1", 8)])
def test_a_state_of_another_setting_takes_the_relative_damp_of_its_window(damp, m):
    p = nn.Parameter(torch.zeros(50))
    optimizer = MFAC([p], ngrads=16, damp="relative:0.1")
    for _ in range(9):
        p.grad = torch.randn(50)
        optimizer.step()
    other = MFAC([p], ngrads=m, damp=damp)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mean = float(other.fisher.coefficients.K.trace()) / (m * 50)
    assert other.damp_in_use == pytest.approx(float(damp.split(":")[1]) * mean, rel=1e-12)
