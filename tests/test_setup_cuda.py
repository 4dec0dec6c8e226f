"""The build of the extension: what it builds for, and what it says where it cannot build.

The toolkit is a script that answers as nvcc does; with a real nvcc the extension is built, too.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import setup_cuda
from setup_cuda import CannotBuildError, architecture_flags

ROOT = Path(__file__).resolve().parent.parent
VERSION = torch.version.cuda or "13.0"
REFUSAL = (
    "host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 "
    "are not supported! The nvcc flag '-allow-unsupported-compiler' can be used to override this"
)


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def nvcc(architectures, release=VERSION, preprocess=""):
    """The script of an nvcc."""
    listed = "; ".join(f"echo compute_{number}" for number in architectures)
    return f"""case "$*" in
        *--version*) echo Cuda compilation tools, release {release}, V{release}.1;;
        *--list-gpu-arch*) {listed};;
        *-E*) {preprocess or ":"};;
    esac"""


class Machine:
    """A CUDA build of torch, a compiler, and a toolkit for 7.5, 8.0, 9.0 and 10.0; no GPU."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        for name in ("CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CC"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CUDA_HOME", str(folder))
        monkeypatch.setenv("CXX", str(executable(folder / "g++", "")))
        monkeypatch.setattr(torch.version, "cuda", VERSION)
        self.toolkit(nvcc([75, 80, 90, 100]))
        self.gpus()

    def toolkit(self, script):
        executable(self.folder / "bin" / "nvcc", script)

    def gpus(self, *capabilities):
        functions = {
            "device_count": lambda: len(capabilities),
            "get_device_name": lambda i: f"GPU {i}",
            "get_device_capability": lambda i: capabilities[i],
        }
        for name, function in functions.items():
            self.monkeypatch.setattr(torch.cuda, name, function)

    def set(self, **environment):
        for name, value in environment.items():
            self.monkeypatch.setenv(name, value.replace("FOLDER", str(self.folder)))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def flags(*binaries):
    newest = max(binaries)
    return [
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in binaries),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


def test_architectures(machine):
    assert architecture_flags() == flags(80, 90, 100)  # DEFAULT_ARCHITECTURES that nvcc knows
    machine.gpus((9, 0), (7, 5), (9, 0))
    assert architecture_flags() == flags(75, 90)
    for asked in ("8.0;10.0+PTX", "8.0 10.0+PTX"):
        machine.set(TORCH_CUDA_ARCH_LIST=asked)
        assert set(architecture_flags()) == set(flags(80, 100))


def test_the_toolkit_is_where_torch_looks_for_it(machine):
    machine.monkeypatch.delenv("CUDA_HOME")
    machine.set(CUDA_PATH="FOLDER", PATH="/nowhere")
    assert architecture_flags() == flags(80, 90, 100)
    machine.monkeypatch.delenv("CUDA_PATH")
    machine.set(PATH="FOLDER/bin")
    assert architecture_flags() == flags(80, 90, 100)


