"""What each process of tests/test_distributed.py does.

    python distributed_worker.py 3:CHECK,CHECK 2:CHECK FOLDER

First three processes, then two. A check is a function of this module. Every process judges its
results against a run of its own, in one process on the whole batches, or against dense matrices in
float64.
"""

import copy
import os
import signal
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference import dense_inverse
from test_optim import assert_same_state
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

import main_common
import main_optim
import main_prun
import ranks
from fallback import mfac_groups
from models.sync import BatchNorm
from optim import MFAC, DynamicInverseFisher
from prun import MFACPruner, PagedInverseFisher
from windows import gram

OPTIONS = {"lr": 0.05, "ngrads": 6, "damp": 1e-2}
KINDS = ("replicated", "ddp", "fsdp")  # a window of each process's own; shared, as asked; sharded


def network(seed=0):
    """With parameters of fewer entries than there are processes, of sizes that none divides, and
    frozen ones."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 3)
    )
    model[2].bias.requires_grad_(False)
    with torch.no_grad():
        model[0].weight[:, ::3] = 0
    return model


def shared(kind):
    """The processes that are asked to share a window."""
    return {"process_group": dist.group.WORLD} if kind == "ddp" else {}


def parallel(model, kind):
    if kind != "fsdp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def groups(model):
    return [
        {"params": list(model[0].parameters()), "momentum": 0.9, "weight_decay": 1e-2},
        {"params": [p for layer in model[2:] for p in layer.parameters()]},
    ]


def batches(number, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(12, 7, generator=generator), torch.randint(3, (12,), generator=generator))
        for _ in range(number)
    ]


def train(net, optimizer, data, together=True):
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    for x, y in data:
        optimizer.zero_grad()
        cross_entropy(net(x[rank::size]), y[rank::size]).backward()
        optimizer.step()


def whole(p):
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def weights(model):
    return torch.cat([whole(p).flatten() for p in model.parameters()])


def assert_same_everywhere(x):
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    assert all(torch.equal(x, other) for other in found)


def assert_same(x, y):
    """What is here of two nested states is the same, to the bit."""
    assert_same_state(*(tree_map(here, state) for state in (x, y)))


def here(x):
    return ranks.local(x) if torch.is_tensor(x) else x


def assert_close(x, y, tolerance=1e-5):
    error = float((x - y).norm() / y.norm())
    assert error < tolerance, error


# --- the optimizer ------------------------------------------------------------------------------


def steps(folder):
    """Twenty steps are those of one process with three shards, for every way to train."""
    for kind in KINDS:
        for extra in ({"damp": "relative"}, {"sparse": True}, {"window_dtype": torch.bfloat16}):
            model, alone = network(), network()
            net = parallel(model, kind)
            options = {**OPTIONS, **extra}
            optimizer = MFAC(groups(model), **options, **shared(kind))
            single = MFAC(groups(alone), gpus=["cpu"] * 3, **options)
            columns, all_columns = optimizer.fisher.shape[0], single.fisher.shape[0]
            if kind == "replicated":
                assert columns == all_columns
            else:
                assert columns <= all_columns / dist.get_world_size() + 40
            for data in (batches(12), batches(8, seed=2)):
                train(net, optimizer, data)
                train(alone, single, data, together=False)
                optimizer.damp = single.damp = 2e-2
                if kind == "fsdp":  # DDP does not take care of what was frozen at first
                    for each in (model, alone):
                        each[2].bias.requires_grad_(True)  # which now takes columns
            tolerance = 1e-5 if "window_dtype" not in extra else 1e-2  # a last bit may be another
            assert_close(weights(model), weights(alone), tolerance)
            assert_same_everywhere(weights(model))
            if "sparse" in extra:
                assert not whole(model[0].weight)[:, ::3].any()


def mixed(folder):
    """Parameters that are sharded, replicated DTensors and plain ones, all with masks, train like
    those of one process; the window of one process goes on in all of them, and back."""
    model, alone = network(), network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    for name, p in list(model[2].named_parameters()):
        copied = distribute_tensor(p.detach(), mesh, [Replicate()])
        setattr(model[2], name, nn.Parameter(copied, requires_grad=p.requires_grad))

    def train_both(optimizers, data):
        for batch in data:
            train(alone, optimizers[1], [batch], together=False)
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad.clone()
                    if hasattr(p, "placements"):
                        p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
            optimizers[0].step()

    def new():
        options = {"sparse": True, **OPTIONS}
        return MFAC(groups(model), **options), MFAC(groups(alone), **options)

    optimizers = new()
    train_both(optimizers, batches(4))
    others = new()
    others[0].load_state_dict(optimizers[1].state_dict())
    state = optimizers[0].state_dict()
    others[1].load_state_dict(tree_map(lambda x: whole(x) if torch.is_tensor(x) else x, state))
    train_both(others, batches(9, seed=2))
    assert_close(weights(model), weights(alone))
    assert_same_everywhere(weights(model))


def messages(folder):
    """A step sums up m float64 numbers and gathers d numbers where weights are replicated, also
    where its norms are bounded."""
    bounds = {"warmup": True, "max_step": 0.1, "max_norm": 1.0}
    sent, all_reduce, all_gather = [], dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda x, **o: (sent.append((x.dtype, x.numel())), all_reduce(x, **o))
    dist.all_gather = lambda out, x, **o: (
        sent.append((x.dtype, x.numel())),
        all_gather(out, x, **o),
    )
    try:
        for kind in KINDS:
            model = network()
            net = parallel(model, kind)
            optimizer = MFAC(model.parameters(), **OPTIONS, **bounds, **shared(kind))
            train(net, optimizer, batches(7))
            sent.clear()
            optimizer.step()
            expected = [] if kind == "replicated" else [(torch.float64, 6)]
            if kind == "ddp":
                sizes = [p.numel() for p in model.parameters() if p.requires_grad]
                own = sum(-(-size // dist.get_world_size()) for size in sizes)
                expected.append((torch.float32, own))
            assert sent == expected, sent
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather


def skipped(folder):
    """NaN in what one process alone has skips the step in all of them, and nothing is changed."""
    for kind, extra in (("ddp", {}), ("fsdp", {}), ("fsdp", {"compress": 0.3})):
        model = network()
        net = parallel(model, kind)
        optimizer = MFAC(model.parameters(), momentum=0.5, **OPTIONS, **extra, **shared(kind))
        train(net, optimizer, batches(4))
        before = copy.deepcopy([weights(model), optimizer.fisher.state_dict()])
        p = model[0].weight
        if kind == "ddp" or dist.get_rank() == 1:
            local = p.grad.to_local() if kind == "fsdp" else p.grad
            local.view(-1)[-1] = float("nan")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert optimizer.skipped_steps == 1 and "NaN or Inf" in str(caught[0].message)
        after = [weights(model), optimizer.fisher.state_dict()]
        assert_same(after, before)


def vetoed(folder):
    """NaN in a part of another group's gradient that one process alone has skips the step in all,
    also where they have no columns, or no gradients for the window."""
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()

    def sharded(x):
        return distribute_tensor(x, mesh, [Shard(0)])

    for rows, gradient in ((1, True), (4, False), (4, True)):
        w, b = (nn.Parameter(sharded(torch.ones(n, 3))) for n in (rows, 4))
        optimizer = MFAC([{"params": [w]}, {"params": [b], "algorithm": "sgd"}], ngrads=4)
        for bad in (False, True, False):
            b.grad, w.grad = sharded(torch.ones(4, 3)), None
            if gradient:
                w.grad = sharded(torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)))
            if bad and len(b.grad.to_local()) and rank == 1:
                b.grad.to_local()[0, 0] = torch.nan
            before = whole(w).clone(), whole(b).clone()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            assert torch.equal(whole(b), before[1]) == bad
            assert torch.equal(whole(w), before[0]) == (bad or not gradient)
        assert optimizer.skipped_steps == 1


def added(folder):
    """A sharded group that is added later shares the window, which starts anew."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (p, q), head = (nn.Parameter(torch.ones(4, 3)) for _ in range(2)), torch.zeros(4, 3)
    sharded = nn.Parameter(distribute_tensor(head, mesh, [Shard(0)]))
    optimizer, single = MFAC([p], **OPTIONS), MFAC([q], **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        if step == 2:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.add_param_group({"params": [sharded]})
            assert "starts anew" in str(caught[0].message)
            head = nn.Parameter(head)
            single = MFAC([q, head], **OPTIONS)
        p.grad = q.grad = torch.randn(4, 3, generator=generator)
        if step >= 2:
            head.grad = torch.randn(4, 3, generator=generator)
            sharded.grad = distribute_tensor(head.grad, mesh, [Shard(0)])
        optimizer.step()
        single.step()
    assert_close(p.detach(), q.detach())
    assert_close(whole(sharded).detach(), head.detach())


def controlled(folder):
    """With every control, and a group of AdamW, twelve steps are those of one process; NaN in one
    process's part of that group skips the step of all; torch.distributed.checkpoint resumes it."""
    bounds = {"warmup": True, "max_step": 1e-4, "max_norm": 3.0}
    by_layer = {"normalize": "layer", "decoupled_weight_decay": True, "weight_decay": 0.1}
    for kind in KINDS:
        for extra in (bounds, by_layer, bounds | {"compress": 0.3}):
            model, alone = network(), network()
            net = parallel(model, kind)
            options = {**OPTIONS, "momentum": 0.5, **extra}
            optimizer = MFAC(mfac_groups(model, lr=0.02), **options, **shared(kind))
            single = MFAC(mfac_groups(alone, lr=0.02), **options)
            train(net, optimizer, batches(12))
            train(alone, single, batches(12), together=False)
            if "compress" not in extra:  # each process keeps the largest of its own columns
                assert_close(weights(model), weights(alone))
            assert_same_everywhere(weights(model))

            before = weights(model).clone()
            gradient = ranks.local(model[0].bias.grad)
            if gradient.numel() and (kind != "fsdp" or dist.get_rank() == 1):
                gradient[-1] = torch.nan
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            assert optimizer.skipped_steps == 1 and torch.equal(weights(model), before)

            if kind != "fsdp" or "compress" not in extra:
                path = folder / "-".join(["controlled", kind, *extra, str(dist.get_world_size())])
                dcp.save({"state": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
                other = MFAC(mfac_groups(model), **options, **shared(kind))
                state = {"state": get_optimizer_state_dict(model, other)}
                dcp.load(state, checkpoint_id=path)
                set_optimizer_state_dict(model, other, state["state"])
                assert_same(other.state_dict(), optimizer.state_dict())


def raises(message, call):
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


def differing(folder):
    """Processes with other parameters are told so at the first step, if they share a window."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    for model in (nn.Linear(8, 4), nn.Linear(8, 4 + (rank == 1))):
        optimizer = MFAC(model.parameters(), **OPTIONS, process_group=dist.group.WORLD)
        model(torch.ones(2, 8)).sum().backward()
        raises("have parameters of different shapes or values", optimizer.step)
        own = MFAC(model.parameters(), **OPTIONS)  # a window of its own, as of a pipeline's stage
        own.step()
        assert own.fisher.count == 1


def lost(folder):
    """What torch.save writes of a shared window is one process's part, and no other loads it, also
    where parts differ in size."""
    options = {**OPTIONS, "process_group": dist.group.WORLD}
    for rows, message in ((6, "the state that it saved itself"), (4, "")):
        p = nn.Parameter(torch.ones(rows, 8))
        optimizer = MFAC([p], **options)
        torch.manual_seed(0)
        for _ in range(3):
            p.grad = torch.randn(rows, 8)
            optimizer.step()
        state = optimizer.state_dict()
        torch.save(state, folder / f"{dist.get_rank()}.pt")
        dist.barrier()
        first, own = (
            torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, dist.get_rank())
        )
        dist.barrier()
        raises(message, lambda p=p, state=first: MFAC([p], **options).load_state_dict(state))
        for good in (own, copy.deepcopy(state)):
            other = MFAC([p], **options)
            other.load_state_dict(good)
            assert_same(other.fisher.state_dict(), optimizer.fisher.state_dict())


def zero(folder):
    """ZeroRedundancyOptimizer: each process has the window of the parameters that it updates."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = network(), network()
    for each in (model, alone):
        each[2].bias.requires_grad_(True)
    net = parallel(model, "ddp")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=MFAC, **OPTIONS)
    twins = dict(zip(model.parameters(), alone.parameters(), strict=True))
    singles = [
        MFAC([twins[p] for group in part for p in group["params"]], **OPTIONS)
        for part in optimizer._partition_parameters()
    ]
    for x, y in batches(9):
        train(net, optimizer, [(x, y)])
        alone.zero_grad()
        cross_entropy(alone(x), y).backward()
        for single in singles:
            single.step()
    assert_close(weights(model), weights(alone))
    assert_same_everywhere(weights(model))


def single(folder):
    """One process has the column of the only weight, and all of them move it."""
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    MFAC([p], lr=1.0, ngrads=2, damp=1.0, process_group=dist.group.WORLD).step()
    assert_close(p.detach(), torch.full((1,), 1 / 3))
    assert_same_everywhere(p.detach())


def fsdp1(folder):
    """Flat parameters are refused, with what to use instead."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        device = torch.device("cpu")
        model = FullyShardedDataParallel(
            nn.Linear(6, 4), use_orig_params=original, device_id=device
        )
        raises("torch.distributed.fsdp.fully_shard", lambda m=model: MFAC(m.parameters()))


def swapped(folder):
    """An optimizer that is built before fully_shard, as by Accelerate, gets the new parameters,
    keeps the masks, and trains as one that is built afterwards."""
    models = [network(), network()]
    options = {"momentum": 0.9, "sparse": True, **OPTIONS}
    early = MFAC(models[0].parameters(), **options)
    nets = [parallel(model, "fsdp") for model in models]
    early.param_groups[0]["params"] = list(models[0].parameters())
    optimizers = [early, MFAC(models[1].parameters(), **options)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, batches(9))
    a, b = (weights(model) for model in models)
    assert torch.equal(a, b) and not whole(models[0][0].weight)[:, ::3].any()
    assert_same(*(copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers))


def checkpoints(folder):
    """Saved and loaded by torch.distributed.checkpoint, in each of its forms; bit for bit."""
    cases = [
        ("replicated", {}),
        ("ddp", {"sparse": True}),
        ("fsdp", {"sparse": True}),
        ("ddp", {"compress": 0.3}),
    ]
    for kind, extra in cases:
        model = network()
        net = parallel(model, kind)
        settings = {"momentum": 0.5, **OPTIONS, **extra, **shared(kind)}
        optimizer = MFAC(groups(model), **settings)
        train(net, optimizer, batches(9))
        x = torch.randn(optimizer.fisher.shape[0])
        expected = optimizer.fisher.matvec(x)
        forms = [None, StateDictOptions(flatten_optimizer_state_dict=True)]
        if torch.__version__ < "2.10":  # which flattens no nested entries
            forms.pop()
        for number, options in enumerate(forms):
            path = folder / "-".join([kind, *extra, str(number), str(dist.get_world_size())])
            state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
            dcp.save(state, checkpoint_id=path)
            other = MFAC(groups(model), **settings)
            state = {"optimizer": get_optimizer_state_dict(model, other, options=options)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(model, other, state["optimizer"], options=options)
            assert other.fisher.count == 9 and torch.equal(other.fisher.matvec(x), expected)
        if "compress" not in extra:
            options = StateDictOptions(full_state_dict=True)
            state = get_optimizer_state_dict(model, optimizer, options=options)
            other = MFAC(groups(model), **settings)
            set_optimizer_state_dict(model, other, copy.deepcopy(state), options=options)
            assert other.fisher.count == 9 and torch.equal(other.fisher.matvec(x), expected)
        other = MFAC(groups(model), **settings)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_same(other.state_dict(), optimizer.state_dict())
        if kind != "fsdp":  # torch does not copy the gradients of FSDP2
            assert torch.equal(copy.deepcopy(optimizer).fisher.matvec(x), expected)


def thawed(folder):
    """torch.distributed.checkpoint after layers were frozen, or unfrozen, in training, into an
    optimizer that is built before or after. torch saves nothing of what is frozen: the window goes
    on without its past."""
    for kind in KINDS:
        for unfrozen, early in ((False, False), (False, True), (True, True)):
            model, loaded = network(), network(seed=3)
            if kind == "fsdp":  # DDP does not take care of what is frozen later
                model, loaded = parallel(model, kind), parallel(loaded, kind)
            model[0].requires_grad_(not unfrozen)
            settings = {"momentum": 0.5, **OPTIONS, **shared(kind)}
            optimizer, data = MFAC(model.parameters(), **settings), batches(12)
            train(model, optimizer, data[:7], together=False)
            model[0].requires_grad_(unfrozen)
            optimizer.zero_grad()
            train(model, optimizer, data[7:9] if unfrozen else [], together=False)
            if early:
                loaded[0].requires_grad_(unfrozen)
            other = MFAC(loaded.parameters(), **settings)
            loaded[0].requires_grad_(unfrozen)
            path = folder / f"thawed-{kind}-{unfrozen}-{early}-{dist.get_world_size()}"
            names = ("model", "optimizer")
            state = dict(zip(names, get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=path)
            state = dict(zip(names, get_state_dict(loaded, other), strict=True))
            dcp.load(state, checkpoint_id=path)
            parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
            set_state_dict(loaded, other, **parts)
            assert other.fisher.count == optimizer.fisher.count
            K = gram(other.fisher.window.tiles())
            assert_close(other.fisher.coefficients.K, other.fisher.ranks.sum(K), 1e-6)
            a, b = (o.state_dict()["state"][6]["grads"] for o in (optimizer, other))
            assert_same([a, weights(model)], [b, weights(loaded)])
            for net, each in ((model, optimizer), (loaded, other)):
                train(net, each, data[9:], together=False)
            if unfrozen:
                assert_close(weights(loaded), weights(model))
            assert_same_everywhere(weights(loaded))


def grown(folder):
    """A shared window that is saved as a whole goes on to the same bits after it has grown, and its
    newest gradients enter another one. Of the new columns, one process may have none."""
    for extra in ({"compress": 0.3}, {"window_dtype": "float8_e4m3fn"}):
        model, loaded = network(), network()
        for each in (model, loaded):
            each[4].bias.requires_grad_(False)
        settings = {"momentum": 0.5, **OPTIONS, **shared("ddp")}
        optimizer, data = MFAC(model.parameters(), **settings, **extra), batches(12)
        train(model, optimizer, data[:4], together=False)
        for each in (model, loaded):
            each[4].bias.requires_grad_(True)
        train(model, optimizer, data[4:6], together=False)
        for each in (model, loaded):
            each[2].bias.requires_grad_(True)
        train(model, optimizer, data[6:8], together=False)
        loaded.load_state_dict(model.state_dict())
        other = MFAC(loaded.parameters(), **settings, **extra)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        dense = MFAC(network().parameters(), **{**settings, "ngrads": 4})
        dense.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        K = dense.fisher.ranks.sum(gram(dense.fisher.window.tiles()))
        newest = [(optimizer.fisher.count - 4 + i) % OPTIONS["ngrads"] for i in range(4)]
        assert_close(K, optimizer.fisher.coefficients.K[newest][:, newest], 1e-6)
        for net, each in ((model, optimizer), (loaded, other)):
            train(net, each, data[8:], together=False)
        assert torch.equal(weights(loaded), weights(model))


def save(folder):
    """Half of a run, to go on in another number of processes."""
    for kind in KINDS:
        model = network()
        net = parallel(model, kind)
        optimizer = MFAC(groups(model), **OPTIONS, **shared(kind))
        train(net, optimizer, batches(10))
        parts = get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder / kind)


def go_on(folder):
    """The other half, against an uninterrupted run in one process."""
    for kind in KINDS:
        model = network(seed=5)
        net = parallel(model, kind)
        optimizer = MFAC(groups(model), **OPTIONS, **shared(kind))
        parts = get_state_dict(model, optimizer)
        state = dict(zip(("model", "optimizer"), parts, strict=True))
        dcp.load(state, checkpoint_id=folder / kind)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        data = batches(20)
        train(net, optimizer, data[10:])
        alone = network()
        train(alone, MFAC(groups(alone), **OPTIONS), data, together=False)
        assert_close(weights(model), weights(alone))
        assert_same_everywhere(weights(model))


def refused(folder):
    """What can't be shared, in one sentence."""
    cases = [
        (lambda: MFAC(network().parameters(), process_group="all"), "Invalid process_group: 'all'"),
    ]
    half = dist.get_world_size() // 2
    square = init_device_mesh("cpu", (2, half), mesh_dim_names=("a", "b"))
    for mesh, placements in (
        (square["a"], [Partial()]),
        (square, [Shard(0), Shard(1)]),
        (square, [Replicate(), Partial()]),
    ):
        p = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, placements))
        cases.append((lambda p=p: MFAC([p]), "sharded along one dimension of the device mesh"))
    for call, message in cases:
        raises(message, call)


