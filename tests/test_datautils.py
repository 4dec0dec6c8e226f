"""Data sets are generated in temporary folders: no test needs the network or a data set on disk.

The environment variable MFAC_CIFAR10 may name CIFAR-10 in class folders, for one more test.
"""

import contextlib
import os
import pickle
import random
import signal
import struct
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import datautils
from datautils import DataError, load

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]
WORDNET = ["n01440764", "n01443537"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pixels(rng, width=32, height=32, channels=3):
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_set(root, rng, *, classes=("a", "b"), count=6, size=(32, 32), test="test", suffix=".png"):
    """Class folders of random images; returns the arrays of each split in the loader's order."""
    arrays = {}
    for split, folder in (("train", "train"), ("test", test)):
        arrays[split] = []
        for name in sorted(classes):
            (root / folder / name).mkdir(parents=True)
            for i in range(count):
                arrays[split].append(pixels(rng, *size))
                Image.fromarray(arrays[split][-1]).save(root / folder / name / f"{i:03}{suffix}")
    return {split: np.stack(images) for split, images in arrays.items()}


def batches(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


def unnormalised(data, images):
    """The uint8 pixels (n, H, W, 3) behind normalised images."""
    mean, std = (np.array(figure)[:, None, None] for figure in (data.mean, data.std))
    values = (images.double().numpy() * std + mean) * 255
    assert np.abs(values - values.round()).max() < 1e-3
    return values.round().astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set that is held in memory: 2 x 17 training images, so that no batch size divides it."""
    root = tmp_path_factory.mktemp("small")
    write_set(root, np.random.default_rng(5), count=17)
    return load(root)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A set that is read from disk, with the smallest test that shuffling can show."""
    root = tmp_path_factory.mktemp("large")
    write_set(root, np.random.default_rng(6), count=4, size=(90, 70))
    return load(root)


# The embedded digits


def test_digits_are_the_default_and_their_split_is_fixed_and_stratified():
    from sklearn.datasets import load_digits

    data = load()
    assert (data.name, data.shape, data.num_classes) == ("digits", (3, 32, 32), 10)
    train, test = (
        next(iter(data.loader(split, 2000, augment=False, shuffle=False)))
        for split in ("train", "test")
    )
    assert (len(train[0]), len(test[0])) == (1437, 360)
    images = np.concatenate([unnormalised(data, split[0]) for split in (train, test)])
    labels = torch.cat([train[1], test[1]]).numpy()
    # Each image is the enlargement of one original, with its label, and each original is used.
    originals = load_digits()
    places = ((np.arange(32) + 0.5) / 4 - 0.5).clip(0, 7)
    weights = np.maximum(1 - abs(places[:, None] - np.arange(8)), 0)  # bilinear, (32, 8)
    enlarged = (weights @ originals.images @ weights.T * 255 / 16).reshape(1797, -1)
    for channel in images.transpose(3, 0, 1, 2).reshape(3, 1797, -1).astype(float):
        norms = (channel**2).sum(1)[:, None] + (enlarged**2).sum(1)
        closest = (norms - 2 * channel @ enlarged.T).argmin(1)
        assert abs(channel - enlarged[closest]).max() < 0.51
        assert len(set(closest)) == 1797
        assert (originals.target[closest] == labels).all()
    for digit, total in Counter(labels.tolist()).items():
        assert abs((test[1] == digit).sum() - total * 360 / 1797) < 1
    again = next(iter(load("digits").loader("test", 360)))
    assert torch.equal(again[0], test[0]) and torch.equal(again[1], test[1])


# What comes out of class folders


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".PNG"])
def test_a_lossless_image_arrives_pixel_for_pixel(tmp_path, rng, suffix):
    arrays = write_set(tmp_path, rng, classes=("b", "a", "c"), suffix=suffix)
    data = load(tmp_path)
    assert data.classes == ["a", "b", "c"] and data.shape == (3, 32, 32)
    for split in ("train", "test"):
        loader = data.loader(split, 4, augment=False, shuffle=False)
        images, labels = map(torch.cat, zip(*loader, strict=True))
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert (unnormalised(data, images) == arrays[split]).all()
        assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".gif", ".jpg without torchvision"])
