"""Prune a trained image classifier with M-FAC or by magnitude, at once or with fine-tuning.

    python3 main_prun.py --model resnet20 --dataset DATASET --pruner mfac --ngrads 1024 \\
        --sparsities 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 --recomps 0 1 2 3 4 5 6 7 8 \\
        --tests 0 1 2 3 4 5 6 7 8

One line for the model as it is, then one a pruning step and one an epoch of fine-tuning go to
standard output. Beside each other lie, all with names that begin as --out says, the model pruned
to each level with its masks (-step0.pth, ...), the figures of every line (.csv), accuracy against
sparsity (.png, at the end, with those of other runs if --plot names their CSVs), and the state of
the run (.state). The state is written first and all else is derived from it: a run killed at any
moment goes on with --resume to the same bits as an uninterrupted one (on the CPU, with as many
threads).

    torchrun --nproc-per-node N main_prun.py ...

does the same in N processes, each of which computes its share of the gradients, of F⁻¹, of the test
and of fine-tuning. The first one writes.

Gradients for the inverse Fisher F⁻¹ are those of training images as a model is trained on them,
augmented, like in the paper's code.
"""

import argparse
import copy
import os
import re
import time
from collections.abc import Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see main_optim.py

import torch
from torch.optim.swa_utils import update_bn

import datautils
import models
from main_common import (
    COUNT,
    FACTOR,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    STYLES,
    Parser,
    Runs,
    TensorBoard,
    UserError,
    add_figure_flags,
    alike,
    are_rows,
    available_memory,
    check_existing,
    check_folder,
    check_same,
    check_space,
    distributed,
    evaluate,
    execute,
    find_device,
    find_ranks,
    gathered,
    load_optimizer,
    load_state,
    note,
    number,
    progress,
    read_runs,
    save_atomically,
    save_csv,
    say,
    tensor_bytes,
    train_epoch,
)
from optim import MFAC, window_bytes
from prun import MagnitudePruner, MFACPruner, inverse_bytes

# What a flag is when it is not given, for all runs, for --pruner mfac, and for fine-tuning.
COMMON = dict(model="resnet20", dataset="digits", pruner="mfac", pattern="unstructured")
COMMON |= dict(scope="global", nepochs=0, batchsize=128, reset_bn=False, seed=0)
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
MFAC_PRUNER = dict(ngrads=1024, damp=1e-5, blocksize=-1, update="joint", nrecomps=1)
NPERGRAD = 32
FINE_TUNING = {
    "sgd": dict(lr=0.01, momentum=0.9, weightdecay=5e-4),
    "mfac": dict(lr=1e-3, momentum=0.9, weightdecay=5e-4, ngrads=1024, damp=1e-5),
}

# The columns of the CSV, and how each is shown in a line where it is not empty.
COLUMNS = {
    "step": "step {}",
    "epoch": "epoch {}",
    "sparsity": "sparsity {:.4f}",
    "sparsity_all": "of all {:.4f}",
    "lr": "lr {:.4g}",
    "train_loss": "loss {:.4f}",
    "train_accuracy": "train {:.2f} %",
    "test_loss": "test loss {:.4f}",
    "test_accuracy": "test {:.2f} %",
    "gradients_seconds": "gradients {:.1f} s",
    "inverse_seconds": "inverse {:.1f} s",
    "update_seconds": "update {:.1f} s",
    "training_seconds": "training {:.1f} s",
    "evaluation_seconds": "evaluation {:.1f} s",
}

# The figures that are drawn, and how large they may be in the CSV of an earlier run.
DRAWN = {"sparsity": 1, "test_accuracy": 100}

STEP = number(int, "a whole number from 0 to 1,000,000", lambda value: 0 <= value <= 10**6)
BLOCK = number(
    int, "-1 or a whole number from 1 to 2^31 - 1", lambda value: value == -1 or 1 <= value < 2**31
)


# --- the command line -----------------------------------------------------------------------


