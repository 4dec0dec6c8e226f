"""Fine-tuning in main_prun.py: training, with or without a teacher, and batch norm."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim.swa_utils import update_bn

from datautils import Loader
from main_common import TrainingStep, distributed, progress, train_epoch
from optim import MFAC
from prun import MagnitudePruner
from ranks import Ranks

TEMPERATURE = 2.0  # of the outputs of teacher and student that are compared


def distillation_loss(outputs: Tensor, taught: Tensor, labels: Tensor, weight: float) -> Tensor:
    """(1 − w) CE(z, y) + w T² KL(softmax(t/T) ‖ softmax(z/T)), the sum over a batch, for outputs
    z (n, classes) of a student, outputs t of a teacher, and labels y (n,). Source: Hinton, Vinyals
    and Dean, 2015."""
    student, teacher = (log_softmax(x / TEMPERATURE, 1) for x in (outputs, taught))
    divergence = kl_div(student, teacher, reduction="sum", log_target=True)
    labelled = cross_entropy(outputs, labels, reduction="sum")
    return (1 - weight) * labelled + weight * TEMPERATURE**2 * divergence


def estimate_batch_norm(
    model: nn.Module, loader: Iterable[Any], device: torch.device, amp: bool
) -> None:
    """Sets the running statistics of batch norm to the means over all batches."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
        update_bn(progress(loader, "batch norm", len(loader)), model, device)


class FineTuning:
    """Training between pruning steps. Pruned weights stay zero.

    Each pruning step ends the `optimizer`, which is None until the next epoch makes a new one.
    `teacher` is the dense model, with --distill.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        steps: int,
        model: nn.Module,
        pruner: MagnitudePruner,
        loader: Loader,
        ranks: Ranks,
    ):
        self.settings, self.steps, self.ranks = settings, steps, ranks
        self.model, self.pruner, self.loader = model, pruner, loader
        self.optimizer = self.scheduler = self.step = None
        self.trained = self.teacher = None
        if "distill" in settings:
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()

    def release(self) -> None:
        """Ends the optimizer and its schedule."""
        self.optimizer = self.scheduler = self.step = None

    def step_before(self, epoch: int) -> int:
        """The last pruning step before an epoch."""
        return min(epoch // self.settings["prun_every"], self.steps - 1)

    def learning_rate(self, epoch: float) -> float:
        """By --schedule: a cosine from a pruning step to the next, or --lr or --prun_lrs with
        drops."""
        settings, every = self.settings, self.settings["prun_every"]
        step = self.step_before(int(epoch))
        since = epoch - step * every
        if settings["schedule"] == "cosine":
            last = step == self.steps - 1
            total = settings["nepochs"] - step * every if last else every
            return settings["lr"] * (1 + math.cos(math.pi * since / total)) / 2
        rates = settings.get("prun_lrs") or [settings["lr"]]
        drops = sum(epoch >= drop for drop in settings.get("drop_at", []))
        return rates[min(int(since), len(rates) - 1)] * settings.get("drop_by", 0.1) ** drops

    def start_optimizer(self) -> None:
        """Makes a new optimizer with a rate of 1, which the scheduler multiplies."""
        settings = self.settings
        options = {"momentum": settings["momentum"], "weight_decay": settings["weightdecay"]}
        if settings["optim"] == "mfac":
            masks = [self.pruner.masks.get(name) for name, _ in self.model.named_parameters()]
            options |= {name: settings[name] for name in ("ngrads", "damp")}
            options |= {"sparse": masks, "process_group": self.ranks.group}
        optimizer = {"sgd": torch.optim.SGD, "mfac": MFAC}[settings["optim"]]
        self.optimizer = optimizer(self.model.parameters(), lr=1.0, **options)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = 1.0
        self.pruner.attach(self.optimizer)

    def train(self, epoch: int, device: torch.device) -> dict[str, Any]:
        """Trains for an epoch. Returns its figures."""
        settings, batches = self.settings, len(self.loader)
        # Random numbers follow from seed and epoch, as the order of the images, so none are saved.
        torch.manual_seed(settings["seed"] + epoch)
        self.loader.set_epoch(epoch)
        if self.optimizer is None:
            self.start_optimizer()
        if self.step is None:
            first = self.step_before(epoch) * settings["prun_every"]
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer,
                lambda batch: self.learning_rate(first + batch / batches),
                (epoch - first) * batches - 1,
            )
            self.trained = self.trained or distributed(self.model, self.ranks)
            how = {"ranks": self.ranks, "amp": settings["amp"], "loss": self.loss}
            self.step = TrainingStep(self.trained, self.optimizer, **how)
        parts = self.trained, self.loader, self.optimizer, self.scheduler
        how = {"device": device, "ranks": self.ranks, "step": self.step}
        figures = train_epoch(*parts, title=f"epoch {epoch + 1}/{settings['nepochs']}", **how)
        row = {name: figures[name] for name in ("train_loss", "train_accuracy")}
        return {**row, "lr": self.learning_rate(epoch), "training_seconds": figures["seconds"]}

    def loss(self, images: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss, summed over a batch."""
        if self.teacher is None:
            return cross_entropy(outputs, labels, reduction="sum")
        with torch.no_grad():
            taught = self.teacher(images)
        return distillation_loss(outputs, taught, labels, self.settings["distill"])
