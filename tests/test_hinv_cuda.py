"""The CUDA kernels: executed on the CPU by tests/cuda_on_cpu, and on a GPU where there is one,
through both ways in. Arrays are numpy's, so that the same cases run in a process without torch: the
sanitizers need one.
"""

import contextlib
import functools
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from kernels_on_cpu import (
    BLOCK,
    CODES,
    FORMATS,
    HARNESS,
    SOURCE,
    KernelsOnCpu,
    OnCpu,
    library,
    real,
    run,
)

ROOT = SOURCE.parent

SIZES = [1, 2, 31, 32, 33, 64, 96, 255, 256, 1024]
PRECISION = {np.float32: 2e-6, np.float64: 1e-14}
needs_gxx = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"
)
# In one process, so that each library is built once.
in_one_process = pytest.mark.xdist_group("kernels")


# --- the kernels on a GPU -------------------------------------------------------------------------


class OnGpu:
    """The kernels of an object with the interface of kernels.py on `device`, as `OnCpu`."""

    def __init__(self, interface, device="cuda"):
        self.interface, self.device = interface, device

    def _tensors(self, *arrays):
        import torch

        return [None if a is None else torch.tensor(a, device=self.device) for a in arrays]

    def _window(self, dtype, codes):
        import torch

        integer = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[codes.itemsize]
        return torch.tensor(codes.view(integer), device=self.device).view(getattr(torch, dtype))

    def setup(self, tmp, coef):
        tmp, coef = self._tensors(tmp, coef)
        assert self.interface.hinv_setup(tmp, coef) is coef
        return coef.cpu().numpy()

    def mul(self, rows, D, t):
        D, t = self._tensors(D, t)
        assert self.interface.hinv_mul(rows, D, t) is t
        return t.cpu().numpy()

    def update(self, P, K, k, count, damp, limit):
        m = len(k)
        outputs = self._tensors(np.full(m, np.nan), np.full(1, np.nan), np.int64(7))
        tensors = self._tensors(P, K, k, np.int64(count), np.float64(damp))
        self.interface.hinv_update(*tensors, limit, *outputs)
        P[:], K[:] = (t.cpu().numpy() for t in tensors[:2])
        return outputs[0].cpu().numpy(), outputs[1].item(), outputs[2].item()

    def times(self, dtype, G, d, x, count, scales=None):
        x, count, scales = self._tensors(x, np.int64(count), scales)
        return (
            self.interface.hinv_times(self._window(dtype, G)[:, :d], x, count, scales).cpu().numpy()
        )

    def transposed_times(
        self, dtype, G, d, z, scales=None, row=None, row_scales=None, count=None, accepted=None
    ):
        window = self._window(dtype, G)
        row = None if row is None else self._window(dtype, row)
        z, on_device, row_scales = self._tensors(z, scales, row_scales)
        count, accepted = (
            None if n is None else self._tensors(np.int64(n))[0] for n in (count, accepted)
        )
        u = self.interface.hinv_transposed_times(
            window[:, :d], z, on_device, row, row_scales, count, accepted
        )
        G[:] = self._codes(window, G.dtype)
        if scales is not None:
            scales[:] = on_device.cpu().numpy()
        return u.cpu().numpy()

    def _codes(self, x, dtype):
        import torch

        integer = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[x.element_size()]
        return x.view(getattr(torch, integer)).cpu().numpy().view(dtype)

    def round(self, dtype, g):
        window = self._window(dtype, np.zeros((1, 1), CODES[dtype]))
        row, *rest = self.interface.hinv_round(*self._tensors(g), window)
        return self._codes(row, CODES[dtype]), *(x.cpu().numpy() for x in rest)

    def largest(self, dtype, error, g, k, kept):
        values = self._window(dtype, np.zeros((1, k), CODES[dtype]))
        arguments = *self._tensors(error, g), values, kept
        columns, row, *dense = self.interface.hinv_largest(*arguments)
        return *(columns.cpu().numpy(), self._codes(row, CODES[dtype])), *(
            x.cpu().numpy() for x in dense
        )

    def sparse_times(self, dtype, columns, values, X, count, row_columns, row):
        columns, X, count, row_columns = self._tensors(columns, X, np.int64(count), row_columns)
        values, row = self._window(dtype, values), self._window(dtype, row)
        y = self.interface.hinv_sparse_times(columns, values, X, count, row_columns, row)
        return y.cpu().numpy()

    def sparse_replace(
        self, dtype, columns, values, y, error, row_columns, row, new_error, rest, damp, *when
    ):
        given = columns, error
        columns, error, y, row_columns = self._tensors(columns, error, y, row_columns)
        codes, row = self._window(dtype, values), self._window(dtype, row)
        vectors = self._tensors(new_error, rest, np.float64(damp), *map(np.int64, when))
        new = row_columns, row, *vectors
        u = self.interface.hinv_sparse_replace(columns, codes, y, error, *new)
        for before, after in zip(given, (columns, error), strict=True):
            before[:] = after.cpu().numpy()
        values[:] = self._codes(codes, values.dtype)
        return u.cpu().numpy()


def on_a_gpu(way, index=0):
    """The kernels on a GPU where there is one: way "extension" or "nvrtc"."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    import setup_cuda

    if way == "nvrtc":
        pytest.importorskip("cuda.bindings.nvrtc")
        return importlib.import_module("kernels").Compiled(torch.device("cuda", index))
    try:
        return setup_cuda.load()
    except setup_cuda.CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gpu():
    return on_a_gpu("extension")


def ways(*gpu):
    on_gpus = [pytest.param(way, marks=pytest.mark.cuda) for way in gpu]
    return [pytest.param("cpu", marks=[needs_gxx, in_one_process]), *on_gpus]


def runner(way):
    if way != "cpu":
        return OnGpu(on_a_gpu(way))
    return OnCpu(os.environ.get("HINV_CUDA_LIBRARY"))


@pytest.fixture(params=ways("extension", "nvrtc"))
def kernels(request):
    """What runs the kernels: the same cases on the CPU and, in two ways, on a GPU."""
    return runner(request.param)


@pytest.fixture(params=ways("extension"))
def recursion_kernels(request):
    """Those of the paper's recursion, which only the extension has."""
    return runner(request.param)


# --- inputs and references, in float64 or wider ---------------------------------------------------


def gradients(rng, m, kind):
    """Gradients of which all are near to one direction, or none is."""
    if kind == "ordinary":
        return rng.normal(size=(m, 2 * m + 5)) / np.sqrt(2 * m + 5)
    direction = rng.normal(size=600)
    spread = 1e-3 * rng.normal(size=(m, 600))
    return 100 * (direction + spread) / np.linalg.norm(direction)


DAMP = {"ordinary": 1e-3, "parallel": 1e-5}