def test_a_lossy_image_arrives_as_pil_decodes_it(tmp_path, rng, monkeypatch, suffix):
    suffix, without = suffix.split()[0], "without" in suffix
    if without:
        monkeypatch.setattr(datautils, "_jpeg_decoder", lambda: None)
    write_set(tmp_path, rng, count=2, suffix=suffix)
    data = load(tmp_path)
    images = torch.cat([images for images, _ in data.loader("test", 3)])
    files = sorted((tmp_path / "test").rglob("*.*"))
    decoded = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    assert (unnormalised(data, images) == np.stack(decoded)).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_of_eight_bits_becomes_three_channels(tmp_path, rng, mode):
    write_set(tmp_path, rng, count=1)
    file = tmp_path / "test/a/000.png"
    image = Image.open(file).convert(mode)
    file.unlink()
    image.save(file.with_suffix(".tif"))
    data = load(tmp_path)
    images, _ = next(iter(data.loader("test", 1)))
    assert (unnormalised(data, images)[0] == np.asarray(image.convert("RGB"))).all()


def test_images_need_not_be_square(tmp_path, rng):
    arrays = write_set(tmp_path, rng, size=(20, 12))
    data = load(tmp_path)
    assert data.shape == (3, 12, 20)
    images, _ = next(iter(data.loader("test", 100)))
    assert (unnormalised(data, images) == arrays["test"]).all()
    assert next(iter(data.loader("train", 5)))[0].shape == (5, 3, 12, 20)


def test_val_serves_where_test_is_absent_or_has_no_classes(tmp_path, rng):
    arrays = write_set(tmp_path, rng, test="val")
    for _ in range(2):
        data = load(tmp_path)
        images, _ = next(iter(data.loader("test", 100)))
        assert (unnormalised(data, images) == arrays["test"]).all()
        (tmp_path / "test").mkdir(exist_ok=True)
        Image.fromarray(pixels(rng)).save(tmp_path / "test/unlabelled.png")


def test_other_and_hidden_files_are_passed_over_and_folders_inside_a_class_count(tmp_path, rng):
    arrays = write_set(tmp_path, rng, count=3)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/a/.hidden.png").write_bytes(b"no image")
    (tmp_path / "train/.git").mkdir()
    (tmp_path / "train/b/inside").mkdir()
    (tmp_path / "train/b/002.png").rename(tmp_path / "train/b/inside/002.png")
    data = load(tmp_path)
    images, _ = next(iter(data.loader("train", 100, augment=False, shuffle=False)))
    assert (unnormalised(data, images) == arrays["train"]).all()


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_a_jpeg_that_torchvision_can_not_decode_is_left_to_pil(tmp_path, rng):
    """Of four colours, and a PNG under a wrong name."""
    write_set(tmp_path, rng, count=1, suffix=".jpg")
    files = [tmp_path / "test" / name / "000.jpg" for name in "ab"]
    Image.fromarray(pixels(rng)).convert("CMYK").save(files[0])
    Image.fromarray(pixels(rng)).save(files[1], format="PNG")
    data = load(tmp_path)
    images, _ = next(iter(data.loader("test", 2)))
    decoded = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    assert (unnormalised(data, images) == np.stack(decoded)).all()


# What was decoded is kept


