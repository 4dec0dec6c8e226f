"""Real, small trainings through the command line of main_optim.py.

Most run on a folder of 8x8 images of handwritten digits, so that an epoch takes a second.
"""

import contextlib
import copy
import csv
import functools
import inspect
import io
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import datautils
import main_common
import main_optim
import models
import optim_settings
from optim import MFAC, window_bytes

SCRIPT = Path(main_optim.__file__)
COLUMNS = [
    *("epoch", "lr", "train_loss", "train_accuracy", "seconds", "images_per_second"),
    *("optimizer_seconds", "test_loss", "test_accuracy"),
]
TIMES = {"seconds", "images_per_second", "optimizer_seconds"}
RESNET20 = models.MODELS["resnet20"]


@pytest.fixture(autouse=True)
def one_thread():
    """Bits depend on the number of threads, and the processes started here have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(num_classes: int) -> nn.Module:
    """A model of some 800 weights."""
    layers = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    ends = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, num_classes)
    return nn.Sequential(*layers, *ends)


@pytest.fixture
def run(dataset, tmp_path, monkeypatch, blank_pictures):
    """A function that runs the script in an empty folder, and returns the status it ends with: on
    the CPU, as bits are compared. Its resnet20 is `tiny`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "resnet20", tiny)

    def call(*flags) -> int:
        command = [str(flag) for flag in flags]
        for name, value in (("--dataset", dataset), ("--device", "cpu")):
            if name not in command:
                command += [name, str(value)]
        try:
            main_optim.main(command)
        except SystemExit as end:
            return end.code
        return 0

    return call


@pytest.fixture
def resnet20(run, monkeypatch):
    """Has `run` train what it says."""
    monkeypatch.setitem(models.MODELS, "resnet20", RESNET20)


def small(optim: str, save: str = "net.pth") -> list[str]:
    """Flags of a run of three epochs of three steps, one of them with half a batch."""
    flags = ["--optim", optim, "--epochs", "3", "--batchsize", "32", "--save", save]
    return [*flags, "--ngrads", "5"] if optim == "mfac" else flags


def start(*flags, **options) -> subprocess.Popen:
    """The script in a process of its own, which minds Ctrl-C even where the tests don't, as in the
    background of a shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, flags), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    minds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, preexec_fn=minds, **pipes | options)


def rows(path: str, without=frozenset()) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key not in without} for row in table]


def interrupt_after(monkeypatch, epochs: int) -> None:
    """Ctrl-C comes while the epoch after the first `epochs` is tested."""
    calls = iter(range(epochs))
    evaluate = main_optim.evaluate

    def interrupted(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(main_optim, "evaluate", interrupted)


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar that TensorBoard shows for a folder."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_shown(folder: str, table: list[dict[str, str]]) -> None:
    """TensorBoard shows the figures of a CSV, each once."""
    shown = scalars(folder)
    expected = {tag: [] for tag in table[0]}
    for step, row in enumerate(table, start=1):
        for tag, value in row.items():
            if value:
                expected[tag].append((step, pytest.approx(float(value), rel=1e-6)))
    assert shown == {tag: values for tag, values in expected.items() if values}


def assert_same_run(one: str, other: str) -> None:
    """Two runs ended with the same bits in every file, but for the times."""
    assert Path(f"{one}.pth").read_bytes() == Path(f"{other}.pth").read_bytes()
    assert rows(f"{one}.csv", TIMES) == rows(f"{other}.csv", TIMES)
    states = [main_common.load_saved(Path(f"{name}.state")) for name in (one, other)]
    for state in states:
        for row in state["history"]:
            for name in TIMES:
                del row[name]
    assert_equal(*states)


def assert_equal(one, other) -> None:
    """Nested containers, equal down to the bits of their tensors."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


# --- what a run leaves ----------------------------------------------------------------------


def test_the_published_command_and_ctrl_c(dataset, tmp_path):
    """The command of the README, stopped after its first epoch."""
    flags = "--model resnet20 --optim mfac --ngrads 512 --weightdecay .003 --batchsize 128"
    process = start(*flags.split(), "--dataset", dataset, "--save", "rn20-mfac.pth", cwd=tmp_path)
    settings, line = process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    (tmp_path / "rn20-mfac.state").unlink()  # half a gigabyte
    assert process.returncode == 130
    assert "Traceback" not in errors and "rn20-mfac.pth" in errors and "--resume" in errors
    assert "512 gradients of 272,084 weights" in errors  # four classes
    for setting in ("lr 0.001", "momentum 0.0", "damp 1e-05", "epochs 164", "drop_at [82, 123]"):
        assert setting in settings
    assert line.startswith("epoch 1/164  lr 0.001  loss ")
    models.load_checkpoint(models.build("resnet20", 4), tmp_path / "rn20-mfac.pth")
    assert len(rows(tmp_path / "rn20-mfac.csv")) >= 1
    assert not list(tmp_path.glob("*.tmp"))


def test_embedded_digits_by_default(run, capsys):
    """One real epoch on the digits; files go to runs/ under a name that says what they are."""
    assert run("--dataset", "digits", "--optim", "sgd", "--epochs", 1) == 0
    names = {path.name for path in Path("runs").iterdir()}
    assert names == {f"resnet20-digits-sgd.{end}" for end in ("pth", "state", "csv", "png")}
    (row,) = rows("runs/resnet20-digits-sgd.csv")
    assert float(row["train_accuracy"]) > 20  # ten classes
    assert float(row["train_loss"]) < math.log(10)
    assert "dataset digits" in capsys.readouterr().out


@pytest.mark.parametrize("optim", ["sgd", "adam", "mfac"])
def test_files_and_lines(run, dataset, optim, capsys, figures):
    assert run(*small(optim), "--schedule", "linear", "--lr", 0.01) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("# ") and len(lines) == 1 + 3
    assert "\r" not in printed.err and printed.err.count("\n") == (optim == "mfac")

    table = rows("net.csv")
    assert list(table[0]) == COLUMNS
    assert [int(row["epoch"]) for row in table] == [1, 2, 3]
    assert [float(row["lr"]) for row in table] == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])
    for line, row in zip(lines[1:], table, strict=True):
        assert f"test {float(row['test_accuracy']):.2f} %" in line
        assert f"loss {float(row['train_loss']):.4f}" in line
        seconds = float(row["seconds"])
        assert 0 < float(row["optimizer_seconds"]) < seconds
        assert float(row["images_per_second"]) == pytest.approx(80 / seconds)

    with Image.open("net.png") as curves:
        assert curves.format == "PNG" and curves.width > 1000
        assert len(curves.convert("RGB").getcolors(2**24)) > 50  # more than an empty sheet

    saved = torch.load("net.pth", weights_only=True)
    assert saved["model"] == "resnet20"
    assert saved["classes"] == ["digit0", "digit1", "digit2", "digit3"]
    assert all(weight.is_contiguous() for weight in saved["state_dict"].values())
    model = models.build("resnet20", 4)
    models.load_checkpoint(model, "net.pth")
    loader = datautils.load(dataset).loader("test", 7)
    loss, accuracy = main_optim.evaluate(model, loader, device=torch.device("cpu"))
    assert accuracy == pytest.approx(saved["accuracy"]) == float(table[-1]["test_accuracy"])
    assert loss == pytest.approx(float(table[-1]["test_loss"]), rel=1e-4)


