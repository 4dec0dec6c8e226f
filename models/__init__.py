"""The models that the scripts know by name, and the loading of checkpoints.

`MODELS` is the one registry: a name and a callable that takes the number of classes and returns
a module for images with three channels. A new entry is all that a new model needs:

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


# Where checkpoints have their state dict, if not at the top.
HOLDERS = ("state_dict", "model_state_dict", "model", "net")

# Public checkpoints have a scalar of numpy beside the weights, their accuracy.
SCALAR = np.float64().__reduce__()[0]
SAFE = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE += [np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64))]


def build(name: str, num_classes: int, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """A new model `name` with `num_classes` outputs; its weights follow torch's global generator.

    The name is in `MODELS`, or one of `module:function`, see `build_own`, for images of `shape`.
    Raises ValueError for any other.
    """
    if ":" in name:
        return build_own(name, num_classes, shape)
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}: choose one of {', '.join(sorted(MODELS))}.")
    return MODELS[name](num_classes)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads the weights and buffers in the file `path` into `model`, on whatever device it lives.

    The file holds a state dict, alone or under "state_dict", "model_state_dict", "model" or "net",
    in any floating-point type, or is one of safetensors. Names may have in front what wrappers put
    there, such as "module." (DataParallel, averaged models), "_orig_mod." (torch.compile) and
    "model." (Lightning); weights that torch.nn.utils.prune has masked are multiplied with their
    masks. Only tensors, numbers and plain containers are unpickled. Raises ValueError, with the
    model untouched, for a file that is missing, not a checkpoint, or that does not fit the model.
    """
    wanted = model.state_dict()
    state = _unwrapped(_read_state_dict(Path(path)), wanted)
    # Checkpoints older than torch 0.4.1 lack this counter, and load_state_dict can do without it.
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
            f"name the model that it was saved from."
        )
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"The checkpoint {path} belongs to a model with other sizes or another number of "
                f"classes: {key!r} is {tuple(tensor.shape)} there and "
                f"{tuple(wanted[key].shape)} here; use the model and data set it was saved from."
            )
        if tensor.is_floating_point() != wanted[key].is_floating_point() or not is_plain(tensor):
            raise ValueError(
                f"The checkpoint {path} has another kind of numbers: {key!r} is a "
                f"{'meta' if tensor.is_meta else tensor.layout} tensor of {tensor.dtype} where "
                f"{wanted[key].dtype} is needed; save the weights as these."
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"The checkpoint {path} has NaN or Inf in {key!r}: use one of a training that did "
                f"not diverge."
            )
    model.load_state_dict(state)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor from a file has its numbers, one after the other."""
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)


def read_tensors(path: str | Path, zipped: bool = False, mmap: bool = False) -> Any:
    """What torch.save wrote to `path`, on the CPU: tensors, numbers and plain containers.

    A file that is no zip archive, as those of torch before 1.6, has no checksums, and is refused if
    it must be `zipped`. There is no end to what a damaged file can raise.
    """
    with open(path, "rb") as file:
        zipped = zipped or file.read(4) == b"PK\3\4"
    if zipped:  # torch.load does not compare the checksums, and would unfold what is compressed
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("It has compressed records, which torch.save does not write.")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has another checksum.")
    with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
        warnings.simplefilter("ignore")  # what is of a kind that torch warns of is refused below
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint `path` by name, without the "module." prefix."""
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {path}: check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = read_tensors(path)
    except ImportError as error:
        raise ValueError(
            f"Reading {path} needs the package safetensors: install it with 'pip install "
            f"safetensors'."
        ) from error
    except Exception as error:  # depending on the bytes: UnpicklingError, RuntimeError, EOFError, …
        raise ValueError(
            f"The file {path} is not a checkpoint of tensors that torch.load can read "
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
    """The state with masks applied, and without the count of an averaged model and the prefix that
    wrappers have put in front of the names in `wanted`."""
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
