"""Builds the CUDA extension `hinv_cuda`. It is optional: torch operations do the same without it.

    python setup_cuda.py build_ext --inplace         beside this file
    python setup_cuda.py install                     into this environment, for clones
    MFAC_CUDA=1 pip install . --no-build-isolation   into the package `mfac`
    python -m mfac.setup_cuda build_ext --inplace    the same, once `mfac` is installed
    setup_cuda.load()                                from Python: builds on the first call

The build needs a CUDA build of torch, nvcc of the same major version as torch's CUDA, and a C++
compiler. It compiles for the architectures in TORCH_CUDA_ARCH_LIST. If that is not set, it compiles
for the GPUs that are present, and without a GPU for all of DEFAULT_ARCHITECTURES that nvcc knows.
"""

import importlib
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
NAME = "mfac.hinv_cuda" if __name__.startswith("mfac.") else "hinv_cuda"
DEFAULT_ARCHITECTURES = [80, 86, 89, 90, 100, 120]  # compute capability times 10


class CannotBuildError(RuntimeError):
    """The build is not possible. The message says what is wrong and what to do."""


def architecture_flags() -> list[str]:
    """Checks that the build has everything it needs. Returns the architectures as nvcc's flags.

    Raises:
        CannotBuildError: something is missing or does not fit; one sentence says what.
    """
    try:
        import torch
    except ImportError:
        raise CannotBuildError(
            "torch is not installed; first install a CUDA build of it, then build without isolation"
        ) from None
    if torch.version.cuda is None:
        remedy = "install a CUDA build of it, or go without the extension"
        if sys.platform == "darwin":
            remedy = "macOS and its MPS devices have no CUDA; go without the extension"
        raise CannotBuildError(f"torch {torch.__version__} is built without CUDA; {remedy}")
    nvcc = _nvcc(torch.version.cuda)
    _check_compiler(nvcc)

    known = sorted(map(int, re.findall(r"compute_(\d+)", _run(nvcc, "--list-gpu-arch").stdout)))
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native"):
        return _listed_flags(nvcc, known)
    binaries = sorted(_present(nvcc, known) or {*DEFAULT_ARCHITECTURES} & {*known})
    return [
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in binaries),
        f"-gencode=arch=compute_{binaries[-1]},code=compute_{binaries[-1]}",
    ]


def _listed_flags(nvcc: Path, known: list[int]) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST. Raises CannotBuildError if nvcc lacks one."""
    from torch.utils import cpp_extension

    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except ValueError:
        raise CannotBuildError(
            f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']!r} is not a list of "
            "architectures that torch knows; set it to a list such as '8.0;9.0+PTX', or unset it"
        ) from None
    for number in map(int, re.findall(r"compute_(\d+)", " ".join(flags))):
        if number not in known:
            raise CannotBuildError(
                f"TORCH_CUDA_ARCH_LIST has {_capability(number)}, but {nvcc} builds for "
                f"{', '.join(map(_capability, known))}; remove it from the list, or install a CUDA "
                "toolkit that has it"
            )
    return flags


def _present(nvcc: Path, known: list[int]) -> set[int]:
    """The architectures of this machine's GPUs. Raises CannotBuildError if nvcc lacks any."""
    import torch

    present = set()
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        number = 10 * major + minor
        if number not in known:
            older = [other for other in known if other < number]
            remedy = "use an older CUDA toolkit and torch"
            if older:
                newest = _capability(older[-1])
                remedy = f"install a newer toolkit, or set TORCH_CUDA_ARCH_LIST={newest}+PTX"
            raise CannotBuildError(
                f"{torch.cuda.get_device_name(i)} has compute capability {major}.{minor}, but "
                f"{nvcc} builds for {', '.join(map(_capability, known))}; {remedy}"
            )
        present.add(number)
    return present


