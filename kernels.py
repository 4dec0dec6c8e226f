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
import math
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
WITHOUT_SCALES = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float64: "Float64"}
WITH_SCALES = {torch.float16: "Float16", torch.float8_e4m3fn: "Float8"}
FORMATS = WITHOUT_SCALES | WITH_SCALES
DENSE = "window_times", "window_transposed_times"
SPARSE = "sparse_times", "sparse_replace", "largest_entries"  # for compressed windows
KERNELS = ["exchange", *(f"round_row<{x}>" for x in WITH_SCALES.values())]
KERNELS += [f"{name}<{x}>" for name in DENSE for x in FORMATS.values()]
KERNELS += [f"{name}<{x}>" for name in SPARSE for x in WITHOUT_SCALES.values()]
THREADS, BYTES, SPARSE_COLUMNS, BLOCK = 256, 512, 512, 4096
SCRATCH, SPARSE_PARTS = 2**16, 128
TOGETHER = "exchange", "window_times", "sparse_times"  # with grid.sync(): all blocks resident


@functools.cache
def cuda_kernels(device: torch.device) -> Any:
    """An object with the functions of `Compiled` for a CUDA device; None if there are none."""
    if device.type != "cuda":
        return None
    failed = ""
    for way in ("extension", "NVRTC"):
        try:
            kernels: Any = setup_cuda.installed() if way == "extension" else Compiled(device)
            logger.debug("CUDA kernels: by %s%s", way, failed)
            return kernels
        except Exception as error:  # torch operations do the same, whatever is wrong
            failed += f"; not by {way}: {error!r}"
    logger.debug("CUDA kernels: none, but torch operations%s", failed)
    return None


class Compiled:
    """The functions of the extension for a window on `device`, compiled by NVRTC. Raises whatever
    keeps them from running."""

    def __init__(self, device: torch.device):
        driver = importlib.import_module("cuda.bindings.driver")
        properties = torch.cuda.get_device_properties(device)
        symbols, binary = compiled(10 * properties.major + properties.minor)
        self.driver, self.device = driver, device
        self.functions: dict[str, tuple[Any, int]] = {}  # and the blocks that the device holds
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # creates the context, into which modules are loaded
            module = _checked(driver.cuModuleLoadData(binary))
            for name, symbol in symbols.items():
                function = _checked(driver.cuModuleGetFunction(module, symbol.encode()))
                blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, 0)
                resident = _checked(blocks) * properties.multi_processor_count
                self.functions[name] = function, resident

    # As in hinv_cuda.cpp, which has the types.

    def hinv_update(self, P, K, k, count, damp, tolerance, z, error, accepted):  # type: ignore
        m, scratch = len(k), k.new_empty(5 * len(k))
        given = P, K, k, count, damp, m, float(tolerance)
        self._launch("exchange", None, m * 32 / THREADS, *given, z, error, accepted, scratch)

    def hinv_times(self, G, x, count, scales=None):  # type: ignore
        k = count.new_empty(len(G), dtype=torch.float64)
        given = G, x, count, scales, *G.shape, G.stride(0)
        self._launch("window_times", G, SCRATCH, *given, k.new_empty(max(SCRATCH, len(G))), k)
        return k

    def hinv_transposed_times(self, G, z, scales=None, *new):  # type: ignore
        """`new`: row, row_scales, count, accepted."""
        u = z.new_empty(G.shape[1], dtype=z.dtype if G.dtype == z.dtype else torch.float32)
        given = G, z, scales, *(new or 4 * [None]), *G.shape, G.stride(0)
        self._launch("window_transposed_times", G, len(u) * G.itemsize / BYTES, *given, u)
        return u

    def hinv_round(self, g, G):  # type: ignore
        d, blocks = len(g), math.ceil(len(g) / BLOCK)
        outputs = g.new_empty(d, dtype=G.dtype), g.new_empty(blocks), g.new_empty(d)
        self._launch("round_row", G, blocks, g, d, *outputs)
        return outputs

    def hinv_largest(self, error, g, values, kept):  # type: ignore
        d, k = len(error), values.shape[1]
        outputs = values.new_empty(k, dtype=torch.int32), values.new_empty(k)
        outputs += torch.empty_like(error), error.new_empty(2, d, dtype=torch.float64)
        self._launch("largest_entries", values, d / BLOCK, error, g, kept, k, d, *outputs)
        return outputs

    def hinv_sparse_times(self, columns, values, X, count, row_columns, row):  # type: ignore
        (m, k), (n, d) = values.shape, X.shape
        y = X.new_empty(n, m)
        given = columns, values, X, row_columns, row, count, n, m, k, d
        self._launch("sparse_times", values, SCRATCH, *given, y.new_empty(SPARSE_PARTS * n * m), y)
        return y

    def hinv_sparse_replace(self, columns, values, y, error, row_columns, row, *more):  # type: ignore
        """`more`: new_error, rest, damp, count, accepted."""
        u = torch.empty_like(error)
        given = columns, values, y, row_columns, row, error, *more, *values.shape, len(u)
        self._launch("sparse_replace", values, len(u) / SPARSE_COLUMNS, *given, u)
        return u

    def _launch(self, name: str, window: Tensor | None, blocks: float, *arguments: Any) -> None:
        """Launches a kernel, of the type of a window. Its parameters are pointers, integers and
        doubles; None is a null pointer."""
        kernel = name if window is None else f"{name}<{FORMATS[window.dtype]}>"
        (function, resident), blocks = self.functions[kernel], max(1, math.ceil(blocks))
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments)
        types = tuple(c_double if isinstance(v, float) else c_longlong for v in values)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            block = THREADS, 1, 1, 0, stream, (values, types)
            if name in TOGETHER:
                launch = self.driver.cuLaunchCooperativeKernel
                _checked(launch(function, min(blocks, resident), 1, 1, *block))
            else:
                _checked(self.driver.cuLaunchKernel(function, blocks, 1, 1, *block, 0))


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
    program = _checked(nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], []))
    for name in KERNELS:
        _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    flags = [b"--std=c++17", option.encode()]
    if nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    symbols = [_checked(nvrtc.nvrtcGetLoweredName(program, name.encode())) for name in KERNELS]
    binary = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return dict(zip(KERNELS, (s.decode() for s in symbols), strict=True)), bytes(binary)


def _checked(result: tuple) -> Any:
    """The values that a function of cuda.bindings returns after its status. Raises RuntimeError if
    the status is not 0."""
    status, *values = result
    if status:
        raise RuntimeError(str(status))
    return values[0] if len(values) == 1 else tuple(values)
