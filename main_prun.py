"""Prune a trained image classifier with M-FAC or by magnitude, at once or with fine-tuning.

    python3 main_prun.py --model resnet20 --dataset DATASET --pruner mfac --sparsities 0.5 0.9

Standard output has one line for the model as it is, one for each pruning step, and one for each
epoch of fine-tuning. All files begin with --out: the model with its masks after each step
(-step0.pth, ...), the figures of all lines (.csv), a plot of accuracy against sparsity (.png, at
the end, together with other runs if --plot names their CSVs), and the state of the run (.state).
The state is written first, and all other files follow from it. A run that was killed at any moment
continues with --resume to the same bits: on the CPU with as many threads, on CUDA with
--deterministic.

    torchrun --nproc-per-node N main_prun.py ...

runs N processes that share gradients, F⁻¹, tests and fine-tuning. The first one writes.

Gradients for the inverse Fisher F⁻¹ are of training images with the augmentation of training, as in
the paper's code. F⁻¹ is computed anew before each step; --recomps 0 computes it once for all steps.
--model module:function prunes your own model.
"""

import argparse
import copy
import os
import re
import time
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see main_optim.py

import torch
from torch import nn

import datautils
import models
from costs import check_memory
from finetune import FineTuning, estimate_batch_norm
from gradients import cross_entropy
from main_common import (
    STYLES,
    Runs,
    TensorBoard,
    UserError,
    alike,
    are_rows,
    check_existing,
    check_folder,
    check_same,
    check_space,
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
    tensor_bytes,
)
from optim import window_bytes
from prun import MagnitudePruner, MFACPruner
from prun_settings import (
    COLUMNS,
    COMMON,
    DRAWN,
    MFAC_PRUNER,
    NPERGRAD,
    as_command,
    build_parser,
    choose_levels,
    choose_settings,
    current_name,
    find_checkpoint,
    make_plan,
)

__all__ = ["COMMON", "MFAC_PRUNER", "build_parser", "current_name", "main"]

# --- a run ----------------------------------------------------------------------------------


