"""What main_optim.py and main_prun.py share: flags, files that survive a kill, training, pictures.

A mistake of the user or a limit of the machine is a `UserError` with one sentence. `execute` prints
it and ends the process with exit status 2.
"""

import argparse
import atexit
import contextlib
import csv
import io
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

import datautils
import models
from models.sync import sync_batch_norm
from optim import MFAC
from ranks import Ranks, is_dtensor, local, padded, sharded_dim

ALONE = Ranks()
FORMAT = torch.channels_last  # of images
LOOK = 32  # a GPU's loss and accuracy are read every so many batches


class UserError(Exception):
    """A mistake of the user or a limit of the machine, in one sentence: exit status 2."""


# --- the command line -----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that reports an error as one sentence without the usage, once a machine."""

    def error(self, message: str):
        raise UserError(message)

    def fail(self, message: str):
        """Prints `message` and ends the process."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # the first process may say the same; then torchrun ends this one
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, rule: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: an int or float for which `allowed` holds. `rule` says that in words."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # no comparison with it holds
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {rule}")
        return value

    return convert


COUNT = number(int, "a whole number from 1 to 2^31 - 1", lambda value: 1 <= value < 2**31)
SEED = number(int, "a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
POSITIVE = number(float, "a number above 0 and up to 1e30", lambda value: 0 < value <= 1e30)
FACTOR = number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
NOT_NEGATIVE = number(float, "a number from 0 to 1e30", lambda value: 0 <= value <= 1e30)
FRACTION = number(float, "a number from 0 and below 1", lambda value: 0 <= value < 1)
WORKERS = number(int, "a whole number from 0 to 1024", lambda value: 0 <= value <= 1024)


def model_name(text: str) -> str:
    """An argparse type: a model of the registry, or module:function."""
    if text not in models.MODELS and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", text):
        names = ", ".join(models.MODELS)
        raise argparse.ArgumentTypeError(f"{text} is none of {names}, and no module:function")
    return text


def add_model_flag(group: argparse._ArgumentGroup) -> None:
    """--model."""
    text = f"default: resnet20; others: {', '.join(models.MODELS)}; or module:function, a function "
    text += "that makes your own model from the number of classes"
    group.add_argument("--model", type=model_name, metavar="MODEL", help=text)


def add_figure_flags(group: argparse._ArgumentGroup) -> None:
    """--plot and --tensorboard."""
    text = "CSV files of earlier runs, for the same picture; default: none"
    group.add_argument("--plot", type=Path, nargs="+", metavar="CSV", default=[], help=text)
    text = "also write the numbers of the CSV for TensorBoard, into a folder of this run in DIR; "
    text += "default: off"
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help=text)


def saved_settings(
    saved: Any, parser: Parser, choose: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """The saved settings with defaults for newer flags, or None if no command line gives them."""
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


def check_same(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises UserError if a flag differs from the saved run."""
    for name, value in given.items():
        if saved.get(name) != value:
            raise UserError(
                f"--{name} {value} differs from the saved run, which has {saved.get(name)}: leave "
                "it out, or start another run"
            )


def execute(
    parser: Parser, start: Callable[[argparse.Namespace], Any], argv: list[str] | None, remedy: str
) -> None:
    """Makes a run of the flags with `start`, and runs it to its end. If it stops early, prints the
    reason in one sentence. `remedy` is the advice if the GPU's memory is full."""
    run = None
    try:
        args = parser.parse_args(argv)
        try:
            run = start(args)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        run.go()
    except (UserError, datautils.DataError) as error:
        parser.fail(str(error))
    except torch.OutOfMemoryError:
        parser.fail(f"the GPU's memory is full: {remedy}")
    except RuntimeError as error:
        if "deterministic" in (reason := str(error).split(",")[0]):
            parser.fail(f"{reason}: leave out --deterministic")
        if not lost_connection(error):
            raise
        lost = "another process of this run has ended, see its message; continue with --resume"
        parser.exit(1, f"{parser.prog}: error: {lost}\n")
    except KeyboardInterrupt:
        saved = run is not None and run.history
        found = f"; continue with {run.flag} --resume" if saved else " before anything was saved"
        note(f"\ninterrupted{found}")
        parser.exit(130)


# --- files ----------------------------------------------------------------------------------


