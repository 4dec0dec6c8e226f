"""Windows of other types and compressed ones, alone and in `MFAC`, against dense oracles."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import as_kept, dense_inverse
from torch import nn

import windows
from optim import MFAC, DynamicInverseFisher, NonFiniteGradientError, step_traffic, window_bytes
from windows import CompressedWindow, DenseWindow

CPU = torch.device("cpu")
KINDS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
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


def ring(rows, m):
    """The window (m, d) that rows (n, d) leave behind."""
    G = torch.zeros(m, rows.shape[1])
    for t, row in enumerate(rows):
        G[t % m] = row
    return G


def dense(fisher):
    """The window (m, d) in float64."""
    return torch.cat([tile for window in fisher.windows for tile in window.tiles()], 1)


def relative_error(x, reference):
    return float((x.double() - reference).norm() / reference.norm())


def optimizers_kind(kind):
    """The arguments of MFAC for those of DynamicInverseFisher."""
    return {"window_dtype" if name == "dtype" else name: value for name, value in kind.items()}


def assert_same(a, b):
    """Equal to the bits, in all that states are made of."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [0, 1, 5, 16, 17, 150])
@pytest.mark.parametrize("m", [1, 3, 21])
@for_all_kinds
def test_products_are_those_with_what_is_stored(kind, m, d, dtype, small_blocks):
    window = (CompressedWindow if "compress" in kind else DenseWindow)(
        m,
        d,
        CPU,
        kind.get("dtype", torch.float32),
        *([kind["compress"]] if "compress" in kind else []),
    )
    for j in range(m):
        window.write(j, torch.randn(d))
    G = torch.cat(list(window.tiles()), 1)
    assert G.shape == (m, d) and G.dtype == torch.float64
    torch.testing.assert_close(torch.stack([window.row(j) for j in range(m)]).double(), G)
    torch.testing.assert_close(windows.gram(window.tiles()), G @ G.T)
    precision = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for rows in {1, m // 2, m}:
        x, y = torch.randn(d).double(), torch.randn(rows).double()
        result = window.times(x, rows, dtype)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, G[:rows] @ x, rtol=precision, atol=10 * precision)
        result = window.transposed_times(y, dtype)
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double(), G[:rows].T @ y, rtol=precision, atol=10 * precision
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9000), st.floats(1e-4, 1), st.sampled_from([torch.float32, torch.float64]))
def test_nothing_is_lost_and_the_largest_go_first(d, compress, dtype):
    """At any time the rows written and the error make up the sum of the gradients."""
    window = CompressedWindow(2, d, CPU, dtype, compress)
    total = torch.zeros(d, dtype=torch.float64)
    for _ in range(3):
        g = torch.randn(d)
        a = window.error + g
        window.write(0, g)
        row = window.row(0)
        kept = row != 0
        assert torch.equal(row[kept], a[kept]) and not window.error[kept].any()
        for block in range(0, d, windows.BLOCK):
            columns = slice(block, block + windows.BLOCK)
            size = len(a[columns])
            assert int(kept[columns].sum()) == max(1, round(compress * size))
            if not kept[columns].all():
                assert (
                    a[columns][kept[columns]].abs().min() >= a[columns][~kept[columns]].abs().max()
                )
        total += g.double() - row.double()
    torch.testing.assert_close(window.error.double(), total, rtol=1e-5, atol=1e-5)


def test_what_rounding_takes_from_a_row_is_carried_over_too():
    window = CompressedWindow(1, 8, CPU, torch.bfloat16, 1.0)
    g = torch.randn(8)
    window.write(0, g)
    assert torch.equal(window.row(0), g.bfloat16().float())
    assert torch.equal(window.error, g - g.bfloat16().float())


