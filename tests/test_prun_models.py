"""Which weights the pruners take, and models, batches and optimizers of all kinds."""

import copy
import doctest
import warnings
from dataclasses import replace

import pytest
import torch
from reference import dense_fisher, joint_removal
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import gradients
import masks
import memory
import prun
from masks import lowest, select_weights
from prun import MagnitudePruner, MFACPruner, cross_entropy


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def network():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def data(n=24, size=4):
    return [(torch.randn(size, 8), torch.randint(4, (size,))) for _ in range(n)]


def mfac(model, batches=None, **options):
    batches = data() if batches is None else batches
    return MFACPruner(model, batches, **{"ngrads": 24, "damp": 1e-3, **options})


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def zeros(pruner):
    return sum(int((p == 0).sum()) for p in pruner.params.values())


# --- which layers ---------------------------------------------------------------------------------


def gpt2():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    return BertModel(BertConfig(intermediate_size=16, **sizes), add_pooling_layer=False)


def test_gpt2_is_pruned_in_its_conv1d_layers_and_not_in_the_tied_embedding():
    """And of their input, dimension 0, two of four weights are left."""
    model = gpt2()
    with pytest.warns(UserWarning, match=r"Not pruned: transformer\.wte\.weight"):
        pruner = MagnitudePruner(model, pattern="2:4")
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(pruner.params) == [f"transformer.h.0.{name}.weight" for name in layers]
    pruner.prune(0.5)
    for p in pruner.params.values():
        assert ((p.T.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert not (model.lm_head.weight == 0).any()


def test_bert_is_pruned_in_its_linear_layers_and_embeddings_are_named():
    with pytest.warns(UserWarning, match=r"Not pruned: embeddings\.word_embeddings\.weight"):
        names = select_weights(bert())
    assert len(names) == 6 and all(".layer.0." in name for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_weights(bert(), ignore=["embeddings.*"]) == names


def other_layers():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "weight_norm": parametrizations.weight_norm(nn.Linear(8, 8)),
            "spectral": parametrizations.spectral_norm(nn.Linear(8, 8)),
            "lstm": nn.LSTM(8, 8),
            "up": nn.ConvTranspose2d(8, 4, 2),
        }
    )


def test_what_is_left_out_is_named():
    with pytest.warns(UserWarning, match="Not pruned") as found:
        names = select_weights(other_layers())
    assert names == {"linear.weight": 1, "up.weight": 0}
    (message,) = [str(warning.message) for warning in found]
    for layer in ("weight_norm.param", "spectral.param", "lstm.weight_ih", "lstm.weight_hh"):
        assert layer in message


def test_transposed_convolutions_have_their_pattern_along_the_input():
    layer = nn.ConvTranspose2d(8, 3, 2)
    MagnitudePruner(layer, pattern="1:4").prune(0.75)
    groups = layer.weight.movedim(0, -1).reshape(-1, 4)
    assert ((groups != 0).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("params", "ignore", "expected"),
    [
        (["0.weight"], [], ["0.weight"]),
        (["*.weight"], [], ["0.weight", "2.weight"]),
        (["*.weight"], ["0*"], ["2.weight"]),
        ([r"[02]\.bias"], [], ["0.bias", "2.bias"]),
        ([r"\d+\.w.*"], [], ["0.weight", "2.weight"]),
        (None, ["2.weight"], ["0.weight"]),
    ],
)
def test_names_globs_and_regular_expressions(params, ignore, expected):
    assert list(select_weights(network(), params, ignore)) == expected


def test_names_that_match_nothing_are_refused():
    for options in ({"params": ["3.*"]}, {"ignore": ["fc"]}, {"params": ["("]}):
        with pytest.raises(ValueError, match="The model has no parameter"):
            MagnitudePruner(network(), **options)
    with pytest.raises(ValueError, match="no weights to prune; name them in params"):
        MagnitudePruner(network(), ignore=["*"])


# --- masks ----------------------------------------------------------------------------------------


def test_zeros_train_unless_they_are_to_be_kept():
    """As of LoRA's B, or of the last layer of a residual branch."""
    for keep_zeros in (False, True):
        model = network()
        nn.init.zeros_(model[2].weight)
        pruner = MagnitudePruner(model, keep_zeros=keep_zeros)
        assert pruner.sparsity == (24 / 72 if keep_zeros else 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner.attach(optimizer)
        cross_entropy(model, data(1)[0]).backward()
        optimizer.step()
        assert bool((model[2].weight != 0).all()) != keep_zeros
        if keep_zeros:
            with pytest.raises(ValueError, match="below the present"):
                pruner.prune(0.2)
        else:
            pruner.prune(0.2)


def test_masks_are_taken_as_given():
    model = network()
    mask = torch.rand(6, 8) > 0.3
    pruner = mfac(model, masks={"0.weight": mask})
    assert torch.equal(model[0].weight != 0, mask)
    pruner.prune(0.6)
    assert not (model[0].weight[~mask] != 0).any() and zeros(pruner) == round(0.6 * 72)
    for bad in ({"0.weight": mask.T}, {"1.weight": mask}, {"0.weight": None}):
        with pytest.raises(ValueError, match="Invalid mask for"):
            MagnitudePruner(network(), masks=bad)


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_the_lowest_go_and_of_equal_ones_the_first(n):
    score = torch.randint(5, (n,)).float()
    among = torch.rand(n) < 0.7
    for count in {0, int(among.sum()) // 2, int(among.sum())}:
        order = [int(i) for i in score.argsort(stable=True) if among[i]]
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(lowest(score, among, count), expected)


# --- parameters that are replaced -----------------------------------------------------------------


@pytest.mark.parametrize("make", [MagnitudePruner, mfac])
def test_parameters_that_the_model_has_now_are_pruned(make):
    model = network()
    pruner = make(model)
    pruner.prune(0.3)
    state = {name: 2 * p for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    pruner.prune(0.6)
    assert sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2])) == 43
    assert all(p is model.get_parameter(name) for name, p in pruner.params.items())


def test_a_parameter_that_is_gone_is_a_sentence():
    model = network()
    pruner = MagnitudePruner(model)
    del model[2].weight
    with pytest.raises(ValueError, match=r"no longer has a parameter '2\.weight'"):
        pruner.prune(0.5)


def test_remove_of_torch_does_not_break_the_next_level():
    model = network()
    pruner = mfac(model)
    pruner.prune(0.3)
    pruner.register()
    torch_prune.remove(model[0], "weight")
    pruner.prune(0.5)
    assert zeros(pruner) == 36
    pruner.remove()
    assert not torch_prune.is_pruned(model)
    copy.deepcopy(model)


def test_optimizers_of_accelerate_and_lightning():
    from accelerate import Accelerator
    from lightning.pytorch.core.optimizer import LightningOptimizer

    for wrap in (lambda o: Accelerator(cpu=True).prepare(o), LightningOptimizer):
        model = network()
        pruner = MagnitudePruner(model)
        pruner.prune(0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner.attach(wrap(optimizer))
        cross_entropy(model, data(1)[0]).backward()
        optimizer.step()
        assert zeros(pruner) == 36


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_that_are_all_zero_are_refused():
    model = nn.Linear(8, 1)
    batches = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)) for _ in range(24)]
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"All gradients are zero; .* of a single output"):
        mfac(model, batches).prune(0.5)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("blocksize", [None, 8])
