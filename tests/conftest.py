"""Fixtures and hooks of all tests."""

import os
from datetime import timedelta

# Before torch is imported. OpenMP's busy waiting slows down all processes if there are several.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # each core runs a test
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def pytest_collection_modifyitems(items):
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if marker := item.get_closest_marker("cuda"):  # tests on GPUs run one after the other
            item.add_marker(pytest.mark.xdist_group("cuda"))
            needed = marker.kwargs.get("gpus", 1)
            if found < needed:
                reason = "needs a CUDA device" if needed == 1 else f"needs {needed} CUDA devices"
                item.add_marker(pytest.mark.skip(reason=f"{reason}, there are {found}"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Class folders with 80 training and 40 test images of four digits."""
    Image = pytest.importorskip("PIL.Image")
    digits = pytest.importorskip("sklearn.datasets").load_digits(n_class=4)

    folder = tmp_path_factory.mktemp("data") / "four"
    images, labels = digits.images, digits.target
    for index, (image, label) in enumerate(zip(images[:120], labels[:120], strict=True)):
        path = folder / ("train" if index < 80 else "test") / f"digit{label}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).convert("RGB").save(path)
    return folder


@pytest.fixture(scope="session")
def gloo() -> None:
    """Skips the test if processes cannot communicate."""
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    alone = {"rank": 0, "world_size": 1, "timeout": timedelta(seconds=30)}
    try:
        dist.init_process_group("gloo", init_method="tcp://localhost:0", **alone)
    except (RuntimeError, OSError) as error:
        pytest.skip(f"gloo cannot open a port: {error}")
    dist.destroy_process_group()


@pytest.fixture
def blank_pictures(request, monkeypatch) -> None:
    """Replaces pictures by blank ones, since drawing takes as long as a small run. Tests with the
    fixture `figures` draw."""
    from matplotlib.figure import Figure
    from PIL import Image

    if "figures" not in request.fixturenames:
        blank = Image.new("L", (1, 1))
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: blank.save(file, "png"))


@pytest.fixture
def figures(monkeypatch) -> list:
    """A list of all matplotlib figures that the test saves."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig

    def spy(self, *args, **kwargs):
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


@pytest.fixture
def deterministic():
    """Restores the global settings that --deterministic changes."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        context.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        yield
        torch.use_deterministic_algorithms(False)
