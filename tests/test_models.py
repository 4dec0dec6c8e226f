"""The models against counts worked out here, an independent forward pass, and crafted files."""

import copy
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import models

DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56}
WIDE = {"wideresnet-22-2": (22, 2), "wideresnet-40-2": (40, 2), "wideresnet-22-4": (22, 4)}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# Architecture


def test_the_registry_holds_the_promised_models():
    assert {*DEPTHS, *WIDE, "mobilenet"} <= set(models.MODELS)


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize(("num_classes", "side"), [(10, 32), (3, 28)])
def test_any_model_takes_small_images_and_any_number_of_classes(name, num_classes, side):
    model = models.build(name, num_classes)
    output = model(torch.randn(2, 3, side, side))
    assert output.shape == (2, num_classes)
    output.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_mobilenet_takes_images_of_imagenet_size():
    model = models.build("mobilenet", 1000).eval()
    assert parameters(model) == 4_231_976  # of the original
    shapes = []
    model.features.register_forward_hook(lambda module, given, output: shapes.append(output.shape))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert shapes == [(1, 1024, 7, 7)]


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("name", DEPTHS)
def test_the_parameters_of_a_resnet(name, num_classes):
    blocks = (DEPTHS[name] - 2) // 6
    weights, norms = 3 * 9 * 16, 2 * 16
    for inputs, channels in ((16, 16), (16, 32), (32, 64)):
        weights += 9 * channels * (inputs + (2 * blocks - 1) * channels)
        norms += 4 * blocks * channels
        if inputs != channels:
            weights += inputs * channels
            norms += 2 * channels
    weights += 64 * num_classes
    model = models.build(name, num_classes)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == weights
    assert parameters(model) == weights + norms + num_classes
    if (name, num_classes) == ("resnet20", 10):
        assert (parameters(model), weights) == (272_474, 270_896)


@pytest.mark.parametrize("name", WIDE)
def test_the_parameters_of_a_wide_resnet(name):
    depth, widen = WIDE[name]
    blocks = (depth - 4) // 6
    count, inputs = 3 * 9 * 16, 16
    for channels in (16 * widen, 32 * widen, 64 * widen):
        count += 9 * channels * (inputs + (2 * blocks - 1) * channels)
        count += inputs * channels  # shortcut
        count += 2 * inputs + 2 * (2 * blocks - 1) * channels
        inputs = channels
    count += 2 * inputs + inputs * 10 + 10
    assert parameters(models.build(name, 10)) == count


def test_the_names_in_a_resnet():
    block = ["conv1.weight"]
    for part in ("bn1", "conv2", "bn2", "downsample.0", "downsample.1"):
        tensors = ["weight"]
        if part.startswith("bn") or part.endswith("1"):
            tensors += ["bias", "running_mean", "running_var", "num_batches_tracked"]
        block += [f"{part}.{tensor}" for tensor in tensors]
    expected = {key for key in block if key.startswith(("conv1", "bn1"))}
    for layer in (1, 2, 3):
        for number in (0, 1, 2):
            shortcut = layer > 1 and number == 0
            expected |= {
                f"layer{layer}.{number}.{key}"
                for key in block
                if shortcut or not key.startswith("downsample")
            }
    expected |= {"fc.weight", "fc.bias"}
    assert set(models.build("resnet20", 10).state_dict()) == expected


def normalised(x, state, name):
    """BatchNorm in evaluation, spelled out."""
    mean, var, scale, shift = (
        state[f"{name}.{key}"][:, None, None]
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def randomised(name):
    """A model in float64 whose norms are not trivial, in evaluation mode."""
    torch.manual_seed(0)
    model = models.build(name, 7).double().eval()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5) if key.endswith(("var", "weight")) else tensor.normal_()
    return model


