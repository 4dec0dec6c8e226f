"""The memory of a window, known in advance."""

import os
import sys
from typing import Any

import torch

from checks import check_integer, checked_compress, checked_dtype
from windows import Window

__all__ = ["available_memory", "check_memory", "window_bytes"]


def window_bytes(
    ngrads: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    compress: float | None = None,
    world_size: int = 1,
) -> int:
    """Bytes on each of `world_size` devices for a window of `ngrads` gradients of `dim` weights.

    A dense window has m·d numbers of `dtype`. A compressed one has the fraction `compress` of them,
    each with 4 bytes for its column, and d numbers for the error. float16 and float8 have 4 bytes
    for each scale. K and P take 16m² bytes.

    Example:
        >>> window_bytes(1024, 272_474)  # ResNet-20: 1.13 GB
        1132830720
    """
    m, d = check_integer("ngrads", ngrads, least=0), check_integer("dim", dim, least=0)
    d = -(-d // check_integer("world_size", world_size))
    dtype, compress = checked_dtype("dtype", dtype, compress), checked_compress(compress)
    return 16 * m**2 + _bytes(m, [d], dtype, compress)


def _bytes(
    m: int, dims: list[int], dtype: torch.dtype = torch.float32, compress: float | None = None
) -> int:
    """Bytes of blocks with `dims` columns."""
    nowhere = torch.device("meta")  # tensors there take no memory
    window = Window(m, dims, [nowhere] * len(dims), nowhere, dtype, compress)
    return sum(tensor.nbytes for block in window.blocks for tensor in block.state.values())


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`. Main memory is divided by the number
    of processes on this machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        import psutil  # the scripts require it, M-FAC alone does not
    except ImportError:
        return sys.maxsize
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_memory(m: int, dims: list[int], devices: list[torch.device], **kind: Any) -> None:
    """Raises ValueError if a window of m gradients, `dims` columns on each device, is too large.
    `kind` is its `dtype` and `compress`."""
    for device in dict.fromkeys(devices):
        own = [d for d, place in zip(dims, devices, strict=True) if place == device]
        needed, free = _bytes(m, own, **kind), available_memory(device)
        needed += 16 * m**2 if device == devices[0] else 0  # K and P
        if needed > free:
            raise ValueError(
                f"A window of {m} gradients of {sum(dims):,} weights takes {needed / 1e9:.3g} GB "
                f"on {device}, which has {free / 1e9:.3g} GB free; take fewer gradients, a "
                "narrower window_dtype, compress=0.01, or more devices"
            )