def save_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by a file that `write` fills. After a crash at any moment, `path` has the old
    content or the new, never a part. Raises UserError if it can't be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the one in the other
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path}, which is unchanged: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_saved(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU. Its tensors are mapped, so that a window is
    not in memory twice. Copy the tensors that you keep: until then the file may be replaced but not
    written to, and its space on the disk stays in use. Raises UserError if it is damaged."""
    try:
        return models.read_tensors(path, zipped=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is damaged, or was not saved by this script") from error


def check_folder(path: Path, flag: str) -> None:
    """Raises UserError unless `path`, given by `flag`, is or can become a writable folder."""
    path = path.absolute()
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{folder} is not a writable folder: choose another {flag}")


def check_existing(
    exist: list[Path], state: Path, flag: str, resume: bool, overwrite: bool
) -> bool:
    """Whether to resume from `state`. `exist` are the files of the run that exist. Raises UserError
    if files would be lost."""
    if folders := [path for path in exist if path.is_dir()]:
        raise UserError(f"{folders[0]} is a folder: choose another {flag}")
    if resume and exist and state not in exist:
        raise UserError(
            f"{exist[0]} exists, but not {state}, which --resume needs: choose another {flag}, or "
            "start over with --overwrite"
        )
    if exist and not (resume or overwrite):
        raise UserError(
            f"{exist[0]} exists: continue with --resume, replace it with --overwrite, or choose "
            f"another {flag}"
        )
    return resume and bool(exist)


def load_state(
    path: Path,
    parts: Iterable[str],
    parser: Parser,
    choose: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """A state with these parts, and with settings that a command line can give. Raises UserError if
    the file is not one."""
    state = load_saved(path)
    settings = None
    if isinstance(state, dict) and state.keys() == {"settings", "classes", "history", *parts}:
        settings = saved_settings(state["settings"], parser, choose)
    if settings is None:
        raise UserError(f"{path} was not saved by this script")
    return {**state, "settings": settings}


def alike(saved: Any, present: Any) -> bool:
    """Whether `saved` has the keys and types of `present`, and tensors of its shapes and types.
    Numbers may differ."""
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
    """Loads a state into a new optimizer. Raises ValueError if it is the state of another one."""
    expected = optimizer.state_dict()
    for group, numbers in zip(optimizer.param_groups, expected["param_groups"], strict=True):
        for weight, number in zip(group["params"], numbers["params"], strict=True):
            entries = {}  # the first step makes these
            if isinstance(optimizer, torch.optim.Adam):
                entries = {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}
            elif isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                entries = {"momentum_buffer": weight}
            if entries:
                expected["state"][number] = {**expected["state"].get(number, {}), **entries}
    others = {"lr": 0.0, "initial_lr": 0.0, "fisher": None}  # these may differ
    groups = [[group | others for group in state["param_groups"]] for state in (saved, expected)]
    if not alike(saved, expected) or groups[0] != groups[1]:
        compressed = isinstance(optimizer, MFAC) and optimizer.fisher.compress is not None
        reason = ", or the number of processes differs, which --compress does not allow"
        raise ValueError("the optimizer is another one" + (reason if compressed else ""))
    optimizer.load_state_dict(saved)
    if isinstance(optimizer, MFAC):
        return
    for entries in optimizer.state.values():  # SGD and Adam do not copy what they load
        tensors = {name: x for name, x in entries.items() if isinstance(x, torch.Tensor)}
        entries.update({name: tensor.clone() for name, tensor in tensors.items()})


def save_csv(path: Path, columns: Iterable[str], rows: list[dict[str, Any]]) -> None:
    """Writes a table, atomically."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(columns), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    save_atomically(path, lambda file: file.write(text.getvalue().encode()))


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict | list | tuple):
        return sum(map(tensor_bytes, state.values() if isinstance(state, dict) else state))
    return 0


def check_space(path: Path, size: int) -> None:
    """Raises UserError if there is no space for `size` bytes where `path` will be."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"{folder} has {free / 2**30:.2f} GiB of free space, but the state of the run needs "
            f"{size / 2**30:.2f} GiB, as there are two copies while it is replaced: make space"
        )


# --- machine and processes ------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device `name`, or for "cuda" the GPU of this process. Raises UserError if it does not
    work, or if several processes would share it."""
    try:
        device = torch.device(name)
        processes, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        most = 1 if device.index is not None else max(1, found)
        if device.type == "cuda" and processes > most:
            raise UserError(
                f"--device {name} is for one process a GPU, but there are {processes} processes "
                f"and {found} GPUs: start at most as many, with --device cuda, or use --device cpu"
            )
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        names = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"--device {name} is not one of {', '.join(names)}") from error
    return device


