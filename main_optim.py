"""Train an image classifier with M-FAC, SGD or Adam.

    python3 main_optim.py --model resnet20 --dataset DATASET --optim mfac --ngrads 512 \\
        --weightdecay .003 --batchsize 128 --save rn20-mfac.pth > rn20-mfac.txt

One line an epoch goes to standard output. Four files lie side by side, all but the curves
rewritten after each epoch: the model (--save), and with the same stem the training state
(.state), the figures of each epoch (.csv) and the curves (.png, at the end, with those of other
runs if --plot names their CSVs). Every file is derived from the training state, which is written
first: a run killed at any moment goes on with --resume to the same bits as an uninterrupted one (on
the CPU, with as many threads).

    torchrun --nproc-per-node N main_optim.py ...

does the same in N processes, each of which has its part of every batch and of the window. The
first one writes; a run may go on in another number of processes.
"""

import argparse
import bisect
import csv
import io
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

# OpenMP's threads spin while they wait, which makes a training step up to ten times slower as
# soon as anything else runs on the machine. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map
from tqdm import tqdm

import datautils
import models
from models.sync import sync_batch_norm
from optim import MFAC, window_bytes
from windows import Ranks

# What a flag is when it is not given. First what holds for all runs, then by data and optimizer:
# the paper's values, and for the digits those of a small search. A row has all the settings of its
# optimizer: one that it lacks is refused. The paper's number of epochs depends on the model.
COMMON = dict(model="resnet20", dataset="digits", optim="mfac", schedule="step", seed=0, amp=False)
WINDOW = dict(window_dtype="float32", compress=None)
COMPRESSED = dict(lr=1e-3, damp=1e-3)  # a step goes lr/damp along what the window does not hold
DEFAULTS = {
    ("paper", "sgd"): dict(lr=0.1, momentum=0.9, weightdecay=5e-4, batchsize=128),
    ("paper", "adam"): dict(lr=1e-3, weightdecay=5e-4, batchsize=128),
    ("paper", "mfac"): dict(
        lr=1e-3, momentum=0.0, weightdecay=3e-3, batchsize=128, ngrads=1024, damp=1e-5
    )
    | WINDOW,
    ("digits", "sgd"): dict(epochs=10, lr=0.03, momentum=0.9, weightdecay=5e-4, batchsize=64),
    ("digits", "adam"): dict(epochs=10, lr=1e-2, weightdecay=5e-4, batchsize=64),
    ("digits", "mfac"): dict(
        epochs=10, lr=1e-2, momentum=0.9, weightdecay=5e-4, batchsize=64, ngrads=128, damp=1e-3
    )
    | WINDOW,
}
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "seconds", "images_per_second")
COLUMNS += ("optimizer_seconds", "test_loss", "test_accuracy")  # of the CSV
PAPER_EPOCHS = {"resnet": 164, "wideresnet": 200, "mobilenet": 100}  # by the start of the name

# The figures that are drawn, and how large they may be in the CSV of an earlier run.
DRAWN = dict(epoch=1e9, seconds=1e9, train_loss=None, test_loss=None)
DRAWN |= dict(train_accuracy=100, test_accuracy=100)


ALONE = Ranks()


class UserError(Exception):
    """A mistake of the user or a limit of the machine: one sentence, exit status 2."""


# --- shared with main_prun.py ---------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage, from one process a machine."""

    def error(self, message: str):
        raise UserError(message)

    def fail(self, message: str):
        """Ends the process with that sentence."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # if the first process says the same, torchrun ends this one meanwhile
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, rule: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: an int or float for which `allowed`, which `rule` says in words, holds."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which no comparison allows
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {rule}")
        return value

    return convert


COUNT = number(int, "a whole number from 1 to 2^31 - 1", lambda value: 1 <= value < 2**31)
SEED = number(int, "a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
POSITIVE = number(float, "a number above 0", lambda value: 0 < value < math.inf)
FACTOR = number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
NOT_NEGATIVE = number(float, "a number from 0", lambda value: 0 <= value < math.inf)
FRACTION = number(float, "a number from 0 and below 1", lambda value: 0 <= value < 1)


def save_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` by what `write` puts into a file: after a crash at any moment `path` holds
    the old content or the new, never a part. Raises UserError if it can't be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the one in the other
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path}, which is as it was before: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_saved(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote to `path`, on the CPU. With `mmap` it takes no memory, but must be
    copied before the file may change. Raises UserError if the file is damaged."""
    try:
        return models.read_tensors(path, zipped=True, mmap=mmap)
    except Exception as error:  # there is no end to what a damaged file can set off
        raise UserError(f"{path} is damaged, or was not saved by this script") from error


