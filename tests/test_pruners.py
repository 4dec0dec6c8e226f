"""The pruners, against counts, orders and updates worked out from the definitions."""

import copy
import doctest
import io
import itertools
import re
import time
import weakref
from inspect import signature

import numpy as np
import pytest
import torch
from reference import dense_fisher, independent_removal, joint_removal
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import levels
import masks
from main_prun import COMMON, MFAC_PRUNER
from optim import MFAC, DynamicInverseFisher
from prun import (
    BlockedInverseFisher,
    MagnitudePruner,
    MFACPruner,
    PagedInverseFisher,
    cross_entropy,
    inverse_bytes,
)


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def network():
    """Convolutions and a linear layer, 8·4·9 + 4·8·9 + 5·64 = 896 prunable weights."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def samples(n=200):
    return TensorDataset(torch.randn(n, 4, 4, 4), torch.randint(5, (n,)))


def loader(n=200, batch_size=4):
    return DataLoader(samples(n), batch_size=batch_size, shuffle=True)


def mfac(model, data=None, **options):
    options = {"ngrads": 20, "damp": 1e-3, **options}
    return MFACPruner(model, loader() if data is None else data, **options)


PRUNERS = {
    "magnitude": lambda model, **options: MagnitudePruner(model, **options),
    "mfac": mfac,
    "mfac, blocked": lambda model, **options: mfac(model, blocksize=16, **options),
}


MFAC_PRUNERS = [make for name, make in PRUNERS.items() if name != "magnitude"]


@pytest.fixture(params=PRUNERS)
def make(request):
    return PRUNERS[request.param]


def zeros(pruner):
    return sum(int((p == 0).sum()) for p in pruner.params.values())


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("module", [levels, masks], ids=["levels", "masks"])
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0 and failed == 0


# --- counts and order -----------------------------------------------------------------------------


def defaults(make):
    return {name: parameter.default for name, parameter in signature(make).parameters.items()}


def test_defaults_are_those_of_the_command_line_and_of_all_other_inverses():
    pruner, flags = defaults(MFACPruner), {**COMMON, **MFAC_PRUNER, "blocksize": None}
    same = ("scope", "pattern", "ngrads", "damp", "update", "blocksize", "seed")
    assert [pruner[name] for name in same] == [flags[name] for name in same]
    for make in (MFAC, DynamicInverseFisher, PagedInverseFisher, BlockedInverseFisher):
        assert defaults(make)["damp"] == pruner["damp"]


def test_exactly_the_rounded_number_of_weights_is_zero(make):
    pruner = make(network())
    assert list(pruner.params) == ["0.weight", "4.weight", "6.weight"]
    for target in (0.0, 0.07, 0.29, 0.333, 0.5, 0.501, 0.9, 0.999, 1.0):
        masks = pruner.prune(target)
        assert zeros(pruner) == round(target * 896)
        assert pruner.sparsity == round(target * 896) / 896
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            assert torch.equal(mask, pruner.params[name] != 0)


@pytest.mark.parametrize(("n", "target"), [(100, 0.29), (100, 0.57), (50, 0.58), (7, 0.5)])
def test_products_just_below_an_integer_are_rounded(n, target):
    model = nn.Linear(n, 1)
    pruner = MagnitudePruner(model)
    pruner.prune(target)
    assert zeros(pruner) == round(target * n)


def test_counts_stay_exact_beyond_the_integers_of_float32():
    pruner = MagnitudePruner(nn.Linear(4200, 4200, bias=False))
    mask = torch.ones(4200, 4200, dtype=torch.bool)
    mask.view(-1)[: 2**24 + 1] = False
    pruner.load_state_dict({"masks": {"weight": mask}})
    assert pruner.sparsity == (2**24 + 1) / 4200**2
    with pytest.raises(ValueError, match=rf"\({2**24 + 1}\)"):
        pruner.prune(2**24 / 4200**2)


def test_a_target_below_the_present_sparsity_is_refused_with_both_figures(make):
    pruner = make(network())
    pruner.prune(0.5)
    before = flat(pruner.params.values())
    with pytest.raises(ValueError, match=r"0\.4 \(358 of 896 weights\) is below .* 0\.5 \(448\)"):
        pruner.prune(0.4)
    assert torch.equal(flat(pruner.params.values()), before)
    pruner.prune(0.5)
    assert torch.equal(flat(pruner.params.values()), before)


@pytest.mark.parametrize("target", [-0.1, 1.1, float("nan"), [0.5], [0.1, 0.2, 0.3]])
def test_targets_out_of_range_are_refused(make, target):
    pruner = make(network())
    if target == [0.5]:
        pruner.prune(target)  # one target for the one scope there is
    else:
        with pytest.raises(ValueError, match="sparsit"):
            pruner.prune(target)
        assert zeros(pruner) == 0


def test_the_smallest_weights_of_all_layers_go_first():
    model = network()
    pruner = MagnitudePruner(model)
    threshold = flat(pruner.params.values()).abs().sort()[0][300]
    before = copy.deepcopy(model)
    pruner.prune(300 / 896)
    for name, p in before.named_parameters():
        kept = model.get_parameter(name)
        assert torch.equal(kept, p * (p.abs() >= threshold) if name in pruner.masks else p)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_ties_go_by_position(pattern):
    def pruned():
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 2))
        for p in model.parameters():
            nn.init.constant_(p, 0.5)
        pruner = MagnitudePruner(model, pattern=pattern)
        pruner.prune(0.25, partial=True)
        return flat(pruner.params.values())

    gone = (pruned() == 0).nonzero()[:, 0]
    expected = {"2:4": torch.arange(32)[torch.arange(32) % 4 < 2]}.get(pattern, torch.arange(16))
    assert torch.equal(gone, expected)
    assert torch.equal(pruned(), pruned())


def test_scope_layer_gives_each_layer_its_own_sparsity(make):
    pruner = make(network(), scope="layer")
    pruner.prune(0.35)
    counts = [int((p == 0).sum()) for p in pruner.params.values()]
    assert counts == [round(0.35 * 288), round(0.35 * 288), round(0.35 * 320)]
    pruner.prune([0.35, 0.5, 0.9])
    counts = [int((p == 0).sum()) for p in pruner.params.values()]
    assert counts == [round(0.35 * 288), 144, 288]
    with pytest.raises(ValueError, match=r"0\.8 \(256 of 320 weights\) is below .* 0\.9 \(288\)"):
        pruner.prune([0.4, 0.5, 0.8])
    with pytest.raises(ValueError, match="Expected 3 target sparsities, got 2"):
        pruner.prune([0.9, 0.9])


# --- patterns -------------------------------------------------------------------------------------


def lowest_by_numpy(values, count):
    """Which of these are zero once the `count` smallest of all are gone."""
    order = np.argsort(np.concatenate([v.ravel() for v in values]), kind="stable")
    gone = np.zeros(len(order), bool)
    gone[order[:count]] = True
    return np.split(gone, np.cumsum([v.size for v in values])[:-1])


LEVELS = {  # keys, and the layers that compete for each, by scope
    "globs": ({"[04].*": 0.3, "6.weight": 0.7}, [[0, 1], [2]]),
    "compiled": ({re.compile(r"[46]\.weight"): 0.4}, [[1, 2]]),
    "uncompiled": ({r"\d+\.weight": 0.25}, [[0, 1, 2]]),
}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("keys", LEVELS)
def test_levels_by_layer(keys, scope):
    pruner = MagnitudePruner(network(), scope=scope)
    sizes = [np.abs(p.detach().numpy()) for p in pruner.params.values()]
    target, groups = LEVELS[keys]
    expected = [np.zeros(size.size, bool) for size in sizes]
    for level, group in zip(target.values(), groups, strict=True):
        for part in [group] if scope == "global" else [[i] for i in group]:
            count = round(level * sum(sizes[i].size for i in part))
            gone = lowest_by_numpy([sizes[i] for i in part], count)
            for i, those in zip(part, gone, strict=True):
                expected[i] = those
    masks = pruner.prune(target).values()
    for mask, zeros in zip(masks, expected, strict=True):
        assert np.array_equal(~mask.numpy().ravel(), zeros)


@pytest.mark.parametrize("rounds", [1, 3])
def test_layers_without_a_level_stay_as_they_are(rounds):
    """Also where a later level starts from the same inverse, in which their weights are alive."""
    pruner = mfac(network(), rounds=rounds)
    pruner.prune({"0.weight": 0.5})
    assert [int((p == 0).sum()) for p in pruner.params.values()] == [144, 0, 0]
    pruner.prune({"4.*": 0.25})
    assert [int((p == 0).sum()) for p in pruner.params.values()] == [144, 72, 0]
    assert pruner.recomputations == 1


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("targets", [[{"0.weight": 0.8, "4.*": 0.1}, 0.75], [0.4, 0.5], [0.3, 0.3]])
def test_what_is_pruned_stays_so(targets, rounds):
    """Although levels start from the same inverse, also with layers that compete otherwise, with
    rounds, and after a change of damp, which changes the order of saliencies."""
    pruner = mfac(network(), rounds=rounds)
    for level, target in enumerate(targets):
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        masks = pruner.prune(target)
        assert not any(bool((mask & ~before[name]).any()) for name, mask in masks.items())
        pruner.damp = 10.0 ** -(3 + 2 * level)
    assert pruner.recomputations == 1


def test_a_level_may_be_a_number_of_torch():
    pruner = MagnitudePruner(network())
    pruner.prune(torch.tensor(0.5))
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"fc": 0.5}, "The model has no parameter 'fc'; .* sparsity"),
        ({"1.weight": 0.5}, "The model has no parameter '1.weight'; it has .*'0.weight'"),
        ({re.compile("x"): 0.5}, "The model has no parameter 'x'"),
        ({"0.*": 0.5, "*.weight": 0.6}, r"both '0\.\*' and '\*\.weight' match 0.weight"),
        ({"0.*": 1.5}, "Invalid sparsity: 1.5"),
        ({3: 0.5}, "no parameter 3"),
        ({"0.*": True}, "Invalid sparsity: {'0.*': True}; it must be"),
    ],
)
def test_levels_for_no_layer_or_twice_for_one_are_refused(target, message):
    pruner = MagnitudePruner(network())
    with pytest.raises(ValueError, match=message):
        pruner.prune(target)
    assert zeros(pruner) == 0


def along_input(weight):
    """(out, in, ...) with every four neighbours along the input in a row."""
    return weight.movedim(1, -1).reshape(-1, 4)


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7])
def test_two_of_four_is_exact_at_every_level(make, target):
    """On the way there, and beyond: more zeros satisfy it as well."""
    pruner = make(network(), pattern="2:4")
    pruner.prune(0.05, partial=True)
    pruner.prune(target, partial=target < 0.5)
    assert zeros(pruner) == round(target * 896)
    for p in pruner.params.values():
        per_group = (along_input(p) == 0).sum(1)
        assert (per_group <= 2).all() if target <= 0.5 else (per_group >= 2).all()
        assert target != 0.5 or (per_group == 2).all()


def test_sparsity_that_does_not_make_the_pattern_is_refused(make):
    pruner = make(network(), pattern="2:4")
    with pytest.raises(ValueError, match=r"Invalid sparsity: 0.25; .* from 0\.5 to 1, as fewer"):
        pruner.prune(0.25)
    assert zeros(pruner) == 0
    thirds = MagnitudePruner(nn.Linear(6, 4), pattern="1:3")
    thirds.prune(2 / 3)  # just below 1 − 1/3 in float64
    assert thirds.sparsity == 16 / 24


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_zeros_that_are_there_satisfy_the_pattern(make, keep_zeros):
    """A dead filter, and groups with three zeros."""
    model = network()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[6].weight[:, :3] = 0
    pruner = make(model, pattern="2:4", keep_zeros=keep_zeros)
    pruner.prune(0.5)
    for p in pruner.params.values():
        assert ((along_input(p) == 0).sum(1) >= 2).all()
    # Masked zeros beyond two of a group come on top: 2 of 9 groups, and 1 of 5 groups.
    assert zeros(pruner) >= 448
    assert pruner.sparsity == (0.5 + (2 * 9 + 5) / 896 if keep_zeros else 0.5)


def test_of_every_group_the_smallest_go():
    model = nn.Conv2d(8, 3, 2)
    before = along_input(model.weight).detach().abs()
    MagnitudePruner(model, pattern="1:4").prune(0.75)
    largest = before == before.max(1, keepdim=True)[0]
    assert torch.equal(along_input(model.weight) != 0, largest)


def test_blocks_of_four_go_or_stay_together(make):
    pruner = make(network(), pattern="4x1")
    for target in (0.1, 0.501, 0.9):
        pruner.prune(target)
        assert zeros(pruner) == round(target * 896) // 4 * 4
        for p in pruner.params.values():
            per_block = (along_input(p) == 0).sum(1)
            assert ((per_block == 0) | (per_block == 4)).all()


def test_the_block_with_the_lowest_sum_goes_first():
    model = nn.Linear(8, 5)
    lowest = along_input(model.weight).detach().square().sum(1).argsort()[:3]
    MagnitudePruner(model, pattern="4x1").prune(12 / 40)
    gone = (along_input(model.weight) == 0).all(1).nonzero()[:, 0]
    assert set(gone.tolist()) == set(lowest.tolist())


def test_a_block_that_has_zeros_already_counts_by_what_is_left_of_it():
    model = nn.Linear(16, 5)
    with torch.no_grad():
        model.weight *= torch.rand(5, 16) > 0.3
    expected = along_input(model.weight).detach().clone()
    MagnitudePruner(model, pattern="4x1", keep_zeros=True).prune(0.6)
    for block in expected[expected.square().sum(1).argsort()].unbind():
        if int((expected == 0).sum()) + int((block != 0).sum()) > 48:
            break
        expected[(expected == block).all(1)] = 0
    assert torch.equal(along_input(model.weight), expected)


def test_layers_that_the_pattern_does_not_divide_are_left_out_or_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(12, 2))
    assert list(MagnitudePruner(model, pattern="2:4").params) == ["2.weight"]
    assert len(MagnitudePruner(model).params) == 3
    for name in ("0.weight", "0.bias"):
        with pytest.raises(ValueError, match=rf"do not divide the input of {name}"):
            MagnitudePruner(model, [name], pattern="2:4")
    with pytest.raises(ValueError, match=r"no layer's input is divisible by 4, choose another pat"):
        MagnitudePruner(nn.Linear(3, 3), pattern="2:4")


@pytest.mark.parametrize("pattern", ["2:2", "0:4", "4:2", "1x1", "0x1", "2-4", "x1", "1x4", ""])
def test_patterns_that_are_none_are_refused(pattern):
    with pytest.raises(ValueError, match="Invalid pattern"):
        MagnitudePruner(network(), pattern=pattern)


# --- the second-order step ------------------------------------------------------------------------


def recording(batches):
    """A loss that remembers which batches it saw."""

    def loss(net, batch):
        batches.append(batch)
        return cross_entropy(net, batch)

    return loss


def gradients_by_backward(model, names, batches):
    """One row a batch, each from a backward pass of its own in eval mode."""
    model = copy.deepcopy(model).eval()
    rows = []
    for batch in batches:
        model.zero_grad()
        cross_entropy(model, batch).backward()
        rows.append(flat(model.get_parameter(name).grad for name in names))
    return torch.stack(rows)


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
@pytest.mark.parametrize("blocksize", [None, 16, 100])
@pytest.mark.parametrize("presparse", [False, True])
def test_saliency_and_update_are_those_of_the_dense_fisher(update, blocksize, presparse):
    model, batches, damp = network(), [], 1e-3
    if presparse:
        MagnitudePruner(model).prune(0.4)
    before = copy.deepcopy(model)
    options = {"update": update, "blocksize": blocksize, "damp": damp, "keep_zeros": presparse}
    pruner = mfac(model, loss=recording(batches), **options)
    names = list(pruner.params)
    w = flat(before.get_parameter(name) for name in names).double()
    alive = (w != 0).nonzero()[:, 0]
    pruner.prune(0.6)

    assert len(batches) == 20
    G = gradients_by_backward(before, names, batches)[:, alive]
    F = dense_fisher(G, damp)
    if blocksize is not None:
        block = torch.arange(len(alive)) // blocksize
        F = F * (block[:, None] == block)
    saliency = w[alive].square() / (2 * torch.linalg.inv(F).diagonal())
    count = round(0.6 * 896) - (896 - len(alive))
    drop = saliency.argsort()[:count]
    removal = {"joint": joint_removal, "independent": independent_removal}.get(update)
    expected = w.clone()
    expected[alive] += removal(F, drop, w[alive]) if removal else 0
    expected[alive[drop]] = 0
    result = flat(pruner.params.values()).double()
    assert torch.equal(result == 0, expected == 0)
    assert (result - expected).norm() < 1e-5 * expected.norm()
    for name, p in before.named_parameters():
        assert name in names or torch.equal(p, model.get_parameter(name))


def test_gradients_of_blocks_may_be_of_any_number():
    """They are added up 128 at a time, and then what is left."""
    model, batches = nn.Linear(6, 3), []
    before, w = copy.deepcopy(model), model.weight.detach().flatten().double()
    data = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(150)]
    mfac(model, data, ngrads=150, blocksize=9, loss=recording(batches)).prune(0.5)
    F = dense_fisher(gradients_by_backward(before, ["weight"], batches), 1e-3)
    block = torch.arange(18) // 9
    F = F * (block[:, None] == block)
    drop = (w.square() / torch.linalg.inv(F).diagonal()).argsort()[:9]
    expected = (w + joint_removal(F, drop, w)).index_fill_(0, drop, 0)
    assert (flat([model.weight]) - expected).norm() < 1e-5 * expected.norm()


def test_only_weights_alive_cost_anything():
    model = network()
    MagnitudePruner(model).prune(0.9)
    pruner = mfac(model, ngrads=8, keep_zeros=True)
    pruner.prune(0.95)
    assert pruner._inverse.shape == (90, 90)
    assert pruner._inverse.G.shape == (8, 90)


def test_levels_start_from_the_last_recomputation():
    model = network()
    once, stepwise, anew = (copy.deepcopy(model) for _ in range(3))
    data = loader()
    mfac(once, data).prune(0.7)
    pruner = mfac(stepwise, data)
    for target in (0.2, 0.5, 0.7):
        pruner.prune(target)
    assert pruner.recomputations == 1
    assert torch.equal(flat(once.parameters()), flat(stepwise.parameters()))

    pruner = mfac(anew, data)
    for target in (0.2, 0.5, 0.7):
        pruner.recompute()
        pruner.prune(target)
    assert pruner.recomputations == 3
    assert not torch.equal(flat(once.parameters()), flat(anew.parameters()))


def in_portions_by_hand(model, data, portions, target, **options):
    """A pruner for each portion, one after the other; which masks they leave."""
    masks = {}
    for names in portions:
        masks |= mfac(model, data, params=names, **options).prune(target)
    return masks


@pytest.mark.parametrize("options", [{}, {"blocksize": 16, "rounds": 2}, {"scope": "layer"}])
@pytest.mark.parametrize(
    ("portions", "names"),
    [
        (["0.weight", ["4.*", re.compile("6.*")]], [["0.weight"], ["4.weight", "6.weight"]]),
        (["6.*", "4.weight", "0.*"], [["6.weight"], ["4.weight"], ["0.weight"]]),
        (2, [["0.weight", "4.weight"], ["6.weight"]]),  # 576 and 320 weights
    ],
)
def test_portions_are_pruners_one_after_the_other(portions, names, options):
    model, batches = network(), [batch for batch in loader()]
    by_hand = copy.deepcopy(model)
    expected = in_portions_by_hand(by_hand, batches, names, 0.6, **options)
    pruner = mfac(model, batches, portions=portions, **options)
    masks = pruner.prune(0.6)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert torch.equal(flat(model.parameters()), flat(by_hand.parameters()))
    assert pruner.recomputations == 1
    pruner.prune(0.8)  # from the level before, with other samples
    for name, p in pruner.params.items():
        assert torch.equal(pruner.masks[name], p != 0) and not (p != 0)[~expected[name]].any()
    assert pruner.recomputations == 2


def test_portions_of_magnitude():
    pruner = MagnitudePruner(network(), portions=["[06].*", "4.*"])
    sizes = {name: np.abs(p.detach().numpy()) for name, p in pruner.params.items()}
    expected = lowest_by_numpy([sizes["0.weight"], sizes["6.weight"]], 304)
    expected.insert(1, *lowest_by_numpy([sizes["4.weight"]], 144))
    for mask, gone in zip(pruner.prune(0.5).values(), expected, strict=True):
        assert np.array_equal(~mask.numpy().ravel(), gone)


def test_portions_hold_one_inverse_at_a_time(monkeypatch):
    pruner, inverses, seen = mfac(network(), portions=3), [], []
    invert = MFACPruner._invert

    def inverting(self, start, *args):
        alive = sum(inverse() is not None for inverse in inverses)
        seen.append((sum(weight.numel() for weight in start.values()), alive))
        invert(self, start, *args)
        inverses.append(weakref.ref(self._inverse))

    monkeypatch.setattr(MFACPruner, "_invert", inverting)
    pruner.prune(0.5)
    assert seen == [(288, 0), (288, 0), (320, 0)]
    with pytest.raises(ValueError, match=r"portions every level .* leave recompute"):
        pruner.recompute()


@pytest.mark.parametrize("registered", [False, True])
def test_a_portion_that_fails_leaves_the_level_before(registered, monkeypatch):
    model = network()
    pruner = mfac(model, portions=["4.*", "[06].*"])
    pruner.prune(0.3)
    before, masks = copy.deepcopy(model.state_dict()), dict(pruner.masks)
    if registered:
        pruner.register()
    update, calls = PagedInverseFisher.joint_update, []

    def failing(self, *args):
        calls.append(self.shape)
        if len(calls) == 2:
            raise ValueError("too little damping")
        return update(self, *args)

    monkeypatch.setattr(PagedInverseFisher, "joint_update", failing)
    with pytest.raises(ValueError, match="too little damping"):
        pruner.prune(0.5)
    pruner.remove()
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in masks.items())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    monkeypatch.undo()
    pruner.prune(0.5)
    assert zeros(pruner) == 144 + 304


def test_resumed_portions_are_the_uninterrupted_ones():
    model, data = network(), [batch for batch in loader()]
    pruner = mfac(model, data, portions=2)
    pruner.prune(0.3)
    resumed = copy.deepcopy(model)
    state = through_a_file(pruner.state_dict())
    pruner.prune(0.6)
    again = mfac(resumed, data, portions=2)
    again.load_state_dict(state)
    again.prune(0.6)
    assert torch.equal(flat(model.parameters()), flat(resumed.parameters()))


def test_a_level_that_fails_leaves_the_one_before(monkeypatch):
    pruner = mfac(network())
    pruner.prune(0.3)
    before = flat(pruner.params.values())

    def fails(*_):
        raise ValueError("damp is too small")

    monkeypatch.setattr(pruner._inverse, "joint_update", fails)
    with pytest.raises(ValueError, match="too small"):
        pruner.prune(0.6)
    assert torch.equal(flat(pruner.params.values()), before)
    assert pruner.sparsity == round(0.3 * 896) / 896


def test_weights_that_were_trained_in_between_are_not_thrown_away():
    model = network()
    pruner = mfac(model)
    pruner.prune(0.3)
    with torch.no_grad():
        for p in pruner.params.values():
            p += 100.0 * (p != 0)
    pruner.prune(0.5)
    assert pruner.recomputations == 2
    assert flat(pruner.params.values()).max() > 50


def test_a_weight_that_came_back_is_pruned_again(make):
    pruner = make(network())
    pruner.prune(0.5)
    gone = {name: ~mask for name, mask in pruner.masks.items()}
    with torch.no_grad():
        for p in pruner.params.values():
            p += 1
    pruner.prune(0.5)  # the level it is at
    assert zeros(pruner) == 448
    with torch.no_grad():
        for p in pruner.params.values():
            p += 1
    pruner.prune(0.6)
    assert all((p[gone[name]] == 0).all() for name, p in pruner.params.items())
    assert zeros(pruner) == round(0.6 * 896)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("resumed", [False, True])
def test_weights_that_are_alive_but_zero_go_first(make, pattern, resumed):
    """They were set to zero, or too small for their type; the masks say which are pruned."""
    model = network()
    options = {"data": [samples(4)[:] for _ in range(20)]} if make in MFAC_PRUNERS else {}
    pruner = make(model, pattern=pattern, **options)
    pruner.prune(0.3, partial=True)
    before = pruner.masks
    with torch.no_grad():
        model[0].weight.zero_()
    if resumed:
        pruner.prune(0.31, partial=True)
        states, model = (model.state_dict(), pruner.state_dict()), network()
        pruner = make(model, pattern=pattern, **options)
        model.load_state_dict(states[0])
        pruner.load_state_dict(states[1])
        assert pruner.sparsity == round(0.31 * 896) / 896
    masks = pruner.prune(0.35, partial=True)
    assert pruner.sparsity == round(0.35 * 896) / 896
    assert torch.equal(masks["6.weight"], before["6.weight"])
    if pattern == "2:4":
        assert all((along_input(mask).sum(1) >= 2).all() for mask in masks.values())


def test_more_pages_than_weights_left_are_no_problem():
    pruner = mfac(network(), ngrads=5, pages=800)
    pruner.prune(0.5)
    pruner.recompute()
    pruner.prune(0.6)
    assert zeros(pruner) == round(0.6 * 896)


def test_fewer_weights_than_gradients_are_no_problem():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    MagnitudePruner(model).prune(0.95)
    pruner = mfac(model, damp=1e-7, ngrads=40, keep_zeros=True)
    pruner.prune(0.975)
    assert zeros(pruner) == 312
    pruner.prune(1.0)
    assert zeros(pruner) == 320
    pruner.prune(1.0)
    with pytest.raises(ValueError, match="All weights are pruned"):
        pruner.recompute()


# --- samples --------------------------------------------------------------------------------------


def rows(batches):
    """The samples of some batches, by their first numbers."""
    return [float(x) for inputs, _ in batches for x in inputs.flatten(1)[:, 0]]


class Epochs:
    """A loader in the manner of datautils: order as a function of seed and epoch alone."""

    def __init__(self, data):
        self.data, self.epoch = data, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch))
        for indices in order.split(4):
            yield self.data[indices]


SOURCES = {
    "DataLoader": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "set_epoch": Epochs,
    "list": lambda data: list(DataLoader(data, batch_size=4)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_samples_are_seeded_without_replacement_and_others_each_time(source):
    data, drawn = samples(), []
    for _ in range(2):
        batches = []
        pruner = mfac(network(), SOURCES[source](data), loss=recording(batches))
        for _ in range(2):
            pruner.recompute()
        assert len(batches) == 40
        drawn.append(rows(batches))
    first, second = drawn[0][:80], drawn[0][80:]
    assert len(set(first)) == len(set(second)) == 80
    assert set(first) != set(second)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("source", ["DataLoader", "list"])
def test_another_seed_draws_other_samples(source):
    data, drawn = samples(), []
    for seed in (0, 1):
        batches = []
        mfac(network(), SOURCES[source](data), loss=recording(batches), seed=seed).recompute()
        drawn.append(set(rows(batches)))
    assert drawn[0] != drawn[1]


def test_a_loader_that_repeats_itself_is_good_for_one_recomputation(recwarn):
    """As of a calibration set. After that there is a warning."""
    pruner = mfac(network(), DataLoader(samples(), batch_size=4))
    pruner.recompute()
    assert not recwarn
    with pytest.warns(UserWarning, match="does not shuffle"):
        pruner.recompute()


def test_an_iterator_is_good_for_one_recomputation():
    pruner = mfac(network(), (samples(4)[:] for _ in range(20)))
    pruner.prune(0.3)
    pruner.prune(0.5)
    with pytest.raises(ValueError, match="is an iterator, which yields its batches only once"):
        pruner.recompute()
    assert zeros(pruner) == 448


@pytest.mark.parametrize("own", ["loader", "sampler", "batch_sampler"])
def test_generators_of_the_loader_are_seeded_and_then_as_before(own):
    data, drawn = samples(), []
    for seed in (1, 2):
        generator, batches = torch.Generator().manual_seed(seed), []
        sampler = torch.utils.data.RandomSampler(data, generator=generator)
        options = {
            "loader": {"batch_size": 4, "shuffle": True, "generator": generator},
            "sampler": {"batch_size": 4, "sampler": sampler},
            "batch_sampler": {"batch_sampler": torch.utils.data.BatchSampler(sampler, 4, False)},
        }
        state = generator.get_state()
        pruner = mfac(network(), DataLoader(data, **options[own]), loss=recording(batches))
        pruner.recompute()
        assert torch.equal(generator.get_state(), state)
        drawn.append(rows(batches))
    assert drawn[0] == drawn[1]


def test_a_sampler_that_goes_by_epochs_is_told():
    data = samples()
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=1, rank=0)
    batches = []
    pruner = mfac(
        network(), DataLoader(data, batch_size=4, sampler=sampler), loss=recording(batches)
    )
    pruner.recompute()
    pruner.recompute()
    drawn = rows(batches)
    assert drawn[:80] != drawn[80:]


@pytest.mark.parametrize(("n", "drop_smaller"), [(76, False), (79, False), (79, True), (80, True)])
@pytest.mark.parametrize("blocksize", [None, 16])
def test_a_loader_that_is_too_short_is_refused(n, drop_smaller, blocksize):
    """A smaller last batch counts unless told otherwise."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    pruner = mfac(model, loader(n), blocksize=blocksize, drop_smaller=drop_smaller)
    if n == (80 if drop_smaller else 79):
        pruner.prune(0.5)
    else:
        with pytest.raises(ValueError, match="Wanted 20 gradients, but the loader has fewer bat"):
            pruner.prune(0.5)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert model.training


