"""Shared by kill.py and mutate.py: runs the scripts in forked children, which do not import torch
again, on a small model and small images."""

import contextlib
import csv
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch and numpy are imported. Only a process with one thread can fork, and bits depend on
# the number of threads.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.backends.backend_agg  # once here rather than in each child
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo  # optimizers import it
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import main_common
import main_optim
import main_prun
import models

TIMES = {"seconds", "images_per_second"}


def tiny(num_classes: int) -> nn.Module:
    """A model of about 800 weights."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


models.MODELS["tiny"] = tiny


def write_images(folder: Path, train: int = 80, test: int = 40, side: int = 8) -> Path:
    """Class folders with images of four digits."""
    images, labels = load_digits(n_class=4, return_X_y=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        if index < train + test:
            part = "train" if index < train else "test"
            path = folder / part / f"digit{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((image * 15).astype("uint8")).convert("RGB")
            picture.resize((side, side)).save(path)
    return folder


@dataclass
class End:
    """The end of a child. `status` is its exit status, or minus the signal that killed it."""

    status: int
    out: str
    err: str
    seconds: float
    timed_out: bool = False


def forked(
    call: Callable[[], Any],
    folder: Path,
    *,
    kill_after: float | None = None,
    limit: float = 60,
    memory: int | None = None,
) -> End:
    """Runs `call` in a child in `folder`, and kills it after `kill_after` seconds."""
    assert len(os.listdir("/proc/self/task")) == 1, "only a process with one thread may fork"
    out, err = (os.memfd_create(name) for name in ("out", "err"))
    start = time.monotonic()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.chdir(folder)
            if memory:
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            call()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)
    deadline = start + (limit if kill_after is None else kill_after)
    timed_out = False
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            timed_out = kill_after is None
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    seconds = time.monotonic() - start
    texts = []
    for file in (out, err):
        texts.append(os.pread(file, 2**20, 0).decode(errors="replace"))
        os.close(file)
    return End(os.waitstatus_to_exitcode(ended[1]), *texts, seconds, timed_out)


def script(main: Callable, flags: Sequence[Any]) -> Callable[[], None]:
    """A call of a script. It runs on the CPU, because bits are compared."""
    return lambda: main([*map(str, flags), "--device", "cpu"])


def finished(folder: Path) -> list[Path]:
    """The files that have their final names."""
    return sorted(path for path in folder.iterdir() if path.suffix != ".tmp")


def check_readable(folder: Path) -> None:
    """Raises an error if a file cannot be read to its end."""
    for path in finished(folder):
        if path.suffix in (".pth", ".state"):
            main_common.load_saved(path)
        elif path.suffix == ".csv":
            text = path.read_text()
            header, *rows = csv.reader(text.splitlines())
            assert text.endswith("\n") and rows and {len(row) for row in rows} == {len(header)}
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        else:
            raise AssertionError(f"an unknown file: {path}")


def check_same(one: Path, other: Path) -> None:
    """Raises AssertionError if the files of two runs differ, except in times."""
    assert [path.name for path in sorted(one.iterdir())] == [
        path.name for path in sorted(other.iterdir())
    ]
    for path in sorted(one.iterdir()):
        match = other / path.name
        if path.suffix == ".state":
            assert same(main_common.load_saved(path), main_common.load_saved(match)), path
        elif path.suffix == ".csv":
            tables = [list(csv.DictReader(p.read_text().splitlines())) for p in (path, match)]
            assert same(*tables), path
        elif path.suffix != ".png":  # curves of training contain times
            assert path.read_bytes() == match.read_bytes(), path


def same(one: Any, other: Any) -> bool:
    """Whether nested containers have the same bits, except in times."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        keys = [key for key in one if not (key in TIMES or str(key).endswith("_seconds"))]
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


MAINS = {"main_optim.py": main_optim.main, "main_prun.py": main_prun.main}