@pytest.fixture
def cache(tmp_path, rng, monkeypatch):
    """A set that is kept, the folder where, and a function that loads it and says whether images
    were decoded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datautils, "CACHED", 8)
    arrays = write_set(tmp_path / "set", rng, count=2)
    calls, decode = [], datautils._decode
    monkeypatch.setattr(datautils, "_decode", lambda *given: calls.append(0) or decode(*given))

    def decoded() -> bool:
        calls.clear()
        data = load(tmp_path / "set")
        for split in ("train", "test"):
            loader = data.loader(split, 4, augment=False, shuffle=False)
            images, labels = next(iter(loader))
            assert (unnormalised(data, images) == arrays[split]).all()
            assert labels.tolist() == [0, 0, 1, 1]
        return bool(calls)

    return tmp_path / "cache/mfac", decoded, arrays


def test_images_are_decoded_once(cache, monkeypatch):
    folder, decoded, _ = cache
    assert decoded() and not decoded() and not decoded()
    (kept,) = folder.iterdir()
    assert kept.name.startswith("set-")
    monkeypatch.setattr(datautils, "CACHED", 9)  # for fewer it is not worth it
    assert decoded()


def test_changed_files_are_decoded_anew(cache, tmp_path, rng):
    folder, decoded, arrays = cache
    assert decoded()
    file, image = tmp_path / "set/train/b/001.png", pixels(rng)
    Image.fromarray(image).save(file)
    arrays["train"][3] = image
    assert decoded() and not decoded()
    os.utime(file, ns=(0, 0))
    assert decoded() and not decoded()
    file.rename(file.with_name("002.png"))
    assert decoded() and not decoded()
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["shortened", "one bit", "empty", "other"])
def test_a_damaged_cache_is_replaced(cache, damage, rng):
    folder, decoded, _ = cache
    assert decoded()
    (kept,) = folder.iterdir()
    whole = bytearray(kept.read_bytes())
    if damage == "one bit":
        whole[int(rng.integers(1000, 20_000))] ^= 1
    bad = {"shortened": whole[:9000], "one bit": whole, "empty": b"", "other": b"text"}[damage]
    kept.write_bytes(bad)
    assert decoded() and not decoded()


def test_a_cache_folder_that_can_not_be_is_no_obstacle(cache):
    folder, decoded, _ = cache
    folder.parent.write_text("a file")
    assert decoded() and decoded()


@pytest.mark.parametrize("size", [(32, 32), (80, 80)])
def test_the_data_set_folder_is_left_as_it_was(tmp_path, rng, size):
    write_set(tmp_path, rng, count=2, size=size)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    batches(load(tmp_path).loader("train", 2, workers=0))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))} == before


# Normalisation


@pytest.mark.parametrize(
    ("name", "classes", "published"),
    [
        ("pictures", CIFAR10, "cifar10"),
        ("CIFAR-10", [str(i) for i in range(10)], "cifar10"),
        ("my_cifar100", [str(i) for i in range(100)], "cifar100"),
        (
            "pictures",
            [f"c{i}" for i in range(96)] + sorted(datautils.SOME_CIFAR100_CLASSES),
            "cifar100",
        ),
    ],
)
def test_cifar_is_told_by_its_folder_or_its_classes(tmp_path, rng, name, classes, published):
    root = tmp_path / name
    write_set(root, rng, classes=classes, count=1)
    data = load(root)
    assert (data.mean, data.std) == datautils.CONSTANTS[published]


def test_other_sets_are_normalised_by_their_training_images(tmp_path, rng):
    arrays = write_set(tmp_path, rng, classes=CIFAR10[:9], size=(9, 7))
    values = arrays["train"].astype(np.float64) / 255
    data = load(tmp_path)
    np.testing.assert_allclose(data.mean, values.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, values.std(axis=(0, 1, 2)), rtol=1e-12)
    loader = data.loader("train", 7, augment=False)
    images = torch.cat([images for images, _ in loader]).double()
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_a_constant_channel_stays_finite(tmp_path, rng):
    for folder in ("train/a", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8), (0, 7, 255)).save(tmp_path / folder / "0.png")
    images, _ = next(iter(load(tmp_path).loader("train", 1, augment=False)))
    assert torch.isfinite(images).all() and images.abs().max() < 1e-3


# Augmentation


def windows(image, padding=4):
    """Every crop of the image (H, W, 3) padded with black, straight and mirrored, as bytes."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crops = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            crops[crop.tobytes()] = (top, left, False)
            crops[crop[:, ::-1].tobytes()] = (top, left, True)
    return crops


