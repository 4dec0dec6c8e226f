"""benchmarks/gpu_check.py: what becomes of parts that fail, hang, or lack something. The benchmarks
that it calls run on the CPU, as far as they can."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels_on_cpu import KernelsOnCpu
from test_hinv_cuda import in_one_process, needs_gxx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_check, gpu_rows, gpu_step = map(importlib.import_module, ("gpu_check", "gpu_rows", "gpu_step"))
Part = gpu_check.Part


def python(name, code, limit=60.0, **options):
    return Part(name, [sys.executable, "-c", code], limit, **options)


def run(monkeypatch, tmp_path, stages, *flags, missing=""):
    """Exit status, and the parts of the JSON file by their names, with these stages."""
    monkeypatch.setattr(gpu_check, "machine", lambda python: ({"cards": ["a card"]}, missing))
    monkeypatch.setattr(gpu_check, "stages", lambda python: stages)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--json", str(tmp_path / "made"), *flags])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    made = json.loads((tmp_path / "made").read_text())
    assert made["machine"] == {"cards": ["a card"]} and made["seconds"] >= 0
    return end.value.code, {part["name"]: part for part in made["parts"]}


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    table = "import json, sys; print('| table |'); json.dump([1.5], open(sys.argv[2], 'w'))"
    hang = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
print("began", flush=True)
time.sleep(100)
"""
    stages = [
        [
            [python("broken", "print('before'); raise RuntimeError('a reason')"), python("on", "")],
            [python("hanging", hang, limit=3.0)],
            [python("lacking", "import sys; print('there is no nvcc'); sys.exit(2)")],
        ],
        [[python("measured", table, measures=True), Part("absent", ["no-such-tool"], 9)]],
    ]
    status, parts = run(monkeypatch, tmp_path, stages)
    assert status == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        "broken": "failed",
        "on": "passed",
        "hanging": "out of time",
        "lacking": "left out",
        "measured": "passed",
        "absent": "left out",
    }
    assert parts["lacking"]["reason"] == "there is no nvcc"
    assert parts["absent"]["reason"] == "no-such-tool is not installed"
    assert parts["measured"]["figures"] == [1.5]
    assert parts["hanging"]["output"] == "began\n" and 3 <= parts["hanging"]["seconds"] < 20
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    # Or it would disturb what is measured next. A zombie waits for whoever adopted it.
    assert not child.exists() or child.read_text().split(") ")[1][0] == "Z"
    shown = capsys.readouterr().out
    for text in ("before", "RuntimeError: a reason", "| table |", "absent: no-such-tool is not"):
        assert text in shown


def test_what_there_is_no_time_for_is_left_out(monkeypatch, tmp_path):
    status, parts = run(monkeypatch, tmp_path, [[[python("late", "")]]], "--minutes", "0")
    assert status == 0 and parts["late"]["status"] == "left out"
    assert parts["late"]["reason"] == "no time was left for it (--minutes)"


def test_what_is_interrupted_ends_its_processes(monkeypatch, tmp_path):
    started = python("started", "import time; time.sleep(100)")
    lanes = [[started], [Part("interrupting", ["true"], 9)]]
    processes, popen = [], subprocess.Popen

    def interrupted(command, **options):
        if command[0] == "true":
            raise KeyboardInterrupt
        processes.append(popen(command, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_side_by_side(lanes, end=1e18)
    assert processes[0].returncode < 0


def test_a_command_that_can_not_be_executed_does_not_stop_the_others(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    stages = [[[Part("broken", [str(broken)], 9), python("on", "")]]]
    status, parts = run(monkeypatch, tmp_path, stages)
    assert status == 0 and parts["on"]["status"] == "passed"
    assert parts["broken"]["reason"] == f"{broken} does not run: Exec format error"


def test_a_json_that_can_not_be_written_is_said_at_once(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--json", str(tmp_path / "file" / "made")])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 2 and "made cannot be written (" in capsys.readouterr().err


MISSING = "E   ModuleNotFoundError: No module named 'a'\n"


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "3 passed, 2 skipped in 4.5s", "passed"),
        (1, "1 failed, 3 passed in 4.5s", "failed"),
        (1, MISSING + "1 failed, 3 passed in 4.5s", "failed"),
        (2, MISSING + "1 error in 0.3s", "left out"),
        (1, "ModuleNotFoundError: No module named 'cuda'", "left out"),
        (2, "E   SyntaxError: invalid syntax\n1 error in 0.3s", "failed"),
        (1, "/usr/bin/python3: No module named pytest", "left out"),
        (5, "40 deselected in 2.1s", "left out"),
        (0, "SKIPPED [12] here\n12 skipped, 40 deselected in 2.1s", "left out"),
        (0, "12 skipped in 2.1s\n========= ERROR SUMMARY: 0 errors", "left out"),
        (2, "setup_cuda.py: Error compiling objects for extension", "failed"),
        (-11, "", "failed"),
        (None, "..", "out of time"),
    ],
)
def test_statuses(code, output, status):
    found, reason = gpu_check.judge(code, output, 60.0)
    assert found == status and bool(reason) == (status != "passed")


def test_without_a_gpu_each_part_is_left_out(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    made = tmp_path / "made.json"
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu_check.sh", "--json", made],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "")
    found = json.loads(made.read_text())
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["cards"] == []
    parts = {part["name"]: part for part in found["parts"]}
    wanted = {
        "the extension",
        "NVRTC",
        "compute-sanitizer, racecheck",
        "epochs",
        "steps",
        "kernels",
    }
    assert parts.keys() >= wanted | {"tests of tests/test_hinv_cuda.py"}
    for part in parts.values():
        assert (part["status"], part["reason"]) == ("left out", "torch sees no CUDA device")
        assert f"{part['name']}: torch sees no CUDA device" in done.stdout


@needs_gxx
@in_one_process
@pytest.mark.parametrize("dtype", gpu_step.DTYPES)
def test_the_benchmark_of_kernels_checks_what_they_compute(dtype, monkeypatch):
    monkeypatch.setattr(gpu_step, "DEVICE", "cpu")
    kernels = KernelsOnCpu()
    cases = [gpu_step.Case(7, 4200, dtype), gpu_step.Exchange(20, dtype == torch.float32)]
    if dtype not in gpu_step.SCALED:
        cases.append(gpu_step.Compressed(7, 4200, dtype))
    for case in cases:
        case.check(kernels)
        for run in case.runs(kernels).values():
            run()
    monkeypatch.setattr(kernels, "hinv_times", lambda *_: torch.zeros(7).double())
    with pytest.raises(AssertionError, match="hinv_times is wrong"):
        cases[0].check(kernels)


def test_the_benchmark_of_steps_checks_its_results(monkeypatch, capsys):
    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu")
    monkeypatch.setattr(
        gpu_rows, "on_side_stream", lambda run, times: [run() for _ in range(times)]
    )
    gpu_rows.check_results(8, 500)
    shown = capsys.readouterr().out
    assert shown.count("error, torch.") == 8 and "WRONG" not in shown
    ends = [gpu_rows.trained(False, 3, compress=0.5) for _ in range(2)]
    assert all(map(torch.equal, *ends))


def test_the_benchmark_of_epochs_runs(monkeypatch, tmp_path):
    flags = ["--device", "cpu", "--batches", "1", "--ngrads", "3", "--json", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", ["gpu_epoch.py", *flags])
    importlib.import_module("gpu_epoch").main()
    (row,) = json.loads((tmp_path / "made").read_text())["rows"]
    assert row["sgd"] > 0 and row["mfac"] > 0