def test_any_structure_of_batches_and_any_loss():
    data = [{"text": {"a": torch.randn(3, 6)}, "y": torch.randn(3)} for _ in range(20)]
    data.append({"text": {"a": torch.randn(2, 6)}, "y": torch.randn(2)})
    seen = []

    def loss(model, batch):
        seen.append(len(batch["y"]))
        return (model(batch["text"]["a"]).squeeze(1) - batch["y"]).square().mean()

    pruner = mfac(nn.Linear(6, 1), data, loss=loss, drop_smaller=True)
    pruner.prune(0.5)
    assert zeros(pruner) == 3
    assert seen == [3] * 20


def test_the_smaller_batch_of_a_list_is_left_out_wherever_it_comes():
    batches, data = [], [samples(n)[:] for n in (2, 4, 4)]
    pruner = mfac(network(), data, loss=recording(batches), ngrads=2, drop_smaller=True)
    for _ in range(8):  # shuffled, it comes first in a third of them
        pruner.recompute()
    assert [len(labels) for _, labels in batches] == [4] * 16


def test_a_batch_that_is_larger_than_the_first_is_refused():
    batches = dict(enumerate(samples(n)[:] for n in (2, 4, 4))).values()
    with pytest.raises(ValueError, match="A batch of 4 came after one of 2"):
        mfac(network(), batches, ngrads=2, drop_smaller=True).prune(0.5)


