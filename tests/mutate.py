"""Gives the scripts damaged, unsuitable and malicious files, and checks how they end.

    python tests/mutate.py --files 300

The files are checkpoints (saved by torch.save, by older releases, or in the form of public ones),
states, tables to compare with, and images. Their bytes or contents change. A script must end within
the time limit with exit status 2, one sentence on standard error, and all other files unchanged. If
the changed file is still usable, it must end as without the change. Checkpoints and states with
changed bytes must be refused unless they contain the same numbers. Unchanged ones must be accepted.
"""

import argparse
import collections
import copy
import io
import math
import pickle
import random
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import End, check_readable, forked, same, script
from PIL import Image

import main_common
import main_optim
import main_prun
import models

LIMIT = 30  # seconds
MEMORY = 24 * 2**30  # bytes of address space; torch alone takes many
TRAIN = "--model tiny --batchsize 32 --epochs 2 --save net.pth"
PRUNE = "--model tiny --batchsize 32 --out net"
FEW = "--ngrads 6 --npergrad 4"
RUNS = {  # their states are changed
    "state of sgd": ("main_optim.py", f"{TRAIN} --optim sgd"),
    "state of adam": ("main_optim.py", f"{TRAIN} --optim adam --ema 0.9"),
    "state of mfac": ("main_optim.py", f"{TRAIN} --optim mfac --ngrads 4 --momentum 0.5"),
    "state of compressed mfac": ("main_optim.py", f"{TRAIN} --ngrads 4 --compress 0.2"),
    "state of magnitude": ("main_prun.py", f"{PRUNE} --pruner magnitude --sparsities 0.4 0.8"),
    "state of one-shot": ("main_prun.py", f"{PRUNE} {FEW} --sparsities 0.4 0.6 0.8 --recomps 2"),
    "state of gradual sgd": ("main_prun.py", f"{PRUNE} {FEW} --cubic 0.4 0.8 2 --nepochs 3"),
    "state of gradual mfac": (
        "main_prun.py",
        f"{PRUNE} {FEW} --sparsities 0.4 0.8 --nepochs 3 --optim mfac",
    ),
}

# --- changes of bytes -----------------------------------------------------------------------------


def flip(data: bytearray, chance: random.Random, times: int = 1) -> bytearray:
    for _ in range(times):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def overwrite(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.randint(1, 512))
    data[start:stop] = chance.choice((bytes(stop - start), chance.randbytes(stop - start)))
    return data


def insert(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data))
    return data[:start] + chance.randbytes(chance.randint(1, 64)) + data[start:]


def remove(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randint(1, 64) :]


BYTES = {
    "one bit": flip,
    "five bits": lambda data, chance: flip(data, chance, 5),
    "cut": lambda data, chance: data[: chance.randrange(len(data))],
    "cut at the end": lambda data, chance: data[: -chance.randint(1, 64)],
    "empty": lambda data, chance: b"",
    "overwritten": overwrite,
    "inserted": insert,
    "removed": remove,
    "longer": lambda data, chance: data + chance.randbytes(100),
    "random": lambda data, chance: chance.randbytes(len(data)),
    "text": lambda data, chance: b"<html>404</html>\n",
    "as it was": lambda data, chance: data,
}

# --- changes of contents --------------------------------------------------------------------------


class Bomb:
    """An object whose unpickling makes a call, for example to make a file."""

    def __init__(self, function: Callable, *args: Any):
        self.call = function, args

    def __reduce__(self):
        return self.call


def nested(depth: int) -> list:
    """A list that takes little memory, but printing or comparing it takes all there is."""
    whole = ["bomb"]
    for _ in range(depth):
        whole = [whole] * 10
    return whole


def cyclic() -> list:
    whole = []
    whole.append(whole)
    return whole


