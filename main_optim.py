"""Train an image classifier with M-FAC, SGD or Adam.

    python3 main_optim.py --model resnet20 --dataset DATASET --optim mfac --ngrads 512 \\
        --weightdecay .003 --batchsize 128 --save rn20-mfac.pth > rn20-mfac.txt

One line an epoch goes to standard output. Four files lie side by side, all but the curves
rewritten after each epoch: the model (--save), and with the same stem the training state
(.state), the figures of each epoch (.csv) and the curves (.png, at the end). Every file is
derived from the training state, which is written first: a run killed at any moment goes on with
--resume to the same bits as an uninterrupted one (on the CPU, with as many threads).
"""

import argparse
import bisect
import csv
import io
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

# OpenMP's threads spin while they wait, which makes a training step up to ten times slower as
# soon as anything else runs on the machine. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import datautils
import models
from optim import MFAC, window_bytes

# What a flag is when it is not given, by data and optimizer: the paper's values, and for the
# digits those of a small search. A setting that a row lacks is none of that optimizer's.
DEFAULTS = {
    ("paper", "sgd"): dict(lr=0.1, momentum=0.9, weightdecay=5e-4, batchsize=128),
    ("paper", "adam"): dict(lr=1e-3, weightdecay=5e-4, batchsize=128),
    ("paper", "mfac"): dict(
        lr=1e-3, momentum=0.0, weightdecay=3e-3, batchsize=128, ngrads=1024, damp=1e-5
    ),
    ("digits", "sgd"): dict(epochs=10, lr=0.1, momentum=0.9, weightdecay=5e-4, batchsize=64),
    ("digits", "adam"): dict(epochs=10, lr=3e-3, weightdecay=5e-4, batchsize=64),
    ("digits", "mfac"): dict(
        epochs=10, lr=3e-3, momentum=0.9, weightdecay=5e-4, batchsize=64, ngrads=128, damp=1e-5
    ),
}
PAPER_EPOCHS = {"resnet": 164, "mobilenet": 100}  # by the start of the model's name
PAPER_EPOCHS_OTHERS = 200  # Wide ResNets


class UserError(Exception):
    """A mistake of the user or a limit of the machine: one sentence, exit status 2."""


# --- shared with main_prun.py ---------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage."""

    def error(self, message: str):
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