class Run:
    """A pruning run, and its files."""

    STATEFUL = ("model", "pruner", "optimizer", "teacher")

    def __init__(self, args: argparse.Namespace):
        """Begins a run or continues a saved one. All checks are made here, and nothing but the
        folder is written. Raises UserError, OSError or ValueError."""
        output = ("out", "resume", "overwrite", "plot", "tensorboard", "verbose")
        given = {k: v for k, v in vars(args).items() if v is not None and k not in output}
        names = {**COMMON, **given}
        data = Path(names["dataset"]).resolve().name
        model = names["model"].replace(":", "-")
        self.out = args.out or Path("runs", f"{model}-{data}-pruned-{names['pruner']}")
        self.flag, self.verbose = f"--out {self.out}", args.verbose
        self.tensorboard = TensorBoard(args.tensorboard, self.out.name)
        self.others = read_runs(args.plot, DRAWN)
        state = self.check_files(args.resume, args.overwrite)
        if state:
            check_same({k: v for k, v in given.items() if k != "workers"}, state["settings"])
        settings = {**state["settings"], **given} if state else choose_settings(given)
        self.settings = settings
        self.levels = choose_levels(settings)
        self.ngrads = settings.get("ngrads_schedule") or [settings.get("ngrads")] * len(self.levels)
        self.ngrads_flag = "--ngrads_schedule" if "ngrads_schedule" in settings else "--ngrads"
        self.plan = make_plan(settings, len(self.levels))
        every_step = list(range(len(self.levels)))
        self.recomps = [0, *settings.get("recomps", every_step)]
        self.tests = settings.get("tests", every_step)

        self.device = find_device(settings["device"])
        if settings["deterministic"]:
            make_deterministic()
        self.data = datautils.load(settings["dataset"])
        self.ranks = find_ranks(self.device)
        self.make_loaders()
        torch.manual_seed(settings["seed"])
        model = models.build(settings["model"], self.data.num_classes, self.data.shape)
        sparse, path = False, None if state else find_checkpoint(settings, self.data.name)
        if path is not None:
            models.load_checkpoint(model, path)
            sparse = "masks" in models.read_tensors(path)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.pruner = self.build_pruner(keep_zeros=sparse)
        self.total = sum(weight.numel() for weight in model.parameters())
        self.prunable = sum(mask.numel() for mask in self.pruner.masks.values())
        if settings.get("adjust_sparsities"):
            self.levels = [level * self.total / self.prunable for level in self.levels]
        self.tops = (1, 5) if self.data.num_classes > 5 else (1,)
        parts = self.model, self.pruner, self.train_loader, self.ranks
        self.tuning = FineTuning(settings, len(self.levels), *parts)
        self.history = []  # a dict a line, the rows of the CSV
        if state:
            self.restore(state)
        else:
            self.check_levels()
        self.check_memory(resumed=bool(state))
        if state:
            note(f"going on after line {len(self.history)} of {len(self.plan)}")
        self.out.parent.mkdir(parents=True, exist_ok=True)

    # --- before it starts

    def beside(self, ending: str) -> Path:
        """The file of this run with this ending."""
        return self.out.with_name(self.out.name + ending)

    def files(self) -> list[Path]:
        """The files at --out that exist, of this run or another one. The state is first."""
        names = [self.beside(ending) for ending in (".state", ".csv", ".png")]
        model = re.compile(re.escape(self.out.name) + r"-step\d+\.pth")
        models = sorted(path for path in self.out.parent.glob("*") if model.fullmatch(path.name))
        return [path for path in names + models if path.exists()]

    def check_files(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The saved state, if there is one to continue. Raises UserError if it is not valid, or if
        files would be lost."""
        if self.out.is_dir() or self.out.name in ("", ".."):
            raise UserError(f"--out {self.out} is a folder: add the beginning of the file names")
        check_folder(self.out.parent, "--out")
        state = self.beside(".state")
        if check_existing(self.files(), state, "--out", resume, overwrite):
            return load_state(state, self.STATEFUL, build_parser(), choose_settings)
        return None

    def make_loaders(self) -> None:
        """Sets the loaders, and --npergrad if it was not given."""
        settings = self.settings
        options = {"seed": settings["seed"], "workers": settings.get("workers")}
        self.loading = options = {**options, "device": self.device}
        part = {"part": (self.ranks.rank, self.ranks.size)}
        self.test_loader = self.data.loader("test", settings["batchsize"], **options, **part)
        self.train_loader = self.data.loader("train", settings["batchsize"], **options, **part)
        images = self.train_loader.num_samples
        trains = settings["nepochs"] or settings["reset_bn"] or settings["reestimate_bn"]
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
        self.gradients = self.data.loader("train", settings["npergrad"], **options)

    def build_pruner(self, keep_zeros: bool) -> MagnitudePruner:
        """The pruner of `settings`. Raises ValueError."""
        options = {name: self.settings[name] for name in ("scope", "pattern")}
        options["keep_zeros"] = keep_zeros
        if self.settings["pruner"] == "magnitude":
            return MagnitudePruner(self.model, **options)
        names = ("damp", "update", "rounds", "perbatch", "pages", "seed")
        options |= {name: self.settings[name] for name in names if name in self.settings}
        options["ngrads"] = self.ngrads[0]
        if self.settings["blocksize"] != -1:
            options["blocksize"] = self.settings["blocksize"]
        options["loss"] = self.loss
        return MFACPruner(self.model, self.gradients, device=self.device, **options)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss of a batch for the gradients in F."""
        with torch.autocast(self.device.type, torch.bfloat16, self.settings["amp"]):
            return cross_entropy(model, batch)

    def check_levels(self) -> None:
        """Raises ValueError if a level cannot be reached."""
        for level in self.levels:
            if level >= 1:
                raise UserError(
                    f"only {self.prunable:,} of {self.total:,} weights can be pruned: use lower "
                    "levels with --adjust_sparsities"
                )
            self.pruner.zeros_wanted(level)
        if self.settings.get("pages", 1) > self.prunable:
            raise UserError(f"--pages {self.settings['pages']} is more than a page a weight")

    def check_memory(self, resumed: bool = False) -> None:
        """Says how much memory the inverse Fisher takes. Raises UserError if it, or the window of
        fine-tuning that comes after it, does not fit, or if the state has no space on the disk."""
        settings, saved, plan = self.settings, 0, None
        try:
            if isinstance(self.pruner, MFACPruner):
                plan = self.pruner.memory_plan(max(self.ngrads))
            if settings.get("optim") == "mfac":
                m, d = settings["ngrads"], self.ranks.chunk(self.total)
                check_memory(m, [d], [self.device])
                saved = window_bytes(m, self.total)
        except ValueError as error:
            raise UserError(str(error)) from error
        saved += tensor_bytes([self.state_of(name) for name in ("model", "pruner", "teacher")])
        check_space(self.out, saved if resumed else 2 * saved)
        if plan is not None:
            note(str(plan))

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was saved. Raises UserError if it does not fit."""
        if state["classes"] != self.data.classes:
            raise UserError(f"{self.settings['dataset']} has other classes than the saved run")
        try:
            if not are_rows(state["history"], COLUMNS, len(self.plan)):
                raise ValueError("the figures are others")
            task, index = self.plan[len(state["history"]) - 1]
            step = None if task == "measure" else index
            if task == "tune":
                step = self.tuning.step_before(index)
            if state["history"][-1]["step"] != step:
                raise ValueError("the figures are of another step")
            if not alike(state["model"], self.model.state_dict()):
                raise ValueError("the model is another one")
            self.model.load_state_dict(state["model"])
            self.load_pruner(state["pruner"])
            if (state["optimizer"] is None) != (task != "tune"):
                raise ValueError("the optimizer is not of this epoch")
            if task == "tune":
                self.tuning.start_optimizer()
                load_optimizer(self.tuning.optimizer, state["optimizer"])
            if not alike(state["teacher"], self.state_of("teacher")):
                raise ValueError("the teacher is another one")
            if state["teacher"] is not None:
                self.tuning.teacher.load_state_dict(state["teacher"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.beside('.state')} does not fit the run: {first}") from error
        self.history = state["history"]

    def load_pruner(self, saved: dict[str, Any]) -> None:
        """Loads the state of the pruner. Raises ValueError if masks do not fit the model."""
        pruner, expected = self.pruner, self.pruner.state_dict()
        if "start_weights" in expected and saved["start_weights"]:
            expected |= {"start_weights": pruner.params, "start_masks": pruner.masks}
        if not alike(saved, expected):
            raise ValueError("the masks are of another model or pruner")
        weights, masks = pruner.params.items(), saved["masks"]
        if any((weight[~masks[name]] != 0).any() for name, weight in weights):
            raise ValueError("the masks are of other weights")
        pruner.load_state_dict(copy.deepcopy(saved))  # the pruner keeps masks and weights

    # --- while it runs

    def go(self) -> None:
        """Runs the rest of the plan, then draws the plot."""
        say(f"# {as_command(self.settings)}")
        if self.history:  # again, as the run may have been killed before
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
                how = {"device": self.device, "ranks": self.ranks, "tops": self.tops}
                found = evaluate(self.model, self.test_loader, amp=self.settings["amp"], **how)
                row |= dict(zip(("test_loss", "test_accuracy", "test_top5"), found, strict=False))
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
        """The model as it is, with new statistics of batch norm by --reset_bn."""
        if self.settings["reset_bn"]:
            self.estimate_batch_norm()
        if self.tuning.teacher is not None:
            self.tuning.teacher.load_state_dict(self.model.state_dict())
        return {}

    def estimate_batch_norm(self) -> None:
        """Estimates the statistics of batch norm on all training images, in each process."""
        torch.manual_seed(self.settings["seed"])  # of dropout
        loader = self.data.loader("train", self.settings["batchsize"], **self.loading)
        estimate_batch_norm(self.model, loader, self.device, self.settings["amp"])

    def prune(self, step: int) -> dict[str, Any]:
        """One pruning step."""
        pruner, recomputed = self.pruner, step in self.recomps
        before, began = dict(pruner.seconds), time.perf_counter()
        if mfac := isinstance(pruner, MFACPruner):
            last = max(done for done in self.recomps if done <= step)
            pruner.ngrads = self.ngrads[last]
        parts = self.settings["nrecomps"] if mfac and recomputed else 1
        dense, target = 1 - pruner.sparsity, self.levels[step]
        try:
            for part in range(1, parts + 1):
                if mfac and recomputed:
                    pruner.recompute()
                kept = dense * ((1 - target) / dense) ** (part / parts)
                if part < parts:
                    pruner.prune(1 - kept, partial=True)
            pruner.prune(target)  # exactly
        except ValueError as error:  # too little damping for these gradients, ...
            raise UserError(str(error)) from error
        self.tuning.release()
        if self.settings["nepochs"]:
            pruner.release()  # fine-tuning needs the memory, and every step recomputes
        seconds = {name: pruner.seconds[name] - before[name] for name in before}
        rest = time.perf_counter() - began - sum(seconds.values())
        if self.settings["reestimate_bn"]:
            self.estimate_batch_norm()
        figures = {f"{name}_seconds": value for name, value in seconds.items()}
        epoch = step * self.settings["prun_every"] if self.settings["nepochs"] else None
        return {"step": step, "epoch": epoch, **figures, "update_seconds": rest}

    def tune(self, epoch: int) -> dict[str, Any]:
        """One epoch of fine-tuning."""
        step = self.tuning.step_before(epoch)
        return {"step": step, "epoch": epoch + 1, **self.tuning.train(epoch, self.device)}

    # --- what it leaves

    def layers(self) -> str:
        """The table of layers."""
        lines = []
        for name, mask in self.pruner.masks.items():
            zeros = mask.numel() - int(mask.sum())
            share = f"{zeros:>11,} of {mask.numel():>11,}  sparsity {zeros / mask.numel():.4f}"
            lines.append(f"    {name:<36} {share}")
        return "\n".join(lines)

    def state_of(self, name: str) -> dict[str, Any] | None:
        """The state of the model, the pruner, the optimizer or the teacher, if there is one now."""
        part = getattr(self if hasattr(self, name) else self.tuning, name)
        return None if part is None else part.state_dict()

    def save_state(self, history: list[dict[str, Any]]) -> None:
        """Writes the state for --resume, from which the other files can be made again."""
        state = {"settings": self.settings, "classes": self.data.classes, "history": history}
        state |= {name: gathered(self.state_of(name), self.ranks) for name in self.STATEFUL}
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


def curve(history: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(sparsity, accuracy) in order of sparsity, the last accuracy at each."""
    tested = [row for row in history if row["test_accuracy"] is not None]
    return sorted({row["sparsity"]: row["test_accuracy"] for row in tested}.items())


def save_plot(runs: Runs, path: Path) -> None:
    """Draws accuracy against sparsity, one line for each run."""
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
    """Prunes by the command line, or by `argv`."""
    execute(build_parser(), Run, argv, "use a smaller --blocksize or fewer gradients")


if __name__ == "__main__":
    main()
