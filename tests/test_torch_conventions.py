"""What PyTorch's own optimizers promise, and its tests of them demand, holds for `MFAC` too.

Where a promise is one of PyTorch, `torch.optim.SGD` or PyTorch's own arithmetic is the reference;
where it concerns the numbers, the dense float64 optimizer of `test_optim` is.
"""

import copy
import pickle
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from reference import dense_inverse
from test_optim import DenseMFAC, assert_same_state, assert_weights
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import costs
from optim import MFAC, NonFiniteGradientError
from precision import Precision

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def network():
    """Small enough for a dense inverse: 39 weights."""
    return nn.Sequential(OrderedDict(a=nn.Linear(5, 4), tanh=nn.Tanh(), b=nn.Linear(4, 3)))


def batches(count, size=8, inputs=5, classes=3):
    return [(torch.randn(size, inputs), torch.randint(classes, (size,))) for _ in range(count)]


def backward(model, batch, optimizer=None):
    if optimizer is not None:
        optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def reference_for(parameters, **settings):
    """The dense optimizer of parameters in one group, m = 4, λ = 0.1."""
    return DenseMFAC([{"params": list(parameters), "lr": 0.1, **settings}], ngrads=4, damp=0.1)


def optimizer_for(parameters, **settings):
    return MFAC(parameters, **{"lr": 0.1, "ngrads": 4, "damp": 0.1, **settings})


def grads(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def window(optimizer):
    """G (m, d)"""
    (block,) = optimizer.fisher.window.blocks
    return block.G


# --- groups and hyperparameters -------------------------------------------------------------------


def test_the_defaults_fill_every_group_and_a_group_overrides_them():
    a, b = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))
    optimizer = MFAC([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.2, momentum=0.3, ngrads=2)
    assert set(optimizer.defaults) <= set(optimizer.param_groups[0])
    for name, value in optimizer.defaults.items():
        assert optimizer.param_groups[0][name] == value
        assert optimizer.param_groups[1][name] == (0.5 if name == "lr" else value)
    assert optimizer.defaults["lr"] == 0.2 and optimizer.defaults["momentum"] == 0.3


PARAMETERS = {
    "iterator": lambda a, b: iter([a, b]),
    "iterator of groups": lambda a, b: ({"params": p} for p in (a, b)),
    "groups of iterators": lambda a, b: [{"params": (p for p in (a, b))}],
    "groups of one tensor": lambda a, b: [{"params": a}, {"params": b}],
    "group in a tuple": lambda a, b: ({"params": (a, b)},),
    "named": lambda a, b: iter([("a", a), ("b", b)]),
    "groups of named": lambda a, b: [{"params": [("a", a)]}, {"params": iter([("b", b)])}],
    "with empty groups": lambda a, b: [{"params": []}, {"params": [a, b]}, {"params": []}],
}


@pytest.mark.parametrize("given", PARAMETERS)
def test_parameters_may_be_given_in_all_of_torchs_ways(given):
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))
    reference = reference_for([a, b], weight_decay=0.1)
    optimizer = optimizer_for(PARAMETERS[given](a, b), weight_decay=0.1)
    sgd = torch.optim.SGD(PARAMETERS[given](a, b), lr=0.1)
    layout = [[id(p) for p in group["params"]] for group in sgd.param_groups]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == layout
    for _ in range(6):
        a.grad, b.grad = torch.randn(2, 3), torch.randn(4)
        optimizer.step()
        reference.step(grads([a, b]))
        assert_weights([a, b], reference.weights)
    twin = optimizer_for(PARAMETERS[given](a, b))
    twin.load_state_dict(optimizer.state_dict())
    assert_same_state(twin.state_dict(), optimizer.state_dict())


def test_names_are_kept_in_groups_and_state():
    model = network()
    optimizer = optimizer_for(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    optimizer.add_param_group({"params": [("c", nn.Parameter(torch.randn(2)))]})
    assert optimizer.param_groups[1]["param_names"] == ["c"]
    # A state without names goes into an optimizer with names, which keeps its own.
    named, unnamed = optimizer_for(model.named_parameters()), optimizer_for(model.parameters())
    named.load_state_dict(unnamed.state_dict())
    assert named.param_groups[0]["param_names"] == names


WRONG_PARAMETERS = {
    "none at all": lambda p: [],
    "an exhausted iterator": lambda p: iter([]),
    "a tensor": lambda p: p,
    "a set": lambda p: [{"params": {p}}],
    "a string": lambda p: [p, "weight"],
    "a number in a group": lambda p: [{"params": [1.0]}],
    "not a leaf": lambda p: [p * 2],
    "in two groups": lambda p: [{"params": [p]}, {"params": [p]}],
    "partly named": lambda p: [("p", p), nn.Parameter(torch.ones(2))],
    "one named, one unnamed group": lambda p: [
        {"params": [("p", p)]},
        {"params": [nn.Parameter(torch.ones(2))]},
    ],
}


@pytest.mark.parametrize("wrong", WRONG_PARAMETERS)
def test_wrong_parameters_are_refused_as_by_torch(wrong):
    p = nn.Parameter(torch.randn(3))
    with pytest.raises((TypeError, ValueError)) as expected:
        torch.optim.SGD(WRONG_PARAMETERS[wrong](p), lr=0.1)
    with pytest.raises(expected.type) as raised:
        MFAC(WRONG_PARAMETERS[wrong](p), lr=0.1)
    assert str(raised.value) == str(expected.value)


def test_a_group_that_is_no_dict_is_refused_as_by_torch():
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    with pytest.raises(TypeError) as expected:
        torch.optim.SGD([p], lr=0.1).add_param_group([q])
    optimizer = MFAC([p], lr=0.1)
    with pytest.raises(TypeError) as raised:
        optimizer.add_param_group([q])
    assert str(raised.value) == str(expected.value)
    assert len(optimizer.param_groups) == 1 and optimizer.fisher.shape == (3, 3)


@pytest.mark.parametrize("lr", [-0.5, torch.tensor([0.1, 0.2])])
def test_wrong_learning_rates_are_refused_in_torchs_words(lr):
    p = nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError) as expected:
        torch.optim.SGD([p], lr=lr)
    with pytest.raises(ValueError, match=f"^{expected.value}"):
        MFAC([p], lr=lr)
    # A group may be wrong where the defaults are right.
    with pytest.raises(ValueError, match=f"^{expected.value}"):
        MFAC([{"params": [p], "lr": lr}])


