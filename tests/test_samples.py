"""Gradients of single samples: those of a backward pass each, for layers of all kinds, and pruning
by them as by the dense Fisher matrix. Gradients of several batches at once."""

import copy
import logging
import warnings

import pytest
import torch
from reference import dense_fisher, joint_removal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

from gradients import GradientCollector
from prun import MFACPruner
from ranks import Ranks
from samples import OuterProducts, SampleGradients, join_batches

N = 5


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


class Shared(nn.Module):
    """A layer that is called twice, on sequences, with what follows in place."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(4, 6), nn.Linear(6, 6, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.twice(self.relu(self.twice(self.relu(self.first(x)))))


class Tied(nn.Module):
    """A weight that is used outside of its layer, too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).tanh() @ self.layer.weight


class Branching(nn.Module):
    """Its flow depends on the data, which torch.func does not allow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x.mT)
        return y.mT * 2 if float(y.detach().sum()) > 0 else -y.mT


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]


class Unused(nn.Module):
    """Of two layers one has no gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


# The model, and the way that its gradients are computed.
MODELS = {
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), "_by_layers"),
    "shared": (Shared, "_by_layers"),
    "Conv1D": (lambda: nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6)), "_by_layers"),
    "unused": (Unused, "_by_layers"),
    "flattened": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2), nn.Unflatten(0, (-1, 3))),
        "_by_vmap",
    ),
    "tied": (Tied, "_by_vmap"),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(2, 2)),
        "_by_vmap",
    ),
    "attention": (Attention, "_by_vmap"),
    "branching": (Branching, "_one_by_one"),
}


def squared_error(model, batch):
    x, y = batch["inputs"], batch["targets"]
    outputs = model(x)
    return (outputs - y[:, : outputs.shape[1], : outputs.shape[2]]).square().mean()


def samples(n=N):
    return BatchEncoding({"inputs": torch.randn(n, 3, 4), "targets": torch.randn(n, 6, 6)})


def row_of(loss, params):
    """The gradient (d,) from a backward pass, in float64."""
    grads = torch.autograd.grad(loss, list(params), materialize_grads=True)
    return torch.cat([grad.to_dense().flatten() for grad in grads]).double()


def rows_of(model, loss, batches):
    """A backward pass for each sample, (m, d) in float64."""
    rows = []
    for batch in batches:
        for i in range(len(batch["inputs"])):
            one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
            rows.append(row_of(loss(model, one), model.parameters()))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_samples_are_those_of_a_backward_pass_each(name):
    make, way = MODELS[name]
    model = make().eval()
    params = dict(model.named_parameters())
    gradients = SampleGradients(
        model, squared_error, params, lambda batch: squared_error(model, batch)
    )
    for batch in (samples(), samples(2)):
        found = torch.cat(gradients(batch), dim=1)
        expected = rows_of(model, squared_error, [batch])
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert gradients.ways[-1].__name__ == way
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("blocksize", [7, 16, None])
@pytest.mark.parametrize("rounds", [1, 3])
def test_pruning_is_that_by_the_dense_fisher_of_all_samples(blocksize, rounds):
    """Of batches that m cuts through, the last of them smaller."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6))
    batches, m, damp = [*(samples() for _ in range(4)), samples(3)], 18, 1e-2
    G = rows_of(model, squared_error, batches)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    w = torch.cat([before["0.weight"].flatten(), before["2.weight"].flatten()]).double()
    G = G.split([p.numel() for p in before.values()], dim=1)
    G = torch.cat([G[0], G[2]], dim=1)

    drawn = Drawn(batches)
    pruner = MFACPruner(
        model,
        drawn,
        loss=squared_error,
        ngrads=m,
        per_sample=True,
        damp=damp,
        blocksize=blocksize,
        rounds=rounds,
    )
    pruner.prune(0.5)
    F = dense_fisher(G[:m].float().double(), damp)
    if blocksize is not None:
        block = torch.arange(len(w)) // blocksize
        F = F * (block[:, None] == block)
    alive = torch.ones(len(w), dtype=torch.bool)
    for part in range(1, rounds + 1):
        R = alive.nonzero()[:, 0]
        F_R = F[R][:, R]
        saliency = w[R].square() / torch.linalg.inv(F_R).diagonal()
        stay = round(len(w) * 0.5 ** (part / rounds))
        drop = saliency.argsort(stable=True)[: len(R) - stay]
        w[R] += joint_removal(F_R, drop, w[R])
        alive[R[drop]] = False
        w = w * alive
    result = torch.cat([p.flatten() for p in pruner.params.values()]).double()
    assert torch.equal(result == 0, w == 0)
    assert (result - w).norm() < 1e-5 * w.norm()


class Drawn:
    """A loader that yields its batches in their order."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_relative_damping_is_of_the_gradients_of_samples():
    model = nn.Linear(4, 6)
    batches = [samples() for _ in range(3)]
    mean_square = rows_of(model, squared_error, batches)[:, :24].square().mean()
    pruner = MFACPruner(
        model,
        batches,
        loss=squared_error,
        ngrads=15,
        per_sample=True,
        blocksize=8,
        damp="relative:0.5",
    )
    pruner.prune(0.5)
    assert pruner._inverse.damp == pytest.approx(0.5 * float(mean_square), rel=1e-5)


