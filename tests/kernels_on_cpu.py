"""The CUDA kernels on the CPU: hinv_cuda_kernel.cu, built with the headers of cuda_on_cpu.

`OnCpu` calls them with numpy arrays, in a process without torch too. `KernelsOnCpu` is what
`kernels.cuda_kernels` returns for tensors on the CPU, so that optimizers run through the kernels:

    on_cpu = KernelsOnCpu()
    for module in ("windows", "coefficients"):
        monkeypatch.setattr(f"{module}.cuda_kernels", lambda device: on_cpu)
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HARNESS = Path(__file__).parent / "cuda_on_cpu"
SOURCE = Path(__file__).parents[1] / "hinv_cuda_kernel.cu"
FLAGS = {
    "plain": ["-O2"],
    "race": ["-O1", "-g1", "-fsanitize=thread"],
    "sanitized": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
BLOCK = 4096  # columns with a scale, or with their share of a compressed row

# The types of windows: the bits of a number as numpy has them, and their number for the kernels.
CODES = {
    "float32": np.uint32,
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float64": np.uint64,
    "float8_e4m3fn": np.uint8,
}
FORMATS = {name: number for number, name in enumerate(CODES)}


def run(*command, **keywords):
    """Runs a command and returns what it printed; fails with that where the command does."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keywords
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}"
    return done.stdout


_directory = functools.cache(lambda: tempfile.TemporaryDirectory())  # until the process ends