def check_folder(path: Path, flag: str) -> None:
    """Raises UserError if `path`, of `flag`, neither is nor can become a folder to write into."""
    path = path.absolute()
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{folder} is no folder that can be written into: see {flag}")


def alike(saved: Any, present: Any) -> bool:
    """Whether what was loaded has the keys, the types, and the tensors of the shapes and types of
    `present`, whatever their numbers."""
    if isinstance(present, torch.Tensor):
        kinds = [
            (tensor.shape, tensor.dtype) for tensor in (saved, present) if torch.is_tensor(tensor)
        ]
        return len(kinds) == 2 and kinds[0] == kinds[1] and models.is_plain(saved)
    if isinstance(present, dict):
        if not isinstance(saved, dict) or saved.keys() != present.keys():
            return False
        return all(alike(saved[key], value) for key, value in present.items())
    if isinstance(present, list | tuple):
        same = type(saved) is type(present) and len(saved) == len(present)
        return same and all(map(alike, saved, present))
    return type(saved) is type(present)


def saved_settings(
    saved: Any, parser: Parser, choose: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """Saved settings, with the defaults of what came later; None if `choose` makes them of no
    command line."""
    flags = []
    try:
        for name, value in saved.items():
            if name == "help" or not isinstance(value, list | str | int | float | None):
                return None
            if isinstance(value, list):
                if not all(isinstance(x, int | float) for x in value):
                    return None
                flags += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False:
                flags.append(f"--{name}" if value is True else f"--{name}={value}")
        parsed = vars(parser.parse_args(flags))
        chosen = choose({name: parsed[name] for name in saved if parsed[name] is not None})
        return chosen if {name: chosen[name] for name in saved} == saved else None
    except (UserError, AttributeError, KeyError, TypeError):
        return None


def are_rows(saved: Any, columns: Iterable[str], most: int) -> bool:
    """Whether these are 1 to `most` rows of numbers, some of them empty."""
    if not (isinstance(saved, list) and 1 <= len(saved) <= most):
        return False
    wanted = dict.fromkeys(columns)
    return all(
        isinstance(row, dict)
        and row.keys() == wanted.keys()
        and all(x is None or type(x) in (int, float) for x in row.values())
        for row in saved
    )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Has a new optimizer go on from a state. Raises ValueError if it is not of such an one."""
    expected = optimizer.state_dict()
    for group, numbers in zip(optimizer.param_groups, expected["param_groups"], strict=True):
        for weight, number in zip(group["params"], numbers["params"], strict=True):
            entries = {}  # that the first step makes
            if isinstance(optimizer, torch.optim.Adam):
                entries = {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}
            elif group["momentum"]:
                entries = {"momentum_buffer": weight}
            if entries:
                expected["state"][number] = {**expected["state"].get(number, {}), **entries}
    groups = [
        [{**group, "lr": 0.0} for group in state["param_groups"]] for state in (saved, expected)
    ]
    if not alike(saved, expected) or groups[0] != groups[1]:
        compressed = isinstance(optimizer, MFAC) and optimizer.fisher.compress is not None
        others = ", or it was in another number of processes, which --compress does not allow"
        raise ValueError("the optimizer is another one" + (others if compressed else ""))
    optimizer.load_state_dict(saved)
    for entries in optimizer.state.values():  # SGD and Adam take what they load uncopied
        tensors = {name: x for name, x in entries.items() if isinstance(x, torch.Tensor)}
        entries.update({name: tensor.clone() for name, tensor in tensors.items()})


def check_space(path: Path, size: int) -> None:
    """Raises UserError if there is no space for `size` bytes where `path` will be."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"{folder} has {free / 2**30:.2f} GiB of free space, but the state of the run needs "
            f"{size / 2**30:.2f} GiB, as it is there twice while it is replaced: make space"
        )


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict | list | tuple):
        return sum(map(tensor_bytes, state.values() if isinstance(state, dict) else state))
    return 0


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`: of main memory, its share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all the memory there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def find_ranks() -> Ranks:
    """The processes that torchrun has started, or this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group()
    return Ranks(dist.group.WORLD)


def distributed(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with gradients, and statistics of batch norm, of the batches of all `ranks`."""
    if ranks.size == 1:
        return model
    return DistributedDataParallel(sync_batch_norm(model))


LOST = "another process of this run has ended, see its message; --resume goes on"


def lost_connection(error: RuntimeError) -> bool:
    """Whether this is what the others find when one of the processes is gone."""
    text = str(error)
    return dist.is_initialized() and (
        isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text
    )


def say(line: str) -> None:
    """Prints a result, from the first process. Raises UserError if standard output is full or
    closed."""
    if not is_first():
        return
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left of it
        raise UserError(f"cannot write to standard output: {error.strerror}") from error


def note(message: str) -> None:
    """Tells the user what is no result, from the first process."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def find_device(name: str) -> torch.device:
    """The device called `name`, of CUDA devices the one of this process. Raises UserError if it
    can't compute."""
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"--device {name} is not one of {', '.join(found)}") from error
    return device


def progress(batches: Iterable, title: str, total: int | None = None) -> tqdm:
    """The batches, with a progress bar if the first process is on a terminal."""
    return tqdm(batches, title, total, leave=False, disable=None if is_first() else True)


def batches(loader: Iterable, device: torch.device, title: str):
    """The batches of `loader` on `device`, with a progress bar on a terminal."""
    for images, labels in (bar := progress(loader, title)):
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        yield bar, images, labels.to(device, non_blocking=True)


def train_epoch(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
    amp: bool = False,
    title: str = "train",
) -> dict[str, float]:
    """One pass over `loader`, of which each of `ranks` has its part; `scheduler` takes a step a
    batch. Returns the mean loss and the accuracy (%) of the batches as they were trained on, the
    seconds, images a second, and the seconds within optimizer.step(). Raises UserError if the loss
    is no longer finite, or if the optimizer refuses the gradients."""
    model.train()
    loss_sum, correct, seen, optimizer_seconds = 0.0, 0, 0, 0.0
    start = time.perf_counter()
    for bar, images, labels in batches(loader, device, title):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            outputs = model(images)
            loss = cross_entropy(outputs, labels, reduction="sum")
        found = torch.stack([loss.detach(), (outputs.argmax(1) == labels).sum()]).tolist()
        batch_loss, right, size = totals(ranks, *found, len(labels))
        if not math.isfinite(batch_loss):
            raise UserError(f"the loss became {batch_loss / size}: {lower_rate(optimizer)}")
        optimizer.zero_grad()
        (loss * (ranks.size / size)).backward()  # gradients are averaged over processes
        before = synchronized_time(device)
        try:
            optimizer.step()
        except ValueError as error:  # mfac: too little damping for these gradients
            raise UserError(str(error)) from error
        optimizer_seconds += synchronized_time(device) - before
        scheduler.step()
        loss_sum += batch_loss
        correct += right
        seen += size
        bar.set_postfix(loss=loss_sum / seen, accuracy=100 * correct / seen, refresh=False)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"the last step made weights NaN or Inf: {lower_rate(optimizer)}")
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss_sum / seen,
        "train_accuracy": 100 * correct / seen,
        "seconds": seconds,
        "images_per_second": seen / seconds,
        "optimizer_seconds": optimizer_seconds,
    }


def lower_rate(optimizer: torch.optim.Optimizer) -> str:
    """What to do if a training diverges."""
    return "use a lower --lr" + (", or a higher --damp" if isinstance(optimizer, MFAC) else "")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
    amp: bool = False,
) -> tuple[float, float]:
    """Mean loss and accuracy (%) over `loader`, of which each of `ranks` has its part. The model is
    left as it was found."""
    training = model.training
    model.eval()
    loss_sum, correct, seen = 0.0, 0, 0
    for bar, images, labels in batches(loader, device, "test"):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            outputs = model(images)
        loss_sum += cross_entropy(outputs.float(), labels, reduction="sum").item()
        correct += (outputs.argmax(1) == labels).sum().item()
        seen += len(labels)
        bar.set_postfix(loss=loss_sum / seen, accuracy=100 * correct / seen, refresh=False)
    model.train(training)
    loss_sum, correct, seen = totals(ranks, loss_sum, correct, seen)
    return loss_sum / seen, 100 * correct / seen


def totals(ranks: Ranks, *numbers: float) -> list[float]:
    """The sums of numbers that each of `ranks` has for its part."""
    return ranks.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()


def gathered(state: Any, ranks: Ranks) -> Any:
    """A state dict with DTensors made whole, to be called by all processes; the first one alone
    keeps them."""

    def whole(x: Any) -> Any:
        if not hasattr(x, "placements"):
            return x
        # Not by its full_tensor, whose threads can abort a process at its end (torch 2.14, gloo).
        dim = x.placements[0].dim
        part = x.to_local().movedim(dim, -1)
        part = pad(part, (0, ranks.chunk(x.shape[dim]) - part.shape[-1]))
        parts = ranks.gather(part.flatten()).view(ranks.size, *part.shape)
        if ranks.rank > 0:
            return None
        return torch.cat(list(parts), -1)[..., : x.shape[dim]].movedim(-1, dim).contiguous()

    return tree_map(whole, state)


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock, read when all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def add_figure_flags(group: argparse._ArgumentGroup) -> None:
    """--plot and --tensorboard."""
    text = "CSV files of earlier runs, to be drawn into the same picture"
    group.add_argument("--plot", type=Path, nargs="+", metavar="CSV", default=[], help=text)
    text = "write the figures of the CSV for TensorBoard, too, into a folder of this run in DIR"
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help=text)


class TensorBoard:
    """The figures of a run as scalars, row by row, in a folder that a resumed run goes on with."""

    def __init__(self, folder: Path | None, run: str):
        """In the folder `run` of `folder`, or nowhere. Raises UserError if that can't be."""
        self.folder, self.writer = folder and folder / run, None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard needs the package tensorboard: install it with 'pip install "
                "tensorboard', or leave the flag out"
            ) from error
        self.start = SummaryWriter
        check_folder(self.folder, "--tensorboard")

    def write(self, history: list[dict[str, Any]]) -> None:
        """Adds the last row, and those before it to a folder that has none. To be called before the
        state is saved: a row that was written but not saved is replaced when the run goes on."""
        if self.folder is None or not is_first():
            return
        first = len(history)
        try:
            if self.writer is None:
                first = first if any(self.folder.glob("events.*")) else 1
                self.writer = self.start(self.folder, purge_step=first)
            for step, row in enumerate(history[first - 1 :], start=first):
                for name, value in row.items():
                    if value is not None:
                        self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except OSError as error:
            raise UserError(f"cannot write into --tensorboard {self.folder}: {error}") from error


# --- pictures -------------------------------------------------------------------------------

# A run, by its name: rows of figures. Lines that the colour-blind tell apart, and anyone in print.
Runs = list[tuple[str, list[dict[str, Any]]]]
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
STYLES = tuple(zip(COLORS, "os^Dvx", ("-", "--", "-.", ":", "-", "--"), strict=True))


def read_runs(paths: list[Path], largest: dict[str, float | None]) -> Runs:
    """From the CSVs of earlier runs the columns in `largest`, which says what they may hold beside
    0 at least (None: anything), where all are filled. Raises UserError if a file is no such CSV."""
    runs = []
    for path in paths:
        if path.exists() and not path.is_file():  # such as a pipe, which may never end
            raise UserError(f"--plot {path} is no file")
        try:
            with open(path, newline="") as file:
                texts = [[row[name] for name in largest] for row in csv.DictReader(file)]
            rows = [dict(zip(largest, map(float, row), strict=True)) for row in texts if all(row)]
        except OSError as error:
            raise UserError(f"--plot {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"--plot {path} is no CSV that this script has written") from error
        limits = [(row[name], most) for row in rows for name, most in largest.items()]
        if not rows or not all(most is None or 0 <= value <= most for value, most in limits):
            raise UserError(f"--plot {path} does not hold {', '.join(largest)} of a run")
        runs.append((str(path.with_suffix("")), rows))
    return runs


def save_curves(runs: Runs, path: Path) -> None:
    """Draws loss and accuracy against epochs and against time, two lines a run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for (name, rows), (color, marker, _) in zip(runs, itertools.cycle(STYLES), strict=False):
        epochs = [row["epoch"] for row in rows]
        seconds = list(itertools.accumulate(row["seconds"] for row in rows))
        for axes, figures in zip(grid, ("loss", "accuracy"), strict=True):
            for split, line in (("train", "--"), ("test", "-")):
                style = {"linestyle": line, "color": color, "marker": marker, "markersize": 4}
                values = [row[f"{split}_{figures}"] for row in rows]
                axes[0].plot(epochs, values, **style, label=f"{name}, {split}")
                axes[1].plot(seconds, values, **style)
    for axes, label in zip(grid, ("Loss (nats)", "Accuracy (%)"), strict=True):
        axes[0].set_ylabel(label)
    for axes, label in zip(grid[1], ("Epoch", "Time in training (s)"), strict=True):
        axes.set_xlabel(label)
    grid[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    lines = grid[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=min(3, len(runs)))
    save_atomically(path, lambda file: figure.savefig(file, format="png", dpi=200))


# --- the command line -----------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All flags. One that is not given is None, so that defaults and --resume can tell."""
    parser = Parser(
        prog="main_optim.py",
        description="Train an image classifier with M-FAC, SGD or Adam.",
        epilog="Beside the model of --save lie a .state for --resume, a .csv and a .png.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model and data").add_argument
    text = f"default: resnet20; others: {', '.join(models.MODELS)}"
    add("--model", choices=models.MODELS, metavar="MODEL", help=text)
    add("--dataset", help="a folder, or 'digits', the default: handwritten digits, embedded")
    add("--checkpoint", metavar="FILE", help="begin with the weights in it, not with random ones")

    group = "optimizer (defaults are the paper's, and others for the digits)"
    add = parser.add_argument_group(group).add_argument
    add("--optim", choices=("mfac", "sgd", "adam"), help="default: mfac")
    add("--lr", type=POSITIVE, help="learning rate at the start")
    add("--momentum", type=FRACTION, help="of sgd; of mfac, as an exponential moving average")
    add("--weightdecay", type=NOT_NEGATIVE, help="L2 decay: part of the gradient")
    add("--ngrads", type=COUNT, help="mfac: gradients in the window, of 4 bytes a weight")
    text = "mfac: type of the numbers in the window; default: float32, bfloat16 takes half of that"
    add("--window_dtype", choices=("float32", "bfloat16"), help=text)
    text = (
        "mfac: keep only this part of each gradient, its largest entries, and add the rest to the "
    )
    text += "next one; 0.01 takes 2%% of the memory; default: keep all"
    add("--compress", type=FACTOR, metavar="FRACTION", help=text)
    add("--damp", type=POSITIVE, help="mfac: damping of the Fisher matrix")

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=COUNT, help="passes over the training images")
    add("--batchsize", type=COUNT, help="images a step")
    add(
        "--schedule",
        choices=("step", "linear", "cosine"),
        help="of the learning rate: the steps of --drop_at (default), or falling to zero",
    )
    text = "epochs after which it drops; default: 50%% and 75%% of all"
    add("--drop_at", type=COUNT, nargs="+", metavar="EPOCH", help=text)
    add("--drop_by", type=FACTOR, help="the factor of a drop; default: 0.1")
    text = (
        "test and save a moving average of the weights, which keeps this part of itself each step"
    )
    add("--ema", type=FRACTION, metavar="DECAY", help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=SEED, help="of the weights and of the order of the images; default: 0")
    add("--device", help="default: cuda if there is one, otherwise cpu")
    add("--amp", action="store_true", default=None, help="forward in bfloat16 where that is safe")

    group = parser.add_argument_group("files")
    text = "the model file, .pth or .pt; default: runs/MODEL-DATASET-OPTIM.pth"
    group.add_argument("--save", type=Path, help=text)
    add = group.add_mutually_exclusive_group().add_argument
    text = "go on with the run of --save, if there is one, after the last epoch that it saved"
    add("--resume", action="store_true", help=text)
    add("--overwrite", action="store_true", help="begin anew, whatever is at --save")
    add_figure_flags(group)
    return parser


def choose_settings(given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a new run, where `given` are those of the command line. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**COMMON, "device": device, **given}
    optim, schedule = settings["optim"], settings["schedule"]
    defaults = DEFAULTS["digits" if settings["dataset"] == "digits" else "paper", optim]
    for name in ("momentum", "ngrads", "damp", *WINDOW):
        if name in given and name not in defaults:
            raise UserError(f"--{name} is no setting of --optim {optim}: leave it out")
    family = next((name for name in PAPER_EPOCHS if settings["model"].startswith(name)), "resnet")
    compressed = COMPRESSED if "compress" in given else {}
    settings = {"epochs": PAPER_EPOCHS[family], **defaults, **compressed, **settings}
    if schedule == "step":
        drops = [math.ceil(settings["epochs"] * part) for part in (0.5, 0.75)]
        settings = {"drop_at": drops, "drop_by": 0.1, **settings}
        if settings["drop_at"] != drops and max(settings["drop_at"]) >= settings["epochs"]:
            raise UserError(
                f"--drop_at {max(settings['drop_at'])} never comes: choose epochs below --epochs "
                f"{settings['epochs']}"
            )
    elif given.keys() & {"drop_at", "drop_by"}:
        raise UserError(f"--drop_at and --drop_by are not for --schedule {schedule}")
    return settings


def check_same(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises UserError if a flag asks for something else than the run that is gone on with."""
    for name, value in given.items():
        if saved.get(name) != value:
            raise UserError(
                f"--{name} {value} differs from the saved run, which has {saved.get(name)}: leave "
                "it out, or begin another run"
            )


# --- a run ----------------------------------------------------------------------------------


def learning_rate_factor(settings: dict[str, Any], steps_per_epoch: int) -> Callable[[int], float]:
    """The factor of the learning rate as a function of the steps done."""
    total = settings["epochs"] * steps_per_epoch
    if settings["schedule"] == "linear":
        return lambda step: 1 - step / total
    if settings["schedule"] == "cosine":
        return lambda step: (1 + math.cos(math.pi * step / total)) / 2
    drops = [epoch * steps_per_epoch for epoch in settings["drop_at"]]
    return lambda step: settings["drop_by"] ** sum(step >= drop for drop in drops)


def build_optimizer(
    model: nn.Module, settings: dict[str, Any], device: torch.device, ranks: Ranks
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer of `settings`, and what to tell of its memory. Raises UserError if the window
    of mfac can't fit."""
    options = {"lr": settings["lr"], "weight_decay": settings["weightdecay"]}
    if settings["optim"] == "adam":
        return torch.optim.Adam(model.parameters(), **options), ""
    options["momentum"] = settings["momentum"]
    if settings["optim"] == "sgd":
        return torch.optim.SGD(model.parameters(), **options), ""
    m, d = settings["ngrads"], sum(weight.numel() for weight in model.parameters())
    chosen = {name: settings.get(name, default) for name, default in WINDOW.items()}
    free = available_memory(device)

    def needed(m: int = m, **others: Any) -> int:
        window = {**chosen, **others}
        dtype = getattr(torch, window["window_dtype"])
        options = {"compress": window["compress"], "world_size": ranks.size}
        return window_bytes(m, d, dtype=dtype, **options)

    where = f" in each of {ranks.size} processes" if ranks.size > 1 else ""
    size = f"a window of {m:,} gradients of {d:,} weights takes {needed() / 2**30:.2f} GiB{where}"
    if needed() > free:
        smaller = {"window_dtype": "bfloat16", "compress": 0.01}
        advice = [
            f"--{name} {value}, or "
            for name, value in smaller.items()
            if chosen[name] == WINDOW[name] and needed(**{name: value}) <= free
        ]
        fits = bisect.bisect(range(min(m, free)), free, key=needed) - 1
        raise UserError(
            f"{size}, but {device} has {free / 2**30:.2f} GiB free: use "
            f"{''.join(advice[:1])}at most --ngrads {fits}"
        )
    options |= {"ngrads": m, "damp": settings["damp"], "compress": chosen["compress"]}
    options["window_dtype"] = getattr(torch, chosen["window_dtype"])
    return MFAC(model.parameters(), **options), size


class Run:
    """A training run: all that a step needs, and the files that keep it."""

    STATEFUL = ("model", "optimizer", "scheduler", "tested")

    def __init__(self, args: argparse.Namespace):
        """Begins a run or goes on with a saved one. Whatever can be checked is checked here, and
        nothing is written but the folder. Raises UserError, and OSError or ValueError from what it
        uses."""
        files = ("save", "resume", "overwrite", "plot", "tensorboard")
        given = {k: v for k, v in vars(args).items() if v is not None and k not in files}
        names = {**COMMON, **given}
        data = Path(names["dataset"]).resolve().name
        self.path = args.save or Path("runs", f"{names['model']}-{data}-{names['optim']}.pth")
        if self.path.suffix not in (".pth", ".pt"):
            raise UserError(f"--save {self.path} must end in .pth or .pt")
        self.state_path = self.path.with_suffix(".state")
        self.tensorboard = TensorBoard(args.tensorboard, self.path.stem)
        self.others = read_runs(args.plot, DRAWN)
        state = self.check_files(args.resume, args.overwrite)
        if state:
            check_same(given, state["settings"])
        self.settings = settings = state["settings"] if state else choose_settings(given)

        self.device = find_device(settings["device"])
        self.data = datautils.load(settings["dataset"])
        self.ranks = find_ranks()
        options = {"batch_size": settings["batchsize"], "seed": settings["seed"]}
        options["part"] = (self.ranks.rank, self.ranks.size)
        self.train_loader = self.data.loader("train", **options)
        self.test_loader = self.data.loader("test", **options)
        if (self.train_loader.num_samples - 1) % settings["batchsize"] == 0:
            raise UserError(
                f"--batchsize {settings['batchsize']} leaves a batch of one of the "
                f"{self.train_loader.num_samples:,} images, too few for batch norm: choose another"
            )
        torch.manual_seed(settings["seed"])
        model = models.build(settings["model"], self.data.num_classes)
        if "checkpoint" in settings and not state:
            models.load_checkpoint(model, settings["checkpoint"])
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.trained = distributed(self.model, self.ranks)
        self.optimizer, memory = build_optimizer(self.model, settings, self.device, self.ranks)
        self.tested = self.model  # and saved
        if "ema" in settings:
            average = get_ema_multi_avg_fn(settings["ema"])
            self.tested = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            self.optimizer.register_step_post_hook(
                lambda *_: self.tested.update_parameters(self.model)
            )
        factor = learning_rate_factor(settings, len(self.train_loader))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.history = []  # a dict an epoch, the rows of the CSV
        if state:
            self.restore(state)
        size = tensor_bytes([self.model.state_dict(), self.optimizer.state_dict()])
        check_space(self.state_path, size if state else 2 * size)
        if memory:
            note(memory)
        if state:
            note(f"going on after epoch {len(self.history)} of {settings['epochs']}")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def check_files(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The saved state, if there is one to go on with. Raises UserError if it is none, or if
        files would be lost."""
        check_folder(self.path.parent, "--save")
        beside = [self.path.with_suffix(suffix) for suffix in (".csv", ".png")]
        exist = [path for path in (self.state_path, self.path, *beside) if path.exists()]
        if folders := [path for path in exist if path.is_dir()]:
            raise UserError(f"{folders[0]} is a folder: choose another --save")
        if resume and self.state_path.exists():
            state = load_saved(self.state_path, mmap=True)  # a window must not be there twice
            wanted = {"settings", "classes", "history", *self.STATEFUL}
            settings = None
            if isinstance(state, dict) and state.keys() == wanted:
                settings = saved_settings(state["settings"], build_parser(), choose_settings)
            if settings is None:
                raise UserError(f"{self.state_path} was not saved by this script")
            return {**state, "settings": settings}
        if resume and exist:
            raise UserError(f"{exist[0]} is there but {self.state_path}, to go on from, is not")
        if exist and not overwrite:
            raise UserError(
                f"{exist[0]} exists: go on with --resume, replace it with --overwrite, or choose "
                "another --save"
            )
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was saved. Raises UserError if it does not fit."""
        if state["classes"] != self.data.classes:
            raise UserError(f"{self.settings['dataset']} has other classes than the saved run")
        try:
            if not are_rows(state["history"], COLUMNS, self.settings["epochs"]):
                raise ValueError("the figures of the epochs are others")
            for part in self.STATEFUL:
                if part == "optimizer":
                    load_optimizer(self.optimizer, state[part])
                elif alike(state[part], getattr(self, part).state_dict()):
                    getattr(self, part).load_state_dict(state[part])
                else:
                    raise ValueError(f"the {part} is another one")
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.state_path} does not fit the run: {first}") from error
        self.history = state["history"]

    def train(self) -> None:
        """All epochs that are left, then the curves."""
        shown = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        say(f"# {shown}")
        epochs = self.settings["epochs"]
        how = {"device": self.device, "ranks": self.ranks, "amp": self.settings["amp"]}
        for epoch in range(len(self.history), epochs):
            # Like the order of the images a function of seed and epoch, so there is none to save.
            torch.manual_seed(self.settings["seed"] + epoch)
            self.train_loader.set_epoch(epoch)
            title = f"epoch {epoch + 1}/{epochs}"
            row = {"epoch": epoch + 1, "lr": float(self.optimizer.param_groups[0]["lr"])}
            parts = self.trained, self.train_loader, self.optimizer, self.scheduler
            row |= train_epoch(*parts, title=title, **how)
            loss, accuracy = evaluate(self.tested, self.test_loader, **how)
            row |= {"test_loss": loss, "test_accuracy": accuracy}
            self.tensorboard.write([*self.history, row])
            self.save_state([*self.history, row])
            self.history.append(row)
            self.save_results()
            say(
                f"{title}  lr {row['lr']:.4g}  loss {row['train_loss']:.4f}  "
                f"train {row['train_accuracy']:.2f} %  test {accuracy:.2f} %  "
                f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s  "
                f"optimizer {row['optimizer_seconds']:.1f} s"
            )
        self.save_results()  # again: a run that goes on may have been killed before it came to it
        if self.ranks.rank == 0:
            runs = [(str(self.path.with_suffix("")), self.history), *self.others]
            save_curves(runs, self.path.with_suffix(".png"))

    def save_state(self, history: list[dict[str, float]]) -> None:
        """Writes what --resume needs, from which the other files can be made again."""
        state = {"settings": self.settings, "classes": self.data.classes, "history": history}
        for part in self.STATEFUL:
            state[part] = gathered(getattr(self, part).state_dict(), self.ranks)
        if self.ranks.rank == 0:
            save_atomically(self.state_path, lambda file: torch.save(state, file))

    def save_results(self) -> None:
        """Writes the model, on the CPU and in plain memory order, and the CSV."""
        if self.ranks.rank > 0:
            return
        weights = getattr(self.tested, "module", self.tested).state_dict()
        model = {
            "state_dict": {name: weight.cpu().contiguous() for name, weight in weights.items()},
            "model": self.settings["model"],
            "classes": self.data.classes,
            "accuracy": self.history[-1]["test_accuracy"],
        }
        save_atomically(self.path, lambda file: torch.save(model, file))
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self.history)
        csv_path = self.path.with_suffix(".csv")
        save_atomically(csv_path, lambda file: file.write(text.getvalue().encode()))


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line, or `argv`, says."""
    parser, run = build_parser(), None
    try:
        args = parser.parse_args(argv)
        try:
            run = Run(args)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        run.train()
    except (UserError, datautils.DataError) as error:
        parser.fail(str(error))
    except torch.OutOfMemoryError:
        parser.fail("the GPU's memory is full: use a smaller --batchsize or --ngrads")
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        parser.exit(1, f"{parser.prog}: error: {LOST}\n")
    except KeyboardInterrupt:
        saved = f"; saved: {run.path}, to go on with --resume" if run and run.history else ""
        note("\ninterrupted" + (saved or " before an epoch was saved"))
        parser.exit(130)


if __name__ == "__main__":
    main()
