"""Every command and all Python in the README work, and so does what `make demo` runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPT_CALLS = re.findall(r"^ +(?:python3|python) (main_\w+\.py .*)$", README, re.MULTILINE)
TORCHRUN_CALLS = re.findall(
    r"^ +torchrun --nproc-per-node 4 (main_\w+\.py .*)$", README, re.MULTILINE
)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(arguments, cwd):
    """A run in `cwd` with the modules of this repository; its standard output."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def shortened(call, dataset):
    """A call of a script as an argument list: a few gradients of small images, one epoch."""
    words = shlex.split(call.split(" > ")[0].replace("DATASET", str(dataset)))
    fewer = ["--epochs", "1"] if "main_optim" in words[0] else []
    if "main_prun" in words[0] and "mfac" in words:
        fewer = ["--ngrads", "8"]
    return [str(ROOT / words[0]), *words[1:], *fewer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the calls of the README run one after the other, as some use files of others."""
    folder = tmp_path_factory.mktemp("readme")
    torch.save(models.build("resnet20", 4).state_dict(), folder / "net.pth")
    return folder


@pytest.mark.parametrize("call", SCRIPT_CALLS)
def test_script_calls(call, folder, dataset):
    arguments = shortened(call, dataset)
    if "main_prun" in call and "--checkpoint" not in call:
        arguments += ["--checkpoint", "net.pth"]  # the one that comes along has 10 classes
    assert "test" in run(arguments, folder)
    named = re.search(r"--(?:save|out) (\S+)", call)
    stem = named[1].removesuffix(".pth") if named else f"runs/resnet20-{dataset.name}-pruned-mfac"
    for ending in (".pth" if "main_optim" in call else "-step0.pth", ".csv", ".png"):
        assert (folder / (stem + ending)).stat().st_size > 0


@pytest.mark.parametrize("call", TORCHRUN_CALLS)
def test_calls_of_several_processes(call, folder, dataset):
    name = call.split(".")[0]
    arguments = shortened(call, dataset)
    if "main_prun" in call:
        arguments += ["--checkpoint", "net.pth", "--sparsities", "0.5", "--out", name]
    else:
        arguments += ["--save", f"{name}.pth"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert run([*several, *arguments], folder).count("# ") == 1, "the first process alone prints"
    assert (folder / f"{name}.csv").exists()


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_blocks(block, tmp_path):
    run(["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block}"], tmp_path)


def test_the_readme_has_what_is_tested_here():
    assert len(SCRIPT_CALLS) >= 1 and len(TORCHRUN_CALLS) == 2 and len(PYTHON_BLOCKS) >= 3


def test_the_pictures_are_there():
    pictures = re.findall(r"^!\[.+\]\((\S+)\)$", README, re.MULTILINE)
    assert len(pictures) >= 3 and all((ROOT / picture).is_file() for picture in pictures)


def test_the_tables_of_costs_are_those_of_the_formulas(tmp_path):
    for line in run([str(ROOT / "benchmarks" / "scaling.py"), "--table"], tmp_path).splitlines():
        assert line in README


def test_what_make_demo_runs(tmp_path):
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    calls = re.findall(r"^\.venv/bin/python (main_\w+\.py .*)$", shown, re.MULTILINE)
    assert len(calls) == 3
    for call in calls:
        run(shortened(call, "digits"), tmp_path)
    for name in ("demo", "demo-magnitude", "demo-mfac"):
        assert (tmp_path / "runs" / f"{name}.png").stat().st_size > 0
