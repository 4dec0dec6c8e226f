"""What every test shares."""

import os

# Before torch is imported: OpenMP's busy waiting slows everything down when two things run at once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Class folders with 80 training and 40 test images of four digits."""
    folder = tmp_path_factory.mktemp("data") / "four"
    images, labels = load_digits(n_class=4, return_X_y=True)
    for index, (image, label) in enumerate(zip(images[:120], labels[:120], strict=True)):
        path = folder / ("train" if index < 80 else "test") / f"digit{label}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype("uint8")).convert("RGB").save(path)
    return folder


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that is saved."""
    saved, savefig = [], Figure.savefig

    def spy(self, *args, **kwargs):
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved
