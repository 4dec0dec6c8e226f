"""Train an image classifier with M-FAC, SGD, Adam or Muon.

    python3 main_optim.py --model resnet20 --dataset DATASET --optim mfac --ngrads 512 \\
        --weightdecay .003 --batchsize 128 --save rn20-mfac.pth > rn20-mfac.txt

Prints one line an epoch to standard output. Writes four files side by side:

- the model (--save);
- the training state (.state), from which all other files can be made again;
- the figures of each epoch (.csv);
- the curves (.png), with those of other runs if --plot names their CSVs.

The curves are drawn at the end, the others are written after each epoch, the state first. So a run
that is killed at any moment continues with --resume to the bits of an uninterrupted one: on the CPU
with the same number of threads, on CUDA with --deterministic. --state_every and --light_state save
time and space if the window is large. With --resume, the flags in CHANGEABLE may have other values:
more --epochs, another --lr or --damp. --model module:function trains your own model.

    torchrun --nproc-per-node N main_optim.py ...

does the same in N processes. Each has its part of every batch and of the window. The first one
prints and writes. A run may be resumed in another number of processes.
"""

import argparse
import bisect
import copy
import itertools
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# OpenMP's threads spin while they wait, which makes a training step up to ten times slower as
# soon as anything else runs on the machine. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn

import datautils
import models
from costs import available_memory
from fallback import mfac_groups
from main_common import (
    STYLES,
    Runs,
    TensorBoard,
    TrainingStep,
    UserError,
    alike,
    are_rows,
    check_existing,
    check_folder,
    check_space,
    distributed,
    evaluate,
    execute,
    find_device,
    find_ranks,
    gathered,
    load_optimizer,
    load_state,
    make_deterministic,
    note,
    read_runs,
    save_atomically,
    save_csv,
    say,
    summed_cross_entropy,
    tensor_bytes,
    train_epoch,
)
from muon import Muon
from optim import MFAC, window_bytes
from optim_settings import COMMON, WINDOW, build_parser, changed, choose_settings
from ranks import Ranks

COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "seconds", "images_per_second")
COLUMNS += ("optimizer_seconds", "test_loss", "test_accuracy")  # of the CSV

# The figures that are drawn, and their limits in the CSV of an earlier run.
DRAWN = dict(epoch=1e9, seconds=1e9, train_loss=None, test_loss=None)
DRAWN |= dict(train_accuracy=100, test_accuracy=100)


# --- a run ----------------------------------------------------------------------------------


def learning_rate_factor(settings: dict[str, Any], steps_per_epoch: int) -> Callable[[int], float]:
    """The factor of the learning rate as a function of the number of steps done."""
    total, rise = settings["epochs"] * steps_per_epoch, settings.get("warmup_steps", 1)
    drops = [epoch * steps_per_epoch for epoch in settings.get("drop_at", ())]
    fall = {
        "linear": lambda step: 1 - step / total,
        "cosine": lambda step: (1 + math.cos(math.pi * step / total)) / 2,
        "step": lambda step: settings["drop_by"] ** sum(step >= drop for drop in drops),
    }[settings["schedule"]]
    return lambda step: min(1, (step + 1) / rise) * fall(step)


def start_rates(settings: dict[str, Any]) -> list[float]:
    """The learning rate of each group at the start."""
    return [settings[name] for name in ("lr", "fallback_lr") if name in settings]


