"""The pruners on layers, losses, batches and devices of all kinds, against float64 oracles.

The gradients of the oracle are those of a float64 copy of the model, each from a backward pass of
its own; what becomes of the weights is worked out from the dense Fisher matrix.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from reference import dense_fisher, joint_removal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import prune as torch_prune
from torch.sparse import _semi_structured_conversions as semi_structured
from transformers.pytorch_utils import Conv1D

from prun import MagnitudePruner, MFACPruner

DAMP, NGRADS = 1e-3, 24


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def flat(tensors):
    return torch.cat([t.detach().cpu().flatten() for t in tensors])


def oracle(model, names, rows, sparsity, blocksize=None):
    """The weights after pruning by the dense Fisher matrix of the gradients `rows` (m, d)."""
    w = flat(model.get_parameter(name) for name in names).double()
    F = dense_fisher(rows, DAMP)
    if blocksize is not None:
        block = torch.arange(len(w)) // blocksize
        F = F * (block[:, None] == block)
    saliency = w.square() / (2 * torch.linalg.inv(F).diagonal())
    drop = saliency.argsort(stable=True)[: round(sparsity * len(w))]
    w += joint_removal(F, drop, w)
    w[drop] = 0
    return w


def gradients(model, names, batches, loss):
    """One row a batch, in eval mode."""
    rows = []
    for batch in batches:
        model.zero_grad()
        loss(model.eval(), batch).backward()
        rows.append(flat(model.get_parameter(name).grad.to_dense() for name in names))
    return torch.stack(rows)


def assert_pruned_as_by(expected, pruner):
    result = flat(pruner.params.values()).double()
    assert torch.equal(result == 0, expected == 0)
    assert (result - expected).norm() < 1e-5 * expected.norm()


# --- layers ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention between two sequences, the second of which may be of another size."""

    def __init__(self, size):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, kdim=size, vdim=size, batch_first=True)
        self.size = size

    def forward(self, x):
        other = x[:, 1:, : self.size]
        return self.attend(x, other, other)[0].mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