NOT_HERE = {
    "newer GPU": (
        lambda m: m.gpus((9, 0), (12, 0)),
        r"GPU 1 has compute capability 12\.0, but .*nvcc builds for 7\.5, 8\.0, 9\.0, 10\.0; "
        r"install a newer toolkit, or set TORCH_CUDA_ARCH_LIST=10\.0\+PTX",
    ),
    "GPU in between": (
        lambda m: m.gpus((8, 6)),
        r"8\.6, but .* set TORCH_CUDA_ARCH_LIST=8\.0\+PTX",
    ),
    "older GPU": (lambda m: m.gpus((6, 1)), r"GPU 0 has .* 6\.1, but .* use an older CUDA"),
    "listed, too old": (
        lambda m: m.set(TORCH_CUDA_ARCH_LIST="9.0;7.0"),
        r"TORCH_CUDA_ARCH_LIST has 7\.0, but .* builds for 7\.5, 8\.0, 9\.0, 10\.0; remove it from",
    ),
    "listed, too new": (lambda m: m.set(TORCH_CUDA_ARCH_LIST="12.0+PTX"), r"has 12\.0, but"),
    "listed, not by torch": (lambda m: m.set(TORCH_CUDA_ARCH_LIST="10.1"), "='10.1' is not a list"),
    "listed, nonsense": (
        lambda m: m.set(TORCH_CUDA_ARCH_LIST="sm_90,my card"),
        r"TORCH_CUDA_ARCH_LIST='sm_90,my card' is not a list of .*; set it to .* '8\.0;9\.0\+PTX'",
    ),
    "no compiler": (lambda m: m.set(CXX="no-g++ -O2"), r"there is no C\+\+ compiler 'no-g\+\+'"),
    "empty compiler": (lambda m: m.set(CXX=""), r"there is no C\+\+ compiler ''"),
    "refused compiler": (
        lambda m: m.toolkit(nvcc([90], preprocess=f'echo "{REFUSAL}"; exit 1')),
        r"the compiler on the PATH \(unsupported GNU version\); set CC and CXX to a",
    ),
    "refused CC": (
        lambda m: (
            m.set(CC="gcc-99"),
            m.toolkit(nvcc([90], preprocess='echo "nvcc fatal   : No $*"; exit 1')),
        ),
        r"the compiler gcc-99 \(No -ccbin gcc-99 .*\); set CC",
    ),
    "no headers": (
        lambda m: m.monkeypatch.setattr(setup_cuda.sysconfig, "get_path", lambda _: "/nowhere"),
        "Python.h is missing; install",
    ),
    "another release": (
        lambda m: m.toolkit(nvcc([30], release="7.5")),
        f"release 7.5, but torch is built for CUDA {VERSION}; install a toolkit",
    ),
    "not executable": (
        lambda m: (m.folder / "bin" / "nvcc").chmod(0o644),
        r"nvcc does not run \(Permission denied\); set CUDA_HOME",
    ),
    "another format": (
        lambda m: (m.folder / "bin" / "nvcc").write_bytes(b"\x7fELF\xff"),
        r"nvcc does not run \(Exec format error\)",
    ),
    "not nvcc": (lambda m: m.toolkit("echo hello"), r"nvcc is not nvcc: --version prints 'hello"),
    "a folder": (
        lambda m: ((m.folder / "bin/nvcc").unlink(), (m.folder / "bin/nvcc").mkdir()),
        "and there is no .*nvcc; install the CUDA toolkit",
    ),
    "a list of homes": (
        lambda m: m.set(CUDA_HOME="FOLDER:FOLDER/other"),
        "CUDA_HOME is '[^']*:[^']*/other', and there is no .*; install the CUDA toolkit",
    ),
    "no such home": (lambda m: m.set(CUDA_HOME="/nowhere"), "CUDA_HOME is '/nowhere', and there"),
    "no such path": (
        lambda m: m.set(CUDA_HOME="", CUDA_PATH="/nowhere"),
        "CUDA_PATH is '/nowhere', and there is no /nowhere/bin/nvcc; install the CUDA toolkit",
    ),
    "torch for the CPU": (
        lambda m: m.monkeypatch.setattr(torch.version, "cuda", None),
        "torch .* is built without CUDA; install a CUDA build of it, or go without",
    ),
    "a Mac": (
        lambda m: (
            m.monkeypatch.setattr(torch.version, "cuda", None),
            m.monkeypatch.setattr(sys, "platform", "darwin"),
        ),
        "built without CUDA; macOS and its MPS devices have no CUDA; go without",
    ),
    "no torch": (
        lambda m: m.monkeypatch.setitem(sys.modules, "torch", None),
        "torch is not installed; first install",
    ),
}


@pytest.mark.parametrize("case", NOT_HERE)
def test_what_does_not_fit_is_said_in_a_sentence(case, machine):
    change, message = NOT_HERE[case]
    change(machine)
    if case == "not executable" and os.access(machine.folder / "bin" / "nvcc", os.X_OK):
        pytest.skip("files are executable for this user whatever their mode is")
    with pytest.raises(CannotBuildError, match=message) as caught:
        architecture_flags()
    assert "\n" not in str(caught.value)