def _capability(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _nvcc(version: str) -> Path:
    """nvcc in CUDA_HOME or CUDA_PATH, on the PATH, or in the default folder of the toolkit.

    Raises CannotBuildError if none of them builds for torch's CUDA `version`.
    """
    remedy = f"install the CUDA toolkit {version}, or set CUDA_HOME to its folder"
    variable = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
    if variable:
        nvcc = Path(os.environ[variable], "bin", "nvcc")
        missing = f"{variable} is {os.environ[variable]!r}, and there is no {nvcc}"
    else:
        nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
        missing = "there is no nvcc"
    if not nvcc.is_file():
        raise CannotBuildError(f"{missing}; {remedy}")
    said = _run(nvcc, "--version").stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise CannotBuildError(f"{nvcc} is not nvcc: --version prints {said[:80]!r}; {remedy}")
    if release[1] != version.split(".")[0]:
        raise CannotBuildError(
            f"{nvcc} is {release[0]}, but torch is built for CUDA {version}; install a toolkit of "
            "the same major version, or set CUDA_HOME to it"
        )
    return nvcc


def _check_compiler(nvcc: Path) -> None:
    """Raises CannotBuildError if there is no C++ compiler that works with nvcc."""
    compiler = os.environ.get("CXX", "c++").split(" ")[0]
    if shutil.which(compiler) is None:
        raise CannotBuildError(
            f"there is no C++ compiler {compiler!r}; install g++, or set CXX to a compiler"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise CannotBuildError("Python.h is missing; install Python's headers (python3-dev)")
    host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as torch calls nvcc
    trial = _run(nvcc, *host, "-x", "cu", "-E", os.devnull, "-o", os.devnull)
    if trial.returncode:
        reason = re.search(r"(?:error: #error -- |error: |fatal +: )([^!\n]*)", trial.stdout)
        raise CannotBuildError(
            f"{nvcc} does not work with the compiler {' '.join(host[1:]) or 'on the PATH'} "
            f"({reason[1] if reason else trial.stdout[:80]}); set CC and CXX to a compiler that "
            "this nvcc supports"
        )


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the command. Its output contains standard error. Raises CannotBuildError."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer in two minutes"
        raise CannotBuildError(
            f"{command[0]} does not run ({reason}); set CUDA_HOME to a complete CUDA toolkit"
        ) from None


def _cpp_extension() -> ModuleType:
    """torch's module for extensions, with the folder of the toolkit set.

    torch guesses that folder from the path of nvcc. The guess is wrong if nvcc is a wrapper, so ask
    nvcc itself.
    """
    import torch
    from torch.utils import cpp_extension

    nvcc = _nvcc(str(torch.version.cuda))
    top = re.search(r"TOP=(.*)", _run(nvcc, "--dryrun", "-x", "cu", os.devnull).stdout)
    if top:
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    return cpp_extension


def extension(name: str = "hinv_cuda") -> dict[str, Any]:
    """Arguments for `setuptools.setup` to build the module `name`.

    Raises:
        CannotBuildError: as `architecture_flags`.
    """
    flags = {"cxx": [], "nvcc": architecture_flags()}
    torch_build = _cpp_extension()
    module = torch_build.CUDAExtension(name, SOURCES, extra_compile_args=flags)
    return {"ext_modules": [module], "cmdclass": {"build_ext": torch_build.BuildExtension}}


def installed() -> ModuleType:
    """The module hinv_cuda, installed in the environment or beside this file.

    Raises:
        ImportError: it is not installed, does not load, or was not built from these sources.
    """
    module = importlib.import_module(NAME)
    functions = re.findall(r'module\.def\(\s*"(\w+)"', (HERE / SOURCES[0]).read_text("utf-8"))
    if missing := [name for name in functions if not hasattr(module, name)]:
        raise ImportError(f"{module} has no {missing[0]}: it is another one, or of another version")
    return module


def load() -> ModuleType:
    """The module hinv_cuda as installed. If it is not, builds it.

    The build takes a minute and stays in torch's cache of extensions. Afterwards `import hinv_cuda`
    finds the module.

    Raises:
        CannotBuildError: the build lacks something, or another hinv_cuda is installed.
    """
    try:
        return installed()
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        raise CannotBuildError(
            f"{error}; remove it, or rebuild it with python setup_cuda.py build_ext --inplace"
        ) from None
    flags = architecture_flags()
    torch_build = _cpp_extension()
    if not torch_build.is_ninja_available():
        raise CannotBuildError("ninja is not installed; pip install ninja")
    module = torch_build.load(
        "hinv_cuda", [str(HERE / source) for source in SOURCES], extra_cuda_cflags=flags
    )
    sys.modules[NAME] = module
    return module


def main() -> None:
    """The command line: setuptools' commands, for the extension only."""
    from setuptools import Distribution, setup

    class ExtensionAlone(Distribution):
        def parse_config_files(self, *_: Any, **__: Any) -> None:
            """Reads no file, because pyproject.toml describes the project, not the extension."""

    try:
        arguments = extension()
        folders = {"build_base": "build/hinv_cuda", "build_temp": "build/objects"}
        os.chdir(HERE)
        setup(name=NAME, distclass=ExtensionAlone, options={"build": folders}, **arguments)
    except RuntimeError as error:  # also from torch, after the compiler has printed its errors
        print(f"setup_cuda.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