# --- the inverse Fisher ---------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", ["incremental", "paper"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("m", "d"), [(4, 50), (7, 5), (3, 16), (1, 33)])
@for_all_kinds
def test_every_exchange_gives_the_dense_inverse_of_what_is_kept(
    kind, m, d, shards, coefficients, small_blocks
):
    damp = 1e-2
    fisher = DynamicInverseFisher(
        m, d, damp, shards=["cpu"] * shards, coefficients=coefficients, **kind
    )
    sizes = [d * (i + 1) // shards - d * i // shards for i in range(shards)]
    gradients = torch.randn(2 * m + 2, d)
    rows, _ = as_kept(gradients, sizes=sizes, block=16, **kind)
    newest = gradients if "compress" in kind else rows
    for t, g in enumerate(gradients):
        result = fisher.update_matvec(g)
        G = ring(rows[: t + 1], m)
        assert torch.equal(dense(fisher), G.double())
        inverse = dense_inverse(G, damp)
        assert relative_error(result, inverse @ newest[t].double()) < 1e-5
    x = torch.randn(d)
    assert relative_error(fisher.matvec(x), inverse @ x.double()) < 1e-5
    torch.testing.assert_close(fisher.diagonal().double(), inverse.diagonal(), rtol=1e-5, atol=0)


def test_everything_kept_is_the_dense_window():
    m, d = 5, 60
    plain, compressed = (DynamicInverseFisher(m, d, 1e-2, compress=c) for c in (None, 1.0))
    for _ in range(2 * m):
        g = torch.randn(d)
        torch.testing.assert_close(compressed.update_matvec(g), plain.update_matvec(g))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@for_all_kinds
def test_a_gradient_that_is_not_finite_changes_neither_window_nor_error(kind, bad, lazy):
    """3e38 is finite, but not with the error added to it."""
    fisher = DynamicInverseFisher(3, 40, 1e-2, **kind)
    fisher.lazy = lazy
    for _ in range(4):
        fisher.update(torch.randn(40))
    for window in fisher.windows:
        if "compress" in kind:
            window.error[5] = 3e38
    if "compress" not in kind and bad == 3e38:
        bad = 3.4e38  # rounds to infinity
    before = copy.deepcopy(fisher.state_dict())
    g = torch.randn(40)
    g[5] = bad
    with pytest.raises(NonFiniteGradientError):
        result = fisher.update_matvec(g)
        assert lazy and not result.any() and fisher.accepted == 0
        fisher.settle()
    after = fisher.state_dict()
    for name in ("window", "count"):
        assert_same(after[name], before[name])
    if not lazy:  # which writes the same row again, so that K and P are rounded anew
        assert_same(after, before)


@for_all_kinds
def test_late_checks_change_no_result(kind):
    now, late = (DynamicInverseFisher(4, 40, 1e-3, **kind) for _ in range(2))
    late.lazy = True
    for _ in range(10):
        g = torch.randn(40)
        assert torch.equal(now.update_matvec(g), late.update_matvec(g))
    assert_same(late.state_dict(), now.state_dict())


@pytest.mark.parametrize("shards", [1, 2])
@for_all_kinds
def test_a_restored_window_goes_on_bit_for_bit_and_grows(kind, shards, small_blocks):
    fisher = DynamicInverseFisher(4, 30, 1e-2, shards=["cpu"] * shards, **kind)
    for _ in range(6):
        fisher.update(torch.randn(30))
    fisher.grow(21)
    fisher.update(torch.randn(51))
    file = io.BytesIO()
    torch.save(fisher.state_dict(), file)
    file.seek(0)
    other = DynamicInverseFisher(2, 3, 1.0, shards=["cpu"] * shards)
    other.load_state_dict(torch.load(file, weights_only=True))
    exactly = "compress" in kind or shards == 1  # dense shards are of equal size once restored
    for _ in range(6):
        g = torch.randn(51)
        expected, result = fisher.update_matvec(g), other.update_matvec(g)
        if exactly:
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(dense(fisher), dense(other))


@for_all_kinds
def test_a_loaded_window_shares_nothing_and_is_spread_over_any_shards(kind):
    fisher = DynamicInverseFisher(3, 40, 1e-2, **kind)
    other = DynamicInverseFisher(3, 40, 1e-2, shards=["cpu"] * 3, **kind)
    fisher.update(torch.randn(40))
    other.load_state_dict(fisher.state_dict())
    before = dense(other)
    fisher.update(torch.randn(40))
    assert torch.equal(dense(other), before)


def test_windows_are_spread_evenly_and_come_back_to_their_shards():
    shards = ["cpu", "meta", "cpu"]
    fisher = DynamicInverseFisher(2, 31, device="cpu", shards=shards)
    assert [window.dim for window in fisher.windows] == [10, 10, 11]
    assert [window.device.type for window in fisher.windows] == shards


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("compress", [None, 0.01, 0.3])
@pytest.mark.parametrize(("d", "world_size"), [(50, 1), (10_000, 1), (10_000, 3), (12_288, 1)])
def test_window_bytes_counts_all_that_there_is(d, world_size, compress, dtype):
    m = 6
    fisher = DynamicInverseFisher(m, -(-d // world_size), dtype=dtype, compress=compress)
    tensors = [fisher.coefficients.K, fisher.coefficients.P]
    for window in fisher.windows:
        tensors += [value for value in vars(window).values() if isinstance(value, torch.Tensor)]
    count = window_bytes(m, d, dtype=dtype, compress=compress, world_size=world_size)
    assert count == sum(tensor.nbytes for tensor in tensors)


def test_the_compressed_window_of_resnet20_takes_at_most_three_hundredths():
    m, d = 1024, 272_474
    kinds = {"compress": 0.01}, {"compress": 0.01, "dtype": torch.bfloat16}
    sides = 16 * m**2  # K and P, which both have
    window = window_bytes(m, d) - sides
    for kind, part in zip(kinds, (0.022, 0.017), strict=True):
        assert window_bytes(m, d, **kind) - sides < part * window


def test_step_traffic():
    assert step_traffic(10, 1000) == (2 * 10 * 4000, 0)
    assert step_traffic(10, 1000, dtype=torch.bfloat16) == (2 * 10 * 2000, 0)
    # Two reads of a quarter; three quarters of 2·8·11 and of 4·1000 bytes are sent by each.
    assert step_traffic(10, 1000, world_size=4) == (20_000, 3 * (176 + 4000) // 4)
    assert step_traffic(10, 1000, world_size=4, sharded=True) == (20_000, 132)
    assert step_traffic(10, 10 * 4096, compress=0.01)[0] == 3 * 10 * 410 * 8
    # Columns beyond the range of int32 take 8 bytes each.
    wide = step_traffic(1, 2**31, compress=0.5)[0], step_traffic(1, 2**31 - 4096, compress=0.5)[0]
    assert wide == (3 * 2**30 * 12, 3 * (2**30 - 2048) * 8)


def peak_of_steps(options):
    """Bytes by which the memory of a process grows while a window is filled and exchanged."""
    code = (
        "import re, torch, optim\n"
        "def memory(name):\n"
        "    status = open('/proc/self/status').read()\n"
        "    return 1024 * int(re.search(name + r':\\s+(\\d+)', status)[1])\n"
        f"options = {options}\n"
        "def steps(m, d):\n"
        "    fisher = optim.DynamicInverseFisher(m, d, **options)\n"
        "    fisher.windows[0].G.zero_()  # pages are there once they are written to\n"
        "    fisher.count = m\n"
        "    for _ in range(3): fisher.update_matvec(torch.randn(d))\n"
        "steps(2, 1000)\n"
        "start = memory('VmRSS')\n"
        "steps(512, 400_000)\n"
        "print(memory('VmHWM') - start)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_a_window_in_bfloat16_halves_the_memory():
    half, full = peak_of_steps("{'dtype': torch.bfloat16}"), peak_of_steps("{}")
    assert full > 4 * 512 * 400_000  # it counts
    assert half <= 0.55 * full


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [0, -0.1, 1.5, float("nan"), "1%"])
def test_a_compression_out_of_range_is_refused(compress):
    with pytest.raises(ValueError, match=rf"Invalid compress: {compress!r}; .* at most 1"):
        DynamicInverseFisher(3, 4, compress=compress)
    with pytest.raises(ValueError, match="Invalid compress"):
        MFAC([nn.Parameter(torch.ones(3))], compress=compress)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, "bfloat16"])
def test_types_that_do_not_do_are_refused(dtype):
    with pytest.raises(ValueError, match=r"Invalid dtype: .*float32"):
        DynamicInverseFisher(3, 4, dtype=dtype)
    with pytest.raises(ValueError, match=r"Invalid window_dtype: .*float32"):
        MFAC([nn.Parameter(torch.ones(3))], window_dtype=dtype)


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
    model, data = small_model(), batches(20)
    options = {"lr": 1e-2, "momentum": 0.9, "ngrads": 5, "damp": 1e-3, **optimizers_kind(kind)}
    optimizer = MFAC(model[0].parameters(), **options)
    train(model, optimizer, data[:2])
    optimizer.add_param_group({"params": list(model[2].parameters()), "weight_decay": 1e-3})
    train(model, optimizer, data[:before])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, data[before:])

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = small_model()
    resumed.load_state_dict(weights)
    groups = [{"params": list(layer.parameters())} for layer in (resumed[0], resumed[2])]
    other = MFAC(groups, ngrads=2)  # all else comes from the state
    other.load_state_dict(state)
    train(resumed, other, data[before:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@for_all_kinds
def test_copies_go_on_alike(kind, duplicate):
    model, data = small_model(), batches(8)
    optimizer = MFAC(model.parameters(), ngrads=3, **optimizers_kind(kind))
    train(model, optimizer, data)
    model2, optimizer2 = duplicate((model, optimizer))
    train(model, optimizer, data)
    train(model2, optimizer2, data)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_compressed_window_of_another_model_is_refused():
    optimizer, other = (
        MFAC([nn.Parameter(torch.randn(n))], ngrads=3, compress=0.5) for n in (4, 5)
    )
    with pytest.raises(ValueError, match="another model: it has 4 weights, this one 5"):
        other.load_state_dict(optimizer.state_dict())


def test_compressed_windows_of_weights_kept_at_zero_are_resumed():
    """Some of a matrix, and all of one that comes later, whose window has no columns."""
    a, b = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.zeros(2, 3))
    with torch.no_grad():
        a *= torch.rand(4, 5) < 0.5

    def made(ngrads):
        optimizer = MFAC([a], ngrads=ngrads, compress=0.5, sparse=True)
        optimizer.add_param_group({"params": [b]})
        return optimizer

    optimizer, other = made(4), made(2)
    for _ in range(6):
        a.grad, b.grad = torch.randn(4, 5), torch.randn(2, 3)
        optimizer.step()
    assert not b.any()
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.state_dict(), optimizer.state_dict())
    g = torch.randn(optimizer.fisher.shape[0])
    assert torch.equal(other.fisher.update_matvec(g), optimizer.fisher.update_matvec(g))


def test_a_skipped_step_leaves_the_error_alone():
    p = nn.Parameter(torch.randn(6))
    optimizer = MFAC([p], ngrads=3, compress=0.2)
    p.grad = torch.randn(6)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    p.grad[2] = float("nan")
    with pytest.warns(UserWarning, match="NaN or Inf"):
        optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["fisher"]["skipped_steps"] = 0
    assert_same(state, before)


def test_a_window_elsewhere_takes_one_transfer_a_step(monkeypatch):
    """Of the d numbers of all parameters, also with masks and groups; counted where `to` is called
    with a device, which would move them. There is no way back on one device."""
    model = small_model()
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    optimizer = MFAC(groups, ngrads=3, momentum=0.9, optdev="cpu", sparse=True)
    data = batches(1)
    train(model, optimizer, data)
    moved, to = [], torch.Tensor.to

    def counted(tensor, *arguments, **options):
        if any(isinstance(a, torch.device) for a in (*arguments, *options.values())):
            moved.append(tuple(tensor.shape))
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    monkeypatch.setattr(optimizer.fisher, "update_matvec", lambda g: g.clone())
    optimizer.step()
    d = sum(p.numel() for p in model.parameters())
    assert moved == [(d,)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optdev", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [{}, *KINDS.values()], ids=["float32", *KINDS])
def test_parameters_on_several_devices_share_a_window_on_one(kind, optdev):
    values = [torch.randn(40) for _ in range(4)]
    devices = "cpu", "cuda", "cuda", "cpu"
    parameters = [nn.Parameter(x.to(device)) for x, device in zip(values, devices, strict=True)]
    plain = [nn.Parameter(x.clone()) for x in values]
    options = {"lr": 1.0, "ngrads": 3, "damp": 1.0, **optimizers_kind(kind)}
    optimizer, reference = MFAC(parameters, optdev=optdev, **options), MFAC(plain, **options)
    for _ in range(8):
        for p, q in zip(parameters, plain, strict=True):
            q.grad = torch.randn(40)
            p.grad = q.grad.to(p.device)
        optimizer.step()
        reference.step()
    for p, q in zip(parameters, plain, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-4, atol=1e-4)
