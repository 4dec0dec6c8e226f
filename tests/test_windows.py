"""Windows of all types and compressed ones, alone and in `MFAC`, against dense oracles."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import as_kept, dense_inverse, ring
from torch import nn

import windows
from optim import MFAC, DynamicInverseFisher, NonFiniteGradientError, window_bytes
from windows import CompressedWindow, DenseWindow

CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float8": {"dtype": FLOAT8},
    "compressed": {"compress": 0.2},
    "compressed bfloat16": {"compress": 0.2, "dtype": torch.bfloat16},
}
for_all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 columns and tiles of a few numbers: many of both in a small window."""
    monkeypatch.setattr(windows, "BLOCK", 16)
    monkeypatch.setattr(windows, "TILE", 128)


def dense(fisher):
    """The window (m, d) in float64."""
    return torch.cat(list(fisher.window.tiles()), 1)


def relative_error(x, reference):
    return float((x.double() - reference).norm() / reference.norm())


def optimizers_kind(kind):
    """The arguments of MFAC for those of DynamicInverseFisher."""
    return {"window_dtype" if name == "dtype" else name: value for name, value in kind.items()}


def saved(*things):
    """What comes back from a file."""
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a, b):
    """Equal to the bits, in all that states are made of."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.double(), b.double())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("d", [0, 1, 16, 17, 150])
@pytest.mark.parametrize("m", [1, 3, 21])
@for_all_kinds
def test_products_are_those_with_what_is_stored(kind, m, d, exact, small_blocks):
    dtype, compress = kind.get("dtype", torch.float32), kind.get("compress")
    window = (
        DenseWindow(m, d, CPU, dtype)
        if compress is None
        else CompressedWindow(m, d, CPU, dtype, compress)
    )
    close = {"rtol": 1e-13, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 1e-4}
    for t in range(m + 1):
        entry, count, y = window.entry(torch.randn(d)), torch.tensor(t), torch.randn(m).double()
        y[t + 1 :] = 0  # as for rows not in use
        products = window.products(entry, count, exact)
        sums = window.replace_and_transposed_times(entry, count, torch.tensor(1), y, 2.0, exact)
        G = torch.cat(list(window.tiles()), 1)
        assert G.shape == (m, d) and G.dtype == products.dtype == torch.float64
        assert torch.equal(G[t % m], entry.vectors[0].double())
        k = G @ G[t % m]
        torch.testing.assert_close(products[0], k, **close)
        rest = entry.vectors[1] if len(entry.vectors) == 2 else torch.zeros(d)
        torch.testing.assert_close(sums.double(), G.T @ y + rest / 2.0, **close)
        if len(entry.vectors) == 2:
            torch.testing.assert_close(products[1], G @ entry.vectors[1].double(), **close)
    window.write(window.entry(torch.randn(d)), count, torch.tensor(0))  # which is not accepted
    assert torch.equal(torch.cat(list(window.tiles()), 1), G)
    x = torch.randn(d).double()
    torch.testing.assert_close(window.times(x, exact), G @ x, **close)
    torch.testing.assert_close(windows.gram(window.tiles()), G @ G.T)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9000), st.floats(1e-4, 1), st.sampled_from([torch.float32, torch.float64]))
def test_nothing_is_lost_and_the_largest_go_first(d, compress, dtype):
    """At any time the rows written and the error make up the sum of the gradients."""
    window = CompressedWindow(2, d, CPU, dtype, compress)
    total = torch.zeros(d, dtype=torch.float64)
    for t in range(3):
        g = torch.randn(d)
        a, entry = window.error + g, window.entry(g)
        window.write(entry, torch.tensor(t), torch.tensor(1))
        kept = entry.vectors[0] != 0
        assert torch.equal(entry.vectors[0][kept], a[kept]) and not window.error[kept].any()
        for part, of in zip(a.abs().split(windows.BLOCK), kept.split(windows.BLOCK), strict=True):
            assert int(of.sum()) == max(1, round(compress * len(part)))
            assert of.all() or part[of].min() >= part[~of].max()
        total += g.double() - entry.vectors[0].double()
    torch.testing.assert_close(window.error.double(), total, rtol=1e-5, atol=1e-5)


# --- the inverse Fisher ---------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("m", "d"), [(4, 50), (7, 5), (3, 16), (1, 33)])
@for_all_kinds
def test_every_exchange_gives_the_dense_inverse_of_what_is_kept(kind, m, d, shards, small_blocks):
    fisher = DynamicInverseFisher(m, d, 1e-2, shards=["cpu"] * shards, **kind)
    sizes = [d * (i + 1) // shards - d * i // shards for i in range(shards)]
    gradients = torch.randn(2 * m + 2, d)
    rows, error = as_kept(gradients, sizes=sizes, block=16, **kind)
    newest = gradients if "compress" in kind else rows
    for t, g in enumerate(gradients):
        result = fisher.update_matvec(g)
        G = ring(rows[: t + 1], m)
        assert torch.equal(dense(fisher), G.double())
        inverse = dense_inverse(G, 1e-2)
        assert relative_error(result, inverse @ newest[t].double()) < 2e-5
    if "compress" in kind:
        assert torch.equal(torch.cat([block.error for block in fisher.window.blocks]), error)
    x = torch.randn(d)
    assert relative_error(fisher.matvec(x), inverse @ x.double()) < 1e-6
    torch.testing.assert_close(fisher.diagonal(), inverse.diagonal())


def test_everything_kept_is_the_dense_window():
    plain, compressed = (DynamicInverseFisher(5, 60, 1e-2, compress=c) for c in (None, 1.0))
    for g in torch.randn(10, 60):
        torch.testing.assert_close(compressed.update_matvec(g), plain.update_matvec(g))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@for_all_kinds
def test_a_gradient_that_is_not_finite_changes_nothing(kind, bad):
    """3e38 is finite, but not with the error added to it."""
    fisher = DynamicInverseFisher(3, 40, 1e-2, **kind)
    for g in torch.randn(4, 40):
        fisher.update(g)
    if "compress" in kind:
        fisher.window.blocks[0].error[5] = 3e38
    elif bad == 3e38:
        bad = float("-inf")
    before, g = copy.deepcopy(fisher.state_dict()), torch.randn(40)
    g[5] = bad
    for call in (fisher.update, fisher.update_matvec):
        with pytest.raises(NonFiniteGradientError):
            call(g)
    assert_same(fisher.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, FLOAT8])
def test_scales_reach_as_far_as_float32(dtype):
    """Gradients of 2e-8 and 7e4, which lie outside of these types, and blocks of both in one."""
    d = 2 * windows.BLOCK
    p = nn.Parameter(torch.zeros(d))
    optimizer = MFAC([p], lr=1.0, ngrads=3, damp=1e-16, window_dtype=dtype)
    for scale in (2e-8, 7e4, 1e-30, 1e30):
        p.grad = scale * torch.randn(d)
        p.grad[windows.BLOCK :] *= 1e-6
        p.detach().zero_()
        optimizer.step()
        row = dense(optimizer.fisher)[(optimizer.fisher.count - 1) % 3]
        for part, of in zip(row.split(windows.BLOCK), p.grad.split(windows.BLOCK), strict=True):
            assert relative_error(part, of.double()) < {torch.float16: 1e-3, FLOAT8: 0.05}[dtype]
        assert bool(p.any())
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("shards", [1, 2])
@for_all_kinds
def test_a_restored_window_goes_on_bit_for_bit_and_grows(kind, shards, small_blocks):
    fisher, other = (
        DynamicInverseFisher(4, 30, 1e-2, shards=["cpu"] * shards, **kind) for _ in range(2)
    )
    for g in torch.randn(6, 30):
        fisher.update(g)
    places = [t.data_ptr() for block in fisher.window.blocks for t in block.state.values()]
    for twin in (fisher, other):
        twin.grow(21)
    now = [t.data_ptr() for block in fisher.window.blocks for t in block.state.values()]
    assert now[: len(places)] == places  # what there was has not been copied
    fisher.update(torch.randn(51))
    (state,) = saved(fisher.state_dict())
    other.load_state_dict(state)
    for g in torch.randn(6, 51):
        assert torch.equal(fisher.update_matvec(g), other.update_matvec(g))
    assert_same(other.state_dict(), fisher.state_dict())


@for_all_kinds
def test_a_loaded_window_shares_nothing_and_is_spread_over_any_shards(kind, small_blocks):
    """Or takes the gradients again, where blocks of columns have something in common."""
    fisher = DynamicInverseFisher(3, 40, 1e-2, **kind)
    other = DynamicInverseFisher(3, 40, 1e-2, shards=["cpu"] * 3, **kind)
    fisher.update(torch.randn(40))
    other.load_state_dict(fisher.state_dict())
    before = dense(other)
    if "compress" not in kind:
        torch.testing.assert_close(before, dense(fisher), rtol=0.07, atol=1e-4)
    fisher.update(torch.randn(40))
    assert torch.equal(dense(other), before) and other.count == 1


def test_columns_are_spread_evenly_over_the_shards():
    fisher = DynamicInverseFisher(2, 31, device="cpu", shards=["meta"] * 3)
    assert fisher.window.dims == [10, 10, 11]
    assert {block.device.type for block in fisher.window.blocks} == {"meta"}
    assert fisher.device.type == "cpu"


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT8, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compress", [None, 0.01, 0.3])
@pytest.mark.parametrize(("d", "world_size"), [(128, 1), (10_112, 1), (30_720, 3), (12_288, 1)])
def test_window_bytes_counts_all_that_there_is(d, world_size, compress, dtype):
    if compress and dtype.itemsize < 8:
        dtype = torch.bfloat16
    part, number = d // world_size, dtype.itemsize
    blocks = [min(4096, part - start) for start in range(0, part, 4096)]
    scales = 6 * 4 * len(blocks) if dtype in (FLOAT8, torch.float16) else 0
    expected = 6 * part * number + scales
    if compress:
        entries = sum(max(1, round(compress * columns)) for columns in blocks)
        expected = 6 * entries * (number + 4) + part * max(4, number)
    count = window_bytes(6, d, dtype=dtype, compress=compress, world_size=world_size)
    assert count == expected + 2 * 8 * 6 * 6


def test_what_a_window_of_resnet20_takes():
    m, d = 1024, 272_474
    sides = 16 * m**2  # K and P, which all have
    window = window_bytes(m, d) - sides
    bfloat16 = {"dtype": torch.bfloat16}
    for kind, part in (
        ({"compress": 0.01}, 0.022),
        ({"compress": 0.01, **bfloat16}, 0.017),
        (bfloat16, 0.5),
        ({"dtype": FLOAT8}, 0.251),
    ):
        assert window_bytes(m, d, **kind) - sides <= part * window


def peak_of_steps(dtype):
    """Bytes by which the memory of a process grows as a window is filled, exchanged and grown."""
    code = (
        "import re, torch, optim\n"
        "def memory(name):\n"
        "    status = open('/proc/self/status').read()\n"
        "    return 1024 * int(re.search(name + r':\\s+(\\d+)', status)[1])\n"
        "def steps(m, d):\n"
        f"    fisher = optim.DynamicInverseFisher(m, d, dtype={dtype})\n"
        "    fisher.window.blocks[0].G.view(torch.uint8).zero_()\n"  # pages come when written to
        "    fisher.counter.fill_(m)\n"
        "    for _ in range(3): fisher.update_matvec(torch.randn(d))\n"
        "    fisher.grow(10)\n"
        "    fisher.update(torch.randn(d + 10))\n"
        "steps(2, 1000)\n"
        "start = memory('VmRSS')\n"
        "steps(512, 400_000)\n"
        "print(memory('VmHWM') - start)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize(
    ("dtype", "part"), [(torch.float32, 1), (torch.bfloat16, 0.5), (FLOAT8, 0.27)]
)
def test_there_is_one_window_in_memory_and_it_grows_in_place(dtype, part):
    whole = window_bytes(512, 400_000)
    used = peak_of_steps(dtype)
    assert 0.9 * part * whole < used < 1.05 * part * whole + 80e6  # and vectors and tiles


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [0, -0.1, 1.5, float("nan"), "1%"])
def test_a_compression_out_of_range_is_refused(compress):
    with pytest.raises(ValueError, match=rf"Invalid compress: {compress!r}; .* at most 1"):
        DynamicInverseFisher(3, 4, compress=compress)
    with pytest.raises(ValueError, match="Invalid compress"):
        MFAC([nn.Parameter(torch.ones(3))], compress=compress)


@pytest.mark.parametrize(
    "kind",
    [{"dtype": torch.int32}, {"dtype": "int32"}, {"dtype": 16}, {"dtype": FLOAT8, "compress": 0.1}],
)
def test_types_that_do_not_do_are_refused(kind):
    with pytest.raises(ValueError, match=r"Invalid dtype: .*float32"):
        DynamicInverseFisher(3, 4, **kind)
    with pytest.raises(ValueError, match=r"Invalid window_dtype: .*float32"):
        MFAC([nn.Parameter(torch.ones(3))], **optimizers_kind(kind))


def test_types_may_be_names():
    p = nn.Parameter(torch.ones(3))
    for name in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn"):
        assert DynamicInverseFisher(3, 4, dtype=name).dtype == getattr(torch, name)
        assert MFAC([p], ngrads=3, window_dtype=name).fisher.dtype == getattr(torch, name)


def test_a_window_that_memory_does_not_hold_is_refused_in_one_sentence():
    said = r"A window of 4000000 gradients of 1,000,000 weights takes .* GB on cpu, .* free; take"
    with pytest.raises(ValueError, match=said):
        DynamicInverseFisher(4_000_000, 10**6)
    with pytest.raises(ValueError, match=said):
        MFAC([nn.Parameter(torch.zeros(10**6))], ngrads=4_000_000)


# --- the optimizer --------------------------------------------------------------------------------


def small_model():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def batches(number):
    return [(torch.randn(8, 8), torch.randint(3, (8,))) for _ in range(number)]


@for_all_kinds
def test_a_step_follows_the_inverse_of_what_is_kept(kind):
    a, b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(7))
    optimizer = MFAC([a, b], lr=0.1, ngrads=4, damp=0.1, **optimizers_kind(kind))
    weights = torch.cat([a.detach().flatten(), b.detach()]).double()
    gradients = torch.randn(10, 27)
    rows, _ = as_kept(gradients, **kind)
    newest = gradients if "compress" in kind else rows
    for t, g in enumerate(gradients):
        a.grad, b.grad = g[:20].view(5, 4).clone(), g[20:].clone()
        optimizer.step()
        weights -= 0.1 * dense_inverse(ring(rows[: t + 1], 4), 0.1) @ newest[t].double()
        moved = torch.cat([a.detach().flatten(), b.detach()]).double()
        torch.testing.assert_close(moved, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [0, 3, 11])
@for_all_kinds
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, before):
    """With a group that came later, whose history is zero."""
    options = {"lr": 1e-2, "momentum": 0.9, "ngrads": 5, "damp": 1e-3, **optimizers_kind(kind)}

    def grown(model):
        optimizer = MFAC(model[0].parameters(), **options)
        optimizer.add_param_group({"params": list(model[2].parameters()), "weight_decay": 1e-3})
        return optimizer

    model, resumed, data = small_model(), small_model(), batches(18)
    optimizer = grown(model)
    train(model, optimizer, data[:before])
    weights, state = saved(model.state_dict(), optimizer.state_dict())
    train(model, optimizer, data[before:])

    resumed.load_state_dict(weights)
    other = grown(resumed)
    other.load_state_dict(state)
    train(resumed, other, data[before:])
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@for_all_kinds
def test_copies_go_on_alike(kind, duplicate):
    if kind.get("dtype") == FLOAT8 and duplicate is not copy.deepcopy:
        pytest.skip("torch does not unpickle tensors of 8 bits; torch.save does it")
    model, data = small_model(), batches(8)
    optimizer = MFAC(model.parameters(), momentum=0.5, ngrads=3, **optimizers_kind(kind))
    train(model, optimizer, data)
    model2, optimizer2 = duplicate((model, optimizer))
    train(model, optimizer, data)
    train(model2, optimizer2, data)
    assert_same(model2.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", [{"compress": 0.5}, {"window_dtype": FLOAT8}])
def test_a_window_of_another_model_is_refused(kind):
    optimizer, other = (MFAC([nn.Parameter(torch.randn(n))], ngrads=3, **kind) for n in (4, 5))
    with pytest.raises(ValueError, match="has 4 weights, but this inverse Fisher 5"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("kind", [{}, {"compress": 0.5}, {"window_dtype": "float8_e4m3fn"}])
def test_windows_of_weights_kept_at_zero_are_resumed(kind, device):
    """Some of a matrix, and all of one that comes later, whose window has no columns."""
    a = nn.Parameter(torch.randn(4, 5, device=device))
    b = nn.Parameter(torch.zeros(2, 3, device=device))
    with torch.no_grad():
        a *= torch.rand(4, 5, device=device) < 0.5

    def made():
        optimizer = MFAC([a], ngrads=4, sparse=True, **kind)
        optimizer.add_param_group({"params": [b]})
        return optimizer

    optimizer, other = made(), made()
    for _ in range(6):
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        optimizer.step()
    assert not b.any()
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.state_dict(), optimizer.state_dict())
    g = torch.randn(optimizer.fisher.shape[0], device=device)
    assert torch.equal(other.fisher.update_matvec(g), optimizer.fisher.update_matvec(g))


ONE, TWO = pytest.mark.cuda, pytest.mark.cuda(gpus=2)
PAIR = {"gpus": ["cuda:0", "cuda:1"]}


@pytest.mark.parametrize(
    ("devices", "where", "streams"),
    [
        pytest.param(["cpu", "cuda", "cuda", "cpu"], {"optdev": "cpu"}, [], marks=ONE),
        pytest.param(["cpu", "cuda", "cuda", "cpu"], {"optdev": "cuda"}, [], marks=ONE),
        pytest.param(["cuda:0", "cuda:1", "cuda:1", "cpu"], PAIR, [], marks=TWO),
        pytest.param(["cuda:0", "cuda:1", "cuda:0", "cuda:1"], PAIR, PAIR["gpus"], marks=TWO),
    ],
    ids=["window on the CPU", "window on a GPU", "two GPUs", "two GPUs, streams"],
)
@for_all_kinds
def test_parameters_on_several_devices_share_a_window(kind, devices, where, streams):
    values = [torch.randn(40) for _ in devices]
    parameters = [nn.Parameter(x.to(device)) for x, device in zip(values, devices, strict=True)]
    plain = [nn.Parameter(x.clone()) for x in values]
    options = {"lr": 1.0, "ngrads": 3, "damp": 1.0, **optimizers_kind(kind)}
    optimizer = MFAC(parameters, **where, **options)
    reference = MFAC(plain, gpus=["cpu"] * len(where.get("gpus", [])), **options)
    with contextlib.ExitStack() as stack:
        for device in streams:
            torch.cuda.synchronize(device)
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        for _ in range(8):
            for p, q in zip(parameters, plain, strict=True):
                q.grad = torch.randn(40)
                p.grad = q.grad.to(p.device)
            optimizer.step()
            reference.step()
        for p, q in zip(parameters, plain, strict=True):
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-4, atol=1e-4)


def test_a_compressed_window_of_another_length_is_whole_after_loading():
    source, fisher = (DynamicInverseFisher(m, 9000, 1e-3, compress=0.01) for m in (4, 512))
    for g in torch.randn(3, 9000):
        source.update(g)
    fisher.load_state_dict(source.state_dict())
    G = torch.cat(list(fisher.window.tiles()), 1)
    A = G @ G.T + 512e-3 * torch.eye(512)
    exact = (1 - (G * torch.linalg.solve(A, G)).sum(0)) / 1e-3
    assert torch.allclose(fisher.diagonal(), exact)
    fisher.precision.interrupted = True
    fisher.update(torch.randn(9000))
    G = torch.cat(list(fisher.window.tiles()), 1)
    assert fisher.count == 4 and torch.allclose(fisher.coefficients.K, G @ G.T)


@pytest.mark.parametrize("spike", [1e4, 1e8])
def test_a_compressed_window_after_a_spike(spike):
    """What the spike left over is far larger than the gradients after it."""
    m, d, damp = 6, 50, 1e-3
    fisher = DynamicInverseFisher(m, d, damp, compress=0.1)
    fisher.measures_norms = True
    for t in range(2 * m):
        g = torch.randn(d) * (spike if t == 2 else 1)
        u = fisher.update_matvec(g)
        G = torch.cat(list(fisher.window.tiles()), 1)
        _, s, V = torch.linalg.svd(G, full_matrices=False)  # F is too ill-conditioned to solve
        exact = (g - V.T @ (s**2 / (m * damp + s**2) * (V @ g.double()))) / damp
        assert (u - exact).norm() <= 2e-5 * exact.norm()
        norms = torch.stack([g.double() @ exact, exact @ exact])
        assert spike > 1e6 or torch.allclose(fisher.norms, norms, rtol=1e-4)  # squares cancel