def test_a_layer_without_gradients_is_named(blocksize):
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    pruner = mfac(model, loss=lambda m, batch: cross_entropy(m[0], batch), blocksize=blocksize)
    with pytest.warns(UserWarning, match=r"The gradients of 1\.weight are zero"):
        pruner.prune(0.5)


def test_targets_of_cross_entropy():
    soft = [(x, torch.rand(4, 4).softmax(1)) for x, _ in data()]
    mfac(network(), soft).prune(0.5)
    with pytest.raises(ValueError, match=r"Targets of torch.float32 \(4,\) are no classes"):
        mfac(network(), [(x, y.float()) for x, y in data()]).prune(0.5)


def test_outputs_that_are_no_tensor_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x), x

    with pytest.raises(ValueError, match=r"The model returns tuple, .* give a loss"):
        mfac(Two()).prune(0.5)


def test_the_first_batch_that_is_not_finite_ends_it():
    batches = data()
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return cross_entropy(model, batch) * (float("nan") if len(seen) == 3 else 1)

    with pytest.raises(ValueError, match=r"batch 2 \(the first is 0\) have NaN or Inf"):
        mfac(network(), batches, loss=loss).prune(0.5)
    assert len(seen) == 3


def test_weights_that_are_not_finite_are_named_before_any_gradient():
    model, seen = network(), []
    with torch.no_grad():
        model[2].weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"The weights 2\.weight have NaN or Inf"):
        mfac(model, loss=lambda *args: seen.append(args)).prune(0.5)
    assert not seen