def recursion(rng, m, kind):
    """N and D of the paper's recursion for `gradients`, from C = mI + K/λ = L̂ diag(q) L̂ᵀ."""
    G = gradients(rng, m, kind)
    L = np.linalg.cholesky(m * np.eye(m) + G @ G.T / DAMP[kind])
    q = np.diag(L) ** 2
    N = np.tril(L / np.diag(L), -1)
    return N, q[:, None] * np.triu(N.T, 1) + np.diag(q - m)


def substitution(N, t):
    """(I + N)⁻¹ t by rows, in the widest floats there are."""
    t = t.astype(np.longdouble)
    for i in range(1, len(t)):
        t[i] -= N[i, :i].astype(np.longdouble) @ t[:i]
    return t


def assert_close(actual, expected, tolerance):
    """Every entry finite, and off by at most `tolerance` of the largest."""
    assert np.isfinite(actual).all()
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {float(error):.1e}, not {tolerance:.0e}"


def window(rng, m, kind):
    """K and P = A⁻¹ of a window, and the exchange of one of its gradients: k, j."""
    G = gradients(rng, m + 1, kind)
    new, G = G[m], G[:m]
    j = int(rng.integers(m))
    K = G @ G.T
    P = inverse(damped(K, kind))
    G[j] = new
    return K, P, G @ new, j


def damped(K, kind):
    """A = K + mλI."""
    return K + len(K) * DAMP[kind] * np.eye(len(K))


def inverse(A):
    P = np.linalg.inv(np.linalg.cholesky(A))
    P = P.T @ P
    return (P + P.T) / 2


def column(A, j):
    """A⁻¹e_j, refined with residuals in the widest floats until nothing changes."""
    wide, P = A.astype(np.longdouble), inverse(A)
    unit = np.eye(len(A), dtype=np.longdouble)[j]
    z = P[j].astype(np.longdouble)
    for _ in range(4):
        z += P @ (unit - wide @ z).astype(float)
    return z


# --- the results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("kind", DAMP)
@pytest.mark.parametrize("m", SIZES)
def test_setup(recursion_kernels, m, kind, dtype):
    rng = np.random.default_rng(m)
    N, _ = recursion(rng, m, kind)
    N = N.astype(dtype)
    c = rng.uniform(0.5, 2, size=m).astype(dtype) / dtype(DAMP[kind])
    # What must not be read is NaN, what must not be written is 7.
    tmp = np.where(np.tri(m, k=-1, dtype=bool), N, dtype(np.nan))
    coef = np.where(np.tri(m, k=-1, dtype=bool), dtype(np.nan), dtype(7))
    np.fill_diagonal(coef, c)
    B = recursion_kernels.setup(tmp, coef)
    assert (B[np.triu_indices(m, 1)] == 7).all()
    expected = np.linalg.solve(np.eye(m) + N.astype(float), np.diag(c.astype(float)))
    assert_close(np.tril(B), np.tril(expected), PRECISION[dtype])


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("kind", DAMP)
@pytest.mark.parametrize("m", SIZES)
def test_mul(recursion_kernels, m, kind, dtype):
    rng = np.random.default_rng(m)
    _, D = recursion(rng, m, kind)
    D = D.astype(dtype)
    D[np.tril_indices(m, -1)] = np.nan  # not to be read
    N = np.tril((D / (np.diag(D) + m).astype(dtype)[:, None]).T, -1)
    for shape, rows in [((m,), m), ((3, m), m), ((2, m), (m + 1) // 2), ((1, m), 0)]:
        t = rng.normal(size=shape).astype(dtype)
        expected = t.astype(np.longdouble).T.copy()
        expected[:rows] = substitution(N[:rows, :rows], expected[:rows])
        D_in_use = D.copy()
        D_in_use[rows:] = D_in_use[:, rows:] = np.nan
        result = recursion_kernels.mul(rows, D_in_use, t)
        assert_close(result, expected.T, PRECISION[dtype])
        assert (result[..., rows:] == t[..., rows:]).all()


# Where the condition of A is 1e8 and more, a fresh inverse by Cholesky is off by 1e-8 too.
TOLERANCE = {"ordinary": 1e-13, "parallel": 1e-7}


def relative_error(K, shift, P, z, j):
    """By how much F⁻¹g is off, and by how much it may seem to be, as the residual e_j − Az is only
    rounding error itself."""
    A = K + shift * np.eye(len(K))
    condition = np.sqrt((np.diag(P) * np.diag(A)).sum())
    residual = np.eye(len(K))[j] - A.astype(np.longdouble) @ z
    noise = 8 * 2.0**-52 * (np.abs(A) @ np.abs(z))
    terms = 2.0**-52 * np.sqrt((z**2 * np.diag(K)).sum())
    norm = np.sqrt(z @ (K.astype(np.longdouble) @ z))
    in_solve = [np.sqrt((r**2 / np.diag(A)).sum()) for r in (residual, np.abs(residual) + noise)]
    return [condition * (terms + r) / norm for r in in_solve], condition * terms / norm


def updated(kernels, P, K, k, count, damp, limit=1.0):
    """New P and K, and z, error, accepted."""
    P, K = P.copy(), K.copy()
    return P, K, *kernels.update(P, K, k, count, damp, limit)


def assert_refused(kernels, P_old, K_old, k, j, damp, limit=1.0):
    """Nothing changes, and z is 0. Returns the error."""
    P, K, z, error, accepted = updated(kernels, P_old, K_old, k, j, damp, limit)
    assert P.tobytes() == P_old.tobytes()
    assert K.tobytes() == K_old.tobytes()
    assert (z == 0).all()
    assert accepted == 0
    return error


@pytest.mark.parametrize("kind", DAMP)
@pytest.mark.parametrize("m", SIZES)
def test_update(kernels, m, kind):
    K_old, P_old, k, j = window(np.random.default_rng(m), m, kind)
    P, K, z, error, accepted = updated(kernels, P_old, K_old, k, j + 3 * m, DAMP[kind])
    expected = K_old.copy()
    expected[j] = expected[:, j] = k
    assert accepted == 1
    assert (K == expected).all()
    assert (P == P.T).all()
    A = damped(K, kind)
    assert_close(z, column(A, j), TOLERANCE[kind])
    assert_close(P, inverse(A), TOLERANCE[kind])
    assert_close(P[j], z, 1e-15)
    (_, most), least = relative_error(K, m * DAMP[kind], P, z, j)
    assert (1 - 1e-9) * least <= error <= (1 + 1e-9) * most

    # At the limit it is accepted, beyond it nothing changes.
    again = updated(kernels, P_old, K_old, k, j, DAMP[kind], error)
    assert all(np.all(x == y) for x, y in zip(again, (P, K, z, error, 1), strict=True))
    assert assert_refused(kernels, P_old, K_old, k, j, DAMP[kind], 0.99 * error) == error


@pytest.mark.parametrize("m", [2, 40, 255])
def test_update_knows_how_far_z_is_from_solving_its_equation(kernels, m):
    rng = np.random.default_rng(m)
    K, P, k, j = window(rng, m, "ordinary")
    noise = 1 + 1e-4 * rng.normal(size=P.shape)
    P, K, z, error, accepted = updated(kernels, P * noise * noise.T, K, k, j, DAMP["ordinary"])
    assert accepted == 1
    (expected, _), least = relative_error(K, m * DAMP["ordinary"], P, z, j)
    assert expected > 1000 * least
    assert_close(error, expected, 1e-5)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_small_gradients_count_as_much_as_large_ones(kernels, scale):
    """A gradient among others of another size is exchanged with the same relative precision."""
    m, rng = 40, np.random.default_rng(0)
    K, _, k, j = window(rng, m, "ordinary")
    sizes = np.where(np.arange(m) % 2, scale, 1.0)
    K, k = K * sizes * sizes[:, None], k * sizes * sizes[j]
    damp = 1e-3 * min(1, scale) ** 2
    shift = m * damp * np.eye(m)
    P, K, z, error, _ = updated(kernels, inverse(K + shift), K, k, j, damp)
    A = K + shift
    units = np.sqrt(np.diag(A))
    assert 0 < error < 1e-12
    assert_close(z * units, column(A, j) * units, 1e-13)
    assert_close(P * units * units[:, None], inverse(A) * units * units[:, None], 1e-13)


@pytest.mark.parametrize(("kind", "m"), [("ordinary", 33), ("ordinary", 96), ("parallel", 48)])
def test_exchanges_in_a_row_stay_as_good_as_a_fresh_inverse(kernels, kind, m):
    rng = np.random.default_rng(m)
    G = gradients(rng, m, kind)
    K = G @ G.T
    P = inverse(damped(K, kind))
    for count, g in enumerate(gradients(rng, 3 * m, kind)[:, : G.shape[1]]):
        j = count % m
        G[j] = g
        P, K, z, error, _ = updated(kernels, P, K, G @ g, count, DAMP[kind])
        assert error < {"ordinary": 1e-13, "parallel": 1e-6}[kind]
    tolerance = {"ordinary": 1e-12, "parallel": 1e-6}[kind]
    assert_close(K, G @ G.T, 1e-14)
    assert_close(P, inverse(damped(K, kind)), tolerance)
    assert_close(z, column(damped(K, kind), j), tolerance)


def test_the_first_gradients_of_a_window_that_is_empty(kernels):
    m, damp, rng = 5, 1e-3, np.random.default_rng(0)
    G = np.zeros((m, 7))
    K, P = np.zeros((m, m)), np.eye(m) / (m * damp)
    for count, size in enumerate([0, 1, 1, 0, 1e-3]):  # gradients of zeros among them
        G[count] = size * rng.normal(size=7)
        P, K, z, error, accepted = updated(kernels, P, K, G @ G[count], count, damp)
        assert accepted == 1
        assert_close(z, column(K + m * damp * np.eye(m), count), 1e-13)
        assert 0 < error < 1e-13 if size else error == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_update_changes_nothing_for_a_gradient_that_is_not_finite(kernels, bad):
    K, P, k, j = window(np.random.default_rng(0), 40, "ordinary")
    k[j] = bad
    assert np.isnan(assert_refused(kernels, P, K, k, j, DAMP["ordinary"]))


@pytest.mark.parametrize("bad", [-1e6, np.nan])
def test_update_changes_nothing_without_a_positive_schur_complement(kernels, bad):
    K, P, k, j = window(np.random.default_rng(0), 40, "ordinary")
    k[j if bad < 0 else j - 1] = bad
    assert assert_refused(kernels, P, K, k, j, DAMP["ordinary"]) == np.inf


# --- windows --------------------------------------------------------------------------------------

SHAPES = [(5, 0), (1, 1), (3, 7), (9, 4099), (33, 130), (17, 9001)]
SCALED = ("float16", "float8_e4m3fn")
PLAIN = [dtype for dtype in CODES if dtype not in SCALED]  # those of compressed windows
ROUNDING = 2e-15  # of float64 sums, relative to the sum of absolute values


def decode(dtype, codes):
    """The numbers of a window, in float64."""
    if dtype == "bfloat16":
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(float)
    if dtype != "float8_e4m3fn":
        return codes.view(dtype).astype(float)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -size, size))


