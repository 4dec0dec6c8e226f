"""The CUDA kernels of hinv_cuda_kernel.cu for one device: one source, two ways in.

Where the extension hinv_cuda is installed, it is taken. Elsewhere the same file is compiled at first
use with NVRTC, which torch's CUDA builds bring along with `cuda.bindings`; that takes some seconds
and is kept on disk. Where neither works, `cuda_kernels` is None, and torch operations do the same.

m gradients of d weights are the rows of the window G (m, d). All tensors are on one device; nothing
here waits for it, and everything can be captured in a CUDA graph. Numbers that change with each step
(`count`, `accepted`) are int64 tensors on the device; row j = count % m is the one that changes.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import tempfile
from ctypes import c_double, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["cuda_kernels"]

logger = logging.getLogger("optim")

SOURCE = Path(__file__).with_name("hinv_cuda_kernel.cu")
FUNCTIONS = ["update", "times", "transposed_times", "sparse_times", "sparse_transposed_times"]
FORMATS = {
    torch.float32: "Float32",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
    torch.float64: "Float64",
    torch.float8_e4m3fn: "Float8",
}
# As in the source.
THREADS, WARPS = 256, 8
SCRATCH = 2**16  # numbers, for the sums of a product's items
LANES, SPARSE_COLUMNS, SPARSE_PARTS = 32, 512, 128
KERNELS = ["window_times", "window_transposed_times", "sparse_times", "sparse_transposed_times"]


def cuda_kernels(device: torch.device) -> Any:
    """The kernels for a CUDA device, as an object with the functions of `Compiled`; None where
    there are none.

    Example:
        >>> cuda_kernels(torch.device("cpu")) is None
        True
    """
    if device.type != "cuda":
        return None
    return _kernels(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _kernels(index: int) -> Any:
    extension, why = _extension()
    if extension:
        logger.debug("CUDA kernels: those of %s", extension.__file__)
        return extension
    try:
        kernels = Compiled(index)
    except Exception as error:  # whatever it is, torch operations do the same
        logger.debug("CUDA kernels: none, torch operations instead: %s; NVRTC: %r", why, error)
        return None
    logger.debug("CUDA kernels: compiled by NVRTC for device %d, as %s", index, why)
    return kernels


def _extension() -> tuple[Any, str]:
    """The extension, or None and why."""
    try:
        module = importlib.import_module("hinv_cuda")
    except ImportError as error:
        return None, str(error)
    if not all(hasattr(module, f"hinv_{name}") for name in FUNCTIONS):
        return None, f"{getattr(module, '__file__', module)} is another module of that name"
    return module, ""


class Compiled:
    """The kernels, compiled by NVRTC for device `index`. Raises whatever keeps them from running."""

    def __init__(self, index: int):
        from cuda.bindings import driver

        self.driver, self.device = driver, torch.device("cuda", index)
        device = torch.cuda.get_device_properties(index)
        names, binary = compiled(10 * device.major + device.minor)
        self.functions, self.resident = {}, {}
        with torch.cuda.device(index):
            torch.cuda.synchronize()  # so that there is a context
            module = _checked(driver.cuModuleLoadData(binary))
            for name, symbol in names.items():
                function = _checked(driver.cuModuleGetFunction(module, symbol.encode()))
                blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, 0)
                self.functions[name] = function
                self.resident[name] = _checked(blocks) * device.multi_processor_count

    def hinv_update(
        self,
        P: Tensor,
        K: Tensor,
        k: Tensor,
        count: Tensor,
        damp: float,
        tolerance: float,
        z: Tensor,
        error: Tensor,
        accepted: Tensor,
    ) -> None:
        """Exchanges row and column j of K for k (m,), and P = (K + m·damp·I)⁻¹ with it, in place.

        z (m,) becomes column j of P, error (1,) the relative error of Gᵀz, and accepted () 1. Where
        the error exceeds `tolerance`, or k_j is not finite, nothing changes: z and accepted are 0.
        """
        m, scratch = len(k), k.new_empty(5 * len(k))
        numbers = m, float(damp), float(tolerance)
        blocks = -(-m // WARPS)
        self._launch(
            "exchange",
            blocks,
            P,
            K,
            k,
            count,
            *numbers,
            z,
            error,
            accepted,
            scratch,
            together=True,
        )

    def hinv_times(
        self, G: Tensor, x: Tensor, count: Tensor, scales: Tensor | None = None
    ) -> Tensor:
        """k = Gx (m,) in float64 over the first min(count + 1, m) rows, the others 0, k_j = xᵀx."""
        (m, d), stride = G.shape, G.stride(0)
        k, scratch = (count.new_empty(n, dtype=torch.float64) for n in (m, max(SCRATCH, m)))
        name = f"window_times<{FORMATS[G.dtype]}>"
        arguments = G, x, count, scales, m, d, stride, scratch, k
        self._launch(name, SCRATCH, *arguments, together=True)
        return k

    def hinv_transposed_times(
        self,
        G: Tensor,
        z: Tensor,
        scales: Tensor | None = None,
        factor: float = 1.0,
        x: Tensor | None = None,
        count: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> Tensor:
        """factor·Gᵀz (d,), rounded once, after row j has become x / scale where accepted is 1."""
        (m, d), stride = G.shape, G.stride(0)
        u = torch.empty(d, dtype=_real(G.dtype), device=G.device)
        blocks = -(-d // (LANES * (16 // G.element_size())))
        name = f"window_transposed_times<{FORMATS[G.dtype]}>"
        arguments = G, z, scales, float(factor), x, count, accepted, m, d, stride, u
        self._launch(name, blocks, *arguments)
        return u

    def hinv_sparse_times(
        self, columns: Tensor, values: Tensor, X: Tensor, count: Tensor
    ) -> Tensor:
        """XGᵀ (n, m) in float64 over the rows in use, for X (n, d), n ≤ 2, and a compressed G."""
        (m, k), (n, d) = values.shape, X.shape
        y = count.new_empty(n, m, dtype=torch.float64)
        scratch = y.new_empty(SPARSE_PARTS * n * m)
        arguments = columns, values, X, count, n, m, k, d, scratch, y
        name = f"sparse_times<{FORMATS[values.dtype]}>"
        self._launch(name, SCRATCH, *arguments, together=True)
        return y

    def hinv_sparse_transposed_times(
        self, columns: Tensor, values: Tensor, y: Tensor, d: int
    ) -> Tensor:
        """Gᵀy (d,) for a compressed G."""
        m, k = values.shape
        u = torch.empty(d, dtype=_real(values.dtype), device=y.device)
        name = f"sparse_transposed_times<{FORMATS[values.dtype]}>"
        self._launch(name, -(-d // SPARSE_COLUMNS), columns, values, y, m, k, d, u)
        return u

    def _launch(
        self, name: str, blocks: int, *arguments: Tensor | float | None, together: bool = False
    ) -> None:
        """Kernels take pointers, integers and doubles; `together`: they meet in grid.sync()."""
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments)
        types = tuple(c_double if isinstance(v, float) else c_longlong for v in values)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            shape = min(blocks, self.resident[name]) if together else blocks, 1, 1, THREADS, 1, 1, 0
            launch = self.functions[name], *shape, stream, (values, types)
            if together:
                _checked(self.driver.cuLaunchCooperativeKernel(*launch))
            else:
                _checked(self.driver.cuLaunchKernel(*launch, 0))


def _real(dtype: torch.dtype) -> torch.dtype:
    """The type of vectors of d numbers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compiled(architecture: int) -> tuple[dict[str, str], bytes]:
    """The names of the kernels in the binary, and the binary, from the cache if it is there.

    Raises:
        ImportError: there is no cuda.bindings.
        RuntimeError: NVRTC does not compile the source; with its log.
    """
    from cuda.bindings import nvrtc

    source = SOURCE.read_bytes()
    version = _checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source, architecture, version)).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mfac")
    kept = folder / f"{key}.cubin"
    with contextlib.suppress(OSError, ValueError):
        names, binary = kept.read_bytes().split(b"\n", 1)
        return json.loads(names), binary
    names, binary = _compile(nvrtc, source, architecture)
    with contextlib.suppress(OSError):  # a cache that can't be written is none
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(json.dumps(names).encode() + b"\n" + binary)
        os.replace(file.name, kept)
    return names, binary


def _compile(nvrtc: Any, source: bytes, architecture: int) -> tuple[dict[str, str], bytes]:
    kernels = [
        "exchange",
        *(f"{kernel}<{name}>" for kernel in KERNELS for name in FORMATS.values()),
    ]
    program = _checked(nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], []))
    for name in kernels:
        _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    options = [f"--gpu-architecture=sm_{architecture}".encode(), b"--std=c++17"]
    if nvrtc.nvrtcCompileProgram(program, len(options), options)[0]:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    names = {
        name: _checked(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode()
        for name in kernels
    }
    binary = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return names, bytes(binary)


def _checked(result: tuple) -> Any:
    """What a function of cuda.bindings returns beside its status, which must be 0."""
    status, *values = result
    if status:
        raise RuntimeError(f"{status!r}")
    return values[0] if values else None
