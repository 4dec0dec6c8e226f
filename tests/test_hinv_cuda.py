"""The CUDA kernels: executed on the CPU by tests/cuda_on_cpu, and on a GPU where there is one.

Arrays are numpy's, so that the same cases run in a process without torch: the sanitizers need one.
"""

import copy
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "tests" / "cuda_on_cpu"
SOURCE = ROOT / "hinv_cuda_kernel.cu"

SIZES = [1, 2, 31, 32, 33, 64, 96, 255, 256, 1024]
PRECISION = {np.float32: 2e-6, np.float64: 1e-14}
needs_gxx = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"
)
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


# --- the kernels, on the CPU and on a GPU ---------------------------------------------------------


def pointer(array):
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class OnCpu:
    """The kernels in a library built with the headers of tests/cuda_on_cpu."""

    def __init__(self, path, multiprocessors=4, seed=1):
        self.library = ctypes.CDLL(str(path))
        self.library.cpucuda_multiprocessors(multiprocessors)
        self.library.cpucuda_seed(seed)

    def _call(self, name, *arguments):
        error = getattr(self.library, name)(*arguments, None)
        assert error == 0, f"{name} returned CUDA error {error}"

    def setup(self, tmp, coef):
        coef = coef.copy()
        scratch = np.full(len(tmp) ** 2 // 4, np.nan, tmp.dtype)
        name = "hinv_setup_float" if tmp.dtype == np.float32 else "hinv_setup_double"
        self._call(name, pointer(tmp), pointer(coef), pointer(scratch), len(tmp))
        return coef

    def mul(self, rows, D, t):
        t = t.copy()
        name = "hinv_mul_float" if D.dtype == np.float32 else "hinv_mul_double"
        self._call(name, pointer(D), pointer(t), len(D), rows, t.size // len(D))
        return t

    def update(self, P, K, k, j, damp):
        P, K, z, health = P.copy(), K.copy(), np.full(len(k), np.nan), np.full(3, np.nan)
        self.update_in_place(P, K, k, j, damp, z, health)
        return P, K, z, health

    def update_in_place(self, P, K, k, j, damp, z, health):
        m, scratch = len(k), np.full(4 * len(k), np.nan)
        matrices, outputs = map(pointer, (P, K, k)), map(pointer, (z, health, scratch))
        self._call("hinv_update_double", *matrices, m, j, ctypes.c_double(damp), *outputs)


class OnGpu:
    """The kernels through the extension, on `device`."""

    def __init__(self, extension, device="cuda"):
        self.extension, self.device = extension, device

    def _tensors(self, *arrays):
        import torch

        return [torch.tensor(a, device=self.device) for a in arrays]

    def setup(self, tmp, coef):
        tmp, coef = self._tensors(tmp, coef)
        assert self.extension.hinv_setup(tmp, coef) is coef
        return coef.cpu().numpy()

    def mul(self, rows, D, t):
        D, t = self._tensors(D, t)
        assert self.extension.hinv_mul(rows, D, t) is t
        return t.cpu().numpy()

    def update(self, P, K, k, j, damp):
        z, health = np.full(len(k), np.nan), np.full(3, np.nan)
        P, K, k, z, health = self._tensors(P, K, k, z, health)
        self.extension.hinv_update(P, K, k, j, damp, z, health)
        return tuple(x.cpu().numpy() for x in (P, K, z, health))


FLAGS = {
    "plain": ["-O2"],
    "race": ["-O1", "-g", "-fsanitize=thread"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}


def run(*command, **keywords):
    """Runs a command and returns what it printed; fails with that where the command does."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keywords
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """library(kind): the kernels built for the CPU: plain, race (with the detector), sanitized."""

    @cache
    def build(kind):
        directory = tmp_path_factory.mktemp(kind)
        compiler = ["g++", "-std=c++20", "-fPIC", "-pthread", f"-I{HARNESS}"]
        compiler += ["-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
        objects = [directory / "kernels.o"]
        run(*compiler, *FLAGS[kind], "-x", "c++", "-c", SOURCE, "-o", objects[0])
        if kind == "race":
            objects.append(directory / "racecheck.o")
            run(*compiler, "-O2", "-c", HARNESS / "racecheck.cpp", "-o", objects[1])
        link = FLAGS[kind] if kind == "sanitized" else []
        run(*compiler, *link, "-shared", *objects, "-o", directory / "kernels.so")
        return directory / "kernels.so"

    return build


@pytest.fixture(scope="module")
def gpu():
    """The extension, where there is a GPU to run it on."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    import coefficients
    import setup_cuda

    extension = setup_cuda.load()
    coefficients._extension.cache_clear()  # it may have looked before
    return extension


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=needs_gxx),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def kernels(request):
    """What runs the kernels: the same cases on the CPU and on a GPU."""
    if request.param == "cuda":
        return OnGpu(request.getfixturevalue("gpu"))
    prebuilt = os.environ.get("HINV_CUDA_LIBRARY")
    return OnCpu(prebuilt or request.getfixturevalue("library")("plain"))


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
def test_setup(kernels, m, kind, dtype):
    rng = np.random.default_rng(m)
    N, _ = recursion(rng, m, kind)
    N = N.astype(dtype)
    c = rng.uniform(0.5, 2, size=m).astype(dtype) / dtype(DAMP[kind])
    # What must not be read is NaN, what must not be written is 7.
    tmp = np.where(np.tri(m, k=-1, dtype=bool), N, dtype(np.nan))
    coef = np.where(np.tri(m, k=-1, dtype=bool), dtype(np.nan), dtype(7))
    np.fill_diagonal(coef, c)
    B = kernels.setup(tmp, coef)
    assert (B[np.triu_indices(m, 1)] == 7).all()
    expected = np.linalg.solve(np.eye(m) + N.astype(float), np.diag(c.astype(float)))
    assert_close(np.tril(B), np.tril(expected), PRECISION[dtype])


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("kind", DAMP)
@pytest.mark.parametrize("m", SIZES)
def test_mul(kernels, m, kind, dtype):
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
        result = kernels.mul(rows, D_in_use, t)
        assert_close(result, expected.T, PRECISION[dtype])
        assert (result[..., rows:] == t[..., rows:]).all()


# Where the condition of A is 1e8 and more, a fresh inverse by Cholesky is off by 1e-8 too.
TOLERANCE = {"ordinary": 1e-13, "parallel": 1e-7}


@pytest.mark.parametrize("kind", DAMP)
@pytest.mark.parametrize("m", SIZES)
def test_update(kernels, m, kind):
    K_old, P_old, k, j = window(np.random.default_rng(m), m, kind)
    P, K, z, (s, residual, condition) = kernels.update(P_old, K_old, k, j, DAMP[kind])
    expected = K_old.copy()
    expected[j] = expected[:, j] = k
    assert (K == expected).all()
    assert (P == P.T).all()
    A = damped(K, kind)
    truth = column(A, j)
    assert_close(z, truth, TOLERANCE[kind])
    assert_close(P, inverse(A), TOLERANCE[kind])
    assert_close(P[j], z, 1e-15)
    assert_close(s, 1 / truth[j], TOLERANCE[kind])
    assert 0 <= residual <= TOLERANCE[kind]
    assert_close(condition, (np.diag(P) * np.diag(A)).max(), 1e-14)


@pytest.mark.parametrize("m", [1, 40, 255])
def test_update_reports_the_residual_of_what_it_returns(kernels, m):
    rng = np.random.default_rng(m)
    K, P, k, j = window(rng, m, "ordinary")
    noise = 1 + 1e-3 * rng.normal(size=P.shape)
    _, K, z, health = kernels.update(P * noise * noise.T, K, k, j, DAMP["ordinary"])
    A = damped(K, "ordinary")
    residual = np.abs(np.eye(m)[j] - A @ z) * np.sqrt(A[j, j] / np.diag(A))
    assert m == 1 or residual.max() > 1e-9  # at m = 1 the old P does not matter
    assert abs(health[1] - residual.max()) <= 1e-14


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_small_gradients_count_as_much_as_large_ones(kernels, scale):
    """A gradient among others of another size is exchanged with the same relative precision."""
    m, rng = 40, np.random.default_rng(0)
    K, _, k, j = window(rng, m, "ordinary")
    sizes = np.where(np.arange(m) % 2, scale, 1.0)
    K, k = K * sizes * sizes[:, None], k * sizes * sizes[j]
    damp = 1e-3 * min(1, scale) ** 2
    shift = m * damp * np.eye(m)
    P, K, z, (_, residual, _) = kernels.update(inverse(K + shift), K, k, j, damp)
    A = K + shift
    units = np.sqrt(np.diag(A))
    assert 0 <= residual <= 1e-13
    assert_close(z * units, column(A, j) * units, 1e-13)
    assert_close(P * units * units[:, None], inverse(A) * units * units[:, None], 1e-13)


@pytest.mark.parametrize(("kind", "m"), [("ordinary", 33), ("ordinary", 96), ("parallel", 48)])
def test_exchanges_in_a_row_stay_as_good_as_a_fresh_inverse(kernels, kind, m):
    rng = np.random.default_rng(m)
    G = gradients(rng, m, kind)
    K = G @ G.T
    P = inverse(damped(K, kind))
    for step, g in enumerate(gradients(rng, 3 * m, kind)[:, : G.shape[1]]):
        j = step % m
        G[j] = g
        P, K, z, health = kernels.update(P, K, G @ g, j, DAMP[kind])
        assert health[1] <= {"ordinary": 1e-13, "parallel": 1e-7}[kind]
    tolerance = {"ordinary": 1e-9, "parallel": 1e-6}[kind]
    assert_close(K, G @ G.T, 1e-14)
    assert_close(P, inverse(damped(K, kind)), tolerance)
    assert_close(z, column(damped(K, kind), j), tolerance)


@pytest.mark.parametrize("bad", [-1e6, np.nan, np.inf])
def test_update_without_a_positive_schur_complement_cannot_go_unnoticed(kernels, bad):
    K, P, k, j = window(np.random.default_rng(0), 40, "ordinary")
    k_bad = k.copy()
    k_bad[j] = bad
    P, K, z, health = kernels.update(P, K, k_bad, j, DAMP["ordinary"])
    assert not 0 < health[0] < np.inf
    for step in range(2):
        assert np.isnan(P).all()
        assert (z == 0).all()
        assert np.isnan(health[1:]).all()
        # A good gradient afterwards changes nothing of that: P has to be computed anew.
        P, K, z, health = kernels.update(P, K, k, (j + step) % 40, DAMP["ordinary"])
        assert np.isnan(health[0])


class Extension:
    """hinv_cuda as coefficients.py calls it, for tensors on the CPU."""

    def __init__(self, kernels):
        self.kernels, self.calls = kernels, 0

    def hinv_setup(self, tmp, coef):
        self.calls += 1
        coef.numpy()[:] = self.kernels.setup(tmp.numpy(), coef.numpy())

    def hinv_update(self, P, K, k, j, damp, z, health):
        self.calls += 1
        P, K, k, z, health = (x.numpy() for x in (P, K, k, z, health))
        self.kernels.update_in_place(P, K, k, j, damp, z, health)


@needs_gxx
@pytest.mark.parametrize("kind", DAMP)
@pytest.mark.parametrize("coefficients", ["incremental", "paper"])
def test_the_optimizer_takes_the_kernels(library, monkeypatch, coefficients, kind):
    """The same results as torch operations, in a window that is filled, exchanged, refactored,
    damped anew, and given a gradient that is not finite; checks are read late, as on a GPU."""
    torch = pytest.importorskip("torch")
    import optim

    m = 12
    G = torch.tensor(gradients(np.random.default_rng(0), 3 * m, kind), dtype=torch.float32)
    plain = optim.DynamicInverseFisher(m, G.shape[1], DAMP[kind], coefficients=coefficients)
    fisher = copy.deepcopy(plain)
    fisher.lazy = True
    extension = Extension(OnCpu(library("plain")))
    used = {True: lambda device: extension, False: lambda device: None}
    for i, g in enumerate(G):
        results = []
        for one in (plain, fisher):
            monkeypatch.setattr("coefficients.cuda_kernels", used[one is fisher])
            if i == 20:
                one.damp = 2 * DAMP[kind]
            results.append(one.update_matvec(g))
            if one is fisher and i == 15:
                one.update(g * torch.nan)
        if fisher.accepted == 1:  # while it does not know yet how parallel they are, it waits
            torch.testing.assert_close(
                *results, rtol=1e-4, atol=1e-4 * float(results[0].abs().max())
            )
        else:
            assert i < 3 and kind == "parallel"
        if i == 15:
            with pytest.raises(optim.NonFiniteGradientError):
                fisher.settle()
    assert extension.calls >= 3 * m - 4


def test_which_way_the_coefficients_go_is_logged_once(monkeypatch, caplog):
    pytest.importorskip("torch")
    import torch

    import coefficients

    caplog.set_level("DEBUG", logger="optim")
    try:
        for installed in (None, types.SimpleNamespace(__file__="there")):
            monkeypatch.setitem(sys.modules, "hinv_cuda", installed)
            coefficients._extension.cache_clear()
            assert coefficients.cuda_kernels(torch.device("cpu")) is None
            for _ in range(2):
                assert coefficients.cuda_kernels(torch.device("cuda")) is installed
    finally:
        coefficients._extension.cache_clear()
    ways = [record.message.split(":")[0] for record in caplog.records]
    assert ways == [
        "the (m, m) side runs on torch operations",
        "the (m, m) side runs on the kernels of there",
    ]


def everything(kernels, m, dtypes=tuple(PRECISION)):
    """Yields what each kernel makes of fresh random input of size m, as bytes."""
    rng = np.random.default_rng(m)
    N, D = recursion(rng, m, "ordinary")
    t = rng.normal(size=(2, m))
    for dtype in dtypes:
        yield kernels.setup(N.astype(dtype), np.eye(m, dtype=dtype)).tobytes()
        yield kernels.mul(m, D.astype(dtype), t.astype(dtype)).tobytes()
    for kind in DAMP:  # with refinement and without
        K, P, k, j = window(rng, m, kind)
        yield [result.tobytes() for result in kernels.update(P, K, k, j, DAMP[kind])]


@pytest.mark.parametrize("m", [33, 300])
def test_same_input_same_bits(kernels, m):
    assert list(everything(kernels, m)) == list(everything(kernels, m))


# --- on the CPU only: orders of execution, races, accesses out of bounds --------------------------


@needs_gxx
@pytest.mark.parametrize("m", [33, 300])
def test_neither_the_order_of_threads_nor_the_number_of_blocks_matters(library, m):
    path = library("plain")
    first = list(everything(OnCpu(path), m))
    for seed, multiprocessors in [(2, 1), (3, 2), (4, 3), (5, 16), (6, 132)]:
        assert list(everything(OnCpu(path, multiprocessors, seed), m)) == first


@needs_gxx
@pytest.mark.parametrize(("m", "doublings"), [(1, 0), (32, 0), (33, 1), (96, 2), (1024, 5)])
def test_launches(library, m, doublings):
    kernels = OnCpu(library("plain"))
    count = kernels.library.cpucuda_launches
    for call, launches in [
        (lambda: kernels.setup(np.zeros((m, m)), np.eye(m)), 1 + 2 * doublings),
        (lambda: kernels.mul(m, np.eye(m), np.ones((3, m))), 1),
        (lambda: kernels.update(np.eye(m), np.eye(m), np.ones(m), 0, 1e-3), 1),
    ]:
        before = count()
        call()
        assert count() - before == launches


@needs_gxx
@pytest.mark.parametrize(("m", "multiprocessors"), [(1, 1), (33, 4), (130, 1), (130, 4), (300, 2)])
def test_no_races(library, m, multiprocessors):
    kernels = OnCpu(library("race"), multiprocessors)
    before = kernels.library.cpucuda_races()
    list(everything(kernels, m, [np.float32]))
    assert kernels.library.cpucuda_races() == before


def barriers():
    """The lines of the kernels that have a barrier."""
    lines = SOURCE.read_text().splitlines()
    found = [
        (i, len(re.findall(r"\b(?:__sync\w+|sync)\(", line))) for i, line in enumerate(lines, 1)
    ]
    assert all(count <= 1 for _, count in found)
    return [i for i, count in found if count == 1]


@needs_gxx
@pytest.mark.parametrize("line", barriers())
def test_every_barrier_is_needed(library, line):
    """Without the barrier there is a race: so the detector sees it, and no barrier is too many."""
    kernels = OnCpu(library("race"))
    before = kernels.library.cpucuda_races()
    kernels.library.cpucuda_skip(line)
    # 130: two tiles in a sum of hinv_setup, two panels in hinv_mul
    seen = any(
        kernels.library.cpucuda_races() > before for _ in everything(kernels, 130, [np.float32])
    )
    kernels.library.cpucuda_skip(0)
    assert seen


def sanitized(library, *command):
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
def test_no_access_out_of_bounds(library):
    cases = "(test_setup or test_mul or test_update) and cpu and ordinary and not 1024 and not 25"
    done = sanitized(
        library,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-x",
        __file__,
        "-k",
        cases,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_gxx
def test_an_access_out_of_bounds_would_be_seen(library):
    program = """
import os, numpy, tests.test_hinv_cuda as t
kernels = t.OnCpu(os.environ["HINV_CUDA_LIBRARY"])
kernels.mul(33, numpy.eye(33)[:, :32].copy(), numpy.ones(33))
"""
    done = sanitized(library, "-c", program)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


# --- the build ------------------------------------------------------------------------------------


@needs_nvcc
def test_nvcc_compiles_without_warnings_and_spills(tmp_path):
    newest = max(int(n) for n in re.findall(r"compute_(\d+)", run("nvcc", "--list-gpu-arch")))
    report = run(
        *["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-c", SOURCE],
        *["-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-o", tmp_path / "kernels.o"],
        *["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"],
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    )
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(spills) == report.count("Compiling entry function")
    assert set(spills) == {("0", "0")}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project in which `python setup_cuda.py build_ext --inplace` has run."""
    torch = pytest.importorskip("torch")
    version = torch.version.cuda or "none"
    if f"release {version.split('.')[0]}." not in run("nvcc", "--version"):
        pytest.skip(f"needs the nvcc of torch's CUDA version, {version}")
    directory = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("[!.]*"):
        if path.is_file():
            shutil.copy(path, directory)
    shutil.copytree(ROOT / "models", directory / "models")
    in_project(directory, "setup_cuda.py", "build_ext", "--inplace")
    return directory


def in_project(directory, *arguments):
    quickly = {"TORCH_CUDA_ARCH_LIST": "9.0", "CFLAGS": "-O0", "CXXFLAGS": "-O0"}
    environment = {**os.environ, **quickly, "MFAC_CUDA": "1"}
    return run(sys.executable, *arguments, cwd=directory, env=environment)


@needs_nvcc
def test_the_extension_builds_and_is_importable_without_a_gpu(project):
    program = """
import torch, hinv_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

def message(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)

matrix, vector = torch.eye(3), torch.ones(3)
expected = "tmp is on cpu; hinv_cuda works on CUDA tensors"
assert expected in message(hinv_cuda.hinv_setup, matrix, matrix)
assert expected in message(torch.ops.hinv_cuda.hinv_setup, matrix, matrix)
assert "D is on cpu" in message(hinv_cuda.hinv_mul, 3, matrix, vector)
double = matrix.double()
arguments = double, double, vector, 0, 1e-3, vector, vector
assert "P is on cpu" in message(hinv_cuda.hinv_update, *arguments)
for name in ("hinv_setup", "hinv_mul", "hinv_update"):
    assert name in hinv_cuda.__doc__

def halve_and_multiply(D, t):
    t = t / 2
    torch.ops.hinv_cuda.hinv_mul(3, D, t)
    return t + 1

with FakeTensorMode():
    D, t = torch.empty(3, 3, device="cuda"), torch.empty(3, device="cuda")
    compiled = torch.compile(halve_and_multiply, fullgraph=True, backend="aot_eager")
    assert compiled(D, t).device.type == "cuda"
print("all is well")
"""
    assert "all is well" in in_project(project, "-c", program)


def test_the_gpu_benchmark_runs_without_a_gpu_too(tmp_path):
    pytest.importorskip("torch")
    figures = tmp_path / "figures.json"
    table = run(
        *[sys.executable, ROOT / "benchmarks" / "gpu_step.py", "--device", "cpu", "--rounds", "1"],
        *["--m", "8", "--d", "100", "--json", figures],
    )
    assert "| 8 | 100 | " in table
    times = json.loads(figures.read_text())["m = 8, d = 100"]
    assert len(times) == 5
    assert all(t > 0 for t in times.values())


def test_gpu_check_says_what_is_missing():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu_check.sh"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "gpu_check.sh: torch sees no CUDA device; run this on a machine with a GPU\n"
    )


# --- on a GPU only --------------------------------------------------------------------------------


@pytest.mark.cuda
def test_another_device(gpu):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    results = [list(everything(OnGpu(gpu, device), 300)) for device in ("cuda:0", "cuda:1")]
    assert torch.cuda.current_device() == 0
    assert results[0] == results[1]


@pytest.mark.cuda
def test_the_current_stream(gpu):
    import torch

    m = 300
    _, D = recursion(np.random.default_rng(0), m, "ordinary")
    D = torch.tensor(D, device="cuda")
    t = torch.ones(m, device="cuda", dtype=torch.float64)
    expected = gpu.hinv_mul(m, D, t.clone())
    result = torch.zeros_like(t)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)  # a kernel on another stream would run before the copy
        result.copy_(t)
        gpu.hinv_mul(m, D, result)
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.cuda
def test_graph_capture(gpu):
    import torch

    m, rng = 300, np.random.default_rng(0)
    K, P, k, j = (torch.tensor(a, device="cuda") for a in window(rng, m, "ordinary"))
    start = P.clone(), K.clone()
    z, health = torch.empty(m, device="cuda", dtype=torch.float64), torch.empty_like(k[:3])
    gpu.hinv_update(P, K, k, int(j), DAMP["ordinary"], z, health)
    expected = [x.clone() for x in (P, K, z, health)]
    row = int(j)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        P.copy_(start[0])
        K.copy_(start[1])
        gpu.hinv_update(P, K, k, row, DAMP["ordinary"], z, health)
    for x in (P, K, z, health):
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip((P, K, z, health), expected, strict=True))


@pytest.mark.cuda
def test_arguments_are_checked(gpu):
    import torch

    matrix, t = torch.eye(4, device="cuda"), torch.ones(4, device="cuda")
    big, vector = matrix.double(), t.double()

    def update(j=0, damp=1e-3, z=None, health=None):
        z = vector.clone() if z is None else z
        health = vector[:3].clone() if health is None else health
        gpu.hinv_update(big, big.clone(), vector, j, damp, z, health)

    for message, call in [
        ("coef is on cpu", lambda: gpu.hinv_setup(matrix, matrix.cpu())),
        ("tmp has shape", lambda: gpu.hinv_setup(matrix[:3], matrix)),
        ("tmp is Half", lambda: gpu.hinv_setup(matrix.half(), matrix.half())),
        ("they must be of one type", lambda: gpu.hinv_setup(matrix, big)),
        ("coef has shape", lambda: gpu.hinv_setup(matrix, torch.eye(3, device="cuda"))),
        (
            "tmp is not contiguous",
            lambda: gpu.hinv_setup(torch.ones(4, 8, device="cuda")[:, ::2], matrix),
        ),
        ("share memory", lambda: gpu.hinv_setup(matrix, matrix)),
        ("rows is 5", lambda: gpu.hinv_mul(5, matrix, t)),
        ("t has shape", lambda: gpu.hinv_mul(4, matrix, t[:3])),
        ("t has shape", lambda: gpu.hinv_mul(4, matrix, t[None, None])),
        ("P is Float", lambda: gpu.hinv_update(matrix, matrix, t, 0, 1e-3, t, t[:3])),
        ("j is 4", lambda: update(j=4)),
        ("damp is 0", lambda: update(damp=0.0)),
        ("health has shape", lambda: update(health=vector.clone())),
        ("share memory", lambda: update(z=vector)),
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
@pytest.mark.parametrize("coefficients", ["incremental", "paper"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_on_the_gpu_is_that_on_the_cpu_and_waits_for_nothing(gpu, coefficients, masked):
    import torch

    options = {"coefficients": coefficients}
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


@pytest.mark.cuda
def test_graph_capture_of_a_step(gpu):
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weights, optimizer, step = trained(torch, "cuda")
        optimizer.fisher.settle()
        twin, _, twin_step = trained(torch, "cuda")
        graph = torch.cuda.CUDAGraph()
        before = [p.detach().clone() for p in weights]
        with torch.cuda.graph(graph, stream=stream):
            step()
        for p, value in zip(weights, before, strict=True):
            assert torch.equal(p, value)  # captured, not run
        graph.replay()
        twin_step()
        for p, other in zip(weights, twin, strict=True):
            torch.testing.assert_close(p, other)