def test_earlier_runs_are_drawn(run, figures):
    """With axes that have units, and lines that differ in colour, and in style or marker."""
    for save, others in (("a.pth", []), ("b.pth", []), ("c.pth", ["--plot", "a.csv", "b.csv"])):
        assert run(*small("sgd", save), *others) == 0
    (one, *_), figure = figures[0].axes, figures[-1]
    assert len(one.lines) == 2 and len(figure.legends) == 1
    labels = [axes.get_ylabel() for axes in figure.axes] + [a.get_xlabel() for a in figure.axes]
    assert [label for label in labels if label] == [
        *("Loss (nats)", "Accuracy (%)", "Epoch", "Time in training (s)")
    ]
    splits = ("train", "test")
    names = [f"{name}, {split}" for name in "cab" for split in splits]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    for i, axes in enumerate(figure.axes):
        styles = [(line.get_linestyle(), line.get_marker()) for line in axes.lines]
        assert len(set(styles)) == 6 and len({line.get_color() for line in axes.lines}) == 3
        for line, (name, split) in zip(
            axes.lines, [(n, split) for n in "cab" for split in splits], strict=True
        ):
            table = rows(f"{name}.csv")
            seconds = [float(row["seconds"]) for row in table]
            x = [sum(seconds[: n + 1]) if i % 2 else n + 1 for n in range(3)]
            y = [float(row[f"{split}_{('loss', 'accuracy')[i // 2]}"]) for row in table]
            assert list(line.get_xdata()) == pytest.approx(x) and list(line.get_ydata()) == y


def test_a_finished_run_is_drawn_again_with_others(run, figures):
    for save in ("a.pth", "b.pth"):
        assert run(*small("sgd", save)) == 0
    assert run("--save", "a.pth", "--resume", "--plot", "b.csv") == 0
    assert len(figures[-1].axes[0].lines) == 4


