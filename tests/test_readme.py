"""Every command and all Python in the README work, and so does what `make demo` runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPT_CALLS = re.findall(r"^ +(?:python3|python) (main_\w+\.py .*)$", README, re.MULTILINE)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(arguments, cwd):
    """A run in `cwd` with the modules of this repository; its standard output."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def shortened(call):
    """A call of a script as an argument list: on the digits, for one epoch, into this folder."""
    words = shlex.split(call.split(" > ")[0].replace("DATASET", "digits"))
    return [str(ROOT / words[0]), *words[1:], "--epochs", "1"]


@pytest.mark.parametrize("call", SCRIPT_CALLS)
def test_script_calls(call, tmp_path):
    output = run(shortened(call), tmp_path)
    assert "test" in output
    saved = Path(re.search(r"--save (\S+)", call)[1])
    for suffix in (".pth", ".csv", ".png"):
        assert (tmp_path / saved).with_suffix(suffix).stat().st_size > 0


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_blocks(block, tmp_path):
    run(["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block}"], tmp_path)


def test_the_readme_has_what_is_tested_here():
    assert len(SCRIPT_CALLS) >= 1 and len(PYTHON_BLOCKS) >= 3


def test_what_make_demo_runs(tmp_path):
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    calls = re.findall(r"^\.venv/bin/python (main_\w+\.py .*)$", shown, re.MULTILINE)
    assert calls
    for call in calls:
        run(shortened(call), tmp_path)
    assert list((tmp_path / "runs").glob("*.png"))