def words(model: nn.Module, batch: list[str]) -> Tensor:
    lengths = torch.tensor([[float(len(word)), 1.0] for word in batch])
    return model(lengths).square().mean()


def test_strings_are_samples_too():
    batch = ["a", "abc", "ab"]
    for layer in (nn.Linear(2, 3), nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Conv1d(2, 3, 1))):
        params = dict(layer.named_parameters())
        gradients = SampleGradients(layer, words, params, lambda b, layer=layer: words(layer, b))
        found = torch.cat(gradients(batch), dim=1)
        for row, word in zip(found, batch, strict=True):
            expected = torch.autograd.grad(words(layer, [word]), list(params.values()))
            torch.testing.assert_close(row, torch.cat([grad.flatten() for grad in expected]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.tensor(1.0)], "samples along dimension 0"),
        ([torch.randn(4, 3), torch.randn(3, 3)], "Wanted 8 gradients, but .* fewer samples"),
        ([torch.randn(4, 3), torch.full((4, 3), torch.nan)], "batch 1 .* NaN or Inf"),
    ],
)
def test_what_gives_no_gradients_of_samples_is_refused(batches, message):
    model = nn.Linear(3, 2)
    start = model.weight.detach().clone()
    pruner = MFACPruner(
        model,
        Drawn(batches),
        loss=lambda model, x: model(x.expand(1, 3) if x.ndim == 0 else x).square().mean(),
        ngrads=8,
        per_sample=True,
        blocksize=2,
    )
    with pytest.raises(ValueError, match=message):
        pruner.prune(0.5)
    assert torch.equal(model.weight, start)


def test_an_input_that_is_changed_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            y = self.layer(x)
            x += 1
            return y

    gradients = SampleGradients(
        model := InPlace(), mse_loss, dict(model.named_parameters()), lambda x: model(x).mean()
    )
    gradients.compared = True  # else autograd itself refuses the first batch
    with pytest.raises(ValueError, match="changed in place"):
        gradients(torch.randn(4, 3))


def test_autocast_and_half_precision():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    params = dict(model.named_parameters())
    exact = SampleGradients(model, mse_loss, params, lambda b: cross_entropy(model(b[0]), b[1]))(
        batch
    )

    def in_autocast(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(batch[0]), batch[1])

    rounded = SampleGradients(model, mse_loss, params, in_autocast)
    for found, expected in zip(rounded(batch), exact, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert rounded.ways[-1].__name__ == "_by_layers"

    layer = nn.Linear(3, 2, dtype=torch.float16)  # sums of gradients are beyond float16

    def large(x):
        return 5e4 * layer(x).float().sum(1).mean()

    gradients = SampleGradients(layer, mse_loss, dict(layer.named_parameters()), large)
    weight, bias = gradients(torch.ones(8, 3, dtype=torch.float16))
    assert (weight == bias[0, 0]).all() and abs(bias[0, 0] / 5e4 - 1) < 1e-3


@pytest.mark.parametrize("rows", [3, 7, 100])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_columns_that_are_formed_from_factors_are_those_of_the_gradients(rows, share, monkeypatch):
    """Some weights alive, any tiles, batches of several sizes and lengths."""
    monkeypatch.setattr("samples.TILE", 100 * rows)
    model = MODELS["shared"][0]()
    params = dict(model.named_parameters())
    batches = [torch.randn(n, words, 4) for n, words in ((5, 3), (2, 6), (4, 1))]
    gradients = SampleGradients(model, mse_loss, params, lambda x: model(x).square().mean())
    G = torch.cat([torch.cat(gradients(batch), dim=1) for batch in batches])
    factors = [gradients.factors(batch) for batch in batches]
    alive = (torch.rand(G.shape[1]) < share).nonzero()[:, 0]
    squares = torch.zeros(len(alive), dtype=torch.float64)
    products = OuterProducts(factors, alive, torch.empty(0), squares)
    assert products.shape == (11, len(alive))
    for start in range(0, len(alive), rows):
        columns = slice(start, min(start + rows, len(alive)))
        torch.testing.assert_close(products[:, columns], G[:, alive[columns]])
    torch.testing.assert_close(squares, G[:, alive].double().square().sum(0))


class Transposing(nn.Module):
    """Positions along dimension 0 of the first layer, samples along that of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.second(self.first(x.transpose(0, 1)).tanh().mean(0))


class PositionsFirst(nn.Module):
    """A layer of a transformer as it is by default, with positions along dimension 0."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).mean(0)


class LowRank(nn.Linear):
    """A linear layer with low-rank parameters of its own."""

    def __init__(self, rank=2):
        super().__init__(6, 6)
        self.lora_A = nn.Parameter(torch.randn(rank, 6))
        self.lora_B = nn.Parameter(torch.randn(6, rank))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x) + self.scale * x @ self.lora_A.T @ self.lora_B.T


class WithTuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def own_conv1d():
    class Conv1D(nn.Conv1d):
        """A convolution with the name of transformers' linear layer."""

    return nn.Sequential(Conv1D(8, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))


# The model, the features of its inputs, a part of the names of its parameters, and the way.
TRAPS = {
    "transposed": (Transposing, 5, "", "_by_vmap"),
    "positions first": (PositionsFirst, 6, "linear", "_by_vmap"),
    "own Conv1D": (own_conv1d, 6, "", "_by_vmap"),
    "lora_A": (LowRank, 6, "lora_A", "_by_vmap"),
    "lora_A of full rank": (lambda: LowRank(6), 6, "lora_A", "_by_vmap"),
    "scale": (LowRank, 6, "scale", "_by_vmap"),
    "weight beside lora_A": (LowRank, 6, "weight", "_by_layers"),
    "tuple": (lambda: First(WithTuple(6, 4)), 6, "", "_by_vmap"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_layers_that_look_like_linear_ones_of_samples(name):
    """As many positions as samples; also after a batch of one sample, which shows nothing."""
    make, features, part, way = TRAPS[name]
    model = make().eval()
    params = {name: p for name, p in model.named_parameters() if part in name}

    def loss(model, x):
        return model(x).square().flatten(1).sum(1).mean()

    for sizes in ((8,), (1, 8, 3)):
        gradients = SampleGradients(model, loss, params, lambda x: loss(model, x))
        for n in sizes:
            x = torch.randn(n, 8, features)
            expected = torch.stack(
                [row_of(loss(model, one), params.values()) for one in x.split(1)]
            )
            found = torch.cat(gradients(x), dim=1)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        assert gradients.ways[-1].__name__ == way


def masked_error(model, batch):
    return (batch["mask"] @ model(batch["x"])).square().mean()


def gradients_and_warnings(model, loss, batch):
    params = dict(model.named_parameters())
    gradients = SampleGradients(model, loss, params, lambda batch: loss(model, batch))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        G = [torch.cat(gradients(batch), dim=1).double() for _ in range(2)]  # warned of once
    return G[1], gradients.ways[-1].__name__, [str(warning.message) for warning in found]


@pytest.mark.parametrize("name", ["sequences", "convolution", "branching"])
def test_a_mask_with_as_many_rows_as_samples_is_not_taken_for_samples_in_silence(name):
    make, way = MODELS[name]
    model = make().eval()
    n = model(torch.randn(1, 3, 4)).shape[1]
    x, mask = torch.randn(n, 3, 4), torch.randn(n, n)
    losses = [masked_error(model, {"x": one, "mask": mask}) for one in x.split(1)]
    expected = torch.stack([row_of(loss, model.parameters()) for loss in losses])
    G, used, warned = gradients_and_warnings(model, masked_error, {"x": x, "mask": mask[None]})
    torch.testing.assert_close(G, expected, rtol=1e-4, atol=1e-6)
    assert used == way and not warned

    G, used, warned = gradients_and_warnings(model, masked_error, {"x": x, "mask": mask})
    assert used == way
    if way == "_by_layers":  # which slices nothing
        torch.testing.assert_close(G, expected, rtol=1e-4, atol=1e-6)
        assert not warned
    else:
        error = (G.mean(0) - expected.mean(0)).norm() / expected.mean(0).norm()
        assert error > 0.1 and len(warned) == 1
        assert f"length {n} in dimension 0" in warned[0]


def test_a_loss_that_is_a_sum_over_samples_is_warned_of():
    model = nn.Sequential(nn.Conv1d(3, 2, 2), nn.Tanh())
    for reduce in torch.mean, torch.sum:

        def loss(model, x, reduce=reduce):
            return reduce(model(x).square().mean((1, 2)))

        *_, warned = gradients_and_warnings(model, loss, torch.randn(N, 3, 4))
        assert len(warned) == (reduce is torch.sum)


# --- several batches at once ----------------------------------------------------------------------


class Words(nn.Module):
    """Integers in, an embedding that the output shares, and a part that is not used."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.unused = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(2, 2)

    def forward(self, words, mask=None):
        hidden = self.layer(self.embed(words)).tanh()
        return (hidden if mask is None else hidden * mask) @ self.embed.weight.T


class Keeps(nn.Module):
    """Its output depends on the batches before, by a buffer or another attribute."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind, self.before = nn.Linear(4, 3), kind, None
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        y = self.layer(x)
        if self.kind == "attribute":
            self.before, y = y.detach(), y if self.before is None else y + self.before.mean()
        elif self.kind == "buffer":
            self.mean = 0.9 * self.mean + y.detach().mean((0, 1))
            y = y * self.mean
        else:
            self.mean += 1
            y = y * self.mean
        return y


MASK = torch.arange(3.0, dtype=torch.float64)[:, None]


def noisy(model, x):
    return (model(x) - torch.randn(())).square().mean()


def squares(model, x):
    return model(x).square().mean()


def next_words(model, batch):
    return cross_entropy(model(batch["words"]).flatten(0, 1), batch["next"].flatten())


def masked_words(model, batch):
    (words, following), options = batch
    return cross_entropy(model(words, options["mask"]).flatten(0, 1), following.flatten())


def numbers(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


def integers():
    return torch.randint(9, (N, 3))


def on_gpu(parts):
    return parts[0].cuda() if isinstance(parts[0], Tensor) else parts[0]


def tiny_conv(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *layers, nn.ReLU(inplace=True))


# The model, its loss, batches, and whether it is possible.
AT_ONCE = {
    "convolutions": (tiny_conv, squares, numbers(N, 3, 6, 6), True),
    "dropout": (lambda: tiny_conv(nn.Dropout2d(0.5)), squares, numbers(N, 3, 6, 6), True),
    "sequences": (MODELS["sequences"][0], squares, numbers(N, 3, 4), True),
    "attention": (Attention, squares, numbers(N, 3, 4), True),
    "tied": (Tied, squares, numbers(N, 3, 4), True),
    "integers": (
        Words,
        next_words,
        lambda: BatchEncoding({"words": integers(), "next": integers()}),
        True,
    ),
    "nested": (
        Words,
        masked_words,
        lambda: ((integers(), integers()), {"mask": MASK, "n": N}),
        True,
    ),
    "branching": (Branching, squares, numbers(N, 3, 4), False),
    "random dropout": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.FeatureAlphaDropout()),
        squares,
        numbers(N, 3, 4),
        False,
    ),
    "random loss": (lambda: nn.Linear(4, 3), noisy, numbers(N, 4), False),
    "sparse": (
        lambda: nn.Embedding(9, 3, sparse=True),
        squares,
        integers,
        False,
    ),
    "batch norm of batches": (
        lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3).train()),
        squares,
        numbers(N, 3, 4),
        False,
    ),
    **{
        f"keeps {kind}": (lambda kind=kind: Keeps(kind), squares, numbers(N, 3, 4), False)
        for kind in ("attribute", "buffer", "counter")
    },
}


