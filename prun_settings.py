"""The command line of main_prun.py: flags, settings, levels and steps."""

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

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
    add_model_flag,
    number,
)

# Defaults of flags: for all runs, for --pruner mfac, and for fine-tuning.
COMMON = dict(model="resnet20", dataset="digits", pruner="mfac", pattern="unstructured")
COMMON |= dict(scope="global", nepochs=0, batchsize=128, seed=0, amp=False, deterministic=False)
COMMON |= dict(reset_bn=False, reestimate_bn=False)
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
MFAC_PRUNER = dict(ngrads=1024, damp=1e-5, update="joint", nrecomps=1)
BLOCKSIZE = 128  # of at least as many gradients; the full F of fewer
ROUNDS = 8  # of blocks with the joint update; 1 otherwise
NPERGRAD = 32
FINE_TUNING = {
    "sgd": dict(schedule="step", lr=0.01, momentum=0.9, weightdecay=5e-4),
    "mfac": dict(schedule="step", lr=1e-3, momentum=0.9, weightdecay=5e-4, ngrads=1024, damp=1e-5),
}
DISTILL = 0.5

# The columns of the CSV, with their format in a line of output.
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

# The figures that are drawn, with the largest values that a CSV may have.
DRAWN = {"sparsity": 1, "test_accuracy": 100}

STEP = number(int, "a whole number from 0 to 1,000,000", lambda value: 0 <= value <= 10**6)
BLOCK = number(
    int, "-1 or a whole number from 1 to 2^31 - 1", lambda value: value == -1 or 1 <= value < 2**31
)


# --- the command line -----------------------------------------------------------------------


def build_parser() -> Parser:
    """The parser of all flags. Flags that are not given are None."""
    parser = Parser(
        prog="main_prun.py",
        description="Prune an image classifier, at once (--nepochs 0) or with fine-tuning.",
        epilog="Steps count from 0: step K prunes to level K of --sparsities or --cubic.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model and data")
    on, off = {"action": "store_true", "default": None}, "; default: off"
    add_model_flag(group)
    add = group.add_argument
    add("--dataset", help="a folder, or 'digits', the default: handwritten digits, embedded")
    text = "the trained model; default: the one in checkpoints/ for this model and data; your own "
    text += "model may have its weights already"
    add("--checkpoint", metavar="FILE", help=text)
    text = f"estimate the statistics of batch norm anew before pruning, on the training images{off}"
    add("--reset_bn", **on, help=text)
    text = f"the same after each pruning step{off}"
    add("--reestimate_bn", **on, help=text)

    group = parser.add_argument_group("levels")
    levels = group.add_mutually_exclusive_group().add_argument
    text = "sparsity of the prunable weights after each step; default: 0.1 to 0.9"
    levels("--sparsities", type=FRACTION, nargs="+", metavar="LEVEL", help=text)
    text = f"instead: STEPS levels that rise from FROM to TO by a cubic, ever more slowly{off}"
    names = ("FROM", "TO", "STEPS")
    levels("--cubic", type=NOT_NEGATIVE, nargs=3, metavar=names, help=text)
    add = group.add_argument
    text = f"levels are fractions of all parameters, not of the prunable ones{off}"
    add("--adjust_sparsities", **on, help=text)
    text = "weights of all layers compete, or each layer has the sparsity; default: global"
    add("--scope", choices=("global", "layer"), help=text)
    text = "unstructured (default), N:M such as 2:4, or Bx1 such as 4x1: blocks along the input"
    add("--pattern", help=text)
    text = "steps after which accuracy is measured; it does not change the run; default: all"
    add("--tests", type=STEP, nargs="*", metavar="STEP", help=text)

    add = parser.add_argument_group("pruner").add_argument
    names, text = ("mfac", "magnitude"), "mfac (default), or magnitude, formerly called gmp"
    add("--pruner", type=current_name, choices=names, metavar="PRUNER", help=text)
    text = "gradients for the inverse Fisher, and in the window of --optim mfac; default: 1024"
    add("--ngrads", type=COUNT, help=text)
    text = f"instead of --ngrads: gradients for the inverse Fisher, one number a step{off}"
    add("--ngrads_schedule", type=COUNT, nargs="+", metavar="NGRADS", help=text)
    text = "images in a gradient; default: 32, or as many as the training images allow"
    add("--npergrad", type=COUNT, help=text)
    add("--damp", type=POSITIVE, help="damping of the Fisher matrix; default: 1e-5")
    text = "steps that compute the inverse Fisher anew, of the present weights: step 0 and these; "
    text += "the others start from the weights of the last such step; default: all steps; "
    text += "--recomps 0 computes it once"
    add("--recomps", type=STEP, nargs="*", metavar="STEP", help=text)
    text = "do each such step in this many parts, with the inverse Fisher computed anew before "
    text += "each; the weights that stay fall by the same factor in each; default: 1"
    add("--nrecomps", type=COUNT, help=text)
    text = "choose the weights of a step in this many parts from one inverse Fisher, with an "
    text += f"update of weights and inverse after each; default: {ROUNDS}, but 1 with all of F, or "
    text += "another --update than joint"
    add("--rounds", type=COUNT, help=text)
    text = "update of the weights that stay: for all removed weights together (default), for each "
    text += "of them as if alone, as in the paper, or none"
    add("--update", choices=("joint", "independent", "none"), help=text)
    text = "use only the blocks of this size on the diagonal of F, or all of F with -1; default: "
    text += f"{BLOCKSIZE}, but -1 with fewer gradients than that"
    add("--blocksize", type=BLOCK, help=text)
    text = "blocks that are worked on at once; default: by the device"
    add("--perbatch", type=COUNT, help=text)
    text = "with --blocksize -1: work on gradients in this many pages; default: as few as fit"
    add("--pages", type=COUNT, help=text)

    group = parser.add_argument_group("fine-tuning (step K comes before epoch K x EVERY)")
    add, rates = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--nepochs", type=STEP, help="epochs in total; default: 0, one-shot pruning")
    add("--prun_every", type=COUNT, metavar="EVERY", help="epochs from step to step; default: 1")
    add("--optim", choices=("sgd", "mfac"), help="optimizer, new after each step; default: sgd")
    text = "learning rate after each step: by the flags below (default), or a cosine that ends at "
    text += "zero at the next step"
    add("--schedule", choices=("step", "cosine"), help=text)
    rates("--lr", type=POSITIVE, help="learning rate; default: 0.01 for sgd, 0.001 for mfac")
    text = f"instead: one for each epoch after a step; the last one stays{off}"
    rates("--prun_lrs", type=POSITIVE, nargs="+", metavar="LR", help=text)
    add("--momentum", type=FRACTION, help="default: 0.9")
    add("--weightdecay", type=NOT_NEGATIVE, help="L2 decay; default: 5e-4")
    text = "epochs after which the learning rate drops; default: none"
    add("--drop_at", type=COUNT, nargs="+", metavar="EPOCH", help=text)
    add("--drop_by", type=FACTOR, help="the factor of a drop; default: 0.1")
    text = "learn from the dense model, too: the weight of the divergence from its outputs in the "
    text += f"loss, {DISTILL} if no number is given{off}"
    add("--distill", type=FACTOR, nargs="?", const=DISTILL, metavar="WEIGHT", help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--batchsize", type=COUNT, help="images in training and testing; default: 128")
    add("--seed", type=SEED, help="for the choice and the order of the images; default: 0")
    add("--device", help="default: cuda if there is one, otherwise cpu")
    text = "processes that read images that are not held in memory; default: one for each core, "
    text += "at most 8"
    add("--workers", type=WORKERS, help=text)
    text = "autocast to bfloat16, for gradients, fine-tuning and tests"
    add("--amp", **on, help=text + off)
    text = f"same bits on CUDA for the same call, and for --resume; somewhat slower{off}"
    add("--deterministic", **on, help=text)

    group = parser.add_argument_group("output")
    text = "beginning of all file names; default: runs/MODEL-DATASET-pruned-PRUNER"
    group.add_argument("--out", type=Path, metavar="STEM", help=text)
    text = f"continue the run at --out, if there is one, after its last saved line{off}"
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help=text)
    add("--overwrite", action="store_true", help=f"start again, and lose the files at --out{off}")
    add_figure_flags(group)
    group.add_argument(
        "--verbose", action="store_true", help=f"print the sparsity of each layer{off}"
    )
    return parser


