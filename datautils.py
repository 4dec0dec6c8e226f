"""Data sets and loaders for image classification.

`load(dataset)` takes the word "digits" or a path. The handwritten digits come with scikit-learn and
need no network. At a path there may be one of these:

- `train/` and `test/` (or `val/`) with a folder of images for each class, in any format of PIL;
- the original files of CIFAR-10, CIFAR-100 or MNIST. If a path such as `data/cifar10` does not
  exist or is empty, they are downloaded to it.

If all images have one size of at most 64x64, they are decoded once to a uint8 tensor and augmented
a batch at a time, on the device of the batches: random crops of the image padded with black, and
mirroring if that keeps the class. If they come from many files, the decoded images stay in the
user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`) until a file's name, size or time
changes. Larger images are cropped to 224x224 as usual for ImageNet. Worker processes decode and
augment them.

Order and augmentation depend only on the seed and the epoch. They neither read nor change a global
generator, so a resumed run gets the batches of an uninterrupted one without saved state.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

__all__ = ["Data", "DataError", "Loader", "load"]

SMALL = 64  # pixels: images up to this side are held in memory
PADDING = 4  # pixels: black margin from which small images are cropped
CROP = 224  # pixels: side of the crops of larger images
SAMPLE = 1000  # larger training images from which mean and standard deviation are computed
CACHED = 10_000  # images: from this number on, decoded small images are cached
SHARED_MEMORY = "/dev/shm"  # worker processes pass their batches through it

# Published mean and standard deviation of each channel, for pixels from 0 to 1.
CONSTANTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# The torchvision class that reads a set, and the folder with the original files below its root.
ORIGINALS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST/raw"),
}

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
SOME_CIFAR100_CLASSES = {"aquarium_fish", "maple_tree", "pickup_truck", "sweet_pepper"}


Batch = tuple[torch.Tensor, torch.Tensor]  # images (n, C, H, W), labels int64 (n,)
Channels = tuple[float, ...]  # one figure a channel


class DataError(ValueError):
    """The data set is unusable. The message is one sentence for the user."""


@dataclass(frozen=True)
class Pixels:
    """Images in memory: `images` uint8 (N, 3, H, W), `labels` int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    flip: bool

    def batch(self, indices: torch.Tensor, draws: torch.Tensor | None) -> Batch:
        """The images at `indices` (n,), augmented with `draws`, int64 (n, 3), if there are any."""
        images = self.images[indices]
        if draws is not None:
            images = _crop_and_flip(images, draws, self.flip)
        return images, self.labels[indices]


@dataclass(frozen=True)
class Files:
    """Images on disk: `paths` (N), `labels` int64 (N,), and two transforms from a PIL image to
    uint8 (3, 224, 224). `random_view` draws from torch's global generator."""

    paths: list[str]
    labels: torch.Tensor
    central_view: Callable[[Image.Image], torch.Tensor]
    random_view: Callable[[Image.Image], torch.Tensor]

    def batch(self, indices: torch.Tensor, draws: torch.Tensor | None) -> Batch:
        """The images at `indices` (n,), augmented with `draws`, int64 (n, 3), if there are any."""
        images = (_read_image(self.paths[index]) for index in indices.tolist())
        if draws is None:
            views = [self.central_view(image) for image in images]
        else:
            views = []
            with torch.random.fork_rng(devices=[]):  # restores the global generator
                for image, seed in zip(images, draws[:, 0].tolist(), strict=True):
                    torch.default_generator.manual_seed(seed)
                    views.append(self.random_view(image))
        images = torch.stack(views) if views else torch.empty(0, 3, CROP, CROP, dtype=torch.uint8)
        return images, self.labels[indices]


