"""What a user can do wrong in `optim`, `windows` and `prun`, by public name, and what is said.

Each is a ValueError with what came, what was expected and a way out; a TypeError where torch.optim
raises one. What concerns one feature stands with its tests.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from test_optim import assert_same_state
from torch import nn

from optim import MFAC, DynamicInverseFisher, window_bytes
from prun import (
    BlockedInverseFisher,
    MagnitudePruner,
    MFACPruner,
    PagedInverseFisher,
    inverse_bytes,
)

ONES = torch.ones(4)
NOT_VECTORS = {
    "a list": ([1.0] * 4, "vector of shape .* as a dense tensor.* got list"),
    "an array": (np.ones(4), "got ndarray"),
    "nothing": (None, "got NoneType"),
    "complex": (ONES.to(torch.complex64), r"got Tensor of torch\.complex64"),
    "integers": (ONES.long(), r"16 to 64 bits, got Tensor of torch\.int64"),
    "a mask": (ONES.bool(), r"got Tensor of torch\.bool"),
    "sparse": (ONES.to_sparse(), "as a dense tensor"),
    "nowhere": (ONES.to("meta"), "as a dense tensor"),
    "too long": (torch.ones(5), r"Expected a vector of shape \(4,\) .* got .*\(5,\)"),
    "a matrix": (torch.ones(4, 1), r"Expected a vector of shape \(4,\) .* got .*\(4, 1\)"),
}


def fisher(**options):
    made = DynamicInverseFisher(3, 4, **options)
    made.update(torch.linspace(1, 2, 4))
    return made


def parameter(*shape, **options):
    return nn.Parameter(torch.ones(shape or (4,), **options))


def stepped(**options):
    p = parameter()
    optimizer = MFAC([p], ngrads=3, **options)
    p.grad = torch.ones(4)
    optimizer.step()
    return optimizer


def network():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def pruner(loader=None, **options):
    loader = loader or [(torch.randn(4, 8), torch.randint(4, (4,))) for _ in range(8)]
    return MFACPruner(network(), loader, **{"ngrads": 5, **options})


def loads(make, change):
    """Loading its own state after `change`, which edits a dict or returns another object."""

    def call():
        source = make()
        state = source.state_dict()
        changed = change(state)
        source.load_state_dict(state if changed is None else changed)

    return call


def edit(*path, **entries):
    """A change of the entries in a nested state."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        if path:
            state[path[-1]] = state = {**state[path[-1]]}
        state.update(entries)

    return change


WINDOW = {
    "dim": (lambda: DynamicInverseFisher(3, "4"), "Invalid dim: '4'; .* of at least 0"),
    "damp true": (lambda: DynamicInverseFisher(3, 4, True), "Invalid damp: True; .* such as 1e-5"),
    "damp complex": (lambda: DynamicInverseFisher(3, 4, 1j), "Invalid damp: 1j"),
    "damp tensor": (lambda: DynamicInverseFisher(3, 4, torch.tensor(0.1)), "Invalid damp: tensor"),
    "damp set": (lambda: setattr(fisher(), "damp", "x"), "Invalid damp: 'x'"),
    "device": (lambda: fisher(device="gpu0"), "Invalid device: 'gpu0'.*'cpu' always works"),
    "device without float64": (
        lambda: fisher(device="mps"),
        "'mps'; MPS has no float64.*optdev='cpu'",
    ),
    "device number": (lambda: fisher(device=1.5), "Invalid device: 1.5"),
    "shards": (lambda: fisher(shards=["cpu", "gpu0"]), "Invalid shards: 'gpu0'.*'cpu' always"),
    "shards one": (lambda: fisher(shards="cpu"), r"Invalid shards: 'cpu'; .* \['cpu', 'cpu'\]"),
    "shards count": (lambda: fisher(shards=3), "Invalid shards: 3; it must be a list"),
    "shards none": (lambda: fisher(shards=[None]), "Invalid shards: None"),
    "dtype": (lambda: fisher(dtype=None), "Invalid dtype: None"),
    "dtype name": (lambda: fisher(dtype="float31"), r"Invalid dtype: 'float31'; .*torch\.bfloat16"),
    "dtype compressed": (
        lambda: fisher(dtype=torch.float16, compress=0.5),
        r"Invalid dtype: torch\.float16; .* with compress",
    ),
    "too large": (
        lambda: DynamicInverseFisher(1024, 10**12),
        r"1024 gradients of 1,000,000,000,000 weights takes .* GB on cpu, .* GB free; take fewer",
    ),
    "compress true": (lambda: fisher(compress=True), "Invalid compress: True"),
    "grow": (lambda: fisher().grow(-1), "Invalid columns: -1; .* of at least 0"),
    "grow float": (lambda: fisher().grow(1.5), "Invalid columns: 1.5"),
    "grow compressed": (lambda: fisher(compress=0.5).grow(None), "Invalid columns: None"),
    "matvec nan": (lambda: fisher().matvec(ONES * math.nan), "finite numbers in x, got NaN"),
    "overflow": (lambda: fisher().matvec(ONES.double() * 1e39), r"do not fit torch\.float32; use"),
    **{
        f"{method} {name}": (lambda m=method, x=x: getattr(fisher(), m)(x), message)
        for method in ("update", "update_matvec", "matvec")
        for name, (x, message) in NOT_VECTORS.items()
    },
    **{
        f"window_bytes {name}": (
            lambda k=options: window_bytes(**{"ngrads": 3, "dim": 5, **k}),
            f"Invalid {name}",
        )
        for name, options in {
            "ngrads": {"ngrads": -1},
            "dim": {"dim": "5"},
            "dtype": {"dtype": "float31"},
            "compress": {"compress": 2},
            "world_size": {"world_size": 0},
        }.items()
    },
}