def test_duplicates_in_a_group_are_warned_of_as_by_torch():
    p = nn.Parameter(torch.randn(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = MFAC([p, p], ngrads=2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.fisher.shape == (3, 3)


def test_only_empty_groups_have_nothing_to_do():
    optimizer = MFAC([{"params": []}], ngrads=2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    p = nn.Parameter(torch.randn(3))
    optimizer.add_param_group({"params": [p]})
    before, p.grad = p.detach().clone(), torch.ones(3)
    optimizer.step()
    assert not torch.equal(p, before)


def test_a_parameter_moved_to_the_next_group_has_its_settings():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = MFAC([{"params": [a, b], "lr": 1.0}, {"params": [c], "lr": 0.0}], ngrads=2)
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    for p in (a, b, c):
        p.grad = torch.ones(2)
    optimizer.step()
    assert (a != 1).all() and b.tolist() == c.tolist() == [1, 1]


def test_complex_parameters_are_refused():
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex"):
        MFAC([p, q], ngrads=2)
    optimizer = MFAC([p], ngrads=2)
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 1 and optimizer.fisher.shape == (3, 3)


def test_maximize_climbs_group_by_group():
    """As in torch: the gradient is negated before the weight decay, which always shrinks."""
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))
    settings = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}
    groups = [{"params": [a], "maximize": True}, {"params": [b]}]
    reference = reference_for([a, b], **settings)
    optimizer = MFAC(groups, ngrads=4, damp=0.1, **settings)
    twin = optimizer_for([nn.Parameter(torch.zeros(5))], maximize=True)
    assert twin.param_groups[0]["maximize"] and twin.defaults["maximize"]
    for _ in range(6):
        a.grad, b.grad = torch.randn(2, 3), torch.randn(4)
        given = grads([a, b])
        optimizer.step()
        reference.step([-given[0], given[1]])
        assert_weights([a, b], reference.weights)
        assert torch.equal(a.grad, given[0]), "the caller's gradient is not negated"


def test_a_tensor_lr_is_read_at_every_step():
    p, lr = nn.Parameter(torch.randn(4)), torch.tensor(0.5)
    group = {"params": [p], "lr": 0.5}
    reference = DenseMFAC([group], ngrads=4, damp=0.1)
    optimizer = MFAC([p], lr=lr, ngrads=4, damp=0.1)
    for t in range(6):
        optimizer.param_groups[0]["lr"].fill_(0.5 / (t + 1))
        group["lr"] = 0.5 / (t + 1)
        p.grad = torch.randn(4)
        reference.step(grads([p]))
        optimizer.step()
        assert_weights([p], reference.weights)
    twin = MFAC([p], lr=0.1, ngrads=4)
    twin.load_state_dict(optimizer.state_dict())
    twin.param_groups[0]["lr"].fill_(7.0)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.5 / 6)


def test_a_step_of_zero_gradients_moves_nothing():
    p = nn.Parameter(torch.randn(4))
    optimizer = optimizer_for([p])
    p.grad = torch.randn(4)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


def test_parameters_change_in_place_and_autograd_knows():
    p = nn.Parameter(torch.randn(4))
    optimizer = optimizer_for([p])
    loss = p.square().sum()
    address = p.data_ptr()
    loss.backward(retain_graph=True)
    optimizer.step()
    assert p.data_ptr() == address and p.is_leaf and p.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_of_any_memory_format():
    p = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
    q = nn.Parameter(torch.randn(3, 4).T)
    reference = reference_for([p, q], momentum=0.9)
    optimizer = optimizer_for([p, q], momentum=0.9)
    for _ in range(5):
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        optimizer.step()
        reference.step(grads([p, q]))
        assert_weights([p, q], reference.weights)
    assert p.is_contiguous(memory_format=torch.channels_last) and q.T.is_contiguous()


