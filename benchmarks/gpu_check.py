"""Everything that needs a GPU, in one command: build, tests, compute-sanitizer, times.

    PYTHON=.venv/bin/python benchmarks/gpu_check.sh [--minutes 4] [--json FILE]

Builds the extension for this machine's card alone, or says why not, and compiles the kernels by
NVRTC. Runs the tests marked `cuda` and the kernels under compute-sanitizer, then, alone on the
card, the benchmarks that the tables of docs/cuda.md come from. Each part is a process of its own
with a limit of time: what becomes of one does not stop the others. What a part prints is shown and,
with its status, seconds and figures, written to the JSON file.

Needs torch and pytest, and no network. A part is left out, with the reason, where something is
missing. Exit status: 0 if nothing failed, 1 if a part failed or ran out of time, 2 without a GPU.
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
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.json"
TAIL = 6000  # characters that the JSON file keeps of a part's output
# Run in another process: a torch that cannot be imported is a reason, too.
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
    """A command, how many seconds it may take, and what became of it."""

    name: str
    command: list[str]
    limit: float
    measures: bool = False  # it prints a table, and takes --json FILE
    status: str = "left out"
    reason: str = ""
    seconds: float = 0
    output: str = ""
    figures: Any = None

    def run(self, end: float) -> Iterator[None]:
        """Runs the command until `end`, of time.monotonic(), at most. Yields while it runs."""
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
                process = subprocess.Popen(
                    self.command + (["--json", str(table)] if self.measures else []),
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # to be ended with all that it starts
                )
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
        """Prints what became of it, and what it printed: of tests, the end."""
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
    """Status and reason of a command with this exit status; None: it ran out of time. Status 2 is
    what a script ends with where something is missing, after one sentence."""
    lines = output.strip().splitlines() or [""]
    missing = re.search(r"^E? *ModuleNotFoundError: (No module named .*)$", output, re.MULTILINE)
    if status is None:
        return "out of time", f"it was ended after {limit:.0f} s"
    if status == 0:
        return "passed", ""
    if missing and status in (1, 2) and " failed" not in lines[-1]:
        return "left out", missing[1]
    if status == 5 or (status == 2 and "error" not in lines[-1].lower()):
        return "left out", lines[-1]
    return "failed", f"exit status {status}"


def stages(python: str) -> list[list[list[Part]]]:
    """What to run one after the other. The lanes of a stage run side by side, and the parts of a
    lane one after the other: what is measured is alone on the card."""
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
    """Runs the parts of each lane one after the other. What runs when this is interrupted, ends."""

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
    """What the figures depend on, and the reason why there is no GPU, if there is none."""

    def said(*command: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
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
    parser.add_argument("--minutes", type=float, default=4, help="for all parts together")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the file to write")
    args = parser.parse_args()
    end, start = time.monotonic() + 60 * args.minutes, time.monotonic()
    found, reason = machine(sys.executable)
    print(" ".join(f"{name}: {value}" for name, value in found.items()))
    # Builds are for this card alone, and what a part has printed is there when it is ended.
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