def test_the_forward_pass_of_a_resnet():
    model = randomised("resnet20")
    state = model.state_dict()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    x = normalised(F.conv2d(images, state["conv1.weight"], padding=1), state, "bn1").relu()
    for layer in (1, 2, 3):
        for number in (0, 1, 2):
            block = f"layer{layer}.{number}"
            stride = 2 if layer > 1 and number == 0 else 1
            y = F.conv2d(x, state[f"{block}.conv1.weight"], padding=1, stride=stride)
            y = normalised(y, state, f"{block}.bn1").relu()
            y = F.conv2d(y, state[f"{block}.conv2.weight"], padding=1)
            y = normalised(y, state, f"{block}.bn2")
            if stride == 2:
                x = torch.einsum(
                    "oi,nihw->nohw",
                    state[f"{block}.downsample.0.weight"][:, :, 0, 0],
                    x[:, :, ::2, ::2],
                )
                x = normalised(x, state, f"{block}.downsample.1")
            x = (x + y).relu()
    assert x.shape == (3, 64, 8, 8)
    expected = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_the_forward_pass_of_a_wide_resnet():
    model = randomised("wideresnet-22-2")
    state = model.state_dict()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for layer in (1, 2, 3):
        for number in (0, 1, 2):
            block = f"layer{layer}.{number}"
            stride = 2 if layer > 1 and number == 0 else 1
            active = normalised(x, state, f"{block}.bn1").relu()
            y = F.conv2d(active, state[f"{block}.conv1.weight"], padding=1, stride=stride)
            y = normalised(y, state, f"{block}.bn2").relu()
            y = F.conv2d(y, state[f"{block}.conv2.weight"], padding=1)
            if number == 0:
                x = torch.einsum(
                    "oi,nihw->nohw",
                    state[f"{block}.shortcut.weight"][:, :, 0, 0],
                    active[:, :, ::stride, ::stride],
                )
            x = x + y
    assert x.shape == (2, 128, 8, 8)
    x = normalised(x, state, "bn1").relu()
    expected = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet56", "wideresnet-22-4", "mobilenet"])
def test_he_initialisation(name):
    torch.manual_seed(1)
    model = models.build(name, 100)
    for key, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach().double()
            fan_in = weight[0].numel()
            # Six standard deviations of the estimates of a normal distribution.
            ratio = weight.std(correction=0) / (2 / fan_in) ** 0.5
            assert abs(ratio - 1) < 6 / (2 * weight.numel()) ** 0.5, key
            assert abs(weight.mean()) < 6 * (2 / fan_in / weight.numel()) ** 0.5, key
            assert module.bias is None or (module.bias == 0).all()
    torch.manual_seed(1)
    again = models.build(name, 100)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_an_unknown_model_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'resnet18': choose one of .*mobilenet.*resnet20"):
        models.build("resnet18", 10)


def test_a_model_is_added_by_one_entry(monkeypatch):
    monkeypatch.setitem(
        models.MODELS, "flat", lambda n: nn.Sequential(nn.Flatten(), nn.Linear(12, n))
    )
    assert models.build("flat", 5)(torch.zeros(1, 3, 2, 2)).shape == (1, 5)


# Checkpoints


@pytest.fixture
def model():
    return models.build("resnet20", 10)


