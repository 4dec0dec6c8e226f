"""Kills the scripts at random moments, and checks the files they leave.

    python tests/kill.py --kills 50

Each mode runs once without interruption. Then it runs again and again, and SIGKILL ends it: every
other time at a random time, otherwise before, within or after one of the calls that write a file
(write, flush, fsync, replace, unlink). After each kill every file must load, and --resume must end
with the bits of the uninterrupted run: models, states, tables, pictures. Some kills hit a resumed
run. A full disk is a limit on the size of a file, or a file system without space if one can be
mounted.
"""

import argparse
import collections
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from harness import check_readable, check_same, finished, forked, script

import main_common
import main_optim
import main_prun

FEW = "--model tiny --batchsize 32"
MODES = {  # the script and its flags
    "train": (
        main_optim.main,
        f"{FEW} --epochs 8 --optim mfac --ngrads 16 --state_every 3 --save_every 2 --save net.pth",
    ),
    "one-shot": (
        main_prun.main,
        f"{FEW} --sparsities 0.2 0.4 0.6 0.7 0.8 0.9 --recomps 1 2 4 --ngrads 8 --npergrad 4 "
        "--out net",
    ),
    "gradual": (
        main_prun.main,
        f"{FEW} --sparsities 0.4 0.6 0.8 --nepochs 6 --prun_every 2 --optim mfac --ngrads 8 "
        "--npergrad 4 --out net",
    ),
}


