"""Every command and all Python in the README and in docs/ work, and what `make demo` runs does.

The scripts run in this process and on a small model, which comes under the name of the one asked
for: what they do with that one, and in several processes, is tested elsewhere.
"""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import main_optim
import main_prun
import models

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
SCRIPT_CALLS = re.findall(r"^ +(?:python3|python) (main_\w+\.py .*)$", TEXT, re.MULTILINE)
TORCHRUN_CALLS = re.findall(
    r"^ +torchrun --nproc-per-node 4 (main_\w+\.py .*)$", TEXT, re.MULTILINE
)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(arguments, cwd):
    """A run in `cwd` with the modules of this repository; its standard output."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def small(num_classes):
    """One layer: untrained ones in a row may lose their gradients where 90 % of them go."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, num_classes))


@pytest.fixture
def call(tmp_path_factory, monkeypatch, dataset, capsys, blank_pictures):
    """call(command): runs a script, for one epoch or with a few gradients; its standard output.

    All run in one folder, as some use files of others.
    """
    folder = tmp_path_factory.getbasetemp() / "readme"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(models.MODELS, "resnet20", small)
    torch.save(small(4).state_dict(), "net.pth")

    def run_script(command):
        name, *flags = shlex.split(command.split(" > ")[0].replace("DATASET", str(dataset)))
        if name == "main_optim.py":
            flags += ["--epochs", "1"]
            # The default for the digits, adamw, would leave nothing of this model to M-FAC.
            flags += ["--fallback", "none"] if "mfac" in flags else []
        else:
            flags += ["--ngrads", "8"] if "mfac" in flags else []
            # The one that comes along has 10 classes.
            flags += [] if "--checkpoint" in flags else ["--checkpoint", "net.pth"]
        flags += ["--overwrite"]
        {"main_optim.py": main_optim, "main_prun.py": main_prun}[name].main(flags)
        return capsys.readouterr().out

    return run_script


@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize("command", SCRIPT_CALLS + TORCHRUN_CALLS)
def test_script_calls(command, call, dataset):
    assert "test" in call(command)
    named = re.search(r"--(?:save|out) (\S+)", command)
    stem = f"runs/resnet20-{dataset.name}-" + ("mfac" if "optim" in command else "pruned-mfac")
    stem = named[1].removesuffix(".pth") if named else stem
    for ending in (".pth" if "main_optim" in command else "-step0.pth", ".csv", ".png"):
        assert Path(stem + ending).stat().st_size > 0


def test_python_blocks(tmp_path):
    """One process runs all, each with variables of its own."""

    def runs_here(block):
        packages = re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)
        gpu = torch.cuda.is_available() or not block.startswith("# On a GPU")
        return gpu and all(map(find_spec, packages))

    files = [tmp_path / f"block{i}.py" for i in range(len(PYTHON_BLOCKS))]
    for file, block in zip(files, PYTHON_BLOCKS, strict=True):
        file.write_text(block)
    here = [f.name for f, block in zip(files, PYTHON_BLOCKS, strict=True) if runs_here(block)]
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})"
    run(["-c", f"{code}; [runpy.run_path(name) for name in {here}]"], tmp_path)


def test_the_pages_have_what_is_tested_here():
    assert len(SCRIPT_CALLS) >= 15 and len(TORCHRUN_CALLS) == 2 and len(PYTHON_BLOCKS) >= 6
    assert len(PAGES[0].read_text().splitlines()) <= 220


def test_links_and_names_of_files_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
        for name in re.findall(r"`((?:tests|examples|benchmarks)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_map_names_every_module():
    text = PAGES[0].read_text().partition("## Map")[2]
    for module in ROOT.glob("*.py"):
        assert module.name in text or module.stem == "setup", module.name


def test_the_pictures_are_there():
    pictures = [
        page.parent / picture
        for page in PAGES
        for picture in re.findall(r"^!\[.+\]\((\S+)\)$", page.read_text(), re.MULTILINE)
    ]
    assert len(pictures) >= 3 and all(picture.is_file() for picture in pictures)


def test_the_tables_of_costs_are_those_of_the_formulas(tmp_path):
    for line in run([str(ROOT / "benchmarks" / "scaling.py"), "--table"], tmp_path).splitlines():
        assert line in TEXT


def test_what_make_demo_runs(call):
    command = ["make", "-n", "--no-print-directory", "demo"]  # as `make test` may run this
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    commands = re.findall(r"^\.venv/bin/python (main_\w+\.py .*)$", shown, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        call(command)
    last = shown.splitlines()[-1]
    pictures, pages = re.findall(r"runs/\S+\.png", last), re.findall(r"examples/\w+\.ipynb", last)
    assert last.startswith("echo ") and len(pictures) == 2 and len(pages) == 1
    assert all(Path(picture).stat().st_size > 0 for picture in pictures)
    assert all((ROOT / page).is_file() for page in pages)
