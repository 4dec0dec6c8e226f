"""Everything that needs a GPU, in one command: build, tests, compute-sanitizer, times.

    PYTHON=.venv/bin/python benchmarks/gpu_check.sh [--minutes 4] [--json FILE]

Builds the extension for this machine's card alone and compiles the kernels by NVRTC. Runs the tests
marked `cuda`, and the kernels under compute-sanitizer. Then runs the benchmarks of docs/cuda.md,
one at a time. Each part is a process with a time limit, so a part that fails or hangs does not stop
the others. The output of each part is shown. The JSON file gets it too, with status, seconds and
figures.

Needs torch, numpy and pytest, and no network. A part that lacks something is left out, with the
reason: tests and epochs of the scripts need the packages of requirements-test.txt.

Exit status: 0 if nothing failed, 1 if a part failed or ran out of time, 2 without a GPU.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "gpu_check.json"
TAIL = 6000  # characters of a part's output in the JSON file
# In another process, because importing torch may fail.
MACHINE = """
import json, platform, torch
found = {"python": platform.python_version()}
found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
found |= {"cards": [torch.cuda.get_device_name(i) for i in range(count)]}
found |= {"capability": "%d.%d" % torch.cuda.get_device_capability() if count else None}
print(json.dumps(found))
"""
NVRTC = "import torch, kernels; kernels.Compiled(torch.device('cuda', 0)); print('compiled')"
SANITIZED = "same_input_same_bits and not 300 or same_input_same_bits_for_the_recursion"


@dataclass
class Part:
    """A command, its limit in seconds, and its result."""

    name: str
    command: list[str]
    limit: float
    measures: bool = False  # prints a table and takes --json FILE
    status: str = "left out"
    reason: str = ""
    seconds: float = 0
    output: str = ""
    figures: Any = None

    def run(self, end: float) -> Iterator[None]:
        """Runs the command, at most until time.monotonic() is `end`. Yields while it runs."""
        start = time.monotonic()
        limit = min(self.limit, end - start)
        if limit <= 0:
            self.reason = "no time was left for it (--minutes)"
            return
        if shutil.which(self.command[0]) is None:
            self.reason = f"{self.command[0]} is not installed"
            return
        with tempfile.TemporaryDirectory() as folder:
            table, output = Path(folder, "figures.json"), Path(folder, "output")
            with open(output, "w") as file:
                try:
                    process = subprocess.Popen(
                        self.command + (["--json", str(table)] if self.measures else []),
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # so that killpg ends its children too
                    )
                except OSError as error:
                    self.reason = f"{self.command[0]} does not run: {error.strerror}"
                    return
                try:
                    while process.poll() is None and time.monotonic() < start + limit:
                        yield
                    status = process.poll()
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            self.seconds = round(time.monotonic() - start, 1)
            self.output = output.read_text(errors="replace")
            with contextlib.suppress(OSError, ValueError):
                self.figures = json.loads(table.read_text())
        self.status, self.reason = judge(status, self.output, limit)

    def report(self) -> None:
        """Prints the result and the output. Of tests that passed, only reasons of skips."""
        print(f"\n## {self.name}: {self.status}, {self.seconds} s", end="")
        print(f": {self.reason}" if self.reason else "", flush=True)
        lines = self.output.rstrip().splitlines()
        if self.status not in ("passed", "left out"):
            lines = lines[-40:]
        elif not self.measures:
            lines = [line for line in lines if line.startswith("SKIPPED")] + lines[-1:]
        if self.status != "left out":
            print("\n".join(lines), flush=True)


def judge(status: int | None, output: str, limit: float) -> tuple[str, str]:
    """Status and reason of a command with this exit status, None if it ran out of time. Scripts end
    with status 2 and one sentence if something is missing."""
    lines = output.strip().splitlines() or [""]
    importing = r"^(?:E? *ModuleNotFoundError|\S*python\S*): (No module named .*)$"
    missing = re.search(importing, output, re.MULTILINE)
    nothing = re.search(r"^\d+ skipped.* in [\d.]+s.*$", output, re.MULTILINE)  # and none passed
    if status is None:
        return "out of time", f"it was ended after {limit:.0f} s"
    if status == 0:
        return ("left out", nothing[0]) if nothing else ("passed", "")
    if missing and status in (1, 2) and " failed" not in lines[-1]:
        return "left out", missing[1]
    if status == 5 or (status == 2 and "error" not in lines[-1].lower()):
        return "left out", lines[-1]
    return "failed", f"exit status {status}"


def stages(python: str) -> list[list[list[Part]]]:
    """The stages, to run one after the other. The lanes of a stage run side by side, and the parts
    of a lane one after the other. Benchmarks have the card for themselves."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = [
        path.relative_to(ROOT) for path in files if re.search(r"mark\.cuda\b", path.read_text())
    ]
    pytest = [python, "-m", "pytest", "-m", "cuda", "-rs", "-p", "no:cacheprovider"]
    tests = [[Part(f"tests of {path}", [*pytest, str(path)], 80)] for path in marked]
    kernels = [*pytest, "tests/test_hinv_cuda.py", "-k", SANITIZED]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    sanitizer = [found or "compute-sanitizer", "--error-exitcode", "1", "--tool"]
    tools = [["memcheck", "initcheck"], ["racecheck", "synccheck"]]
    checks = [
        [Part(f"compute-sanitizer, {tool}", [*sanitizer, tool, *kernels], 40) for tool in lane]
        for lane in tools
    ]
    epoch = [python, "benchmarks/gpu_epoch.py", "--without_compile", "--batches", "60"]
    rows = [python, "benchmarks/gpu_rows.py", "--large"]
    return [
        [
            [Part("the extension", [python, "setup_cuda.py", "build_ext", "--inplace"], 90)],
            [Part("NVRTC", [python, "-c", NVRTC], 60)],
        ],
        [*tests, *checks],
        [[Part("epochs", epoch, 60, measures=True)]],
        [[Part("steps", rows, 100, measures=True)]],
        [[Part("kernels", [python, "benchmarks/gpu_step.py"], 60, measures=True)]],
    ]