def test_new_weights_that_do_not_fit_float16_are_refused_and_nothing_is_changed():
    """The weight that stays makes up for the other, which has 100 times its gradient."""
    model = nn.Linear(2, 1, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e4, 5e4]]))
    row = torch.tensor([10.0, 0.1])
    pruner = MFACPruner(
        model, [row], ngrads=1, damp=1e-4, loss=lambda m, g: (m.weight[0].float() * g).sum()
    )
    pruner.recompute()
    pruner._inverse._diagonal = torch.tensor([1e9, 1.0], dtype=torch.float64)  # the first goes
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"new weights of weight, up to .* do not fit torch.float"):
        pruner.prune(0.5)
    assert torch.equal(model.weight, before) and pruner.masks["weight"].all()


# --- batches --------------------------------------------------------------------------------------


def test_batches_count_whatever_their_shapes():
    """(time, batch, features), tokens with offsets, single samples."""
    time_first = [torch.randn(n, 4, 8) for n in range(2, 26)]
    pruner = mfac(network(), time_first, loss=lambda m, x: m(x).square().mean())
    pruner.prune(0.5)
    single = [(torch.randn(8), torch.tensor(1)) for _ in range(24)]
    mfac(network(), single).prune(0.5)
    bag = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 4))
    ragged = [(torch.randint(20, (n,)), torch.tensor([0, 1])) for n in range(2, 26)]

    def loss(model, batch):
        return model[1](model[0](*batch)).square().mean()

    mfac(bag, ragged, loss=loss, ignore=["0.weight"]).prune(0.5)


# --- models ---------------------------------------------------------------------------------------


class Modes(nn.Module):
    """Notes in which mode its parts are while it computes."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5)
        self.seen = []

    def forward(self, x):
        parts = (self, self.norm, self.drop, self.lstm)
        self.seen.append((*(part.training for part in parts), self.lstm.dropout))
        return self.lstm(self.drop(self.norm(self.linear(x))))[0]


@pytest.mark.parametrize(("mode", "training"), [("eval", False), ("train", True), ("as is", True)])
def test_modes(mode, training):
    """Batch norm and dropout are quiet in each; cuDNN's LSTM needs its training mode."""
    model = Modes().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mfac(model, mode=mode, ignore=["lstm*"]).prune(0.5)
    assert set(model.seen) == {(training, False, False, True, 0.0)}
    assert all(module.training for module in model.modules()) and model.lstm.dropout == 0.5
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with pytest.raises(ValueError, match="Invalid mode: 'evaluate'"):
        mfac(network(), mode="evaluate")


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body, self.use_reentrant = network(), use_reentrant

    def forward(self, x):
        x = x.requires_grad_()
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def test_checkpointing():
    mfac(Checkpointed(False)).prune(0.5)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        mfac(Checkpointed(True)).prune(0.5)


def test_models_that_cannot_be_pruned_where_they_are():
    with pytest.raises(ValueError, match=r"0\.weight has no storage yet"):
        MagnitudePruner(network().to("meta"))
    with pytest.raises(ValueError, match=r"weight has no storage yet"):
        MagnitudePruner(nn.LazyLinear(4))
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
        mfac(model)
    pruner = mfac(network())
    with torch.inference_mode(), pytest.raises(ValueError, match="prune outside of it"):
        pruner.prune(0.5)

    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(ValueError, match="FSDP has sharded the model"):
        MagnitudePruner(FullyShardedDataParallel(nn.Linear(4, 4)))


def test_a_dtensor_is_a_sentence():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), nn.Linear(4, 4)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="weight is a DTensor, as in FSDP2"):
            mfac(model)
    finally:
        dist.destroy_process_group()


def test_an_expanded_buffer_is_left_alone():
    model = network()
    model.register_buffer("expanded", torch.ones(1).expand(5))
    mfac(model).prune(0.5)