def build_parser() -> Parser:
    """All flags. One that is not given is None, so that defaults and --resume can tell."""
    parser = Parser(
        prog="main_prun.py",
        description="Prune an image classifier, at once (--nepochs 0) or with fine-tuning.",
        epilog="Steps count from 0: step K prunes to level K of --sparsities or --cubic.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model and data").add_argument
    text = f"default: resnet20; others: {', '.join(models.MODELS)}"
    add("--model", choices=models.MODELS, metavar="MODEL", help=text)
    add("--dataset", help="a folder, or 'digits', the default: handwritten digits, embedded")
    text = "the trained model; default: the one in checkpoints/ for this model and data, if any"
    add("--checkpoint", metavar="FILE", help=text)
    text = "estimate the statistics of batch norm anew before pruning, on the training images"
    add("--reset_bn", action="store_true", default=None, help=text)

    group = parser.add_argument_group("levels")
    levels = group.add_mutually_exclusive_group().add_argument
    text = "fractions of the prunable weights that are zero after each step; default: 0.1 to 0.9"
    levels("--sparsities", type=FRACTION, nargs="+", metavar="LEVEL", help=text)
    text = "instead: STEPS levels, from the first to the last, that rise by a falling cubic"
    names = ("FROM", "TO", "STEPS")
    levels("--cubic", type=NOT_NEGATIVE, nargs=3, metavar=names, help=text)
    add, text = group.add_argument, "levels are fractions of all parameters, not the prunable ones"
    add("--adjust_sparsities", action="store_true", default=None, help=text)
    text = "what competes: the weights of all layers, or of each; default: global"
    add("--scope", choices=("global", "layer"), help=text)
    text = "unstructured (default), N:M such as 2:4, or Bx1 such as 4x1: blocks along the input"
    add("--pattern", help=text)
    text = "steps after which accuracy is measured, which changes nothing; default: all"
    add("--tests", type=STEP, nargs="*", metavar="STEP", help=text)

    add = parser.add_argument_group("pruner").add_argument
    names, text = ("mfac", "magnitude"), "mfac (default), or magnitude, formerly called gmp"
    add("--pruner", type=current_name, choices=names, metavar="PRUNER", help=text)
    text = "gradients for the inverse Fisher, and in the window of --optim mfac; default: 1024"
    add("--ngrads", type=COUNT, help=text)
    text = "instead of --ngrads: gradients for the inverse Fisher, one number a step"
    add("--ngrads_schedule", type=COUNT, nargs="+", metavar="NGRADS", help=text)
    text = "images a gradient; default: 32, or as many as the training images allow"
    add("--npergrad", type=COUNT, help=text)
    add("--damp", type=POSITIVE, help="damping of the Fisher matrix; default: 1e-5")
    text = "steps before which the inverse Fisher is computed anew, of the weights then; always "
    text += "before step 0. The others prune from the weights of the last such step"
    add("--recomps", type=STEP, nargs="*", metavar="STEP", help=text)
    text = "do each such step in this many parts, the fraction of weights that stay falling by "
    text += "the same factor in each, with the inverse Fisher anew before each; default: 1"
    add("--nrecomps", type=COUNT, help=text)
    text = "of the weights that stay: for all that go together (default), for each as if alone "
    text += "as in the paper, or none"
    add("--update", choices=("joint", "independent", "none"), help=text)
    text = "keep blocks of this size on the diagonal of F only; default: -1, all of F"
    add("--blocksize", type=BLOCK, help=text)
    add("--perbatch", type=COUNT, help="with --blocksize: blocks worked on at once")
    add("--pages", type=COUNT, help="without --blocksize: work on gradients in this many pages")

    group = parser.add_argument_group("fine-tuning (step K comes before epoch K x EVERY)")
    add, rates = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--nepochs", type=STEP, help="epochs in all; default: 0, one-shot pruning")
    add("--prun_every", type=COUNT, metavar="EVERY", help="epochs from step to step; default: 1")
    add("--optim", choices=("sgd", "mfac"), help="begun anew after each step; default: sgd")
    rates("--lr", type=POSITIVE, help="learning rate; default: 0.01 for sgd, 0.001 for mfac")
    text = "instead: those of the epochs after a step; the last one goes on"
    rates("--prun_lrs", type=POSITIVE, nargs="+", metavar="LR", help=text)
    add("--momentum", type=FRACTION, help="default: 0.9")
    add("--weightdecay", type=NOT_NEGATIVE, help="L2 decay; default: 5e-4")
    text = "epochs after which the learning rate drops; default: none"
    add("--drop_at", type=COUNT, nargs="+", metavar="EPOCH", help=text)
    add("--drop_by", type=FACTOR, help="the factor of a drop; default: 0.1")

    add = parser.add_argument_group("machine").add_argument
    add("--batchsize", type=COUNT, help="images in training and testing; default: 128")
    add("--seed", type=SEED, help="of the choice and the order of the images; default: 0")
    add("--device", help="default: cuda if there is one, otherwise cpu")

    group = parser.add_argument_group("output")
    text = "how all files begin; default: runs/MODEL-DATASET-pruned-PRUNER"
    group.add_argument("--out", type=Path, metavar="STEM", help=text)
    text = "go on with the run of --out, if there is one, after the last line that it saved"
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help=text)
    add("--overwrite", action="store_true", help="begin anew, whatever is at --out")
    add_figure_flags(group)
    group.add_argument("--verbose", action="store_true", help="print the sparsity of each layer")
    return parser


