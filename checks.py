"""Checks of arguments, shared by several modules. Errors say what was given and what is allowed."""

import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RANGE = 1e-30, 1e30  # of λ
WIDE = 1e-300, 1e300  # of λ if results are in float64
IN_FLOATS = "as a dense tensor in a floating point of 16 to 64 bits"


def is_real(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        return False
    return x.layout == torch.strided and not x.is_meta


def kind(x: Any) -> str:
    """The type and shape of x, for messages."""
    shape = f" of {x.dtype} {tuple(x.shape)}" if hasattr(x, "dtype") else ""
    return type(x).__name__ + shape


def checked_vector(x: Any, d: int, name: str = "a vector") -> Tensor:
    if not (is_real(x) and x.shape == (d,)):
        raise ValueError(f"Expected {name} of shape {(d,)} {IN_FLOATS}, got {kind(x)}")
    return x.detach().contiguous()


def fitting(
    x: Tensor, dtype: torch.dtype, everywhere: Callable[[Tensor], Any] = torch.all
) -> Tensor:
    """x in `dtype`. Raises ValueError if it does not fit. `everywhere` is `all` over all ranks."""
    fitted = x.to(dtype)
    if not everywhere(fitted.isfinite()):
        largest = float(x.abs().max())
        raise ValueError(
            f"Results of up to {largest:.3g} do not fit {dtype}; use float64, or a higher damp"
        )
    return fitted


def is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"Invalid {name}: {value!r}; it must be {wanted}")


def check_damp(damp: Any, limits: tuple[float, float] = RANGE, also: str = "") -> float:
    least, largest = limits
    holds = is_number(damp) and least <= damp <= largest
    require(holds, "damp", damp, f"a number from {least:g} to {largest:g}, such as 1e-5{also}")
    return float(damp)


def damp_parts(damp: Any, limits: tuple[float, float] = WIDE) -> tuple[float, float]:
    """(λ, fraction of the mean squared gradient); one of them is 0. "relative:0.03" stands for the
    fraction 0.03, "relative" for 0.1. λ is within `limits`."""
    number = r"\d*\.?\d+(?:[eE][-+]?\d+)?"
    relative = isinstance(damp, str) and re.fullmatch(f"relative(?::({number}))?", damp)
    if relative:
        return 0.0, check_damp(float(relative[1] or 0.1))
    return check_damp(damp, limits, also=", or 'relative:0.1'"), 0.0


def check_integer(name: str, value: Any, least: int = 1, largest: int | None = None) -> int:
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    limit = f"from {least} to {largest}" if largest else f"of at least {least}"
    holds = integral and least <= value <= (largest or value)
    require(holds, name, value, f"an integer {limit}")
    return int(value)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    require(value in allowed, name, value, f"one of {list(allowed)}")
    return value


def checked_dtype(name: str, dtype: Any, compress: float | None = None) -> torch.dtype:
    """The type of a window, given as a type or by name. `compress` restricts the choice."""
    found: Any = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    allowed = [torch.float64, torch.float32, torch.bfloat16]
    if checked_compress(compress) is None:
        allowed += [torch.float16, torch.float8_e4m3fn]
    how = "" if compress is None else " with compress"
    require(found in allowed, name, dtype, f"one of {allowed}{how}")
    return found


def checked_compress(compress: float | None) -> float | None:
    if compress is None:
        return None
    wanted = "the fraction of each gradient to keep, above 0 and at most 1, or None for all of it"
    require(is_number(compress) and 0.0 < compress <= 1.0, "compress", compress, wanted)
    return float(compress)


def check_device(device: Any, name: str = "device", present: bool = True) -> torch.device:
    try:
        found = torch.device(device)
        if found.type == "mps":
            raise ValueError("MPS has no float64; use the CPU, with optdev='cpu' for MFAC")
        return torch.empty(0, device=found).device if present else found
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Invalid {name}: {device!r}; {reason}; 'cpu' always works") from error


def check_devices(name: str, devices: Any) -> list[torch.device]:
    several = isinstance(devices, Iterable) and not isinstance(devices, (str, torch.device))
    require(several, name, devices, "a list such as ['cpu', 'cpu']")
    return [check_device(device, name) for device in devices]


# --- of the optimizer -----------------------------------------------------------------------------


def check_dense(grads: Iterable[Tensor]) -> None:
    """Raises ValueError if a gradient is sparse."""
    if any(g.layout is not torch.strided for g in grads):
        raise ValueError("MFAC does not support sparse gradients; use sparse=False in the module")


def check_group(group: dict[str, Any], shared: dict[str, Any]) -> None:
    """Checks a group's settings and parameters. It may repeat `shared` settings, as wrappers do."""
    lr, momentum, decay = group["lr"], group.get("momentum", 0), group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    require(0.0 <= lr, "learning rate", float(lr), "at least 0")
    require(0.0 <= momentum < 1.0, "momentum", momentum, "in [0, 1)")
    require(0.0 <= decay, "weight_decay", decay, "at least 0")
    check_choice("normalize", group.get("normalize"), ("layer", None))
    for name in shared.keys() & group.keys():
        same = group[name] == shared[name]
        require(same, name, group[name], "the same in all groups; give it to MFAC itself")
    wanted = "of a real floating-point type; keep a complex one as real and imaginary part"
    for p in group["params"]:
        require(p.is_floating_point(), "parameter", p.dtype, wanted)


def checked_masks(
    params: list[Tensor], sparse: bool | Sequence[Tensor | None]
) -> list[Tensor | None]:
    """One mask for each parameter: True where it is trained, or None to train all of it."""
    if isinstance(sparse, bool):
        return [p.detach() != 0 if sparse and p.dim() >= 2 else None for p in params]
    listed = isinstance(sparse, (list, tuple))
    require(listed, "sparse", sparse, "True, False or a list of masks")
    if len(sparse) != len(params):
        raise ValueError(
            f"Invalid sparse: {len(sparse)} masks for {len(params)} parameters; give each group a "
            "list with one mask (or None) for each of its parameters"
        )
    for p, mask in zip(params, sparse, strict=True):
        wanted = torch.bool, p.shape
        if mask is not None and (getattr(mask, "dtype", 0), getattr(mask, "shape", 0)) != wanted:
            raise ValueError(
                f"Invalid sparse: a mask ({kind(mask)}) for a parameter of shape {tuple(p.shape)}; "
                "give a bool tensor of the same shape"
            )
    return list(sparse)