def make_deterministic() -> None:
    """Makes this process deterministic, on CUDA too. An operation that can't be raises
    RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging, and slow


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return os.environ.get("RANK", "0") == "0"


def find_ranks(device: torch.device | None = None) -> Ranks:
    """The processes that torchrun has started, or this one alone. They compute on `device`. Raises
    UserError if they can't connect."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("gloo" if device == torch.device("cpu") else None)
        except dist.DistError as error:
            place = ":".join(os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
            reason = "is in use" if "in use" in str(error) else "does not answer"
            raise UserError(
                f"the processes can't connect at {place}, which {reason}: start them with "
                "torchrun, or choose another MASTER_ADDR and MASTER_PORT"
            ) from error
        atexit.register(dist.destroy_process_group)  # else gloo's threads may abort the process
    return Ranks(dist.group.WORLD)


def distributed(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model, with gradients and batch norm statistics over the batches of all `ranks`."""
    if ranks.size == 1:
        return model
    return DistributedDataParallel(sync_batch_norm(model))


def lost_connection(error: RuntimeError) -> bool:
    """Whether the error means that another process is gone."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def gathered(state: Any, ranks: Ranks) -> Any:
    """A state dict with whole tensors in place of DTensors. All processes must call this, and only
    the first one gets the tensors."""

    def whole(x: Any) -> Any:
        if not is_dtensor(x):
            return x
        # Not by its full_tensor, whose threads can abort a process at its end (torch 2.14, gloo).
        dim = sharded_dim(x)
        part = padded(local(x).movedim(dim, -1), ranks.chunk(x.shape[dim]))
        parts = ranks.gather(part.flatten()).view(ranks.size, *part.shape)
        if ranks.rank > 0:
            return None
        return torch.cat(list(parts), -1)[..., : x.shape[dim]].movedim(-1, dim).contiguous()

    return tree_map(whole, state)


def say(line: str) -> None:
    """Prints a result, from the first process. Raises UserError if standard output is full or
    closed."""
    if not is_first():
        return
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for its unwritten rest
        raise UserError(f"cannot write to standard output: {error.strerror}") from error


def note(message: str) -> None:
    """Prints a message to standard error, from the first process. Results go through `say`."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


# --- a pass over the images -----------------------------------------------------------------


def progress(batches: Iterable, title: str, total: int | None = None) -> tqdm:
    """The batches, with a progress bar if the first process is on a terminal."""
    return tqdm(batches, title, total, leave=False, disable=None if is_first() else True)


def batches(loader: datautils.Loader, device: torch.device, title: str) -> Iterator[tuple]:
    """Yields the progress bar, images and labels on `device`, the size of the batch over all
    processes, and whether to read the figures now. Reading at each batch would stall a GPU."""
    bar, last = progress(loader, title), len(loader) - 1
    for number, (images, labels) in enumerate(bar):
        images = images.to(device, memory_format=FORMAT, non_blocking=True)
        size = min(loader.batch_size, loader.num_samples - number * loader.batch_size)
        look = device.type == "cpu" or number == last or number % LOOK == 0
        yield bar, images, labels.to(device, non_blocking=True), size, look


class Figures:
    """Mean loss and accuracies (%) of the batches so far, over all `ranks`."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.unread, self.seen, self.sums = ranks, [], 0, 0.0

    def add(self, sums: torch.Tensor, size: int) -> None:
        """Adds a batch of `size` images over all ranks. `sums` are of this rank: of the losses, and
        of each kind of right answer."""
        self.unread.append(sums)
        self.seen += size

    def read(self, bar: tqdm) -> list[float]:
        """Waits for the device, sums over ranks, and shows the figures in `bar`."""
        new = torch.stack(self.unread).cpu().double().sum(0)
        self.sums += self.ranks.sum(new)
        self.unread.clear()
        loss, *right = (self.sums / self.seen).tolist()
        accuracies = [100 * share for share in right]
        bar.set_postfix(loss=loss, accuracy=accuracies[0], refresh=False)
        return [loss, *accuracies]


class Stopwatch:
    """Adds up the seconds that the device spends in its `with` blocks."""

    def __init__(self, device: torch.device):
        self.marks, self.on_gpu = [], device.type == "cuda"

    def mark(self, *_: Any) -> None:
        if self.on_gpu:  # an event, which is read later: nothing waits now
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    __enter__ = __exit__ = mark

    def seconds(self) -> float:
        """The sum. On a GPU, call it after the device has finished."""
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return sum(end - start for start, end in pairs)


def summed_cross_entropy(
    images: torch.Tensor,
    outputs: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The default loss: summed over the batch."""
    return cross_entropy(outputs, labels, reduction="sum", label_smoothing=label_smoothing)


class TrainingStep:
    """Forward, backward and optimizer step for a batch. With `graph`, the first calls are eager and
    later ones replay one CUDA graph. This saves the time to launch each kernel."""

    EAGER = 3  # calls, in which libraries and optimizers allocate their buffers

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ranks: Ranks = ALONE,
        amp: bool = False,
        graph: bool = False,
        loss: Callable[..., torch.Tensor] = summed_cross_entropy,
    ):
        self.model, self.optimizer, self.ranks, self.amp = model, optimizer, ranks, amp
        self.loss = loss
        self.watch: Any = contextlib.nullcontext()  # over the optimizer
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wanted, self.calls = graph, 0
        if graph:
            device = next(model.parameters()).device
            self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
            self.stream = torch.cuda.Stream(device)  # the default stream can't be captured

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, size: int, eager: bool = False
    ) -> torch.Tensor:
        """Returns the sums (2,) of losses and of right answers for this process's part of a batch
        of `size` images. `eager` forbids the graph, which has a fixed batch size."""
        if not self.wanted:
            return self.run(images, labels, size)
        with self.rates_on_device():
            self.calls += 1
            if self.graph is None and self.calls > self.EAGER and not eager:
                self.capture(images, labels, size)
            if self.graph is None or eager:
                here = torch.cuda.current_stream()
                self.stream.wait_stream(here)
                with torch.cuda.stream(self.stream):
                    sums = self.run(images, labels, size)
                here.wait_stream(self.stream)
                return sums
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.graph.replay()
            return self.sums.clone()

    def run(self, images: torch.Tensor, labels: torch.Tensor, size: int) -> torch.Tensor:
        """The step itself. Raises UserError if the optimizer refuses the gradients."""
        self.optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.amp):
            outputs = self.model(images)
            loss = self.loss(images, outputs, labels)
        (loss * (self.ranks.size / size)).backward()  # gradients are averaged over processes
        try:
            with self.watch:
                self.optimizer.step()
        except ValueError as error:  # mfac: damping is too small for these gradients
            raise UserError(str(error)) from error
        return torch.stack([loss.detach(), (outputs.argmax(1) == labels).sum()])

    @contextlib.contextmanager
    def rates_on_device(self) -> Iterator[None]:
        """Makes the learning rates tensors, which a graph needs. Eager steps use them too, so that
        they give the same bits as replayed steps."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, on_device in zip(groups, self.rates, strict=True):
            group["lr"] = on_device.fill_(group["lr"])
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def capture(self, images: torch.Tensor, labels: torch.Tensor, size: int) -> None:
        """Captures the graph, or prints why that fails."""
        self.images, self.labels = images.clone(), labels.clone()
        self.optimizer.zero_grad()  # the graph allocates its own gradients
        watch, self.watch = self.watch, contextlib.nullcontext()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        mode: Any = "thread_local"  # loaders have threads of their own
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode):
                self.sums = self.run(self.images, self.labels, size)
            self.graph = graph
        except RuntimeError as error:
            note(f"no CUDA graph for this model and optimizer: {str(error).splitlines()[0]}")
            self.wanted = False
            torch.cuda.set_stream(here)  # a failed capture leaves its own stream current
            # It also leaves the generator in a mode in which nothing can be drawn (torch < 2.12). A
            # copy of its state has the same seed and offset, but not that mode.
            generator = torch.cuda.default_generators[self.stream.device.index]
            generator.graphsafe_set_state(generator.clone_state())
        finally:
            self.watch = watch


def train_epoch(
    model: nn.Module,
    loader: datautils.Loader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
    step: TrainingStep | None = None,
    title: str = "train",
) -> dict[str, float | None]:
    """One pass over `loader`, which yields this rank's part of each batch. Steps are by `step`, or
    eager without it; `scheduler` steps once a batch.

    Returns the mean loss and accuracy (%) during training, the seconds, images a second, and the
    seconds in optimizer.step(), or None if that is part of a graph. Raises UserError if loss or
    weights are no longer finite, or if the optimizer refuses the gradients.
    """
    model.train()
    step = step or TrainingStep(model, optimizer, ranks=ranks)
    step.watch = Stopwatch(device)
    figures, start = Figures(ranks), time.perf_counter()
    for bar, images, labels, size, look in batches(loader, device, title):
        # The last batch may be smaller, and the optimizer can raise errors in eager steps only.
        last = figures.seen + size == loader.num_samples
        figures.add(step(images, labels, size, eager=last), size)
        scheduler.step()
        if look:
            loss, accuracy = figures.read(bar)
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss}: {lower_rate(optimizer)}")
    if not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        raise UserError(f"the last step made weights NaN or Inf: {lower_rate(optimizer)}")
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss,
        "train_accuracy": accuracy,
        "seconds": seconds,
        "images_per_second": figures.seen / seconds,
        "optimizer_seconds": None if step.graph else step.watch.seconds(),
    }