@pytest.mark.parametrize(("name", "mirrored"), [("pictures", True), ("svhn", False)])
def test_small_images_are_cropped_from_black_padding_and_mirrored(tmp_path, rng, name, mirrored):
    root = tmp_path / name
    arrays = write_set(root, rng, count=4, size=(11, 9))
    data = load(root)
    known = [windows(image) for image in arrays["train"]]
    assert all(len(crops) == 162 for crops in known)
    loader = data.loader("train", 3, shuffle=False, seed=int(rng.integers(2**31)))
    seen = Counter()
    epochs = 100
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        images = torch.cat([images for images, _ in loader])
        for image, crops in zip(unnormalised(data, images), known, strict=True):
            seen[crops[image.tobytes()]] += 1  # a KeyError is an image that is no such window
    draws = 8 * epochs
    rows, columns, mirrors = (Counter() for _ in range(3))
    for (top, left, mirror), times in seen.items():
        rows[top] += times
        columns[left] += times
        mirrors[mirror] += times
    for counter in (rows, columns):  # six standard deviations around the expectation
        assert set(counter) == set(range(9))
        assert all(abs(n - draws / 9) < 6 * (draws * 8 / 81) ** 0.5 for n in counter.values())
    if mirrored:
        assert abs(mirrors[True] - draws / 2) < 6 * draws**0.5 / 2
    else:
        assert set(mirrors) == {False}


def test_digits_are_never_mirrored():
    data = load()
    plain = data.loader("train", 1437, augment=False, shuffle=False)
    images = next(iter(plain))[0][:40]
    known = [windows(image) for image in unnormalised(data, images)]
    loader = data.loader("train", 40, shuffle=False)
    for epoch in range(3):
        loader.set_epoch(epoch)
        crops = unnormalised(data, next(iter(loader))[0])
        found = [table[crop.tobytes()] for crop, table in zip(crops, known, strict=True)]
        assert not any(mirror for _, _, mirror in found)
        assert len({place[:2] for place in found}) > 10


# Order, seeds and resumption, alike for sets in memory and on disk


@pytest.fixture(params=["small", "large", "large with workers"])
def make(request, small, large):
    """Makes a loader of the training split."""
    data = small if request.param == "small" else large
    workers = 2 if "workers" in request.param else 0
    return lambda batch_size=3, **options: data.loader(
        "train", batch_size, **{"workers": workers, **options}
    )