# --- damping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [None, 8, 30])
def test_damping_may_change_between_levels(blocksize):
    model = network()
    twin, batches = copy.deepcopy(model), 8 * data(3)  # so that F is singular but for λ
    pruner = mfac(model, batches, blocksize=blocksize)
    pruner.prune(0.3)
    pruner.damp = 1e-1
    pruner.prune(0.6)
    assert pruner.recomputations == 1
    other = mfac(twin, batches, blocksize=blocksize, damp=1e-1)
    other.prune(0.6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p == 0, q == 0)
        torch.testing.assert_close(p, q)
    for bad, message in ((-1, "Invalid damp: -1"), (1e-280, "damp = 1e-280 is too small")):
        with pytest.raises(ValueError, match=message):
            pruner.damp = bad
        assert pruner.damp == pruner._inverse.damp == 1e-1
    before = pruner._inverse.diagonal()
    pruner.damp = 1e-1
    torch.testing.assert_close(pruner._inverse.diagonal(), before)


def test_warnings_are_at_the_line_that_called_the_pruner():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4), nn.Linear(8, 4))
    batches = [(x.abs().long().clamp(max=8)[:, 0], y) for x, y in data()]
    loader = DataLoader(batches, batch_size=None)  # which does not shuffle
    with pytest.warns(UserWarning) as found:
        pruner = mfac(model, loader, loss=lambda m, b: cross_entropy(m[:2], b), blocksize=4)
        pruner.prune(0.2)
        pruner.recompute()
    assert len(found) == 4 and {warning.filename for warning in found} == {__file__}


@pytest.mark.parametrize("blocksize", [None, 8])
def test_damping_relative_to_the_gradients(blocksize):
    batches, model, seen = data(), network(), []

    def loss(net, batch):
        seen.append(batch)
        return cross_entropy(net, batch)

    pruner = mfac(model, batches, damp="relative:0.03", blocksize=blocksize, loss=loss)
    twin = copy.deepcopy(model)
    pruner.prune(0.5)
    squares = []
    for batch in seen:
        twin.zero_grad()
        cross_entropy(twin, batch).backward()
        squares.append(flat([twin[0].weight.grad, twin[2].weight.grad]).double().square().mean())
    expected = 0.03 * float(torch.stack(squares).mean())
    assert pruner._inverse.damp == pytest.approx(expected)
    assert mfac(network(), damp="relative").damp == "relative"
    for bad in ("relative:", "relative:-1", "relative:0", "absolute", "relative:e"):
        with pytest.raises(ValueError, match="Invalid damp"):
            mfac(network(), damp=bad)


# --- rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("blocksize", [None, 7, 9, 30])
def test_rounds_choose_anew_after_each_part(blocksize, scope):
    """Against a dense inverse of what is left, computed anew."""
    model, seen, damp, rounds = network(), [], 1e-3, 4
    before = copy.deepcopy(model)

    def loss(net, batch):
        seen.append(batch)
        return cross_entropy(net, batch)

    pruner = mfac(model, loss=loss, blocksize=blocksize, rounds=rounds, scope=scope)
    names = list(pruner.params)
    pruner.prune(0.2)
    seen.clear()
    pruner.recompute()
    before = copy.deepcopy(model)
    pruner.prune(0.7)
    rows = []
    for batch in seen:
        before.zero_grad()
        cross_entropy(before, batch).backward()
        rows.append(flat(before.get_parameter(name).grad for name in names))
    w = flat(before.get_parameter(name) for name in names).double()
    alive = (w != 0).nonzero()[:, 0]
    F = dense_fisher(torch.stack(rows)[:, alive], damp)
    if blocksize:
        block = torch.arange(len(alive)) // blocksize
        F = F * (block[:, None] == block)
    sizes = [before.get_parameter(name).numel() for name in names]
    layer = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes))[alive]
    groups = [layer >= 0] if scope == "global" else [layer == i for i in range(len(names))]
    totals = [sum(sizes)] if scope == "global" else sizes
    v, left = w[alive], torch.ones(len(alive), dtype=torch.bool)
    start = [int(group.sum()) for group in groups]
    for part in range(1, rounds + 1):
        R = left.nonzero()[:, 0]
        inverse = torch.linalg.inv(F[R][:, R])
        rho = v[R].square() / inverse.diagonal()
        drop = []
        for group, total, n in zip(groups, totals, start, strict=True):
            end = total - round(0.7 * total)
            keep = end if part == rounds else round(n * (end / n) ** (part / rounds))
            own = group[R].nonzero()[:, 0]
            drop.append(own[rho[own].argsort()][: len(own) - keep])
        drop = torch.cat(drop)
        v[R] += joint_removal(F[R][:, R], drop, v[R])
        left[R[drop]] = False
        v[R[drop]] = 0
    expected = w.clone()
    expected[alive] = v
    result = flat(pruner.params.values()).double()
    assert torch.equal(result == 0, expected == 0)
    assert (result - expected).norm() < 1e-5 * expected.norm()