# --- schedulers -----------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.2, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    # These two move the momentum as well.
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=13),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", sorted(set(lr_scheduler.__all__) - {"LRScheduler"}))
def test_every_scheduler_drives_it_as_it_drives_sgd(name, tensor_lr):
    """SGD with the same scheduler says which rates each step has; halfway, all is saved."""
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))

    def make(optimizer):
        rates = [torch.tensor(lr) if tensor_lr else lr for lr in (0.1, 0.2)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip((a, b), rates, strict=True)]
        optimizer = optimizer(groups, momentum=0.5)
        return optimizer, SCHEDULERS[name](optimizer)

    def m_fac(groups, momentum):
        return MFAC(groups, momentum=momentum, ngrads=4, damp=0.1)

    optimizer, scheduler = make(m_fac)
    sgd, sgd_scheduler = make(torch.optim.SGD)
    settings = [{"params": [a]}, {"params": [b]}]
    reference = DenseMFAC(settings, ngrads=4, damp=0.1)
    seen = set()
    metric = [0.0] if name == "ReduceLROnPlateau" else []
    for t in range(11):
        if t == 5:
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer, scheduler = make(m_fac)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        a.grad, b.grad = torch.randn(2, 3), torch.randn(4)
        for group, of_sgd in zip(settings, sgd.param_groups, strict=True):
            group["lr"], group["momentum"] = float(of_sgd["lr"]), of_sgd["momentum"]
            seen.add(group["lr"])
        optimizer.step()
        reference.step(grads([a, b]))
        assert_weights([a, b], reference.weights)
        optimizer.zero_grad()
        sgd.step()  # without gradients: only because schedulers warn otherwise
        scheduler.step(*metric)
        sgd_scheduler.step(*metric)
    assert len(seen) > 2, "the scheduler does nothing, so this test shows nothing"


# --- hooks ----------------------------------------------------------------------------------------


def test_step_hooks_run_around_the_step():
    p = nn.Parameter(torch.randn(4))
    optimizer = optimizer_for([p])
    events = []
    before = p.detach().clone()

    def pre(o, args, kwargs):
        events.append(("pre", o is optimizer, torch.equal(p, before), o.fisher.count))
        p.grad.mul_(2)  # what a hook does to the gradient is what the window gets

    def post(o, args, kwargs):
        events.append(("post", o is optimizer, torch.equal(p, before), o.fisher.count))

    handles = [
        register_optimizer_step_pre_hook(lambda *_: events.append("global pre")),
        optimizer.register_step_pre_hook(pre),
        optimizer.register_step_post_hook(post),
        register_optimizer_step_post_hook(lambda *_: events.append("global post")),
    ]
    gradient = torch.randn(4)
    p.grad = gradient.clone()
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert events == ["global pre", ("pre", True, True, 0), ("post", True, False, 1), "global post"]
    assert torch.equal(window(optimizer)[0], 2 * gradient)


def test_a_pre_hook_may_replace_the_closure():
    p = nn.Parameter(torch.randn(4))
    optimizer = optimizer_for([p])
    p.grad = torch.randn(4)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "other"), {}))
    assert optimizer.step(lambda: "given") == "other"


def test_hooks_of_state_dict_see_all_of_it():
    p = nn.Parameter(torch.randn(4))
    optimizer = optimizer_for([p], momentum=0.9)
    p.grad = torch.randn(4)
    optimizer.step()
    plain = optimizer.state_dict()
    seen = []

    def pre(o):
        o.state["note"] = "of a hook"

    def post(o, state_dict):
        seen.append((state_dict["state"]["note"], sorted(state_dict["state"][0])))
        assert_same_state(state_dict["state"][0], plain["state"][0])
        return {**state_dict, "added": True}

    handles = [
        optimizer.register_state_dict_pre_hook(pre),
        optimizer.register_state_dict_post_hook(post),
        optimizer.register_state_dict_post_hook(lambda o, s: s.update(last=s["added"])),
        optimizer.register_state_dict_post_hook(lambda o, s: s.update(first=1), prepend=True),
    ]
    state = optimizer.state_dict()
    assert seen == [("of a hook", ["grads", "momentum_buffer"])]
    assert state["added"] and state["last"] and state["first"] == 1
    for handle in handles:
        handle.remove()
    assert "added" not in optimizer.state_dict()
    assert not optimizer._optimizer_state_dict_post_hooks, "none of its own stays behind"
    # What is not a parameter's is kept by torch's optimizers; so it is here.
    twin = optimizer_for([nn.Parameter(torch.zeros(4))])
    twin.load_state_dict(state)
    assert twin.state["note"] == "of a hook"
    assert_same_state(twin.state_dict(), optimizer.state_dict())


