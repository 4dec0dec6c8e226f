"""Real, small pruning runs through the command line of main_prun.py.

Most prune an untrained ResNet-20 on a folder of 8x8 images of handwritten digits.
"""

import contextlib
import csv
import os
import random
import re
import resource
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_main_optim import assert_shown

import costs
import datautils
import finetune
import main_common
import main_optim
import main_prun
import memory
import models
import prun_settings
from prun import MFACPruner, inverse_bytes

SCRIPT = Path(main_prun.__file__)
TIMES = {name for name in main_prun.COLUMNS if name.endswith("_seconds")}


@pytest.fixture(autouse=True)
def one_thread():
    """Bits depend on the number of threads, and the processes started here have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A ResNet-20 for four classes."""
    torch.manual_seed(time.time_ns() % 2**32)
    path = tmp_path_factory.mktemp("checkpoint") / "resnet20.pth"
    torch.save(models.build("resnet20", 4).state_dict(), path)
    return path


@pytest.fixture
def run(dataset, checkpoint, tmp_path, monkeypatch, blank_pictures):
    """A function that runs the script in an empty folder, and returns the status it ends with: on
    the CPU, as bits are compared."""
    monkeypatch.chdir(tmp_path)
    defaults = {"--dataset": dataset, "--checkpoint": checkpoint, "--device": "cpu"}

    def call(*flags) -> int:
        command = [str(flag) for flag in flags]
        for flag, value in defaults.items():
            if flag not in command:
                command += [flag, str(value)]
        try:
            main_prun.main(command)
        except SystemExit as end:
            return end.code
        return 0

    return call


FEW = ["--ngrads", "8", "--npergrad", "4"]  # gradients
RUNS = {  # flags of a run of each kind; --batchsize 32 makes three batches an epoch
    "magnitude": "--pruner magnitude --sparsities 0.3 0.6 0.9",
    "one base": "--sparsities 0.3 0.6 0.9 --recomps 0 --ngrads_schedule 6 7 8 --npergrad 4",
    "recomputed": "--sparsities 0.3 0.6 0.9 --nrecomps 2 --ngrads 8 --npergrad 4",
    "blocked": "--sparsities 0.5 0.9 --rounds 2 --blocksize 6 --ngrads 8 --npergrad 4",
    "gradual sgd": "--sparsities 0.5 0.9 --nepochs 4 --prun_every 2 --batchsize 32 --ngrads 8 "
    "--npergrad 4",
    "batch norm": "--sparsities 0.3 0.9 --reestimate_bn --reset_bn --ngrads 8 --npergrad 4",
    "distilled": "--sparsities 0.5 0.9 --nepochs 3 --prun_every 2 --schedule cosine --distill 0.7 "
    "--reestimate_bn --amp --batchsize 32 --ngrads 8 --npergrad 4",
    "gradual mfac": "--cubic 0.5 0.9 2 --nepochs 3 --optim mfac --batchsize 32 --ngrads 8 "
    "--npergrad 4",
}


def start(*flags, **options) -> subprocess.Popen:
    """The script in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, flags), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes | options)


def rows(path: str, without=frozenset()) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key not in without} for row in table]


def pruned(path: str) -> dict[str, torch.Tensor]:
    """The parameters with masks in the model file `path`, after a check that both agree."""
    saved = torch.load(path, weights_only=True)
    weights = {name: saved["state_dict"][name] for name in saved["masks"]}
    for name, weight in weights.items():
        assert torch.equal(weight != 0, saved["masks"][name])
    return weights


def zeros(path: str) -> tuple[int, int]:
    """How many of how many prunable weights are zero."""
    weights = pruned(path).values()
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


def same_weights(one: str, other: str) -> bool:
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (one, other)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def assert_same_run(one: str, other: str) -> None:
    """Two runs ended with the same bits in every model, and the same figures but for times."""
    ends = sorted(path.name.removeprefix(one) for path in Path().glob(f"{one}-step*"))
    assert ends == sorted(path.name.removeprefix(other) for path in Path().glob(f"{other}-step*"))
    for end in ends:
        assert Path(one + end).read_bytes() == Path(other + end).read_bytes()
    assert rows(f"{one}.csv", TIMES) == rows(f"{other}.csv", TIMES)


def interrupt_after(monkeypatch, lines: int) -> None:
    """Ctrl-C comes while the accuracy is measured that would make the next line."""
    calls = iter(range(lines))
    evaluate = main_prun.evaluate

    def interrupted(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(main_prun, "evaluate", interrupted)


def spy(monkeypatch, method: str, record) -> list:
    """The list of what `record(pruner, *arguments)` gave for each call of a pruner's method."""
    records, original = [], getattr(MFACPruner, method)

    def recording(self, *args, **options):
        records.append(record(self, *args))
        return original(self, *args, **options)

    monkeypatch.setattr(MFACPruner, method, recording)
    return records


# --- what a run leaves ----------------------------------------------------------------------


def test_the_published_command(tmp_path):
    """The command of the README but for the data and the number of gradients, on a model that
    main_optim.py has saved."""
    torch.manual_seed(0)
    model = models.build("resnet20", 10)
    torch.save({"state_dict": model.state_dict(), "classes": []}, tmp_path / "net.pth")
    steps = " ".join(map(str, range(9)))
    flags = "--model resnet20 --dataset digits --pruner mfac --ngrads 4 --npergrad 4 "
    flags += f"--sparsities 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 --recomps {steps} --tests {steps}"
    process = start(*flags.split(), "--checkpoint", "net.pth", "--verbose", cwd=tmp_path)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = out.splitlines()
    assert lines[0].startswith("# ") and "damp 1e-05" in lines[0] and "update joint" in lines[0]
    figures = [line for line in lines[1:] if not line.startswith("    ")]
    assert len(figures) == 1 + 9
    for step, line in enumerate(figures[1:]):
        assert line.startswith(f"step {step}  sparsity 0.{step + 1}000  of all 0.{step}9")
        for part in (" test ", "top-5 ", "gradients ", "inverse ", "evaluation "):
            assert part in line
    assert len(lines) - 1 - len(figures) == (1 + 9) * 22  # layers
    assert "GB on cpu" in errors and errors.count("\n") == 1
    stem = tmp_path / "runs" / "resnet20-digits-pruned-mfac"
    names = {f"{stem.name}{end}" for end in (".state", ".csv", ".png")}
    names |= {f"{stem.name}-step{step}.pth" for step in range(9)}
    assert {path.name for path in stem.parent.iterdir()} == names
    for step in range(9):
        count, n = zeros(f"{stem}-step{step}.pth")
        assert count == round((step + 1) / 10 * n)