# --- the model is left as found -------------------------------------------------------------------


class Counting(nn.Module):
    """Changes a buffer and draws random numbers in each forward pass, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x + 0 * torch.rand_like(x)


def test_mode_gradients_buffers_and_random_numbers_are_as_before():
    model = nn.Sequential(Counting(), network())
    model.train()
    model[1][1].eval()  # one layer frozen by its owner
    cross_entropy(model, samples(8)[:]).backward()
    model[1][4].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model[1][6].bias.grad = grads[-1] = None
    pruner = mfac(model, [samples(4)[:] for _ in range(20)])
    state = torch.get_rng_state()
    with torch.no_grad():
        pruner.recompute()
    pruner.recompute()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for p, q, grad in zip(model.parameters(), before.parameters(), grads, strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)
    for buffer, other in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(buffer, other)


@pytest.mark.parametrize("bad", ["weight", "loss"])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_pruned(bad):
    model = network()
    if bad == "weight":
        with torch.no_grad():
            model[6].weight[0, 0] = float("nan")

    def loss(net, batch):
        return cross_entropy(net, batch) * (float("inf") if bad == "loss" else 1)

    before = flat(model.parameters())
    for pruner in (mfac(model, loss=loss), MagnitudePruner(model)):
        if bad == "weight" or isinstance(pruner, MFACPruner):
            with pytest.raises(ValueError, match="NaN"):
                pruner.prune(0.5)
            torch.testing.assert_close(
                flat(model.parameters()), before, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_any_precision(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).to(dtype)
    data = [(x.to(dtype), y) for x, y in DataLoader(samples(), batch_size=4)]
    pruner = mfac(model, data)
    pruner.prune(0.6)
    assert zeros(pruner) == 192
    assert model[1].weight.dtype == dtype
    assert pruner._inverse.G.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_precision_of_torch_does_not_matter(default):
    pruner = mfac(network())
    torch.set_default_dtype(default)
    try:
        pruner.prune(0.6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert pruner._inverse.G.dtype == torch.float32


def test_the_default_device_of_torch_does_not_matter(make):
    """As after torch.set_default_device("cuda"), with a model on the CPU."""
    model = network()
    options = {"data": [samples(4)[:] for _ in range(20)]} if make in MFAC_PRUNERS else {}

    def pruned():
        pruner = make(copy.deepcopy(model), pattern="4x1", **options)
        pruner.prune(0.4)
        pruner.load_state_dict(pruner.state_dict())
        pruner.prune(0.6)
        return flat(pruner.params.values())

    expected = pruned()
    with torch.device("meta"):
        found = pruned()
    assert torch.equal(found, expected)


def channels_last(model):
    return model.to(memory_format=torch.channels_last)


def transposed(model):
    """Every weight lies in memory in the reverse order of its dimensions."""
    for p in model.parameters():
        p.data = (
            p.data.permute(*reversed(range(p.ndim))).contiguous().permute(*reversed(range(p.ndim)))
        )
    return model


@pytest.mark.parametrize("order", [channels_last, transposed])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_weights_in_any_memory_order_are_the_same_weights(make, order, pattern):
    model = network()
    model.insert(3, nn.Conv2d(8, 8, 1))  # which is in both orders at once
    twin = order(copy.deepcopy(model))
    assert not all(p.is_contiguous() for p in twin.parameters())
    options = {"data": [samples(4)[:] for _ in range(20)]} if make in MFAC_PRUNERS else {}
    pruners = [make(net, pattern=pattern, **options) for net in (model, twin)]
    for target in (0.3, 0.45):
        for pruner in pruners:
            pruner.prune(target, partial=True)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p == 0, q == 0)
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert [p.stride() for p in twin.parameters()] == [
        p.stride() for p in order(copy.deepcopy(model)).parameters()
    ]


def test_layers_of_all_dimensions_tied_weights_and_named_parameters():
    model = nn.ModuleList(
        [nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 1), nn.Linear(4, 4), nn.Linear(4, 4)]
    )
    model[3].weight = model[2].weight
    pruner = MagnitudePruner(model)
    assert list(pruner.params) == ["0.weight", "1.weight", "2.weight"]
    pruner = MagnitudePruner(model, ["3.bias"])
    pruner.prune(0.5)
    assert int((model[3].bias == 0).sum()) == 2
    with pytest.raises(ValueError, match=r"no parameter 'x\.weight'"):
        MagnitudePruner(model, ["x.weight"])
    with pytest.raises(ValueError, match="no weights to prune"):
        MagnitudePruner(nn.BatchNorm1d(3))


# --- masks stay in force --------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "mfac": lambda p: MFAC(p, lr=0.01, momentum=0.9, ngrads=4),
    "mfac, sparse": lambda p: MFAC(p, lr=0.01, momentum=0.9, ngrads=4, sparse=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_stay_zero_under_any_optimizer(optimizer):
    model, data = network(), loader()
    before_pruning = OPTIMIZERS[optimizer](model.parameters())  # momentum of what will go
    for batch in itertools.islice(data, 3):
        before_pruning.zero_grad()
        cross_entropy(model, batch).backward()
        before_pruning.step()
    pruner = MagnitudePruner(model)
    pruner.prune(0.5)
    zero = {name: p == 0 for name, p in pruner.params.items()}
    kept = flat(pruner.params.values())
    optimizers = [before_pruning, OPTIMIZERS[optimizer](model.parameters())]
    handles = [pruner.attach(o) for o in optimizers]
    for o, batch in zip(optimizers * 5, data, strict=False):
        o.zero_grad()
        cross_entropy(model, batch).backward()
        o.step()
        assert all((p[zero[name]] == 0).all() for name, p in pruner.params.items())
    assert not torch.equal(flat(pruner.params.values()), kept)
    for handle in handles:
        handle.remove()
    before_pruning.step()
    if "sparse" not in optimizer:
        assert zeros(pruner) < 448


def test_a_sparse_model_is_taken_as_it_is(make):
    model = network()
    MagnitudePruner(model).prune(0.3)
    gone = {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}
    pruner = make(model, keep_zeros=True)
    assert pruner.sparsity == round(0.3 * 896) / 896
    with pytest.raises(ValueError, match="below the present"):
        pruner.prune(0.2)
    pruner.prune(0.6)
    assert zeros(pruner) == round(0.6 * 896)
    assert all((p[gone[name]] == 0).all() for name, p in pruner.params.items())


# --- resuming -------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(make, stop):
    model, data = network(), loader()
    steps = [(True, 0.3), (False, 0.5), (True, 0.6), (False, 0.7)]

    def run(pruner, steps):
        for recompute, target in steps:
            if recompute and isinstance(pruner, MFACPruner):
                pruner.recompute()
            pruner.prune(target)

    options = {"data": data} if make in MFAC_PRUNERS else {}
    whole = copy.deepcopy(model)
    run(make(whole, **options), steps)

    first = make(model, **options)
    run(first, steps[: stop + 1])
    state = through_a_file({"model": model.state_dict(), "pruner": first.state_dict()})
    first.prune(0.99)  # what is saved is not to change with it
    fresh = network()
    fresh.load_state_dict(state["model"])
    second = make(fresh, **options)
    second.load_state_dict(state["pruner"])
    run(second, steps[stop + 1 :])
    assert torch.equal(flat(fresh.parameters()), flat(whole.parameters()))


def test_a_pruner_that_has_not_begun_is_resumed_as_well(make):
    """As when a run is stopped while it trains the dense model."""
    options = {"data": loader()} if make in MFAC_PRUNERS else {}
    model = network()
    pruners = [make(copy.deepcopy(model), **options) for _ in range(2)]
    pruners[1].load_state_dict(through_a_file(make(model, **options).state_dict()))
    for pruner in pruners:
        pruner.prune(0.5)
    assert torch.equal(*(flat(pruner.params.values()) for pruner in pruners))


def tune(model):
    """A few steps on other samples each time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in itertools.islice(loader(), 5):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("released", [False, True])