def test_hooks_of_load_state_dict_run_before_and_after_everything():
    p, q = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    optimizer, other = optimizer_for([p], momentum=0.9), optimizer_for([q], lr=0.5)
    for _ in range(3):
        p.grad = torch.randn(4)
        optimizer.step()
    wrapped = copy.deepcopy({**optimizer.state_dict(), "mine": "wrapped"})
    wrapped["param_groups"][0]["wrapped"] = wrapped["param_groups"][0].pop("fisher")
    after = []

    def rename(o, state_dict):
        assert o.fisher.count == 0, "nothing is loaded yet"
        group = dict(state_dict["param_groups"][0])
        group["fisher"] = group.pop("wrapped")  # from another place in the file
        return {**state_dict, "param_groups": [group]}

    def slower(o, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    def check(o):
        buffer = o.state[q]["momentum_buffer"]
        after.append((o.fisher.count, o.param_groups[0]["lr"], bool(buffer.any())))

    other.register_load_state_dict_pre_hook(slower)
    other.register_load_state_dict_pre_hook(rename, prepend=True)
    other.register_load_state_dict_post_hook(check)
    other.register_load_state_dict_post_hook(lambda o: after.append("first"), prepend=True)
    untouched = copy.deepcopy(wrapped)
    other.load_state_dict(wrapped)
    assert after == ["first", (3, 0.003, True)]
    assert_same_state(wrapped, untouched)


@pytest.mark.parametrize("window", [{}, {"compress": 0.5}, {"window_dtype": "float8_e4m3fn"}])
def test_a_refused_state_leaves_everything_as_it_was(window):
    """That of a larger model, and one that lacks a mask, where its gradients cannot be divided."""
    p, mask, calls = nn.Parameter(torch.randn(4)), torch.arange(4) < 3, []
    optimizer = optimizer_for([p], sparse=[mask], momentum=0.5, **window)
    optimizer.register_load_state_dict_post_hook(calls.append)
    p.grad = torch.randn(4)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    for size in (5, 4) if window else (5,):
        with pytest.raises(ValueError, match=r"weights, but this|belongs to another model"):
            other = optimizer_for([nn.Parameter(torch.randn(size))], lr=7.0, **window)
            optimizer.load_state_dict(other.state_dict())
        assert not calls and optimizer.fisher.count == 1
        assert_same_state(optimizer.state_dict(), before)
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(calls) == 1


# --- copies, state and print ----------------------------------------------------------------------


def test_repr_shows_every_group_as_torch_does():
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))
    optimizer = MFAC([{"params": [a]}, {"params": [b], "lr": 0.25}], lr=0.5, ngrads=3)
    lines = repr(optimizer).splitlines()
    assert lines[0] == "MFAC (" and lines[-1] == ")"
    assert [line for line in lines if line.startswith("Parameter Group")] == [
        "Parameter Group 0",
        "Parameter Group 1",
    ]
    assert "    lr: 0.5" in lines and "    lr: 0.25" in lines
    assert lines.count("    momentum: 0") == 2 and lines.count("    weight_decay: 0") == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_every_attribute_and_shares_nothing(duplicate):
    p = nn.Parameter(torch.randn(4))
    optimizer = optimizer_for([p], momentum=0.5, on_nonfinite="skip")
    scheduler = lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    for bad in (0.0, float("nan"), 0.0):
        p.grad = torch.randn(4) + bad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        scheduler.step()
    p2, optimizer2, scheduler2 = duplicate((p, optimizer, scheduler))
    assert scheduler2.optimizer is optimizer2 and optimizer2.param_groups[0]["params"][0] is p2

    def public(o):
        return {name for name in vars(o) if not name.startswith("_") and name != "step"}

    assert public(optimizer2) == public(optimizer)
    assert (optimizer2.skipped_steps, optimizer2.damp) == (1, 0.1)
    before = copy.deepcopy((p2.detach(), optimizer2.state_dict()))
    optimizer.step()
    assert torch.equal(p2, before[0])
    assert_same_state(optimizer2.state_dict(), before[1])
    p2.grad = p.grad.clone()
    optimizer2.step()
    assert torch.equal(p, p2)
    assert optimizer2.fisher.count == 3, "one step was one step"


def test_a_copy_takes_hooks():
    p = nn.Parameter(torch.randn(4))
    optimizer = copy.deepcopy(optimizer_for([p]))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step", "state", "load"]


def test_the_parameter_ids_of_a_state_are_their_places():
    model = network()
    optimizer = optimizer_for(
        [{"params": model.b.parameters()}, {"params": model.a.parameters()}], momentum=0.9
    )
    backward(model, batches(1)[0])
    optimizer.step()
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    shapes = [tuple(p.shape) for layer in (model.b, model.a) for p in layer.parameters()]
    assert [tuple(state["state"][i]["momentum_buffer"].shape) for i in range(4)] == shapes


def test_loading_its_own_state_changes_nothing():
    """Accelerate does this to every optimizer, to move its state to a device."""
    p = nn.Parameter(torch.randn(6))
    optimizer = optimizer_for([p], momentum=0.9)
    for _ in range(9):
        p.grad = torch.randn(6)
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        assert_same_state(optimizer.state_dict(), before)
        assert bool(torch.isfinite(optimizer.fisher.matvec(p.grad)).all())


def test_what_others_put_into_a_group_survives_saving():
    p = nn.Parameter(torch.randn(4))
    optimizer = MFAC([{"params": [p], "layer": "head"}], ngrads=2)
    lr_scheduler.StepLR(optimizer, 1)
    twin = MFAC([p], ngrads=2)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["layer"] == "head" and twin.param_groups[0]["initial_lr"] == 1e-3


# --- what loops do --------------------------------------------------------------------------------