COUNT = number(int, "a whole number from 1", lambda value: value >= 1)
SEED = number(int, "a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
POSITIVE = number(float, "a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = number(float, "a number from 0", lambda value: 0 <= value < math.inf)
FRACTION = number(float, "a number from 0 and below 1", lambda value: 0 <= value < 1)


def save_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` by what `write` puts into a file: after a crash at any moment `path` holds
    the old content or the new, never a part. Raises UserError when it can't be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_saved(path: Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, on the CPU. Raises UserError when it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no end to what a damaged file can set off
        raise UserError(f"cannot read {path}, it is damaged or no checkpoint") from error


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all the memory there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA if there is any. Raises UserError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not available here, use cpu or cuda") from error
    return device


def batches(loader: Iterable, device: torch.device, title: str):
    """The batches of `loader` on `device`, with a progress bar on a terminal."""
    for images, labels in (bar := tqdm(loader, title, leave=False, disable=None)):
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        yield bar, images, labels.to(device, non_blocking=True)


def train_epoch(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    device: torch.device,
    amp: bool = False,
    title: str = "train",
) -> dict[str, float]:
    """One pass over `loader`; `scheduler` takes a step a batch. Returns the mean loss and the
    accuracy (%) of the batches as they were trained on, the seconds, images a second, and the
    seconds within optimizer.step(). Raises UserError when the loss is no longer finite."""
    model.train()
    loss_sum, correct, seen, optimizer_seconds = 0.0, 0, 0, 0.0
    start = time.perf_counter()
    for bar, images, labels in batches(loader, device, title):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            outputs = model(images)
            loss = cross_entropy(outputs, labels)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss became {loss.item()}: lower --lr, or raise --damp of mfac")
        optimizer.zero_grad()
        loss.backward()
        before = synchronized_time(device)
        optimizer.step()
        optimizer_seconds += synchronized_time(device) - before
        scheduler.step()
        loss_sum += loss.item() * len(labels)
        correct += (outputs.argmax(1) == labels).sum().item()
        seen += len(labels)
        bar.set_postfix(loss=loss_sum / seen, accuracy=100 * correct / seen, refresh=False)
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss_sum / seen,
        "train_accuracy": 100 * correct / seen,
        "seconds": seconds,
        "images_per_second": seen / seconds,
        "optimizer_seconds": optimizer_seconds,
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable, *, device: torch.device, amp: bool = False
) -> tuple[float, float]:
    """Mean loss and accuracy (%) over `loader`. The model is left as it was found."""
    training = model.training
    model.eval()
    loss_sum, correct, seen = 0.0, 0, 0
    for _, images, labels in batches(loader, device, "test"):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            outputs = model(images)
        loss_sum += cross_entropy(outputs.float(), labels, reduction="sum").item()
        correct += (outputs.argmax(1) == labels).sum().item()
        seen += len(labels)
    model.train(training)
    return loss_sum / seen, 100 * correct / seen


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock, read when all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- the command line -----------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All flags; one that is not given is None, so that --resume and defaults can tell."""
    parser = Parser(
        prog="main_optim.py", description="Train an image classifier.", allow_abbrev=False
    )
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", choices=sorted(models.MODELS), help="default: resnet20")
    group.add_argument(
        "--dataset",
        help="'digits' (the default: handwritten digits, works offline), or the path of a data "
        "set, whose kind is found from what lies there",
    )
    group = parser.add_argument_group("optimizer (defaults: the paper's, smaller for digits)")
    group.add_argument("--optim", choices=["mfac", "sgd", "adam"], help="default: mfac")
    group.add_argument("--lr", type=POSITIVE, help="learning rate at the start")
    group.add_argument(
        "--momentum",
        type=FRACTION,
        help="of sgd, or of mfac, where it is an exponential moving average",
    )
    group.add_argument("--weightdecay", type=NOT_NEGATIVE, help="L2, part of the gradient")
    group.add_argument(
        "--ngrads", type=COUNT, help="mfac: gradients in the window, memory 4*ngrads*d"
    )
    group.add_argument("--damp", type=POSITIVE, help="mfac: damping of the Fisher matrix")
    group = parser.add_argument_group("schedule")
    group.add_argument("--epochs", type=COUNT, help="passes over the training images")
    group.add_argument("--batchsize", type=COUNT, help="images a step")
    group.add_argument(
        "--schedule",
        choices=["step", "linear", "cosine"],
        help="of the learning rate: step (the default) drops it at --drop_at by --drop_by, "
        "linear and cosine let it fall to zero over all steps",
    )
    group.add_argument(
        "--drop_at",
        type=COUNT,
        nargs="+",
        metavar="EPOCH",
        help="epochs after which the learning rate drops; default: 50%% and 75%% of the epochs",
    )
    group.add_argument("--drop_by", type=FRACTION, help="factor of a drop; default: 0.1")
    group = parser.add_argument_group("machine")
    group.add_argument("--seed", type=SEED, help="default: 0")
    group.add_argument("--device", help="default: cuda if there is one, otherwise cpu")
    group.add_argument(
        "--amp", action="store_true", default=None, help="forward pass in bfloat16 autocast"
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "--save",
        type=Path,
        help="model file, .pth or .pt; .state, .csv and .png of the same stem lie beside it; "
        "default: runs/MODEL-DATASET-OPTIM.pth",
    )
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of --save after its last full epoch, with its settings",
    )
    exclusive.add_argument(
        "--overwrite", action="store_true", help="begin anew even if the files of --save exist"
    )
    return parser


def choose_settings(args: argparse.Namespace, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Every setting of the run: as saved, or as given, or by default. Raises UserError."""
    files = ("save", "resume", "overwrite")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in files}
    if saved is not None:
        for name, value in given.items():
            if saved.get(name) != value:
                raise UserError(
                    f"--{name} {value} is not that of the saved run, {saved.get(name)}: leave it "
                    "out, or begin another run with another --save"
                )
        return saved
    settings = {"model": "resnet20", "dataset": "digits", "optim": "mfac", "seed": 0, "amp": False}
    settings |= {"schedule": "step", "device": "cuda" if torch.cuda.is_available() else "cpu"}
    settings |= given
    model, optim = settings["model"], settings["optim"]
    known = "digits" if settings["dataset"] == "digits" else "paper"
    row = dict(DEFAULTS[known, optim])
    for name in {"momentum", "ngrads", "damp"} & given.keys() - row.keys():
        raise UserError(f"--{name} is no setting of --optim {optim}")
    family = next((name for name in PAPER_EPOCHS if model.startswith(name)), None)
    settings = {"epochs": PAPER_EPOCHS.get(family, PAPER_EPOCHS_OTHERS)} | row | settings
    epochs = settings["epochs"]
    if settings["schedule"] == "step":
        halves = [math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)]
        settings = {"drop_at": halves, "drop_by": 0.1} | settings
        if "drop_at" in given and max(given["drop_at"]) >= epochs:
            raise UserError(f"--drop_at {max(given['drop_at'])} is not below --epochs {epochs}")
    elif given.keys() & {"drop_at", "drop_by"}:
        raise UserError(f"--drop_at and --drop_by are no settings of {settings['schedule']}")
    return settings


def learning_rate_factor(settings: dict[str, Any], steps_per_epoch: int) -> Callable[[int], float]:
    """The factor of the learning rate as a function of the steps done."""
    total = settings["epochs"] * steps_per_epoch
    if settings["schedule"] == "linear":
        return lambda step: 1 - step / total
    if settings["schedule"] == "cosine":
        return lambda step: (1 + math.cos(math.pi * step / total)) / 2
    drops = [epoch * steps_per_epoch for epoch in settings["drop_at"]]
    return lambda step: settings["drop_by"] ** sum(step >= drop for drop in drops)


def build_optimizer(model: nn.Module, settings: dict[str, Any], device: torch.device):
    """The optimizer of `settings`. Raises UserError when the window of mfac can't fit."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    common = {"lr": settings["lr"], "weight_decay": settings["weightdecay"]}
    if settings["optim"] == "adam":
        return torch.optim.Adam(weights, **common)
    common["momentum"] = settings["momentum"]
    if settings["optim"] == "sgd":
        return torch.optim.SGD(weights, **common)

    ngrads, dim = settings["ngrads"], sum(weight.numel() for weight in weights)
    needed, free = window_bytes(ngrads, dim), available_memory(device)
    size = f"the window of {ngrads} gradients of {dim:,} weights takes {needed / 2**30:.2f} GiB"
    note(f"{size}, {free / 2**30:.2f} GiB are free on {device}")
    if needed > free:
        fits = bisect.bisect(range(ngrads), free, key=lambda m: window_bytes(m, dim)) - 1
        raise UserError(f"{size} and {free / 2**30:.2f} are free: use --ngrads {fits} or fewer")
    return MFAC(weights, ngrads=ngrads, damp=settings["damp"], moddev=device, **common)


def note(message: str) -> None:
    """Tell the user something that is no result."""
    print(message, file=sys.stderr, flush=True)


# --- a run ----------------------------------------------------------------------------------


class Run:
    """A training run: everything that a step needs, and the files that keep it."""

    def __init__(self, args: argparse.Namespace):
        """Check everything that can be checked before work is done. Raises UserError, or
        ValueError from the data, the model or the optimizer."""
        defaults = {"model": "resnet20", "dataset": "digits", "optim": "mfac"}
        name = [vars(args)[key] or default for key, default in defaults.items()]
        name[1] = Path(name[1]).resolve().name
        self.path = args.save or Path("runs", "-".join(name) + ".pth")
        self.state_path = self.path.with_suffix(".state")
        state = self.check_files(args)
        self.settings = choose_settings(args, state and state["settings"])
        self.device = parse_device(self.settings["device"])
        self.data = datautils.load(self.settings["dataset"])
        options = {"batch_size": self.settings["batchsize"], "seed": self.settings["seed"]}
        self.train_loader = self.data.loader("train", **options)
        self.test_loader = self.data.loader("test", **options)
        torch.manual_seed(self.settings["seed"])
        model = models.build(self.settings["model"], self.data.num_classes)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, self.settings, self.device)
        factor = learning_rate_factor(self.settings, len(self.train_loader))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.history = []  # a dict an epoch: the columns of the CSV
        if state:
            if state["classes"] != self.data.classes:
                raise UserError(f"{self.settings['dataset']} is not the data of {self.state_path}")
            for part in ("model", "optimizer", "scheduler"):
                getattr(self, part).load_state_dict(state[part])
            self.history = state["history"]

    def check_files(self, args: argparse.Namespace) -> dict[str, Any] | None:
        """The saved state to go on from, if any. Raises UserError when a file of another run
        would be lost, or can't be written."""
        if self.path.suffix not in (".pth", ".pt"):
            raise UserError(f"--save {self.path} must end in .pth or .pt")
        paths = [self.path.with_suffix(suffix) for suffix in (self.path.suffix, ".csv", ".png")]
        if args.resume and self.state_path.exists():
            state = load_saved(self.state_path)
            if not isinstance(state, dict) or not state.keys() >= {"settings", "history"}:
                raise UserError(f"{self.state_path} is no training state of this script")
            return state
        exist = [path for path in [self.state_path, *paths] if path.exists()]
        if exist and args.resume:
            raise UserError(f"{exist[0]} exists without {self.state_path}, which --resume needs")
        if exist and not args.overwrite:
            raise UserError(
                f"{exist[0]} exists: go on with --resume, replace it with --overwrite, or choose "
                "another --save"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.path.parent}: {error.strerror}") from error
        if not os.access(self.path.parent, os.W_OK):
            raise UserError(f"cannot write into {self.path.parent}")
        return None

    def train(self) -> None:
        """All epochs that are left, then the curves."""
        shown = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        print(f"# {shown}", flush=True)
        on_device = {"device": self.device, "amp": self.settings["amp"]}
        epochs = self.settings["epochs"]
        for epoch in range(len(self.history), epochs):
            # Like the order of the images, an epoch's random numbers depend on nothing before.
            torch.manual_seed(self.settings["seed"] + epoch)
            self.train_loader.set_epoch(epoch)
            row = {"epoch": epoch + 1, "lr": float(self.optimizer.param_groups[0]["lr"])}
            title = f"epoch {epoch + 1}/{epochs}"
            row |= train_epoch(
                self.model,
                self.train_loader,
                self.optimizer,
                self.scheduler,
                title=title,
                **on_device,
            )
            loss, accuracy = evaluate(self.model, self.test_loader, **on_device)
            row |= {"test_loss": loss, "test_accuracy": accuracy}
            self.history.append(row)
            self.save_state()
            self.save_results()
            print(
                f"{title}  lr {row['lr']:.4g}  loss {row['train_loss']:.4f}  "
                f"train {row['train_accuracy']:.2f} %  test {accuracy:.2f} %  "
                f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s  "
                f"optimizer {row['optimizer_seconds']:.1f} s",
                flush=True,
            )
        self.save_results()  # once more: the last run may have ended before it came to it
        save_curves(self.history, self.path.with_suffix(".png"), title=self.path.stem)

    def save_state(self) -> None:
        """Write the training state."""
        state = {"settings": self.settings, "classes": self.data.classes, "history": self.history}
        for part in ("model", "optimizer", "scheduler"):
            state[part] = getattr(self, part).state_dict()
        save_atomically(self.state_path, lambda file: torch.save(state, file))

    def save_results(self) -> None:
        """Write the model and the CSV."""
        weights = self.model.state_dict()
        model = {
            "state_dict": {name: weight.cpu().contiguous() for name, weight in weights.items()},
            "model": self.settings["model"],
            "classes": self.data.classes,
            "accuracy": self.history[-1]["test_accuracy"],
        }
        save_atomically(self.path, lambda file: torch.save(model, file))
        table = io.StringIO()
        writer = csv.DictWriter(table, self.history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        text = table.getvalue().encode()
        save_atomically(self.path.with_suffix(".csv"), lambda file: file.write(text))


def save_curves(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Draw loss and accuracy against epochs. Lines differ in colour (safe for the colour-blind)
    and in style (for print)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, name, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("Loss", "Accuracy (%)"), strict=True
    ):
        for split, style, color in (("train", "s--", "#0072B2"), ("test", "o-", "#D55E00")):
            values = [row[f"{split}_{name}"] for row in history]
            axes.plot(epochs, values, style, color=color, markersize=3, label=split)
        axes.set(xlabel="Epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    save_atomically(path, lambda file: figure.savefig(file, format="png", dpi=200))


def main(argv: list[str] | None = None) -> None:
    """Train as `argv` (by default the command line) says."""
    parser = build_parser()
    args = parser.parse_args(argv)
    run = None
    try:
        try:
            run = Run(args)
        except ValueError as error:
            raise UserError(str(error)) from error
        run.train()
    except (UserError, datautils.DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        saved = run and run.state_path.exists()
        where = f"saved up to epoch {len(run.history)} in {run.path}" if saved else "nothing saved"
        parser.exit(130, f"\ninterrupted, {where}\n")


if __name__ == "__main__":
    main()
