"""What `pip install` gives: one name, `mfac`, made of the flat files, beside a user's own files."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import mfac
import optim
import prun
import rows

ROOT = Path(__file__).resolve().parent.parent
FLAT = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("setup", "mfac"))
pytestmark = pytest.mark.xdist_group("install")  # builds once
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]
# Makes a step and prunes, then saves what `torch.load(weights_only=True)` is to load elsewhere.
PROGRAM = """
import sys, torch
from mfac import MFAC, DynamicInverseFisher, MFACPruner
import mfac

torch.manual_seed(0)
model = torch.nn.Linear(6, 3)
batch = torch.randn(8, 6), torch.randint(3, (8,))
optimizer = MFAC(model.parameters(), lr=0.1, ngrads=4)
torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
optimizer.step()
pruner = MFACPruner(model, [batch] * 4, ngrads=4)
pruner.prune(0.5)
torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], sys.argv[1])
print(mfac.__file__)
"""


def run(python, *arguments, cwd, **environment):
    """What a process prints; fails with what it says if it fails."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in (python, *arguments)],
        cwd=cwd,
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder):
    """The python of a new environment, which has the packages of this one."""
    venv.create(folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", code, cwd=folder).strip())
    (packages / "those-of-the-tests.pth").write_text(sysconfig.get_path("purelib"))
    return python, packages


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of this repository that a build may read."""
    kept = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "*.so", "benchmarks")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("fresh") / "clone", ignore=kept)


@pytest.fixture(scope="module")
def archives(clone):
    """The source archive, the wheel from the clone, and the wheel from the archive."""
    code = "import setuptools.build_meta as build; print(build.build_sdist('dist'))"
    source = clone / "dist" / run(sys.executable, "-c", code, cwd=clone).splitlines()[-1]
    wheels = []
    for origin, folder in ((".", "from-clone"), (source, "from-source")):
        run(sys.executable, "-m", "pip", "wheel", origin, *OFFLINE, "-w", folder, cwd=clone)
        wheels += (clone / folder).glob("*.whl")
    return source, *wheels


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The python of a fresh environment in which the wheel is installed, and its packages."""
    python, packages = environment(tmp_path_factory.mktemp("fresh") / "environment")
    run(python, "-m", "pip", "install", *OFFLINE, archives[1], cwd=packages)
    return python, packages


@pytest.fixture
def project(tmp_path):
    """A user's project: files of all names that the clone has, and models/ without __init__.py."""
    for name in FLAT:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.py").write_text("MINE = True\n")
    mine = "".join(f"import {name}\nassert {name}.MINE\n" for name in [*FLAT, "models.net"])
    every = "".join(f"import mfac.{name}\n" for name in [*FLAT, "models"])
    (tmp_path / "before.py").write_text(mine + PROGRAM)
    (tmp_path / "after.py").write_text(every + mine + "print(mfac.__file__)")
    return tmp_path


def test_the_archives_hold_the_same(archives):
    source, *wheels = archives
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert names[0] == names[1]
    files = {name.removeprefix("mfac/") for name in names[0] if "dist-info" not in name}
    assert files >= {"__init__.py", "py.typed", *(f"{name}.py" for name in FLAT)}
    assert files >= {"hinv_cuda.cpp", "hinv_cuda_kernel.cu", "checkpoints/resnet20_cifar10.pth"}
    assert files >= {f"models/{path.name}" for path in (ROOT / "models").glob("*.py")}
    assert not files & {"setup.py", "mfac.py"}
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed >= {"setup.py", "setup_cuda.py", "mfac.py", "LICENSE", "README.md"}


def test_one_name_is_installed(installed):
    _, packages = installed
    own = {path.name for path in packages.iterdir()} - {"those-of-the-tests.pth"}
    assert own == {"mfac", f"mfac-{mfac.__version__}.dist-info"}
    assert next(packages.glob("*/top_level.txt")).read_text().split() == ["mfac"]


def test_no_installed_file_imports_a_flat_name(installed):
    flat = {*FLAT, "models", "hinv_cuda"}
    for path in (installed[1] / "mfac").rglob("*.py"):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                names += [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
            assert not flat & {name.split(".")[0] for name in names}, path
        shown = re.findall(r"^ *(?:>>>|\.\.\.) (?:from|import) (\w+)", text, re.MULTILINE)
        assert not flat & {*shown}, path


def test_beside_files_of_the_same_names(installed, project):
    """Imported before and after `mfac`; and what it saves loads without it."""
    python, packages = installed
    for script in ("before.py", "after.py"):
        file = run(python, script, "saved.pth", cwd=project).strip()
        assert Path(file) == packages / "mfac" / "__init__.py"
    weights, state, pruner_state = torch.load(project / "saved.pth", weights_only=True)
    model = torch.nn.Linear(6, 3)
    model.load_state_dict(weights)
    optim.MFAC(model.parameters(), lr=0.1, ngrads=4).load_state_dict(state)
    prun.MFACPruner(model, [], ngrads=4).load_state_dict(pruner_state)


def test_the_scripts_run_as_modules(installed, project):
    """As `python -m` does, both in one process."""
    code = """
import contextlib, runpy, sys
for name in ("main_optim", "main_prun"):
    sys.argv = [name, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(f"mfac.{name}", run_name="__main__")
"""
    assert run(installed[0], "-c", code, cwd=project).count("usage: ") == 2


def test_in_a_clone(clone, tmp_path):
    (tmp_path / "program.py").write_text(
        PROGRAM + "import optim, prun\n"
        "assert optim.MFAC is MFAC and prun.MFACPruner is MFACPruner\n"
    )
    file = run(sys.executable, "program.py", "saved", cwd=tmp_path, PYTHONPATH=str(clone)).strip()
    assert Path(file) == clone / "mfac.py"


def test_an_editable_install_is_the_clone(clone, tmp_path):
    python, _ = environment(tmp_path / "environment")
    run(python, "-m", "pip", "install", *OFFLINE, "-e", clone, cwd=tmp_path)
    code = "import mfac, optim; print(optim.MFAC is mfac.MFAC and mfac.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).strip()) == clone / "mfac.py"


def test_versions_agree():
    in_project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert mfac.__version__ == in_project[1] == latest[1]


def test_mfac_has_what_its_modules_show():
    shown = {name for module in (optim, prun) for name in module.__all__}
    assert {*mfac.__all__} == shown | {"models", "mfac_groups", *rows.__all__}


def test_no_module_is_forgotten():
    """In what coverage measures, which pyproject.toml lists by name."""
    listed = re.search(
        r"^source_pkgs = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert {*re.findall(r'"(\w+)"', listed[1])} == {"mfac", *FLAT} - {"setup_cuda", "datautils"}