def test_a_float16_loop_steps_on_unscaled_clipped_gradients_and_skips_overflows():
    """The scaler starts far too high: float16 overflows until it has come down far enough."""
    model = network()
    optimizer = optimizer_for(model.parameters(), momentum=0.9)
    parameters = list(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    taken = skipped = 0
    data = batches(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the window must not even see the overflow
        for x, y in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(x), y)
            scale, before = scaler.get_scale(), [p.detach().clone() for p in parameters]
            state = copy.deepcopy(optimizer.state_dict())
            scaler.scale(loss).backward()
            scaled = torch.cat([p.grad.flatten() for p in parameters]).double()
            scaler.unscale_(optimizer)
            clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
            if bool(torch.isfinite(scaled).all()):
                gradient = scaled / scale
                gradient *= min(1.0, 0.5 / float(gradient.norm()))
                row = window(optimizer)[taken % 4]
                torch.testing.assert_close(row.double(), gradient, rtol=1e-4, atol=1e-7)
                taken += 1
            else:
                skipped += 1
                assert scaler.get_scale() == scale / 2
                assert_same_state(optimizer.state_dict(), state)
                assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
            assert optimizer.fisher.count == taken
    assert taken >= 3 and skipped >= 2 and optimizer.skipped_steps == 0


def test_accumulated_gradients_are_one_gradient():
    model = network()
    parameters = list(model.parameters())
    reference = reference_for(parameters)
    optimizer = optimizer_for(parameters)
    for x, y in batches(5, size=12):
        whole = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
        optimizer.zero_grad()
        for micro in zip(x.split(4), y.split(4), strict=True):
            (nn.functional.cross_entropy(model(micro[0]), micro[1]) / 3).backward()
        optimizer.step()
        reference.step(whole)
        assert_weights(parameters, reference.weights)
    assert optimizer.fisher.count == 5


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_the_window_has_the_clipped_gradient(clip):
    model = network()
    parameters = list(model.parameters())
    reference = reference_for(parameters)
    optimizer = optimizer_for(parameters)
    limit = 0.05
    for batch in batches(6):
        backward(model, batch, optimizer)
        whole = torch.cat([p.grad.flatten() for p in parameters])
        assert whole.abs().max() > limit, "nothing to clip"
        clip(parameters, limit)
        if clip is clip_grad_norm_:
            expected = whole * (limit / whole.norm())
        else:
            expected = whole.clamp(-limit, limit)
        reference.step(
            [
                g.view_as(p)
                for g, p in zip(
                    expected.split([p.numel() for p in parameters]), parameters, strict=True
                )
            ]
        )
        optimizer.step()
        assert_weights(parameters, reference.weights)


def test_a_compiled_model_trains_as_the_plain_one():
    model = network()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")
    optimizers = [optimizer_for(m.parameters(), momentum=0.9) for m in (model, compiled)]
    for batch in batches(6):
        for m, optimizer in zip((model, compiled), optimizers, strict=True):
            backward(m, batch, optimizer)
            optimizer.step()
    assert_weights(model.parameters(), [p.detach().double() for p in twin.parameters()])
    assert compiled.state_dict().keys() == {f"_orig_mod.{name}" for name in model.state_dict()}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_step_is_the_plain_one(wrap):
    """It is left out of what is compiled, alone and in a larger function: no graph, nothing
    compiled again after the first step, and the same bits."""
    p = nn.Parameter(torch.randn(6))
    q = nn.Parameter(p.detach().clone())
    plain, other = optimizer_for([p], momentum=0.9), optimizer_for([q], momentum=0.9)
    torch._dynamo.reset()
    graphs = CompileCounter()
    step = torch.compile((lambda: other.step()) if wrap else other.step, backend=graphs)
    for t in range(12):
        p.grad = torch.randn(6)
        q.grad = p.grad.clone()
        plain.step()
        with torch._dynamo.config.patch(error_on_recompile=t > 0):
            step()
    assert graphs.frame_count == 0 and other.fisher.count == 12
    assert torch.equal(p, q)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


PARAMETRIZATIONS = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "symmetric": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_parametrized_weights(kind):
    """The parameters are the originals, and what is made of them keeps its property."""
    layer = PARAMETRIZATIONS[kind](nn.Linear(5, 5))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))
    parameters = list(model.parameters())
    reference = reference_for(parameters)
    optimizer = optimizer_for(model.named_parameters())
    assert any("original" in name for name in optimizer.param_groups[0]["param_names"])
    before = layer.weight.detach().clone()
    for batch in batches(6):
        backward(model, batch, optimizer)
        reference.step(grads(parameters))
        optimizer.step()
        assert_weights(parameters, reference.weights)
    weight = layer.weight.detach()
    assert not torch.equal(weight, before)
    if kind == "weight_norm":
        norms = layer.parametrizations.weight.original0
        torch.testing.assert_close(weight.norm(dim=1, keepdim=True), norms.detach())
    elif kind == "orthogonal":
        torch.testing.assert_close(weight @ weight.T, torch.eye(5), rtol=0, atol=1e-5)
    elif kind == "symmetric":
        assert torch.equal(weight, weight.T)


