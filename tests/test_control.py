"""Controls of the step, and groups of other algorithms, against definitions in float64."""

import copy
import io
import math

import pytest
import torch
from reference import as_kept, dense_fisher, ring
from torch import nn
from torch.nn.functional import cross_entropy

import main_optim
import models
import optim
import optim_settings
from control import FLOOR
from kernels import cuda_kernels
from main_common import UserError
from mfac import MFAC, mfac_groups
from muon import Muon
from ranks import Ranks

M, DAMP = 4, 0.01
SHAPES = [(3, 2), (4,), (2, 2)]


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(sum(map(ord, request.node.name)))


def parameters(shapes=SHAPES, dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradients(steps, shapes=SHAPES, dtype=torch.float64):
    """Of very different lengths."""
    return [[torch.randn(s, dtype=dtype) * 10 ** (t % 3 - 1) for s in shapes] for t in range(steps)]


def take(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


def flat(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors])


def dense_steps(w, history, *, lr, momentum=0.0, decay=0.0, decoupled=False, **controls):
    """The weights after a step with each gradient of `history`, from the explicit F. The norms are
    those of the definition, from F and u themselves."""
    w, rows, v = [p.detach().double().clone() for p in w], [], None
    sizes, compress = [p.numel() for p in w], controls.get("compress")
    for grads in history:
        g = flat(grads) + (0 if decoupled else decay * flat(w))
        rows.append(g)
        kept = ring(as_kept(rows, compress, torch.float64)[0], M)
        u = torch.linalg.inv(F := dense_fisher(kept, DAMP)) @ g
        factors = [1.0]
        if controls.get("warmup"):
            factors.append(len(rows[-M:]) / M)
        if delta := controls.get("max_step"):
            factors.append(math.sqrt(delta / (lr**2 * float(u @ F @ u))))
        if bound := controls.get("max_norm"):
            factors.append(bound / float(u.norm()))
        u *= min(factors)
        v = (1 - momentum) * u + (momentum * v if v is not None else 0)
        parts = list(v.split(sizes))
        if controls.get("normalize"):
            parts = [
                part * max(float(p.norm()), FLOOR) / part.norm()
                for part, p in zip(parts, w, strict=True)
            ]
        for p, part in zip(w, parts, strict=True):
            p -= lr * (part.view_as(p) + (decay * p if decoupled else 0))
    return w


CONTROLS = [
    {"warmup": True},
    {"max_step": 0.02},
    {"max_norm": 0.7},
    {"warmup": True, "max_step": 0.05, "max_norm": 2.0},
    {"normalize": "layer"},
    {"decoupled": True, "decay": 0.3},
    {"decay": 0.3, "normalize": "layer", "decoupled": True, "warmup": True, "momentum": 0.6},
    {"momentum": 0.8, "max_step": 0.02, "max_norm": 0.7},
    {"compress": 0.4, "max_step": 0.02},
    {"compress": 0.4, "max_norm": 0.7, "warmup": True},
]


def settings(controls):
    """As MFAC takes them."""
    names = {"decoupled": "decoupled_weight_decay", "decay": "weight_decay"}
    return {names.get(name, name): value for name, value in controls.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_every_control_is_its_definition(controls, dtype):
    params, history = parameters(dtype=dtype), gradients(3 * M, dtype=dtype)
    expected = dense_steps(params, history, lr=0.1, **controls)
    plain = dense_steps(params, history, lr=0.1)
    optimizer = MFAC(params, lr=0.1, ngrads=M, damp=DAMP, window_dtype=dtype, **settings(controls))
    for grads in history:
        take(optimizer, params, grads)
    error = (flat(params) - flat(expected)).norm() / flat(expected).norm()
    assert error < (1e-10 if dtype == torch.float64 else 1e-4)
    assert (flat(plain) - flat(expected)).norm() > 1e-2 * flat(expected).norm(), "it does something"


def test_all_off_is_the_same_to_the_bits():
    """As an optimizer without any control, that is, without its lines in the step, would do."""
    controls = dict(warmup=False, max_step=None, max_norm=None, normalize=None)
    controls |= {"decoupled_weight_decay": False}
    common = dict(lr=0.1, momentum=0.9, weight_decay=0.01, ngrads=M, damp=DAMP)
    params = parameters(dtype=torch.float32)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = MFAC(params, **common, **controls)
    fisher = optim.DynamicInverseFisher(M, sum(p.numel() for p in twins), DAMP)
    v = torch.zeros(fisher.shape[0])
    for grads in gradients(3 * M, dtype=torch.float32):
        take(optimizer, params, grads)
        parts = zip(grads, twins, strict=True)
        g = torch.cat([torch.add(g, w.detach(), alpha=0.01).flatten() for g, w in parts])
        v.lerp_(fisher.update_matvec(g), 1 - 0.9)
        for w, step in zip(twins, (v * 0.1).split([p.numel() for p in twins]), strict=True):
            w.data -= step.view_as(w)
    assert all(torch.equal(p, w) for p, w in zip(params, twins, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_bounds_hold_where_damp_is_raised(dtype):
    """Parallel gradients need more than the λ that is set; in narrow windows g is not quite ĝ."""
    params = parameters(dtype=torch.float32)
    bounds = {"max_step": 1e-3, "max_norm": 0.5, "warmup": True}
    optimizer = MFAC(params, lr=0.5, ngrads=M, damp=1e-20, window_dtype=dtype, **bounds)
    g = torch.cat([x.flatten() for x in gradients(1, dtype=torch.float32)[0]])
    with pytest.warns(UserWarning, match="damp = 1e-20 is too small"):
        for t in range(2 * M):
            before = flat(params)
            new = (1 + 1e-6 * t) * g * 10 ** (t % 3)
            parts = new.split([p.numel() for p in params])
            take(optimizer, params, [x.view_as(p) for x, p in zip(parts, params, strict=True)])
            moved = before - flat(params)
            G = torch.cat(list(optimizer.fisher.window.tiles()), 1)
            F = dense_fisher(G, optimizer.damp_in_use)
            assert 0 < float(moved @ F @ moved) <= 1e-3 * 1.001 and float(moved.norm()) <= 0.2501
    assert optimizer.damp_in_use > optimizer.damp


def test_shards_and_refused_gradients_do_not_change_a_control():
    history = gradients(2 * M, dtype=torch.float32)
    weights = []
    for extra in ({}, {"gpus": ["cpu"] * 3}):
        torch.manual_seed(0)
        params = parameters(dtype=torch.float32)
        bounds = {"max_step": 0.02, "max_norm": 0.7, "warmup": True, "normalize": "layer"}
        optimizer = MFAC(params, lr=0.1, momentum=0.5, ngrads=M, damp=DAMP, **bounds, **extra)
        for t, grads in enumerate(history):
            if t == 3 and extra:
                before = flat(params)
                with pytest.warns(UserWarning, match="NaN or Inf"):
                    take(optimizer, params, [torch.full_like(g, torch.nan) for g in grads])
                assert torch.equal(flat(params), before)
            take(optimizer, params, grads)
        weights.append(flat(params))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def relative_steps(w, history, fraction, lr):
    """With λ found from the rows before steps 0, 1, 2, 4, ... and m, 2m, ..., the first from g."""
    w, rows, dampings = flat(w), [], []
    for n, grads in enumerate(history):
        g = flat(grads)
        if n in (0, 1, 2) or n % M == 0:
            G = ring(torch.stack(rows or [g]), M)
            damp = fraction * float(G.square().sum()) / (M * len(w))
        rows.append(g)
        w -= lr * torch.linalg.solve(dense_fisher(ring(torch.stack(rows), M), damp), g)
        dampings.append(damp)
    return w, dampings


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_relative_damping_is_its_definition(scale):
    params, history = parameters(), gradients(3 * M + 2)
    history = [[scale * g for g in grads] for grads in history]
    expected, dampings = relative_steps(params, history, 0.3, scale)
    optimizer = MFAC(params, lr=scale, ngrads=M, damp="relative:0.3", window_dtype=torch.float64)
    for grads, damp in zip(history, dampings, strict=True):
        take(optimizer, params, grads)
        assert optimizer.damp_in_use == pytest.approx(damp, rel=1e-12)
    assert (flat(params) - expected).norm() < 1e-10 * expected.norm()
    assert optimizer.damp == "relative:0.3" and len(set(dampings)) == 5


@pytest.mark.parametrize("compress", [None, 0.4])
def test_relative_damping_goes_on_to_the_same_bits(compress):
    options = dict(lr=0.01, momentum=0.5, ngrads=M, damp="relative", compress=compress)
    params, history = parameters(dtype=torch.float32), gradients(3 * M, dtype=torch.float32)
    start = copy.deepcopy(params)
    optimizer = MFAC(params, **options)
    for grads in history:
        take(optimizer, params, grads)
    for stop in range(len(history)):
        others = copy.deepcopy(start)
        first = MFAC(others, **options)
        for grads in history[:stop]:
            take(first, others, grads)
        resumed = MFAC(others, **options)
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        for grads in history[stop:]:
            take(resumed, others, grads)
        assert resumed.damp_in_use == optimizer.damp_in_use
        assert torch.equal(flat(others), flat(params)), stop


def test_relative_damping_is_raised_and_assigned():
    params = parameters(dtype=torch.float32)
    optimizer = MFAC(params, lr=0.0, ngrads=M, damp="relative:1e-18")
    (grads,) = gradients(1, dtype=torch.float32)
    take(optimizer, params, [torch.zeros_like(g) for g in grads])  # says nothing about λ
    assert optimizer.damp_in_use == 1e-5
    with pytest.warns(UserWarning, match="too small"):
        for _ in range(2 * M):
            take(optimizer, params, grads)
    assert optimizer.raised_steps > 0 and optimizer.damp_in_use > optimizer._recovery.damp
    mean = float(flat(grads).square().sum()) / len(flat(grads))
    optimizer.damp = "relative"  # at once
    assert optimizer.damp_in_use == pytest.approx(0.1 * mean, rel=1e-6)
    assert optimizer.damp == "relative"
    optimizer.damp = 3
    take(optimizer, params, grads)
    assert optimizer.damp_in_use == optimizer.damp == 3.0
    with pytest.raises(ValueError, match="Invalid damp: 'relative:'"):
        optimizer.damp = "relative:"


def test_what_a_mask_freezes_does_not_decay():
    """Nor does what has no gradient."""
    params = parameters()
    masks = [torch.rand(p.shape) > 0.5 for p in params]
    before = [p.detach().clone() for p in params]
    how = {"decoupled_weight_decay": True, "weight_decay": 0.5}
    optimizer = MFAC(params, lr=0.1, ngrads=M, sparse=masks, **how)
    for *grads, _ in gradients(3):
        take(optimizer, params, [*grads, None])
    for p, mask, old in zip(params[:2], masks, before, strict=False):
        assert torch.equal(p[~mask], old[~mask]) and not (p[mask] == old[mask]).any()
    assert torch.equal(params[2], before[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_zero_can_move_by_layer(dtype):
    params = [nn.Parameter(torch.zeros(4, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]
    optimizer = MFAC(params, lr=0.5, ngrads=M, normalize="layer")
    take(optimizer, params, [torch.ones_like(params[0]), torch.zeros_like(params[1])])
    assert float(flat(params[:1]).norm()) == pytest.approx(0.5 * FLOOR, rel=0.01)
    assert torch.equal(params[1], torch.ones_like(params[1])), "a part that is zero stays zero"


@pytest.mark.cuda
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_a_captured_step_is_the_eager_one(controls):
    """With a fallback group, to the bits, and past a gradient that is refused; eager ones wait for
    nothing."""
    device = torch.device("cuda")
    if cuda_kernels(device) is None:
        pytest.skip("needs the kernels")
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = network().to(device)
        rates = [torch.tensor(rate, device=device) for rate in (0.1, 0.01)]
        groups = mfac_groups(model, lr=rates[1])
        optimizer = MFAC(groups, lr=rates[0], ngrads=M, damp=DAMP, **settings(controls))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for t in range(12):
                for p in model.parameters():
                    p.grad.copy_(torch.randn(p.shape))
                if t == 7:
                    groups[1]["params"][0].grad[0] = torch.nan
                torch.cuda.synchronize()
                if not captured:
                    torch.cuda.set_sync_debug_mode("error" if t == 4 else "default")
                    optimizer.step()
                    torch.cuda.set_sync_debug_mode("default")
                elif t < 3:
                    optimizer.step()
                else:
                    if t == 3:
                        with torch.cuda.graph(graph, stream=stream):
                            optimizer.step()
                    graph.replay()
        torch.cuda.synchronize()
        results.append([p.detach().cpu() for p in model.parameters()])
        assert optimizer.fisher.count == 11
    torch.testing.assert_close(*results, rtol=0, atol=0)


# --- groups of another algorithm ------------------------------------------------------------------


def network():
    return nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 9)
    )


def train(model, optimizers, steps, first=0):
    for t in range(first, first + steps):
        x = torch.randint(9, (16,), generator=torch.Generator().manual_seed(t))
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(model(x), 2 * x % 9).backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_same_weights(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


FALLBACKS = [
    ("adamw", torch.optim.AdamW, dict(lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)),
    ("adamw", torch.optim.AdamW, {}),
    ("sgd", torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)),
    ("sgd", torch.optim.SGD, {}),
]


@pytest.mark.parametrize(("algorithm", "other", "own"), FALLBACKS)
def test_a_fallback_group_is_trained_as_by_torchs_optimizer(algorithm, other, own):
    """To the same bits, with torch's defaults and across a resumption; the window is that of the
    first group alone."""
    model, torchs = network(), network()
    torchs.load_state_dict(model.state_dict())
    common = dict(lr=1e-2, momentum=0.9, ngrads=M, damp=DAMP)
    optimizer = MFAC(mfac_groups(model, algorithm, **own), **common)
    assert optimizer.fisher.shape == (16, 16)
    matrices, rest = (group["params"] for group in mfac_groups(torchs))
    train(model, [optimizer], 5)
    references = [MFAC(matrices, **common), other(rest, **own)]
    train(torchs, references, 5)
    assert_same_weights(model, torchs)

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    model = copy.deepcopy(model)
    resumed = MFAC(mfac_groups(model, algorithm), **common)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    twin, copied = copy.deepcopy((model, resumed))
    for net, one in ((model, [resumed]), (twin, [copied]), (torchs, references)):
        train(net, one, 5, first=5)
    assert_same_weights(model, torchs)
    assert_same_weights(twin, torchs)


@pytest.mark.parametrize("where", [0, 1], ids=["mfac", "adamw"])
def test_nan_in_any_group_skips_the_step_of_all(where):
    model = network()
    optimizer = MFAC(mfac_groups(model), ngrads=M, momentum=0.9, decoupled_weight_decay=True)
    train(model, [optimizer], 3)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.param_groups[where]["params"][0].grad.view(-1)[-1] = torch.nan
    with pytest.warns(UserWarning, match="NaN or Inf: this step is skipped"):
        optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.skipped_steps == 1 and optimizer.fisher.count == 3
    train(model, [optimizer], 1)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_group_may_come_later_and_alone_have_gradients():
    model = network()
    matrices, rest = mfac_groups(model, lr=0.1)
    optimizer = MFAC([matrices], ngrads=M)
    optimizer.add_param_group(rest)
    before = copy.deepcopy(model.state_dict())
    for p in rest["params"]:
        p.grad = torch.ones_like(p)
    rest["params"][-1].grad = None  # it stays as it is
    optimizer.step()
    changed = [not torch.equal(before[name], x) for name, x in model.state_dict().items()]
    assert changed == [True, False, True, True, True, True, False]
    assert optimizer.fisher.count == 0
    assert "algorithm" not in matrices and rest["lr"] == 0.1, "groups belong to their caller"


def test_nan_where_the_window_has_no_gradient_skips_the_step():
    model = network()
    optimizer = MFAC(groups := mfac_groups(model, lr=0.1), ngrads=M)
    before = copy.deepcopy(model.state_dict())
    groups[1]["params"][0].grad = torch.full_like(groups[1]["params"][0], torch.inf)
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_maximize_is_that_of_all_groups(algorithm):
    model = network()
    groups = mfac_groups(model, algorithm, lr=0.1, weight_decay=0)
    optimizer = MFAC(groups, lr=0.1, ngrads=M, maximize=True)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool((p > old).all()) for p, old in zip(model.parameters(), before, strict=True))


def test_parameters_of_a_fallback_group_may_be_replaced():
    """As frameworks do; what belonged to those that have gone goes."""
    model = network()
    optimizer = MFAC(mfac_groups(model), ngrads=M)
    train(model, [optimizer], 2)
    model[4].bias = nn.Parameter(torch.ones(9))
    optimizer.param_groups[1]["params"][-1] = model[4].bias
    train(model, [optimizer], 2)
    assert float(optimizer.state_dict()["state"][6]["step"]) == 2
    assert optimizer.fisher.count == 4


def test_schedulers_scale_each_groups_own_rate():
    model = network()
    optimizer = MFAC(mfac_groups(model, lr=0.5), lr=0.25, ngrads=M)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    train(model, [optimizer], 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25]


def test_a_state_of_another_algorithm_is_refused():
    model = network()
    state = MFAC(mfac_groups(model), ngrads=M).state_dict()
    other = MFAC(mfac_groups(model, "sgd"), ngrads=M)
    with pytest.raises(ValueError, match=r"has groups of algorithm .'mfac', 'adamw'"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"algorithm": "adam"}, "Invalid algorithm: 'adam'; it must be one of"),
        ({"algorithm": "adamw", "momentum": 0.9}, "momentum is not a setting of algorithm 'adamw'"),
        ({"algorithm": "sgd", "sparse": True}, "sparse is not a setting of algorithm 'sgd'"),
        ({"algorithm": "sgd", "dampening": 0.5}, "dampening is not a setting of algorithm 'sgd'"),
        ({"algorithm": "adamw", "amsgrad": True}, "amsgrad is not a setting of algorithm 'adamw'"),
        ({"algorithm": "adamw", "lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"algorithm": "adamw", "betas": (0.9, 1.0)}, "Invalid betas: "),
        ({"algorithm": "adamw", "eps": -1.0}, "Invalid eps: "),
        ({"algorithm": "sgd", "nesterov": True}, "Invalid nesterov: True"),
        (
            {"normalize": "group"},
            r"Invalid normalize: 'group'; it must be one of \['layer', None\]",
        ),
    ],
)
def test_wrong_groups_are_refused(group, message):
    params = parameters()
    optimizer = MFAC(params[:1], ngrads=M)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "wrong", [{"warmup": 10}, {"max_step": 0.0}, {"max_norm": -1.0}, {"max_norm": torch.nan}]
)
def test_wrong_controls_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"Invalid {name}: "):
        MFAC(parameters(), **wrong)


class Language(nn.Module):
    """A small transformer, its head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.place = nn.Embedding(11, 8), nn.Parameter(torch.zeros(5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight


def test_the_groups_of_a_transformer():
    model = Language()
    matrices, rest = mfac_groups(model, others=[model.place], lr=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in matrices["params"]] == [
        "block.self_attn.in_proj_weight",
        "block.self_attn.out_proj.weight",
        "block.linear1.weight",
        "block.linear2.weight",
    ]
    assert rest["algorithm"] == "adamw" and rest["lr"] == 0.5
    found = [id(p) for group in (matrices, rest) for p in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters())), "each once"
    (kept,) = (g["params"] for g in mfac_groups(model, head=model.block.linear2)[:1])
    assert model.block.linear2.weight not in set(kept)


def test_a_model_that_is_cast_after_the_optimizer_was_made():
    models = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    early = MFAC(mfac_groups(models[0], lr=0.1), ngrads=M)
    for model in models:
        model.bfloat16()
    late = MFAC(mfac_groups(models[1], lr=0.1), ngrads=M)
    for _ in range(3):
        x = torch.randn(5, 4, dtype=torch.bfloat16)
        for model, optimizer in zip(models, (early, late), strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_nan_in_another_group_is_counted_where_the_window_has_no_columns():
    p, q = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3))
    optimizer = MFAC([{"params": [p]}, {"params": [q], "algorithm": "sgd"}], ngrads=M)
    p.grad, q.grad = torch.zeros(0), torch.tensor([1.0, torch.nan, 0.0])
    with pytest.warns(UserWarning, match="NaN or Inf"):
        optimizer.step()
    assert optimizer.skipped_steps == 1 and torch.equal(q, torch.ones(3))


def test_nan_in_another_group_changes_nothing_where_masks_freeze_the_window():
    p, q = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(3))
    groups = [{"params": [p], "sparse": True}, {"params": [q], "algorithm": "adamw"}]
    optimizer = MFAC(groups, ngrads=M)
    p.grad, q.grad = torch.ones(2, 2), torch.tensor([1.0, torch.nan, 0.0])
    optimizer.step()
    assert torch.equal(q, torch.ones(3)) and torch.equal(p, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"others": ["0.weight"]}, "Invalid others: '0.weight'; it must be a module"),
        ({"learning_rate": 0.1}, r"Invalid settings: \['learning_rate'\]; it must be among"),
        ({"params": []}, r"Invalid settings: \['params'\]"),
        ({"algorithm": "sgd", "eps": 1e-3}, r"Invalid settings: \['eps'\]"),
    ],
)
def test_wrong_arguments_of_mfac_groups_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        mfac_groups(Language(), **wrong)


def test_one_layer_alone_may_be_given_as_others():
    model = Language()
    (matrices, _), (fewer, _) = mfac_groups(model), mfac_groups(model, others=model.block.linear1)
    assert len(fewer["params"]) == len(matrices["params"]) - 1


@pytest.mark.parametrize("scale", [1e15, 1e25])
def test_the_length_of_a_layers_step_does_not_overflow(scale):
    p = nn.Parameter(torch.ones(4))
    optimizer = MFAC([p], lr=0.1, ngrads=M, damp=1e30, normalize="layer")
    p.grad = scale * torch.tensor([1.0, 2.0, 3.0, 4.0])
    optimizer.step()
    assert float((p.detach() - 1).norm()) == pytest.approx(0.2, rel=1e-5)


# --- the script -----------------------------------------------------------------------------------


def built(model, **given):
    """The settings that main_optim.py makes of flags, and the optimizer that it makes of them."""
    chosen = optim_settings.choose_settings({"dataset": "digits", "device": "cpu", **given})
    return chosen, main_optim.build_optimizer(model, chosen, torch.device("cpu"), Ranks())[0]


def test_flags_reach_the_optimizer():
    model = models.build("resnet20", 10)
    flags = {"window_warmup": True, "max_step": 0.5, "max_norm": 2.0, "normalize": "layer"}
    flags |= {"decoupled": True, "fallback": "sgd", "fallback_weightdecay": 0.25}
    settings, optimizer = built(model, **flags)
    first, second = optimizer.param_groups
    assert vars(optimizer._control) == {"warmup": True, "max_step": 0.5, "max_norm": 2.0}
    assert first["normalize"] == "layer" and first["decoupled_weight_decay"]
    assert {p.ndim for p in first["params"]} == {4}, "convolutions"
    assert (second["algorithm"], second["momentum"], second["weight_decay"]) == ("sgd", 0.9, 0.25)
    assert main_optim.start_rates(settings) == [first["lr"], second["lr"]] == [0.03, 0.1]
    _, optimizer = built(model)  # the defaults of the digits
    assert vars(optimizer._control) == {"warmup": True, "max_step": None, "max_norm": None}
    first, second = optimizer.param_groups
    assert (first["normalize"], second["algorithm"]) == ("layer", "adamw")
    assert built(model, compress=0.1)[0]["lr"] == 0.03, "which is relative to the weights"
    off = {"window_warmup": False, "normalize": "none", "fallback": "none"}
    settings, optimizer = built(model, compress=0.1, **off)
    (group,) = optimizer.param_groups
    assert (group["normalize"], optimizer._control.warmup, settings["lr"]) == (None, False, 1e-3)
    assert built(model, optim="adam", decoupled=True)[1].defaults["decoupled_weight_decay"]


def test_relative_damping_by_flag():
    flag = optim_settings.build_parser().parse_args(["--damp", "relative:0.3"]).damp
    assert built(models.build("resnet20", 10), damp=flag)[1].damp == flag == "relative:0.3"
    choose = optim_settings.choose_settings
    assert choose({"damp": flag, "device": "cuda"})["graph"] == "no"
    with pytest.raises(UserError, match="--damp relative goes with --graph no"):
        choose({"damp": flag, "device": "cuda", "graph": "yes"})


def test_the_learning_rate_rises_at_first():
    settings, _ = built(models.build("resnet20", 10), schedule="cosine", epochs=5, warmup_steps=4)
    factor = main_optim.learning_rate_factor(settings, 4)
    expected = [min(1, (t + 1) / 4) * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(20)]
    assert [factor(t) for t in range(20)] == pytest.approx(expected)


def test_clipping_and_label_smoothing_in_a_run(dataset, tmp_path, monkeypatch):
    norms, losses = [], []
    step, backward = main_optim.Muon.step, torch.Tensor.backward

    def spy(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(flat(grads).norm()))
        return step(self, closure)

    monkeypatch.setattr(main_optim.Muon, "step", spy)
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: (losses.append(float(loss.detach())), backward(loss))
    )
    flags = ["--optim", "muon", "--epochs", 1, "--device", "cpu", "--dataset", dataset]
    for name, more in (("a", []), ("b", ["--clip", 0.125, "--label_smoothing", 0.5])):
        call = [*flags, "--save", tmp_path / f"{name}.pth", *more]
        main_optim.main([str(word) for word in call])
    plain, clipped = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert min(plain) > 0.125 and clipped == pytest.approx([0.125] * len(clipped), rel=1e-4)
    assert losses[0] != losses[len(losses) // 2], "of the same weights and images"


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 3, 3)])
def test_muon_is_that_of_torch(shape):
    """A kernel as the matrix of its filters, whatever the order in memory."""
    middle = nn.Conv2d(3, 6, 3) if len(shape) == 4 else nn.Linear(5, 6)
    model = nn.Sequential(middle, nn.Flatten(), nn.Linear(6, 2))
    if len(shape) == 4:
        model.to(memory_format=torch.channels_last)
    w = nn.Parameter(middle.weight.detach().flatten(1).clone())
    rest = [nn.Parameter(p.detach().clone()) for p in list(model.parameters())[1:]]
    ours = Muon(model, lr=0.05, momentum=0.9, weight_decay=0.1, fallback={"lr": 0.01})
    theirs = [torch.optim.Muon([w], lr=0.05, momentum=0.9, weight_decay=0.1)]
    theirs.append(torch.optim.AdamW(rest, lr=0.01))
    for _ in range(5):
        for p, q in zip(model.parameters(), [w, *rest], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.reshape(q.shape).clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for p, q in zip(model.parameters(), [w, *rest], strict=True):
        assert torch.equal(p.reshape(q.shape), q)


def test_a_model_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="No matrix is left for M-FAC"):
        mfac_groups(nn.Linear(3, 2))
