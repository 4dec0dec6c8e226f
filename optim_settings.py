"""The command line of main_optim.py: flags, their defaults, and the settings that they make."""

import math
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
    check_same,
)

# What a flag is when it is not given. First what holds for all runs, then by data and optimizer:
# the paper's values, and for the digits those of a small search. A row has all the settings of its
# optimizer: one that it lacks is refused. The paper's number of epochs depends on the model.
COMMON = dict(model="resnet20", dataset="digits", optim="mfac", schedule="step", seed=0, amp=False)
COMMON |= dict(compile=False, deterministic=False, save_every=1, state_every=1)
WINDOW = dict(window_dtype="float32", compress=None, light_state=False)
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
DROP_BY = 0.1
CHANGEABLE = {"epochs", "lr", "damp", "drop_at", "drop_by"}  # when a run goes on
CHANGEABLE |= {"graph", "workers", "save_every", "state_every", "light_state"}
PAPER_EPOCHS = {"resnet": 164, "wideresnet": 200, "mobilenet": 100}  # by the start of the name


def default(name: str) -> str:
    """Text for --help: the default of a flag, by optimizer and data where it differs."""
    texts = {}
    for optim in ("mfac", "sgd", "adam"):
        paper, digits = (DEFAULTS[data, optim].get(name) for data in ("paper", "digits"))
        if paper is not None:
            other = "" if digits == paper else f" (digits {digits:g})"
            texts[optim] = f"{paper:g}{other}"
    if len({*texts.values()}) == 1:
        return f"default: {texts.popitem()[1]}"
    return "default: " + ", ".join(f"{optim} {text}" for optim, text in texts.items())


