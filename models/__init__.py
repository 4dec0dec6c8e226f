"""The models that the scripts know by name, and the loading of checkpoints.

`MODELS` is the registry: a name, and a callable that takes the number of classes and returns a
module for images with three channels. To add a model, add an entry:

    models.MODELS["mlp"] = lambda num_classes: MLP(hidden=512, num_classes=num_classes)
"""

import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.mobilenet import MobileNet
from models.own import build_own
from models.resnet import ResNet
from models.wideresnet import WideResNet

__all__ = ["MODELS", "build", "load_checkpoint", "read_tensors"]

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet44": partial(ResNet, 44),
    "resnet56": partial(ResNet, 56),
    "wideresnet-22-2": partial(WideResNet, 22, 2),
    "wideresnet-40-2": partial(WideResNet, 40, 2),
    "wideresnet-22-4": partial(WideResNet, 22, 4),
    "mobilenet": MobileNet,
}


# Keys under which a checkpoint may hold its state dict, if it is not one itself.
HOLDERS = ("state_dict", "model_state_dict", "model", "net")

# Public checkpoints often hold their accuracy beside the weights, as a scalar of numpy.
SCALAR = np.float64().__reduce__()[0]
SAFE = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE += [np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64))]


def build(name: str, num_classes: int, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """A new model `name` with `num_classes` outputs, initialised from torch's global generator.

    The name is a key of `MODELS`, or `module:function` for images of `shape`; see `build_own`.
    Raises ValueError for any other name.
    """
    if ":" in name:
        return build_own(name, num_classes, shape)
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}: choose one of {', '.join(sorted(MODELS))}.")
    return MODELS[name](num_classes)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads the weights and buffers in the file `path` into `model`, on the device of the model.

    The file is in the format of safetensors, or holds a state dict of any floating-point type,
    alone or under "state_dict", "model_state_dict", "model" or "net". Names may have the prefix of
    a wrapper, such as "module." (DataParallel, averaged models), "_orig_mod." (torch.compile) or
    "model." (Lightning). Weights that torch.nn.utils.prune has masked are multiplied by the masks.
    Only tensors, numbers and plain containers are unpickled.

    Raises ValueError for a file that is missing, is not a checkpoint, or does not fit the model.
    The model then stays as it was.
    """
    wanted = model.state_dict()
    state = _unwrapped(_read_state_dict(Path(path)), wanted)
    # Checkpoints from before torch 0.4.1 lack this counter. load_state_dict does not need it.
    missing = [
        key for key in wanted if key not in state and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        found = [f"lacks {missing[0]!r}"] if missing else []
        found += [f"has {unexpected[0]!r}, which the model lacks"] if unexpected else []
        others = len(missing) + len(unexpected) - len(found)
        raise ValueError(
            f"The checkpoint {path} belongs to another model: it {' and '.join(found)}"
            f"{f' ({others} more keys differ)' if others else ''}; "
            f"choose the model that it was saved from."
        )
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"The checkpoint {path} belongs to a model with other sizes or another number of "
                f"classes: {key!r} has the shape {tuple(tensor.shape)}, but the model needs "
                f"{tuple(wanted[key].shape)}; choose the model and data set that it was saved from."
            )
        if tensor.is_floating_point() != wanted[key].is_floating_point() or not is_plain(tensor):
            raise ValueError(
                f"The checkpoint {path} has another type of tensor: {key!r} is a "
                f"{'meta' if tensor.is_meta else tensor.layout} tensor of {tensor.dtype}, but the "
                f"model needs a dense one of {wanted[key].dtype}; convert it before saving."
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"The checkpoint {path} has NaN or Inf in {key!r}: use one from before the "
                f"training diverged."
            )
    model.load_state_dict(state)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense and has its numbers in memory."""
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)


def read_tensors(path: str | Path, zipped: bool = False, mmap: bool = False) -> Any:
    """Reads what torch.save wrote to `path`, on the CPU: tensors, numbers and plain containers.

    Files of torch before 1.6 are not zip archives and have no checksums. With `zipped`, they are
    refused. A damaged file can raise any exception.
    """
    with open(path, "rb") as file:
        zipped = zipped or file.read(4) == b"PK\3\4"
    if zipped:  # torch.load checks no checksums, and would unpack a small file to any size
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("It has compressed records, which torch.save does not write.")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has another checksum.")
    with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
        warnings.simplefilter("ignore")  # the callers refuse what torch warns about
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint `path` by name."""
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {path}: check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = read_tensors(path)
    except ImportError as error:
        raise ValueError(
            f"Reading {path} needs the package safetensors: run 'pip install safetensors'."
        ) from error
    except Exception as error:  # depending on the bytes: UnpicklingError, RuntimeError, EOFError, …
        raise ValueError(
            f"The file {path} is not a checkpoint that torch.load can read "
            f"({type(error).__name__}): save one with torch.save(model.state_dict(), path)."
        ) from error
    for key in HOLDERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"The checkpoint {path} holds no state dict of named tensors, neither at its top nor "
            f"under {', '.join(map(repr, HOLDERS))}: save one with torch.save(model.state_dict(), "
            f"path)."
        )
    return dict(state)


def _unwrapped(
    state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state with masks applied, without the count of an averaged model, and without the prefix
    that wrappers put before the names in `wanted`."""
    for name in [key.removesuffix("_orig") for key in state if key.endswith("_orig")]:
        if f"{name}_mask" in state:
            state[name] = state.pop(f"{name}_orig") * state.pop(f"{name}_mask")
    if "n_averaged" not in wanted:
        state.pop("n_averaged", None)
    first = next(iter(wanted), "")
    found = min((key for key in state if f".{key}".endswith(f".{first}")), key=len, default=first)
    prefix = found.removesuffix(first)
    if not all(key.startswith(prefix) for key in state):
        return state
    return {key.removeprefix(prefix): value for key, value in state.items()}