def collected(model, loss, batches, at_once):
    """G (m, d) of every second weight, and the collector, in parts of 6."""
    params = dict(model.named_parameters())
    d = sum(p.numel() for p in params.values())
    device = next(model.parameters()).device
    alive = torch.arange(0, d, 2, device=device)
    like = torch.empty(0, dtype=torch.float64, device=device)
    ranks = Ranks()
    collector = GradientCollector(
        model, loss, params, alive, len(batches), like, ranks, False, at_once
    )
    torch.manual_seed(5)  # of what the loss draws
    rows = [part.clone() for part in collector.rows(batches, 6, len(alive))]
    return torch.cat(rows), collector


def one_by_one(model, loss, batches):
    """The same as G, by a backward pass each."""
    torch.manual_seed(5)
    return torch.stack([row_of(loss(model, b), model.parameters()) for b in batches])[:, ::2]


@pytest.mark.parametrize("name", AT_ONCE)
def test_gradients_of_several_batches_at_once_are_those_of_each(name, caplog):
    """Of 14 batches in parts of 6, by 4; whatever is refused leaves no trace."""
    make, loss, draw, possible = AT_ONCE[name]
    model = make().double()
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm1d):
            module.training = name == "random dropout"
    batches = [draw() for _ in range(14)]
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    expected = one_by_one(twin, loss, batches)
    alone, _ = collected(copy.deepcopy(model), loss, batches, 1)
    torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-12)
    with caplog.at_level(logging.DEBUG, "prun"):
        G, collector = collected(model, loss, batches, 4)
    torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)
    assert (collector.batches_at_once == 4) == possible
    assert len(caplog.records) == (not possible)
    torch.testing.assert_close(collector.squares, expected.square().sum(0))
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())
    if possible:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_batches_of_other_shapes_are_worked_on_one_by_one():
    """A smaller one in the middle, other keys, another type; those after it are together again."""
    model = Words().double()
    batches = [BatchEncoding({"words": integers(), "next": integers()}) for _ in range(12)]
    batches[1] = {"words": integers()[:2], "next": integers()[:2]}
    batches[5] = BatchEncoding({"next": integers(), "words": integers()})
    batches[7] = BatchEncoding({"words": integers().int(), "next": integers()})
    expected = one_by_one(model, next_words, batches)
    G, collector = collected(model, next_words, batches, 3)
    torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)
    assert collector.batches_at_once == 3 and collector.compared