def current_name(pruner: str) -> str:
    """The name of a pruner, of which one had another."""
    return {"gmp": "magnitude"}.get(pruner.lower(), pruner)


def choose_settings(given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a new run, where `given` are those of the command line. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**COMMON, "device": device, **given}
    mfac, gradual = settings["pruner"] == "mfac", settings["nepochs"] > 0
    optim = settings.get("optim", "sgd") if gradual else None
    full, scheduled = settings.get("blocksize", -1) == -1, "ngrads_schedule" in given
    pruner_flags = ("ngrads_schedule", "npergrad", "nrecomps", "update", "blocksize")
    epoch_flags = ("optim", "prun_every", "lr", "prun_lrs", "momentum", "weightdecay", "drop_at")
    conditions = [
        ("--pruner mfac", mfac, pruner_flags),
        ("--pruner mfac or --optim mfac", mfac or optim == "mfac", ("ngrads", "damp")),
        ("--optim mfac beside --ngrads_schedule", not scheduled or optim == "mfac", ("ngrads",)),
        ("--pruner mfac with --nepochs 0", mfac and not gradual, ("recomps",)),
        ("--pruner mfac with --blocksize", mfac and not full, ("perbatch",)),
        ("--pruner mfac without --blocksize", mfac and full, ("pages",)),
        ("--nepochs above 0", gradual, epoch_flags),
        ("--drop_at", "drop_at" in given, ("drop_by",)),
    ]
    for condition, met, names in conditions:
        if not met and (wrong := [name for name in names if name in given]):
            raise UserError(f"--{wrong[0]} is for {condition} only: leave it out")
    if gradual:
        settings = {"optim": optim, "prun_every": 1, **FINE_TUNING[optim], **settings}
    if "prun_lrs" in given:
        del settings["lr"]
    if mfac:
        settings = {**MFAC_PRUNER, **settings}
        if scheduled and optim != "mfac":
            del settings["ngrads"]  # which nothing uses then
    check_steps(settings, len(choose_levels(settings)))
    return settings


def choose_levels(settings: dict[str, Any]) -> list[float]:
    """The sparsities to prune to, one a step. Raises UserError if they don't rise."""
    levels = settings.get("sparsities", LEVELS)
    if "cubic" in settings:  # Zhu and Gupta, 2017
        start, end, steps = settings["cubic"]
        if not (start < end < 1 and 2 <= steps <= 10_000 and steps == int(steps)):
            raise UserError(
                f"--cubic {start:g} {end:g} {steps:g} is not FROM TO STEPS with FROM < TO < 1 and "
                "2 to 10,000 STEPS"
            )
        steps = int(steps)
        levels = [end + (start - end) * (1 - k / (steps - 1)) ** 3 for k in range(steps)]
    for lower, higher in pairwise(levels):
        if higher <= lower:
            raise UserError(
                f"--sparsities {higher:g} after {lower:g} does not rise, but pruned weights do not "
                "come back: give the levels in order"
            )
    return levels