class Tied(nn.Module):
    """A language model whose output layer has the weights of the embedding."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(12, 6, **options)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.body(self.embed(x)).tanh()).mean(1)


def words():
    return torch.randint(12, (4, 5))


def embedding(**options):
    return nn.Sequential(nn.Embedding(12, 6, **options), nn.Flatten(), nn.Linear(30, 3))


# The model, its input, the parameters to name, and those that are pruned without naming any.
LAYERS = {
    "Conv1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        lambda: torch.randn(4, 4, 6),
        None,
        ["0.weight", "3.weight"],
    ),
    "Conv1d in groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, stride=2), nn.Flatten()),
        lambda: torch.randn(4, 4, 6),
        None,
        ["0.weight"],
    ),
    "Conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
        lambda: torch.randn(4, 2, 3, 3, 3),
        None,
        ["0.weight", "3.weight"],
    ),
    "Linear on sequences": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.Flatten()),
        lambda: torch.randn(4, 3, 6),
        None,
        ["0.weight", "2.weight"],
    ),
    "Embedding": (embedding, words, ["0.weight", "2.weight"], ["2.weight"]),
    "Embedding with padding": (
        lambda: embedding(padding_idx=0),
        words,
        ["0.weight"],
        ["2.weight"],
    ),
    "Embedding with sparse gradients": (
        lambda: embedding(sparse=True),
        words,
        ["0.weight", "2.weight"],
        ["2.weight"],
    ),
    "attention": (
        lambda: Attention(8),
        lambda: torch.randn(4, 5, 8),
        None,
        ["attend.in_proj_weight", "attend.out_proj.weight"],
    ),
    "attention to another size": (
        lambda: Attention(6),
        lambda: torch.randn(4, 5, 8),
        None,
        [f"attend.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        + ["attend.out_proj.weight"],
    ),
    "Transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Flatten(), nn.Linear(24, 3)
        ),
        lambda: torch.randn(4, 3, 8),
        None,
        [
            "0.self_attn.in_proj_weight",
            "0.self_attn.out_proj.weight",
            "0.linear1.weight",
            "0.linear2.weight",
            "2.weight",
        ],
    ),
    "LSTM": (
        Recurrent,
        lambda: torch.randn(4, 3, 5),
        ["lstm.weight_ih_l0", "lstm.weight_hh_l0"],
        None,
    ),
    "ConvTranspose1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.ReLU(), nn.Flatten()),
        lambda: torch.randn(4, 4, 2),
        None,
        ["0.weight"],
    ),
    "Conv1D of transformers": (
        lambda: nn.Sequential(Conv1D(6, 4), nn.GELU(), nn.Linear(6, 3), nn.Flatten()),
        lambda: torch.randn(4, 3, 4),
        None,
        ["0.weight", "2.weight"],
    ),
    "tied weights": (Tied, words, ["embed.weight", "body.weight"], ["body.weight"]),
    "tied weights with sparse gradients": (
        lambda: Tied(sparse=True),
        words,
        ["embed.weight", "body.weight"],
        ["body.weight"],
    ),
}


def error(model, batch):
    """A loss of the user's own, and batches of the user's own: dicts."""
    return mse_loss(model(batch["inputs"]), batch["targets"])


def batches_for(model, make_input):
    found = []
    for _ in range(NGRADS):
        inputs = make_input()
        targets = torch.randn_like(model(inputs))
        found.append({"inputs": inputs, "targets": targets})
    return found


def in_float64(batch):
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


@pytest.mark.parametrize("blocksize", [None, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_all_kinds_are_pruned_as_by_the_dense_fisher(layer, blocksize):
    make, make_input, named, default = LAYERS[layer]
    model = make().eval()
    batches = batches_for(model, make_input)
    if default is None:
        with pytest.raises(ValueError, match="no weights to prune; name them in params"):
            MagnitudePruner(model)
    else:
        assert list(MagnitudePruner(model).params) == default
    names = named or default
    seen = []

    def loss(net, batch):
        seen.append(batch)
        return error(net, batch)

    options = {"ngrads": NGRADS, "damp": DAMP, "blocksize": blocksize}
    pruner = MFACPruner(model, batches, named, loss=loss, **options)
    before = copy.deepcopy(model)
    pruner.prune(0.5)
    rows = gradients(copy.deepcopy(before).double(), names, map(in_float64, seen), error)
    assert len(rows) == NGRADS
    assert_pruned_as_by(oracle(before, names, rows, 0.5, blocksize), pruner)
    for name, p in before.named_parameters():
        assert name in names or torch.equal(p, model.get_parameter(name))


def test_masks_of_attention_are_those_of_torch_and_come_off_again():
    model = LAYERS["Transformer"][0]().eval()
    pruner = MagnitudePruner(model)
    names = [name for name, _ in model.named_parameters()]
    pruner.prune(0.5)
    x = torch.randn(4, 3, 8)
    expected = model(x)
    pruner.register()
    assert torch.equal(
        model.get_buffer("0.self_attn.in_proj_weight_mask").bool(),
        pruner.masks["0.self_attn.in_proj_weight"],
    )
    torch.testing.assert_close(model(x), expected)
    pruner.remove()
    assert not torch_prune.is_pruned(model)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert torch.equal(model(x), expected)


# --- losses and batches ---------------------------------------------------------------------------


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


VOCABULARY = {"red": 0, "green": 1, "blue": 2, "black": 3}


def read(batch):
    """Rows of numbers for rows of words."""
    return torch.tensor([[float(VOCABULARY[word] == i) for i in range(4)] for word in batch])


# A batch of n samples, and its inputs and targets for a Linear(4, 3).
BATCHES = {
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "list": (lambda x, y: [x, y], lambda batch: batch),
    "named tuple": (Pair, lambda batch: (batch.inputs, batch.targets)),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
    "nested": (lambda x, y: ({"a": [x]}, y), lambda batch: (batch[0]["a"][0], batch[1])),
    "tensor alone": (lambda x, y: x, lambda batch: (batch, batch[:, 0].abs().long() % 3)),
    "strings": (
        lambda x, y: [list(VOCABULARY)[int(label)] for label in y],
        lambda batch: (read(batch), read(batch).argmax(1) % 3),
    ),
    "strings in a dict": (
        lambda x, y: {"text": [list(VOCABULARY)[int(label)] for label in y], "id": 7},
        lambda batch: (read(batch["text"]), read(batch["text"]).argmax(1) % 3),
    ),
}


@pytest.mark.parametrize("structure", BATCHES)
def test_batches_of_any_structure_and_a_smaller_one_is_left_out(structure):
    pack, unpack = BATCHES[structure]
    model, seen = nn.Linear(4, 3), []

    def loss(net, batch):
        inputs, targets = unpack(batch)
        seen.append(batch)
        return cross_entropy(net(inputs), targets)

    def samples(n):
        return pack(torch.randn(n, 4), torch.randint(3, (n,)))

    batches = [samples(2), *(samples(4) for _ in range(NGRADS))]
    options = {"ngrads": NGRADS, "damp": DAMP, "drop_smaller": True}
    pruner = MFACPruner(model, batches, loss=loss, **options)
    before = copy.deepcopy(model)
    pruner.prune(0.5)
    assert [len(unpack(batch)[1]) for batch in seen] == [4] * NGRADS

    def in_double(net, batch):
        inputs, targets = unpack(batch)
        return cross_entropy(net(inputs.double()), targets)

    rows = gradients(before.double(), ["weight"], list(seen), in_double)
    assert_pruned_as_by(oracle(before, ["weight"], rows, 0.5), pruner)


# --- mixed precision ------------------------------------------------------------------------------


def in_bfloat16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return error(model, batch).float()


def attention_and_linear():
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Flatten(), nn.Linear(24, 3)
    ).eval()
    return model, batches_for(model, lambda: torch.randn(4, 3, 8))


def test_gradients_are_taken_in_mixed_precision_and_inverted_in_full():
    model, batches = attention_and_linear()
    before, seen = copy.deepcopy(model), []

    def loss(net, batch):
        seen.append(batch)
        return in_bfloat16(net, batch)

    pruner = MFACPruner(model, batches, loss=loss, ngrads=NGRADS, damp=DAMP)
    names = list(pruner.params)
    pruner.prune(0.5)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    rows = gradients(copy.deepcopy(before), names, seen, in_bfloat16)
    assert_pruned_as_by(oracle(before, names, rows, 0.5), pruner)
    exact = gradients(copy.deepcopy(before).double(), names, map(in_float64, seen), error)
    off = float((rows - exact).norm() / exact.norm())
    assert 2**-12 < off < 2**-5  # bfloat16 has 8 bits


@pytest.mark.parametrize("blocksize", [None, 16])
def test_autocast_around_the_pruner_is_the_same_as_within_the_loss(blocksize):
    """Casts of the weights, which autocast keeps until it ends, are of weights from before."""
    model, batches = attention_and_linear()
    options = {"ngrads": NGRADS, "damp": DAMP, "blocksize": blocksize}
    twin = copy.deepcopy(model)
    pruner = MFACPruner(model, batches, loss=in_bfloat16, **options)
    other = MFACPruner(twin, batches, loss=lambda *args: error(*args).float(), **options)
    pruner.prune(0.3)
    pruner.recompute()
    pruner.prune(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            twin(batches[0]["inputs"])
        other.prune(0.3)
        other.recompute()
        other.prune(0.5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# --- several devices ------------------------------------------------------------------------------


class Split(nn.Module):
    """Its layers are on several devices."""

    def __init__(self, *devices):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in devices)
        self.devices = devices

    def place(self):
        for layer, device in zip(self.layers, self.devices, strict=True):
            layer.to(device)
        return self

    def forward(self, x):
        for layer, device in zip(self.layers, self.devices, strict=True):
            x = layer(x.to(device)).tanh()
        return x.to(self.devices[0])


@pytest.mark.cuda
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
@pytest.mark.parametrize("first", ["cpu", "cuda"])
@pytest.mark.parametrize("blocksize", [None, 16])
def test_a_model_on_several_devices_is_pruned_like_one_on_the_cpu(first, device, blocksize):
    devices = (first, "cuda", "cpu")
    model = Split(*devices)
    twin = Split("cpu", "cpu", "cpu")
    twin.load_state_dict(model.state_dict())
    model.place()
    batches = [(torch.randn(4, 8), torch.randint(8, (4,))) for _ in range(NGRADS)]
    options = {"ngrads": NGRADS, "damp": DAMP, "blocksize": blocksize}
    pruner = MFACPruner(model, batches, device=device, **options)
    other = MFACPruner(twin, batches, **options)
    for target in (0.3, 0.6):
        assert pruner.prune(target).keys() == other.prune(target).keys()
    for (name, p), placed in zip(pruner.params.items(), devices, strict=True):
        assert p.device.type == pruner.masks[name].device.type == placed
        assert torch.equal(pruner.masks[name].cpu(), other.masks[name])
        torch.testing.assert_close(p.detach().cpu(), other.params[name].detach())
    state = pruner.state_dict()
    pruner.load_state_dict(state)
    pruner.register()
    pruner.remove()
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))


# --- masks for other tools ------------------------------------------------------------------------


def compressed_and_back(weight):
    """Through the format of torch's semi-structured tensors; what does not fit is dropped."""
    packed = semi_structured.sparse_semi_structured_from_dense_cutlass(weight)
    return semi_structured.sparse_semi_structured_to_dense_cutlass(*packed)