SHARED = ("param_groups", 0, "fisher")
KINDS = {"dense": {}, "compressed": {"compress": 0.5}, "scaled": {"dtype": "float16"}}
FISHERS = {name: functools.partial(fisher, **x) for name, x in KINDS.items()}
STATES = {
    **{
        f"{name} {number}": (loads(FISHERS[name], change), f"damaged: .*{said}")
        for name, cases in {
            "dense": [
                (lambda _: 5, "'int' object"),
                (lambda _: {}, "KeyError"),
                (edit(count=-1), "count must be int of at least 0, got -1"),
                (edit(count=1.5), "count must be int .* got 1.5"),
                (edit(damp=-1.0), "damp must be float of at least 0"),
                (edit(window=None), "'NoneType' object"),
                (edit("window", 0, G=torch.zeros(2, 4)), r"G must be .* \(3, 4\), got"),
                (edit("window", 0, G=torch.zeros(4)), r"G must be .* \(3, 4\), got"),
                (edit("window", 0, G=torch.zeros(3, 4).long()), "G must be"),
                (edit(K=torch.zeros(3, 2)), r"K must be .* \(3, 3\), got"),
                (edit(P=torch.zeros(2, 2)), r"P must be .* \(3, 3\), got"),
                (edit(compress=0.5), "error"),
            ],
            "compressed": [
                (edit("window", 0, columns=torch.ones(3, 2)), "columns"),
                (edit("window", 0, columns=torch.zeros(3, 1, dtype=torch.int32)), "columns"),
                (edit("window", 0, values=torch.zeros(2, 2)), "values"),
                (edit("window", 0, error=None), "'NoneType' object"),
                (edit("window", 0, error=torch.tensor(0.0)), "IndexError"),
            ],
            "scaled": [(edit("window", 0, scales=torch.ones(2, 1)), r"scales must be .* \(3, 1\)")],
        }.items()
        for number, (change, said) in enumerate(cases)
    },
    **{
        f"optimizer {number}": (loads(stepped, change), said)
        for number, (change, said) in enumerate(
            [
                (lambda _: 5, "Expected a state dict of MFAC, got int"),
                (lambda _: {}, "not one of MFAC"),
                (edit("param_groups", 0, fisher={}), "not one of MFAC"),
                (edit("param_groups", 0, fisher=None), "not one of MFAC"),
                (edit(*SHARED, count=-3), "count must be int"),
                (edit(*SHARED, skipped_steps=None), "must be int of at least 0, got None"),
                (edit("state", 0, grads=torch.zeros(2, 4)), r"another model.* \(3, 4\), got"),
                (edit("state", 0, grads=None), "damaged: .* has no attribute 'shape'"),
                (edit("state", 0, momentum_buffer="x"), "damaged: .* has no attribute 'shape'"),
            ]
        )
    },
    "compress": (loads(fisher, edit(compress=7.0)), "Invalid compress: 7.0"),
    "dtype": (loads(fisher, edit(dtype="float31")), "Invalid dtype: 'float31'"),
    "weights": (loads(fisher, edit("window", 0, G=torch.zeros(3, 5))), "5 weights, .* 4; build"),
    "groups": (
        loads(stepped, lambda s: s["param_groups"].append({"params": [1]})),
        "different number of parameter groups",
    ),
    "group sizes": (
        loads(stepped, edit("param_groups", 0, params=[0, 1])),
        "parameter group that doesn't match the size of optimizer's group",
    ),
    "masks none": (
        loads(lambda: MagnitudePruner(network()), lambda s: s.update(masks=None)),
        "saved masks belong to other parameters",
    ),
    "masks no tensors": (
        loads(
            lambda: MagnitudePruner(network()),
            lambda s: s.update(masks={"0.weight": 1, "2.weight": 2}),
        ),
        "saved masks belong to other parameters",
    ),
    "recomputations": (loads(pruner, edit(recomputations="x")), "Invalid recomputations: 'x'"),
    "recomputations -2": (loads(pruner, edit(recomputations=-2)), "Invalid recomputations: -2"),
}

