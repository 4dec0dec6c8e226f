"""Small parts of what kill.py and mutate.py do, and what holds for both scripts alike."""

import argparse
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_main_optim
import test_main_prun
import torch
import torch.distributed as dist

import main_common
import main_optim
import main_prun
import models

pytestmark = pytest.mark.usefixtures("blank_pictures")
HERE = Path(__file__).resolve().parent
SCRIPTS = {"optim": (main_optim, test_main_optim), "prun": (main_prun, test_main_prun)}


def call(script: Path, *flags, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, **options)


def test_killed_and_full():
    """Two kills and a full disk of each mode; `tests/kill.py` does more."""
    end = call(HERE / "kill.py", "--kills", 2, "--full", 1, stdout=subprocess.PIPE)
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("2 kills, all files readable, all resumed to the same bits") == 3


def test_changed_files():
    """Thirty files that are damaged or do not fit; `tests/mutate.py` does more."""
    end = call(HERE / "mutate.py", "--files", 30, "--seed", 1, stdout=subprocess.PIPE)
    assert end.returncode == 0, end.stdout + end.stderr
    assert "30 files, 0 failures" in end.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full file here")
def test_standard_output_is_full(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with open("/dev/full", "w") as full, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", full)
        main_optim.main(["--dataset", str(dataset), "--optim", "sgd", "--epochs", "1"])
    expected = "cannot write to standard output: No space left on device"
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {expected}\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_bits_again(name, threads, dataset, tmp_path, monkeypatch):
    script, tests = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        torch.save(models.build("resnet20", 4).state_dict(), "trained.pth")
        flags = {
            "optim": "--optim mfac --epochs 2 --batchsize 32 --ngrads 5 --momentum 0.5",
            "prun": "--checkpoint trained.pth --sparsities 0.5 0.9 --nepochs 2 --batchsize 32 "
            "--ngrads 8 --npergrad 4 --optim mfac",
        }[name].split()
        for run in ("a", "b"):
            place = ["--save", f"{run}.pth"] if name == "optim" else ["--out", run]
            script.main([*flags, "--dataset", str(dataset), "--device", "cpu", *place])
    finally:
        torch.set_num_threads(before)
    tests.assert_same_run("a", "b")


@pytest.mark.cuda
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_on_a_gpu_it_goes_on_to_the_same_bits(name, dataset, tmp_path, monkeypatch):
    """In processes of their own, with --deterministic."""
    torch.save(models.build("resnet20", 4).state_dict(), tmp_path / "trained.pth")
    flags = f"--checkpoint trained.pth --device cuda --deterministic --dataset {dataset} "
    flags += {
        "optim": "--optim mfac --epochs 6 --ngrads 5 --momentum 0.5 --save",
        "prun": "--sparsities 0.3 0.5 0.7 0.9 --nepochs 2 --ngrads 8 --npergrad 4 --out",
    }[name]
    suffix = ".pth" if name == "optim" else ""
    command = [sys.executable, HERE.parent / f"main_{name}.py", *flags.split()]
    killed = subprocess.Popen([*command, f"killed{suffix}"], cwd=tmp_path)
    state = tmp_path / "killed.state"
    while not state.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    for call in ([f"killed{suffix}", "--resume"], [f"whole{suffix}"]):
        subprocess.run([*command, *call], cwd=tmp_path, check=True, timeout=120)
    monkeypatch.chdir(tmp_path)
    SCRIPTS[name][1].assert_same_run("whole", "killed")


@pytest.mark.parametrize("name", SCRIPTS)
def test_too_little_space_is_seen_before(name, dataset, tmp_path, monkeypatch, capsys):
    script, _ = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main_common.shutil, "disk_usage", lambda folder: argparse.Namespace(free=9))
    torch.save(models.build("resnet20", 4).state_dict(), "trained.pth")
    with pytest.raises(SystemExit) as end:
        script.main(["--dataset", str(dataset), "--checkpoint", "trained.pth", "--ngrads", "8"])
    printed = capsys.readouterr()
    assert end.value.code == 2 and "0.00 GiB of free space" in printed.err
    assert printed.out == "" and printed.err.count("\n") == 1
    assert os.listdir() == ["trained.pth"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
@pytest.mark.parametrize("optim", ["sgd", "mfac"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_lets_go_of_its_state(name, optim, dataset, tmp_path, monkeypatch):
    """Else the file would take its space on the disk even when it has been replaced."""
    script, _ = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    torch.save(models.build("resnet20", 4).state_dict(), "trained.pth")
    flags = f"--checkpoint trained.pth --optim {optim} --momentum 0.5".split()
    flags += ["--ngrads", "5"] if name == "prun" or optim == "mfac" else []
    flags += {"optim": ["--epochs", "1"], "prun": ["--sparsities", "0.5", "--nepochs", "1"]}[name]
    place = {"optim": ["--save", "net.pth"], "prun": ["--out", "net"]}[name]
    script.main([*flags, *place, "--dataset", str(dataset)])
    mapped = []

    def look(run):
        gc.collect()
        mapped.append("net.state" in Path("/proc/self/maps").read_text())

    monkeypatch.setattr(script.Run, "go", look)
    script.main([*place, "--resume"])
    assert mapped == [False]


@pytest.fixture
def begun(dataset, tmp_path, monkeypatch):
    """A function that runs a script in which the first convolution raises an error."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(models.build("resnet20", 4).state_dict(), "trained.pth")

    def call(name, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(torch.nn.Conv2d, "forward", fail)
        flags = ["--dataset", str(dataset), "--checkpoint", "trained.pth", "--ngrads", "8"]
        SCRIPTS[name][0].main(flags)

    return call


@pytest.mark.parametrize(
    ("name", "advice"),
    [("optim", "a smaller --batchsize"), ("prun", "a smaller --blocksize or fewer")],
)
def test_a_full_gpu_is_a_sentence(name, advice, begun, capsys):
    with pytest.raises(SystemExit) as end:
        begun(name, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert f"error: the GPU's memory is full: use {advice}" in error
    assert [path.name for path in Path().rglob("*") if path.is_file()] == ["trained.pth"]


@pytest.fixture
def group():
    """A process group, of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


GLOO = "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"
LOST = [RuntimeError(GLOO), RuntimeError("NCCL communicator was aborted on rank 1.")]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("error", [*LOST, dist.DistNetworkError("reset by peer")], ids=str)
@pytest.mark.parametrize("name", SCRIPTS)
def test_another_process_that_is_gone_is_a_sentence(name, error, begun, group, capsys):
    with pytest.raises(SystemExit) as end:
        begun(name, error)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1
    assert "another process of this run has ended, see its message; continue with" in said


@pytest.mark.parametrize("distributed", ["none", "not started", "started"])
def test_an_error_of_the_program_keeps_its_traceback(distributed, begun, monkeypatch, request):
    """With a group, and without; and where torch has no processes at all."""
    if distributed == "started":
        request.getfixturevalue("group")
    elif distributed == "none":
        monkeypatch.setattr(dist, "is_available", lambda: False)
        monkeypatch.delattr(dist, "is_initialized")
    with pytest.raises(RuntimeError, match="a bug"):
        begun("optim", RuntimeError("a bug"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_bad_cases(name):
    """One that blames it; for numbers, one that is no number and one that is not allowed."""
    script, tests = SCRIPTS[name]
    texts = [f"{flags} " for flags, _ in tests.BAD_FLAGS]
    assert len(set(texts)) >= 100
    for action in script.build_parser()._actions:
        flag = action.option_strings[0]
        given = [
            m[1].split() for text in texts for m in re.finditer(rf"{flag} ((?:(?!--).)*)", text)
        ]
        assert given or flag == "-h", flag
        if action.type not in (None, Path, getattr(script, "current_name", None)):
            values = {value for values in given for value in values}
            assert "x" in values and any(map(is_number, values)), flag


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