SHAPES = [(96, 64), (32, 128)]  # multiples of 32 x 64, which the kernels take


def two_of_four():
    """Layers of these shapes, two of four of whose weights are left."""
    model = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in SHAPES)

    def loss(net, batch):
        return sum(layer(x).square().mean() for layer, x in zip(net, batch, strict=True))

    batches = [[torch.randn(4, columns) for _, columns in SHAPES] for _ in range(8)]
    MFACPruner(model, batches, loss=loss, ngrads=8, damp=DAMP, pattern="2:4").prune(0.5)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_of_four_is_what_semi_structured_tensors_hold(dtype):
    for layer in two_of_four():
        weight = layer.weight.detach().to(dtype)
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert torch.equal(compressed_and_back(weight), weight)
    other = nn.Linear(64, 96)
    MagnitudePruner(other).prune(0.5)
    weight = other.weight.detach().to(dtype)
    assert not torch.equal(compressed_and_back(weight), weight)


@pytest.mark.cuda
def test_semi_structured_tensors_compute_the_same_on_a_gpu():
    for layer in two_of_four().to("cuda", torch.bfloat16):
        x = torch.randn(64, layer.in_features, device="cuda", dtype=torch.bfloat16)
        weight = layer.weight.detach()
        expected = layer(x)
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        assert torch.equal(sparse.to_dense(), weight)
        layer.weight = nn.Parameter(sparse)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), expected.detach(), rtol=2**-6, atol=2**-6)


def test_the_pruned_model_is_saved_and_loaded_as_any_other():
    model, fresh = (
        two_of_four(),
        nn.ModuleList(nn.Linear(columns, rows) for rows, columns in SHAPES),
    )
    assert all(type(p) is nn.Parameter for p in model.parameters())
    fresh.load_state_dict(model.state_dict())
    assert MagnitudePruner(fresh, pattern="2:4", keep_zeros=True).sparsity == 0.5