OPTIMIZER = {
    "ngrads": (lambda: MFAC([parameter()], ngrads=None), "Invalid ngrads: None; .* at least 1"),
    "moddev": (lambda: MFAC([parameter()], moddev="gpu0"), "Invalid moddev: 'gpu0'"),
    "optdev": (lambda: MFAC([parameter()], optdev=1.5), "Invalid optdev: 1.5"),
    "gpus": (lambda: MFAC([parameter()], gpus=["gpu0"]), "Invalid gpus: 'gpu0'"),
    "gpus one": (lambda: MFAC([parameter()], gpus="cpu"), "Invalid gpus: 'cpu'; it must be a list"),
    "gpus count": (lambda: MFAC([parameter()], gpus=2), "Invalid gpus: 2; it must be a list"),
    "on_nonfinite": (lambda: MFAC([parameter()], on_nonfinite=None), "Invalid on_nonfinite: None"),
    "sparse": (lambda: MFAC([parameter()], sparse="yes"), "Invalid sparse: 'yes'"),
    "sparse mask": (lambda: MFAC([parameter()], sparse=ONES.bool()), "Invalid sparse: tensor"),
    "momentum nan": (lambda: MFAC([parameter()], momentum=math.nan), r"nan; .* in \[0, 1\)"),
    "decay nan": (lambda: MFAC([parameter()], weight_decay=math.nan), "weight_decay: nan"),
    "lr nan": (lambda: MFAC([parameter()], lr=torch.tensor(math.nan)), "learning rate: nan"),
    "integers": (
        lambda: MFAC([nn.Parameter(torch.ones(4).long(), requires_grad=False)]),
        r"Invalid parameter: torch\.int64; it must be of a real floating-point type",
    ),
    "damp": (lambda: setattr(stepped(), "damp", None), "Invalid damp: None"),
}