def swollen() -> bytes:
    """A checkpoint of 4 MB with a compressed record of 4 GB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w", force_zip64=True) as record:
            for _ in range(256):
                record.write(bytes(2**24))
    return file.getvalue()


def other_key(state: dict, chance: random.Random) -> tuple[str, torch.Tensor]:
    """The name and value of a random parameter."""
    return chance.choice([(k, v) for k, v in state.items() if v.is_floating_point()])


def put(state: dict, key: Any, value: Any) -> dict:
    return {**state, key: value}


def without(state: dict, missing: str) -> dict:
    return {key: value for key, value in state.items() if key != missing}


def poke(tensor: torch.Tensor, value: float, chance: random.Random) -> torch.Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[chance.randrange(tensor.numel())] = value
    return tensor


def changed_weight(change: Callable[[torch.Tensor, random.Random], Any]) -> Callable:
    def apply(state: dict, chance: random.Random) -> dict:
        key, weight = other_key(state, chance)
        return put(state, key, change(weight, chance))

    return apply


CONTENTS = {  # changes of a state dict; all must be refused
    "other model": lambda state, _: {f"layer{key}": value for key, value in state.items()},
    "other classes": lambda state, _: harness.tiny(7).state_dict(),
    "weight missing": lambda state, chance: without(state, other_key(state, chance)[0]),
    "weight too many": lambda state, _: put(state, "more", torch.ones(2)),
    "key no text": lambda state, _: put(state, 3, torch.ones(2)),
    "weight no tensor": changed_weight(lambda w, chance: chance.choice((None, "x", 1.0, [1, 2]))),
    "other shape": changed_weight(lambda w, chance: w[..., None]),
    "one number": changed_weight(lambda w, chance: w.new_zeros(())),
    "nan": changed_weight(lambda w, chance: poke(w, math.nan, chance)),
    "inf": changed_weight(lambda w, chance: poke(w, math.inf, chance)),
    "complex": changed_weight(lambda w, chance: w.to(torch.complex64)),
    "bool": changed_weight(lambda w, chance: w > 0),
    "integers": changed_weight(lambda w, chance: w.long()),
    "meta": changed_weight(lambda w, chance: w.to("meta")),
    "sparse": changed_weight(lambda w, chance: w.to_sparse()),
    "quantized": changed_weight(lambda w, chance: torch.quantize_per_tensor(w, 1, 0, torch.qint8)),
    "expanded": changed_weight(lambda w, chance: torch.ones(1).expand(10**6, 10**6)),
    "list": lambda state, _: list(state.values()),
    "tensor": lambda state, _: torch.ones(3),
    "number": lambda state, _: 3,
    "no entry": lambda state, _: {},
    "nested": lambda state, _: {"state_dict": nested(50), "model": nested(50)},
    "cyclic": lambda state, _: {"state_dict": cyclic()},
    "bomb": lambda state, _: put(state, "bomb", Bomb(exec, "open('bombed', 'w').close()")),
    "bomb at the top": lambda state, _: Bomb(Path.touch, Path("bombed")),
    "whole module": lambda state, _: harness.tiny(4),
}

VALUES = [None, "text", "", -1, 0, 3, 1.5, math.nan, 1e300, 10**30, True, [], {}, [1], {"a": 1}]
VALUES += [torch.tensor(3.0), torch.ones(2, 3), torch.ones(2, device="meta"), nested(50), cyclic()]


def change_state(state: dict, chance: random.Random) -> tuple[dict, str]:
    """The state with one entry removed, added or replaced, at any depth."""
    state = copy.deepcopy(state)
    container, path = state, []
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = chance.choice(keys)
        path.append(str(key))
        deeper = container[key]
        if isinstance(deeper, dict | list) and deeper and chance.random() < 0.9:
            container = deeper
        else:
            break
    old, what = container[key], chance.choice(("removed", "added", "replaced", "replaced", "bent"))
    if what == "removed":
        del container[key]
    elif what == "added" and isinstance(container, dict):
        container["more"] = chance.choice(VALUES)
    elif what == "added":
        container.append(chance.choice(VALUES))
    elif what == "bent" and isinstance(old, torch.Tensor):
        container[key] = chance.choice(
            (old[None], old.double(), old.bool(), old.flatten()[:1], old.to("meta"), ~old.bool())
        )
    else:
        container[key] = chance.choice(VALUES)
    return state, f"{what} {'/'.join(path)}"


MASKS = {  # changes of masks in the state of a pruning run; all must be refused
    "mask missing": lambda masks, name: masks.pop(name),
    "mask too many": lambda masks, name: masks.update(more=torch.ones(2, dtype=torch.bool)),
    "mask of other shape": lambda masks, name: masks.update({name: masks[name][None]}),
    "mask no tensor": lambda masks, name: masks.update({name: 1}),
    "mask of numbers": lambda masks, name: masks.update({name: masks[name].float()}),
    "mask upside down": lambda masks, name: masks.update({name: ~masks[name]}),
}

ROWS = ["nan,nan", "0.5,101", "-1,50", "1e999,50", "x,50", "0.5", ",", "0.5,50,7", '"', "\0,\0"]


def change_table(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """The CSV with a cell, column or row changed."""
    lines = data.decode().splitlines()
    row = chance.randrange(len(lines))
    cells = lines[row].split(",")
    kind = chance.choice(("cell", "row", "column", "header", "long"))
    if kind == "cell":
        cells[chance.randrange(len(cells))] = chance.choice(("x", "nan", "-1", "1e9", '"', "inf"))
        lines[row] = ",".join(cells)
    elif kind == "row":
        lines[row] = chance.choice(ROWS)
    elif kind == "column":
        lines = [",".join(line.split(",")[1:]) for line in lines]
    elif kind == "header":
        lines = lines[1:]
    else:
        lines[row] = "9" * 200_000
    return "\n".join(lines).encode(), f"{kind} of row {row}"


def change_image(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Another image in place of this one."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    kind = chance.choice(("larger", "16 bits", "huge", "floats"))
    file = io.BytesIO()
    if kind == "larger":
        Image.fromarray(pixels.repeat(3, 0)).save(file, "PNG")
    elif kind == "16 bits":
        Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(file, "PNG")
    elif kind == "floats":
        Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(file, "TIFF")
    else:  # a few kilobytes that expand to a quarter of a gigabyte
        Image.new("1", (16_000, 15_000)).save(file, "PNG")
    return file.getvalue(), kind


# --- the cases ------------------------------------------------------------------------------------


@dataclass
class Case:
    """A changed file, a script with flags that reads it, and whether it must be refused."""

    name: str
    main: str
    flags: str
    file: Path
    refused: bool = False
    unless_same: Path | None = None  # a file that may contain the same numbers


class Originals:
    """Good files in a folder. Makes cases from them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = harness.write_images(folder / "images", 40, 20)
        self.large = harness.write_images(folder / "large", 40, 20, side=72)
        made = forked(self.make, folder)
        assert made.status == 0, made.err
        for name, (main, flags) in RUNS.items():
            end = forked(self.interrupted(main, flags), self.fresh(name))
            assert end.status == 130, end.err

    def fresh(self, name: str) -> Path:
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def make(self) -> None:
        """Writes checkpoints of each kind, and a table of figures."""
        torch.manual_seed(0)
        state = harness.tiny(4).state_dict()
        torch.save(state, "plain.pth")
        torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
        public = {f"module.{name}": weight for name, weight in state.items()}
        torch.save({"epoch": 3, "state_dict": public, "best": np.float64(5)}, "public.pth.tar")
        main_prun.main(
            f"{PRUNE} --pruner magnitude --sparsities 0.4 0.8 --dataset {self.images} "
            "--checkpoint plain.pth --device cpu".split()
        )
        Path("net.csv").rename("figures.csv")
        for path in Path().glob("net*"):
            path.unlink()

    def interrupted(self, main: str, flags: str) -> Callable[[], None]:
        """A run that Ctrl-C ends after the second line of a pruning, or the first epoch."""
        module = main_prun if "prun" in main else main_optim
        command = [*flags.split(), "--dataset", self.images]
        if module is main_prun:
            command += ["--checkpoint", self.folder / "plain.pth"]

        def run() -> None:
            calls, evaluate = iter(range(2 if module is main_prun else 1)), module.evaluate

            def once(*args, **options):
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return evaluate(*args, **options)

            module.evaluate = once
            script(module.main, command)()

        return run

    def checkpoint(self, chance: random.Random, kind: str) -> Case:
        name = chance.choice(("plain.pth", "public.pth.tar", "old.pth"))
        original, folder = self.folder / name, self.fresh("case")
        path = folder / name
        case = Case(f"{name}: {kind}", *self.user(chance, f"--checkpoint {name}"), path)
        if kind in BYTES:
            path.write_bytes(BYTES[kind](bytearray(original.read_bytes()), chance))
            if name != "old.pth":  # that file has no checksums
                case.unless_same = original
        elif kind == "swollen":
            path.write_bytes(swollen())
            case.refused = True
        else:

            def save() -> None:
                state = CONTENTS[kind](harness.tiny(4).state_dict(), chance)
                torch.save(state, path, _use_new_zipfile_serialization=name != "old.pth")

            end = forked(save, folder)
            assert end.status == 0, end.err
            case.refused = True
        return case

    def user(self, chance: random.Random, flags: str) -> tuple[str, str]:
        """A random script that reads a checkpoint, and its flags."""
        if chance.random() < 0.5:
            command = (
                f"--model tiny --batchsize 32 --epochs 1 --optim sgd --save out/net.pth {flags}"
            )
            return "main_optim.py", f"{command} --dataset {self.images}"
        pruner = chance.choice(("--pruner magnitude", FEW))
        command = f"--model tiny {pruner} --sparsities 0.5 --out out/net {flags}"
        return "main_prun.py", f"{command} --dataset {self.images}"

    def state(self, chance: random.Random, kind: str) -> Case:
        names = [name for name in RUNS if "prun" in RUNS[name][0] or "mask" not in kind]
        name = chance.choice(names)
        main, _ = RUNS[name]
        where = "--out net" if "prun" in main else "--save net.pth"
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / name, folder)
        path, original = folder / "net.state", self.folder / name / "net.state"
        case = Case(f"{name}: {kind}", main, f"{where} --resume", path)
        if kind in BYTES:
            path.write_bytes(BYTES[kind](bytearray(original.read_bytes()), chance))
            case.unless_same = original
            return case

        def save() -> None:
            state = main_common.load_saved(original)
            if kind in MASKS:
                masks = state["pruner"]["masks"]
                MASKS[kind](masks, chance.choice(list(masks)))
            elif kind in CONTENTS:
                state["model"] = CONTENTS[kind](state["model"], chance)
            else:
                state, what = change_state(state, chance)
                print(what)
            torch.save(state, path)

        end = forked(save, folder)
        assert end.status == 0, end.err
        case.name = f"{case.name} {end.out.strip()}"
        chance.random()  # the child has drawn from its own copy
        case.refused = kind in MASKS or (kind in CONTENTS and kind not in ("nan", "inf"))
        return case

    def table(self, chance: random.Random, kind: str) -> Case:
        folder, data = self.fresh("case"), (self.folder / "figures.csv").read_bytes()
        path = folder / "figures.csv"
        if kind in BYTES:
            path.write_bytes(BYTES[kind](bytearray(data), chance))
        else:
            changed, what = change_table(data, chance)
            path.write_bytes(changed)
            kind = f"{kind} {what}"
        command = "--model tiny --pruner magnitude --sparsities 0.5 --out out/net --plot "
        command += f"figures.csv --checkpoint {self.folder / 'plain.pth'} --dataset {self.images}"
        return Case(f"table: {kind}", "main_prun.py", command, path)

    def image(self, chance: random.Random, kind: str) -> Case:
        folder = self.fresh("case")
        original = self.large if chance.random() < 0.3 else self.images
        images = folder / "images"
        shutil.copytree(original, images)
        path = chance.choice(sorted(images.rglob("*.png")))
        if kind in BYTES:
            path.write_bytes(BYTES[kind](bytearray(path.read_bytes()), chance))
        else:
            changed, what = change_image(path.read_bytes(), chance)
            path.write_bytes(changed)
            kind = f"{kind} {what}"
        main, flags = self.user(chance, "")
        if "prun" in main:
            flags += f" --checkpoint {self.folder / 'plain.pth'}"
        flags = flags.replace(str(self.images), "images")
        return Case(f"{original.name} image: {kind}", main, flags, path)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def judge(case: Case, end: End, before: dict[Path, bytes], folder: Path) -> str:
    """The fault in the end of a script; empty if there is none."""
    if end.timed_out:
        return f"took more than {LIMIT} s"
    if end.status not in (0, 2):
        return f"ended with {end.status}: {end.err[-600:]}"
    lines = end.err.splitlines()
    note = re.compile(r"(a window of|inverse Fisher:|going on after|resumed after) .*")
    if end.status == 2 and (case.name.endswith("as it was") or "argument" in end.err):
        return f"was refused: {end.err}"
    if end.status == 2:
        *notes, last = lines or [""]
        if not last.startswith(f"{case.main}: error: ") or not all(map(note.fullmatch, notes)):
            return f"is not one sentence: {end.err[-600:]}"
        if notes and end.out == "":
            return f"says more than the sentence: {end.err}"
        if len(last) > 1000:
            return f"has a sentence of {len(last)} letters"
        if end.out and (case.refused or case.unless_same):
            return f"had begun to work: {end.err}"
        if end.out:
            return leftovers(folder)
        if contents(folder) != before:
            left = {path for path, data in contents(folder).items() if before.get(path) != data}
            return f"left {sorted(map(str, left))} after {end.err}"
        return ""
    if not all(map(note.fullmatch, lines)):
        return f"says {end.err[-600:]}"
    if case.refused:
        return "was accepted"
    if case.unless_same:
        before_run = folder.parent / "before"
        before_run.write_bytes(before[case.file])

        def compare() -> None:
            with torch.serialization.safe_globals(models.SAFE):
                pair = [
                    torch.load(path, weights_only=True) for path in (before_run, case.unless_same)
                ]
            assert same(*pair)

        if forked(compare, folder).status:
            return "contains other numbers, but was accepted"
    if not list(folder.rglob("net.csv")):
        return "left no figures"
    return leftovers(folder)


