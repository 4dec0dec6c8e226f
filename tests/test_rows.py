"""Pruning by one inverse for all rows of a weight, as by the dense matrix that stands for."""

import re

import pytest
import torch
from reference import joint_removal
from test_samples import Tied
from torch import nn
from transformers.pytorch_utils import Conv1D

from mfac import MFACRowPruner
from rows import COLUMNS

M = 24


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def make(conv1d=False, q=72):
    """A model on sequences in float64, and batches of 4 samples."""
    layers = (Conv1D(12, q), Conv1D(q, 12)) if conv1d else (nn.Linear(q, 12), nn.Linear(12, q))
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()
    batches = [(torch.randn(4, 3, q).double(), torch.randn(4, 3, q).double()) for _ in range(6)]
    return model, batches


def rows_of(model, name, batches):
    """W (p, q), S (q, q) and r (p,) from a backward pass for each sample."""
    W = model.get_parameter(name)
    S, r = 0, 0
    for x, y in batches:
        for i in range(len(x)):
            error = squared_error(model, (x[i : i + 1], y[i : i + 1]))
            (g,) = torch.autograd.grad(error, W)
            g = g.T if isinstance(model[0], Conv1D) else g
            S, r = S + g.T @ g, r + g.square().sum(1)
    return (W.detach().T if isinstance(model[0], Conv1D) else W.detach()).clone(), S, r


def chosen(scores, alive, count, pattern):
    """Which `count` of the weights alive go: the lowest, of 2:4 until each four have two zeros."""
    gone = ~alive
    if pattern == "4x1":
        order = scores.unflatten(1, (-1, 4)).sum(2).flatten().argsort()[: count // 4]
        gone.view(-1, 4)[order] = True
    elif pattern == "2:4":
        four = scores.masked_fill(~alive, -1).view(-1, 4)
        gone.view(-1, 4).scatter_(1, four.argsort(dim=1)[:, :2], True)
    else:
        gone.view(-1)[scores.masked_fill(~alive, torch.inf).flatten().argsort()[:count]] = True
    return gone


def dense_sweep(layers, masks, sparsity, pattern, fraction):
    """Weights after pruning [(W, S, r)] by matrices F of whole rows."""
    matrices = []
    for _, S, r in layers:
        damped = S + fraction * S.diagonal().mean() * torch.eye(len(S)).double()
        matrices.append(damped * (r / S.trace())[:, None, None])  # (p, q, q)

    def scores(W, F, start, stop):
        """In columns from start to stop, with those after them there to make up for it."""
        inverse = torch.linalg.inv(F[:, start:, start:]).diagonal(dim1=1, dim2=2)
        return (W[:, start:stop].square() / 2 / inverse[:, : stop - start]).clone()

    first = [
        torch.cat(
            [scores(W, F, j, min(j + COLUMNS, len(S))) for j in range(0, len(S), COLUMNS)], dim=1
        )
        for (W, S, _), F in zip(layers, matrices, strict=True)
    ]
    sizes = [s.numel() for s in first]
    zeros = round(sparsity * sum(sizes)) - sum(int((~mask).sum()) for mask in masks)
    flat = (torch.cat([x.reshape(-1, 4) for x in parts]) for parts in (first, masks))
    gone = chosen(*flat, zeros, pattern).flatten().split(sizes)
    found = []
    for (W, S, _), F, mask, then in zip(layers, matrices, masks, gone, strict=True):
        W = W.clone()
        for start in range(0, len(S), COLUMNS):
            columns = slice(start, min(start + COLUMNS, len(S)))
            count = int((then.view_as(mask) & mask)[:, columns].sum())
            these = scores(W, F, start, columns.stop), mask[:, columns].contiguous()
            drop = chosen(*these, count, pattern)
            for i in range(len(W)):
                index = drop[i].nonzero()[:, 0]
                W[i, start:] += joint_removal(F[i, start:, start:], index, W[i, start:])
            W[:, columns][drop] = 0
        found.append(W)
    return found


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_pruning_is_that_of_the_dense_matrix(pattern, conv1d):
    model, batches = make(conv1d)
    names = ["0.weight", "2.weight"]
    layers = [rows_of(model, name, batches) for name in names]
    masks = [torch.ones_like(W, dtype=torch.bool) for W, *_ in layers]
    if pattern != "4x1":  # some are gone already
        masks = [mask & (torch.rand(mask.shape) < 0.9) for mask in masks]
    if pattern == "2:4":  # but not three of four
        masks = [mask | (torch.arange(mask.shape[1]) % 4 < 2) for mask in masks]
    for (W, *_), mask in zip(layers, masks, strict=True):
        W *= mask
    for name, (W, *_) in zip(names, layers, strict=True):
        model.get_parameter(name).data.copy_(W.T if conv1d else W)
    layers = [rows_of(model, name, batches) for name in names]
    expected = dense_sweep(layers, masks, 0.5, pattern, 0.05)
    given = {n: m.T if conv1d else m for n, m in zip(names, masks, strict=True)}
    options = {"loss": squared_error, "ngrads": M, "damp": "relative:0.05", "pattern": pattern}
    pruner = MFACRowPruner(model, batches, masks=given, **options)
    found = pruner.prune(0.5)
    assert pruner.sparsity == 0.5
    for name, W in zip(names, expected, strict=True):
        weight = model.get_parameter(name).detach()
        assert torch.equal(found[name], weight != 0)
        torch.testing.assert_close(weight.T if conv1d else weight, W, rtol=1e-8, atol=1e-10)


def test_levels_go_on_from_the_same_gradients_until_weights_change():
    model, batches = make()
    pruner = MFACRowPruner(model, batches, loss=squared_error, ngrads=M)
    first = {name: mask.clone() for name, mask in pruner.prune(0.3).items()}
    second = pruner.prune(0.6)
    assert pruner.recomputations == 1 and abs(pruner.sparsity - 0.6) < 1e-3
    assert not any((second[name] & ~first[name]).any() for name in first)
    state = pruner.state_dict()
    resumed = MFACRowPruner(model, batches, loss=squared_error, ngrads=M)
    resumed.load_state_dict(state)
    weights = [p.detach().clone() for p in model.parameters()]
    pruner.prune(0.8)
    expected = [p.detach().clone() for p in model.parameters()]
    for p, weight in zip(model.parameters(), weights, strict=True):
        p.data.copy_(weight)
    resumed.prune(0.8)
    for p, weight in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), weight)
    model[0].weight.data += 0.1 * pruner.masks["0.weight"]
    pruner.prune(0.9)
    assert pruner.recomputations == 2