def test_weights_that_were_trained_before_saving_are_not_thrown_away(released):
    """The uninterrupted run goes on from them, and so does the resumed one."""
    whole, data = network(), loader()
    first = mfac(whole, data)
    first.prune(0.3)
    if released:
        first.release()
    tune(whole)
    first.apply_masks()
    state = through_a_file({"model": whole.state_dict(), "pruner": first.state_dict()})
    resumed = network()
    resumed.load_state_dict(state["model"])
    second = mfac(resumed, data)
    second.load_state_dict(state["pruner"])
    for pruner in (first, second):
        pruner.prune(0.5)
        assert pruner.recomputations == 2
    assert torch.equal(flat(resumed.parameters()), flat(whole.parameters()))


def test_a_resumed_run_that_fails_leaves_the_model_as_loaded():
    model = network()
    first = mfac(model)
    first.prune(0.5)
    second = mfac(model, [samples(4)[:]])
    second.load_state_dict(first.state_dict())
    before = flat(model.parameters())
    with pytest.raises(ValueError, match="Wanted 20 gradients"):
        second.prune(0.7)
    assert torch.equal(flat(model.parameters()), before)
    assert zeros(second) == 448


@pytest.mark.parametrize("blocksize", [None, 16])
def test_released_memory_is_free_and_pruning_goes_on(blocksize):
    pruner = mfac(network(), blocksize=blocksize)
    pruner.prune(0.3)
    held = weakref.ref(pruner._inverse)
    pruner.release()
    assert held() is None
    pruner.prune(0.5)
    assert pruner.recomputations == 2
    assert zeros(pruner) == 448