def test_progress_on_a_terminal(run, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(main_common, "tqdm", functools.partial(main_common.tqdm, mininterval=0))
    assert run(*small("sgd")) == 0
    bars = terminal.getvalue().split("\r")
    for title in ("epoch 2/3:", "test:"):
        bar = next(bar for bar in bars if bar.startswith(title) and "%" in bar and "loss=" in bar)
        assert "accuracy=" in bar
    assert bars[-1] == "" and "\n" not in terminal.getvalue()  # nothing is left of them


# --- TensorBoard ----------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["a whole epoch", "the scalars of an epoch", "one without"])
def test_tensorboard_goes_on(run, monkeypatch, after, capsys):
    """After Ctrl-C in an epoch, or between its scalars and its state; or asked for late."""
    flags = [] if after == "one without" else ["--tensorboard", "tb/deep"]
    with monkeypatch.context() as context:
        if after == "the scalars of an epoch":
            save = main_optim.Run.save_state

            def interrupted(self, history):
                if len(history) == 2:
                    raise KeyboardInterrupt
                save(self, history)

            context.setattr(main_optim.Run, "save_state", interrupted)
        else:
            interrupt_after(context, 1)
        assert run(*small("sgd"), *flags) == 130
    assert len(rows("net.csv")) == 1
    capsys.readouterr()
    assert run("--save", "net.pth", "--resume", "--tensorboard", "tb/deep") == 0
    assert capsys.readouterr().err == "resumed after epoch 1 of 3\n"
    assert list(Path("tb/deep").iterdir()) == [Path("tb/deep/net")]
    assert_shown("tb/deep/net", rows("net.csv"))


def test_tensorboard_begins_anew(run):
    assert run(*small("sgd"), "--tensorboard", "tb") == 0
    assert run(*small("adam"), "--epochs", 2, "--tensorboard", "tb", "--overwrite") == 0
    assert len(rows("net.csv")) == 2
    assert_shown("tb/net", rows("net.csv"))


def test_without_tensorboard(run, monkeypatch, capsys):
    """It says what to do, and does nothing."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(*small("sgd"), "--tensorboard", "tb") == 2
    printed = capsys.readouterr()
    assert "install it with 'pip install tensorboard'" in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not list(Path().iterdir())
    assert run(*small("sgd")) == 0  # needs none


def test_no_room_for_tensorboard(run, monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the package writes in a thread
    with largest_file(40):
        assert run(*small("sgd"), "--tensorboard", "tb") == 2
    error = capsys.readouterr().err
    assert "cannot write into --tensorboard tb/net: " in error and error.count("\n") == 1


# --- the same again -------------------------------------------------------------------------


def test_the_seed_decides(run):
    for save, seed in (("a.pth", 3), ("b.pth", 3), ("c.pth", 4)):
        assert run(*small("sgd", save), "--seed", seed) == 0
    assert_same_run("a", "b")
    assert rows("a.csv", TIMES) != rows("c.csv", TIMES)


def test_operations_that_can_not_be_deterministic(run, deterministic, monkeypatch, capsys):
    class Putting(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.fc = nn.Linear(3 * 64, num_classes)

        def forward(self, x):
            outputs = self.fc(x.flatten(1))
            return outputs.put(torch.tensor([0]), outputs.new_zeros(1))

    monkeypatch.setitem(models.MODELS, "putting", Putting)
    flags = [*small("sgd"), "--model", "putting", "--epochs", 1]
    assert run(*flags, "--deterministic") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith(
        "does not have a deterministic implementation: leave out --deterministic\n"
    )
    torch.use_deterministic_algorithms(False)
    assert run(*flags) == 0


def test_a_compiled_model(run, monkeypatch):
    """Trains as the model itself, with the same files; here without a compiler."""
    calls = []

    def spy(graph, inputs):
        calls.append(inputs[0].shape)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=spy))
    for save, flags in (("plain.pth", []), ("compiled.pth", ["--compile"])):
        assert run(*small("sgd", save), "--epochs", 1, *flags) == 0
    assert Path("plain.pth").read_bytes() == Path("compiled.pth").read_bytes()
    assert len(calls) == 2  # for a whole batch, and the smaller one at the end


def test_a_model_of_ones_own(run, monkeypatch):
    """In a module of the current folder. It trains as the same model of the registry does."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    Path("own_net.py").write_text("from test_main_optim import tiny as net\n")
    assert run(*small("mfac")) == 0
    path = "runs/own_net-net-four-mfac.pth"
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run(*small("mfac", path), "--model", "own_net:net") == 130
    assert run("--model", "own_net:net", "--resume") == 0
    known, own = (torch.load(file, weights_only=True) for file in ("net.pth", path))
    assert own["model"] == "own_net:net"
    for name, weight in known["state_dict"].items():
        assert torch.equal(own["state_dict"][name], weight)


def test_a_model_that_is_all_head(run, monkeypatch, capsys):
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    monkeypatch.setitem(models.MODELS, "resnet20", lambda n: nn.Sequential(*head, nn.Linear(48, n)))
    assert run(*small("mfac"), "--fallback", "adamw") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("add --fallback none\n")
    assert run(*small("mfac"), "--fallback", "none", "--no-window_warmup") == 0


def test_amp_trains_in_bfloat16_with_float32_weights(run):
    for save, flags in (("full.pth", []), ("half.pth", ["--amp"])):
        assert run(*small("mfac", save), *flags) == 0
    full, half = (rows(name, TIMES) for name in ("full.csv", "half.csv"))
    assert full != half
    assert float(half[0]["train_loss"]) == pytest.approx(float(full[0]["train_loss"]), rel=0.05)
    weights = torch.load("half.pth", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32, torch.int64}


# --- nothing is lost ------------------------------------------------------------------------


CONTROLS = ["--window_warmup", "--max_step", 0.1, "--max_norm", 10, "--decoupled"]


def test_training_goes_on_from_a_checkpoint(run):
    """An epoch that changes next to nothing begins and ends where the other run ended."""
    assert run(*small("sgd")) == 0
    flags = ["--optim", "sgd", "--lr", "1e-9", "--epochs", "1", "--save", "more.pth"]
    assert run(*flags, "--checkpoint", "net.pth") == 0
    one, other = (torch.load(path, weights_only=True) for path in ("net.pth", "more.pth"))
    for name, weight in one["state_dict"].items():
        if "running" not in name and "tracked" not in name:  # statistics of batch norm move on
            torch.testing.assert_close(weight, other["state_dict"][name])


@pytest.mark.parametrize(
    ("optim", "flags"),
    [
        ("sgd", []),
        ("adam", []),
        ("mfac", ["--momentum", 0.5]),
        ("mfac", ["--window_dtype", "bfloat16", "--compress", 0.05]),
        ("mfac", [*CONTROLS, "--fallback", "adamw", "--schedule", "cosine", "--warmup_steps", 4]),
        ("mfac", ["--normalize", "layer", "--fallback", "sgd", "--fallback_lr", 0.01]),
        ("muon", ["--fallback_weightdecay", 0.1, "--label_smoothing", 0.1, "--clip", 1]),
    ],
)
@pytest.mark.parametrize("epochs_before", [1, 2])
def test_resumed_is_uninterrupted(run, monkeypatch, optim, flags, epochs_before, capsys):
    assert run(*small(optim, "whole.pth"), *flags) == 0
    with monkeypatch.context() as context:
        interrupt_after(context, epochs_before)
        # --resume from the first call on, as in a batch queue.
        assert run(*small(optim, "parts.pth"), *flags, "--resume") == 130
    assert "parts.pth" in capsys.readouterr().err
    assert len(rows("parts.csv")) == epochs_before
    # Flags that were given before need not be given again.
    assert run("--save", "parts.pth", "--resume") == 0
    assert_same_run("whole", "parts")


def test_states_and_models_every_few_epochs(run, monkeypatch, capsys):
    """After the first epoch and the last one in any case; a run goes on from the last state."""
    written, save = [], main_optim.save_atomically

    def spy(path, write):
        written.append(path.suffix)
        save(path, write)

    monkeypatch.setattr(main_optim, "save_atomically", spy)
    flags = ["--epochs", 5, "--state_every", 2, "--save_every", 3]
    assert run(*small("sgd", "whole.pth"), *flags) == 0
    assert "".join(written) == ".state.pth.state.pth.state.state.pth.pth.png"
    assert len(rows("whole.csv")) == 5
    assert capsys.readouterr().out.count("  saving ") == 5
    with monkeypatch.context() as context:
        interrupt_after(context, 3)
        assert run(*small("sgd", "parts.pth"), *flags, "--tensorboard", "tb") == 130
    assert len(rows("parts.csv")) == 3
    capsys.readouterr()
    assert run("--save", "parts.pth", "--resume", "--tensorboard", "tb") == 0
    assert capsys.readouterr().err == "resumed after epoch 2 of 5\n"
    assert_same_run("whole", "parts")
    assert_shown("tb/parts", rows("parts.csv"))


def test_a_state_without_the_window(run, monkeypatch, capsys, resnet20):
    flags = [*small("mfac", "light.pth"), "--ngrads", 64]
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run(*flags, "--light_state") == 130
    model, state = (Path(f"light.{end}").stat().st_size for end in ("pth", "state"))
    assert state < 1.2 * model
    capsys.readouterr()
    assert run("--save", "light.pth", "--resume") == 0
    assert "after epoch 1 of 3, with an empty window" in capsys.readouterr().err
    assert len(rows("light.csv")) == 3
    assert run(*small("sgd", "other.pth"), "--light_state") == 2
    assert "--light_state is no setting of --optim sgd" in capsys.readouterr().err


def test_the_average_is_tested_saved_and_resumed(run, monkeypatch, dataset):
    flags = [*small("sgd", "whole.pth"), "--ema", "0.9"]
    weights = []

    def spy(model, *args, **kwargs):
        figures = train_epoch(model, *args, **kwargs)
        weights.append({name: w.clone() for name, w in model.state_dict().items()})
        return figures

    train_epoch = main_optim.train_epoch
    with monkeypatch.context() as context:
        context.setattr(main_optim, "train_epoch", spy)
        assert run(*flags) == 0
    saved = torch.load("whole.pth", weights_only=True)["state_dict"]
    assert saved.keys() == weights[0].keys()
    assert any(not torch.equal(saved[name], weights[-1][name]) for name in saved)
    model = models.build("resnet20", 4)
    model.load_state_dict(saved)
    test = datautils.load(dataset).loader("test", 32)
    _, accuracy = main_optim.evaluate(model, test, device=torch.device("cpu"))
    assert accuracy == pytest.approx(float(rows("whole.csv")[-1]["test_accuracy"]))
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run(*small("sgd", "parts.pth"), "--ema", "0.9") == 130
    assert run("--save", "parts.pth", "--resume") == 0
    assert_same_run("whole", "parts")


def test_the_average_is_the_exponential_one(run, monkeypatch):
    """From the weights at the start on, which decide nothing later. One batch an epoch, so that the
    weights of every step are seen."""
    seen = []
    save = main_optim.Run.save_state

    def spy(self, history):
        pairs = zip(self.model.parameters(), self.tested.parameters(), strict=True)
        seen.append([(w.detach().clone(), a.detach().clone()) for w, a in pairs])
        save(self, history)

    monkeypatch.setattr(main_optim.Run, "save_state", spy)
    flags = ["--optim", "sgd", "--epochs", "4", "--batchsize", "80", "--save", "net.pth"]
    assert run(*flags, "--ema", "0.75", "--seed", 7) == 0
    torch.manual_seed(7)
    expected = [w.detach() for w in models.build("resnet20", 4).parameters()]
    for step in seen:
        expected = [0.75 * a + 0.25 * w for a, (w, _) in zip(expected, step, strict=True)]
    for a, (_, average) in zip(expected, seen[-1], strict=True):
        torch.testing.assert_close(a, average)


def test_the_defaults_are_those_of_the_optimizer():
    flags = optim_settings.DEFAULTS["paper", "mfac"]
    for name, parameter in inspect.signature(MFAC).parameters.items():
        if name in ("lr", "momentum", "ngrads", "damp", "compress"):
            assert flags[name] == parameter.default


def test_ctrl_c_before_anything_is_saved(run, monkeypatch, capsys):
    interrupt_after(monkeypatch, 0)
    assert run(*small("sgd")) == 130
    assert "before anything was saved" in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("optim", ["adam", "mfac"])
def test_a_resumed_run_needs_the_file_no_more(run, monkeypatch, optim):
    """Whatever another program writes into the state file does not change a run that goes on."""
    assert run(*small(optim, "whole.pth")) == 0
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run(*small(optim, "parts.pth")) == 130
    restore = main_optim.Run.restore

    def spoil(self, state):
        restore(self, state)
        size = self.state_path.stat().st_size
        with open(self.state_path, "r+b") as file:  # in place
            file.write(bytes([0xFF]) * size)

    monkeypatch.setattr(main_optim.Run, "restore", spoil)
    assert run("--save", "parts.pth", "--resume") == 0
    assert_same_run("whole", "parts")


@pytest.mark.parametrize("lost", ["net.pth", "net.csv", "net.png"])
def test_results_come_back_from_the_state(run, lost):
    """As after a kill between the writing of the state and that of the results."""
    assert run(*small("sgd")) == 0
    before = Path(lost).read_bytes()
    Path(lost).unlink()
    assert run("--save", "net.pth", "--resume") == 0
    if lost != "net.png":
        assert Path(lost).read_bytes() == before
    assert Path(lost).exists()


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new and longer")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        main_common.save_atomically(path, write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    main_common.save_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def largest_file(size: int):
    """Writing more than `size` bytes fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_the_last_checkpoint(run, monkeypatch, capsys, resnet20):
    assert run(*small("sgd", "whole.pth")) == 0
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run(*small("sgd")) == 130
    before = {path: path.read_bytes() for path in Path().iterdir()}
    capsys.readouterr()
    with largest_file(500_000):
        assert run("--save", "net.pth", "--resume") == 2
    assert "cannot write net.state" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    assert run("--save", "net.pth", "--resume") == 0
    assert_same_run("whole", "net")


def test_a_diverged_run_ends_and_keeps_what_it_had(run, monkeypatch, capsys):
    assert run(*small("sgd"), "--lr", 1e30) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the loss became" in error
    assert error.endswith("use a lower --lr\n")  # sgd has no damping


@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_a_last_step_that_diverges_is_seen(run, optim, capsys):
    """No loss comes after it. The largest numbers that the flags take."""
    flags = [*small(optim), "--epochs", 1, "--batchsize", 80]
    assert run(*flags, "--lr", 1e30, "--weightdecay", 1e30) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the last step made weights NaN or Inf: use a lower --lr" in error
    assert not [path for path in Path().iterdir() if path.is_file()]


def test_existing_files_are_kept_unless_told_otherwise(run, capsys):
    flags = [*small("sgd"), "--epochs", "1"]
    Path("net.csv").write_text("mine")
    assert run(*flags) == 2
    assert "net.csv exists" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert run(*flags, "--resume") == 2
    assert "net.state" in capsys.readouterr().err
    assert Path("net.csv").read_text() == "mine" and len(list(Path().iterdir())) == 1
    assert run(*flags, "--overwrite") == 0
    assert len(rows("net.csv")) == 1
    assert run(*flags) == 2
    assert "--resume" in capsys.readouterr().err


# --- bad input: one sentence, exit status 2, nothing done -----------------------------------

BAD_FLAGS = [
    ("--model x", "--model: x is none of resnet20, resnet32, "),
    ("--model 20", "--model: 20 is none of resnet20, resnet32, "),
    ("--model nowhere:net", "There is no module 'nowhere' in "),
    ("--optim lion", "lion"),
    ("--mod resnet20", "--mod"),
    ("--epochs", "--epochs"),
    ("--schedule exponential", "exponential"),
    ("--dataset nowhere", "nowhere"),
    ("--checkpoint nowhere.pth", "There is no checkpoint file nowhere.pth"),
    *(
        (f"--{flag} {value}", f"--{flag}: {value} is not")
        for flag in ("lr", "damp", "drop_by")
        for value in ("0", "-1", "nan", "inf", "1e300", "x")
    ),
    *((f"--weightdecay {value}", "from 0") for value in ("-0.1", "nan", "1e31", "x")),
    *((f"--momentum {value}", "below 1") for value in ("-0.1", "1", "nan", "x")),
    *(
        (f"--{flag} {value}", f"--{flag}: {value} is not a whole number from 1")
        for flag in ("epochs", "batchsize", "ngrads", "drop_at")
        for value in ("0", "-3", "1.5", "x")
    ),
    *((f"--seed {value}", "--seed") for value in ("-1", str(2**32), "0.5")),
    ("--drop_by 1.1", "at most 1"),
    ("--epochs 5 --drop_at 2 5", "--drop_at 5 never comes"),
    ("--schedule linear --drop_at 2", "not for --schedule linear"),
    ("--schedule cosine --drop_by 0.5", "not for --schedule cosine"),
    ("--optim sgd --ngrads 8", "--ngrads is no setting of --optim sgd"),
    ("--optim sgd --window_dtype bfloat16", "--window_dtype is no setting of --optim sgd"),
    ("--optim adam --compress 0.1", "--compress is no setting of --optim adam"),
    ("--window_dtype int8", "--window_dtype: invalid choice: 'int8'"),
    *((f"--compress {value}", "at most 1") for value in ("0", "-0.1", "1.5", "nan", "x")),
    ("--optim adam --damp 1", "--damp is no setting of --optim adam"),
    ("--optim adam --momentum 0.5", "--momentum is no setting of --optim adam"),
    ("--resume --overwrite", "not allowed with"),
    ("--device tpu9", "--device tpu9 is not one of cpu"),
    ("--device meta", "--device meta is not one of cpu"),
    ("--device cuda:99", "--device cuda:99 is not one of cpu"),
    ("--save model.csv", "must end in .pth"),
    ("--save model", "must end in .pth"),
    ("--save /dev/null/model.pth", "/dev/null is not a writable folder"),
    (f"--save {'x' * 300}.pth", "too long"),
    ("--batchsize 79 --optim sgd", "batch of one"),
    ("--batchsize 1 --optim sgd", "batch of one"),
    (f"--ngrads {10**9}", "use at most --ngrads"),
    (f"--ngrads {10**9} --compress 0.01 --window_dtype bfloat16", "use at most --ngrads"),
    ("--epochs 3 extra", "extra"),
    ("--plot missing.csv", "--plot missing.csv can't be read: No such file or directory"),
    ("--tensorboard /dev/null/tb", "/dev/null is not a writable folder"),
    ("--dataset /dev/null", "is a file"),
    ("--dataset .", "holds no data set"),
    ("--checkpoint .", "There is no checkpoint file"),
    ("--checkpoint /dev/zero", "There is no checkpoint file /dev/zero"),
    *((f"--ema {value}", "from 0 and below 1") for value in ("-0.1", "1", "nan", "x")),
    *((f"--{flag} {10**30}", "2^31") for flag in ("epochs", "batchsize", "ngrads", "drop_at")),
    *((f"--{flag} 1e400", f"--{flag}: 1e400 is not") for flag in ("lr", "damp", "weightdecay")),
    ("--damp relative:x", "--damp: relative:x is not a number above 0"),
    ("--seed x", "--seed: x is not"),
    ("--ngrads 1e3", "--ngrads: 1e3 is not"),
    *((f"--{flag} yes", "yes") for flag in ("amp", "resume", "overwrite")),
    *((f"--{flag} yes", "yes") for flag in ("compile", "deterministic", "light_state")),
    ("--device", "--device: expected one argument"),
    ("--damp 1e-320 --ngrads 4", "1e-320"),
    ("--save .", "must end in .pth"),
    ("--save missing/../net.txt", "must end in .pth"),
    *(
        (f"--{name}_every {value}", f"{value} is not a whole number from 1")
        for name in ("save", "state")
        for value in ("0", "x")
    ),
    *((f"--workers {value}", f"{value} is not a whole number from 0") for value in ("-1", "x")),
    ("--graph maybe", "maybe"),
    ("--graph yes", "--graph yes is for CUDA, but --device is cpu: leave it out"),
    *(
        (f"--optim sgd --{name}", f"--{name} is no setting of --optim sgd: leave it out")
        for name in ("decoupled", "window_warmup")
    ),
    *(
        (f"--{name} {value}", f"{value} is not a number above 0")
        for name in ("max_step", "max_norm", "fallback_lr", "clip")
        for value in ("x", "0")
    ),
    *((f"--fallback_weightdecay {value}", "is not a number from 0 to") for value in ("x", "-1")),
    *((f"--warmup_steps {value}", "is not a whole number from 1") for value in ("x", "0")),
    ("--label_smoothing x", "x is not a number from 0 and below 1"),
    ("--optim sgd --max_norm 1", "--max_norm is no setting of --optim sgd: leave it out"),
    ("--fallback_lr 1", "--fallback_lr and --fallback_weightdecay go with --fallback"),
    ("--optim muon --fallback sgd", "--fallback sgd is no setting of --optim muon"),
    ("--normalize group", "'group' (choose from"),
    ("--label_smoothing 1", "1 is not a number from 0 and below 1"),
]


@pytest.mark.parametrize(("flags", "sentence"), BAD_FLAGS, ids=lambda text: text[:50])
def test_bad_flags(run, flags, sentence, capsys):
    assert run(*flags.split()) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not list(Path().iterdir())


OF_MAIN_PRUN = "sparsity,test_accuracy\n0.5,50\n"


@pytest.mark.parametrize(
    "text", [OF_MAIN_PRUN, ",".join(COLUMNS), "{0}\n{1},1\n", "{0}\n{1},1,101\n"]
)
def test_bad_files_to_plot(run, text, capsys):
    """Of main_prun.py, without an epoch, with too few figures or impossible ones."""
    others = [name for name in COLUMNS if name not in ("epoch", "test_accuracy")]
    text = text.format(",".join([*others, "epoch", "test_accuracy"]), ",".join("1" for _ in others))
    Path("other.csv").write_text(text)
    assert run(*small("sgd"), "--plot", "other.csv") == 2
    printed = capsys.readouterr()
    assert "--plot other.csv" in printed.err and printed.err.count("\n") == 1
    assert printed.out == "" and len(list(Path().iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written(run, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert run(*small("sgd")) == 2
    assert "is not a writable folder" in capsys.readouterr().err


def test_a_folder_in_the_way(run, capsys):
    Path("net.csv").mkdir()
    assert run(*small("sgd"), "--overwrite") == 2
    assert "net.csv is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("free", [2**20, 10**7, 123_456_789])
def test_a_window_that_can_not_fit(run, monkeypatch, free, capsys, resnet20):
    monkeypatch.setattr(main_optim, "available_memory", lambda device: free)
    assert run("--optim", "mfac", "--ngrads", 1000) == 2
    error = capsys.readouterr().err
    assert "1,000 gradients of 272,084 weights" in error
    fits = int(error.rsplit("--ngrads", 1)[1])
    assert window_bytes(fits, 272_084) <= free < window_bytes(fits + 1, 272_084)
    if fits:
        assert run(*small("mfac"), "--ngrads", fits, "--epochs", 1) == 0


@pytest.mark.parametrize(
    ("flags", "free", "advice"),
    [
        ([], 0.6, "use --window_dtype bfloat16, or at most --ngrads 5"),
        ([], 0.1, "use --compress 0.01, or at most --ngrads "),
        (["--window_dtype", "bfloat16"], 0.1, "use --compress 0.01, or at most --ngrads"),
        (["--compress", "0.01"], 0.01, "use at most --ngrads"),
    ],
)
def test_smaller_windows_are_advised_where_they_fit(
    run, monkeypatch, flags, free, advice, capsys, resnet20
):
    monkeypatch.setattr(
        main_optim, "available_memory", lambda device: int(free * 1000 * 4 * 272_084)
    )
    assert run("--optim", "mfac", "--ngrads", 1000, *flags) == 2
    assert advice in capsys.readouterr().err


def test_the_window_is_as_asked(run, monkeypatch):
    made = []

    def spy(*args, **options):
        made.append(options)
        return MFAC(*args, **options)

    monkeypatch.setattr(main_optim, "MFAC", spy)
    flags = ["--window_dtype", "bfloat16", "--compress", 0.1]
    assert run(*small("mfac"), *flags) == 0
    assert run(*small("mfac"), "--overwrite") == 0
    kinds = [(options["window_dtype"], options["compress"]) for options in made]
    assert kinds == [(torch.bfloat16, 0.1), (torch.float32, None)]


def test_workers_read_large_images(run, dataset, tmp_path, monkeypatch):
    for path in dataset.rglob("*.png"):
        large = tmp_path / "large" / path.relative_to(dataset)
        large.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((70, 70)).save(large)
    found = []

    def spy(model, loader, *args, **kwargs):
        found.append(loader.workers)
        return train_epoch(model, loader, *args, **kwargs)

    train_epoch = main_optim.train_epoch
    monkeypatch.setattr(main_optim, "train_epoch", spy)
    monkeypatch.setitem(
        models.MODELS,
        "mean",
        lambda n: nn.Sequential(nn.AvgPool2d(224), nn.Flatten(), nn.Linear(3, n)),
    )
    flags = [*small("sgd"), "--model", "mean", "--epochs", 1, "--dataset", "large"]
    assert run(*flags, "--workers", 1) == 0
    assert (
        run("--save", "net.pth", "--dataset", "large", "--resume", "--epochs", 2, "--workers", 0)
        == 0
    )
    assert found == [1, 0]


def test_memory_is_measured(monkeypatch):
    """Of main memory, a share for each process."""
    free = main_optim.available_memory(torch.device("cpu"))
    assert 2**20 < free <= psutil.virtual_memory().total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main_optim.available_memory(torch.device("cpu")) == pytest.approx(free / 4, rel=0.3)


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    """Unless a device is named in full. The GPUs are thought up."""
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    assert main_common.find_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main_common.find_device("cuda") == torch.device("cuda", 1)
    assert main_common.find_device("cuda:0") == torch.device("cuda", 0)
    assert main_common.find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("found", "name"), [(1, "cuda"), (4, "cuda:0")])
def test_processes_do_not_share_a_gpu(monkeypatch, found, name):
    """The GPUs are thought up."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        main_common.UserError, match=f"2 processes and {found} GPUs: .*--device cpu"
    ):
        main_common.find_device(name)
    assert main_common.find_device("cpu") == torch.device("cpu")


