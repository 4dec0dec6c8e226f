"""Makes the package `mfac` from the flat files of a clone. pyproject.toml has everything else.

`pip install .` installs every `*.py` beside this file, and `models/`, inside one package:

    mfac.py -> mfac/__init__.py      optim.py -> mfac/optim.py      models/ -> mfac/models/

In a clone, the files import one another by their flat names. The installed copies say
`from mfac.checks import …` instead of `from checks import …`. `pip install -e .` links to the clone
as it is. MFAC_CUDA=1 also builds the CUDA extension.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODULES = {path.stem for path in ROOT.glob("*.py")} - {"setup", "mfac"} | {"models", "hinv_cuda"}
EDITABLE = "editable_wheel" in sys.argv  # pip install -e


def packaged(source: str) -> str:
    """The text of a flat file whose imports, also in docstrings, are from the package."""
    start, names = r"(?m)^( *(?:>>> )?)", "|".join(MODULES)
    source = re.sub(rf"{start}from ({names})\b(\S* import )", r"\1from mfac.\2\3", source)
    return re.sub(rf"{start}import ({names})\b", r"\1import mfac.\2 as \2", source)


class BuildPackage(build_py):
    """Puts the flat files into the package."""

    def run(self):
        package = Path(self.build_lib, "mfac")
        shutil.rmtree(package, ignore_errors=True)  # an earlier build may have had other files
        super().run()
        if not EDITABLE:
            (package / "py.typed").touch()

    def find_package_modules(self, package, package_dir):
        found = {name: file for _, name, file in super().find_package_modules(package, package_dir)}
        found.pop("setup", None)
        if "mfac" in found:
            found["__init__"] = found.pop("mfac")
        return [(package, name, file) for name, file in found.items()]

    def build_module(self, module, module_file, package):
        path, copied = super().build_module(module, module_file, package)
        Path(path).write_text(packaged(Path(path).read_text("utf-8")), "utf-8")
        return path, copied


if EDITABLE:
    layout = {"package_dir": {"": "."}, "py_modules": ["mfac"], "packages": []}
else:
    layout = {
        "package_dir": {"mfac": ".", "mfac.models": "models"},
        "packages": ["mfac", "mfac.models"],
        "package_data": {"mfac": ["*.cpp", "*.cu", "checkpoints/*"]},
    }
extension = {}
if os.environ.get("MFAC_CUDA") == "1":
    sys.path.insert(0, str(ROOT))
    import setup_cuda

    try:
        extension = setup_cuda.extension("hinv_cuda" if EDITABLE else "mfac.hinv_cuda")
    except setup_cuda.CannotBuildError as error:
        sys.exit(f"MFAC_CUDA=1, but {error}")
commands = {"build_py": BuildPackage, **extension.pop("cmdclass", {})}
# The package has its own build folder, so that it contains nothing from setup_cuda.py. Both share
# the object files, so that sources are compiled once.
folders = {"build": {"build_base": "build/mfac", "build_temp": "build/objects"}}
setup(cmdclass=commands, options=folders, **layout, **extension)