def test_a_state_of_another_model_is_refused(make):
    state = make(network()).state_dict()
    pruner = make(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="saved masks belong to other parameters"):
        pruner.load_state_dict(state)


def test_saved_weights_of_another_model_are_refused():
    first = mfac(network())
    first.prune(0.5)
    state = first.state_dict()
    state["start_weights"] = {name: w[:1] for name, w in state["start_weights"].items()}
    pruner = mfac(network())
    with pytest.raises(ValueError, match="saved start_weights belong to other parameters"):
        pruner.load_state_dict(state)
    assert zeros(pruner) == 0


# --- other tools ----------------------------------------------------------------------------------


def test_masks_are_shown_as_those_of_torch_and_removed_again(make):
    model = network()
    pruner = make(model)
    pruner.prune(0.5)
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(3, 4, 4, 4)
    model.eval()
    expected = model(x)
    pruner.register()
    assert torch_prune.is_pruned(model)
    for name, mask in pruner.masks.items():
        assert torch.equal(model.get_buffer(f"{name}_mask").bool(), mask)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match=r"torch\.nn\.utils\.prune"):
        MagnitudePruner(model)
    pruner.prune(0.7)
    assert zeros(pruner) == round(0.7 * 896)
    pruner.remove()
    assert not torch_prune.is_pruned(model)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert MagnitudePruner(model, keep_zeros=True).sparsity == round(0.7 * 896) / 896