@pytest.mark.parametrize("pruner", ["magnitude", "gmp", "GMP", "mfac"])
def test_models_figures_and_lines(run, dataset, pruner, capsys, figures):
    flags = FEW if pruner == "mfac" else []
    levels = [0.123, 0.5, 0.87654]
    assert run("--pruner", pruner, *flags, "--sparsities", *levels, "--out", "net") == 0
    table = rows("net.csv")
    assert list(table[0]) == list(main_prun.COLUMNS)
    assert [row["step"] for row in table] == ["", "0", "1", "2"]
    total = sum(weight.numel() for weight in models.build("resnet20", 4).parameters())
    lines = capsys.readouterr().out.splitlines()[1:]
    test = datautils.load(dataset).loader("test", 128)
    for step, level in enumerate(levels):
        count, n = zeros(f"net-step{step}.pth")
        assert count == round(level * n)
        row = table[1 + step]
        assert float(row["sparsity"]) == pytest.approx(count / n)
        assert float(row["sparsity_all"]) == pytest.approx(count / total)
        assert f"test {float(row['test_accuracy']):.2f} %" in lines[1 + step]
        model = models.build("resnet20", 4)
        models.load_checkpoint(model, f"net-step{step}.pth")
        loss, accuracy = main_common.evaluate(model, test, device=torch.device("cpu"))
        assert accuracy == pytest.approx(float(row["test_accuracy"]))
        assert loss == pytest.approx(float(row["test_loss"]), rel=1e-4)
        recomputed = pruner == "mfac"
        assert (float(row["gradients_seconds"]) > 0) == recomputed
    with Image.open("net.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(2**24)) > 50  # more than an empty sheet


def test_magnitude_is_magnitude(run, checkpoint):
    assert run("--pruner", "magnitude", "--sparsities", 0.5, "--out", "net") == 0
    before, after = torch.load(checkpoint, weights_only=True), pruned("net-step0.pth")
    gone = torch.cat([before[name][w == 0].abs() for name, w in after.items()])
    left = torch.cat([before[name][w != 0].abs() for name, w in after.items()])
    assert gone.max() <= left.min()
    assert all(torch.equal(w[w != 0], before[name][w != 0]) for name, w in after.items())


def test_between_recomputations_levels_come_from_the_last_one(run):
    """And so a level does not depend on those before it."""
    assert run(*FEW, "--sparsities", 0.2, 0.5, 0.8, "--recomps", 0, "--out", "all") == 0
    assert run(*FEW, "--sparsities", 0.8, "--out", "one") == 0
    assert same_weights("all-step2.pth", "one-step0.pth")
    assert run(*FEW, "--sparsities", 0.2, 0.5, 0.8, "--recomps", 1, "--out", "anew") == 0
    assert same_weights("all-step0.pth", "anew-step0.pth")
    assert not same_weights("all-step1.pth", "anew-step1.pth")
    assert not same_weights("all-step2.pth", "anew-step2.pth")
    # From the recomputation on it is a run that begins with the pruned model, but for the samples.
    flags = [*FEW, "--sparsities", 0.2, 0.8, "--recomps", 1, "--out", "skip"]
    assert run(*flags) == 0
    assert same_weights("anew-step2.pth", "skip-step1.pth")


def test_gradients_that_nothing_uses_are_not_shown(run, capsys):
    flags = ["--sparsities", 0.5, "--ngrads_schedule", 5, "--npergrad", 4, "--out"]
    assert run(*flags, "one-shot") == 0
    assert "ngrads " not in capsys.readouterr().out
    assert run(*flags, "tuned", "--nepochs", 1, "--optim", "mfac", "--batchsize", 32) == 0
    assert "ngrads 1024" in capsys.readouterr().out  # of the optimizer


def test_recomputations_in_parts(run, monkeypatch):
    """Densities fall by one factor, with as many gradients as are wanted at each step."""
    targets = spy(monkeypatch, "prune", lambda pruner, target: target)
    ngrads = spy(monkeypatch, "recompute", lambda pruner: pruner.ngrads)
    flags = ["--sparsities", 0.4, 0.6, 0.9, "--recomps", 2, "--nrecomps", 3, "--npergrad", 4]
    assert run(*flags, "--ngrads_schedule", 5, 6, 7, "--out", "net") == 0
    kept = [0.6 ** (1 / 3), 0.6 ** (2 / 3), 0.6, 0.4]
    kept += [0.4 ** (2 / 3) * 0.1 ** (1 / 3), 0.4 ** (1 / 3) * 0.1 ** (2 / 3), 0.1]
    assert [1 - target for target in targets] == pytest.approx(kept, abs=1e-5)
    assert ngrads == [5] * 3 + [7] * 3
    count, n = zeros("net-step2.pth")
    assert count == round(0.9 * n)


def test_measuring_changes_nothing(run):
    for name, tests in (("all", [0, 1, 2]), ("none", []), ("last", [2])):
        assert run(*RUNS["recomputed"].split(), "--tests", *tests, "--out", name) == 0
        measured = [row["step"] for row in rows(f"{name}.csv") if row["test_accuracy"]]
        assert measured == ["", *map(str, tests)]
    for step in range(3):
        assert same_weights(f"all-step{step}.pth", f"none-step{step}.pth")
        assert same_weights(f"all-step{step}.pth", f"last-step{step}.pth")


def test_the_seed_decides(run):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(*FEW, "--sparsities", 0.5, "--seed", seed, "--out", out) == 0
    assert_same_run("a", "b")
    assert not same_weights("a-step0.pth", "c-step0.pth")


def test_deterministic_runs(run, deterministic):
    flags = [*RUNS["gradual sgd"].split(), "--deterministic"]
    for out in ("one", "other"):
        assert run(*flags, "--out", out) == 0
        assert torch.are_deterministic_algorithms_enabled()
    assert_same_run("one", "other")


@pytest.mark.cuda
@pytest.mark.parametrize("kind", RUNS)
def test_deterministic_runs_on_a_gpu(run, deterministic, monkeypatch, kind):
    """They have the same bits again, and resumed."""
    flags = [*RUNS[kind].split(), "--deterministic", "--device", "cuda"]
    for out in ("one", "other"):
        assert run(*flags, "--out", out) == 0
    assert_same_run("one", "other")
    with monkeypatch.context() as context:
        interrupt_after(context, 2)
        assert run(*flags, "--out", "parts") == 130
    assert run("--out", "parts", "--resume", "--device", "cuda") == 0
    assert_same_run("one", "parts")


def test_workers_read_the_images(run, monkeypatch):
    """All loaders are told; these images are in memory, so that none starts."""
    asked, loader = [], datautils.Data.loader

    def recorded(self, *args, **options):
        asked.append(options["workers"])
        return loader(self, *args, **options)

    monkeypatch.setattr(datautils.Data, "loader", recorded)
    flags = [*FEW, "--sparsities", 0.5, "--workers", 3, "--reset_bn", "--out", "net"]
    assert run(*flags) == 0
    assert asked == [3] * 4  # tests, training, gradients, batch norm
    assert run("--out", "net", "--resume", "--workers", 1) == 0
    assert asked[4:] == [1] * 3


def test_top_five():
    """Against numpy."""
    torch.manual_seed(time.time_ns() % 2**32)
    model = models.build("resnet20", 10)
    loader = datautils.load("digits").loader("test", 64)
    found = main_common.evaluate(model, loader, device=torch.device("cpu"), tops=(1, 5))
    with torch.no_grad():
        pairs = [(model.eval()(images).numpy(), labels.numpy()) for images, labels in loader]
    outputs, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    place = (outputs > outputs[range(len(labels)), labels][:, None]).sum(1)
    assert found[1:] == pytest.approx([100 * (place < k).mean() for k in (1, 5)])


def test_pages_and_updates(run):
    for out, flags in (
        ("joint", []),
        ("pages", ["--pages", 7]),
        ("paper", ["--update", "independent"]),
        ("none", ["--update", "none"]),
    ):
        assert run(*FEW, *flags, "--sparsities", 0.5, "--out", out) == 0
    joint, pages, paper, none = (
        pruned(f"{out}-step0.pth") for out in ("joint", "pages", "paper", "none")
    )
    for name, weight in joint.items():
        assert torch.equal(weight != 0, pages[name] != 0)
        torch.testing.assert_close(weight, pages[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(weight != 0, paper[name] != 0)
        assert torch.equal(weight != 0, none[name] != 0)
    assert not same_weights("joint-step0.pth", "paper-step0.pth")
    assert not same_weights("joint-step0.pth", "none-step0.pth")


def test_blocks_in_rounds_are_the_default():
    """Of at least as many gradients; rounds with the joint update."""
    for given, blocksize, rounds in (
        ({}, 128, 8),
        ({"blocksize": 16}, 16, 8),
        ({"blocksize": -1}, -1, 1),
        ({"blocksize": -1, "rounds": 3}, -1, 3),
        ({"update": "none"}, 128, 1),
        ({"ngrads": 128}, 128, 8),
        ({"ngrads": 127}, -1, 1),
        ({"ngrads_schedule": [9, 200], "sparsities": [0.1, 0.2]}, -1, 1),
    ):
        settings = prun_settings.choose_settings(given)
        assert (settings["blocksize"], settings["rounds"]) == (blocksize, rounds)


def test_levels_over_all_parameters(run):
    flags = ["--pruner", "magnitude", "--adjust_sparsities", "--sparsities", 0.5, 0.9]
    assert run(*flags, "--out", "net") == 0
    total = sum(weight.numel() for weight in models.build("resnet20", 4).parameters())
    for step, level in enumerate((0.5, 0.9)):
        assert abs(zeros(f"net-step{step}.pth")[0] - level * total) <= 0.5
    assert float(rows("net.csv")[2]["sparsity_all"]) == pytest.approx(0.9, abs=1e-5)


def test_scope_and_pattern(run):
    assert run("--pruner", "magnitude", "--scope", "layer", "--sparsities", 0.3, "--out", "a") == 0
    for weight in pruned("a-step0.pth").values():
        assert int((weight == 0).sum()) == round(0.3 * weight.numel())
    assert run(*FEW, "--pattern", "2:4", "--sparsities", 0.5, "--out", "b") == 0
    weights = pruned("b-step0.pth")
    assert "conv1.weight" not in weights  # three inputs
    for weight in weights.values():
        groups = weight.movedim(1, -1).reshape(-1, 4)
        assert bool(((groups == 0).sum(1) == 2).all())


@pytest.mark.parametrize("kind", RUNS)
def test_the_header_is_the_command(run, kind, capsys, monkeypatch):
    settings = []
    monkeypatch.setattr(main_prun.Run, "measure", lambda self, _: settings.append(self.settings))
    with contextlib.suppress(TypeError):  # of the line without figures
        run(*RUNS[kind].split(), "--seed", 7, "--out", "net")
    header = capsys.readouterr().out.splitlines()[0]
    words = shlex.split(header.removeprefix("# python3 main_prun.py "))
    given = vars(main_prun.build_parser().parse_args(words))
    names = {name: value for name, value in given.items() if name in settings[0]}
    assert (
        main_prun.choose_settings({k: v for k, v in names.items() if v is not None}) == settings[0]
    )


def test_cubic_levels():
    """Zhu and Gupta 2017, (1): sᵢ + (…) with t₀ = 0, and n Δt = STEPS − 1."""
    chance = random.Random(time.time_ns())
    start, end, steps = chance.uniform(0, 0.5), chance.uniform(0.6, 0.99), chance.randint(2, 9)
    levels = main_prun.choose_levels({"cubic": [start, end, steps]})
    assert len(levels) == steps
    assert levels[0] == pytest.approx(start) and levels[-1] == end
    for t, level in enumerate(levels):
        expected = end + (start - end) * (1 - t / (steps - 1)) ** 3
        assert level == pytest.approx(expected)


def test_as_many_images_a_gradient_as_there_are(run, capsys):
    assert run("--ngrads", 30, "--sparsities", 0.5, "--out", "net") == 0
    assert "npergrad 2" in capsys.readouterr().out  # of 80 images
    assert run("--ngrads", 2, "--sparsities", 0.5, "--out", "few") == 0
    assert "npergrad 32" in capsys.readouterr().out


def test_batch_norm_anew(run, checkpoint, dataset):
    """Against the mean of the statistics of each batch, computed from the images."""
    flags = ["--pruner", "magnitude", "--sparsities", 0.5, "--batchsize", 40, "--out", "net"]
    assert run(*flags, "--reset_bn") == 0
    before = torch.load(checkpoint, weights_only=True)
    after = torch.load("net-step0.pth", weights_only=True)["state_dict"]
    loader = datautils.load(dataset).loader("train", 40, seed=0)
    conv = torch.nn.functional.conv2d
    outputs = [conv(images, before["conv1.weight"], padding=1) for images, _ in loader]
    mean = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(after["bn1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    kept = after["fc.weight"] != 0
    assert torch.equal(after["fc.weight"][kept], before["fc.weight"][kept])


def test_batch_norm_after_pruning(run, dataset):
    """Against the means of those of each batch, by numpy, of the first layer as it was pruned."""
    flags = ["--pruner", "magnitude", "--sparsities", 0.4, 0.8, "--batchsize", 40]
    assert run(*flags, "--reestimate_bn", "--out", "net") == 0
    assert run(*flags, "--out", "other") == 0
    loader = datautils.load(dataset).loader("train", 40, seed=0)
    for step in range(2):
        after, other = (
            torch.load(f"{name}-step{step}.pth", weights_only=True)["state_dict"]
            for name in ("net", "other")
        )
        assert torch.equal(after["conv1.weight"], other["conv1.weight"])
        weight = after["conv1.weight"].double()
        outputs = [
            torch.nn.functional.conv2d(images.double(), weight, padding=1).numpy()
            for images, _ in loader
        ]
        for name, statistic in (("mean", np.mean), ("var", lambda *a: np.var(*a, ddof=1))):
            expected = np.mean([statistic(output, (0, 2, 3)) for output in outputs], 0)
            assert after[f"bn1.running_{name}"].numpy() == pytest.approx(expected, 1e-4, 1e-5)
            assert other[f"bn1.running_{name}"].numpy() != pytest.approx(expected, 1e-2, 1e-2)


# --- a model of one's own -------------------------------------------------------------------

OWN = """
import torch
from torch import nn

SEEN = set()  # whether autocast was on, and who asked

class Net(nn.Module):
    def __init__(self, classes, outputs=None):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, outputs or classes)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        SEEN.add((torch.is_autocast_enabled(x.device.type), self.training, torch.is_grad_enabled()))
        return self.fc(self.dropout(self.conv(x).relu().mean((2, 3))))

def net(classes):
    return Net(classes)

def too_many(classes):
    return Net(classes, classes + 1)

def pair(classes):
    return nn.Flatten(), nn.Identity()

def fails(classes):
    raise RuntimeError("no such file")

def grey(classes):
    return nn.Conv2d(1, classes, 3)

without = 3
"""


@pytest.fixture
def run_own(dataset, tmp_path, monkeypatch):
    """A function that runs the script without a checkpoint, in a folder with modules."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(OWN)
    (tmp_path / "broken_nets.py").write_text("def net(:\n")
    (tmp_path / "needing_nets.py").write_text("import not_installed_anywhere\n")
    for name in ("own_nets", "broken_nets", "needing_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*flags) -> int:
        try:
            main_prun.main(["--dataset", str(dataset), "--device", "cpu", *map(str, flags)])
        except SystemExit as end:
            return end.code
        return 0

    return call


def test_a_model_of_ones_own(run_own, monkeypatch):
    flags = ["--model", "own_nets:net", "--sparsities", 0.4, 0.8, "--nepochs", 2, *FEW]
    flags += ["--batchsize", 32, "--distill"]
    assert run_own(*flags) == 0
    stem = "runs/own_nets-net-four-pruned-mfac"
    for step, level in enumerate((0.4, 0.8)):
        count, n = zeros(f"{stem}-step{step}.pth")
        assert (count, n) == (round(level * 248), 3 * 8 * 9 + 8 * 4)
    with monkeypatch.context() as context:
        interrupt_after(context, 3)
        assert run_own(*flags, "--out", "parts") == 130
    assert run_own("--resume", "--out", "parts") == 0
    for step in range(2):
        assert same_weights(f"{stem}-step{step}.pth", f"parts-step{step}.pth")
    # With weights in a checkpoint: here the pruned ones, whose zeros stay.
    flags = ["--model", "own_nets:net", "--checkpoint", f"{stem}-step0.pth", "--sparsities", 0.9]
    assert run_own(*flags, *FEW, "--out", "again") == 0
    first, second = pruned(f"{stem}-step0.pth"), pruned("again-step0.pth")
    assert not any(bool((second[name][w == 0] != 0).any()) for name, w in first.items())


BAD_MODELS = [
    ("nowhere:net", "There is no module 'nowhere' in "),
    ("own_nets.sub:net", "There is no module 'own_nets.sub' in "),
    ("own_nets:other", "has no function 'other'"),
    ("own_nets:without", "has no function 'without'"),
    ("own_nets:pair", "own_nets:pair(4) returned tuple, not a torch.nn.Module"),
    ("own_nets:fails", "own_nets:fails(4) failed: RuntimeError: no such file (own_nets.py, line"),
    ("own_nets:too_many", "makes (2, 5) of images (2, 3, 8, 8); it must make (2, 4)"),
    ("own_nets:grey", "own_nets:grey failed on images (2, 3, 8, 8): RuntimeError: "),
    ("broken_nets:net", "Importing broken_nets failed: SyntaxError: "),
    (
        "needing_nets:net",
        "Importing needing_nets failed: ModuleNotFoundError: No module named 'not_",
    ),
    ("own_nets:", "own_nets: is none of resnet20"),
    (":net", ":net is none of resnet20"),
    ("own_nets.py:net()", "is none of resnet20"),
]


@pytest.mark.parametrize(("name", "sentence"), BAD_MODELS)
def test_models_that_can_not_be_had(run_own, name, sentence, capsys):
    assert run_own("--model", name, *FEW, "--out", "net") == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not Path("net.state").exists()


@pytest.mark.parametrize("amp", [False, True])
def test_autocast_is_in_force_wherever_the_model_runs(run_own, amp):
    flags = ["--model", "own_nets:net", "--sparsities", 0.5, "--nepochs", 1, *FEW, "--distill"]
    assert run_own(*flags, "--batchsize", 32, "--out", "net", *["--amp"][:amp]) == 0
    seen = sys.modules["own_nets"].SEEN
    # Of gradients, of training, and of tests and the teacher; the check of the outputs is without.
    expected = {(amp, False, True), (amp, True, True), (amp, False, False), (False, False, False)}
    assert seen == expected


# --- gradual --------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "mfac"])
def test_fine_tuning_keeps_the_masks(run, optim):
    flags = ["--sparsities", 0.4, 0.8, "--nepochs", 5, "--prun_every", 2, "--optim", optim]
    flags += ["--prun_lrs", 0.01, 0.004, "--drop_at", 4, "--drop_by", 0.5, "--batchsize", 32]
    assert run(*FEW, *flags, "--weightdecay", 0.01, "--momentum", 0.5, "--out", "net") == 0
    table = rows("net.csv")
    order = [(row["step"], row["epoch"]) for row in table]
    assert order == [
        *[("", ""), ("0", "0"), ("0", "1"), ("0", "2")],
        *[("1", "2"), ("1", "3"), ("1", "4"), ("1", "5")],
    ]
    rates = [float(row["lr"]) for row in table if row["lr"]]
    assert rates == pytest.approx([0.01, 0.004, 0.01, 0.004, 0.002])
    for lines in (table[1:4], table[4:]):
        assert len({row["sparsity"] for row in lines}) == 1
    for step, level in enumerate((0.4, 0.8)):
        count, n = zeros(f"net-step{step}.pth")  # after the last epoch of this step
        assert count == round(level * n)
    untuned = [*FEW, *flags[:3], "--out", "untuned"]
    assert run(*untuned) == 0
    assert not same_weights("net-step0.pth", "untuned-step0.pth")
    # The curve has the accuracy after the last epoch at each sparsity.
    ((name, history),) = main_common.read_runs([Path("net.csv")], main_prun.DRAWN)
    assert name == "net"
    assert [accuracy for _, accuracy in main_prun.curve(history)] == [
        float(table[i]["test_accuracy"]) for i in (0, 3, 7)
    ]


def test_distillation_is_its_formula():
    """By numpy, in float64."""
    z, t = np.random.default_rng().normal(size=(2, 7, 5)) * 3
    y, w, T = np.arange(7) % 5, 0.3, finetune.TEMPERATURE
    softmax = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (z, z / T, t / T)]
    labelled = -np.log(softmax[0][range(7), y]).sum()
    divergence = (softmax[2] * np.log(softmax[2] / softmax[1])).sum()
    tensors = (torch.from_numpy(x) for x in (z, t, y))
    found = finetune.distillation_loss(*tensors, w)
    assert float(found) == pytest.approx((1 - w) * labelled + w * T**2 * divergence, rel=1e-12)


def test_the_teacher_is_the_dense_model(run, checkpoint, monkeypatch):
    """As it was measured, in evaluation, also once the run goes on; its weight is that of the
    flag."""
    calls = []

    def recorded(outputs, taught, labels, weight):
        calls.append((taught.clone(), labels, weight))
        return distillation_loss(outputs, taught, labels, weight)

    distillation_loss = finetune.distillation_loss
    monkeypatch.setattr(finetune, "distillation_loss", recorded)
    flags = ["--pruner", "magnitude", "--sparsities", 0.5, 0.9, "--nepochs", 2, "--distill", 0.25]
    with monkeypatch.context() as context:
        interrupt_after(context, 2)
        assert run(*flags, "--batchsize", 40, "--out", "net") == 130
    assert run("--out", "net", "--resume") == 0
    dense = models.build("resnet20", 4).eval()
    models.load_checkpoint(dense, checkpoint)
    state = main_common.load_saved(Path("net.state"))["teacher"]
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert len(calls) == 6 and {weight for *_, weight in calls} == {0.25}


def test_the_cosine_begins_anew_after_each_step(run, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def recorded(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    flags = ["--pruner", "magnitude", "--sparsities", 0.5, 0.9, "--nepochs", 5, "--prun_every", 2]
    flags += ["--schedule", "cosine", "--lr", 0.04, "--batchsize", 40, "--out", "net"]
    with monkeypatch.context() as context:
        interrupt_after(context, 6)  # within the second part
        assert run(*flags) == 130
    del rates[-2:]  # of the epoch that was interrupted
    assert run("--out", "net", "--resume") == 0
    cosine = [0.02 * (1 + np.cos(np.pi * np.arange(n) / n)) for n in (4, 6)]  # 2 batches an epoch
    assert rates == pytest.approx(np.concatenate(cosine).tolist())
    shown = [float(row["lr"]) for row in rows("net.csv") if row["lr"]]
    assert shown == pytest.approx(np.concatenate([part[::2] for part in cosine]).tolist())


def test_magnitude_with_mfac_for_fine_tuning(run):
    flags = ["--pruner", "magnitude", "--sparsities", 0.6, "--nepochs", 1, "--optim", "mfac"]
    assert run(*flags, "--ngrads", 4, "--batchsize", 32, "--out", "net") == 0
    count, n = zeros("net-step0.pth")
    assert count == round(0.6 * n)


# --- nothing is lost ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_is_uninterrupted(run, monkeypatch, kind, capsys):
    flags = RUNS[kind].split()
    assert run(*flags, "--out", "whole") == 0
    lines = len(rows("whole.csv"))
    with monkeypatch.context() as context:
        interrupt_after(context, 0)
        assert run(*flags, "--out", "parts") == 130
    assert "before anything was saved" in capsys.readouterr().err and not Path("parts.csv").exists()
    for line in range(1, lines):  # one line at a time
        with monkeypatch.context() as context:
            interrupt_after(context, 1)
            assert run(*(flags if line == 1 else []), "--resume", "--out", "parts") == 130
        assert len(rows("parts.csv")) == line
    assert run("--out", "parts", "--resume") == 0
    assert_same_run("whole", "parts")


def test_interrupted_while_a_state_is_loaded(run, monkeypatch, capsys):
    """It is still there, and the message does not say otherwise."""
    assert run("--pruner", "magnitude", "--sparsities", 0.3, "--out", "net") == 0
    with monkeypatch.context() as context:
        context.setattr(main_common, "load_saved", lambda path: exec("raise KeyboardInterrupt"))
        assert run("--out", "net", "--resume") == 130
    assert "before anything was saved" in capsys.readouterr().err
    assert run("--out", "net", "--resume") == 0


@pytest.mark.parametrize("lost", ["net-step1.pth", "net.csv", "net.png"])
def test_results_come_back_from_the_state(run, lost):
    """As after a kill between the writing of the state and that of the results."""
    assert run("--pruner", "magnitude", "--sparsities", 0.3, 0.6, "--out", "net") == 0
    before = Path(lost).read_bytes()
    Path(lost).unlink()
    assert run("--out", "net", "--resume") == 0
    if lost != "net.png":
        assert Path(lost).read_bytes() == before
    assert Path(lost).exists()


@contextlib.contextmanager
def largest_file(size: int):
    """Writing more than `size` bytes fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_what_was_saved(run, monkeypatch, capsys):
    flags = RUNS["one base"].split()
    assert run(*flags, "--out", "whole") == 0
    with monkeypatch.context() as context:
        interrupt_after(context, 2)
        assert run(*flags, "--out", "net") == 130
    before = {path: path.read_bytes() for path in Path().iterdir()}
    with largest_file(1_500_000):
        assert run("--out", "net", "--resume") == 2
    assert "cannot write net.state" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    assert run("--out", "net", "--resume") == 0
    assert_same_run("whole", "net")


def test_existing_files_are_kept_unless_told_otherwise(run, capsys):
    flags = ["--pruner", "magnitude", "--out", "net"]
    Path("net-step7.pth").write_text("mine")
    others = [Path(name) for name in ("net.pth", "net-stepA-step0.pth", "net-step0.pth.pth")]
    for path in others:
        path.write_text("of another script, or another run")
    assert run(*flags) == 2
    assert "net-step7.pth exists" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert run(*flags, "--resume") == 2
    assert "net.state" in capsys.readouterr().err
    assert Path("net-step7.pth").read_text() == "mine" and len(list(Path().iterdir())) == 4
    assert run(*flags, "--sparsities", 0.5, "--overwrite") == 0
    assert not Path("net-step7.pth").exists()
    assert {path.read_text() for path in others} == {"of another script, or another run"}
    assert run(*flags) == 2
    assert "--resume" in capsys.readouterr().err


# --- checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".csv", "-step3.pth"])
def test_a_folder_in_the_way(run, ending, capsys):
    Path(f"net{ending}").mkdir()
    assert run("--out", "net", "--pruner", "magnitude", "--overwrite") == 2
    assert f"net{ending} is a folder: choose another --out" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == [f"net{ending}"]


def test_public_checkpoints_and_those_of_main_optim(run, checkpoint, dataset):
    flags = ["--pruner", "magnitude", "--sparsities", 0.5]
    weights = torch.load(checkpoint, weights_only=True)
    public = {"epoch": 3, "state_dict": {f"module.{name}": w for name, w in weights.items()}}
    torch.save(public, "public.pth.tar")
    assert run(*flags, "--out", "plain") == 0
    assert run(*flags, "--out", "public", "--checkpoint", "public.pth.tar") == 0
    assert_same_run("plain", "public")
    command = ["--optim", "sgd", "--epochs", "1", "--batchsize", "32", "--save", "trained.pth"]
    main_optim.main([*command, "--dataset", str(dataset)])
    assert run(*flags, "--out", "again", "--checkpoint", "trained.pth") == 0
    trained = torch.load("trained.pth", weights_only=True)["accuracy"]
    assert float(rows("again.csv")[0]["test_accuracy"]) == pytest.approx(trained)


def test_a_model_that_is_sparse_already(run, capsys):
    assert run("--pruner", "magnitude", "--sparsities", 0.5, "--out", "first") == 0
    flags = [*FEW, "--checkpoint", "first-step0.pth", "--out", "second", "--sparsities"]
    capsys.readouterr()
    assert run(*flags, 0.4, 0.8) == 2
    error = capsys.readouterr().err
    assert "0.4" in error and "0.5" in error and error.count("\n") == 1
    assert not Path("second.state").exists()
    assert run(*flags, 0.5, 0.8) == 0
    first, second = pruned("first-step0.pth"), pruned("second-step1.pth")
    assert not any(bool((second[name][w == 0] != 0).any()) for name, w in first.items())


def test_the_default_checkpoint(run, checkpoint, dataset, monkeypatch, tmp_path):
    settings = {"model": "resnet20"}
    with pytest.raises(main_prun.UserError, match=r"resnet20_none.pth.*main_optim.py"):
        main_prun.find_checkpoint(settings, "none")
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "resnet20_four.pth"
    path.write_bytes(checkpoint.read_bytes())
    monkeypatch.setattr(prun_settings, "__file__", str(tmp_path / "prun_settings.py"))
    assert main_prun.find_checkpoint(settings, "four") == path


def test_without_flags_it_starts(monkeypatch, tmp_path):
    """From the model of the digits that comes along."""
    monkeypatch.chdir(tmp_path)
    started = main_prun.Run(main_prun.build_parser().parse_args([]))
    assert (started.settings["model"], started.data.name) == ("resnet20", "digits")
    _, accuracy = main_common.evaluate(
        started.model, started.test_loader, device=torch.device("cpu")
    )
    assert accuracy > 98 and started.pruner.sparsity == 0


def test_bad_checkpoints(run, checkpoint, capsys):
    good = checkpoint.read_bytes()
    torch.save(models.build("resnet32", 4).state_dict(), "resnet32.pth")
    torch.save(models.build("resnet20", 7).state_dict(), "seven.pth")
    broken = torch.load(checkpoint, weights_only=True)
    broken["fc.weight"][0, 0] = torch.nan
    torch.save(broken, "nan.pth")
    for name, content in (("empty.pth", b""), ("cut.pth", good[:5000]), ("text.pth", b"text")):
        Path(name).write_bytes(content)
    for path in [*Path().iterdir(), "missing.pth", "."]:
        assert run("--pruner", "magnitude", "--checkpoint", path, "--out", "out/net") == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and printed.out == ""
        assert not Path("out").exists()


# --- bad input: one sentence, exit status 2, nothing done -----------------------------------

BAD_FLAGS = [
    *((f"--model {name}", f"{name} is none of resnet20") for name in ("vgg", "x", "20")),
    ("--pruner snip", "snip"),
    ("--dataset nowhere", "nowhere"),
    ("--sparsity 0.5", "--sparsity"),
    ("--sparsities", "--sparsities"),
    *((f"--sparsities {value}", "from 0 and below 1") for value in ("-0.1", "1", "90", "nan", "x")),
    ("--sparsities 0.5 0.5", "does not rise"),
    ("--sparsities 0.5 0.9 0.7", "0.7 after 0.9 does not rise"),
    ("--sparsities 0.5 --cubic 0 0.9 3", "not allowed with"),
    ("--cubic 0 0.9", "--cubic"),
    *(
        (f"--cubic {values}", "is not FROM TO STEPS")
        for values in ("0.9 0.5 3", "0 1 3", "0 0.9 1", "0 0.9 2.5", "0.5 0.5 3")
    ),
    ("--cubic -1 0.9 3", "from 0"),
    ("--sparsities 0.999 --adjust_sparsities --ngrads 8", "can be pruned"),
    ("--tests 9", "--tests 9 is no step: steps are 0 to 8"),
    ("--recomps 0 4 --sparsities 0.1 0.2", "--recomps 4 is no step"),
    ("--recomps -1", "--recomps: -1 is not"),
    *(
        (f"--{flag} {value}", f"--{flag}: {value} is not a whole number from 1")
        for flag in ("ngrads", "npergrad", "perbatch", "pages", "nrecomps", "rounds", "batchsize")
        for value in ("0", "-3", "1.5", "x")
    ),
    *(
        (f"--nepochs 9 --{flag} {value}", f"--{flag}: {value} is not a whole number from 1")
        for flag in ("prun_every", "drop_at", "ngrads_schedule")
        for value in ("0", "1.5")
    ),
    *((f"--blocksize {value}", "-1 or a whole number") for value in ("0", "-2", "1.5", "x")),
    *((f"--damp {value}", "--damp") for value in ("0", "-1", "nan", "inf", "x")),
    *((f"--seed {value}", "--seed") for value in ("-1", str(2**32), "0.5")),
    ("--nepochs -1", "--nepochs"),
    ("--scope block", "block"),
    ("--pattern 4:2 --ngrads 8", "4:2"),
    ("--pattern 2:4 --ngrads 8", "0.5"),
    ("--pattern 5:7 --ngrads 8", "no layer's input is divisible by 7"),
    ("--pattern random --ngrads 8", "random"),
    ("--update all", "all"),
    ("--ngrads_schedule 4 5", "2 numbers for 9 steps"),
    ("--ngrads 4 --ngrads_schedule 1 2 3 4 5 6 7 8 9", "--ngrads is for"),
    ("--ngrads 81", "81 gradients of 1 images each are more than the 80"),
    ("--sparsities 0.5 --ngrads_schedule 81", "use a lower --ngrads_schedule or --npergrad"),
    ("--ngrads 8 --npergrad 11", "8 gradients of 11 images"),
    ("--blocksize 8 --pages 2", "--pages is for"),
    ("--pages 2", "--pages is for --pruner mfac with --blocksize -1 only"),
    ("--blocksize -1 --perbatch 2", "--perbatch is for --pruner mfac without --blocksize -1 only"),
    (f"--pages {10**9} --ngrads 8", "page"),
    *(
        (f"--pruner magnitude --{flag}", "is for --pruner mfac")
        for flag in ("ngrads 8", "npergrad 8", "damp 1", "recomps 0", "update none", "pages 2")
    ),
    *(
        (f"--{flag}", "is for --nepochs above 0 only")
        for flag in ("lr 1", "optim sgd", "momentum 0", "weightdecay 0", "prun_every 2")
    ),
    *(
        (f"--{flag}", "is for --nepochs above 0 only")
        for flag in ("schedule cosine", "schedule step", "distill", "distill 0.5")
    ),
    ("--nepochs 9 --schedule linear", "linear"),
    ("--nepochs 9 --schedule cosine --drop_at 3", "--drop_at is for --schedule step only"),
    ("--nepochs 9 --schedule cosine --prun_lrs 0.1", "--prun_lrs is for --schedule step only"),
    *((f"--nepochs 9 --distill {value}", "--distill: ") for value in ("0", "1.1", "nan", "x")),
    ("--reestimate_bn --recomps 0", "--recomps is for a run without --reestimate_bn only"),
    ("--reestimate_bn --batchsize 79", "batch of one"),
    *((f"--workers {value}", "--workers: ") for value in ("-1", "1.5", "2000", "x")),
    ("--drop_by 0.5", "is for --drop_at only"),
    ("--nepochs 9 --recomps 0", "with --nepochs 0 only"),
    ("--nepochs 9 --lr 0.1 --prun_lrs 0.1", "not allowed with"),
    ("--nepochs 8", "--nepochs 8 ends before step 8, which comes after 8 epochs: give at least 9"),
    ("--nepochs 16 --prun_every 2", "give at least 17"),
    ("--nepochs 9 --drop_at 9", "never comes"),
    ("--nepochs 9 --drop_at 3 --drop_by 2", "at most 1"),
    *((f"--nepochs 9 --lr {value}", "--lr") for value in ("0", "-1", "nan", "inf", "1e300")),
    ("--nepochs 9 --optim adam", "adam"),
    ("--nepochs 9 --momentum 1", "below 1"),
    ("--nepochs 9 --weightdecay -1", "from 0"),
    ("--nepochs 9 --batchsize 79", "batch of one"),
    ("--reset_bn --batchsize 79", "batch of one"),
    ("--resume --overwrite", "not allowed with"),
    ("--device tpu9", "--device tpu9 is not one of cpu"),
    ("--device cuda:99", "--device cuda:99 is not one of cpu"),
    ("--out .", "is a folder"),
    ("--out /dev/null/net", "/dev/null is not a writable folder"),
    (f"--out {'x' * 300}", "too long"),
    ("--checkpoint missing.pth --ngrads 8", "missing.pth"),
    ("--plot missing.csv", "--plot missing.csv can't be read: No such file or directory"),
    ("--tensorboard /dev/null/tb", "/dev/null is not a writable folder"),
    ("--sparsities 0.5 --tests 0 x", "x"),
    ("extra", "extra"),
    ("--dataset /dev/null", "is a file"),
    ("--checkpoint . --ngrads 8", "There is no checkpoint file"),
    ("--checkpoint /dev/zero --ngrads 8", "There is no checkpoint file /dev/zero"),
    ("--plot /dev/zero", "--plot /dev/zero is not a file"),
    ("--plot .", "--plot . is not a file"),
    *((f"--nepochs 9 --prun_lrs {value}", "--prun_lrs: ") for value in ("0", "0.1 -1", "nan", "x")),
    *((f"--nepochs 9 --{flag} x", f"--{flag}: x is not") for flag in ("lr", "momentum", "drop_by")),
    *((f"--{flag} x", f"--{flag}: x is not") for flag in ("weightdecay", "seed", "nepochs")),
    *((f"--{flag} x", f"--{flag}: x is not") for flag in ("recomps", "prun_every", "drop_at")),
    *((f"--{flag} x", f"{flag.split()[0]}: x is not") for flag in ("ngrads_schedule", "cubic 0 1")),
    ("--tests -1", "--tests: -1 is not"),
    *((f"--{flag} {10**30}", "2^31") for flag in ("ngrads", "npergrad", "pages", "batchsize")),
    (f"--nepochs {10**9}", "--nepochs: 1000000000 is not a whole number from 0 to 1,000,000"),
    ("--cubic 0 0.9 1e9", "2 to 10,000 STEPS"),
    (f"--ngrads {10**6} --npergrad 1", "more than the 80"),
    *((f"--{flag} yes", "yes") for flag in ("resume", "overwrite", "verbose")),
    *((f"--{flag} yes", "yes") for flag in ("adjust_sparsities", "reset_bn", "reestimate_bn")),
    *((f"--{flag} yes", "yes") for flag in ("amp", "deterministic")),
    ("--damp 1e-320 --ngrads 8", "1e-320"),
    ("--nepochs 9 --optim mfac --batchsize 32 --ngrads 1000000", "more than the 80"),
    (
        f"--pruner magnitude --sparsities 0.5 --nepochs 1 --optim mfac --ngrads {10**9}",
        "GB free; take fewer gradients",
    ),
]


@pytest.mark.parametrize(("flags", "sentence"), BAD_FLAGS, ids=lambda text: text[:50])
def test_bad_flags(run, flags, sentence, capsys):
    assert run(*flags.split()) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not list(Path().iterdir())


def test_processes_do_not_share_a_gpu(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert run("--device", "cuda", "--out", "net") == 2
    error = capsys.readouterr().err
    assert "2 processes and 1 GPUs: " in error and error.count("\n") == 1


def test_every_flag_says_what_it_is_by_default():
    for action in main_prun.build_parser()._actions:
        assert "help" in action.dest or "default" in action.help, action.dest


@pytest.mark.parametrize(
    "text",
    [
        *("", "\xff\x00", "sparsity\n0.5\n"),
        *(f"sparsity,test_accuracy\n{row}\n" for row in ("", "x,50", "0.5,nan", "50,50")),
    ],
)
def test_bad_files_to_plot(run, text, capsys):
    Path("other.csv").write_bytes(text.encode("latin-1"))
    assert run("--plot", "other.csv", "--out", "net") == 2
    printed = capsys.readouterr()
    assert "--plot other.csv" in printed.err and printed.err.count("\n") == 1
    assert "Error(" not in printed.err
    assert printed.out == "" and len(list(Path().iterdir())) == 1


def test_earlier_runs_are_drawn(run, figures):
    """With axes that have units, and lines that differ in colour, style and marker."""
    levels = ["--sparsities", 0.3, 0.6, "--pruner", "magnitude"]
    Path("sub").mkdir()
    assert run(*levels, "--out", "sub/one") == 0
    assert run(*levels[:2], *levels[-2:], "--out", "two", "--plot", "sub/one.csv") == 0
    (axes,) = figures[-1].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["two", "sub/one"]
    assert axes.get_xlabel() == "Sparsity (fraction of prunable weights)"
    assert axes.get_ylabel() == "Test accuracy (%)"
    for line, path in zip(axes.lines, ("two.csv", "sub/one.csv"), strict=True):
        table = rows(path)
        for values, name in ((line.get_xdata(), "sparsity"), (line.get_ydata(), "test_accuracy")):
            assert list(values) == [float(row[name]) for row in table]
    first, second = axes.lines
    for style in ("color", "linestyle", "marker"):
        assert getattr(first, f"get_{style}")() != getattr(second, f"get_{style}")()


def test_tensorboard_goes_on(run, monkeypatch):
    flags = [*RUNS["gradual sgd"].split(), "--out", "net", "--tensorboard", "tb"]
    with monkeypatch.context() as context:
        interrupt_after(context, 2)
        assert run(*flags) == 130
    time.sleep(1.1)  # TensorBoard orders files by the second, and within it by name
    assert run("--out", "net", "--resume", "--tensorboard", "tb") == 0
    assert_shown("tb/net", rows("net.csv"))


def test_without_tensorboard(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("--pruner", "magnitude", "--out", "net", "--tensorboard", "tb") == 2
    printed = capsys.readouterr()
    assert "install it with 'pip install tensorboard'" in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not list(Path().iterdir())


def test_gradients_that_can_not_fit(run, monkeypatch, capsys):
    """With the advice they fit; where none helps, fewer gradients are advised."""
    monkeypatch.setattr(memory, "BATCH", 8)  # so that blocks take less for so few gradients
    monkeypatch.setattr(memory, "free_in_folder", lambda: 0)
    flags = ["--ngrads", 80, "--sparsities", 0.5, "--out", "net"]
    d = sum(
        weight.numel() for weight in models.build("resnet20", 4).parameters() if weight.ndim > 1
    )
    full, blocked = (
        inverse_bytes(80, d, blocksize=size)[torch.device("cpu")] for size in (None, 16)
    )
    monkeypatch.setattr(memory, "available_memory", lambda device: blocked - 1)
    assert run(*flags) == 2
    assert "use fewer gradients" in capsys.readouterr().err
    monkeypatch.setattr(memory, "available_memory", lambda device: full - 1)
    assert run(*flags, "--pages", 64) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "GB on cpu" in printed.err
    assert "use a blocksize of 16, fewer gradients" in printed.err
    assert run(*flags, "--blocksize", 16) == 0
    monkeypatch.setattr(memory, "free_in_folder", lambda: 2**40)
    assert run(*flags, "--overwrite") == 0
    assert re.search(
        r"inverse Fisher: .* GB on cpu and 0\.\d+ GB in a file", capsys.readouterr().err
    )


def test_a_window_that_can_not_fit(run, monkeypatch, capsys):
    monkeypatch.setattr(costs, "available_memory", lambda device: 10**6)
    assert run(*RUNS["gradual mfac"].split(), "--out", "net") == 2
    assert "A window of" in capsys.readouterr().err


def test_fine_tuning_has_the_memory_of_the_inverse(run, monkeypatch):
    """And none is needed for the window and the inverse at once."""
    pruners, tuned = spy(monkeypatch, "recompute", lambda pruner: pruner), []
    train_epoch = finetune.train_epoch

    def watched(*args, **options):
        tuned.append(pruners[-1]._inverse)
        return train_epoch(*args, **options)

    monkeypatch.setattr(finetune, "train_epoch", watched)
    assert run(*RUNS["gradual mfac"].split(), "--out", "net") == 0
    assert tuned == [None] * 3


def test_a_refusal_of_the_pruner_is_a_sentence(run, checkpoint, capsys):
    weights = torch.load(checkpoint, weights_only=True)
    weights["fc.weight"] *= 1e38
    torch.save(weights, "large.pth")
    flags = [*FEW, "--sparsities", 0.5, "--checkpoint", "large.pth", "--out", "net"]
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert (
        "The gradients of batch 0 (the first is 0) have NaN or Inf" in error
        and "Traceback" not in error
    )


# --- states ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"), [("seed", 1), ("sparsities", 0.5), ("nepochs", 1), ("pruner", "mfac")]
)
def test_resume_refuses_other_settings(run, flag, value, capsys):
    assert run("--pruner", "magnitude", "--sparsities", 0.3, "--out", "net") == 0
    capsys.readouterr()
    assert run("--out", "net", "--resume", f"--{flag}", value) == 2
    assert f"--{flag} " in (error := capsys.readouterr().err) and "differs from" in error


def test_damaged_state(run, capsys):
    """Shortened, one bit turned over, or another file: a sentence, and no file is touched."""
    assert run("--sparsities", 0.5, *FEW, "--out", "net") == 0
    path, good = Path("net.state"), Path("net.state").read_bytes()
    chance = random.Random(time.time_ns())
    flipped = bytearray(good)
    with zipfile.ZipFile(path) as archive:  # in a tensor, as there is padding between them
        numbers = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    flipped[good.index(numbers) + chance.randrange(len(numbers))] ^= 1 << chance.randrange(8)
    model = Path("net-step0.pth").read_bytes()
    for bad in (b"", good[: chance.randrange(len(good))], bytes(flipped), b"text", model):
        path.write_bytes(bad)
        capsys.readouterr()
        assert run("--out", "net", "--resume") == 2
        error = capsys.readouterr().err
        assert "net.state" in error and error.count("\n") == 1
        assert path.read_bytes() == bad and Path("net-step0.pth").read_bytes() == model


@pytest.mark.parametrize("change", ["model", "classes", "masks"])
def test_state_that_does_not_fit(run, change, capsys):
    assert run("--sparsities", 0.5, *FEW, "--out", "net") == 0
    state = torch.load("net.state", weights_only=True)
    if change == "model":
        state["settings"]["model"] = "resnet32"
    elif change == "classes":
        state["classes"] = ["a", "b", "c", "d"]
    else:
        del state["pruner"]["masks"]["fc.weight"]
    torch.save(state, "net.state")
    capsys.readouterr()
    assert run("--out", "net", "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("does not fit" in error or "other classes" in error)


def test_a_state_that_does_not_fit_is_refused(run, capsys):
    """Other classes, figures, steps, models, masks, optimizers and teachers."""
    flags = [*RUNS["distilled"].split(), "--out", "net"]
    assert run(*flags, "--verbose") == 0
    assert "sparsity 0.9" in capsys.readouterr().out  # of each layer
    state = torch.load("net.state", weights_only=True)
    figures, pruner, model = state["history"], state["pruner"], state["model"]
    masks = {name: ~mask for name, mask in pruner["masks"].items()}
    damages = {
        "classes": {"classes": ["a", "b", "c", "d"]},
        "figures": {"history": []},
        "step": {"history": [*figures[:-1], {**figures[-1], "step": 7}]},
        "model": {"model": {name: model[name] for name in list(model)[1:]}},
        "masks of others": {"pruner": {**pruner, "masks": {}}},
        "masks of other weights": {"pruner": {**pruner, "masks": masks}},
        "optimizer": {"optimizer": None},
        "teacher": {"teacher": None},
    }
    for name, damage in damages.items():
        torch.save({**state, **damage}, "net.state")
        assert run("--resume", "--out", "net") == 2, name
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("main_prun.py: error: "), name