def lower_rate(optimizer: torch.optim.Optimizer) -> str:
    """The advice if a training diverges."""
    return "use a lower --lr" + (", or a higher --damp" if isinstance(optimizer, MFAC) else "")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: datautils.Loader,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
    amp: bool = False,
    tops: tuple[int, ...] = (1,),
) -> list[float]:
    """Mean loss, and for each k of `tops` the top-k accuracy (%), over the parts of `loader` that
    all `ranks` have. The model's training mode stays the same."""
    training = model.training
    model.eval()
    figures = Figures(ranks)
    for bar, images, labels, size, look in batches(loader, device, "test"):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            outputs = model(images)
        loss = cross_entropy(outputs.float(), labels, reduction="sum")
        first = [outputs.topk(k).indices if k > 1 else outputs.argmax(1, True) for k in tops]
        right = [(indices == labels[:, None]).sum() for indices in first]
        figures.add(torch.stack([loss, *right]), size)
        if look:
            found = figures.read(bar)
    model.train(training)
    return found


# --- figures of runs ------------------------------------------------------------------------


# The name of each run, and its rows of figures. Lines differ for the colour-blind, and in print.
Runs = list[tuple[str, list[dict[str, Any]]]]
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
STYLES = tuple(zip(COLORS, "os^Dvx", ("-", "--", "-.", ":", "-", "--"), strict=True))