def test_a_port_in_use(monkeypatch):
    """As where processes are started without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": other.getsockname()[1]}).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(main_common.UserError, match=r"at 127.0.0.1:\d+, which is in use"):
            main_common.find_ranks(torch.device("cpu"))


@pytest.mark.parametrize(
    ("flag", "value", "saved"),
    [("weightdecay", 0.2, 0.0005), ("batchsize", 40, 32), ("optim", "adam", "sgd")],
)
def test_resume_refuses_other_settings(run, flag, value, saved, capsys):
    assert run(*small("sgd")) == 0
    capsys.readouterr()
    assert run("--save", "net.pth", "--resume", f"--{flag}", value) == 2
    assert f"--{flag} {value} differs from the saved run, which has {saved}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("optim", ["sgd", "mfac"])
def test_more_epochs(run, optim, capsys):
    """The bits of a run that had as many from the start."""
    drops = ["--drop_at", 1, 2]
    assert run(*small(optim, "whole.pth"), "--epochs", 4, *drops) == 0
    assert run(*small(optim, "parts.pth"), *drops) == 0
    capsys.readouterr()
    assert run("--save", "parts.pth", "--resume", "--epochs", 4) == 0
    note = "resumed after epoch 3 of 4, with --epochs 4, before 3\n"
    assert capsys.readouterr().err.endswith(note)
    assert_same_run("whole", "parts")
    assert run("--save", "parts.pth", "--resume", "--epochs", 3) == 2
    assert "--epochs 3 is less than the 4 that are done" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_another_learning_rate(run, monkeypatch, schedule, capsys, resnet20):
    """It takes the place of the first one in the schedule, and is kept."""
    flags = [*small("sgd"), "--schedule", schedule, "--lr", 0.01]
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run(*flags) == 130
    before = torch.load("net.pth", weights_only=True)["state_dict"]["fc.weight"]
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run("--save", "net.pth", "--resume", "--lr", 1e-9) == 130
    assert "with --lr 1e-09, before 0.01" in capsys.readouterr().err
    after = torch.load("net.pth", weights_only=True)["state_dict"]["fc.weight"]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
    assert run("--save", "net.pth", "--resume") == 0
    factors = {"step": [1, 1, 0.1], "cosine": [1, 0.75, 0.25]}[schedule]
    expected = [rate * f for rate, f in zip((0.01, 1e-9, 1e-9), factors, strict=True)]
    assert [float(row["lr"]) for row in rows("net.csv")] == pytest.approx(expected, rel=1e-6)


def test_another_damping(run, monkeypatch, capsys):
    """As the advice of the optimizer is, where it has too little."""
    damps = []
    save = main_optim.Run.save_state
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run(*small("mfac"), "--damp", 1e-3) == 130

    def spy(self, history):
        damps.append(self.optimizer.damp)
        save(self, history)

    monkeypatch.setattr(main_optim.Run, "save_state", spy)
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert run("--save", "net.pth", "--resume", "--damp", 0.5) == 130
    assert "with --damp 0.5, before 0.001" in capsys.readouterr().err
    assert run("--save", "net.pth", "--resume") == 0
    assert damps == [0.5, 0.5]


def test_resume_refuses_settings_of_another_optimizer(run, capsys):
    assert run(*small("sgd")) == 0
    assert run("--save", "net.pth", "--resume", "--damp", 0.5) == 2
    assert "--damp is no setting of --optim sgd" in capsys.readouterr().err


def test_resume_refuses_other_data(run, dataset, tmp_path, capsys):
    (tmp_path / "data").symlink_to(dataset)
    flags = [*small("sgd"), "--dataset", "data"]
    assert run(*flags) == 0
    (tmp_path / "data").unlink()
    for path in dataset.rglob("*.png"):
        copy = tmp_path / "data" / path.relative_to(dataset)
        copy = Path(str(copy).replace("digit", "number"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    capsys.readouterr()
    assert run(*flags, "--resume") == 2
    assert "other classes" in capsys.readouterr().err


def test_damaged_state(run, capsys):
    """Shortened, one bit turned over, or another file: a sentence, and no file is touched."""
    assert run(*small("mfac")) == 0
    path, good = Path("net.state"), Path("net.state").read_bytes()
    chance = random.Random(time.time_ns())
    place = chance.randrange(10_000, len(good) - 10_000)
    weights = Path("net.pth").read_bytes()
    flipped = bytearray(good)
    flipped[place] ^= 1 << chance.randrange(8)
    for bad in (b"", good[: chance.randrange(len(good))], bytes(flipped), b"text", weights):
        path.write_bytes(bad)
        capsys.readouterr()
        assert run("--save", "net.pth", "--resume") == 2
        error = capsys.readouterr().err
        assert "net.state" in error and error.count("\n") == 1
        assert path.read_bytes() == bad and Path("net.pth").read_bytes() == weights


def test_state_of_another_model(run, capsys):
    assert run(*small("sgd")) == 0
    state = torch.load("net.state", weights_only=True)
    state["settings"]["model"] = "resnet32"
    torch.save(state, "net.state")
    capsys.readouterr()
    assert run("--save", "net.pth", "--resume") == 2
    assert "does not fit" in capsys.readouterr().err


def test_state_of_an_older_version(run):
    """A flag that it did not know has its default."""
    assert run(*small("mfac")) == 0
    state = torch.load("net.state", weights_only=True)
    del state["settings"]["compress"], state["settings"]["window_dtype"]
    torch.save(state, "net.state")
    assert run("--save", "net.pth", "--resume") == 0


def test_the_help_has_every_default(capsys):
    """By optimizer and data where they differ."""
    for action in optim_settings.build_parser()._actions:
        assert action.dest in ("help", "plot", "tensorboard") or "default" in action.help
    with pytest.raises(SystemExit):
        main_optim.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: mfac 0.003 (digits 0.0005), sgd 0.0005, adam 0.0005" in shown
    assert (
        "default: resnet 164, wideresnet 200, mobilenet 100, your own model as resnet, for" in shown
    )


# --- the parts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "epochs"), [("resnet32", 164), ("wideresnet-22-2", 200), ("mobilenet", 100)]
)
def test_defaults_are_the_papers(model, epochs):
    choose = optim_settings.choose_settings
    settings = choose({"model": model, "dataset": "cifar"})
    assert settings["optim"] == "mfac" and settings["lr"] == 1e-3 and settings["damp"] == 1e-5
    assert settings["epochs"] == epochs
    assert settings["drop_at"] == [epochs // 2, epochs * 3 // 4] and settings["drop_by"] == 0.1
    settings = choose({"model": model, "dataset": "cifar", "optim": "sgd"})
    assert (settings["lr"], settings["momentum"]) == (0.1, 0.9)
    assert "damp" not in settings
    assert choose({"dataset": "digits"})["epochs"] < 50


@pytest.mark.parametrize("schedule", ["step", "linear", "cosine"])
def test_schedules_are_those_of_torch(schedule):
    epochs, steps = 8, 5
    settings = optim_settings.choose_settings({"schedule": schedule, "epochs": epochs})
    factor = main_optim.learning_rate_factor(settings, steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    lr_scheduler = torch.optim.lr_scheduler
    expected = {
        "step": lr_scheduler.MultiStepLR(optimizer, [4 * steps, 6 * steps], 0.1),
        "linear": lr_scheduler.PolynomialLR(optimizer, epochs * steps),
        "cosine": lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps),
    }[schedule]
    for step in range(epochs * steps):
        assert factor(step) == pytest.approx(expected.get_last_lr()[0])
        optimizer.step()
        expected.step()


def test_drops_as_asked(run):
    flags = ["--drop_at", 1, 2, "--drop_by", 0.5, "--lr", 0.08]
    assert run(*small("sgd"), *flags) == 0
    assert [float(row["lr"]) for row in rows("net.csv")] == pytest.approx([0.08, 0.04, 0.02])


def test_figures_of_an_epoch(dataset):
    """Loss and accuracy are means over images, whatever the batches, as for a fixed model."""
    data = datautils.load(dataset)
    loader = data.loader("train", 32, augment=False)
    torch.manual_seed(time.time_ns() % 2**32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    device = torch.device("cpu")
    figures = main_optim.train_epoch(model, loader, optimizer, scheduler, device=device)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        logits = model(images).double()
    loss = -logits.log_softmax(1)[range(80), labels].mean().item()
    accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert figures["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["train_accuracy"] == pytest.approx(accuracy)
    assert scheduler.last_epoch == len(loader)
    assert main_optim.evaluate(model, loader, device=device) == pytest.approx((loss, accuracy))


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(dataset, training):
    model = models.build("resnet20", 4).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = datautils.load(dataset).loader("test", 16)
    main_optim.evaluate(model, loader, device=torch.device("cpu"))
    assert model.training is training
    assert all(weight.grad is None for weight in model.parameters())
    assert_equal(before, dict(model.state_dict()))


def test_a_refusal_of_the_optimizer_is_a_sentence(dataset):
    class Refusing(torch.optim.SGD):
        def step(self):
            raise ValueError("damp is too small")

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    optimizer = Refusing(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loader = datautils.load(dataset).loader("train", 16)
    with pytest.raises(main_common.UserError, match="damp is too small"):
        main_optim.train_epoch(model, loader, optimizer, scheduler, device=torch.device("cpu"))


def test_a_state_that_does_not_fit_is_refused(run, capsys):
    """Settings that are no flags, other classes, other figures, another optimizer."""
    assert run(*small("adam")[:2], "--epochs", 1, "--batchsize", 32, "--save", "net.pth") == 0
    state = torch.load("net.state", weights_only=True)
    group, settings = state["optimizer"]["param_groups"][0], state["settings"]
    damages = {
        "classes": {"classes": ["a", "b", "c", "d"]},
        "figures": {"history": []},
        "settings, a dict": {"settings": {**settings, "lr": {}}},
        "settings, a list": {"settings": {**settings, "drop_at": ["82"]}},
        "settings, help": {"settings": {**settings, "help": True}},
        "settings, of lr": {"settings": {**settings, "lr": "fast"}},
        "optimizer": {"optimizer": {**state["optimizer"], "param_groups": [{**group, "eps": 1}]}},
    }
    for name, damage in damages.items():
        torch.save({**state, **damage}, "net.state")
        assert run("--resume", "--epochs", 1, "--save", "net.pth") == 2, name
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("main_optim.py: error: "), name


class Generator:
    """As torch's on CUDA before 2.12: a failed capture leaves its state in capture mode."""

    def __init__(self, offset=7, capturing=False):
        self.state = {"offset": offset, "capturing": capturing}

    def clone_state(self):
        return Generator(self.state["offset"])

    def graphsafe_set_state(self, other):
        self.state = other.state