def test_tied_weights_have_one_place_in_the_window_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens).tanh())

    model = Tied()
    parameters = list(model.parameters())
    assert len(parameters) == 2
    reference = reference_for(parameters)
    optimizer = optimizer_for(model.parameters())
    assert optimizer.fisher.shape == (7 * 3 + 7,) * 2
    for _ in range(6):
        batch = torch.randint(7, (8,)), torch.randint(7, (8,))
        # The gradient of the tied weight is the sum over its two places, as if they were two.
        a, b = (model.head.weight.detach().clone().requires_grad_() for _ in range(2))
        bias = model.head.bias.detach().clone().requires_grad_()
        hidden = nn.functional.embedding(batch[0], a).tanh()
        loss = nn.functional.cross_entropy(nn.functional.linear(hidden, b, bias), batch[1])
        da, db, dbias = torch.autograd.grad(loss, [a, b, bias])
        backward(model, batch, optimizer)
        optimizer.step()
        reference.step([da + db, dbias])
        assert_weights(parameters, reference.weights)
        assert model.head.weight is model.embedding.weight


# --- parameters that come, go and differ ----------------------------------------------------------


def test_frozen_parameters_take_no_columns_until_they_are_trained():
    model = network()
    model.a.requires_grad_(False)
    parameters = list(model.parameters())
    reference = reference_for(parameters, momentum=0.5)
    optimizer = optimizer_for(parameters, momentum=0.5)
    assert optimizer.fisher.shape == (15, 15)
    start = [p.detach().clone() for p in model.a.parameters()]
    for t, batch in enumerate(batches(12)):
        if t == 5:
            assert optimizer.fisher.shape == (15, 15)
            assert all(torch.equal(p, q) for p, q in zip(model.a.parameters(), start, strict=True))
            model.a.requires_grad_(True)
        if t == 9:  # frozen again, it keeps its columns, with gradients of zero
            model.b.bias.requires_grad_(False)
        backward(model, batch, optimizer)
        reference.step(grads(parameters))
        optimizer.step()
        assert_weights(parameters, reference.weights)
    assert optimizer.fisher.shape == (39, 39)


def test_a_state_loads_after_one_parameter_was_frozen_and_another_replaced():
    p, q = (torch.nn.Parameter(torch.ones(n)) for n in (2, 3))
    optimizer = MFAC([p, q], ngrads=2)
    p.grad, q.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    q.requires_grad_(False)
    q.grad, p = None, torch.nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"][0] = p
    p.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="starts anew"):
        optimizer.step()
    before = optimizer.fisher.matvec(torch.ones(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.fisher.matvec(torch.ones(2)), before)


def test_a_frozen_layer_may_come_as_a_group_of_its_own():
    model = network()
    model.a.requires_grad_(False)
    head, body = list(model.b.parameters()), list(model.a.parameters())
    reference = reference_for(head + body, weight_decay=0.1)
    optimizer = optimizer_for(head, weight_decay=0.1)
    for t, batch in enumerate(batches(12)):
        if t == 5:
            model.a.requires_grad_(True)
            optimizer.add_param_group({"params": body})
        backward(model, batch, optimizer)
        reference.step(grads(head + body))
        optimizer.step()
        assert_weights(head + body, reference.weights)


def test_swapped_parameters_get_a_window_of_their_own_and_the_masks_of_those_before():
    """Accelerate puts sharded parameters in place of those that the optimizer was built with."""
    old = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    old[0].data[:, 1] = 0
    new = [nn.Parameter(p.detach().clone()) for p in old]
    reference = reference_for(new, momentum=0.5)
    optimizer = optimizer_for(old, momentum=0.5, sparse=True)
    optimizer.param_groups[0]["params"] = list(new)
    for t in range(6):
        if t == 3:
            newer = [nn.Parameter(p.detach().clone()) for p in new]
            optimizer.param_groups[0]["params"], new = newer, newer
            reference = reference_for(new, momentum=0.5)
        for p in new:
            p.grad = torch.randn_like(p)
        new[0].grad[:, 1] = 0  # what is masked is not in the window
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len(caught) == (t == 3) and all("starts anew" in str(w.message) for w in caught)
        reference.step(grads(new))
        assert_weights(new, reference.weights)
        new[0].grad[:, 1] = 1.0
    assert optimizer.fisher.shape == (13, 13) and not new[0][:, 1].any()
    twin = optimizer_for([nn.Parameter(torch.zeros_like(p)) for p in new], momentum=0.5)
    twin.load_state_dict(optimizer.state_dict())
    assert set(optimizer.state) == set(new) and twin.fisher.count == 3


def test_the_momentum_in_the_state_is_a_view_of_one_vector():
    p = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
    parameters = [p, nn.Parameter(torch.randn(5))]
    optimizer = optimizer_for(parameters, momentum=0.9)
    for _ in range(2):
        for q in parameters:
            q.grad = torch.randn_like(q)
        optimizer.step()
    buffers = [optimizer.state[q]["momentum_buffer"] for q in parameters]
    assert [v.shape for v in buffers] == [q.shape for q in parameters]
    assert buffers[0].is_contiguous(memory_format=torch.channels_last)
    assert len({v.untyped_storage().data_ptr() for v in buffers}) == 1
    before = [q.detach().clone() for q in parameters]
    for v, q in zip(buffers, parameters, strict=True):
        v.zero_()  # which the next step goes by
        q.grad = torch.zeros_like(q)
    optimizer.step()
    assert all(torch.equal(q, w) for q, w in zip(parameters, before, strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"weight_decay": 0.1}])