def test_the_script_ends_with_that_sentence_and_status_2(tmp_path):
    (tmp_path / "torch.py").write_text("class version: cuda = None\n__version__ = '2.9'")
    done = subprocess.run(
        [sys.executable, "setup_cuda.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"setup_cuda\.py: torch 2\.9 is built without CUDA; .*\n", done.stderr)


def test_what_torch_refuses_ends_in_a_sentence_too(monkeypatch, capsys):
    def refuse(**_):
        raise RuntimeError("The current installed version of g++ (99.0) is greater than\nothers")

    monkeypatch.setattr(setup_cuda, "extension", dict)
    monkeypatch.setattr("setuptools.setup", refuse)
    monkeypatch.setattr(os, "chdir", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        setup_cuda.main()
    assert ended.value.code == 2
    message = "setup_cuda.py: The current installed version of g++ (99.0) is greater than\n"
    assert capsys.readouterr().err == message


FOREIGN = {
    "another module": ("", "has no hinv_setup: it is another one, or of another version"),
    "another build": ("raise ImportError('undefined symbol: at')", "undefined symbol: at"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_module_of_the_same_name_from_elsewhere(case, tmp_path, monkeypatch):
    source, message = FOREIGN[case]
    (tmp_path / "hinv_cuda.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hinv_cuda", raising=False)
    with pytest.raises(ImportError, match=message):
        setup_cuda.installed()
    with pytest.raises(CannotBuildError, match=f"{message}; remove it, or rebuild"):
        setup_cuda.load()
    sys.modules.pop("hinv_cuda", None)


def test_ninja_missing(machine, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setitem(sys.modules, "hinv_cuda", None)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    with pytest.raises(CannotBuildError, match="ninja is not installed; pip install ninja"):
        setup_cuda.load()


# --- with a real nvcc -----------------------------------------------------------------------------

with_nvcc = pytest.mark.xdist_group("nvcc")  # which compiles the sources once
# What `import hinv_cuda` gives without a GPU: checks of arguments, and shapes for torch.compile.
IMPORT = """
import torch, hinv_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

def message(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)

matrix, vector = torch.eye(3), torch.ones(3)
expected = "tmp is on cpu; hinv_cuda works on CUDA tensors"
assert expected in message(hinv_cuda.hinv_setup, matrix, matrix)
assert expected in message(torch.ops.hinv_cuda.hinv_setup, matrix, matrix)
assert "D is on cpu" in message(hinv_cuda.hinv_mul, 3, matrix, vector)
double, count = matrix.double(), torch.tensor(0)
arguments = double, double, vector, count, count.double(), 1e-5, vector, vector, count
assert "P is on cpu" in message(hinv_cuda.hinv_update, *arguments)
assert "P has shape (3,)" in message(hinv_cuda.hinv_update, vector, *arguments[1:])
assert "G is on cpu" in message(hinv_cuda.hinv_times, matrix, vector, count)
columns = matrix.int()
assert "G is Int; it must be float32" in message(hinv_cuda.hinv_times, columns, vector, count)
row = count, columns[0], vector
assert "values is on cpu" in message(hinv_cuda.hinv_sparse_times, columns, matrix, matrix, *row)
assert "g has shape (3,) on cpu" in message(hinv_cuda.hinv_round, vector, matrix.half())
assert "error is on cpu" in message(hinv_cuda.hinv_largest, vector, vector, matrix, 4)
expected = "values is Half; it must be float32, bfloat16 or float64"
assert expected in message(hinv_cuda.hinv_largest, vector, vector, matrix.half(), 4)
for name in ("setup", "mul", "update", "times", "transposed_times", "round", "largest",
             "sparse_times", "sparse_replace"):
    assert "hinv_" + name in hinv_cuda.__doc__

def halve_and_multiply(D, t):
    t = t / 2
    torch.ops.hinv_cuda.hinv_mul(3, D, t)
    return t + 1

with FakeTensorMode():
    D, t = torch.empty(3, 3, device="cuda"), torch.empty(3, device="cuda")
    compiled = torch.compile(halve_and_multiply, fullgraph=True, backend="aot_eager")
    assert compiled(D, t).device.type == "cuda"
    G, count = torch.empty(3, 8, device="cuda").double(), torch.empty((), device="cuda").long()
    assert torch.ops.hinv_cuda.hinv_times(G, G[0], count).shape == (3,)
    assert torch.ops.hinv_cuda.hinv_transposed_times(G, t).dtype == torch.float64
    new = G[0].int(), G[0]
    assert torch.ops.hinv_cuda.hinv_sparse_times(G.int(), G, G[:2], count, *new).shape == (2, 3)
    replaced = *new, G[0], G[0], count.double(), count, count
    u = torch.ops.hinv_cuda.hinv_sparse_replace(G.int(), G, t, G[0], *replaced)
    assert u.shape == (8,)
    found = torch.ops.hinv_cuda.hinv_round(G[0].float(), G.half())
    assert [tuple(x.shape) for x in found] == [(8,), (1,), (8,)]
    found = torch.ops.hinv_cuda.hinv_largest(G[0], G[0], G[:, :2].contiguous(), 2)
    assert [tuple(x.shape) for x in found] == [(2,), (2,), (8,), (2, 8)]
print("all is well")
"""


def build(project, *arguments, **environment):
    """Exit status and output of a process that builds for one architecture."""
    quickly = {"TORCH_CUDA_ARCH_LIST": "9.0", "CFLAGS": "-O0", "CXXFLAGS": "-O0", "MFAC_CUDA": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**os.environ, **quickly, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, where an nvcc of torch's CUDA version is at hand."""
    if not shutil.which("nvcc") or torch.version.cuda is None:
        pytest.skip("needs nvcc and a CUDA build of torch")
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    if f"release {VERSION.split('.')[0]}." not in said:
        pytest.skip(f"needs the nvcc of torch's CUDA version, {VERSION}")
    kept = shutil.ignore_patterns(".*", "runs", "build", "docs", "*.so", "tests", "benchmarks")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "project", ignore=kept)


@pytest.fixture(scope="module")
def built(project):
    """What setup_cuda.py and nvcc printed while they built the extension in `project`."""
    strictly = "-Werror all-warnings -Xptxas -v,-warn-spills,-warn-lmem-usage"
    arguments = "setup_cuda.py", "build_ext", "--inplace"
    status, said = build(project, *arguments, NVCC_APPEND_FLAGS=strictly)
    assert status == 0, said
    return said


@with_nvcc
def test_nvcc_compiles_without_warnings_and_spills(built):
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", built)
    assert len(spills) == built.count("Compiling entry function") > 0
    assert set(spills) == {("0", "0")}


@with_nvcc
def test_the_extension_is_importable_without_a_gpu(project, built):
    status, said = build(project, "-c", IMPORT)
    assert status == 0 and "all is well" in said, said


@with_nvcc
def test_the_extension_lies_in_the_package(project, built, tmp_path):
    target = tmp_path / "packages"
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    status, said = build(project, "-m", "pip", "install", ".", *offline, f"--target={target}")
    assert status == 0, said
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"mfac"}
    code = "from mfac import setup_cuda; print(setup_cuda.installed().__name__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=target, capture_output=True, text=True
    ).stdout
    assert found == "mfac.hinv_cuda\n"
    status, said = build(project, "setup_cuda.py", "install", f"--root={tmp_path / 'alone'}")
    assert status == 0, said
    assert len(list((tmp_path / "alone").rglob("hinv_cuda.*.so"))) == 1


@with_nvcc
def test_a_compiler_that_nvcc_refuses(project, tmp_path, monkeypatch):
    compiler = executable(tmp_path / "g++", 'exec g++ -U__GNUC__ -D__GNUC__=99 "$@"')
    monkeypatch.setenv("CC", str(compiler))
    status, said = build(project, "setup_cuda.py", "build_ext")
    assert status == 2
    (line,) = [line for line in said.splitlines() if "No CUDA runtime" not in line]
    assert line.startswith("setup_cuda.py: ") and "(#error" not in line
    assert f"the compiler {compiler} (unsupported GNU version); set CC and CXX" in line