def test_a_failed_capture_is_followed_by_eager_steps(monkeypatch, capsys):
    """With a simulation of torch.cuda, whose streams are nothing but names."""
    generator, current = Generator(), ["default"]

    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        current.append("of the graph")
        generator.state["capturing"] = True
        raise RuntimeError("not permitted when stream is capturing\nand more")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cuda", 0))
    simulated = {
        "Stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None, name=current[-1]),
        "set_stream": lambda stream: current.append(stream.name),
        "CUDAGraph": lambda: None,
        "graph": graph,
        "default_generators": [generator],
    }
    for name, stands in simulated.items():
        monkeypatch.setattr(torch.cuda, name, stands)
    data = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(6)]
    ends = []
    for wanted in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        step = main_common.TrainingStep(model, optimizer, graph=wanted)
        for images, labels in data:
            step(images, labels, 4)
        ends.append(model.weight.detach())
    assert torch.equal(*ends)
    assert current[-1] == "default" and generator.state == {"offset": 7, "capturing": False}
    said = "no CUDA graph for this model and optimizer: not permitted when stream is capturing\n"
    assert capsys.readouterr().err == said


# --- on CUDA --------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(run, deterministic, resnet20):
    """Runs the script on the GPU, or skips the test."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return lambda *flags: run(*flags, "--device", "cuda")


GPU_RUNS = [
    ("sgd", []),
    ("adam", []),
    ("mfac", ["--momentum", 0.5]),
    ("mfac", ["--window_dtype", "bfloat16", "--ema", 0.9]),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("optim", "flags"), GPU_RUNS)
def test_a_graph_trains_as_single_operations_do(on_gpu, optim, flags, capsys):
    """To the roundings of float32, which grow in training; rates change and the last batch is
    smaller."""
    flags = [*flags, "--batchsize", 12, "--schedule", "linear", "--lr", 1e-3, "--deterministic"]
    for graph in ("yes", "no"):
        assert on_gpu(*small(optim, f"{graph}.pth"), *flags, "--graph", graph) == 0
    error = capsys.readouterr().err
    assert "no CUDA graph" not in error and error.count("faster: --amp") == 2
    graphed, eager = rows("yes.csv"), rows("no.csv")
    assert {row["optimizer_seconds"] for row in graphed} == {""}
    for name in ("train_loss", "test_loss"):
        values = [[float(row[name]) for row in table] for table in (graphed, eager)]
        assert values[0] == pytest.approx(values[1], rel=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("graph", ["yes", "no"])
@pytest.mark.parametrize(("optim", "flags"), GPU_RUNS)
def test_deterministic_runs_resume_to_the_same_bits_on_a_gpu(
    on_gpu, monkeypatch, optim, flags, graph
):
    flags = [*flags, "--batchsize", 12, "--deterministic", "--graph", graph]
    for save in ("whole.pth", "again.pth"):
        assert on_gpu(*small(optim, save), *flags) == 0
    assert_same_run("whole", "again")
    with monkeypatch.context() as context:
        interrupt_after(context, 1)
        assert on_gpu(*small(optim, "parts.pth"), *flags) == 130
    assert on_gpu("--save", "parts.pth", "--resume") == 0
    assert_same_run("whole", "parts")


@pytest.mark.cuda
@pytest.mark.parametrize("graph", ["yes", "no"])
def test_a_gpu_is_not_waited_for_at_each_batch(on_gpu, monkeypatch, graph):
    """Of 40 batches an epoch, as many times as without 20 of them."""
    waits = []

    def count(*args, **kwargs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                figures = train_epoch(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
        return figures

    train_epoch = main_optim.train_epoch
    monkeypatch.setattr(main_optim, "train_epoch", count)
    monkeypatch.setattr(main_common, "LOOK", 1000)
    for size in (2, 4):
        flags = ["--batchsize", size, "--graph", graph, "--overwrite"]
        assert on_gpu(*small("mfac"), *flags) == 0
    assert waits[1:3] == waits[4:6]  # not the first, in which the graph is made


@pytest.mark.cuda
def test_a_model_that_can_not_be_a_graph(on_gpu, monkeypatch, capsys):
    """It asks the device for a number at each batch. The steps after the failed capture drop what
    they do in a run without one, and the process can draw and capture again."""

    class Asking(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * float(x.mean() < 1e9)

    layers = nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 64, 4)
    monkeypatch.setitem(models.MODELS, "asking", lambda n: Asking(*copy.deepcopy(layers)))
    for graph in ("yes", "no"):
        flags = ["--model", "asking", "--batchsize", 12, "--graph", graph, "--deterministic"]
        assert on_gpu(*small("sgd", f"{graph}.pth"), *flags) == 0
    assert capsys.readouterr().err.count("no CUDA graph for this model") == 1
    tried, eager = rows("yes.csv"), rows("no.csv")
    assert all(float(row["optimizer_seconds"]) > 0 for row in tried)
    for name in ("train_loss", "test_loss"):
        values = [[float(row[name]) for row in table] for table in (tried, eager)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert torch.rand(5, device="cuda").unique().numel() == 5
    assert on_gpu(*small("sgd", "resnet.pth"), "--batchsize", 12) == 0
    assert "no CUDA graph" not in capsys.readouterr().err