def check_steps(settings: dict[str, Any], steps: int) -> None:
    """Raises UserError if a flag names a step or an epoch that never comes."""
    for name in ("recomps", "tests"):
        if beyond := [step for step in settings.get(name, []) if step >= steps]:
            raise UserError(f"--{name} {beyond[0]} is no step: they go from 0 to {steps - 1}")
    schedule = settings.get("ngrads_schedule")
    if schedule and len(schedule) != steps:
        raise UserError(f"--ngrads_schedule has {len(schedule)} numbers for {steps} steps")
    if not settings["nepochs"]:
        return
    last = (steps - 1) * settings["prun_every"]
    if last >= settings["nepochs"]:
        raise UserError(
            f"--nepochs {settings['nepochs']} ends before step {steps - 1}, which comes after "
            f"{last} epochs: give at least {last + 1}"
        )
    if max(settings.get("drop_at", [0])) >= settings["nepochs"]:
        raise UserError(
            f"--drop_at {max(settings['drop_at'])} never comes: choose epochs below --nepochs "
            f"{settings['nepochs']}"
        )


# --- a run ----------------------------------------------------------------------------------


def make_plan(settings: dict[str, Any], steps: int) -> list[tuple[str, int]]:
    """What a run does, one line of output each: ("measure", 0) for the model as it is, then
    ("prune", step) and ("tune", epoch)."""
    plan, every = [("measure", 0)], settings.get("prun_every")
    if not settings["nepochs"]:
        return plan + [("prune", step) for step in range(steps)]
    for epoch in range(settings["nepochs"]):
        if epoch % every == 0 and epoch // every < steps:
            plan.append(("prune", epoch // every))
        plan.append(("tune", epoch))
    return plan


class Gradients:
    """The batches that the pruner takes its gradients from, with a progress bar on a terminal."""

    def __init__(self, loader: datautils.Loader):
        self.loader, self.total = loader, 0

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from progress(self.loader, "gradients", self.total)


class Run:
    """A pruning run: all that a step needs, and the files that keep it."""

    STATEFUL = ("model", "pruner", "optimizer", "scheduler")

    def __init__(self, args: argparse.Namespace):
        """Begins a run or goes on with a saved one. Whatever can be checked is checked here, and
        nothing is written but the folder. Raises UserError, and OSError or ValueError from what it
        uses."""
        output = ("out", "resume", "overwrite", "plot", "tensorboard", "verbose")
        given = {k: v for k, v in vars(args).items() if v is not None and k not in output}
        names = {**COMMON, **given}
        data = Path(names["dataset"]).resolve().name
        self.out = args.out or Path("runs", f"{names['model']}-{data}-pruned-{names['pruner']}")
        self.flag, self.verbose = f"--out {self.out}", args.verbose
        self.tensorboard = TensorBoard(args.tensorboard, self.out.name)
        self.others = read_runs(args.plot, DRAWN)
        state = self.check_files(args.resume, args.overwrite)
        if state:
            check_same(given, state["settings"])
        self.settings = settings = state["settings"] if state else choose_settings(given)
        self.levels = choose_levels(settings)
        self.ngrads = settings.get("ngrads_schedule") or [settings.get("ngrads")] * len(self.levels)
        self.ngrads_flag = "--ngrads_schedule" if "ngrads_schedule" in settings else "--ngrads"
        self.plan = make_plan(settings, len(self.levels))
        every_step = list(range(len(self.levels)))
        self.recomps = every_step if settings["nepochs"] else [0, *settings.get("recomps", [])]
        self.tests = settings.get("tests", every_step)

        self.device = find_device(settings["device"])
        self.data = datautils.load(settings["dataset"])
        self.ranks = find_ranks()
        self.make_loaders()
        model = models.build(settings["model"], self.data.num_classes)
        if not state:
            models.load_checkpoint(model, find_checkpoint(settings, self.data.name))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.pruner = self.build_pruner()
        self.total = sum(weight.numel() for weight in model.parameters())
        self.prunable = sum(mask.numel() for mask in self.pruner.masks.values())
        if settings.get("adjust_sparsities"):
            self.levels = [level * self.total / self.prunable for level in self.levels]
        self.trained = None  # the model, as it is fine-tuned in several processes
        self.optimizer = self.scheduler = None  # between a pruning step and the next epoch
        self.history = []  # a dict a line, the rows of the CSV
        if state:
            self.restore(state)
        else:
            self.rehearse()
        self.check_memory(resumed=bool(state))
        if state:
            note(f"going on after line {len(self.history)} of {len(self.plan)}")
        self.out.parent.mkdir(parents=True, exist_ok=True)

    # --- before it starts

    def beside(self, ending: str) -> Path:
        """The file of this run whose name ends so."""
        return self.out.with_name(self.out.name + ending)

    def files(self) -> list[Path]:
        """The files of this run, or another at the same place, that exist. The state is first."""
        names = [self.beside(ending) for ending in (".state", ".csv", ".png")]
        model = re.compile(re.escape(self.out.name) + r"-step\d+\.pth")
        models = sorted(path for path in self.out.parent.glob("*") if model.fullmatch(path.name))
        return [path for path in names + models if path.exists()]

    def check_files(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The saved state, if there is one to go on with. Raises UserError if it is none, or if
        files would be lost."""
        if self.out.is_dir() or self.out.name in ("", ".."):
            raise UserError(f"--out {self.out} is a folder: add how the files in it shall begin")
        check_folder(self.out.parent, "--out")
        state = self.beside(".state")
        if check_existing(self.files(), state, "--out", resume, overwrite):
            return load_state(state, self.STATEFUL, build_parser(), choose_settings)
        return None

    def make_loaders(self) -> None:
        """Sets the loaders, and the images a gradient if that is left open."""
        settings, seed = self.settings, self.settings["seed"]
        options = {"seed": seed, "part": (self.ranks.rank, self.ranks.size)}
        self.test_loader = self.data.loader("test", settings["batchsize"], **options)
        self.train_loader = self.data.loader("train", settings["batchsize"], **options)
        images = self.train_loader.num_samples
        trains = settings["nepochs"] or settings["reset_bn"]
        if trains and (images - 1) % settings["batchsize"] == 0:
            raise UserError(
                f"--batchsize {settings['batchsize']} leaves a batch of one of the {images:,} "
                "images, too few for batch norm: choose another"
            )
        if settings["pruner"] == "magnitude":
            return
        most = max(self.ngrads)
        settings.setdefault("npergrad", max(1, min(NPERGRAD, images // most)))
        if most * settings["npergrad"] > images:
            raise UserError(
                f"{most:,} gradients of {settings['npergrad']} images each are more than the "
                f"{images:,} training images allow: use a lower {self.ngrads_flag} or --npergrad"
            )
        self.gradients = Gradients(self.data.loader("train", settings["npergrad"], seed=seed))

    def build_pruner(self) -> MagnitudePruner:
        """The pruner of `settings`. Raises ValueError."""
        if self.settings["pruner"] == "magnitude":
            what = {name: self.settings[name] for name in ("scope", "pattern")}
            return MagnitudePruner(self.model, **what)
        names = ("scope", "pattern", "damp", "update", "perbatch", "pages", "seed")
        options = {name: self.settings[name] for name in names if name in self.settings}
        options["ngrads"] = self.ngrads[0]
        if self.settings["blocksize"] != -1:
            options["blocksize"] = self.settings["blocksize"]
        return MFACPruner(self.model, self.gradients, device=self.device, **options)

    def rehearse(self) -> None:
        """Raises ValueError if a level can't be reached: prunes a copy by magnitude."""
        what = {name: self.settings[name] for name in ("scope", "pattern")}
        pruner = MagnitudePruner(copy.deepcopy(self.model), **what)
        for level in (self.levels[0], self.levels[-1]):
            if level >= 1:
                raise UserError(
                    f"only {self.prunable:,} of {self.total:,} weights can be pruned: use lower "
                    "levels with --adjust_sparsities"
                )
            pruner.prune(level)
        if self.settings.get("pages", 1) > self.prunable:
            raise UserError(f"--pages {self.settings['pages']} is more than a page a weight")

    def bytes_needed(self, blocksize: int, pages: int) -> dict[torch.device, int]:
        """The memory that gradients and F⁻¹ take, or the window, as F⁻¹ is released before."""
        settings, needed = self.settings, {self.device: 0}
        if settings["pruner"] == "mfac":
            m = max(self.ngrads)
            d = self.ranks.chunk(sum(int(mask.sum()) for mask in self.pruner.masks.values()))
            options = {"pages": pages, "perbatch": settings.get("perbatch"), "device": self.device}
            needed = inverse_bytes(
                m, d, blocksize=None if blocksize == -1 else blocksize, **options
            )
        if settings.get("optim") == "mfac":
            window = window_bytes(settings["ngrads"], self.total, world_size=self.ranks.size)
            needed[self.device] = max(needed[self.device], window)
        if self.ranks.size > 1:  # gradients before they are exchanged
            needed = {device: 2 * size for device, size in needed.items()}
        return needed

    def check_memory(self, resumed: bool = False) -> None:
        """Says how much memory the run takes. Raises UserError with advice if it can't fit, or if
        the state has no space."""
        blocksize, pages = self.settings.get("blocksize", -1), self.settings.get("pages", 1)
        needed = self.bytes_needed(blocksize, pages)
        free = {device: available_memory(device) for device in needed}

        def fits(*choice: int) -> bool:
            return all(size <= free[device] for device, size in self.bytes_needed(*choice).items())

        shown = [f"{size / 2**30:.2f} GiB on {device}" for device, size in needed.items()]
        size = f"M-FAC takes {' and '.join(shown)}"
        if not fits(blocksize, pages):
            others = {f"--pages {n}": (-1, n) for n in (4, 16, 64) if blocksize == -1 and n > pages}
            others |= {f"--blocksize {b}": (b, 1) for b in (128, 16)}
            advice = [flag for flag, choice in others.items() if fits(*choice)]
            advice.append(f"fewer {self.ngrads_flag}")
            left = [f"{size / 2**30:.2f} GiB on {device}" for device, size in free.items()]
            raise UserError(f"{size}, but free are {' and '.join(left)}: use {advice[0]}")
        saved = tensor_bytes([self.model.state_dict(), self.pruner.state_dict()])
        if self.settings.get("optim") == "mfac":
            saved += window_bytes(self.settings["ngrads"], self.total)
        check_space(self.out, saved if resumed else 2 * saved)
        if any(needed.values()):
            note(size)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was saved. Raises UserError if it does not fit."""
        if state["classes"] != self.data.classes:
            raise UserError(f"{self.settings['dataset']} has other classes than the saved run")
        try:
            if not are_rows(state["history"], COLUMNS, len(self.plan)):
                raise ValueError("the figures are others")
            task, index = self.plan[len(state["history"]) - 1]
            step = None if task == "measure" else index
            if task == "tune":
                step = self.step_before(index)
            if state["history"][-1]["step"] != step:
                raise ValueError("the figures are of another step")
            if not alike(state["model"], self.model.state_dict()):
                raise ValueError("the model is another one")
            self.model.load_state_dict(state["model"])
            self.load_pruner(state["pruner"])
            if (state["optimizer"] is None) != (task != "tune"):
                raise ValueError("the optimizer is not of this epoch")
            if task == "tune":
                self.start_optimizer(step)
                load_optimizer(self.optimizer, state["optimizer"])
                if not alike(state["scheduler"], self.scheduler.state_dict()):
                    raise ValueError("the scheduler is another one")
                self.scheduler.load_state_dict(state["scheduler"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.beside('.state')} does not fit the run: {first}") from error
        self.history = state["history"]

    def load_pruner(self, saved: dict[str, Any]) -> None:
        """Has the pruner go on with the model. Raises ValueError if masks do not fit."""
        pruner, expected = self.pruner, self.pruner.state_dict()
        if "base" in expected and saved["base"]:
            expected |= {"base": pruner.params, "base_masks": pruner.masks}
        if not alike(saved, expected):
            raise ValueError("the masks are of another model or pruner")
        if any(
            (weight[~saved["masks"][name]] != 0).any() for name, weight in pruner.params.items()
        ):
            raise ValueError("the masks are of other weights")
        pruner.load_state_dict(copy.deepcopy(saved))  # it keeps masks and weights as they are

    # --- while it runs

    def go(self) -> None:
        """All that is left of the plan, then the picture."""
        shown = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        say(f"# {shown}")
        if self.history:  # again: the run may have been killed before it came to it
            self.save_results()
        elif self.ranks.rank == 0:
            for path in self.files():
                path.unlink()
        for task, index in self.plan[len(self.history) :]:
            row = dict.fromkeys(COLUMNS) | getattr(self, task)(index)
            row["sparsity"] = self.pruner.sparsity
            row["sparsity_all"] = row["sparsity"] * self.prunable / self.total
            if task != "prune" or index in self.tests:
                began = time.perf_counter()
                how = {"device": self.device, "ranks": self.ranks}
                loss, accuracy = evaluate(self.model, self.test_loader, **how)
                row |= {"test_loss": loss, "test_accuracy": accuracy}
                row["evaluation_seconds"] = time.perf_counter() - began
            self.tensorboard.write([*self.history, row])
            self.save_state([*self.history, row])
            self.history.append(row)
            self.save_results()
            line = [COLUMNS[name].format(row[name]) for name in row if row[name] is not None]
            say("  ".join(line))
            if self.verbose and task != "tune":
                say(self.layers())
        if self.ranks.rank == 0:
            save_plot([(str(self.out), self.history), *self.others], self.beside(".png"))

    def measure(self, _: int) -> dict[str, Any]:
        """The model as it is, with statistics of batch norm as asked for."""
        if self.settings["reset_bn"]:
            size, seed = self.settings["batchsize"], self.settings["seed"]
            loader = progress(self.data.loader("train", size, seed=seed), "reset_bn")
            update_bn(loader, self.model, self.device)
        return {}

    def prune(self, step: int) -> dict[str, Any]:
        """One pruning step."""
        self.optimizer = self.scheduler = None
        pruner, recomputed = self.pruner, step in self.recomps
        before, began = dict(pruner.seconds), time.perf_counter()
        if mfac := isinstance(pruner, MFACPruner):
            last = max(done for done in self.recomps if done <= step)
            self.gradients.total = pruner.ngrads = self.ngrads[last]
        parts = self.settings["nrecomps"] if mfac and recomputed else 1
        dense, target = 1 - pruner.sparsity, self.levels[step]
        try:
            for part in range(1, parts + 1):
                if mfac and recomputed:
                    pruner.recompute()
                kept = dense * ((1 - target) / dense) ** (part / parts)
                pruner.prune(target if part == parts else 1 - kept)  # the last one exactly
        except ValueError as error:  # too little damping for these gradients, ...
            raise UserError(str(error)) from error
        if mfac and self.settings["nepochs"]:
            pruner.release()  # every step recomputes, and fine-tuning needs the memory
        seconds = {name: pruner.seconds[name] - before[name] for name in before}
        rest = time.perf_counter() - began - sum(seconds.values())
        figures = {f"{name}_seconds": value for name, value in seconds.items()}
        epoch = step * self.settings["prun_every"] if self.settings["nepochs"] else None
        return {"step": step, "epoch": epoch, **figures, "update_seconds": rest}

    def step_before(self, epoch: int) -> int:
        """The last pruning step before an epoch."""
        return min(epoch // self.settings["prun_every"], len(self.levels) - 1)

    def learning_rate(self, epoch: int) -> float:
        """Of --lr or --prun_lrs, with the drops."""
        settings = self.settings
        rates = settings.get("prun_lrs") or [settings["lr"]]
        since = epoch - self.step_before(epoch) * settings["prun_every"]
        drops = sum(epoch >= drop for drop in settings.get("drop_at", []))
        return rates[min(since, len(rates) - 1)] * settings.get("drop_by", 0.1) ** drops

    def start_optimizer(self, step: int) -> None:
        """A new optimizer after a pruning step, and a scheduler whose factors are the rates."""
        settings = self.settings
        options = {"momentum": settings["momentum"], "weight_decay": settings["weightdecay"]}
        if settings["optim"] == "mfac":
            masks = [self.pruner.masks.get(name) for name, _ in self.model.named_parameters()]
            options |= {"ngrads": settings["ngrads"], "damp": settings["damp"], "sparse": masks}
        optimizer = {"sgd": torch.optim.SGD, "mfac": MFAC}[settings["optim"]]
        self.optimizer = optimizer(self.model.parameters(), lr=1.0, **options)
        self.pruner.attach(self.optimizer)
        first, batches = step * settings["prun_every"], len(self.train_loader)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda batch: self.learning_rate(first + batch // batches)
        )

    def tune(self, epoch: int) -> dict[str, Any]:
        """One epoch of fine-tuning, in which pruned weights stay zero."""
        # Like the order of the images a function of seed and epoch, so there is none to save.
        torch.manual_seed(self.settings["seed"] + epoch)
        self.train_loader.set_epoch(epoch)
        step = self.step_before(epoch)
        if self.optimizer is None:
            self.start_optimizer(step)
        if self.trained is None:
            self.trained = distributed(self.model, self.ranks)
        parts = self.trained, self.train_loader, self.optimizer, self.scheduler
        title = f"epoch {epoch + 1}/{self.settings['nepochs']}"
        figures = train_epoch(*parts, device=self.device, ranks=self.ranks, title=title)
        row = {name: figures[name] for name in ("train_loss", "train_accuracy")}
        row |= {"lr": self.learning_rate(epoch), "training_seconds": figures["seconds"]}
        return {"step": step, "epoch": epoch + 1, **row}

    # --- what it leaves

    def layers(self) -> str:
        """The table of layers."""
        lines = []
        for name, mask in self.pruner.masks.items():
            zeros = mask.numel() - int(mask.sum())
            share = f"{zeros:>11,} of {mask.numel():>11,}  sparsity {zeros / mask.numel():.4f}"
            lines.append(f"    {name:<36} {share}")
        return "\n".join(lines)

    def save_state(self, history: list[dict[str, Any]]) -> None:
        """Writes what --resume needs, from which the other files can be made again."""
        state = {"settings": self.settings, "classes": self.data.classes, "history": history}
        for part in self.STATEFUL:
            found = getattr(self, part)
            state[part] = found and gathered(found.state_dict(), self.ranks)
        if self.ranks.rank == 0:
            save_atomically(self.beside(".state"), lambda file: torch.save(state, file))

    def save_results(self) -> None:
        """Writes the model of the last step, on the CPU and in plain memory order, and the CSV."""
        if self.ranks.rank > 0:
            return
        row = self.history[-1]
        if row["step"] is not None:
            weights, masks = self.model.state_dict(), self.pruner.masks
            model = {
                "state_dict": {name: weight.cpu().contiguous() for name, weight in weights.items()},
                "masks": {name: mask.cpu().contiguous() for name, mask in masks.items()},
                "model": self.settings["model"],
                "classes": self.data.classes,
                "sparsity": row["sparsity"],
                "accuracy": row["test_accuracy"],
            }
            path = self.beside(f"-step{row['step']}.pth")
            save_atomically(path, lambda file: torch.save(model, file))
        save_csv(self.beside(".csv"), COLUMNS, self.history)


def find_checkpoint(settings: dict[str, Any], data: str) -> Path:
    """The checkpoint of `settings`, or the one that comes along. Raises UserError."""
    if "checkpoint" in settings:
        return Path(settings["checkpoint"])
    path = Path(__file__).with_name("checkpoints") / f"{settings['model']}_{data}.pth"
    if not path.exists():
        raise UserError(
            f"there is no trained {settings['model']} for {data} at {path}: give one as "
            "--checkpoint, or train one with main_optim.py"
        )
    return path


def curve(history: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(sparsity, accuracy) in order of sparsity: at each the last that was measured."""
    tested = [row for row in history if row["test_accuracy"] is not None]
    return sorted({row["sparsity"]: row["test_accuracy"] for row in tested}.items())


def save_plot(runs: Runs, path: Path) -> None:
    """Draws accuracy against sparsity, a line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, rows), (color, marker, line) in zip(runs, cycle(STYLES), strict=False):
        style = {"linestyle": line, "color": color, "marker": marker, "markersize": 4}
        axes.plot(*zip(*curve(rows), strict=True), **style, label=name)
    axes.set(xlabel="Sparsity (fraction of prunable weights)", ylabel="Test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_atomically(path, lambda file: figure.savefig(file, format="png", dpi=200))


def main(argv: list[str] | None = None) -> None:
    """Prunes as the command line, or `argv`, says."""
    execute(build_parser(), Run, argv, "use more --pages, a --blocksize or fewer gradients")


if __name__ == "__main__":
    main()
