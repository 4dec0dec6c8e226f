"""The command line of main_prun.py: flags, the settings that they make, levels and steps."""

import argparse
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import models
from main_common import (
    COUNT,
    FACTOR,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    WORKERS,
    Parser,
    UserError,
    add_figure_flags,
    number,
)

# What a flag is when it is not given, for all runs, for --pruner mfac, and for fine-tuning.
COMMON = dict(model="resnet20", dataset="digits", pruner="mfac", pattern="unstructured")
COMMON |= dict(scope="global", nepochs=0, batchsize=128, seed=0, amp=False, deterministic=False)
COMMON |= dict(reset_bn=False, reestimate_bn=False)
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
MFAC_PRUNER = dict(ngrads=1024, damp=1e-5, blocksize=-1, update="joint", rounds=1, nrecomps=1)
NPERGRAD = 32
FINE_TUNING = {
    "sgd": dict(schedule="step", lr=0.01, momentum=0.9, weightdecay=5e-4),
    "mfac": dict(schedule="step", lr=1e-3, momentum=0.9, weightdecay=5e-4, ngrads=1024, damp=1e-5),
}
DISTILL = 0.5

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
    "test_top5": "top-5 {:.2f} %",
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


def model_name(text: str) -> str:
    """An argparse type: a model of the registry, or module:function."""
    if text not in models.MODELS and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", text):
        names = ", ".join(models.MODELS)
        raise argparse.ArgumentTypeError(f"{text} is none of {names}, and no module:function")
    return text


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
    on, off = {"action": "store_true", "default": None}, "; default: off"
    text = (
        f"default: resnet20; others: {', '.join(models.MODELS)}; or module:function, which makes "
    )
    text += "a model of one's own from the number of classes"
    add("--model", type=model_name, metavar="MODEL", help=text)
    add("--dataset", help="a folder, or 'digits', the default: handwritten digits, embedded")
    text = (
        "the trained model; default: the one in checkpoints/ for this model and data; a model of "
    )
    text += "one's own may come with its weights"
    add("--checkpoint", metavar="FILE", help=text)
    text = f"estimate the statistics of batch norm anew before pruning, on the training images{off}"
    add("--reset_bn", **on, help=text)
    text = f"the same after each pruning step{off}"
    add("--reestimate_bn", **on, help=text)

    group = parser.add_argument_group("levels")
    levels = group.add_mutually_exclusive_group().add_argument
    text = "fractions of the prunable weights that are zero after each step; default: 0.1 to 0.9"
    levels("--sparsities", type=FRACTION, nargs="+", metavar="LEVEL", help=text)
    text = f"instead: STEPS levels, from the first to the last, that rise by a falling cubic{off}"
    names = ("FROM", "TO", "STEPS")
    levels("--cubic", type=NOT_NEGATIVE, nargs=3, metavar=names, help=text)
    add = group.add_argument
    text = f"levels are fractions of all parameters, not the prunable ones{off}"
    add("--adjust_sparsities", **on, help=text)
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
    text = f"instead of --ngrads: gradients for the inverse Fisher, one number a step{off}"
    add("--ngrads_schedule", type=COUNT, nargs="+", metavar="NGRADS", help=text)
    text = "images a gradient; default: 32, or as many as the training images allow"
    add("--npergrad", type=COUNT, help=text)
    add("--damp", type=POSITIVE, help="damping of the Fisher matrix; default: 1e-5")
    text = "steps before which the inverse Fisher is computed anew, of the weights then: step 0, "
    text += "and by default all; the others prune from the weights of the last such step, so that "
    text += "--recomps 0 computes it once"
    add("--recomps", type=STEP, nargs="*", metavar="STEP", help=text)
    text = "do each such step in this many parts, the fraction of weights that stay falling by "
    text += "the same factor in each, with the inverse Fisher anew before each; default: 1"
    add("--nrecomps", type=COUNT, help=text)
    text = (
        "choose the weights of a step in this many parts from one inverse Fisher, with the update "
    )
    text += "of weights and inverse after each; default: 1"
    add("--rounds", type=COUNT, help=text)
    text = "of the weights that stay: for all that go together (default), for each as if alone "
    text += "as in the paper, or none"
    add("--update", choices=("joint", "independent", "none"), help=text)
    text = "keep blocks of this size on the diagonal of F only; default: -1, all of F"
    add("--blocksize", type=BLOCK, help=text)
    text = "with --blocksize: blocks worked on at once; default: as many as suit the device"
    add("--perbatch", type=COUNT, help=text)
    text = "without --blocksize: work on gradients in this many pages; default: as few as fit"
    add("--pages", type=COUNT, help=text)

    group = parser.add_argument_group("fine-tuning (step K comes before epoch K x EVERY)")
    add, rates = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--nepochs", type=STEP, help="epochs in all; default: 0, one-shot pruning")
    add("--prun_every", type=COUNT, metavar="EVERY", help="epochs from step to step; default: 1")
    add("--optim", choices=("sgd", "mfac"), help="begun anew after each step; default: sgd")
    text = "of the learning rate after each step: that of the flags below (default), or falling to "
    text += "zero by a cosine until the next step"
    add("--schedule", choices=("step", "cosine"), help=text)
    rates("--lr", type=POSITIVE, help="learning rate; default: 0.01 for sgd, 0.001 for mfac")
    text = f"instead: those of the epochs after a step; the last one goes on{off}"
    rates("--prun_lrs", type=POSITIVE, nargs="+", metavar="LR", help=text)
    add("--momentum", type=FRACTION, help="default: 0.9")
    add("--weightdecay", type=NOT_NEGATIVE, help="L2 decay; default: 5e-4")
    text = "epochs after which the learning rate drops; default: none"
    add("--drop_at", type=COUNT, nargs="+", metavar="EPOCH", help=text)
    add("--drop_by", type=FACTOR, help="the factor of a drop; default: 0.1")
    text = f"learn from the dense model, too: this part of the loss, {DISTILL} if left out, is its "
    text += f"divergence from the outputs of that model{off}"
    add("--distill", type=FACTOR, nargs="?", const=DISTILL, metavar="WEIGHT", help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--batchsize", type=COUNT, help="images in training and testing; default: 128")
    add("--seed", type=SEED, help="of the choice and the order of the images; default: 0")
    add("--device", help="default: cuda if there is one, otherwise cpu")
    text = "processes that read images, if these are not held in memory; default: one a core, at "
    text += "most 8"
    add("--workers", type=WORKERS, help=text)
    text = "forward in bfloat16 where that is safe, for gradients, fine-tuning and tests"
    add("--amp", **on, help=text + off)
    text = f"the same call, or --resume, gives the same bits on CUDA, too, at some cost{off}"
    add("--deterministic", **on, help=text)

    group = parser.add_argument_group("output")
    text = "how all files begin; default: runs/MODEL-DATASET-pruned-PRUNER"
    group.add_argument("--out", type=Path, metavar="STEM", help=text)
    text = f"go on with the run of --out, if there is one, after the last line that it saved{off}"
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help=text)
    add("--overwrite", action="store_true", help=f"begin anew, whatever is at --out{off}")
    add_figure_flags(group)
    group.add_argument(
        "--verbose", action="store_true", help=f"print the sparsity of each layer{off}"
    )
    return parser