def test_a_loader_says_how_much_it_yields(make):
    loader = make(3)
    sizes = [len(labels) for _, labels in loader]
    assert loader.batch_size == 3 and loader.num_samples == sum(sizes)
    assert len(loader) == len(sizes)
    assert sizes == [3] * (loader.num_samples // 3) + [loader.num_samples % 3]


def test_an_epoch_is_a_permutation_with_the_labels_of_its_images(make):
    straight = batches(make(1, shuffle=False, augment=False))
    label_of = {images.numpy().tobytes(): labels.item() for images, labels in straight}
    assert len(label_of) == len(straight)
    found = [
        (image.numpy().tobytes(), label.item())
        for images, labels in make(3, seed=1, augment=False)
        for image, label in zip(images, labels, strict=True)
    ]
    assert dict(found) == label_of and len(found) == len(label_of)
    assert [image for image, _ in found] != list(label_of)


def test_batches_are_a_function_of_seed_and_epoch_alone(make):
    loader = make(seed=7)
    first = batches(loader)
    assert equal(first, batches(loader))
    loader.set_epoch(1)
    second = batches(loader)
    assert not equal(first, second)
    resumed = make(seed=7)
    resumed.set_epoch(1)
    assert equal(second, batches(resumed))
    loader.set_epoch(0)
    assert equal(first, batches(loader))
    assert not equal(first, batches(make(seed=8)))
    assert equal(batches(make(seed=-1)), batches(make(seed=-1)))


def test_the_augmentation_does_not_depend_on_the_batch_size(make):
    def joined(loader):
        return [torch.cat(tensors) for tensors in zip(*batches(loader), strict=True)]

    for one, other in zip(joined(make(2, seed=3)), joined(make(5, seed=3)), strict=True):
        assert torch.equal(one, other)


def test_global_generators_are_neither_read_nor_changed(make):
    def state():
        numpy_state = np.random.get_state()
        numbers = numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()
        return random.getstate(), numbers

    loader = make(seed=2)
    before = state()
    first = batches(loader)
    assert state() == before
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(99)
    assert equal(first, batches(loader))


def test_two_iterations_at_once_do_not_disturb_each_other(make):
    loader = make(seed=4)
    expected = batches(loader)
    one, other = iter(loader), iter(loader)
    loader.set_epoch(5)  # counts for iterations that start later
    pairs = list(zip(one, other, strict=True))
    assert equal([pair[0] for pair in pairs], expected)
    assert equal([pair[1] for pair in pairs], expected)


@pytest.mark.parametrize("fixture", ["small", "large"])
def test_the_test_split_is_in_order_and_not_augmented_unless_asked(request, fixture):
    data = request.getfixturevalue(fixture)
    plain = batches(data.loader("test", 3, workers=0))
    assert equal(plain, batches(data.loader("test", 3, seed=5, workers=0)))
    labels = torch.cat([labels for _, labels in plain])
    assert torch.equal(labels, labels.sort().values)
    augmented = batches(data.loader("test", 3, augment=True, workers=0))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(plain, augmented, strict=True))
    assert not equal(plain, augmented)
    assert not equal(plain, batches(data.loader("test", 3, shuffle=True, workers=0)))


def test_workers_change_nothing(large):
    one = batches(large.loader("train", 3, seed=1, workers=0))
    assert equal(one, batches(large.loader("train", 3, seed=1, workers=1)))


def test_too_little_shared_memory_for_workers(large, monkeypatch):
    """A worker has two batches there, and one is on its way; without a wish there are fewer."""
    size = 3 * 3 * 224 * 224
    free = {"/dev/shm": 0}
    monkeypatch.setattr(datautils, "SHARED_MEMORY", str(Path.cwd()))  # a folder on any system
    monkeypatch.setattr(
        datautils.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free["/dev/shm"])
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for free["/dev/shm"], workers in ((5 * size, 2), (3 * size, 1), (2 * size, 0), (0, 0)):
        how = contextlib.nullcontext() if workers == 2 else pytest.warns(match="MiB free")
        with how:
            assert large.loader("train", 3).workers == workers
    assert large.loader("train", 3, workers=0).workers == 0
    with pytest.raises(DataError, match=r"has 0 MiB free, but 2 workers .* at most 0 workers"):
        large.loader("train", 3, workers=2)


def test_a_worker_that_is_killed_is_a_sentence(large, monkeypatch):
    def end(self, *given):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(datautils.Files, "batch", end)
    message = ""
    try:
        batches(large.loader("train", 3, workers=1))
    except DataError as error:
        message = str(error)
    assert "A worker process that reads images was killed" in message and "\n" not in message


