"""What each process of tests/test_distributed.py does.

    WORLD_SIZE=4 python distributed_worker.py CHECK... FOLDER

or with torchrun. A check is a function of this module. Every process judges its results against a
run of its own, in one process on the whole batches, or against dense matrices in float64.
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
import ranks
from models.sync import BatchNorm
from optim import MFAC, DynamicInverseFisher, _Unread
from prun import MFACPruner, PagedInverseFisher

OPTIONS = {"lr": 0.05, "ngrads": 6, "damp": 1e-2}


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


def parallel(model, kind):
    if kind == "ddp":
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
        (torch.randn(16, 7, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(number)
    ]


def train(net, optimizer, data, shared=True):
    rank, size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
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


def assert_close(x, y, tolerance=1e-5):
    error = float((x - y).norm() / y.norm())
    assert error < tolerance, error


# --- the optimizer ------------------------------------------------------------------------------


def steps(folder):
    """Twenty steps are those of one process with three shards, for every way to train."""
    for kind in ("ddp", "fsdp"):
        for extra in ({}, {"sparse": True}, {"window_dtype": torch.bfloat16}):
            model, alone = network(), network()
            net = parallel(model, kind)
            options = {**OPTIONS, **extra}
            optimizer = MFAC(groups(model), **options)
            single = MFAC(groups(alone), process_group=False, gpus=["cpu"] * 3, **options)
            columns, all_columns = optimizer.fisher.shape[0], single.fisher.shape[0]
            assert columns <= all_columns / dist.get_world_size() + 40
            for data in (batches(12), batches(8, seed=2)):
                train(net, optimizer, data)
                train(alone, single, data, shared=False)
                optimizer.damp = single.damp = 2e-2
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
            train(alone, optimizers[1], [batch], shared=False)
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad.clone()
                    if hasattr(p, "placements"):
                        p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
            optimizers[0].step()

    def new():
        options = {"sparse": True, **OPTIONS}
        return MFAC(groups(model), **options), MFAC(groups(alone), process_group=False, **options)

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
    """A step sums up m + 1 float64 numbers and gathers d numbers where weights are replicated."""
    sent, all_reduce, all_gather = [], dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda x, **o: (sent.append((x.dtype, x.numel())), all_reduce(x, **o))
    dist.all_gather = lambda out, x, **o: (
        sent.append((x.dtype, x.numel())),
        all_gather(out, x, **o),
    )
    try:
        for kind in ("ddp", "fsdp"):
            model = network()
            net = parallel(model, kind)
            optimizer = MFAC(model.parameters(), **OPTIONS)
            train(net, optimizer, batches(7))
            sent.clear()
            optimizer.step()
            expected = [(torch.float64, 7)]
            if kind == "ddp":
                expected.append((torch.float32, optimizer.fisher.shape[0]))
            assert sent == expected, sent
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather


def skipped(folder):
    """NaN in what one process alone has skips the step in all of them, and nothing is changed."""
    for kind, extra in (("ddp", {}), ("fsdp", {}), ("fsdp", {"compress": 0.3})):
        model = network()
        net = parallel(model, kind)
        optimizer = MFAC(model.parameters(), momentum=0.5, **OPTIONS, **extra)
        train(net, optimizer, batches(4))
        before = copy.deepcopy((weights(model), optimizer.fisher.state_dict()))
        p = model[0].weight
        if kind == "ddp" or dist.get_rank() == 1:
            local = p.grad.to_local() if kind == "fsdp" else p.grad
            local.view(-1)[-1] = float("nan")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert optimizer.skipped_steps == 1 and "NaN or Inf" in str(caught[0].message)
        after = weights(model), optimizer.fisher.state_dict()
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def alone(folder):
    """What one process asks for alone exchanges nothing; what it saved alone is refused."""
    model = nn.Linear(8, 4, bias=False)
    optimizer = MFAC(model.parameters(), **OPTIONS)
    optimizer.fisher.lazy = True
    torch.manual_seed(0)
    for _ in range(3):
        model.weight.grad = torch.randn(4, 8)
        optimizer.step()
    checks = [torch.tensor(x) for x in (0.0, torch.inf, 0.0, 1.0)]  # refused; K is to be renewed
    optimizer.fisher._unread = _Unread(checks)
    if dist.get_rank() == 0:
        assert optimizer.skipped_steps == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = optimizer.state_dict()
    assert optimizer.skipped_steps == 1
    if dist.get_rank() == 0:
        torch.save(state, folder / "first.pt")
    dist.barrier()
    state = torch.load(folder / "first.pt", weights_only=False)
    try:
        MFAC(model.parameters(), **OPTIONS).load_state_dict(state)
    except ValueError as error:
        assert "must load what it saved itself" in str(error)
    else:
        raise AssertionError("loaded")


def checkpoints(folder):
    """Saved and loaded by torch.distributed.checkpoint, in each of its forms; bit for bit."""
    for kind, extra in (("ddp", {}), ("fsdp", {"sparse": True}), ("ddp", {"compress": 0.3})):
        model = network()
        net = parallel(model, kind)
        optimizer = MFAC(groups(model), **OPTIONS, **extra)
        train(net, optimizer, batches(9))
        x = torch.randn(optimizer.fisher.shape[0])
        expected = optimizer.fisher.matvec(x)
        forms = [None, StateDictOptions(flatten_optimizer_state_dict=True)]
        if torch.__version__ < "2.10":  # which flattens no nested entries
            forms.pop()
        for options in forms:
            path = folder / f"{kind}-{len(extra)}-{options is None}-{dist.get_world_size()}"
            state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
            dcp.save(state, checkpoint_id=path)
            other = MFAC(groups(model), **OPTIONS, **extra)
            state = {"optimizer": get_optimizer_state_dict(model, other, options=options)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(model, other, state["optimizer"], options=options)
            assert other.fisher.count == 9 and torch.equal(other.fisher.matvec(x), expected)
        if "compress" not in extra:
            options = StateDictOptions(full_state_dict=True)
            state = get_optimizer_state_dict(model, optimizer, options=options)
            other = MFAC(groups(model), **OPTIONS, **extra)
            set_optimizer_state_dict(model, other, copy.deepcopy(state), options=options)
            assert other.fisher.count == 9 and torch.equal(other.fisher.matvec(x), expected)
        if kind == "ddp":  # torch does not copy the gradients of FSDP2
            assert torch.equal(copy.deepcopy(optimizer).fisher.matvec(x), expected)


def save(folder):
    """Half of a run, to go on in another number of processes."""
    for kind in ("ddp", "fsdp"):
        model = network()
        net = parallel(model, kind)
        optimizer = MFAC(groups(model), **OPTIONS)
        train(net, optimizer, batches(10))
        parts = get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder / kind)


def go_on(folder):
    """The other half, against an uninterrupted run in one process."""
    for kind in ("ddp", "fsdp"):
        model = network(seed=5)
        net = parallel(model, kind)
        optimizer = MFAC(groups(model), **OPTIONS)
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
        train(alone, MFAC(groups(alone), process_group=False, **OPTIONS), data, shared=False)
        assert_close(weights(model), weights(alone))
        assert_same_everywhere(weights(model))


def refused(folder):
    """What can't be shared, in one sentence."""
    model = network()
    cases = [
        (lambda: MFAC(network().parameters(), process_group="all"), "Invalid process_group: 'all'"),
        (lambda: MFAC(parallel(model, "fsdp").parameters(), process_group=False), "sharded over"),
    ]
    optimizer = MFAC(network().parameters(), ngrads=2, compress=0.3)
    state = optimizer.state_dict()
    state["state"][0]["fisher"]["ranks"] = 17
    cases.append((lambda: optimizer.load_state_dict(state), "compressed window of 17 processes"))
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
        try:
            call()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


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
            for model, group in zip(models, (None, False), strict=True)
        ]
        for pruner in pruners:
            pruner.prune(0.6)
            pruner.recompute()
            pruner.prune(0.8)
        together, alone = (weights(model) for model in models)
        assert torch.equal(together == 0, alone == 0)
        assert_close(together, alone)
        assert_same_everywhere(together)


