"""The command line of main_optim.py: flags, their defaults, and the settings that they make."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from checks import damp_parts
from fallback import SETTINGS
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
    check_same,
)

# Defaults of the flags. First those of all runs, then those by data and optimizer: the paper's
# values, and for the digits those that were best in docs/settings.md. A row has all settings of its
# optimizer, and other settings are refused. The paper's number of epochs depends on the model.
COMMON = dict(model="resnet20", dataset="digits", optim="mfac", schedule="step", seed=0, amp=False)
COMMON |= dict(compile=False, deterministic=False, save_every=1, state_every=1)
WINDOW = dict(window_dtype="float32", compress=None, light_state=False)
CONTROLLED = dict(normalize="layer", window_warmup=True, fallback="adamw")
COMPRESSED = dict(lr=1e-3, damp=1e-3)  # a step goes lr/damp along what the window does not hold
MUON = dict(lr=0.02, momentum=0.95, weightdecay=0.01, fallback="adamw")
DEFAULTS = {
    ("paper", "sgd"): dict(lr=0.1, momentum=0.9, weightdecay=5e-4, batchsize=128),
    ("paper", "adam"): dict(lr=1e-3, weightdecay=5e-4, batchsize=128),
    ("paper", "mfac"): dict(
        lr=1e-3, momentum=0.0, weightdecay=3e-3, batchsize=128, ngrads=1024, damp=1e-5
    )
    | WINDOW,
    ("paper", "muon"): dict(batchsize=128) | MUON,
    ("digits", "sgd"): dict(epochs=10, lr=0.03, momentum=0.9, weightdecay=5e-4, batchsize=64),
    ("digits", "adam"): dict(epochs=10, lr=1e-2, weightdecay=5e-4, batchsize=64),
    ("digits", "mfac"): dict(
        epochs=10, lr=0.03, momentum=0.9, weightdecay=5e-4, batchsize=64, ngrads=128, damp=1e-3
    )
    | CONTROLLED
    | WINDOW,
    ("digits", "muon"): dict(epochs=10, batchsize=64) | MUON,
}
FALLBACK_LR = {"adamw": 3e-3, "sgd": 0.1}
# Flags without a default, and the optimizers that have them.
CONTROLS = {
    **dict.fromkeys(("window_warmup", "max_step", "max_norm", "normalize"), ("mfac",)),
    "decoupled": ("mfac", "adam"),
    "fallback": ("mfac", "muon"),
    **dict.fromkeys(("fallback_lr", "fallback_weightdecay"), ("mfac", "muon")),
}
OPTIMIZERS = ("mfac", "sgd", "adam", "muon")
DROP_BY = 0.1
CHANGEABLE = {"epochs", "lr", "fallback_lr", "damp", "drop_at", "drop_by"}  # when a run goes on
CHANGEABLE |= {"graph", "workers", "save_every", "state_every", "light_state"}
PAPER_EPOCHS = {"resnet": 164, "wideresnet": 200, "mobilenet": 100}  # by the start of the name


def damping(text: str) -> float | str:
    """An argparse type: λ, or "relative:f" as it is."""
    try:
        damp_parts(text)
    except ValueError:
        return POSITIVE(text)
    return text


def default(name: str) -> str:
    """Text for --help: the default of a flag, by optimizer and data where it differs."""
    texts = {}
    for optim in OPTIMIZERS:
        paper, digits = (DEFAULTS[data, optim].get(name) for data in ("paper", "digits"))
        if paper is not None:
            other = "" if digits == paper else f" (digits {digits:g})"
            texts[optim] = f"{paper:g}{other}"
    if len({*texts.values()}) == 1:
        return f"default: {texts.popitem()[1]}"
    return "default: " + ", ".join(f"{optim} {text}" for optim, text in texts.items())


def build_parser() -> Parser:
    """All flags. A flag that is not given is None, and later gets its default or saved value."""
    parser = Parser(
        prog="main_optim.py",
        description="Train an image classifier with M-FAC, SGD, Adam or Muon. Defaults are those "
        "of the paper; the digits have their own.",
        epilog="Files beside the model of --save: a .state for --resume, a .csv and a .png.",
        allow_abbrev=False,
    )
    on, off = {"action": "store_true", "default": None}, "; default: off"
    group = parser.add_argument_group("model and data")
    add_model_flag(group)
    add = group.add_argument
    add("--dataset", help="a folder, or 'digits', the default: handwritten digits, embedded")
    text = "start from the weights in this file; default: random weights"
    add("--checkpoint", metavar="FILE", help=text)

    add = parser.add_argument_group("optimizer").add_argument
    text = "muon is for comparison, with AdamW for parameters that are not matrices; default: mfac"
    add("--optim", choices=OPTIMIZERS, help=text)
    compressed = f"mfac with --compress and --normalize none {COMPRESSED['lr']:g}"  # --damp too
    add("--lr", type=POSITIVE, help=f"learning rate at the start; {default('lr')}, {compressed}")
    text = f"of sgd; of mfac and muon, as an exponential moving average; {default('momentum')}"
    add("--momentum", type=FRACTION, help=text)
    text = f"weight decay, added to the gradient (L2), for muon decoupled; {default('weightdecay')}"
    add("--weightdecay", type=NOT_NEGATIVE, help=text)
    text = f"mfac, adam: decoupled weight decay, as in AdamW{off}"
    add("--decoupled", **on, help=text)
    text = f"mfac: gradients in the window, 4 bytes a weight each; {default('ngrads')}"
    add("--ngrads", type=COUNT, help=text)
    text = "mfac: type of the window; default: float32; bfloat16 needs half the memory, "
    text += "float8_e4m3fn a quarter"
    add("--window_dtype", choices=("float32", "bfloat16", "float8_e4m3fn"), help=text)
    text = (
        "mfac: keep this fraction of each gradient, its largest entries, and add the rest to the "
    )
    text += "next gradient; 0.01 needs 2%% of the memory; default: keep all"
    add("--compress", type=FACTOR, metavar="FRACTION", help=text)
    text = "mfac: damping of the Fisher matrix, or relative:0.1, this part of the mean squared "
    text += f"gradient, found again once a round of --ngrads steps; {default('damp')}, {compressed}"
    add("--damp", type=damping, help=text)

    add = parser.add_argument_group("control of the step").add_argument
    text = "mfac: while the window has n < ngrads gradients, scale steps by n/ngrads; default: off "
    text += "(digits on)"
    either = argparse.BooleanOptionalAction
    add("--window_warmup", action=either, default=None, help=text)
    text = "mfac: limit of a step's squared length in the norm of F, lr^2 gF^-1g; default: none"
    add("--max_step", type=POSITIVE, metavar="DELTA", help=text)
    text = "mfac: limit of the norm of F^-1g; default: none"
    add("--max_norm", type=POSITIVE, metavar="NORM", help=text)
    text = "mfac: scale each parameter's step to the norm of its weights times --lr; default: none "
    text += "(digits layer)"
    add("--normalize", choices=("layer", "none"), help=text)
    text = "mfac: optimizer of norms, biases and the last linear layer, outside the window; none: "
    text += "mfac itself; default: none (digits adamw); muon has adamw"
    add("--fallback", choices=(*FALLBACK_LR, "none"), help=text)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in FALLBACK_LR.items())
    text = f"learning rate of --fallback at the start; default: {rates} (momentum 0.9)"
    add("--fallback_lr", type=POSITIVE, metavar="LR", help=text)
    decays = ", ".join(f"{name} {SETTINGS[name]['weight_decay']:g}" for name in FALLBACK_LR)
    text = f"weight decay of --fallback, decoupled for adamw; default: {decays}"
    add("--fallback_weightdecay", type=NOT_NEGATIVE, metavar="DECAY", help=text)
    text = "scale the gradient down to this norm before the step; default: off"
    add("--clip", type=POSITIVE, metavar="NORM", help=text)

    add = parser.add_argument_group("schedule").add_argument
    epochs = ", ".join(f"{name} {epochs}" for name, epochs in PAPER_EPOCHS.items())
    digits = DEFAULTS["digits", "mfac"]["epochs"]
    text = f"passes over the training images; default: {epochs}, your own model as resnet, "
    text += f"for the digits {digits}"
    add("--epochs", type=COUNT, help=text)
    add("--batchsize", type=COUNT, help=f"images a step; {default('batchsize')}")
    text = "of the learning rate: drops at --drop_at (default), or a fall to zero"
    add("--schedule", choices=("step", "linear", "cosine"), help=text)
    text = "the learning rate drops after these epochs; default: 50%% and 75%% of --epochs"
    add("--drop_at", type=COUNT, nargs="+", metavar="EPOCH", help=text)
    add("--drop_by", type=FACTOR, help=f"factor of each drop; default: {DROP_BY}")
    text = "steps in which the learning rate rises linearly at the start; default: none"
    add("--warmup_steps", type=COUNT, metavar="STEPS", help=text)
    text = "label smoothing in training: this share goes to all classes equally; default: 0"
    add("--label_smoothing", type=FRACTION, metavar="SHARE", help=text)
    text = "test and save an exponential moving average of the weights with this decay a step; "
    text += "default: the weights themselves"
    add("--ema", type=FRACTION, metavar="DECAY", help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=SEED, help="seed of weights, image order and augmentation; default: 0")
    add("--device", help="default: cuda if there is one, otherwise cpu")
    text = "processes that read images, if images are not held in memory; default: one a core, "
    text += "at most 8"
    add("--workers", type=WORKERS, help=text)
    text = "cuda: run each step as one CUDA graph, which is faster; default: yes, if it works"
    add("--graph", choices=("yes", "no"), help=text)
    add("--amp", **on, help=f"compute in bfloat16 where that is safe; faster on GPUs{off}")
    add("--compile", **on, help=f"compile the model with torch.compile{off}")
    text = f"same bits from the same call, or with --resume, on CUDA too; slower{off}"
    add("--deterministic", **on, help=text)

    group = parser.add_argument_group("files")
    text = "the model file, .pth or .pt; default: runs/MODEL-DATASET-OPTIM.pth"
    group.add_argument("--save", type=Path, help=text)
    text = "write the model every so many epochs, and after the first and the last; default: 1"
    group.add_argument("--save_every", type=COUNT, metavar="EPOCHS", help=text)
    text = "the same for the state, which includes the window of mfac; default: 1"
    group.add_argument("--state_every", type=COUNT, metavar="EPOCHS", help=text)
    text = f"mfac: states without momentum and window, which start empty after --resume{off}"
    group.add_argument("--light_state", **on, help=text)
    add = group.add_mutually_exclusive_group().add_argument
    text = "continue the run of --save from its state, if there is one; flags may change: "
    text += f"--{', --'.join(sorted(CHANGEABLE))}{off}"
    add("--resume", action="store_true", help=text)
    add("--overwrite", action="store_true", help=f"start over and replace the files of --save{off}")
    add_figure_flags(group)
    return parser


def choose_settings(given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a new run, where `given` are those of the command line. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**COMMON, "device": device, **given}
    relative = isinstance(settings.get("damp"), str)  # which a graph cannot find again
    if settings["device"].startswith("cuda"):
        settings = {"graph": "no" if relative else "yes", **settings}
        if relative and settings["graph"] == "yes":
            raise UserError("--damp relative goes with --graph no: a graph keeps its damping")
    elif settings.get("graph") == "yes":
        raise UserError(
            f"--graph yes is for CUDA, but --device is {settings['device']}: leave it out"
        )
    optim, schedule = settings["optim"], settings["schedule"]
    defaults = DEFAULTS["digits" if settings["dataset"] == "digits" else "paper", optim]
    for name in ("momentum", "ngrads", "damp", *WINDOW):
        if name in given and name not in defaults:
            raise UserError(f"--{name} is no setting of --optim {optim}: leave it out")
    for name in given.keys() & CONTROLS.keys():
        if optim not in CONTROLS[name]:
            raise UserError(f"--{name} is no setting of --optim {optim}: leave it out")
    family = next((name for name in PAPER_EPOCHS if settings["model"].startswith(name)), "resnet")
    normalized = {**defaults, **given}.get("normalize", "none") != "none"
    compressed = COMPRESSED if "compress" in given and not normalized else {}
    settings = {"epochs": PAPER_EPOCHS[family], **defaults, **compressed, **settings}
    fallback = settings.get("fallback", "none")
    if optim == "muon" and fallback != "adamw":
        raise UserError(
            f"--fallback {fallback} is no setting of --optim muon, which goes with adamw"
        )
    if fallback != "none":
        settings = {"fallback_lr": FALLBACK_LR[fallback], **settings}
    elif settings.keys() & {"fallback_lr", "fallback_weightdecay"}:
        raise UserError(
            "--fallback_lr and --fallback_weightdecay go with --fallback: add adamw or sgd"
        )
    if schedule == "step":
        drops = [math.ceil(settings["epochs"] * part) for part in (0.5, 0.75)]
        settings = {"drop_at": drops, "drop_by": DROP_BY, **settings}
        if settings["drop_at"] != drops and max(settings["drop_at"]) >= settings["epochs"]:
            raise UserError(
                f"--drop_at {max(settings['drop_at'])} never comes: choose epochs below --epochs "
                f"{settings['epochs']}"
            )
    elif given.keys() & {"drop_at", "drop_by"}:
        raise UserError(
            f"--drop_at and --drop_by are not for --schedule {schedule}: leave them out"
        )
    return settings


def changed(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a resumed run: the saved ones, with those in CHANGEABLE as `given`. Raises
    UserError if others differ."""
    check_same({k: v for k, v in given.items() if k not in CHANGEABLE}, saved)
    return choose_settings({**saved, **given})