def read_runs(paths: list[Path], largest: dict[str, float | None]) -> Runs:
    """The columns `largest` of the CSVs of earlier runs, in rows where none is empty. Values must
    be from 0 to `largest`, or any number for None. Raises UserError if a file is no such CSV."""
    runs = []
    for path in paths:
        if path.exists() and not path.is_file():  # such as a pipe, which may never end
            raise UserError(f"--plot {path} is not a file: give the CSV of a run")
        try:
            with open(path, newline="") as file:
                texts = [[row[name] for name in largest] for row in csv.DictReader(file)]
            rows = [dict(zip(largest, map(float, row), strict=True)) for row in texts if all(row)]
        except OSError as error:
            raise UserError(f"--plot {path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"--plot {path} is not a CSV of this script") from error
        limits = [(row[name], most) for row in rows for name, most in largest.items()]
        if not rows or not all(most is None or 0 <= value <= most for value, most in limits):
            raise UserError(f"--plot {path} does not have {', '.join(largest)} of a run")
        runs.append((str(path.with_suffix("")), rows))
    return runs


class TensorBoard:
    """Writes the figures of a run as scalars, row by row. A resumed run continues the folder."""

    def __init__(self, folder: Path | None, run: str):
        """Writes into `folder`/`run`, or nowhere if `folder` is None. Raises UserError."""
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
        """Adds the last row, or all rows to a new folder. Call this before the state is saved: a
        row that was written but not saved is then replaced when the run is resumed."""
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
