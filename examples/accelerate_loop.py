"""An Accelerate loop: accumulation, clipping, a schedule, checkpoints, resumption.

    python -m examples.accelerate_loop --output runs/accelerate

`--resume runs/accelerate/epoch-4` resumes from a checkpoint, to the same bits on a CPU. The data
are the handwritten digits of scikit-learn.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optim import MFAC

EPOCHS = 8


def train(output: Path, resume: Path | None = None) -> float:
    """Trains, and writes a checkpoint each epoch to `output`. Returns the final test accuracy."""
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        # The order depends only on the number of the epoch, so a resumed run has the same one.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (images / 16).float()
    order = torch.randperm(len(images))
    training, test = order[:1408], order[1408:]

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 10))
    loader = DataLoader(TensorDataset(images[training], labels[training]), 32, shuffle=True)
    optimizer = MFAC(model.parameters(), lr=0.02, momentum=0.9, ngrads=64, damp=1e-3)
    steps = EPOCHS * len(loader) // 2
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    done = 0
    if resume is not None:
        accelerator.load_state(resume)
        done = int(resume.name.removeprefix("epoch-"))
    for epoch in range(done, EPOCHS):
        loader.set_epoch(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(output / f"epoch-{epoch + 1}")

    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    arguments = parser.parse_args()
    print({"accuracy": train(arguments.output, arguments.resume)})