def test_one_round_is_the_default_and_rounds_need_the_joint_update():
    model = network()
    twin, batches = copy.deepcopy(model), data()
    mfac(model, batches).prune(0.6)
    mfac(twin, batches, rounds=1).prune(0.6)
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    with pytest.raises(ValueError, match="rounds = 2 goes with update='joint' only, not 'none'"):
        mfac(network(), rounds=2, update="none")
    with pytest.raises(ValueError, match="Invalid rounds: 0"):
        mfac(network(), rounds=0)


def test_rounds_leave_the_inverse_for_further_levels():
    """As it was: a resumed pruner, which computes it again, goes on to the same weights."""
    model, batches = network(), data()
    pruner = mfac(model, batches, rounds=3, blocksize=7)
    pruner.prune(0.3)
    other = copy.deepcopy(model)
    resumed = mfac(other, batches, rounds=3, blocksize=7)
    resumed.load_state_dict(pruner.state_dict())
    for one in (pruner, resumed):
        one.prune(0.6)
        assert one.recomputations == 1
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_rounds_make_a_pattern():
    pruner = mfac(network(), rounds=3, pattern="2:4", params=["0.weight"])
    pruner.prune(0.5)
    groups = pruner.params["0.weight"].reshape(-1, 4)
    assert ((groups == 0).sum(1) == 2).all()


# --- storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [None, 30])
def test_gradients_may_be_kept_in_bfloat16(blocksize):
    """The result is that of the gradients, rounded once."""
    model, seen = network(), []

    def loss(net, batch):
        seen.append(batch)
        return cross_entropy(net, batch)

    before = copy.deepcopy(model)
    options = {"grads_dtype": torch.bfloat16, "blocksize": blocksize}
    pruner = mfac(model, loss=loss, **options)
    pruner.prune(0.5)
    rows = []
    for batch in seen:
        before.zero_grad()
        cross_entropy(before, batch).backward()
        rows.append(flat([before[0].weight.grad, before[2].weight.grad]).bfloat16())
    F = dense_fisher(torch.stack(rows), 1e-3)
    if blocksize:
        block = torch.arange(72) // blocksize
        F = F * (block[:, None] == block)
    w = flat([before[0].weight, before[2].weight]).double()
    drop = (w.square() / torch.linalg.inv(F).diagonal()).argsort()[:36]
    w += joint_removal(F, drop, w)
    w[drop] = 0
    assert (flat(pruner.params.values()) - w).norm() < 1e-5 * w.norm()


def test_memory_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr("memory.available_memory", lambda device: 1000)
    monkeypatch.setattr("memory.free_in_folder", lambda: 2**40)
    model = network()
    before = flat(model.parameters())
    with pytest.raises(ValueError, match=r"takes .* GB on cpu, but free are 1e-06 GB on cpu"):
        mfac(model).prune(0.5)
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.cuda
@pytest.mark.parametrize("blocksize", [None, 9, 30])
@pytest.mark.parametrize("rounds", [1, 3])
def test_on_a_gpu_it_is_the_same(blocksize, rounds, monkeypatch):
    """With gradients on the GPU, and elsewhere where they do not fit."""
    model, batches = network(), data()
    results = []
    for place in ("cpu", "cuda", "main memory", "file"):
        if place in ("main memory", "file"):
            elsewhere = {"main memory": torch.device("cpu"), "file": "file"}[place]

            def plan(*sizes, elsewhere=elsewhere, **how):
                return replace(memory.make_plan(*sizes, **how), place=elsewhere, pages=3)

            monkeypatch.setattr(prun, "make_plan", plan)
        net = copy.deepcopy(model).to("cpu" if place == "cpu" else "cuda")
        mfac(net, batches, blocksize=blocksize, rounds=rounds).prune(0.6)
        results.append(flat(net.cpu().parameters()))
    for result in results[1:]:
        assert torch.equal(result == 0, results[0] == 0)
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [masks, gradients, memory], ids=lambda module: module.__name__)
def test_what_docstrings_show(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0 and attempted > 0
    assert all(">>> " in getattr(module, name).__doc__ for name in module.__all__)