def current_name(pruner: str) -> str:
    """The name of a pruner, or the present one for an old name."""
    return {"gmp": "magnitude"}.get(pruner.lower(), pruner)


def choose_settings(given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a new run, from those that are `given` by flags. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**COMMON, "device": device, **given}
    mfac, gradual = settings["pruner"] == "mfac", settings["nepochs"] > 0
    cosine = settings.get("schedule") == "cosine"
    optim = settings.get("optim", "sgd") if gradual else None
    scheduled = "ngrads_schedule" in given
    ngrads = given.get("ngrads_schedule", [settings.get("ngrads", MFAC_PRUNER["ngrads"])])
    blocksize = settings.get("blocksize", BLOCKSIZE if min(ngrads) >= BLOCKSIZE else -1)
    full, joint = blocksize == -1, settings.get("update", "joint") == "joint"
    pruner_flags = ("ngrads_schedule", "npergrad", "nrecomps", "rounds", "update", "blocksize")
    epoch_flags = ("optim", "prun_every", "lr", "prun_lrs", "momentum", "weightdecay", "drop_at")
    epoch_flags += ("schedule", "distill")
    conditions = [
        ("--pruner mfac", mfac, pruner_flags),
        ("--pruner mfac or --optim mfac", mfac or optim == "mfac", ("ngrads", "damp")),
        ("--optim mfac beside --ngrads_schedule", not scheduled or optim == "mfac", ("ngrads",)),
        ("--pruner mfac with --nepochs 0", mfac and not gradual, ("recomps",)),
        ("a run without --reestimate_bn", not settings["reestimate_bn"], ("recomps",)),
        ("--pruner mfac without --blocksize -1", mfac and not full, ("perbatch",)),
        ("--pruner mfac with --blocksize -1", mfac and full, ("pages",)),
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
        rounds = ROUNDS if joint and not full else 1
        settings = {**MFAC_PRUNER, "blocksize": blocksize, "rounds": rounds, **settings}
        if scheduled and optim != "mfac":
            del settings["ngrads"]  # not used in this case
    check_steps(settings, len(choose_levels(settings)))
    return settings


def choose_levels(settings: dict[str, Any]) -> list[float]:
    """The sparsity after each step. Raises UserError if they do not rise."""
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
    """Raises UserError if a flag names a step or an epoch that does not exist."""
    for name in ("recomps", "tests"):
        if beyond := [step for step in settings.get(name, []) if step >= steps]:
            raise UserError(f"--{name} {beyond[0]} is no step: steps are 0 to {steps - 1}")
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
    """The tasks of a run, each with one line of output: ("measure", 0) for the model as it is, then
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
    """The checkpoint of `settings`, or the one in checkpoints/; your own model needs none. Raises
    UserError."""
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
    """The command for these settings."""
    words = ["python3", "main_prun.py"]
    for name, value in settings.items():
        if value is not False:
            values = value if isinstance(value, list) else [value] if value is not True else []
            words += [f"--{name}", *(shlex.quote(str(word)) for word in values)]
    return " ".join(words)