@functools.cache
def library(kind="plain"):
    """The kernels built for the CPU: plain, race (with the detector), sanitized."""
    directory = Path(_directory().name)
    compiler = ["g++", "-std=c++20", "-fPIC", "-pthread", f"-I{HARNESS}"]
    compiler += ["-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
    objects = [directory / f"{kind}.o"]
    run(*compiler, *FLAGS[kind], "-x", "c++", "-c", SOURCE, "-o", objects[0])
    if kind == "race":
        objects.append(directory / "racecheck.o")
        run(*compiler, "-O2", "-c", HARNESS / "racecheck.cpp", "-o", objects[1])
    link = FLAGS[kind] if kind == "sanitized" else []
    run(*compiler, *link, "-shared", *objects, "-o", directory / f"{kind}.so")
    return directory / f"{kind}.so"


def pointer(array):
    if array is None:
        return None
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def real(dtype):
    """The type of vectors for a window of `dtype`."""
    return np.float64 if dtype == "float64" else np.float32


class OnCpu:
    """The kernels of a library, for numpy arrays. A window is an array of codes and its `dtype`."""

    def __init__(self, path=None, multiprocessors=4, seed=1):
        self.library = ctypes.CDLL(str(path or library()))
        self.library.cpucuda_multiprocessors(multiprocessors)
        self.library.cpucuda_seed(seed)

    def _call(self, name, *arguments):
        converted = [pointer(a) if a is None or isinstance(a, np.ndarray) else a for a in arguments]
        error = getattr(self.library, name)(*converted, None)
        assert error == 0, f"{name} returned CUDA error {error}"

    def setup(self, tmp, coef):
        coef = coef.copy()
        scratch = np.full(len(tmp) ** 2 // 4, np.nan, tmp.dtype)
        name = "hinv_setup_float" if tmp.dtype == np.float32 else "hinv_setup_double"
        self._call(name, tmp, coef, scratch, len(tmp))
        return coef

    def mul(self, rows, D, t):
        t = t.copy()
        name = "hinv_mul_float" if D.dtype == np.float32 else "hinv_mul_double"
        self._call(name, D, t, len(D), rows, t.size // len(D))
        return t

    def update(self, P, K, k, count, damp, tolerance):
        """In place. Returns z, error and accepted."""
        m = len(k)
        z, error, accepted = np.full(m, np.nan), np.full(1, np.nan), np.array(7, np.int64)
        matrices, scratch = (P, K, k, np.array(count, np.int64)), np.full(5 * m, np.nan)
        numbers = np.array(float(damp)), m, ctypes.c_double(tolerance)
        self._call("hinv_update", *matrices, *numbers, z, error, accepted, scratch)
        return z, error[0], int(accepted)

    def times(self, dtype, G, d, x, count, scales=None):
        """G (m, stride) of codes, of which d columns count."""
        m, stride = G.shape
        k, scratch = np.full(m, np.nan), np.full(max(65536, m), np.nan)
        sizes = m, ctypes.c_longlong(d), ctypes.c_longlong(stride)
        count = np.array(count, np.int64)
        self._call("hinv_times", FORMATS[dtype], G, x, count, scales, *sizes, scratch, k)
        return k

    def transposed_times(
        self, dtype, G, d, z, scales=None, row=None, row_scales=None, count=None, accepted=None
    ):
        """Row count % m of G, and of the scales, in place."""
        m, stride = G.shape
        u = np.full(d, np.nan, real(dtype))
        sizes = m, ctypes.c_longlong(d), ctypes.c_longlong(stride)
        count, accepted = (None if a is None else np.array(a, np.int64) for a in (count, accepted))
        arguments = G, z, scales, row, row_scales, count, accepted, *sizes, u
        self._call("hinv_transposed_times", FORMATS[dtype], *arguments)
        return u

    def round(self, dtype, g):
        row, values = np.empty(len(g), CODES[dtype]), np.full(len(g), np.nan, np.float32)
        scales = np.full(-(-len(g) // BLOCK), np.nan, np.float32)
        arguments = g, ctypes.c_longlong(len(g)), row, scales, values
        self._call("hinv_round", FORMATS[dtype], *arguments)
        return row, scales, values

    def largest(self, dtype, error, g, k, kept):
        d, kind = len(g), real(dtype)
        columns, row = np.full(k, -1, np.int32), np.empty(k, CODES[dtype])
        new_error, X = np.full(d, np.nan, kind), np.full((2, d), np.nan)
        sizes = kept, ctypes.c_longlong(k), ctypes.c_longlong(d)
        arguments = error, g, *sizes, columns, row, new_error, X
        self._call("hinv_largest", FORMATS[dtype], *arguments)
        return columns, row, new_error, X

    def sparse_times(self, dtype, columns, values, X, count, row_columns, row):
        (m, k), (n, d) = columns.shape, X.shape
        y, scratch = np.full((n, m), np.nan), np.full(128 * n * m, np.nan)
        sizes = n, m, ctypes.c_longlong(k), ctypes.c_longlong(d)
        new = row_columns, row, np.array(count, np.int64)
        self._call(
            "hinv_sparse_times", FORMATS[dtype], columns, values, X, *new, *sizes, scratch, y
        )
        return y

    def sparse_replace(
        self, dtype, columns, values, y, error, row_columns, row, new_error, rest, damp, *when
    ):
        """Row count % m of columns and values, and error, in place; `when` is count, accepted."""
        numbers = (np.array(n, np.int64) for n in when)
        new = row_columns, row, error, new_error, rest, np.array(float(damp)), *numbers
        (m, k), d = columns.shape, len(error)
        u = np.full(d, np.nan, real(dtype))
        sizes = m, ctypes.c_longlong(k), ctypes.c_longlong(d)
        arguments = columns, values, y, *new, *sizes, u
        self._call("hinv_sparse_replace", FORMATS[dtype], *arguments)
        return u


class KernelsOnCpu:
    """What `kernels.cuda_kernels` returns, for tensors on the CPU. `calls` counts."""

    def __init__(self, on_cpu=None):
        self.on_cpu, self.calls = on_cpu or OnCpu(), 0

    def hinv_setup(self, tmp, coef):
        self.calls += 1
        coef.numpy()[:] = self.on_cpu.setup(tmp.numpy(), coef.numpy())
        return coef

    def hinv_update(self, P, K, k, count, damp, tolerance, z, error, accepted):
        self.calls += 1
        arrays = P.numpy(), K.numpy(), k.numpy()
        z.numpy()[:], error.numpy()[:], done = self.on_cpu.update(
            *arrays, int(count), damp, tolerance
        )
        accepted.fill_(done)

    def hinv_times(self, G, x, count, scales=None):
        self.calls += 1
        dtype, codes, d = _codes(G)
        result = self.on_cpu.times(dtype, codes, d, _vector(x), int(count), _vector(scales))
        return _tensor(result)

    def hinv_transposed_times(
        self, G, z, scales=None, row=None, row_scales=None, count=None, accepted=None
    ):
        self.calls += 1
        dtype, codes, d = _codes(G)
        count, accepted = (None if n is None else int(n) for n in (count, accepted))
        row = None if row is None else _codes(row[None])[1][0]
        vectors = z.numpy(), _vector(scales), row, _vector(row_scales)
        return _tensor(self.on_cpu.transposed_times(dtype, codes, d, *vectors, count, accepted))

    def hinv_round(self, g, G):
        self.calls += 1
        row, scales, values = self.on_cpu.round(_name(G), _vector(g))
        return _tensor(row, G.dtype), _tensor(scales), _tensor(values)

    def hinv_largest(self, error, g, values, kept):
        self.calls += 1
        vectors = error.numpy(), _vector(g)
        columns, row, *dense = self.on_cpu.largest(_name(values), *vectors, values.shape[1], kept)
        return _tensor(columns), _tensor(row, values.dtype), *map(_tensor, dense)

    def hinv_sparse_times(self, columns, values, X, count, row_columns, row):
        self.calls += 1
        dtype, codes, _ = _codes(values)
        new = int(count), row_columns.numpy(), _codes(row[None])[1][0]
        return _tensor(self.on_cpu.sparse_times(dtype, columns.numpy(), codes, X.numpy(), *new))

    def hinv_sparse_replace(
        self, columns, values, y, error, row_columns, row, new_error, rest, damp, count, accepted
    ):
        self.calls += 1
        dtype, codes, _ = _codes(values)
        arrays = columns.numpy(), codes, y.numpy(), error.numpy(), row_columns.numpy()
        new = _codes(row[None])[1][0], new_error.numpy(), _vector(rest), damp
        return _tensor(self.on_cpu.sparse_replace(dtype, *arrays, *new, int(count), int(accepted)))


def _codes(G):
    """Type, codes (m, stride) in the tensor's memory, and d of a window on the CPU."""
    import torch

    (m, d), stride = G.shape, G.stride(0)
    assert G.device.type == "cpu"
    assert G.stride(1) == 1
    whole = torch.as_strided(G, (m, stride), (stride, 1))
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[G.element_size()]
    return _name(G), whole.view(integer).numpy().view(CODES[_name(G)]), d


def _name(x):
    return str(x.dtype).removeprefix("torch.")


def _vector(x):
    return None if x is None else x.contiguous().numpy()


def _tensor(array, dtype=None):
    import torch

    if dtype is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"int{8 * array.itemsize}")).view(dtype)