def encode(dtype, rng, shape):
    """Codes of random numbers, subnormal ones among them."""
    if dtype == "float8_e4m3fn":
        return (
            rng.integers(127, size=shape, dtype=np.uint8)
            | rng.integers(2, size=shape, dtype=np.uint8) << 7
        )
    numbers = rng.normal(size=shape) * np.exp2(rng.integers(-25, 8, size=shape))
    if dtype == "bfloat16":
        return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(dtype).view(CODES[dtype])


class Window:
    """A random window: codes with padding that must not be read, numbers, and where it stands."""

    def __init__(self, m, d, dtype, count, seed=0):
        self.rng = rng = np.random.default_rng([m, d, count, seed])
        self.m, self.d, self.dtype, self.count = m, d, dtype, count
        self.j, self.rows = count % m, min(count + 1, m)
        item = CODES[dtype]().itemsize
        stride = (-(-d * item // 16) + 1) * 16 // item
        self.codes = np.full((m, stride), np.iinfo(CODES[dtype]).max, CODES[dtype])  # NaN
        self.codes[: self.rows, :d] = encode(dtype, rng, (self.rows, d))
        self.scales = None
        if dtype in SCALED:
            self.scales = np.exp2(rng.integers(-9, 9, size=(m, -(-d // BLOCK)))).astype(np.float32)
        self.row, self.row_scales = encode(dtype, rng, d), None
        if self.scales is not None:
            self.row_scales = np.exp2(rng.integers(-9, 9, -(-d // BLOCK))).astype(np.float32)
        self.x = self.of_row(decode(dtype, self.row), self.row_scales).astype(real(dtype))
        self.new = self.row, self.row_scales, count

    def of_row(self, numbers, scales):
        return numbers if scales is None else numbers * scales.repeat(BLOCK)[: self.d]

    def numbers(self):
        """The rows in use (rows, d)."""
        codes = decode(self.dtype, self.codes[: self.rows, : self.d])
        scales = self.scales if self.scales is not None else [None] * self.m
        return np.stack([self.of_row(row, scales[i]) for i, row in enumerate(codes)])


def windows_of(compress):
    """Types of dense windows, and of compressed ones with this part of each gradient."""
    return [*((dtype, None) for dtype in CODES), *((dtype, compress) for dtype in PLAIN)]


def assert_sums(actual, terms, rounding=0.0):
    """Sums of float64 terms along their first axis, each rounded by `rounding` of itself."""
    exact = terms.astype(np.longdouble).sum(0)
    allowed = ROUNDING * np.abs(terms).sum(0) + rounding * np.abs(exact)
    assert (np.abs(actual - exact) <= allowed).all()


def counts(m):
    return sorted({0, m // 2, m - 1, m, 3 * m + m // 3})


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("m", "d"), SHAPES)
def test_times(kernels, m, d, dtype):
    for count in counts(m):
        w = Window(m, d, dtype, count)
        k = kernels.times(dtype, w.codes, d, w.x, count, w.scales)
        G = w.numbers()
        G[w.j] = w.x  # the row that comes, not the one that goes
        assert_sums(k[: w.rows], (G * w.x.astype(float)).T)
        assert (k[w.rows :] == 0).all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("m", "d"), SHAPES)
def test_transposed_times(kernels, m, d, dtype):
    for count in counts(m):
        for accepted in (None, 0, 1):
            w = Window(m, d, dtype, count)
            z = w.rng.normal(size=m)
            z[w.rows :] = np.nan  # not to be read
            expected = w.numbers()
            if accepted:
                expected[w.j] = w.x
            padding = w.codes[:, d:].copy()
            new = (None, None, count, None) if accepted is None else (*w.new, accepted)
            u = kernels.transposed_times(dtype, w.codes, d, z, w.scales, *new)
            assert (w.codes[:, d:][np.arange(m) != w.j] == padding[np.arange(m) != w.j]).all()
            assert (w.numbers() == expected).all()
            rounding = 0 if dtype == "float64" else 2.0**-24
            assert_sums(u, expected * z[: w.rows, None], rounding)


def test_without_a_count_all_rows_are_in_use(kernels):
    w = Window(5, 77, "float32", 4)
    z = w.rng.normal(size=5)
    u = kernels.transposed_times("float32", w.codes, 77, z)
    assert_sums(u, w.numbers() * z[:, None], 2.0**-24)


@pytest.mark.parametrize("dtype", CODES)
def test_what_is_not_finite_in_the_window_shows(kernels, dtype):
    m, d = 20, 5000
    w = Window(m, d, dtype, 2 * m)
    i, c = 11, 4321
    w.codes[i, c] = np.iinfo(CODES[dtype]).max
    k = kernels.times(dtype, w.codes, d, w.x, w.count, w.scales)
    assert (np.isnan(k) == (np.arange(m) == i)).all()
    u = kernels.transposed_times(
        dtype, w.codes, d, w.rng.normal(size=m), w.scales, None, None, w.count
    )
    assert (np.isnan(u) == (np.arange(d) == c)).all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_makes_its_product_so(kernels, dtype, bad):
    w = Window(9, 4099, dtype, 12)
    w.x[4097] = bad
    assert not np.isfinite(kernels.times(dtype, w.codes, w.d, w.x, w.count, w.scales)[w.j])


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("d", [1, 4096, 9001])
def test_a_row_with_scales_is_rounded_as_torch_does(kernels, d, dtype):
    """To the row and scales that windows make without kernels, subnormal numbers and ties among
    them."""
    torch = pytest.importorskip("torch")
    import windows

    rng = np.random.default_rng(d)
    for size in (1.0, 1e-30, 1e30, 1e-44, 0.0):
        g = rng.normal(size=d) * np.exp2(rng.integers(-30, 8, size=d))
        g[::3] = rng.integers(-240, 240, size=len(g[::3])) * 2.0**-10  # ties
        g = (size * g).astype(np.float32)
        window = windows.DenseWindow(1, d, torch.device("cpu"), getattr(torch, dtype))
        entry = window.entry(torch.from_numpy(g))
        row, scales, values = kernels.round(dtype, g)
        assert (scales == entry.row["scales"].numpy()).all()
        assert (values == entry.vectors[0].numpy()).all()
        assert (decode(dtype, row) * scales.repeat(BLOCK)[:d] == values).all()
        assert np.abs(values - g).max() <= np.abs(g).max() / 8 + 1e-38


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_of_what_is_not_finite_is_not_finite(kernels, bad, dtype):
    g = np.ones(9000, np.float32)
    g[5000] = bad
    _, scales, values = kernels.round(dtype, g)
    assert np.isnan(scales[1])
    assert np.isnan(values[BLOCK : 2 * BLOCK]).all()
    assert (values[:BLOCK] == 1).all()


class Compressed:
    """A random compressed window: the same number of entries in each whole block of columns."""

    def __init__(self, m, d, dtype, part, count, seed=0):
        self.rng = rng = np.random.default_rng([m, d, count, seed])
        self.rows, self.d, self.count = min(count + 1, m), d, count
        blocks = [
            (start, min(BLOCK, d - start), max(1, round(part * min(BLOCK, d - start))))
            for start in range(0, d, BLOCK)
        ]
        self.columns = np.empty((m, sum(kept for *_, kept in blocks)), np.int32)
        for row in self.columns:
            some = [s + np.sort(rng.choice(size, kept, False)) for s, size, kept in blocks]
            row[:] = np.concatenate([[], *some])
        self.values = encode(dtype, rng, self.columns.shape)
        self.kept = blocks[0][2] if blocks else 1
        self.m, self.j, self.dtype = m, count % m, dtype
        # The new row is another one, with columns as increasing as those of the last.
        self.row_columns = self.columns[rng.integers(m)].copy()
        self.row = encode(dtype, rng, len(self.row_columns))
        self.new = self.row_columns, self.row

    def numbers(self, with_new=False):
        """G (m, d)."""
        dense = np.zeros((self.m, self.d))
        np.put_along_axis(dense, self.columns, decode(self.dtype, self.values), 1)
        if with_new:
            dense[self.j] = 0
            dense[self.j, self.row_columns] = decode(self.dtype, self.row)
        return dense


COMPRESSED = [(5, 0, 1), (1, 1, 1), (3, 10, 0.3), (40, 4096, 0.01), (130, 9000, 0.02)]
COMPRESSED += [(300, 13000, 0.1)]


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("m", "d", "part"), COMPRESSED)
def test_sparse_times(kernels, m, d, part, dtype):
    for count, n in [(0, 2), (m // 2, 1), (m, 2)]:
        w = Compressed(m, d, dtype, part, count)
        X = w.rng.normal(size=(n, d))
        y = kernels.sparse_times(dtype, w.columns, w.values, X, count, *w.new)
        for x, row in zip(X, y, strict=True):
            assert_sums(row[: w.rows], (w.numbers(True)[: w.rows] * x).T)
        assert (y[:, w.rows :] == 0).all()


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("m", "d", "part"), COMPRESSED)
def test_sparse_replace(kernels, m, d, part, dtype):
    for count, accepted in [(0, 1), (2 * m - 1, 1), (m + m // 2, 0)]:
        w = Compressed(m, d, dtype, part, count)
        y, rounding = w.rng.normal(size=m), 0 if dtype == "float64" else 2.0**-24
        error, new_error = w.rng.normal(size=(2, d)).astype(real(dtype))
        rest = w.rng.normal(size=d)
        expected, before = w.numbers(bool(accepted)), error.copy()
        if not accepted:
            y[:] = np.nan  # as all is then
        new = *w.new, new_error, rest, 3.0, count, accepted
        u = kernels.sparse_replace(dtype, w.columns, w.values, y, error, *new)
        assert (w.numbers() == expected).all()
        assert (np.diff(w.columns[w.j]) > 0).all()
        assert (error == (new_error if accepted else before)).all()
        if accepted:
            terms = np.vstack([expected * y[:, None], rest / 3])
            assert_sums(u, terms, rounding)
        else:
            assert (u == 0).all()


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("m", "d", "part"), COMPRESSED)
def test_largest(kernels, m, d, part, dtype):
    w = Compressed(m, d, dtype, part, 0)
    k, kind = len(w.row), real(dtype)
    for digits in (20, 1):  # the second has many that are equal
        error, g = np.round(w.rng.normal(size=(2, d)), digits).astype(kind)
        a = error + g
        columns, row, new_error, X = kernels.largest(dtype, error, g, k, w.kept)
        values = decode(dtype, row)
        assert (np.diff(columns) > 0).all()
        for start, first in zip(range(0, d, BLOCK), range(0, k, w.kept), strict=True):
            size, count = np.abs(a[start : start + BLOCK]), len(row[first : first + w.kept])
            expected = np.sort(np.lexsort((np.arange(len(size)), -size))[:count])
            assert (columns[first : first + count] - start == expected).all()
        dense = np.zeros(d, kind)
        dense[columns] = values
        assert (X[0] == dense).all()
        assert (X[1] == g.astype(float) - dense).all()
        assert (new_error == a - dense).all()
        if dtype in ("float32", "float64"):
            assert (values == a[columns]).all()
        else:
            fits = np.abs(a[columns]) < 400
            assert (np.abs(values - a[columns]) <= np.abs(a[columns]) / 8)[fits].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite_are_the_largest(kernels, bad):
    error, g = np.zeros(5000, np.float32), np.ones(5000, np.float32)
    g[4500] = bad
    columns, _, _, X = kernels.largest("float32", error, g, 50, 41)
    assert 4500 in columns
    assert np.isnan(X[0, 4500])


def everything(kernels, m, dtypes=tuple(PRECISION), windows=tuple(CODES)):
    """Yields what each kernel makes of fresh random input of size m, as bytes."""
    rng = np.random.default_rng(m)
    N, D = recursion(rng, m, "ordinary")
    t = rng.normal(size=(2, m))
    for dtype in dtypes:
        yield kernels.setup(N.astype(dtype), np.eye(m, dtype=dtype)).tobytes()
        yield kernels.mul(m, D.astype(dtype), t.astype(dtype)).tobytes()
    yield from step_kernels(kernels, m, windows)


def step_kernels(kernels, m, windows=tuple(CODES)):
    """The same of what a step uses."""
    rng = np.random.default_rng(m)
    for kind in DAMP:  # with refinement and without
        K, P, k, j = window(rng, m, kind)
        results = updated(kernels, P, K, k, j, DAMP[kind])
        yield [np.asarray(result).tobytes() for result in results]
    for dtype in windows:
        yield from dense_kernels(kernels, m, dtype)
        if dtype in PLAIN:
            yield from compressed_kernels(kernels, m, dtype)


def dense_kernels(kernels, m, dtype):
    """The same for a dense window."""
    w = Window(m, 9000, dtype, m // 2)
    z = w.rng.normal(size=m)
    yield kernels.times(dtype, w.codes, w.d, w.x, w.count, w.scales).tobytes()
    yield kernels.transposed_times(dtype, w.codes, w.d, z, w.scales, *w.new, 1).tobytes()
    yield w.codes[:, : w.d].tobytes()
    if dtype in SCALED:
        g = w.rng.normal(size=5000).astype(np.float32)
        yield [x.tobytes() for x in kernels.round(dtype, g)]


def compressed_kernels(kernels, m, dtype):
    """The same for a compressed window."""
    w = Compressed(m, 5000, dtype, 0.05, m)
    X, z = w.rng.normal(size=(2, w.d)), w.rng.normal(size=m)
    error, g = X.astype(real(dtype))
    yield kernels.sparse_times(dtype, w.columns, w.values, X, m, *w.new).tobytes()
    new = *w.new, g, X[1], 2.0, w.count, 1
    yield kernels.sparse_replace(dtype, w.columns, w.values, z, error, *new).tobytes()
    yield [x.tobytes() for x in (w.columns, w.values, error)]
    yield [x.tobytes() for x in kernels.largest(dtype, error, g, len(w.row), w.kept)]


@pytest.mark.parametrize("m", [33, 300])
def test_same_input_same_bits(kernels, m):
    assert list(step_kernels(kernels, m)) == list(step_kernels(kernels, m))


def test_same_input_same_bits_for_the_recursion(recursion_kernels):
    first = list(everything(recursion_kernels, 300, windows=()))
    assert list(everything(recursion_kernels, 300, windows=())) == first


# --- on the CPU only: orders of execution, races, accesses out of bounds --------------------------


@needs_gxx
@in_one_process
@pytest.mark.parametrize("m", [33, 140])
def test_neither_the_order_of_threads_nor_the_number_of_blocks_matters(m):
    first = list(everything(OnCpu(), m))
    for seed, multiprocessors in [(2, 1), (3, 3), (4, 132)]:
        assert list(everything(OnCpu(None, multiprocessors, seed), m)) == first


@needs_gxx
@in_one_process
@pytest.mark.parametrize(("m", "doublings"), [(1, 0), (32, 0), (33, 1), (96, 2), (1024, 5)])
def test_launches(m, doublings):
    kernels = OnCpu()
    count = kernels.library.cpucuda_launches
    G, x = np.zeros((m, 8), np.uint32), np.ones(8, np.float32)
    columns = np.arange(8, dtype=np.int32) * np.ones((m, 1), np.int32)
    new = columns[0].copy(), G[0].copy()
    for call, launches in [
        (lambda: kernels.setup(np.zeros((m, m)), np.eye(m)), 1 + 2 * doublings),
        (lambda: kernels.mul(m, np.eye(m), np.ones((3, m))), 1),
        *(
            (step, 1)
            for step in [
                lambda: kernels.update(np.eye(m), np.eye(m), np.ones(m), 0, 1e-3, 1.0),
                lambda: kernels.times("float32", G, 8, x, 0),
                lambda: kernels.transposed_times("float32", G, 8, np.ones(m)),
                lambda: kernels.round("float16", x),
                lambda: kernels.largest("float32", x, x, 3, 3),
                lambda: kernels.sparse_times("float32", columns, G, np.ones((2, 8)), 0, *new),
                lambda: kernels.sparse_replace(
                    "float32", columns, G, np.ones(m), x, *new, x, np.ones(8), 1.0, 0, 1
                ),
            ]
        ),
    ]:
        before = count()
        call()
        assert count() - before == launches


@needs_gxx
@in_one_process
@pytest.mark.parametrize(("m", "multiprocessors"), [(1, 1), (33, 4), (300, 2)])
def test_no_races(m, multiprocessors):
    kernels = OnCpu(library("race"), multiprocessors)
    before = kernels.library.cpucuda_races()
    list(everything(kernels, m, [np.float32], ["bfloat16"]))
    assert kernels.library.cpucuda_races() == before


def barriers():
    """The lines of the kernels that have a barrier."""
    lines = SOURCE.read_text().splitlines()
    first = lines.index("#else")  # what is above stands in for a header
    found = [len(re.findall(r"\b(?:__sync\w+|sync)\(", line)) for line in lines[first:]]
    assert max(found) == 1
    return [i for i, count in enumerate(found, first + 1) if count]


def line_of(title):
    """Where a section of the kernels begins."""
    return 1 + next(i for i, line in enumerate(SOURCE.read_text().splitlines()) if title in line)


@needs_gxx
@in_one_process
@pytest.mark.parametrize("line", barriers())
def test_every_barrier_is_needed(line):
    """Without the barrier there is a race: so the detector sees it, and no barrier is too many.

    Threads of a warp that then go different ways end the process, so there is one for each."""
    kernels = OnCpu(library("race"))
    before = kernels.library.cpucuda_races()
    # 130: two tiles in a sum of hinv_setup, two panels in hinv_mul
    cases = everything(kernels, 130, [np.float32], ["float32"])
    if line > line_of("--- compressed windows"):
        cases = compressed_kernels(kernels, 130, "float32")
    elif line > line_of("--- hinv_times"):
        cases = dense_kernels(kernels, 130, "float32")
    elif line > line_of("--- hinv_update"):
        cases = step_kernels(kernels, 130, [])
    process = os.fork()
    if process == 0:
        seen = None
        try:
            kernels.library.cpucuda_skip(line)
            seen = any(kernels.library.cpucuda_races() > before for _ in cases)
        finally:
            os._exit({True: 1, False: 0, None: 2}[seen])
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (1, -signal.SIGABRT)


def sanitized(*command):
    """A Python process that can load the sanitized kernels."""
    preload = [
        run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, preload)):
        pytest.skip("needs g++'s address sanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "HINV_CUDA_LIBRARY": str(library("sanitized")),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@needs_gxx
@in_one_process
def test_a_barrier_that_only_some_threads_reach_aborts(tmp_path):
    source = """
#include <cuda_runtime.h>
__global__ void kernel() {
  if (threadIdx.x < 16) __syncthreads();
}
int main() {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(32);
  return cudaLaunchKernelEx(&config, kernel);
}
"""
    (tmp_path / "kernel.cu").write_text(source)
    command = ["g++", "-std=c++20", "-pthread", f"-I{HARNESS}", "-x", "c++", "kernel.cu"]
    run(*command, cwd=tmp_path)
    done = subprocess.run([tmp_path / "a.out"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "threads have returned that a barrier waits for (line 4" in done.stderr


@needs_gxx
@in_one_process
def test_no_access_out_of_bounds():
    square = "(setup or mul) and (1- or 33- or 96-) and not float64"
    update = "test_update and (1- or 33-)"
    windows = "(times or replace or largest) and not float16"
    windows += " and (5-0 or 3-7 or 3-10 or 40-4096 or 33-130 and float8)"
    cases = f"cpu and ({square} or {update} or {windows} or row_of_what)"
    options = ["--noconftest", "-p", "no:cacheprovider", "-x", "-s"]
    done = sanitized("-m", "pytest", *options, __file__, "-k", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_gxx
@in_one_process
def test_an_access_out_of_bounds_would_be_seen():
    program = """
import os, sys, numpy
sys.path.insert(0, "tests")
import kernels_on_cpu
kernels = kernels_on_cpu.OnCpu(os.environ["HINV_CUDA_LIBRARY"])
kernels.mul(33, numpy.eye(33)[:, :32].copy(), numpy.ones(33))
"""
    done = sanitized("-c", program)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


# --- two ways in ----------------------------------------------------------------------------------


@pytest.fixture
def module(caplog):
    """kernels.py, as if nobody had looked for kernels before."""
    pytest.importorskip("torch")
    module = importlib.import_module("kernels")
    module.cuda_kernels.cache_clear()
    caplog.set_level("DEBUG", logger="optim")
    yield module
    module.cuda_kernels.cache_clear()


NAMES = "setup mul update times transposed_times round largest sparse_times sparse_replace"
EXTENSION = types.SimpleNamespace(**{f"hinv_{name}": None for name in NAMES.split()})
OTHERS = types.SimpleNamespace(hinv_setup=None, hinv_mul=None)


@pytest.mark.parametrize(
    ("installed", "nvrtc", "line"),
    [
        (EXTENSION, True, "CUDA kernels: by extension"),
        (None, True, "CUDA kernels: by NVRTC; not by extension: "),
        (OTHERS, True, "has no hinv_update: it is another one, or of another version"),
        (OTHERS, False, "; not by NVRTC: RuntimeError('CUDA_ERROR_NO_DEVICE')"),
        (None, False, "CUDA kernels: none, but torch operations; not by extension: "),
    ],
)
def test_which_kernels_are_taken_is_logged_once(
    module, monkeypatch, caplog, installed, nvrtc, line
):
    import torch

    def compiled(device):
        if not nvrtc:
            raise RuntimeError("CUDA_ERROR_NO_DEVICE")
        return "compiled"

    monkeypatch.setitem(sys.modules, "hinv_cuda", installed)
    monkeypatch.setattr(module, "Compiled", compiled)
    expected = installed if line.endswith("by extension") else "compiled" if nvrtc else None
    for _ in range(2):
        assert module.cuda_kernels(torch.device("cuda", 0)) is expected
        assert module.cuda_kernels(torch.device("cpu")) is None
    assert len(caplog.records) == 1
    assert line in caplog.text


@needs_gxx
@in_one_process
@pytest.mark.parametrize("kind", DAMP)
@pytest.mark.parametrize(("dtype", "compress"), windows_of(0.3))
def test_the_optimizer_takes_the_kernels(monkeypatch, dtype, compress, kind):
    """The results of torch operations in float64, in a window that is filled, exchanged, damped
    anew, and given a gradient that is not finite."""
    torch = pytest.importorskip("torch")
    import optim

    m, on_cpu = 12, KernelsOnCpu()
    G = torch.tensor(gradients(np.random.default_rng(0), 3 * m, kind), dtype=torch.float32)
    plain, fisher = (
        optim.DynamicInverseFisher(
            m, G.shape[1], 100 * DAMP[kind], dtype=getattr(torch, dtype), compress=compress
        )
        for _ in range(2)
    )
    for i, g in enumerate(G):
        results = []
        for one, kernels in ((plain, None), (fisher, on_cpu)):
            for module in ("windows", "coefficients"):
                monkeypatch.setattr(f"{module}.cuda_kernels", lambda _, found=kernels: found)
            if i == 20:
                one.damp = 200 * DAMP[kind]
            results.append(one.update_matvec(g).double())
            if i == 15:
                with pytest.raises(optim.NonFiniteGradientError):
                    one.update(g * torch.nan)
            if i % m == 0:  # cancels, as g is in the window
                results[-1] = torch.stack([results[-1], one.matvec(g).double()])
        error = (results[0] - results[1]).norm(dim=-1)
        assert (error <= 2e-5 * results[0].norm(dim=-1)).all()
    assert on_cpu.calls >= 3 * 3 * m


@needs_gxx
@in_one_process
@pytest.mark.parametrize(("dtype", "compress"), windows_of(0.01))
def test_a_step_is_few_launches_however_many_parameters_there_are(monkeypatch, dtype, compress):
    """Operations that make a view or memory, or ask for a type, launch nothing."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    import optim

    quiet = "view", "slice", "select", "unbind", "as_strided", "detach", "alias", "squeeze"
    quiet += "record_function", "lift_fresh", "empty", "promote_types", "local_scalar"
    quiet += ("fill_",)  # in the stand-in
    found = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            if not any(word in operation.name() for word in quiet):
                found.append(operation.name())
            return operation(*arguments, **(keywords or {}))

    on_cpu, launches = KernelsOnCpu(), {}
    for module in ("windows", "coefficients"):
        monkeypatch.setattr(f"{module}.cuda_kernels", lambda _: on_cpu)
    for count in (1, 30):
        params = [torch.nn.Parameter(torch.randn(3000 // count)) for _ in range(count)]
        optimizer = optim.MFAC(
            params, momentum=0.9, ngrads=4, damp=1.0, window_dtype=dtype, compress=compress
        )
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        found.clear()
        before = on_cpu.calls
        with Count():
            optimizer.step()
        launches[count] = len(found) + on_cpu.calls - before
    assert launches[1] == launches[30] <= (19 if compress else 12), found


@pytest.fixture
def nvrtc():
    pytest.importorskip("torch")
    bindings = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        bindings.nvrtcVersion()
    except RuntimeError:  # the library is not there
        pytest.skip("needs NVRTC")
    return bindings


def test_nvrtc_compiles_without_a_gpu_and_once(module, nvrtc, monkeypatch, tmp_path):
    architecture = 120  # below, nvcc compiles for others
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    symbols, binary = module.compiled(architecture)
    assert len(symbols) == 1 + 2 * len(CODES) + len(SCALED) + 3 * len(PLAIN)
    assert binary[:4] == b"\x7fELF"
    assert all(symbol.encode() in binary for symbol in symbols.values())
    assert len(list((tmp_path / "mfac").iterdir())) == 1
    monkeypatch.setattr(module, "_compile", None)
    assert module.compiled(architecture) == (symbols, binary)


def test_a_cache_that_cannot_be_written_or_read_is_none(module, nvrtc, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_compile", lambda *_: ({"exchange": "e"}, b"binary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    assert module.compiled(90) == ({"exchange": "e"}, b"binary")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module.compiled(90)
    (kept,) = (tmp_path / "mfac").iterdir()
    kept.write_bytes(b"damaged")
    assert module.compiled(90) == ({"exchange": "e"}, b"binary")


def test_nvrtc_says_what_is_wrong(module, nvrtc):
    with pytest.raises(RuntimeError, match=r"hinv_cuda_kernel\.cu\(1\): error"):
        module._compile(nvrtc, b"nonsense", "--gpu-architecture=sm_90")


class Driver:
    """Stands for cuda.bindings.driver: runs what is launched on the CPU, from its raw arguments."""

    def __init__(self, library):
        self.library = library

    def cuLaunchKernel(self, function, *shape_and_arguments):
        return self._run(function, shape_and_arguments[8])

    def cuLaunchCooperativeKernel(self, function, *shape_and_arguments):
        assert shape_and_arguments[0] <= 4
        return self._run(function, shape_and_arguments[8])

    def _run(self, function, arguments):
        values, kinds = arguments
        name, dtype = function
        launcher = getattr(self.library, "hinv_" + name)
        converted = [kind(value) for value, kind in zip(values, kinds, strict=True)]
        return (launcher(*([FORMATS[dtype]] if dtype else []), *converted, None),)


@needs_gxx
@in_one_process
@pytest.mark.parametrize("dtype", CODES)
def test_launches_through_the_driver_have_the_arguments_of_the_kernels(module, monkeypatch, dtype):
    """Those of the launchers in C, so these are what runs: the same bits as through them."""
    import torch

    on_cpu = OnCpu()
    kernels = module.Compiled.__new__(module.Compiled)
    kernels.driver, kernels.device = Driver(on_cpu.library), torch.device("cpu")
    launchers = {"exchange": "update", "round_row": "round", "largest_entries": "largest"}
    names = {kind: str(name).removeprefix("torch.") for name, kind in module.FORMATS.items()}
    kernels.functions = {}
    for key in module.KERNELS:
        kernel, _, kind = key.rstrip(">").partition("<")
        launcher = launchers.get(kernel, kernel.removeprefix("window_"))
        kernels.functions[key] = (launcher, names.get(kind)), 4
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    through_driver = list(step_kernels(OnGpu(kernels, "cpu"), 33, [dtype]))
    assert through_driver == list(step_kernels(on_cpu, 33, [dtype]))
    assert kernels.hinv_transposed_times(torch.ones(3, 0), torch.ones(3).double()).shape == (0,)


# --- on a GPU only --------------------------------------------------------------------------------


@pytest.mark.cuda(gpus=2)
@pytest.mark.parametrize("way", ["extension", "nvrtc"])
def test_another_device(way):
    import torch

    results = [list(step_kernels(OnGpu(on_a_gpu(way, i), f"cuda:{i}"), 300)) for i in (0, 1)]
    assert torch.cuda.current_device() == 0
    assert results[0] == results[1]


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["extension", "nvrtc"])
def test_the_current_stream(way):
    import torch

    interface = on_a_gpu(way)
    G = torch.randn(5, 64, device="cuda")
    z = torch.randn(5, device="cuda", dtype=torch.float64)
    expected = interface.hinv_transposed_times(G, z)
    late = torch.zeros_like(z)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)  # a kernel on another stream would run before the copy
        late.copy_(z)
        result = interface.hinv_transposed_times(G, late)
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


class Step:
    """The step of a dense window and the products of a compressed one, on the device alone."""

    def __init__(self, kernels, device):
        import torch

        self.kernels, self.device = kernels, torch.device(device)
        self.m, self.d, damp = 4, 100, 1e-3
        self.damp = torch.tensor(damp, dtype=torch.float64, device=device)
        zeros = functools.partial(torch.zeros, device=device)
        self.G = zeros(self.m, 112, dtype=torch.bfloat16)[:, : self.d]
        self.K = zeros(self.m, self.m, dtype=torch.float64)
        self.P = torch.eye(self.m, dtype=torch.float64, device=device) / (self.m * damp)
        self.count, self.accepted = zeros((), dtype=torch.int64), zeros((), dtype=torch.int64)
        self.z, self.error = zeros(self.m, dtype=torch.float64), zeros(1, dtype=torch.float64)
        self.columns = torch.arange(0, self.d, 5, device=device).int().repeat(self.m, 1)

    def __call__(self, g):
        """F⁻¹g, and the products of a compressed window with it."""
        row = g.to(self.G.dtype)
        k = self.kernels.hinv_times(self.G, row.float(), self.count)
        outputs = self.z, self.error, self.accepted
        self.kernels.hinv_update(self.P, self.K, k, self.count, self.damp, 1e-5, *outputs)
        new = row, None, self.count, self.accepted
        u = self.kernels.hinv_transposed_times(self.G, self.z, None, *new)
        self.count += self.accepted
        values, columns = self.G[:, ::5].contiguous(), self.columns[0].clone()
        new = columns, row[::5].contiguous()
        X = row.double()[None]
        y = self.kernels.hinv_sparse_times(self.columns, values, X, self.count, *new)
        return u, y


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["extension", "nvrtc"])
def test_graph_capture(way):
    """A captured step replayed over more than a window gives the bits of eager steps."""
    import torch

    interface = on_a_gpu(way)
    gradients = torch.randn(13, 100, device="cuda")
    gradients[7, 3] = torch.nan
    eager, captured = Step(interface, "cuda"), Step(interface, "cuda")
    expected = [[t.clone() for t in eager(g)] for g in gradients]
    g = gradients[0].clone()
    captured(g)  # warm up
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        outputs = captured(g)
    for new, results in zip(gradients[1:], expected[1:], strict=True):
        g.copy_(new)
        graph.replay()
        for actual, result in zip(outputs, results, strict=True):
            assert torch.equal(actual, result)
    for name in ("G", "P", "K", "count"):
        assert torch.equal(getattr(eager, name), getattr(captured, name))
    assert eager.count == len(gradients) - 1


@pytest.mark.cuda
def test_arguments_are_checked(gpu):
    import torch

    matrix, t = torch.eye(4, device="cuda"), torch.ones(4, device="cuda")
    big, vector, count = matrix.double(), t.double(), torch.zeros((), device="cuda").long()

    def update(K=None, count=count, damp=big[0, 0], z=None, error=None):
        K = big.clone() if K is None else K
        z = vector.clone() if z is None else z
        error = vector[:1].clone() if error is None else error
        accepted = count.clone()
        gpu.hinv_update(big, K, vector, count, damp, 1e-5, z, error, accepted)

    def times(G=matrix, x=t, count=count, scales=None):
        gpu.hinv_times(G, x, count, scales)

    def sparse_times(columns, X):
        gpu.hinv_sparse_times(columns, matrix, X, count, columns[0].int(), t)

    def transposed_times(z=vector, **arguments):
        gpu.hinv_transposed_times(matrix, z, **arguments)

    for message, call in [
        ("coef is on cpu", lambda: gpu.hinv_setup(matrix, matrix.cpu())),
        (r"tmp has shape \(3, 4\)", lambda: gpu.hinv_setup(matrix[:3], matrix)),
        ("tmp is Half", lambda: gpu.hinv_setup(matrix.half(), matrix.half())),
        ("coef is Double; it must be Float", lambda: gpu.hinv_setup(matrix, big)),
        ("coef has shape", lambda: gpu.hinv_setup(matrix, torch.eye(3, device="cuda"))),
        (
            "tmp is not contiguous",
            lambda: gpu.hinv_setup(torch.ones(4, 8, device="cuda")[:, ::2], matrix),
        ),
        ("share memory", lambda: gpu.hinv_setup(matrix, matrix)),
        ("rows is 5", lambda: gpu.hinv_mul(5, matrix, t)),
        ("t has shape", lambda: gpu.hinv_mul(4, matrix, t[:3])),
        ("t has shape", lambda: gpu.hinv_mul(4, matrix, t[None, None])),
        ("K is Float", lambda: update(K=matrix)),
        ("damp is Float", lambda: update(damp=matrix[0, 0])),
        ("count is Int", lambda: update(count=count.int())),
        ("error has shape", lambda: update(error=vector.clone())),
        ("share memory", lambda: update(z=vector)),
        ("G is Int", lambda: times(G=matrix.int())),
        ("G has shape", lambda: times(G=t)),
        ("G has strides", lambda: times(G=torch.ones(4, 5, device="cuda")[:, :4])),
        ("G has strides", lambda: times(G=matrix[:, 1:], x=t[1:])),
        (r"x has shape \(3,\); it must be \(4,\)", lambda: times(x=t[:3])),
        ("count is on cpu", lambda: times(count=count.cpu())),
        ("scales has shape", lambda: times(scales=torch.ones(4, 2, device="cuda"))),
        ("z is Float", lambda: transposed_times(z=t)),
        ("without count and accepted", lambda: transposed_times(row=t)),
        ("row is Double", lambda: transposed_times(row=vector, count=count, accepted=count)),
        ("G is Float; it must be float16", lambda: gpu.hinv_round(t, matrix)),
        ("g is Double", lambda: gpu.hinv_round(vector, matrix.half())),
        ("kept is 3", lambda: gpu.hinv_largest(t, t, matrix[:, :2].contiguous(), 3)),
        ("columns is Long", lambda: sparse_times(matrix.long(), matrix.double())),
        ("X has shape", lambda: sparse_times(matrix.int(), matrix.double())),
        ("X is Float", lambda: sparse_times(matrix.int(), matrix[:2])),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def trained(torch, device, steps=20, **options):
    """Weights after steps of MFAC on a small network, the optimizer, and what makes a step."""
    import optim

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    inputs, targets = torch.randn(steps, 12, 8), torch.randint(3, (steps, 12))
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    optimizer = optim.MFAC(
        model.parameters(), lr=0.05, momentum=0.9, ngrads=6, damp=1e-2, **options
    )

    def step(i):
        optimizer.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(model(inputs[i]), targets[i]).backward()
        optimizer.step()

    for i in range(steps - 1):
        step(i)
    return list(model.parameters()), optimizer, lambda: step(steps - 1)


@pytest.mark.cuda
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_on_the_gpu_is_that_on_the_cpu_and_waits_for_nothing(gpu, masked):
    import torch

    options = {}
    if masked:
        generator = torch.Generator().manual_seed(1)
        shapes = ((16, 8), (16,), (3, 16), (3,))
        options["sparse"] = [torch.rand(s, generator=generator) > 0.5 for s in shapes]
    expected, _, step = trained(torch, "cpu", **options)
    step()
    with torch.cuda.stream(torch.cuda.Stream()):
        weights, optimizer, step = trained(torch, "cuda", **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.skipped_steps == 0
        for p, reference in zip(weights, expected, strict=True):
            torch.testing.assert_close(p.cpu(), reference, rtol=1e-4, atol=1e-5)
