"""Checks of arguments that several modules share: what was given, and what is allowed."""

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IN_FLOATS = "as a dense tensor in a floating point of 16 to 64 bits"


def is_real(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        return False
    return x.layout == torch.strided and not x.is_meta


def kind(x: Any) -> str:
    """What x is, for messages."""
    shape = f" of {x.dtype} {tuple(x.shape)}" if hasattr(x, "dtype") else ""
    return type(x).__name__ + shape


def check_damp(damp: Any) -> float:
    number = isinstance(damp, numbers.Real) and not isinstance(damp, bool)
    if not (number and 1e-300 < damp < 1e300):  # 1/damp is finite, too
        raise ValueError(
            f"Invalid damp: {damp!r}; it must be a number between 1e-300 and 1e300, such as 1e-5"
        )
    return float(damp)


def check_integer(name: str, value: Any, least: int = 1, largest: int | None = None) -> int:
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (integral and least <= value <= (largest or value)):
        limit = f"from {least} to {largest}" if largest else f"of at least {least}"
        raise ValueError(f"Invalid {name}: {value!r}; it must be an integer {limit}")
    return int(value)


def checked_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    allowed = torch.bfloat16, torch.float16, torch.float32, torch.float64
    if dtype not in allowed:
        raise ValueError(f"Invalid {name}: {dtype!r}; it must be one of {list(allowed)}")
    return dtype


def checked_compress(compress: float | None) -> float | None:
    if compress is None:
        return None
    number = isinstance(compress, numbers.Real) and not isinstance(compress, bool)
    if not (number and 0.0 < compress <= 1.0):
        raise ValueError(
            f"Invalid compress: {compress!r}; it must be above 0 and at most 1, the part of each "
            "gradient that is kept, or None for all of it"
        )
    return float(compress)


def check_device(device: Any, name: str = "device", present: bool = True) -> torch.device:
    try:
        found = torch.device(device)
        return torch.empty(0, device=found).device if present else found
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Invalid {name}: {device!r}; {reason}; 'cpu' always works") from error


def check_devices(name: str, devices: Any) -> list[torch.device]:
    if isinstance(devices, (str, torch.device)) or not isinstance(devices, Iterable):
        raise ValueError(f"Invalid {name}: {devices!r}; it must be a list such as ['cpu', 'cpu']")
    return [check_device(device, name) for device in devices]
