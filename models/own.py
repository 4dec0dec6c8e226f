"""Builds the user's own model from `module:function`, as given to the scripts."""

import importlib
import sys
import traceback
from pathlib import Path

import torch
from torch import nn

__all__ = ["build_own"]


def build_own(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The module that the function `name` returns for the number of classes.

    The function's module may lie in the current folder. Raises ValueError unless the function
    returns a torch.nn.Module that maps images (n, *shape) to (n, num_classes). The message is one
    sentence with the line of the code that failed, if any.
    """
    module, _, function = name.partition(":")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise ValueError(f"Importing {module} failed: {described(error)}") from error
        raise ValueError(
            f"There is no module {module!r} in {folder} or installed; check the model {name}"
        ) from error
    except Exception as error:
        raise ValueError(f"Importing {module} failed: {described(error)}") from error
    if not callable(make := getattr(found, function, None)):
        place = getattr(found, "__file__", None) or "Python"
        raise ValueError(f"The module {module!r} ({place}) has no function {function!r}")
    try:
        model = make(num_classes)
    except Exception as error:
        raise ValueError(f"{name}({num_classes}) failed: {described(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name}({num_classes}) returned {type(model).__name__}, not a torch.nn.Module; return "
            "the model"
        )
    check_outputs(model, name, (2, *shape), (2, num_classes))
    return model


def check_outputs(
    model: nn.Module, name: str, images: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Raises ValueError unless the model's outputs have the shape `expected`."""
    training = model.training
    try:
        device = next((p.device for p in model.parameters()), "cpu")
        with torch.no_grad():
            outputs = model.eval()(torch.zeros(images, device=device))
    except Exception as error:
        raise ValueError(f"{name} failed on images {images}: {described(error)}") from error
    finally:
        model.train(training)
    found = getattr(outputs, "shape", type(outputs).__name__)
    if found != expected:
        shown = found if isinstance(found, str) else tuple(found)
        raise ValueError(f"{name} makes {shown} of images {images}; it must make {expected}")


def described(error: Exception) -> str:
    """An error in one line, with file and line number."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {text}"  # its text has the line number
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}, line {where.lineno})"