def leftovers(folder: Path) -> str:
    """The fault in the output in a folder, if there is any output; empty if there is none."""
    shutil.rmtree(folder / "images", ignore_errors=True)
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("net"):
            path.unlink()
    where = folder / "out" if (folder / "out").exists() else folder
    if any(folder.rglob("*.tmp")):
        return "left a part of a file"
    readable = forked(lambda: check_readable(where), folder)
    return f"left what can't be read: {readable.err}" if readable.status else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Give the scripts damaged files.")
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print how each case ended")
    args = parser.parse_args()
    start, counts, failures = time.monotonic(), collections.Counter(), 0
    chance = random.Random(args.seed)
    plans = []
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast) as name:
        originals = Originals(Path(name))
        kinds = {  # of each file, and its share in tenths
            originals.checkpoint: (3, [*BYTES, *CONTENTS, "swollen"]),
            originals.state: (4, [*BYTES, *MASKS, *CONTENTS, *["entry"] * 20]),
            originals.table: (1, [*BYTES, *["changed"] * 5]),
            originals.image: (2, [*BYTES, *["changed"] * 6]),
        }
        for make, (share, list_of_kinds) in kinds.items():
            wanted = math.ceil(args.files * share / 10)
            chance.shuffle(list_of_kinds)
            list_of_kinds.insert(0, "as it was")  # one case must be accepted
            plans += [(make, list_of_kinds[i % len(list_of_kinds)]) for i in range(wanted)]
        for number, (make, kind) in enumerate(plans[: args.files]):
            case = make(random.Random(f"{args.seed} {number}"), kind)
            folder = Path(name) / "case"
            before = contents(folder)
            command = script(harness.MAINS[case.main], case.flags.split())
            end = forked(command, folder, limit=LIMIT, memory=MEMORY)
            verdict = judge(case, end, before, folder)
            if verdict:
                failures += 1
                print(f"{number} FAILED: {case.main} {case.name} {verdict}", flush=True)
            elif args.verbose:
                print(f"{number} {case.main} {case.name}: {end.status} {end.err.strip()}")
            what = case.name.split(":")[0].split(" of ")[0].split(".")[-1]
            counts[what, "refused" if end.status == 2 else "taken"] += 1
    print(f"{args.files} files, {failures} failures, seed {args.seed}, ", end="")
    print(", ".join(f"{what} {how} {n}" for (what, how), n in sorted(counts.items())), end=", ")
    print(f"{time.monotonic() - start:.0f} s, torch {torch.__version__}")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