def test_portions_are_pruned_one_after_the_other():
    model, batches = make()
    other, _ = make()
    other.load_state_dict(model.state_dict())
    options = {"loss": squared_error, "ngrads": M}
    MFACRowPruner(model, batches, portions=2, **options).prune(0.5)
    for name in ("0.weight", "2.weight"):
        MFACRowPruner(other, batches, [name], **options).prune(0.5)
    for p, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, expected)


def test_it_is_ahead_of_magnitude_and_of_pruning_without_an_update():
    q = 40
    model, _ = make(q=q)
    mixed = torch.randn(q, q).double() * torch.logspace(0, -2, q).double()
    inputs = torch.randn(16, 8, 3, q).double() @ mixed
    with torch.no_grad():
        batches = [(x, model(x) + torch.randn_like(x)) for x in inputs]
        outputs = model(inputs)
    pruner = MFACRowPruner(model, batches, loss=squared_error, ngrads=128, portions=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = pruner.prune(0.6)
    errors = []
    for change in (dict(model.named_parameters()), {n: before[n] * masks[n] for n in masks}):
        found = torch.func.functional_call(model, before | change, (inputs,))
        errors.append(float((found.detach() - outputs).square().mean()))
    assert errors[0] < 0.7 * errors[1]


REFUSED = {
    "convolution": (nn.Conv1d(3, 4, 1), {}, "Not the weights of linear layers: weight; leave"),
    "absolute": (nn.Linear(4, 4), {"damp": 1e-3}, "Invalid damp: 0.001; it must be relative"),
    "tied": (Tied(), {}, "their weights are used by others, too; use MFACPruner"),
    "no gradients": (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        {},
        "The gradients of 0.weight, 2.weight are zero; leave them out with ignore",
    ),
    "too little damping": (
        nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)),
        {"damp": "relative:1e-30"},
        "damp = 'relative:1e-30' is too small for 8 gradients",
    ),
    "too few": (nn.Linear(4, 4), {"ngrads": 9}, "Wanted 9 gradients, but the loader has fewer"),
    "groups": (nn.Linear(6, 4), {"pattern": "2:4"}, "There are no weights to prune"),
    "blocks": (nn.Linear(4, 4), {"blocksize": 2}, "blocksize is for MFACPruner only: leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_so_in_a_sentence_and_leaves_the_model(case):
    model, options, message = REFUSED[case]
    if case == "no gradients":
        model[0].bias.data.fill_(-1000.0)
    before = [p.detach().clone() for p in model.parameters()]
    batches = [(torch.randn(4, 3, 4), torch.randn(4, 3, 4)) for _ in range(2)]
    with pytest.raises(ValueError, match=re.escape(message)):
        MFACRowPruner(model, batches, loss=squared_error, **{"ngrads": 8} | options).prune(0.5)
    for p, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, expected)


def test_columns_go_in_multiples_of_groups():
    model, batches = make(q=78)
    pruner = MFACRowPruner(
        model, batches, ["0.weight"], loss=squared_error, ngrads=M, pattern="1:6"
    )
    pruner.prune(5 / 6)
    assert COLUMNS % 6 and (pruner.masks["0.weight"].view(-1, 6).sum(1) == 1).all()


def test_memory_is_not_that_of_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    pruner = MFACRowPruner(model, [(torch.randn(8, 4), torch.randint(2, (8,)))], ngrads=8)
    with pytest.raises(ValueError, match="bytes a pair of inputs"):
        pruner.memory_plan()