@dataclass(frozen=True)
class Data:
    """A data set for classification, as `load` returns it.

    `shape` is (C, H, W) of the images that the loaders yield; C is always 3. `mean` and `std` are
    the mean and standard deviation of each channel, for pixels from 0 to 1.
    """

    name: str
    classes: list[str]
    shape: tuple[int, int, int]
    mean: Channels
    std: Channels
    splits: dict[str, Pixels | Files]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def loader(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        augment: bool | None = None,
        shuffle: bool | None = None,
        workers: int | None = None,
        part: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
    ) -> "Loader":
        """Batches of the split "train" or "test", on `device`.

        `augment` and `shuffle` default to True for "train" and to False for "test". `workers`
        processes read images that are not held in memory (default: one for each core, at most 8).
        With `part` = (i, n), each batch is split into n parts and the loader yields the i-th, which
        may be empty. Raises ValueError for another split or if `batch_size` is below 1, and
        DataError if there is too little shared memory for this number of workers.
        """
        if split not in self.splits:
            raise ValueError(f"Unknown split {split!r}: choose 'train' or 'test'.")
        if batch_size < 1:
            raise ValueError(f"Invalid batch size {batch_size}: it must be at least 1.")
        training, source, device = split == "train", self.splits[split], torch.device(device)
        if isinstance(source, Pixels):
            workers = 0  # a batch takes about a millisecond; a process would only add to it
            images, labels = source.images.to(device), source.labels.to(device)
            source = replace(source, images=images, labels=labels)
        else:
            workers = _find_workers(workers, batch_size)
        return Loader(
            source,
            batch_size,
            mean=self.mean,
            std=self.std,
            seed=seed,
            augment=training if augment is None else augment,
            shuffle=training if shuffle is None else shuffle,
            workers=workers,
            part=part,
            device=device,
        )