# --- what the scripts need ------------------------------------------------------------------------


def batch_norm(folder):
    """It is torch's on the whole batch, with autocast's types, too."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
        x = (torch.randn(6, 3, 2, 2) + 30).to(dtype)
        together, single = BatchNorm(3), nn.BatchNorm2d(3)
        y, expected = together(x[rank::size]), single(x)[rank::size]
        assert y.dtype == expected.dtype == dtype
        if y.numel():
            assert_close(y.detach().float(), expected.detach().float(), tolerance)
        assert_close(together.running_var, single.running_var)


def found(folder):
    """A group that is there already is the one that scripts take, and make no other."""
    group = main_common.find_ranks()
    assert (group.rank, group.size) == (dist.get_rank(), dist.get_world_size())
    assert main_common.find_ranks().group is group.group is dist.group.WORLD


def one_fails(folder):
    """A process that fails alone says why, though the first one does not know."""
    main_common.time.sleep = lambda seconds: None
    if dist.get_rank() == 1:
        main_common.Parser(prog="script").fail("only here")
    dist.barrier()


def training(folder):
    """main_optim.py, whose flags lie in a file."""
    main_optim.main((folder / "training").read_text().split("\n"))


def pruning_script(folder):
    """main_prun.py, in the same way."""
    main_prun.main((folder / "pruning").read_text().split("\n"))


# --- the inverse Fishers ------------------------------------------------------------------------


def inverses(folder):
    """Those of columns that are spread over processes are the dense ones."""
    m, d, damp = 9, 50, 1e-2
    torch.manual_seed(3)
    G, x, group = torch.randn(m, d), torch.randn(d), dist.group.WORLD
    part = ranks.Ranks(group).part
    inverse, own = dense_inverse(G, damp), part(G, 1).contiguous()
    fisher = DynamicInverseFisher(m, own.shape[1], damp, process_group=group)
    for row in own:
        newest = fisher.update_matvec(row)
    assert_close(newest.double(), part(inverse @ G[-1].double()))
    static = PagedInverseFisher(own, damp, pages=2, process_group=group)
    for form in (fisher, static):
        assert_close(form.matvec(part(x)).double(), part(inverse @ x.double()))
        assert_close(form.diagonal().double(), part(inverse.diagonal()))


def pruning(folder):
    """A pruned model is that of one process, with a full and with a blocked F."""
    data = [(x[:4], y[:4]) for x, y in batches(23)]
    for options in (
        {"ngrads": 10},
        {"ngrads": 21, "pages": 3, "update": "independent"},
        {"ngrads": 23, "blocksize": 7},
        {"ngrads": 5, "blocksize": 11},
    ):
        models = [network(), network()]
        pruners = [
            MFACPruner(model, data, damp=1e-3, process_group=group, **options)
            for model, group in zip(models, (dist.group.WORLD, False), strict=True)
        ]
        for pruner in pruners:
            pruner.prune(0.6)
            pruner.recompute()
            pruner.prune(0.8)
        together, alone = (weights(model) for model in models)
        assert torch.equal(together == 0, alone == 0)
        assert_close(together, alone)
        assert_same_everywhere(together)


class Noted(list):
    """A list that knows which of its items were asked for."""

    def __init__(self, items):
        super().__init__(items)
        self.asked = []

    def __getitem__(self, i):
        self.asked.append(i)
        return super().__getitem__(i)


def samples(folder):
    """Gradients of samples are those that one process takes from the same batches, which m cuts
    through, and which differ in size. Each process loads its own."""
    sizes = [4, 1, 3, 4, 2, 4, 4, 3, 4, 4]  # 33
    data = [(x[:n], y[:n]) for n, (x, y) in zip(sizes, batches(len(sizes)), strict=True)]
    rank, size = dist.get_rank(), dist.get_world_size()
    for options in (
        {"ngrads": 13},
        {"ngrads": 30, "blocksize": 40},
        {"ngrads": 33, "blocksize": 7, "damp": "relative"},
    ):
        models, found = [network(), network()], []
        for model, group in zip(models, (dist.group.WORLD, False), strict=True):
            found.append(Noted(data))
            how = {"damp": 1e-3, "per_sample": True, "process_group": group, **options}
            MFACPruner(model, found[-1], **how).prune(0.6)
        together, alone = (weights(model) for model in models)
        assert torch.equal(together == 0, alone == 0)
        assert_close(together, alone)
        assert_same_everywhere(together)
        (first, *own), (_, *all_of_them) = (noted.asked for noted in found)
        assert first == 0  # for its size
        assert set(own) <= set(all_of_them[rank::size]) | set(own[-1:]), (own, all_of_them)
    pruner = MFACPruner(network(), data, ngrads=34, per_sample=True)
    raises("Wanted 34 gradients, but the loader has fewer samples", lambda: pruner.prune(0.5))


def disagreement(folder):
    """What one process alone cannot do is an error in all of them."""
    model = nn.Linear(8, 4, bias=False)
    data = [(torch.randn(4, 8), torch.randint(4, (4,))) for _ in range(6)]

    def loss(model, batch):
        scale = 1e20 if dist.get_rank() == 1 else 1  # squares beyond float32, and λ beside them
        return cross_entropy(model(batch[0]), batch[1]) * scale

    group = dist.group.WORLD
    options = {"ngrads": 6, "blocksize": 4, "damp": 1e-10, "process_group": group}
    pruner = MFACPruner(model, data, loss=loss, **options)
    raises("damp", lambda: pruner.prune(0.5))


def forked(processes, folder, checks):
    """Calls each of the checks in so many processes, which need not import torch again."""
    how = {"world_size": processes, "init_method": f"file://{folder}/meeting-of-{processes}"}
    children = set()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            found = {"RANK": rank, "LOCAL_RANK": rank}
            found |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(number) for name, number in found.items()}
            try:
                dist.init_process_group("gloo", rank=rank, **how)
                for check in checks:
                    check(Path(folder))
                dist.barrier()
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)  # threads of torch's functional collectives can abort a process at its end
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    *plan, folder = sys.argv[1:]
    for part in plan:
        processes, checks = part.split(":")
        forked(int(processes), folder, [globals()[check] for check in checks.split(",")])