@pytest.mark.cuda
@pytest.mark.parametrize("fixture", ["small", "large"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_made_on_the_gpu(request, fixture, workers):
    """The same as on the CPU."""
    data = request.getfixturevalue(fixture)
    made = [
        batches(data.loader("train", 3, seed=2, workers=workers, device=device))
        for device in ("cpu", "cuda")
    ]
    assert all(x.is_cuda for batch in made[1] for x in batch)
    for one, other in zip(*made, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y.cpu(), rtol=1e-6, atol=1e-6)


def test_arguments_of_a_loader_are_checked(small):
    for batch_size in (0, -4):
        with pytest.raises(ValueError, match=f"{batch_size}: it must be at least 1"):
            small.loader("train", batch_size)
    with pytest.raises(ValueError, match="'val': choose 'train' or 'test'"):
        small.loader("val", 2)


# Larger images


def test_a_large_image_is_resized_to_256_and_cut_from_its_centre(tmp_path, rng):
    write_set(tmp_path, rng, count=1, size=(300, 520))
    data = load(tmp_path)
    assert data.shape == (3, 224, 224)
    images, _ = next(iter(data.loader("test", 1, workers=0)))
    image = Image.open(tmp_path / "test/a/000.png").resize((256, 443), Image.BILINEAR)
    top, left = round((443 - 224) / 2), (256 - 224) // 2
    expected = np.asarray(image)[top : top + 224, left : left + 224]
    assert (unnormalised(data, images)[0] == expected).all()


def test_a_large_image_is_cropped_at_random_and_mirrored(tmp_path):
    # Red grows to the right and green downwards, so a view shows which part of the image it is.
    ramp = np.arange(200, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp, ramp[:, None], ramp * 0), axis=2)
    for folder in ("train/a", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
    data = load(tmp_path)
    images, _ = next(iter(data.loader("train", 40, workers=0)))
    views = unnormalised(data, images).astype(float)
    left, right = views[:, :, 0, 0].mean(1), views[:, :, -1, 0].mean(1)
    height = views[:, -1, :, 1].mean(1) - views[:, 0, :, 1].mean(1)
    mirrored = left > right
    assert 0 < mirrored.sum() < 40
    assert (height > 0).all()
    area = np.abs(right - left) * height / 200**2
    assert area.min() > 0.05 and area.max() < 1.05
    assert len(np.unique(area.round(3))) > 30


def test_imagenet_is_told_by_its_classes_and_others_are_measured(tmp_path, rng, monkeypatch):
    write_set(tmp_path / "imagenet", rng, classes=WORDNET, count=1, size=(90, 70))
    data = load(tmp_path / "imagenet")
    assert (data.mean, data.std) == datautils.CONSTANTS["imagenet"]
    monkeypatch.setattr(datautils, "SAMPLE", 3)
    for i in range(5):
        for folder in ("train/a", "test/a"):
            (tmp_path / "grey" / folder).mkdir(parents=True, exist_ok=True)
            Image.new("L", (70, 70), 50 * i).save(tmp_path / "grey" / folder / f"{i}.png")
    data = load(tmp_path / "grey")  # measured on the images 0, 2 and 4
    np.testing.assert_allclose(data.mean, 100 / 255, rtol=1e-12)
    np.testing.assert_allclose(data.std, np.std([0, 100, 200]) / 255, rtol=1e-12)


def test_mixed_sizes_are_cropped_to_one(tmp_path, rng):
    write_set(tmp_path, rng, count=2)
    Image.fromarray(pixels(rng, 100, 80)).save(tmp_path / "train/b/000.png")
    data = load(tmp_path)
    assert data.shape == (3, 224, 224)
    assert next(iter(data.loader("train", 4, workers=0)))[0].shape == (4, 3, 224, 224)


# Original files


def write_cifar10(root, rng, monkeypatch):
    """The python batches of CIFAR-10 with 4 images each, whose checksums are not compared."""
    from torchvision.datasets import CIFAR10 as Original

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for listed in ("train_list", "test_list"):
        names = [(name, None) for name, _ in getattr(Original, listed)]
        monkeypatch.setattr(Original, listed, names)
    monkeypatch.setattr(Original, "meta", {**Original.meta, "md5": None})
    arrays = {}
    for split, names in (("train", Original.train_list), ("test", Original.test_list)):
        arrays[split] = np.stack([pixels(rng) for _ in range(4 * len(names))])
        for part, (name, _) in zip(np.split(arrays[split], len(names)), names, strict=True):
            rows = part.transpose(0, 3, 1, 2).reshape(4, -1)
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10}))
    return arrays