def _find_workers(workers: int | None, batch_size: int) -> int:
    """The number of worker processes. Each needs shared memory for two batches. If there is too
    little, a given number raises DataError, and the default shrinks with a warning."""
    wanted = min(8, os.cpu_count() or 1) if workers is None else workers
    if wanted == 0 or not os.path.isdir(SHARED_MEMORY):
        return wanted
    free, size = shutil.disk_usage(SHARED_MEMORY).free, batch_size * 3 * CROP * CROP
    most = max(0, (free // size - 1) // 2)  # one more batch is on its way to the device
    if most >= wanted:
        return wanted
    message = (
        f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, but {wanted} workers with batches of "
        f"{batch_size} images need {(2 * wanted + 1) * size / 2**20:.0f} MiB: make it larger "
        f"(docker run --shm-size)"
    )
    if workers is not None:
        raise DataError(f"{message}, or use at most {most} workers.")
    warnings.warn(f"{message}; until then {most or 'no'} workers read the images.", stacklevel=2)
    return most


class Loader:
    """Iterates over batches (images float32 (n, C, H, W) normalised, labels int64 (n,)).

    Each iteration runs over all samples once. The last batch may be smaller. Every iteration yields
    the same batches until `set_epoch` sets another epoch.
    """

    def __init__(
        self,
        source: Pixels | Files,
        batch_size: int,
        *,
        mean: Channels,
        std: Channels,
        seed: int,
        augment: bool,
        shuffle: bool,
        workers: int,
        part: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.part = part
        self.num_samples = len(source.labels)
        self.seed = seed
        self.augment = augment
        self.shuffle = shuffle
        self.workers = workers
        self.device = device
        self.epoch = 0
        self.mean, self.std = (
            (255 * torch.tensor(figure)[:, None, None]).to(device) for figure in (mean, std)
        )

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines order and augmentation of the following iterations."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch = _Epoch(self.source, self.batch_size, self.part, *self._draw())
        if self.workers == 0:
            return map(self._finished, map(epoch.__getitem__, range(len(self))))
        return map(self._finished, self._by_workers(epoch))

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The order of the samples, and three random integers for each if they are augmented, on
        the device of the images."""
        seed = np.random.SeedSequence([self.seed % 2**64, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        n, place = self.num_samples, self.source.labels.device
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        draws = torch.randint(2**62, (n, 3), generator=generator) if self.augment else None
        return order.to(place), None if draws is None else draws.to(place)

    def _by_workers(self, epoch: "_Epoch") -> "Iterator[Batch | DataError]":
        """The batches, made by worker processes."""
        processes = DataLoader(
            epoch,
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator(),  # otherwise it draws a seed from the global generator
            pin_memory=self.device.type == "cuda",
        )
        try:
            yield from processes
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"A worker process that reads images was killed ({_one_line(error)}): use fewer "
                f"workers, which take less memory."
            ) from error

    def _finished(self, batch: "Batch | DataError") -> Batch:
        """The batch on the device, normalised. If it is an error, raises it."""
        if isinstance(batch, DataError):
            raise DataError(str(batch))  # a copy: raising `batch` would keep the workers alive
        images, labels = (x.to(self.device, non_blocking=True) for x in batch)
        return images.float().sub_(self.mean).div_(self.std), labels


class _Epoch:
    """The batches of one epoch as a map-style data set, so that worker processes can make them."""

    def __init__(
        self,
        source: Pixels | Files,
        batch_size: int,
        part: tuple[int, int],
        order: torch.Tensor,
        draws: torch.Tensor | None,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.part = part
        self.order = order
        self.draws = draws

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index: int) -> Batch | DataError:
        (i, n), start = self.part, index * self.batch_size
        batch = slice(start + i, start + self.batch_size, n)
        draws = None if self.draws is None else self.draws[batch]
        try:
            return self.source.batch(self.order[batch], draws)
        except DataError as error:  # returned, because a worker would append a traceback
            return error


def load(dataset: str | Path = "digits") -> Data:
    """The data set at the path `dataset`, or the digits of scikit-learn for the word "digits".

    Raises DataError if there is no usable data set.
    """
    if str(dataset) == "digits":
        return _load_digits()
    path = Path(dataset).expanduser()
    try:
        return _load_path(path.resolve())
    except OSError as error:  # no permission, a name too long, …
        raise DataError(f"The data set {path} can't be read ({error}): check the path.") from error


def _load_path(path: Path) -> Data:
    if (path / "train").is_dir():
        return _load_folders(path)
    originals = _find_originals(path)
    if len(originals) > 1:
        raise DataError(
            f"The folder {path} holds the files of {' and of '.join(originals)}: choose one, "
            f"{' or '.join(str(path / ORIGINALS[kind][1]) for kind in originals)}."
        )
    if originals:
        return _load_original(*originals.popitem())
    if _plain(path.name) in ORIGINALS and _awaits_download(path):
        return _load_original(_plain(path.name), path)
    if not path.exists():
        raise DataError(f"There is no data set at {path}: check the path.")
    if not path.is_dir():
        raise DataError(f"The data set {path} is a file: give a folder; unpack an archive first.")
    raise DataError(
        f"The folder {path} holds no data set: it needs train/ and test/ (or val/), each with a "
        f"folder of images for each class, or the original files of CIFAR-10, CIFAR-100 or MNIST."
    )


def _find_originals(path: Path) -> dict[str, Path]:
    """The root of each set with its original files in `path` or in the folder below it."""
    return {
        kind: root
        for kind, (_, folder) in ORIGINALS.items()
        for root in (path, *path.parents[:2])
        if (root / folder).is_dir() and (root / folder).is_relative_to(path)
    }


def _plain(name: str) -> str:
    """The letters and digits of a name in lower case: "CIFAR-10" becomes "cifar10"."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _awaits_download(path: Path) -> bool:
    """True for a folder that is absent, empty, or holds only archives of a broken download."""
    return not path.exists() or (path.is_dir() and all(p.suffix == ".gz" for p in path.iterdir()))


def _load_digits() -> Data:
    """1,797 handwritten digits of 8x8 pixels, enlarged to 3x32x32: 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    images = images.expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=digits.target
    )
    return _in_memory(
        "digits",
        [str(digit) for digit in range(10)],
        {"train": (images[train], labels[train]), "test": (images[test], labels[test])},
    )


def _load_original(kind: str, root: Path) -> Data:
    """CIFAR-10, CIFAR-100 or MNIST from the original files under `root`, downloaded if absent."""
    from torchvision import datasets  # here, because its import takes a second

    dataset = getattr(datasets, ORIGINALS[kind][0])
    splits = {}
    for split in ("train", "test"):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some releases print their progress
                original = dataset(str(root), train=split == "train", download=True)
        except Exception as error:  # URLError, RuntimeError, PermissionError, EOFError, …
            raise DataError(
                f"The files of {kind} can't be read from {root} or downloaded to it "
                f"({_one_line(error)}): copy them there, or check the network and the path."
            ) from error
        images = torch.as_tensor(original.data)
        if images.ndim == 4:
            images = images.permute(0, 3, 1, 2).contiguous()
        else:  # MNIST's single channel serves as three without further memory
            images = images[:, None].expand(-1, 3, -1, -1)
        splits[split] = images, torch.as_tensor(original.targets)
    return _in_memory(kind, list(original.classes), splits)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _load_folders(path: Path) -> Data:
    """A data set of class folders, held in memory if its images are small."""
    train = path / "train"
    classes = _class_names(train)
    if not classes:
        raise DataError(f"The folder {train} holds no class folders: add one for each class.")
    # ImageNet's test/ has no classes, and its val/ may have none either.
    folders = [path / name for name in ("test", "val")]
    test = next((d for d in folders if {*_class_names(d)} & {*classes}), None)
    if test is None:
        raise DataError(
            f"The data set {path} has no test/ or val/ with the class folders of train/: sort its "
            f"test images into folders with these names."
        )
    for one, other in ((train, test), (test, train)):
        extra = sorted(set(_class_names(one)) - set(_class_names(other)))
        if extra:
            raise DataError(
                f"The classes differ: {one} has {_some(extra)}, but {other} does not; "
                f"give both the same class folders."
            )
    files = {"train": _list_images(train, classes), "test": _list_images(test, classes)}
    firsts = [paths[0] for by_class in files.values() for paths in by_class]
    sizes = [_read_image(first, header_only=True).size for first in firsts]
    listed = {
        split: (
            [file for paths in by_class for file in paths],
            torch.repeat_interleave(torch.tensor([len(paths) for paths in by_class])),
        )
        for split, by_class in files.items()
    }
    if max(max(size) for size in sizes) > SMALL:
        return _on_disk(path.name, classes, listed)
    images = _decoded(path, {split: paths for split, (paths, _) in listed.items()}, sizes[0])
    splits = {split: (images[split], labels) for split, (_, labels) in listed.items()}
    return _in_memory(path.name, classes, splits)


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def _some(names: list[str]) -> str:
    """The first three names, and the number of further ones."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _list_images(folder: Path, classes: list[str]) -> list[list[str]]:
    """The image files of each class, sorted, including those in nested folders."""
    extensions = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = []
    for name in classes:
        found = [
            os.path.join(where, file)
            for where, _, inside in os.walk(folder / name, followlinks=True)
            for file in inside
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in extensions
        ]
        if not found:
            raise DataError(
                f"The class folder {folder / name} holds no images: add some, or remove it."
            )
        files.append(sorted(found))
    return files


def _read_image(path: str, header_only: bool = False) -> Image.Image:
    """The image in a file, as RGB. With `header_only`, its pixels are not decoded."""
    try:
        with Image.open(path) as image:
            if not header_only and image.mode.startswith(("I", "F")):
                raise DataError(
                    f"The image {path} has pixels of more than 8 bits (mode {image.mode}), but "
                    f"only 8 bits are read: convert it to 8 bits."
                )
            return image if header_only else image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error, …
        raise DataError(
            f"The image {path} can't be read ({_one_line(error)}): repair or remove it."
        ) from error


@functools.cache
def _jpeg_decoder() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """torchvision's decoder, or None. torchvision has announced that it will remove it."""
    try:
        from torchvision.io import decode_jpeg  # here, because its import takes a second
    except ImportError:
        return None
    return decode_jpeg


def _read_pixels(path: str) -> torch.Tensor:
    """The image in a file, as uint8 (3, H, W)."""
    if path.lower().endswith((".jpg", ".jpeg")) and (decode_jpeg := _jpeg_decoder()):
        # It gives the pixels of PIL in a third of the time. PIL decodes the files that it can't.
        with contextlib.suppress(OSError, RuntimeError):
            pixels = decode_jpeg(torch.from_numpy(np.fromfile(path, dtype=np.uint8)))
            if len(pixels) in (1, 3):
                return pixels.expand(3, -1, -1)
    return torch.from_numpy(np.array(_read_image(path))).permute(2, 0, 1)


def _decode(paths: list[str], size: tuple[int, int]) -> torch.Tensor:
    """All images, each of `size` (width, height), as one uint8 tensor (N, 3, H, W)."""
    width, height = size
    images = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
    for path, image in zip(paths, images, strict=True):
        pixels = _read_pixels(path)
        if pixels.shape != image.shape:
            raise DataError(
                f"The image {path} is {pixels.shape[2]}x{pixels.shape[1]}, but others are "
                f"{width}x{height}; images up to {SMALL}x{SMALL} must all have one size: resize it."
            )
        image.copy_(pixels)
    return images


def _decoded(
    path: Path, files: dict[str, list[str]], size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """The images of each split: from the cache if no file has changed, otherwise decoded."""
    if sum(map(len, files.values())) < CACHED:
        return {split: _decode(paths, size) for split, paths in files.items()}
    key = hashlib.sha256()
    for split, paths in files.items():
        for file in paths:
            status = os.stat(file)
            key.update(f"{split} {file} {status.st_size} {status.st_mtime_ns}\n".encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mfac")
    place = hashlib.sha256(str(path).encode()).hexdigest()[:16]  # one cache file for each data set
    cache = folder / f"{path.name}-{place}.npz"
    # An unreadable cache file is replaced. A folder that is not writable is left alone.
    unreadable = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with contextlib.suppress(*unreadable), np.load(cache) as saved:
        if saved["key"] == key.hexdigest():
            return {split: torch.from_numpy(saved[split]) for split in files}
    images = {split: _decode(paths, size) for split, paths in files.items()}
    temporary = folder / f"{cache.stem}-{os.getpid()}.tmp"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, key=key.hexdigest(), **{k: v.numpy() for k, v in images.items()})
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    return images


def _in_memory(
    name: str, classes: list[str], splits: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> Data:
    """Data from uint8 images (N, 3, H, W) and labels (N,) of each split."""
    shape = tuple(splits["train"][0].shape[1:])
    mean, std = _published(name, classes, shape) or _statistics(splits["train"][0])
    sources = {
        split: Pixels(images, labels, _mirrors(name)) for split, (images, labels) in splits.items()
    }
    return Data(name, classes, shape, mean, std, sources)


def _on_disk(
    name: str, classes: list[str], splits: dict[str, tuple[list[str], torch.Tensor]]
) -> Data:
    """Data from the files and labels of each split."""
    from torchvision import transforms  # here, because its import takes a second

    to_tensor = transforms.PILToTensor()
    central_view = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(CROP), to_tensor]
    )
    mirror = [transforms.RandomHorizontalFlip()] if _mirrors(name) else []
    random_view = transforms.Compose([transforms.RandomResizedCrop(CROP), *mirror, to_tensor])
    shape = (3, CROP, CROP)
    paths = splits["train"][0]
    constants = _published(name, classes, shape)
    if constants is None:
        sample = paths[:: -(-len(paths) // SAMPLE)]
        constants = _statistics(torch.stack([central_view(_read_image(path)) for path in sample]))
    sources = {
        split: Files(paths, labels, central_view, random_view)
        for split, (paths, labels) in splits.items()
    }
    return Data(name, classes, shape, *constants, sources)


def _mirrors(name: str) -> bool:
    """Whether a mirrored image keeps its class. It does not for digits: a 2 looks like a 5."""
    return not any(word in _plain(name) for word in ("digit", "mnist", "svhn"))


def _published(
    name: str, classes: list[str], shape: tuple[int, ...]
) -> tuple[Channels, Channels] | None:
    """The published mean and standard deviation, if name or classes identify the data set."""
    name = _plain(name)
    if shape[1:] == (CROP, CROP):
        imagenet = all(re.fullmatch(r"n\d{8}", wordnet_id) for wordnet_id in classes)
        return CONSTANTS["imagenet"] if imagenet else None
    if name == "mnist":
        return CONSTANTS["mnist"]
    if shape[1:] == (32, 32):
        classes = sorted(c.lower() for c in classes)
        if " ".join(classes) == CIFAR10_CLASSES or (len(classes) == 10 and "cifar10" in name):
            return CONSTANTS["cifar10"]
        if len(classes) == 100 and ("cifar100" in name or SOME_CIFAR100_CLASSES <= {*classes}):
            return CONSTANTS["cifar100"]
    return None


def _statistics(images: torch.Tensor) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel of uint8 images (N, 3, H, W), in units of 255.

    They are computed from the histogram, which is exact and takes little memory.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double()
        share /= share.sum()
        mean = share @ values
        variance = share @ (values - mean) ** 2
        means.append(mean.item())
        stds.append(max(variance.sqrt().item(), 1 / 255))  # not 0 for a constant channel
    return tuple(means), tuple(stds)


def _crop_and_flip(images: torch.Tensor, draws: torch.Tensor, flip: bool) -> torch.Tensor:
    """A random HxW window of each image (n, C, H, W) padded with black. With `flip`, half of them
    are mirrored.

    The random integers `draws` (n, 3) give the top and left of the window and whether to mirror.
    One gather moves each pixel to its place.
    """
    n, channels, height, width = images.shape
    top, left = (draws[:, :2] % (2 * PADDING + 1)).T
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, -1)
    if flip:
        columns = torch.where(draws[:, 2:] % 2 == 1, width - 1 - columns, columns)
    columns = columns + left[:, None]
    places = rows[:, :, None] * (width + 2 * PADDING) + columns[:, None, :]
    padded = F.pad(images, (PADDING,) * 4).flatten(2)
    return padded.gather(2, places.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)