@pytest.fixture
def trained():
    """Another resnet20, whose buffers have moved too."""
    other = models.build("resnet20", 10)
    other(torch.randn(4, 3, 8, 8))
    return other


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "net", "model_state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_layout_of_a_checkpoint_loads(tmp_path, model, trained, prefix, key, legacy):
    state = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    stored = state if key is None else {key: state, "epoch": 3, "best_prec1": 91.7}
    torch.save(stored, tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
    assert not same(model, trained)
    models.load_checkpoint(model, str(tmp_path / "model.pth"))
    assert same(model, trained)


def test_the_checkpoint_of_a_compiled_model_in_a_trainer(tmp_path, model, trained):
    """And with it one whose own modules have the names of wrappers."""

    class Trainer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = torch.compile(model)

    for inner, other in ((model, trained), (Trainer(model), Trainer(trained))):
        torch.save(Trainer(other).state_dict(), tmp_path / "model.pth")
        models.load_checkpoint(inner, tmp_path / "model.pth")
        assert same(inner, other)


def test_the_checkpoint_of_an_averaged_model(tmp_path, model, trained):
    average = torch.optim.swa_utils.AveragedModel(trained, use_buffers=True)
    torch.save(average.state_dict(), tmp_path / "model.pth")
    models.load_checkpoint(model, tmp_path / "model.pth")
    assert same(model, trained)


def test_the_checkpoint_of_a_model_that_torch_has_pruned(tmp_path, model, trained):
    pruned = copy.deepcopy(trained)
    for layer in (pruned.conv1, pruned.fc):
        prune.l1_unstructured(layer, "weight", 0.5)
    torch.save(nn.DataParallel(pruned).state_dict(), tmp_path / "model.pth")
    models.load_checkpoint(model, tmp_path / "model.pth")
    for layer in (pruned.conv1, pruned.fc):
        prune.remove(layer, "weight")
    assert same(model, pruned) and (model.fc.weight == 0).sum() == 320


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints_in_any_precision(tmp_path, model, trained, dtype, suffix):
    path, state = tmp_path / f"model{suffix}", copy.deepcopy(trained).to(dtype).state_dict()
    if suffix == ".pth":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    models.load_checkpoint(model, path)
    assert same(model, trained.to(dtype).float())


def test_files_of_safetensors(tmp_path, model, monkeypatch):
    """A damaged one, and any without the package."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"text")
    fails(model, path, "not a checkpoint")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    fails(model, path, "pip install safetensors")


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_a_scalar_of_numpy_beside_the_weights_is_no_obstacle(tmp_path, model, trained, module):
    """Whatever version of it saved the checkpoint."""
    path, state = tmp_path / "model.pth.tar", trained.state_dict()
    public = {"state_dict": state, "best_prec1": np.float64(91.7), "epoch": np.int64(3)}
    torch.save(public, path, _use_new_zipfile_serialization=False)
    found = np.float64().__reduce__()[0].__module__.removesuffix(".multiarray").encode()
    path.write_bytes(path.read_bytes().replace(found, module))
    models.load_checkpoint(model, path)
    assert same(model, trained)


def test_a_checkpoint_from_before_batch_counters_loads(tmp_path, model, trained):
    state = {k: v for k, v in trained.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "old.pth")
    models.load_checkpoint(model, tmp_path / "old.pth")
    assert all(map(torch.equal, model.parameters(), trained.parameters()))


def test_a_checkpoint_saved_on_a_gpu_loads_without_one(tmp_path, model, trained):
    torch.save(trained.state_dict(), tmp_path / "cpu.pth")
    # A device is a string in the pickle: four bytes of length after an X, then the characters.
    with (
        zipfile.ZipFile(tmp_path / "cpu.pth") as source,
        zipfile.ZipFile(tmp_path / "gpu.pth", "w") as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"X\3\0\0\0cpu" in content
                content = content.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
            target.writestr(name, content)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "gpu.pth", weights_only=True)
    models.load_checkpoint(model, tmp_path / "gpu.pth")
    assert same(model, trained)
    assert all(p.device.type == "cpu" for p in model.parameters())


class Attack:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def fails(model, path, *words):
    """Loads a checkpoint and checks for one sentence with these words and an untouched model."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        models.load_checkpoint(model, path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    for word in (str(path), *words):
        assert word in message, message
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_files_that_are_no_checkpoints(tmp_path, model):
    fails(model, tmp_path / "absent.pth", "no checkpoint file")
    fails(model, tmp_path, "no checkpoint file")
    file = tmp_path / "file.pth"
    for content in (b"", b"text", b"PK\3\4 half a zip"):
        file.write_bytes(content)
        fails(model, file, "not a checkpoint")
    torch.save(model.state_dict(), file)
    file.write_bytes(file.read_bytes()[:5000])
    fails(model, file, "not a checkpoint")
    torch.save({"state_dict": Attack(tmp_path / "created")}, file)
    fails(model, file, "not a checkpoint")
    assert not (tmp_path / "created").exists()
    torch.save(model, file)  # the module itself, pickled
    fails(model, file, "not a checkpoint")
    for stored in (
        torch.ones(3),
        [1, 2],
        {"epoch": 3},
        {"state_dict": {"conv1.weight": 3}},
        {1: 2},
    ):
        torch.save(stored, file)
        fails(model, file, "no state dict")


def test_checkpoints_of_other_models(tmp_path, model):
    file = tmp_path / "file.pth"
    torch.save(models.build("resnet32", 10).state_dict(), file)
    fails(model, file, "another model", "has 'layer1.3.", "choose the model")
    torch.save(models.build("mobilenet", 10).state_dict(), file)
    fails(model, file, "another model", "lacks 'conv1.weight'")
    torch.save({}, file)
    fails(model, file, "lacks 'conv1.weight'")
    torch.save(models.build("resnet20", 100).state_dict(), file)
    fails(model, file, "number of classes", "'fc.weight' has the shape (100, 64)")
