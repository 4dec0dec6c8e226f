"""What the docstrings show runs, every public name shows something, and `make docs` renders it."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checks
import coefficients
import control
import costs
import fallback
import flat
import kernels
import mfac
import muon
import optim
import precision
import prun
import ranks
import recovery
import states
import windows

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = (optim, prun)
INSIDE = (checks, coefficients, control, costs, fallback, flat, kernels, muon, precision, ranks)
MODULES = (*PUBLIC, *INSIDE, recovery, states, windows)


def public_names(module) -> list[str]:
    """Those of `__all__`, or what the module itself defines without an underscore."""
    own = [name for name, value in vars(module).items() if inspect.getmodule(value) is module]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


@pytest.mark.parametrize("module", [mfac, *MODULES], ids=lambda module: module.__name__)
def test_examples(module):
    with torch.random.fork_rng():
        failed, attempted = doctest.testmod(module)
    assert failed == 0 and (attempted > 0 or module not in PUBLIC)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in PUBLIC for name in public_names(module)]
)
def test_every_public_name_has_an_example(module, name):
    assert ">>> " in inspect.getdoc(getattr(module, name))


def test_make_docs(tmp_path):
    pytest.importorskip("pdoc")
    shown = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True).stdout
    (call,) = [line for line in shown.splitlines() if " pdoc " in line]
    words = call.split()[1:]
    words[words.index("-o") + 1] = str(tmp_path)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, timeout=300)
    for module in MODULES:
        page = (tmp_path / f"{module.__name__}.html").read_text()
        for name in public_names(module):
            assert f'id="{name}"' in page