def write_mnist(root, rng):
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    arrays = {}
    for split, prefix, count in (("train", "train", 9), ("test", "t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(count, dtype=np.uint8)
        header = struct.pack(">II", 0x801, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        arrays[split] = images[..., None].repeat(3, axis=3)
    return arrays


@pytest.mark.parametrize("given", ["", "cifar-10-batches-py"])
def test_the_original_files_of_cifar10_are_read(tmp_path, rng, monkeypatch, given):
    arrays = write_cifar10(tmp_path, rng, monkeypatch)
    data = load(tmp_path / given)
    assert (data.name, data.classes, data.shape) == ("cifar10", CIFAR10, (3, 32, 32))
    assert (data.mean, data.std) == datautils.CONSTANTS["cifar10"]
    for split in ("train", "test"):
        images, labels = next(iter(data.loader(split, 100, augment=False, shuffle=False)))
        assert (unnormalised(data, images) == arrays[split]).all()
        assert labels.tolist() == [3, 1, 4, 1] * (len(images) // 4)


@pytest.mark.parametrize("given", ["", "MNIST", "MNIST/raw"])
def test_the_original_files_of_mnist_are_read(tmp_path, rng, given):
    arrays = write_mnist(tmp_path, rng)
    data = load(tmp_path / given)
    assert (data.name, data.num_classes, data.shape) == ("mnist", 10, (3, 28, 28))
    assert (data.mean, data.std) == datautils.CONSTANTS["mnist"]
    images, labels = next(iter(data.loader("test", 100)))
    assert (unnormalised(data, images) == arrays["test"]).all()
    assert labels.tolist() == list(range(5))
    loader = data.loader("train", 9, shuffle=False)
    known = [windows(image) for image in arrays["train"]]
    for epoch in range(5):
        loader.set_epoch(epoch)
        crops = unnormalised(data, next(iter(loader))[0])
        for crop, table in zip(crops, known, strict=True):
            assert not table[crop.tobytes()][2]  # a mirrored digit is of another class


# Mistakes


def fails(path, *words):
    """Loads a set and checks that the error is one sentence with these words."""
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    for word in words:
        assert str(word) in message, message


def test_a_path_without_a_data_set(tmp_path):
    fails(tmp_path / "nowhere", "no data set at", tmp_path / "nowhere")
    fails(tmp_path, "train/ and test/")
    (tmp_path / "cifar10.tar.gz").write_bytes(b"")
    fails(tmp_path / "cifar10.tar.gz", "is a file: give a folder")
    fails(tmp_path / ("x" * 300), "can't be read")


def test_a_split_that_is_missing_or_empty(tmp_path, rng):
    write_set(tmp_path, rng, test="elsewhere")
    fails(tmp_path, "has no test/ or val/")
    (tmp_path / "test").mkdir()
    fails(tmp_path, "has no test/ or val/")
    (tmp_path / "test/a").mkdir()
    (tmp_path / "train").rename(tmp_path / "kept")
    (tmp_path / "train").mkdir()
    fails(tmp_path, tmp_path / "train", "no class folders")


@pytest.mark.parametrize("layout", ["flat", "tiny-imagenet"])
def test_images_that_are_not_sorted_into_classes(tmp_path, rng, layout):
    write_set(tmp_path, rng, classes=WORDNET, test="val")
    place = tmp_path / "val" / ("" if layout == "flat" else "images")
    place.mkdir(exist_ok=True)
    for file in sorted((tmp_path / "val").rglob("n*/*.png")):
        file.rename(place / f"{file.parent.name}-{file.name}")
    for name in WORDNET:
        (tmp_path / "val" / name).rmdir()
    (tmp_path / "test/images").mkdir(parents=True)
    fails(tmp_path, "has no test/ or val/", "sort its test images into folders")


def test_classes_that_differ_are_named(tmp_path, rng):
    write_set(tmp_path, rng, classes=("a", "b", "c", "d", "e"), count=1)
    (tmp_path / "test/b").rename(tmp_path / "test/z")
    fails(tmp_path, "classes differ", f"{tmp_path / 'train'} has 'b', but")
    for name in "acd":
        (tmp_path / "test" / name / "000.png").unlink()
        (tmp_path / "test" / name).rmdir()
    fails(tmp_path, "'a', 'b', 'c' and 1 more")
    for name in "abcd":
        (tmp_path / "test" / name).mkdir()
    fails(tmp_path, f"{tmp_path / 'test'} has 'z', but")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images(tmp_path, rng, split):
    write_set(tmp_path, rng, count=1)
    (tmp_path / split / "b/000.png").rename(tmp_path / split / "b/000.txt")
    fails(tmp_path, tmp_path / split / "b", "holds no images")


@pytest.mark.parametrize("which", ["000.png", "001.png"])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
def test_an_unreadable_image_is_named(tmp_path, rng, which, damage):
    write_set(tmp_path, rng, count=2)
    file = tmp_path / "train/b" / which
    whole = file.read_bytes()
    file.write_bytes({"text": b"no image", "empty": b"", "truncated": whole[:-200]}[damage])
    fails(tmp_path, file, "can't be read")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_large_image_is_named(tmp_path, rng, workers):
    write_set(tmp_path, rng, count=2, size=(90, 70))
    data = load(tmp_path)
    file = tmp_path / "train/b/001.png"
    file.write_bytes(file.read_bytes()[:500])
    message = ""
    try:
        batches(data.loader("train", 2, workers=workers))
    except DataError as error:  # pytest.raises would keep the worker processes until a collection
        message = str(error)
    assert str(file) in message and "can't be read" in message and "\n" not in message


def test_pixels_of_sixteen_bits_are_not_cut_off_silently(tmp_path, rng):
    write_set(tmp_path, rng, count=2)
    file = tmp_path / "test/a/001.png"
    Image.fromarray(np.full((32, 32), 40000, dtype=np.uint16)).save(file)
    fails(tmp_path, file, "more than 8 bits")


def test_a_small_image_of_another_size_is_named(tmp_path, rng):
    write_set(tmp_path, rng, count=2)
    file = tmp_path / "test/b/001.png"
    Image.fromarray(pixels(rng, 30, 31)).save(file)
    fails(tmp_path, file, "30x31", "32x32")


def test_two_sets_of_original_files_are_not_guessed_between(tmp_path, rng, monkeypatch):
    write_cifar10(tmp_path, rng, monkeypatch)
    write_mnist(tmp_path, rng)
    fails(tmp_path, "cifar10 and of mnist", tmp_path / "MNIST", tmp_path / "cifar-10-batches-py")
    assert load(tmp_path / "MNIST").name == "mnist"


@pytest.mark.parametrize("name", ["cifar10", "CIFAR-100", "mnist"])
def test_an_impossible_download(tmp_path, monkeypatch, name):
    for scheme in ("http", "https"):  # the discard port of this machine: nobody answers
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies that it first saw
    root = tmp_path / name
    fails(root, root, "or downloaded")
    fails(root, root, "or downloaded")  # the folder that the attempt left behind is no obstacle
    (root / "broken.tar.gz").write_bytes(b"half an archive")
    fails(root, root, "or downloaded")


def test_a_folder_with_other_things_is_not_downloaded_to(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10/thesis.tex").write_text("")
    fails(tmp_path / "cifar10", "holds no data set")


@pytest.mark.skipif("MFAC_CIFAR10" not in os.environ, reason="MFAC_CIFAR10 names no CIFAR-10")
def test_the_real_cifar10():
    data = load(Path(os.environ["MFAC_CIFAR10"]))
    assert data.classes == CIFAR10 and data.shape == (3, 32, 32)
    train, test = data.loader("train", 128), data.loader("test", 128)
    assert (train.num_samples, len(train)) == (50000, 391)
    labels = torch.cat([labels for _, labels in train])
    assert torch.bincount(labels).tolist() == [5000] * 10
    images = torch.cat([images for images, _ in test])
    # The published constants are those of the training images; the test images are close to them.
    assert images.mean((0, 2, 3)).abs().max() < 0.05
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.05