def test_parameters_of_several_types_and_devices(settings, device):
    """A bfloat16 model, and float64, float32 and float16 beside it: each weight moves by the step
    of the definition, rounded to its type."""
    types = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64, torch.float16]
    parameters = [nn.Parameter(torch.randn(2, 3).to(dtype)) for dtype in types]
    parameters += [nn.Parameter(torch.randn(4, device=device))]
    optimizer = optimizer_for(parameters, **settings)
    gradients = []
    for _ in range(6):
        for p in parameters:
            p.grad = torch.randn_like(p)
        reference = reference_for([p.detach().cpu() for p in parameters], **settings)
        reference.gradients = gradients
        if "momentum" in settings and gradients:
            buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters]
            reference.v = [v.double().cpu() for v in buffers]
        reference.step([g.cpu() for g in grads(parameters)])
        optimizer.step()
        for p, w in zip(parameters, reference.weights, strict=True):
            # The step is rounded, and so is the sum.
            tolerance = max(2 * torch.finfo(p.dtype).eps, 1e-5)
            torch.testing.assert_close(p.detach().double().cpu(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalize", [None, "layer"])
def test_one_parameter_is_cast_in_training(normalize):
    parameters = [nn.Parameter(torch.randn(2, 3)) for _ in range(3)]
    plain = [nn.Parameter(p.detach().clone()) for p in parameters]
    settings = {"momentum": 0.5, "normalize": normalize}
    optimizers = [optimizer_for(x, **settings) for x in (parameters, plain)]
    for t in range(6):
        if t == 2:
            parameters[1].data = parameters[1].data.double()
        for p, q in zip(parameters, plain, strict=True):
            q.grad = torch.randn(2, 3)
            p.grad = q.grad.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
        assert_weights(parameters, [q.detach().double() for q in plain])


def test_a_window_that_no_longer_fits_leaves_an_empty_one_until_it_fits(monkeypatch):
    p, large = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(400))
    optimizer = optimizer_for([p], momentum=0.5)
    p.grad, large.grad = torch.randn(4), torch.randn(400)
    optimizer.step()
    monkeypatch.setattr(costs, "available_memory", lambda device: 2000)
    optimizer.param_groups[0]["params"] = [large]
    before = large.detach().clone()
    for number in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="gradients of 400 weights takes"):
                optimizer.step()
        assert len(caught) == (number == 0)
        state = optimizer.state_dict()
        assert state["param_groups"][0]["fisher"]["count"] == 0 and not state["state"]
        assert torch.equal(large, before)
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.fisher.count == 1 and optimizer.fisher.shape == (400, 400)


# --- what the optimizer does by itself ------------------------------------------------------------


@pytest.fixture(params=["simulated", CUDA])
def late(request, monkeypatch):
    """A device whose verdict about a gradient is read by the fifth step after it."""
    if request.param == "cuda":
        return "cuda"

    arrived = SimpleNamespace(synchronize=lambda: None)

    def is_late(self, error):
        if not self.fresh:
            self.unread.append((torch.tensor(error), arrived))
        return not self.fresh

    monkeypatch.setattr(Precision, "_is_late", is_late)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return "cpu"


def test_a_late_refusal_raises_after_the_fifth_step_which_is_taken(late):
    p = nn.Parameter(torch.randn(6, device=late))
    reference = reference_for([p.detach().cpu()])
    optimizer = optimizer_for([p], on_nonfinite="raise")
    for t in range(10):
        p.grad = torch.randn(6, device=late)
        good = p.grad.clone()
        if t == 2:
            p.grad[3] = torch.nan
            optimizer.step()
            continue
        if t == 7:
            with pytest.raises(NonFiniteGradientError):
                optimizer.step()
        else:
            optimizer.step()
        reference.step([good.cpu()])
        assert_weights([p.detach().cpu()], reference.weights)
    assert optimizer.skipped_steps == 1 and optimizer.fisher.count == 9


@pytest.mark.parametrize(
    ("saved", "own"),
    [
        ({}, {"damp": 0.5}),
        ({"damp": 0.5, "window_dtype": "bfloat16"}, {"window_dtype": "float32"}),
        ({"window_dtype": "float32"}, {"window_dtype": torch.float8_e4m3fn}),
        ({"ngrads": 7}, {}),
        ({"ngrads": 3}, {"ngrads": 6}),
        ({"compress": 0.5}, {"ngrads": 3, "window_dtype": torch.float64}),
    ],
)
def test_loading_keeps_what_the_constructor_was_given(saved, own):
    """Of another window, the newest gradients that fit are taken."""
    p, q = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    source, target = optimizer_for([p], **saved), optimizer_for([q], **own)
    for _ in range(5):
        p.grad = torch.randn(2, 3)
        source.step()
    rows = source.fisher.window.tiles().__next__()
    m = source.fisher.num_grads
    newest = [rows[t % m] for t in range(max(0, 5 - m), 5)][-target.fisher.num_grads :]
    settings = target.damp, target.fisher.num_grads, target.fisher.dtype
    target.load_state_dict(source.state_dict())
    assert (target.damp, target.fisher.num_grads, target.fisher.dtype) == settings
    assert target.damp_in_use == target.damp
    kept = target.fisher.window.tiles().__next__()
    assert not target.fisher.count or target.fisher.count in (5, len(newest))
    start = target.fisher.count - len(newest)
    for t, g in enumerate(newest, start=start):
        row = kept[t % target.fisher.num_grads]
        torch.testing.assert_close(row, g, rtol=2**-4, atol=0)
    x = torch.randn(6)
    inverse = dense_inverse(kept, target.damp)
    torch.testing.assert_close(target.fisher.matvec(x).double(), inverse @ x.double())


