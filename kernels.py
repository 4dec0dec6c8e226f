"""Loads the CUDA kernels of hinv_cuda_kernel.cu for a device, in one of two ways.

If the extension hinv_cuda is installed, it is used. Otherwise NVRTC compiles the same file at first
use, which takes ten seconds, and the result stays on disk. NVRTC and `cuda.bindings` come with
torch's CUDA builds. If neither works, torch operations do the same. A debug line of the logger
`optim` says which of the three is in use.

hinv_cuda.cpp documents the functions. They run on the current stream and never wait for it, so a
CUDA graph can capture them. Numbers that change with each step (`count`, `accepted`) are on the
device.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import tempfile
from ctypes import c_double, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import setup_cuda

__all__ = ["cuda_kernels"]

logger = logging.getLogger("optim")

SOURCE = Path(__file__).with_name("hinv_cuda_kernel.cu")
# As in the source: types of windows, threads of a block, a block's share of G, scratch memory.
FORMATS = {
    torch.float32: "Float32",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
    torch.float64: "Float64",
    torch.float8_e4m3fn: "Float8",
}
WITHOUT_SCALES, WITH_SCALES = ("Float32", "BFloat16", "Float64"), ("Float16", "Float8")
KERNELS = {  # and the types they are compiled for: compressed windows have no scales
    **dict.fromkeys(("window_times", "window_transposed_times"), WITHOUT_SCALES + WITH_SCALES),
    **dict.fromkeys(("sparse_times", "sparse_replace", "largest_entries"), WITHOUT_SCALES),
    "round_row": WITH_SCALES,
}
THREADS, BYTES, SPARSE_COLUMNS, BLOCK = 256, 512, 512, 4096
SCRATCH, SPARSE_PARTS = 2**16, 128
TOGETHER = "exchange", "window_times", "sparse_times"  # these call grid.sync()


@functools.cache
def cuda_kernels(device: torch.device) -> Any:
    """An object with the functions of `Compiled` for a CUDA device; None if there are none."""
    if device.type != "cuda":
        return None
    try:
        extension = setup_cuda.installed()
        logger.debug("CUDA kernels: from %s", extension.__file__)
        return extension
    except ImportError as error:  # not installed, another module, or built for another torch
        why = error
    try:
        kernels = Compiled(device)
    except Exception as error:  # torch operations do the same, whatever is wrong
        logger.debug("CUDA kernels: none (%s; NVRTC: %r), torch operations instead", why, error)
        return None
    logger.debug("CUDA kernels: compiled by NVRTC (%s)", why)
    return kernels


class Compiled:
    """The functions of the extension for a window on `device`, compiled by NVRTC. Raises whatever
    keeps them from running."""

    def __init__(self, device: torch.device):
        driver = importlib.import_module("cuda.bindings.driver")
        properties = torch.cuda.get_device_properties(device)
        symbols, binary = compiled(10 * properties.major + properties.minor)
        self.driver, self.device = driver, device
        self.functions: dict[str, Any] = {}
        self.resident: dict[str, int] = {}  # number of blocks that the device holds at once
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # creates the context, into which modules are loaded
            module = _checked(driver.cuModuleLoadData(binary))
            for name, symbol in symbols.items():
                function = _checked(driver.cuModuleGetFunction(module, symbol.encode()))
                blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, 0)
                self.functions[name] = function
                self.resident[name] = _checked(blocks) * properties.multi_processor_count

    # As in hinv_cuda.cpp, which has the types.

    def hinv_update(self, P, K, k, count, damp, tolerance, z, error, accepted):  # type: ignore
        m, scratch = len(k), k.new_empty(5 * len(k))
        inputs = P, K, k, count, damp, m, float(tolerance)
        self._launch("exchange", -(-m * 32 // THREADS), *inputs, z, error, accepted, scratch)

    def hinv_times(self, G, x, count, scales=None):  # type: ignore
        k = count.new_empty(len(G), dtype=torch.float64)
        scratch = k.new_empty(max(SCRATCH, len(G)))
        name, sizes = f"window_times<{FORMATS[G.dtype]}>", (*G.shape, G.stride(0))
        self._launch(name, SCRATCH, G, x, count, scales, *sizes, scratch, k)
        return k

    def hinv_transposed_times(  # type: ignore
        self, G, z, scales=None, row=None, row_scales=None, count=None, accepted=None
    ):
        real = torch.float64 if G.dtype == torch.float64 else torch.float32
        u, blocks = G.new_empty(G.shape[1], dtype=real), -(-G.shape[1] * G.itemsize // BYTES)
        name, sizes = f"window_transposed_times<{FORMATS[G.dtype]}>", (*G.shape, G.stride(0))
        self._launch(name, blocks, G, z, scales, row, row_scales, count, accepted, *sizes, u)
        return u

    def hinv_round(self, g, G):  # type: ignore
        d, blocks = len(g), -(-len(g) // BLOCK)
        row, scales, values = g.new_empty(d, dtype=G.dtype), g.new_empty(blocks), g.new_empty(d)
        self._launch(f"round_row<{FORMATS[G.dtype]}>", blocks, g, d, row, scales, values)
        return row, scales, values

    def hinv_largest(self, error, g, values, kept):  # type: ignore
        d, k = len(error), values.shape[1]
        columns, row = values.new_empty(k, dtype=torch.int32), values.new_empty(k)
        new_error, X = torch.empty_like(error), error.new_empty(2, d, dtype=torch.float64)
        name, outputs = f"largest_entries<{FORMATS[values.dtype]}>", (columns, row, new_error, X)
        self._launch(name, -(-d // BLOCK), error, g, kept, k, d, *outputs)
        return outputs

    def hinv_sparse_times(self, columns, values, X, count, row_columns, row):  # type: ignore
        (m, k), (n, d) = values.shape, X.shape
        y = count.new_empty(n, m, dtype=torch.float64)
        scratch = y.new_empty(SPARSE_PARTS * n * m)
        name, new = f"sparse_times<{FORMATS[values.dtype]}>", (row_columns, row, count)
        self._launch(name, SCRATCH, columns, values, X, *new, n, m, k, d, scratch, y)
        return y

    def hinv_sparse_replace(self, columns, values, y, error, row_columns, row, *more):  # type: ignore
        """`more`: new_error, rest, damp, count, accepted."""
        u, sizes = torch.empty_like(error), (*values.shape, len(error))
        name, blocks = f"sparse_replace<{FORMATS[values.dtype]}>", -(-len(u) // SPARSE_COLUMNS)
        self._launch(name, blocks, columns, values, y, row_columns, row, error, *more, *sizes, u)
        return u

    def _launch(self, name: str, blocks: int, *arguments: Tensor | float | None) -> None:
        """Launches a kernel. Its parameters are pointers, integers and doubles."""
        values = tuple(
            a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments
        )
        types = tuple(c_double if isinstance(v, float) else c_longlong for v in values)
        together = name.startswith(TOGETHER)
        blocks = min(blocks, self.resident[name]) if together else max(blocks, 1)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            launch = self.functions[name], blocks, 1, 1, THREADS, 1, 1, 0, stream, (values, types)
            if together:
                _checked(self.driver.cuLaunchCooperativeKernel(*launch))
            else:
                _checked(self.driver.cuLaunchKernel(*launch, 0))


def compiled(architecture: int) -> tuple[dict[str, str], bytes]:
    """The kernels for 10 times a compute capability, from the cache if possible: the symbol of each
    kernel in the binary, and the binary."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    source = SOURCE.read_bytes()
    key = repr((source, architecture, _checked(nvrtc.nvrtcVersion())))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mfac")
    kept = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    with contextlib.suppress(OSError, ValueError):
        header, binary = kept.read_bytes().split(b"\n", 1)
        return json.loads(header), binary
    symbols, binary = _compile(nvrtc, source, f"--gpu-architecture=sm_{architecture}")
    with contextlib.suppress(OSError):  # without a writable folder there is no cache
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(json.dumps(symbols).encode() + b"\n" + binary)
        os.replace(file.name, kept)
    return symbols, binary


def _compile(nvrtc: Any, source: bytes, option: str) -> tuple[dict[str, str], bytes]:
    names = ["exchange", *(f"{name}<{type}>" for name in KERNELS for type in KERNELS[name])]
    program = _checked(nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], []))
    for name in names:
        _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    flags = [b"--std=c++17", option.encode()]
    if nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    symbols = [_checked(nvrtc.nvrtcGetLoweredName(program, name.encode())) for name in names]
    binary = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return dict(zip(names, (s.decode() for s in symbols), strict=True)), bytes(binary)


def _checked(result: tuple) -> Any:
    """The values that a function of cuda.bindings returns after its status. Raises RuntimeError if
    the status is not 0."""
    status, *values = result
    if status:
        raise RuntimeError(str(status))
    return values[0] if len(values) == 1 else tuple(values)