class Calls:
    """Counts the calls that write files, and kills the process at one of them."""

    def __init__(self, last: int | None, report: Callable[[str], None]):
        self.left, self.report = last, report

    def at(self, name: str) -> None:
        self.report(name)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            self.at(f"before {name}")
            result = function(*args, **kwargs)
            self.at(f"after {name}")
            return result

        return call

    def install(self) -> None:
        """Watches all files of the scripts from now on."""
        calls = self

        class Raw(io.FileIO):
            def write(self, data) -> int:
                data = bytes(data)
                calls.at("before write")
                super().write(data[: len(data) // 2])
                calls.at("within write")
                super().write(data[len(data) // 2 :])
                return len(data)

        class File(io.BufferedWriter):
            def flush(self) -> None:
                calls.watched("flush", super().flush)()

        def watched_open(path, mode="r"):
            return File(Raw(path, mode)) if "w" in mode else open(path, mode)

        main_common.open = watched_open
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, self.watched(name, getattr(os, name)))


def killed_at(call: Callable, number: int | None) -> Callable[[], None]:
    """`call` with watched files. It is killed at the file call `number`, if given."""

    def run() -> None:
        names = os.open("/dev/fd/2", os.O_WRONLY)
        Calls(number, lambda name: os.write(names, f"{name}\n".encode())).install()
        call()

    return run


class Failure(Exception):
    """A check has failed."""


class Mode:
    """A run of a script, and the folders it leaves."""

    def __init__(self, name: str, folder: Path, shared: list[str], chance: random.Random):
        main, flags = MODES[name]
        self.name, self.folder, self.chance = name, folder, chance
        self.call = script(main, [*flags.split(), "--resume", *shared])
        self.whole = self.fresh("whole")
        end = forked(self.call, self.whole)
        self.expect(end.status == 0, end.err)
        self.seconds = end.seconds
        end = forked(killed_at(self.call, None), self.fresh("counted"))
        self.expect(end.status == 0, end.err)
        self.calls = [line for line in end.err.splitlines() if line.split()[0] in WHEN]
        self.check_order()
        self.counts = collections.Counter()

    def expect(self, met: bool, text: str) -> None:
        if not met:
            raise Failure(f"{self.name}: {text}")

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        path = self.folder / self.name / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def check_order(self) -> None:
        """Checks that a file is on the disk before it gets its name."""
        for index, call in enumerate(self.calls):
            if call == "before replace":
                since = [c for c in self.calls[:index] if "write" in c or "fsync" in c]
                self.expect(
                    since[-1] == "after fsync", "a file was named before it was on the disk"
                )

    def verify(self, folder: Path) -> None:
        """Checks that all files load, and that a resumed run ends as the uninterrupted one."""
        readable = forked(lambda: check_readable(folder), folder)
        self.expect(readable.status == 0, f"a file can't be read: {readable.err}")
        copy = self.folder / self.name / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        end = forked(self.call, copy)
        self.expect(end.status == 0, f"not resumed: {end.err}")
        self.expect(not any(copy.glob("*.tmp")), "a part of a file is left")
        equal = forked(lambda: check_same(self.whole, copy), folder)
        self.expect(equal.status == 0, f"other bits: {equal.err}")

    def kill(self, by_clock: bool) -> None:
        """Kills one run and checks its files."""
        folder = self.folder / self.name / "killed"
        going_on = folder.exists() and self.chance.random() < 0.3
        while True:
            if not going_on:
                folder = self.fresh("killed")
            before = len(finished(folder))
            if by_clock:
                moment = self.chance.uniform(0, self.seconds)
                end = forked(self.call, folder, kill_after=moment)
                where = "clock"
            else:
                number = self.chance.randint(1, len(self.calls))
                end = forked(killed_at(self.call, number), folder)
                calls = [line for line in end.err.splitlines() if line.split()[0] in WHEN]
                where = calls[-1] if calls else "nothing"
            if end.status == -signal.SIGKILL and not end.timed_out:
                break
            self.expect(end.status == 0, f"ended with {end.status}: {end.err}")
            going_on = False  # the run ended before the kill
        self.verify(folder)
        self.counts[where] += 1
        self.counts["of a resumed run"] += before > 0
        self.counts["with a file half written"] += any(folder.glob("*.tmp"))

    def fill(self, mounted: bool) -> None:
        """Runs with a full disk and checks the files."""
        folder = self.fresh("full")
        if not mounted:  # start from the files of an interrupted run
            forked(killed_at(self.call, self.chance.randint(1, len(self.calls))), folder)
            for path in folder.glob("*.tmp"):
                path.unlink()
        sizes = sorted(path.stat().st_size for path in self.whole.iterdir())
        if mounted:
            size = self.chance.randrange(4096, sum(sizes) - 8192)
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True
            )
            call = self.call
        else:
            size = self.chance.randrange(1, sizes[-1])

            def call() -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                self.call()

        try:
            end = forked(call, folder)
            if end.status == 0:
                return self.fill(mounted)  # the rest of the files was small
            lines = [line for line in end.err.splitlines() if "error" in line]
            refused = len(lines) == 1 and "of free space" in lines[0] and not end.out
            good = end.status == 2 and len(lines) == 1 and ("cannot write" in lines[0] or refused)
            self.expect(good and "Traceback" not in end.err, f"size {size}: {end}")
            self.expect(not any(folder.glob("*.tmp")), f"size {size}: a part is left")
            self.counts["refused at the start"] += refused
            self.counts["with a checkpoint to keep"] += any(folder.glob("*.state"))
            self.verify(folder)
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)
        self.counts["file system without space" if mounted else "limit of the size"] += 1


WHEN = ("before", "within", "after")


def can_mount(folder: Path) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4096", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False
    return mounted and subprocess.run(["umount", str(folder)]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill the scripts at random moments.")
    parser.add_argument("--kills", type=int, default=50, help="of each mode; default: 50")
    parser.add_argument("--full", type=int, default=10, help="full disks of each mode; default: 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    start = time.monotonic()
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None  # fsync does not wait there
    with tempfile.TemporaryDirectory(dir=fast) as name:
        folder = Path(name)
        images = harness.write_images(folder / "four")
        checkpoint = folder / "tiny.pth"
        forked(lambda: torch.save(harness.tiny(4).state_dict(), checkpoint), folder)
        mounts = can_mount(folder / "mount")
        for number, mode in enumerate(args.modes):
            chance = random.Random(1000 * args.seed + number)
            shared = ["--dataset", str(images)]
            if mode != "train":
                shared += ["--checkpoint", str(checkpoint)]
            run = Mode(mode, folder, shared, chance)
            print(f"{mode}: {run.seconds:.2f} s, {len(run.calls)} calls that write", flush=True)
            for kill in range(args.kills):
                run.kill(by_clock=kill % 2 == 0)
            print(f"{mode}: {args.kills} kills, all files readable, all resumed to the same bits")
            for disk in range(args.full):
                run.fill(mounted=mounts and disk % 2 == 0)
            print(
                f"{mode}: {args.full} full disks, one sentence each, all resumed to the same bits"
            )
            print("   ", ", ".join(f"{what} {n}" for what, n in sorted(run.counts.items())))
    print(f"{time.monotonic() - start:.0f} s, seed {args.seed}, torch {torch.__version__}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