def build_parser() -> Parser:
    """All flags. One that is not given is None, so that defaults and --resume can tell."""
    parser = Parser(
        prog="main_optim.py",
        description="Train an image classifier with M-FAC, SGD or Adam. Defaults are the paper's, "
        "and others for the digits.",
        epilog="Beside the model of --save lie a .state for --resume, a .csv and a .png.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model and data").add_argument
    text = f"default: resnet20; others: {', '.join(models.MODELS)}"
    add("--model", choices=models.MODELS, metavar="MODEL", help=text)
    add("--dataset", help="a folder, or 'digits', the default: handwritten digits, embedded")
    text = "begin with the weights in it; default: with random ones"
    add("--checkpoint", metavar="FILE", help=text)

    add = parser.add_argument_group("optimizer").add_argument
    add("--optim", choices=("mfac", "sgd", "adam"), help="default: mfac")
    compressed = f"with --compress {COMPRESSED['lr']:g}"  # and so is --damp
    add("--lr", type=POSITIVE, help=f"learning rate at the start; {default('lr')}, {compressed}")
    text = f"of sgd; of mfac, as an exponential moving average; {default('momentum')}"
    add("--momentum", type=FRACTION, help=text)
    text = f"L2 decay: part of the gradient; {default('weightdecay')}"
    add("--weightdecay", type=NOT_NEGATIVE, help=text)
    text = f"mfac: gradients in the window, of 4 bytes a weight; {default('ngrads')}"
    add("--ngrads", type=COUNT, help=text)
    text = (
        "mfac: type of the numbers in the window; default: float32, bfloat16 takes half of that, "
    )
    text += "float8_e4m3fn a quarter"
    add("--window_dtype", choices=("float32", "bfloat16", "float8_e4m3fn"), help=text)
    text = (
        "mfac: keep only this part of each gradient, its largest entries, and add the rest to the "
    )
    text += "next one; 0.01 takes 2%% of the memory; default: keep all"
    add("--compress", type=FACTOR, metavar="FRACTION", help=text)
    text = f"mfac: damping of the Fisher matrix; {default('damp')}, {compressed}"
    add("--damp", type=POSITIVE, help=text)

    add = parser.add_argument_group("schedule").add_argument
    epochs = ", ".join(f"{name} {epochs}" for name, epochs in PAPER_EPOCHS.items())
    digits = DEFAULTS["digits", "mfac"]["epochs"]
    text = f"passes over the training images; default: {epochs}, for the digits {digits}"
    add("--epochs", type=COUNT, help=text)
    add("--batchsize", type=COUNT, help=f"images a step; {default('batchsize')}")
    text = "of the learning rate: the steps of --drop_at (default), or falling to zero"
    add("--schedule", choices=("step", "linear", "cosine"), help=text)
    text = "epochs after which it drops; default: 50%% and 75%% of all"
    add("--drop_at", type=COUNT, nargs="+", metavar="EPOCH", help=text)
    add("--drop_by", type=FACTOR, help=f"the factor of a drop; default: {DROP_BY}")
    text = (
        "test and save a moving average of the weights, which keeps this part of itself each step; "
    )
    text += "default: the weights themselves"
    add("--ema", type=FRACTION, metavar="DECAY", help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=SEED, help="of the weights and of the order of the images; default: 0")
    add("--device", help="default: cuda if there is one, otherwise cpu")
    text = "processes that read images, if these are not held in memory; default: one a core, at "
    text += "most 8"
    add("--workers", type=WORKERS, help=text)
    text = "cuda: run each step as one CUDA graph, which is faster; default: yes, where it works"
    add("--graph", choices=("yes", "no"), help=text)
    on, off = {"action": "store_true", "default": None}, "; default: off"
    add("--amp", **on, help=f"forward in bfloat16 where that is safe{off}")
    add("--compile", **on, help=f"compile the model by torch.compile{off}")
    text = f"the same call, or --resume, gives the same bits on CUDA, too, at some cost{off}"
    add("--deterministic", **on, help=text)

    group = parser.add_argument_group("files")
    text = "the model file, .pth or .pt; default: runs/MODEL-DATASET-OPTIM.pth"
    group.add_argument("--save", type=Path, help=text)
    text = "write the model after the first epoch, the last, and each that this divides; default: 1"
    group.add_argument("--save_every", type=COUNT, metavar="EPOCHS", help=text)
    text = "write the state, in which mfac has its window, as often; default: 1"
    group.add_argument("--state_every", type=COUNT, metavar="EPOCHS", help=text)
    text = f"mfac: write a state without momentum and window, which begin empty on --resume{off}"
    group.add_argument("--light_state", **on, help=text)
    add = group.add_mutually_exclusive_group().add_argument
    text = "go on with the run of --save, if there is one, after the last epoch of its state, with "
    text += f"the same flags, or others of --{', --'.join(sorted(CHANGEABLE))}{off}"
    add("--resume", action="store_true", help=text)
    add("--overwrite", action="store_true", help=f"begin anew, whatever is at --save{off}")
    add_figure_flags(group)
    return parser


def choose_settings(given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a new run, where `given` are those of the command line. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**COMMON, "device": device, **given}
    if settings["device"].startswith("cuda"):
        settings = {"graph": "yes", **settings}
    elif settings.get("graph") == "yes":
        raise UserError(f"--graph yes is for CUDA only, and --device is {settings['device']}")
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
        settings = {"drop_at": drops, "drop_by": DROP_BY, **settings}
        if settings["drop_at"] != drops and max(settings["drop_at"]) >= settings["epochs"]:
            raise UserError(
                f"--drop_at {max(settings['drop_at'])} never comes: choose epochs below --epochs "
                f"{settings['epochs']}"
            )
    elif given.keys() & {"drop_at", "drop_by"}:
        raise UserError(f"--drop_at and --drop_by are not for --schedule {schedule}")
    return settings


def changed(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a resumed run: the saved ones, with those in CHANGEABLE as `given`. Raises
    UserError if others differ."""
    check_same({k: v for k, v in given.items() if k not in CHANGEABLE}, saved)
    return choose_settings({**saved, **given})