def test_the_same_batch_may_come_again():
    model, batch = nn.Linear(4, 3).double(), torch.randn(N, 4).double()
    expected = one_by_one(model, squares, [batch] * 5)
    G, collector = collected(model, squares, [batch] * 5, 3)
    torch.testing.assert_close(G, expected)
    assert collector.batches_at_once == 3


def test_weights_that_torch_func_does_not_reach_are_found_out(caplog):
    """A loss that holds the weight itself gets no gradient from torch.func, without an error."""
    model = nn.Linear(4, 3).double()
    weight = model.weight
    batches = [torch.randn(N, 4).double() for _ in range(6)]

    def loss(model, x):
        return model(x).square().mean() + (weight @ x.T).square().mean()

    expected = one_by_one(model, loss, batches)
    with caplog.at_level(logging.DEBUG, "prun"):
        G, collector = collected(model, loss, batches, 3)
    torch.testing.assert_close(G, expected)
    assert collector.batches_at_once == 1 and "other numbers" in caplog.text


def test_a_batch_with_nan_is_named_among_several():
    model = nn.Linear(4, 3)
    batches = [torch.randn(N, 4) for _ in range(8)]
    batches[5][0, 0] = torch.nan
    with pytest.raises(ValueError, match="The gradients of batch 5 "):
        collected(model, squares, batches, 3)


@pytest.mark.parametrize("blocksize", [None, 16])
def test_a_pruner_works_on_several_batches_at_once(blocksize):
    """With dropout and batch norm in training mode, which are kept quiet."""
    model = nn.Sequential(tiny_conv(nn.Dropout(0.5)), nn.Flatten(), nn.Linear(64, 3)).double()
    batches = [(torch.randn(N, 3, 6, 6).double(), torch.randint(3, (N,))) for _ in range(12)]
    pruned = []
    for at_once in 1, 5:
        twin = copy.deepcopy(model)
        options = {"ngrads": 12, "mode": "train", "blocksize": blocksize, "damp": 1e-3}
        MFACPruner(twin, batches, batches_at_once=at_once, **options).prune(0.5)
        pruned.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    torch.testing.assert_close(pruned[1], pruned[0], rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="batches_at_once = 2 goes without per_sample only"):
        MFACPruner(model, batches, per_sample=True, batches_at_once=2)


@pytest.mark.cuda
@pytest.mark.parametrize("name", AT_ONCE)
def test_on_a_gpu_several_at_once_are_the_default(name):
    make, loss, draw, possible = AT_ONCE[name]
    model = make().double().eval().cuda()
    batches = [join_batches([draw()], on_gpu) for _ in range(14)]
    expected = one_by_one(copy.deepcopy(model), loss, batches)
    G, collector = collected(model, loss, batches, None)
    torch.testing.assert_close(G, expected, rtol=1e-8, atol=1e-10)
    assert collector.batches_at_once > 1 or not possible
