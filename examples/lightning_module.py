"""A LightningModule: `configure_optimizers` with a schedule, clipping, checkpoints, resumption.

    python -m examples.lightning_module --output runs/lightning

`--resume runs/lightning/epoch-3.ckpt` resumes from a checkpoint, to the same bits on a CPU. The
data are the handwritten digits of scikit-learn.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from optim import MFAC


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        # No dropout: Lightning does not save the state of the random numbers.
        self.model = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 10)
        )

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = MFAC(self.parameters(), lr=0.02, momentum=0.9, ngrads=64, damp=1e-3)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train(output: Path, resume: Path | None = None) -> float:
    """Trains, and writes a checkpoint each epoch to `output`. Returns the final test accuracy."""
    lightning.seed_everything(0, verbose=False)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    data = TensorDataset((images / 16).float(), labels)
    training, test = torch.utils.data.random_split(data, [1408, len(data) - 1408])
    # Its order depends only on the number of the epoch, so a resumed run has the same one.
    sampler = DistributedSampler(training, num_replicas=1, rank=0)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=output,
        callbacks=[
            ModelCheckpoint(output, "epoch-{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, DataLoader(training, 32, sampler=sampler), ckpt_path=resume)
    return trainer.test(model, DataLoader(test, 512), verbose=False)[0]["accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    arguments = parser.parse_args()
    print({"accuracy": train(arguments.output, arguments.resume)})