def test_a_dense_state_does_not_bring_back_what_is_masked():
    p = nn.Parameter(torch.randn(3, 4))
    dense = optimizer_for([p], momentum=0.5)
    q = nn.Parameter(p.detach() * (torch.rand(3, 4) > 0.4))
    zero = q.detach() == 0
    sparse = optimizer_for([q], momentum=0.5, sparse=True)
    for optimizer, parameter in ((dense, p), (sparse, q)):
        for t in range(6):
            parameter.grad = torch.randn(3, 4)
            if optimizer is sparse and t == 0:
                sparse.load_state_dict(dense.state_dict())
            optimizer.step()
    assert 0 < int(zero.sum()) and not q[zero].any()
    assert sparse.fisher.shape[0] == int((~zero).sum()) and sparse.fisher.count == 12


def test_what_all_groups_share_is_refused_in_a_group_unless_it_is_the_same():
    p = nn.Parameter(torch.randn(4))
    for name, value in (("damp", 1e-2), ("ngrads", 8), ("compress", 0.5)):
        with pytest.raises(ValueError, match=f"{name}: .* the same in all groups; give it to"):
            optimizer_for([{"params": [p], name: value}])
        optimizer_for([{"params": [p], name: value}], **{name: value})


@pytest.mark.parametrize(
    "window",
    [{}, {"compress": 0.25}, {"window_dtype": "float16"}, {"window_dtype": "float8_e4m3fn"}],
    ids=str,
)
@pytest.mark.parametrize("unfrozen", [True, False])
def test_a_state_goes_on_to_the_same_bits_after_layers_were_frozen(window, unfrozen):
    """Columns are in the order in which parameters came, whatever the order of the groups."""

    def network():
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def step(net, optimizer, x):
        optimizer.zero_grad()
        (net(x) - x.flip(0)).square().mean().backward()
        optimizer.step()

    net, other = network(), network()
    net[0].requires_grad_(not unfrozen)
    optimizer = MFAC(net.parameters(), lr=1e-2, ngrads=8, damp=0.1, **window)
    for i in range(12):
        net[0].requires_grad_((i >= 5) == unfrozen)
        step(net, optimizer, torch.randn(16, 6))
    other.load_state_dict(net.state_dict())
    other[0].requires_grad_(unfrozen)
    resumed = MFAC(other.parameters(), lr=1e-2, ngrads=8, damp=0.1, **window)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in torch.randn(10, 16, 6):
        step(net, optimizer, x)
        step(other, resumed, x)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_wider_than_their_parameters_enter_as_they_are(dtype):
    p, q = nn.Parameter(torch.zeros(6, dtype=dtype)), nn.Parameter(torch.zeros(6))
    p.grad_dtype = torch.float32
    optimizer, wide = (MFAC([x], ngrads=4, damp=1e-3) for x in (p, q))
    for scale in (1e5, 1e-9, 1.0):
        p.grad = scale * torch.randn(6)
        q.grad = p.grad.clone()
        optimizer.step()
        wide.step()
    assert torch.equal(optimizer.fisher.window.blocks[0].G, wide.fisher.window.blocks[0].G)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("normalize", [None, "layer"])
def test_momentum_that_begins_after_a_change_of_memory_format(normalize):
    """The state has it in the order of the weights, and a resumed run goes on from it."""
    nets = [nn.Conv2d(4, 4, 3, bias=False) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    settings = dict(lr=0.1, ngrads=4, damp=1e-2, normalize=normalize)
    optimizer, plain, resumed = (MFAC(net.parameters(), **settings) for net in nets)

    def step(*which):
        g = torch.randn(4, 4, 3, 3)
        for i in which:
            nets[i].weight.grad = g.clone()
            (optimizer, plain, resumed)[i].step()

    step(0, 1)
    nets[0].to(memory_format=torch.channels_last)
    for made in (optimizer, plain):
        made.param_groups[0]["momentum"] = 0.9
    for _ in range(3):
        step(0, 1)
    found = optimizer.state[nets[0].weight]["momentum_buffer"]
    assert torch.allclose(found, plain.state[nets[1].weight]["momentum_buffer"], atol=1e-6)
    nets[2].load_state_dict(nets[0].state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(0, 1, 2)
    for net in nets[1:]:
        assert torch.allclose(net.weight, nets[0].weight, atol=1e-6)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {"window_dtype": "float16"},
        {"window_dtype": "float8_e4m3fn"},
        {"compress": 0.3},
        {"warmup": True, "max_step": 1e-3, "normalize": "layer", "damp": "relative"},
    ],
    ids=str,
)
def test_torchs_default_type_changes_nothing(default, settings):
    weights, given = [], torch.randn(6, 40)
    for dtype in (torch.float32, default):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            p = nn.Parameter(torch.ones(40, dtype=torch.float32))
            optimizer = MFAC([p], ngrads=4, **settings)
            for g in given:
                p.grad = g.clone()
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        finally:
            torch.set_default_dtype(before)
        weights.append(p.detach())
    assert torch.equal(*weights)