PRUNING = {
    "model": (lambda: MagnitudePruner(None), r"Invalid model: NoneType; .* torch\.nn\.Module"),
    "function": (lambda: MagnitudePruner(lambda x: x), "Invalid model: function"),
    "params": (lambda: MagnitudePruner(network(), 3), "Invalid params: 3; .* list of names"),
    "params one": (lambda: MagnitudePruner(network(), "0.weight"), "Invalid params: '0.weight'"),
    "params numbers": (lambda: MagnitudePruner(network(), [3]), "no parameter 3; it has"),
    "params empty": (lambda: MagnitudePruner(network(), []), "no weights to prune; name them"),
    "scope": (lambda: MagnitudePruner(network(), scope=None), "Invalid scope: None"),
    "pattern": (lambda: MagnitudePruner(network(), pattern=4), "Invalid pattern: 4"),
    "target true": (lambda: MagnitudePruner(network()).prune(True), "Invalid sparsity: True"),
    "target inf": (lambda: MagnitudePruner(network()).prune(math.inf), "Invalid sparsity: inf"),
    "target complex": (lambda: MagnitudePruner(network()).prune(1j), "Invalid sparsity: 1j"),
    "target dict": (
        lambda: MagnitudePruner(network()).prune({"0.weight": 0.5, "2.weight": None}),
        "Invalid sparsity: {.* or a dict from names to numbers",
    ),
    "target set": (
        lambda: MagnitudePruner(network(), scope="layer").prune({0.1, 0.2}),
        "Invalid sparsity: {.* one for each layer",
    ),
    "attach": (lambda: MagnitudePruner(network()).attach(network()), "Expected an optimizer of"),
    "loss": (lambda: pruner(loss=None), "Invalid loss: None; it must be a function"),
    "loss name": (lambda: pruner(loss="mse"), "Invalid loss: 'mse'"),
    "update": (lambda: pruner(update=["joint"]), r"Invalid update: \['joint'\]"),
    "loader": (lambda: pruner("data"), "Invalid loader: 'data'"),
    "batches": (lambda: pruner([1, 2, 3] * 3).recompute(), r"batches of \(inputs, targets\)"),
    "inputs": (lambda: pruner([torch.ones(4, 8)] * 8).recompute(), r"of \(inputs, targets\)"),
    "arrays": (
        lambda: pruner([np.ones((2, 8))] * 8).recompute(),
        r"batches of \(inputs, targets\)",
    ),
    "pages": (lambda: pruner(pages=2, blocksize=3), "pages = 2 goes without a blocksize only"),
    "nowhere": (lambda: PagedInverseFisher(torch.ones(4, 9, device="meta")), "dense tensor"),
    "perbatch": (lambda: BlockedInverseFisher(torch.ones(4, 9), 2, perbatch="1"), "perbatch: '1'"),
    **{
        f"inverse_bytes {name}": (
            lambda k=options: inverse_bytes(**{"ngrads": 3, "dim": 5, **k}),
            f"Invalid {name}",
        )
        for name, options in {
            "ngrads": {"ngrads": -1},
            "dim": {"dim": 0},
            "pages": {"pages": 0},
            "blocksize": {"blocksize": 0},
            "perbatch": {"perbatch": "2"},
            "device": {"device": "gpu0"},
        }.items()
    },
}

CASES = {
    f"{table}, {name}": case
    for table, cases in {
        "window": WINDOW,
        "state": STATES,
        "optimizer": OPTIMIZER,
        "pruning": PRUNING,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_answered_with_what_came_and_a_way_out(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", None, [0.1]])
def test_settings_of_another_type_are_refused_as_by_torch(name, value):
    for optimizer in (torch.optim.SGD, MFAC):
        with pytest.raises(TypeError, match="not supported between instances"):
            optimizer([parameter()], **{name: value})


CHANGES = {
    "count": edit(*SHARED, count=-3),
    "K": edit(*SHARED, K=torch.zeros(3, 3)),
    "raised": edit(*SHARED, skipped_steps=9, raised_steps=-1),
    "grads": edit("state", 0, grads=torch.zeros(2, 4)),
    "type": edit("state", 0, grads=torch.zeros(3, 4).double()),
    "shape": edit("state", 0, grads=torch.zeros(3, 5)),
    "buffer": edit("state", 0, momentum_buffer=torch.zeros(5)),
    "groups": lambda state: state["param_groups"].append({"params": [1]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_is_refused_changes_nothing(change):
    window, optimizer = fisher(), stepped(momentum=0.5)
    before = copy.deepcopy((window.state_dict(), optimizer.state_dict()))
    for damage in (edit(count=-1), edit(K=torch.zeros(3, 3)), edit("window", 0, G=None)):
        state = copy.deepcopy(before[0])
        damage(state)
        with pytest.raises(ValueError):
            window.load_state_dict(state)
    state = copy.deepcopy(before[1])
    state["param_groups"][0]["lr"] = 7.0
    CHANGES[change](state)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert_same_state(window.state_dict(), before[0])
    assert_same_state(optimizer.state_dict(), before[1])