@pytest.mark.parametrize("resumed", [False, True])
def test_shown_masks_are_those_in_force(make, resumed):
    """Also while gradients are taken at the last recomputation, when less was pruned."""
    model, options = network(), {}
    if make in MFAC_PRUNERS:
        options["data"] = [samples(4)[:] for _ in range(20)]
    twin = copy.deepcopy(model)
    pruner, other = make(model, **options), make(twin, **options)
    for p in (pruner, other):
        p.prune(0.3)
        p.prune(0.5)
    if resumed:
        pruner.register()
        pruner.load_state_dict(other.state_dict())
    pruner.register()
    for p in (pruner, other):
        p.prune(0.7)
    for name, mask in pruner.masks.items():
        assert torch.equal(model.get_buffer(f"{name}_mask").bool(), mask)
        module, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(module), attribute), pruner.params[name])
    pruner.remove()
    assert torch.equal(flat(pruner.params.values()), flat(other.params.values()))


def test_masks_of_tied_weights_are_shown_in_every_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    pruner = MagnitudePruner(model)
    pruner.register()
    pruner.prune(0.5)
    for layer in model:
        assert torch.equal(layer.weight_mask.bool(), pruner.masks["0.weight"])
    x = torch.randn(2, 4)
    shown = model(x)
    pruner.remove()
    assert not torch_prune.is_pruned(model)
    assert model[1].weight is model[0].weight is pruner.params["0.weight"]
    assert torch.equal(model(x), shown)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "block"}, "Invalid scope: 'block'"),
        ({"update": "exact"}, "Invalid update: 'exact'"),
        ({"ngrads": 0}, "Invalid ngrads: 0"),
        ({"ngrads": 2.0}, "Invalid ngrads: 2.0"),
        ({"damp": 0.0}, "Invalid damp: 0.0"),
        ({"damp": float("nan")}, "Invalid damp: nan"),
        ({"blocksize": 0}, "Invalid blocksize: 0"),
        ({"blocksize": -1}, "Invalid blocksize: -1"),
        ({"perbatch": 0}, "Invalid perbatch: 0"),
        ({"pages": 0}, "Invalid pages: 0"),
        ({"portions": 0}, "Invalid portions: 0; it must be an integer of at least 1"),
        (
            {"portions": "0.*"},
            r"Invalid portions: '0\.\*'; it must be a number, or a list of names",
        ),
        ({"portions": []}, "Invalid portions: no entry matches 0.weight"),
        ({"portions": ["0.*", "*"]}, "Invalid portions: both '0.*' and '.' match 0.weight"),
        ({"portions": ["0.*", "4.*"]}, "Invalid portions: no entry matches 6.weight"),
        ({"portions": ["fc"]}, "The model has no parameter 'fc'; .* see portions"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        mfac(network(), **options)


MISUSES = {
    "pattern": (lambda: MagnitudePruner(network(), pattern=None), "Invalid pattern: None; it must"),
    "target": (lambda: MagnitudePruner(network()).prune(None), "Invalid sparsity: None; it must"),
    "targets": (lambda: MagnitudePruner(network()).prune("half"), "Invalid sparsity: 'half'; it"),
    "state": (lambda: MagnitudePruner(network()).load_state_dict({}), r"\['masks'\].* got \[\]"),
    "no state": (lambda: mfac(network()).load_state_dict(None), "state_dict.* got NoneType"),
    "another's state": (
        lambda: mfac(network()).load_state_dict(MagnitudePruner(network()).state_dict()),
        "'recomputations'.* of MFACPruner, got",
    ),
    "loader": (lambda: MFACPruner(network(), None), "Invalid loader: None; it must yield batches"),
    "seed": (lambda: mfac(network(), seed=-1), "Invalid seed: -1; .* of at least 0"),
    "no seed": (lambda: mfac(network(), seed=None), "Invalid seed: None; .* of at least 0"),
    "ngrads": (lambda: mfac(network(), ngrads=True), "Invalid ngrads: True; .* of at least 1"),
    "damp": (lambda: mfac(network(), damp="1e-3"), "Invalid damp: '1e-3'; it must be a number"),
    "device": (lambda: mfac(network(), device="gpu0"), "Invalid device: 'gpu0'"),
    "perbatch": (lambda: mfac(network(), perbatch=3), "perbatch = 3 goes with a blocksize only"),
    "pages": (lambda: mfac(network(), pages=3, blocksize=4), "pages = 3 goes without"),
    **{
        f"loss {name}": (
            lambda change=change: mfac(
                network(), loss=lambda *args: change(cross_entropy(*args))
            ).recompute(),
            "Expected loss.* return the mean over the batch",
        )
        for name, change in {
            "as a float": torch.Tensor.item,
            "a vector": lambda loss: loss.expand(3),
            "without a graph": lambda loss: loss.detach(),
        }.items()
    },
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_answered_with_advice(misuse):
    call, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", [tuple, torch.tensor, np.array])
def test_targets_of_any_kind(kind):
    pruner = MagnitudePruner(network(), scope="layer")
    pruner.prune(kind([0.25, 0.5, 0.75]))
    assert [int((p == 0).sum()) for p in pruner.params.values()] == [72, 144, 240]
    pruner.prune(np.float64(0.75))
    assert zeros(pruner) == 672


def test_memory_is_asked_for_before_any_gradient(monkeypatch):
    """Portions fit where the whole does not."""
    cpu, batches = torch.device("cpu"), []
    needed = inverse_bytes(20, 896)[cpu]
    monkeypatch.setattr("memory.available_memory", lambda device: needed - 1)
    monkeypatch.setattr("memory.free_in_folder", lambda: 0)
    pruner = mfac(network(), loss=recording(batches))
    with pytest.raises(ValueError, match=r"takes .* but free are .* use .*gradients, portions"):
        pruner.prune(0.5)
    assert not batches and zeros(pruner) == 0
    pruner = mfac(network(), portions=3, loss=recording(batches))
    assert pruner.memory_plan().needed[cpu] < needed
    pruner.prune(0.5)
    assert len(batches) == 60 and zeros(pruner) == 448


@pytest.mark.parametrize("options", [{}, {"rounds": 3}, {"blocksize": 32}, {"update": "none"}])
def test_gradients_go_to_a_file_where_memory_is_short(options, monkeypatch, tmp_path, caplog):
    """Nothing is left of it, and the bits are the same."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, data = network(), list(loader())
    twin = copy.deepcopy(model)
    mfac(model, data, **options).prune(0.5)
    needed = inverse_bytes(20, 896, blocksize=options.get("blocksize"))[torch.device("cpu")]
    monkeypatch.setattr("memory.available_memory", lambda device: needed - 1)
    pruner = mfac(twin, data, **options)
    assert pruner.memory_plan().in_file == 20 * 896 * 4
    with caplog.at_level("INFO", "prun"):
        pruner.prune(0.5)
    assert f"7.17e-05 GB in a file in {tmp_path}" in caplog.messages[0]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not list(tmp_path.iterdir())


def test_a_logger_is_told_what_is_done(caplog, capsys):
    with caplog.at_level("INFO", "prun"):
        mfac(network(), rounds=2).prune(0.5)
        assert caplog.messages == [
            "inverse Fisher: 0.00102 GB on cpu",
            "gradients of 20",
            "inverse Fisher of 896 weights",
            "choice and update, 1 of 2",
            "choice and update, 2 of 2",
            "pruned 448 of 896 weights, sparsity 0.5000",
        ]
        caplog.clear()
        mfac(network(), portions=["0.*", "[46].*"]).prune(0.25)
        assert caplog.messages[1] == "portion 1 of 2: gradients of 20"
        assert caplog.messages[5] == "portion 2 of 2: gradients of 20"
        caplog.clear()
        MagnitudePruner(network()).prune(0.25)
        assert caplog.messages == ["pruned 224 of 896 weights, sparsity 0.2500"]
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("level", ["NOTSET", "ERROR"])
def test_a_terminal_has_a_line_that_goes_away(level, monkeypatch, caplog, capsys):
    caplog.set_level(level, "prun")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())

    def slow(net, batch):
        time.sleep(0.02)
        return cross_entropy(net, batch)

    mfac(network(), loss=slow).prune(0.5)
    lines = terminal.getvalue().split("\r\x1b[2K")
    assert capsys.readouterr().out == "" and not caplog.messages
    if level == "ERROR":
        assert lines == [""]
    else:
        assert lines[0] == lines[-1] == "" and "inverse Fisher of 896 weights" in lines
        assert any(re.fullmatch(r"gradients \d+ of 20, \d+ s left", line) for line in lines)
        assert all(len(line) < 80 and "\n" not in line for line in lines)


def test_the_time_spent_is_known():
    pruner = mfac(network())
    assert pruner.seconds == {"gradients": 0, "inverse": 0}
    began = time.perf_counter()
    pruner.prune(0.5)
    first = dict(pruner.seconds)
    assert min(first.values()) > 0
    assert sum(first.values()) <= time.perf_counter() - began
    pruner.prune(0.6)
    assert pruner.seconds == first
    pruner.recompute()
    assert all(pruner.seconds[key] > first[key] for key in first)