def run_side_by_side(lanes: list[list[Part]], end: float) -> None:
    """Runs the parts of each lane one after the other. An interrupt ends all that run."""

    def run(lane: list[Part]) -> Iterator[None]:
        for part in lane:
            yield from part.run(end)
            part.report()

    running = [run(lane) for lane in lanes]
    try:
        while running:
            running = [lane for lane in running if next(lane, running) is None]
            time.sleep(0.05)
    finally:
        for lane in running:
            lane.close()


def machine(python: str) -> tuple[dict[str, Any], str]:
    """The machine and versions, and the reason if there is no GPU."""

    def said(*command: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
            return (done.stdout if done.returncode == 0 else done.stderr).strip() or None
        return None

    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    commit = said("git", "describe", "--always", "--dirty")
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found |= {"commit": commit, "driver": driver and driver.splitlines()[0]}
    answer = said(python, "-c", MACHINE) or f"{python} cannot be run"
    try:
        found |= json.loads(answer)
    except ValueError:
        return found, answer.splitlines()[-1]
    return found, "" if found["cards"] else "torch sees no CUDA device"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "limit for all parts together; default: 4"
    parser.add_argument("--minutes", type=float, default=4, help=text)
    text = "the file to write; default: runs/gpu_check.json"
    parser.add_argument("--json", type=Path, default=RESULTS, help=text)
    args = parser.parse_args()
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.touch()
    except OSError as error:
        parser.error(
            f"--json {args.json} cannot be written ({error.strerror}): choose another file"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the parts, as Ctrl-C does
    sys.stdout.reconfigure(errors="replace")
    end, start = time.monotonic() + 60 * args.minutes, time.monotonic()
    found, reason = machine(sys.executable)
    print(" ".join(f"{name}: {value}" for name, value in found.items()))
    # Build for this card alone. Unbuffered, so that a part that is ended has shown all its output.
    os.environ |= {"TORCH_CUDA_ARCH_LIST": found.get("capability") or "", "PYTHONUNBUFFERED": "1"}
    done: list[Part] = []
    for lanes in stages(sys.executable):
        parts = [part for lane in lanes for part in lane]
        if not reason:
            run_side_by_side(lanes, end)
        for part in parts:
            part.reason = part.reason or reason
        done += parts
        record = {"machine": found, "seconds": round(time.monotonic() - start, 1)}
        record["parts"] = [vars(part) | {"output": part.output[-TAIL:]} for part in done]
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(f"\n{time.monotonic() - start:.0f} s; {args.json}")
    for part in done:
        print(f"{part.status:12}{part.name}{': ' + part.reason if part.reason else ''}")
    bad = any(part.status not in ("passed", "left out") for part in done)
    sys.exit(2 if reason else int(bad))


if __name__ == "__main__":
    main()