def current_name(pruner: str) -> str:
    """The name of a pruner, of which one had another."""
    return {"gmp": "magnitude"}.get(pruner.lower(), pruner)


def choose_settings(given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a new run, where `given` are those of the command line. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**COMMON, "device": device, **given}
    mfac, gradual = settings["pruner"] == "mfac", settings["nepochs"] > 0
    cosine = settings.get("schedule") == "cosine"
    optim = settings.get("optim", "sgd") if gradual else None
    full, scheduled = settings.get("blocksize", -1) == -1, "ngrads_schedule" in given
    pruner_flags = ("ngrads_schedule", "npergrad", "nrecomps", "rounds", "update", "blocksize")
    epoch_flags = ("optim", "prun_every", "lr", "prun_lrs", "momentum", "weightdecay", "drop_at")
    epoch_flags += ("schedule", "distill")
    conditions = [
        ("--pruner mfac", mfac, pruner_flags),
        ("--pruner mfac or --optim mfac", mfac or optim == "mfac", ("ngrads", "damp")),
        ("--optim mfac beside --ngrads_schedule", not scheduled or optim == "mfac", ("ngrads",)),
        ("--pruner mfac with --nepochs 0", mfac and not gradual, ("recomps",)),
        ("a run without --reestimate_bn", not settings["reestimate_bn"], ("recomps",)),
        ("--pruner mfac with --blocksize", mfac and not full, ("perbatch",)),
        ("--pruner mfac without --blocksize", mfac and full, ("pages",)),
        ("--nepochs above 0", gradual, epoch_flags),
        ("--schedule step", not cosine, ("drop_at", "prun_lrs")),
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


def find_checkpoint(settings: dict[str, Any], data: str) -> Path | None:
    """The checkpoint of `settings`, or the one that comes along; a model of one's own needs none.
    Raises UserError."""
    if "checkpoint" in settings:
        return Path(settings["checkpoint"])
    if ":" in settings["model"]:
        return None
    path = Path(__file__).with_name("checkpoints") / f"{settings['model']}_{data}.pth"
    if not path.exists():
        raise UserError(
            f"there is no trained {settings['model']} for {data} at {path}: give one as "
            "--checkpoint, or train one with main_optim.py"
        )
    return path


def as_command(settings: dict[str, Any]) -> str:
    """The call that makes these settings."""
    words = ["python3", "main_prun.py"]
    for name, value in settings.items():
        if value is not False:
            values = value if isinstance(value, list) else [value] if value is not True else []
            words += [f"--{name}", *(shlex.quote(str(word)) for word in values)]
    return " ".join(words)