def disagreement(folder):
    """What one process alone cannot do is an error in all of them."""
    model = nn.Linear(8, 4, bias=False)
    data = [(torch.randn(4, 8), torch.randint(4, (4,))) for _ in range(6)]

    def loss(model, batch):
        scale = 1e20 if dist.get_rank() == 1 else 1  # squares beyond float32, and λ beside them
        return cross_entropy(model(batch[0]), batch[1]) * scale

    pruner = MFACPruner(model, data, loss=loss, ngrads=6, blocksize=4, damp=1e-10)
    try:
        pruner.prune(0.5)
    except ValueError as error:
        assert "damp" in str(error), error
    else:
        raise AssertionError("pruned")


def forked(processes, folder):
    """Goes on in so many processes, which need not import torch again; returns how they meet."""
    how = {"world_size": processes, "init_method": f"file://{folder}/meeting-of-{os.getpid()}"}
    children = set()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            return {**how, "rank": rank}
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    *checks, folder = sys.argv[1:]
    by_torchrun = "RANK" in os.environ
    how = {} if by_torchrun else forked(int(os.environ["WORLD_SIZE"]), folder)
    dist.init_process_group("gloo", **how)
    for check in checks:
        globals()[check](Path(folder))
    dist.barrier()
    os._exit(0)  # threads of torch's functional collectives can abort a process at its end