def build_optimizer(
    model: nn.Module, settings: dict[str, Any], device: torch.device, ranks: Ranks
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer of `settings`, and a sentence about its memory, which may be empty. Raises
    UserError if the window of mfac does not fit."""
    options = {"lr": settings["lr"], "weight_decay": settings["weightdecay"]}
    fused = device.type == "cuda" or None  # as a CUDA graph needs
    if settings["optim"] == "adam":
        options |= {"fused": fused, "capturable": bool(fused)}
        options["decoupled_weight_decay"] = settings.get("decoupled", False)
        return torch.optim.Adam(model.parameters(), **options), ""
    options["momentum"] = settings["momentum"]
    fallback = {"lr": settings.get("fallback_lr")}
    if "fallback_weightdecay" in settings:
        fallback["weight_decay"] = settings["fallback_weightdecay"]
    if settings["optim"] == "muon":
        return Muon(model, **options, fallback=fallback), ""
    if settings["optim"] == "sgd":
        return torch.optim.SGD(model.parameters(), **options, fused=fused), ""
    groups = [{"params": list(model.parameters())}]
    if settings.get("fallback", "none") != "none":
        momentum = {"momentum": 0.9} if settings["fallback"] == "sgd" else {}
        try:
            groups = mfac_groups(model, settings["fallback"], **fallback, **momentum)
        except ValueError as error:
            raise UserError(
                "the model has no matrix for M-FAC between its embeddings and its last layer: add "
                "--fallback none"
            ) from error
    m, d = settings["ngrads"], sum(weight.numel() for weight in groups[0]["params"])
    chosen = {name: settings[name] for name in ("window_dtype", "compress")}
    free = available_memory(device)
    if chosen["compress"] is not None and chosen["window_dtype"] == "float8_e4m3fn":
        raise UserError(
            "--compress goes with --window_dtype float32 or bfloat16, not float8_e4m3fn"
        )

    def needed(m: int = m, **others: Any) -> int:
        window = {**chosen, **others}
        dtype = getattr(torch, window["window_dtype"])
        options = {"compress": window["compress"], "world_size": ranks.size}
        return window_bytes(m, d, dtype=dtype, **options)

    where = f" in each of {ranks.size} processes" if ranks.size > 1 else ""
    size = f"a window of {m:,} gradients of {d:,} weights takes {needed() / 2**30:.2f} GiB{where}"
    if needed() > free:
        narrow = chosen["window_dtype"] == "float8_e4m3fn"
        smaller = {} if narrow else {"window_dtype": "bfloat16", "compress": 0.01}
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
    options["process_group"] = ranks.group  # each process has its part of the window
    options |= {name: settings.get(name) for name in ("max_step", "max_norm")}
    options["normalize"] = "layer" if settings.get("normalize") == "layer" else None
    options["warmup"] = settings.get("window_warmup", False)
    options["decoupled_weight_decay"] = settings.get("decoupled", False)
    return MFAC(groups, **options), size


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


class Run:
    """A training run: the parts of a step, and the files."""

    STATEFUL = ("model", "optimizer", "tested")

    def __init__(self, args: argparse.Namespace):
        """Starts a run or resumes a saved one. Makes all checks, and writes nothing except the
        folder. Raises UserError, and OSError or ValueError from what it uses."""
        files = ("save", "resume", "overwrite", "plot", "tensorboard")
        given = {k: v for k, v in vars(args).items() if v is not None and k not in files}
        names = {**COMMON, **given}
        data = Path(names["dataset"]).resolve().name
        model = names["model"].replace(":", "-")
        self.path = args.save or Path("runs", f"{model}-{data}-{names['optim']}.pth")
        self.flag = f"--save {self.path}"
        if self.path.suffix not in (".pth", ".pt"):
            raise UserError(f"--save {self.path} must end in .pth or .pt")
        self.state_path = self.path.with_suffix(".state")
        self.tensorboard = TensorBoard(args.tensorboard, self.path.stem)
        self.others = read_runs(args.plot, DRAWN)
        state = self.check_files(args.resume, args.overwrite)
        settings = changed(state["settings"], given) if state else choose_settings(given)
        self.settings = settings

        self.device = find_device(settings["device"])
        if settings["deterministic"]:
            make_deterministic()
        self.data = datautils.load(settings["dataset"])
        self.ranks = find_ranks(self.device)
        options = {"batch_size": settings["batchsize"], "seed": settings["seed"]}
        options |= {"part": (self.ranks.rank, self.ranks.size), "device": self.device}
        options["workers"] = settings.get("workers")
        self.train_loader = self.data.loader("train", **options)
        self.test_loader = self.data.loader("test", **options)
        if (self.train_loader.num_samples - 1) % settings["batchsize"] == 0:
            raise UserError(
                f"--batchsize {settings['batchsize']} leaves a batch of one of the "
                f"{self.train_loader.num_samples:,} images, too few for batch norm: choose another"
            )
        torch.manual_seed(settings["seed"])
        model = models.build(settings["model"], self.data.num_classes, self.data.shape)
        if "checkpoint" in settings and not state:
            models.load_checkpoint(model, settings["checkpoint"])
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer, memory = build_optimizer(self.model, settings, self.device, self.ranks)
        self.tested = self.model  # and saved
        if "ema" in settings:
            self.tested = copy.deepcopy(self.model)
            self.average(settings["ema"])
        if "clip" in settings:
            self.clip(settings["clip"])
        self.trained = distributed(self.model, self.ranks)
        if settings["compile"]:
            self.trained = torch.compile(self.trained, dynamic=False)
        graph = settings.get("graph") == "yes" and self.ranks.size == 1
        how = {"ranks": self.ranks, "amp": settings["amp"], "graph": graph}
        smoothing = settings.get("label_smoothing", 0.0)
        how["loss"] = partial(summed_cross_entropy, label_smoothing=smoothing)
        self.step = TrainingStep(self.trained, self.optimizer, **how)
        self.history = []  # a dict an epoch, the rows of the CSV
        if state:
            self.restore(state)
        for group, lr in zip(self.optimizer.param_groups, start_rates(settings), strict=True):
            group["initial_lr"] = lr
        steps = len(self.train_loader)
        factor, done = learning_rate_factor(settings, steps), len(self.history) * steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor, done - 1)
        size = tensor_bytes([self.model.state_dict(), self.saved_optimizer()])
        check_space(self.state_path, size if state else 2 * size)
        if memory:
            note(memory)
        if self.device.type == "cuda" and not settings["amp"]:
            note("faster: --amp, which computes in bfloat16 where that is safe")
        if state:
            note(self.describe_resumption(state))
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def average(self, decay: float) -> None:
        """Makes `tested` the moving average of the model, updated after each optimizer step."""
        pairs = zip(
            self.tested.state_dict().values(), self.model.state_dict().values(), strict=True
        )
        averages, weights = zip(*((a, w) for a, w in pairs if a.is_floating_point()), strict=True)
        self.optimizer.register_step_post_hook(
            lambda *_: torch._foreach_lerp_(averages, weights, 1 - decay)
        )

    def clip(self, norm: float) -> None:
        """Scales the gradients down to `norm` before each optimizer step."""

        def scale_down(*_: Any) -> None:
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)

        self.optimizer.register_step_pre_hook(scale_down)

    def check_files(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The state to resume from, or None. Raises UserError if the file is not a state, or if
        files would be lost."""
        check_folder(self.path.parent, "--save")
        beside = [self.path.with_suffix(suffix) for suffix in (".csv", ".png")]
        exist = [path for path in (self.state_path, self.path, *beside) if path.exists()]
        if check_existing(exist, self.state_path, "--save", resume, overwrite):
            return load_state(self.state_path, self.STATEFUL, build_parser(), choose_settings)
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a saved state. Raises UserError if it does not fit."""
        if state["classes"] != self.data.classes:
            raise UserError(
                f"{self.settings['dataset']} has other classes than the saved run: choose its data "
                "set, or another --save"
            )
        saved, epochs = state["settings"], self.settings["epochs"]
        for group in self.optimizer.param_groups:
            group["initial_lr"] = 0.0  # a saved group has one
        try:
            if not are_rows(state["history"], COLUMNS, saved["epochs"]):
                raise ValueError("the figures of the epochs are others")
            if epochs < (done := len(state["history"])):
                raise UserError(
                    f"--epochs {epochs} is less than the {done} that are done: give at least {done}"
                )
            for part in self.STATEFUL:
                if part == "optimizer":
                    if state[part] is not None or not saved.get("light_state"):
                        load_optimizer(self.optimizer, state[part])
                elif alike(state[part], getattr(self, part).state_dict()):
                    getattr(self, part).load_state_dict(state[part])
                else:
                    raise ValueError(f"the {part} is another one")
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.state_path} does not fit the run: {first}") from error
        self.history = state["history"]
        if self.settings.get("damp") != saved.get("damp"):
            self.optimizer.damp = self.settings["damp"]

    def describe_resumption(self, state: dict[str, Any]) -> str:
        """The epoch from which the run continues, and the settings that have changed."""
        saved = state["settings"]
        text = f"resumed after epoch {len(self.history)} of {self.settings['epochs']}"
        for name, value in self.settings.items():
            if saved.get(name) != value:
                text += f", with --{name} {value}, before {saved.get(name)}"
        if state["optimizer"] is None:
            text += ", with an empty window, as the state was saved with --light_state"
        return text

    def saved_optimizer(self) -> dict[str, Any] | None:
        """The optimizer's part of the state."""
        return None if self.settings.get("light_state") else self.optimizer.state_dict()

    def go(self) -> None:
        """Runs the remaining epochs, then draws the curves."""
        shown = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        say(f"# {shown}")
        epochs = self.settings["epochs"]
        how = {"device": self.device, "ranks": self.ranks}
        for epoch in range(len(self.history), epochs):
            # A function of seed and epoch, as is the order of the images: no generator to save.
            torch.manual_seed(self.settings["seed"] + epoch)
            self.train_loader.set_epoch(epoch)
            title = f"epoch {epoch + 1}/{epochs}"
            row = {"epoch": epoch + 1, "lr": float(self.optimizer.param_groups[0]["lr"])}
            parts = self.trained, self.train_loader, self.optimizer, self.scheduler
            row |= train_epoch(*parts, title=title, step=self.step, **how)
            amp = self.settings["amp"]
            loss, accuracy = evaluate(self.tested, self.test_loader, amp=amp, **how)
            row |= {"test_loss": loss, "test_accuracy": accuracy}
            history, began = [*self.history, row], time.perf_counter()
            self.tensorboard.write(history)
            if self.is_due("state_every", epoch + 1):
                self.save_state(history)
            self.history = history
            self.save_results(self.is_due("save_every", epoch + 1))
            optimizer = row["optimizer_seconds"]
            say(
                f"{title}  lr {row['lr']:.4g}  loss {row['train_loss']:.4f}  "
                f"train {row['train_accuracy']:.2f} %  test {accuracy:.2f} %  "
                f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s  "
                + (f"optimizer {optimizer:.1f} s  " if optimizer is not None else "")
                + f"saving {time.perf_counter() - began:.1f} s"
            )
        self.save_results()  # again, as a resumed run may have been killed before this
        if self.ranks.rank == 0:
            runs = [(str(self.path.with_suffix("")), self.history), *self.others]
            save_curves(runs, self.path.with_suffix(".png"))

    def is_due(self, flag: str, epoch: int) -> bool:
        """Whether to save after this epoch. The first always counts, so that --resume works."""
        return epoch in (1, self.settings["epochs"]) or epoch % self.settings[flag] == 0

    def save_state(self, history: list[dict[str, float]]) -> None:
        """Writes the state, which --resume needs and from which all other files can be made."""
        state = {"settings": self.settings, "classes": self.data.classes, "history": history}
        state |= {"model": self.model.state_dict(), "tested": self.tested.state_dict()}
        state["optimizer"] = gathered(self.saved_optimizer(), self.ranks)
        if self.ranks.rank == 0:
            save_atomically(self.state_path, lambda file: torch.save(state, file))

    def save_results(self, model_too: bool = True) -> None:
        """Writes the model, on the CPU and in plain memory order, and the CSV."""
        if self.ranks.rank > 0:
            return
        save_csv(self.path.with_suffix(".csv"), COLUMNS, self.history)
        if not model_too:
            return
        weights = self.tested.state_dict()
        model = {
            "state_dict": {name: weight.cpu().contiguous() for name, weight in weights.items()},
            "model": self.settings["model"],
            "classes": self.data.classes,
            "accuracy": self.history[-1]["test_accuracy"],
        }
        save_atomically(self.path, lambda file: torch.save(model, file))


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line says, or `argv` in place of it."""
    execute(build_parser(), Run, argv, "use a smaller --batchsize or --ngrads")


if __name__ == "__main__":
    main()
