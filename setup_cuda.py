"""Builds the CUDA extension `hinv_cuda`. It is optional: without it torch operations do the same.

    python setup_cuda.py install                     into this environment
    python setup_cuda.py build_ext --inplace         beside this file
    MFAC_CUDA=1 pip install . --no-build-isolation   together with the rest of the project
    setup_cuda.load()                                from Python: builds on the first call

Needs a CUDA build of torch, nvcc of the same major version as torch's CUDA, and a C++ compiler.
Builds for the GPUs that are present, for those in TORCH_CUDA_ARCH_LIST where that is set, and where
neither says anything for every generation in DEFAULT_ARCHITECTURES that nvcc knows.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = ["hinv_cuda.cpp", "hinv_cuda_kernel.cu"]
DEFAULT_ARCHITECTURES = [80, 86, 89, 90, 100, 120]  # compute capability times 10


class CannotBuildError(RuntimeError):
    """Something that the build needs is missing; the message says what, and what to do."""


def architecture_flags() -> list[str]:
    """Checks that everything the build needs is there; returns the architectures, as nvcc's flags.

    Raises:
        CannotBuildError: what is missing, in one sentence.
    """
    try:
        import torch
    except ImportError:
        raise CannotBuildError("torch is not installed; install a CUDA build of it first") from None
    if torch.version.cuda is None:
        raise CannotBuildError(
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"
        )
    version = torch.version.cuda
    nvcc = _nvcc()
    if nvcc is None:
        raise CannotBuildError(
            f"there is no nvcc; install the CUDA toolkit {version}, or set CUDA_HOME to where it is"
        )
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if release is None or release[1] != version.split(".")[0]:
        found = release[0] if release else "of unknown version"
        raise CannotBuildError(
            f"{nvcc} is {found}, but torch is built for CUDA {version}; install a toolkit of the "
            "same major version, or set CUDA_HOME to it"
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise CannotBuildError(
            f"there is no C++ compiler {compiler!r}; install g++, or set CXX to a compiler"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise CannotBuildError("Python.h is missing; install Python's headers (python3-dev)")

    known = [int(n) for n in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if 10 * major + minor < min(known):
            raise CannotBuildError(
                f"{torch.cuda.get_device_name(i)} has compute capability {major}.{minor}, below "
                f"{min(known) / 10}, the least that CUDA {version} builds for; use an older CUDA"
            )
    if torch.cuda.device_count() > 0 or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # torch sees to the architectures
    binaries = [number for number in DEFAULT_ARCHITECTURES if number in known]
    newest = max(binaries)
    return [
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in binaries),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


def _nvcc() -> Path | None:
    """nvcc in CUDA_HOME, on the PATH, or where the toolkit's installer puts it."""
    home = os.environ.get("CUDA_HOME")
    found = None if home else shutil.which("nvcc")
    nvcc = Path(found or Path(home or "/usr/local/cuda", "bin", "nvcc"))
    return nvcc if nvcc.exists() else None


def _cpp_extension() -> ModuleType:
    """torch's module for extensions, told where the toolkit lies.

    It guesses from the place of nvcc, which is wrong where that is a wrapper; nvcc itself knows.
    """
    from torch.utils import cpp_extension

    top = re.search(r"TOP=(.*)", _output(_nvcc(), "--dryrun", "-x", "cu", "/dev/null"))
    if top:
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    return cpp_extension


def _output(*command: str | Path) -> str:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.stdout


def extension() -> dict[str, Any]:
    """Arguments with which `setuptools.setup` builds hinv_cuda. Raises as `architecture_flags`."""
    flags = {"cxx": [], "nvcc": architecture_flags()}
    torch_build = _cpp_extension()
    module = torch_build.CUDAExtension("hinv_cuda", SOURCES, extra_compile_args=flags)
    return {"ext_modules": [module], "cmdclass": {"build_ext": torch_build.BuildExtension}}


def load() -> ModuleType:
    """hinv_cuda as installed, else built now (a minute, then kept in torch's cache of extensions).

    `import hinv_cuda` finds the module afterwards.

    Raises:
        CannotBuildError: something that the build needs is missing.
    """
    try:
        import hinv_cuda
    except ModuleNotFoundError:
        flags = architecture_flags()
        torch_build = _cpp_extension()
        if not torch_build.is_ninja_available():
            raise CannotBuildError("ninja is not installed; pip install ninja") from None
        hinv_cuda = torch_build.load(
            "hinv_cuda",
            [str(HERE / source) for source in SOURCES],
            extra_cuda_cflags=flags,
        )
        sys.modules["hinv_cuda"] = hinv_cuda
    return hinv_cuda


def main() -> None:
    """The command line: the commands of setuptools, for the extension alone."""
    try:
        arguments = extension()
    except CannotBuildError as error:
        print(f"setup_cuda.py: {error}", file=sys.stderr)
        sys.exit(2)
    from setuptools import Distribution, setup

    class ExtensionAlone(Distribution):
        def parse_config_files(self, *_: Any, **__: Any) -> None:
            """Reads none: pyproject.toml describes the project, not this extension."""

    os.chdir(HERE)
    setup(name="hinv_cuda", version="0.1.0", distclass=ExtensionAlone, **arguments)


if __name__ == "__main__":
    main()
