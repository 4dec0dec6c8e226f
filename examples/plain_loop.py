"""A plain PyTorch loop: mixed precision, accumulation, clipping, a schedule, averaged weights.

    python -m examples.plain_loop

`--dtype float16` needs the gradient scaler, which skips steps whose gradients overflow. These do
not enter M-FAC's window. The others enter it unscaled and clipped. `--compile` compiles the model.
The data are the handwritten digits of scikit-learn.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from optim import MFAC

MICRO_BATCHES = 2  # a step, of 32 images each
EPOCHS = 12


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def train(dtype: torch.dtype = torch.bfloat16, compiled: bool = False) -> dict[str, float]:
    """Trains. Returns the test accuracy of the last weights and of their average, and the steps."""
    torch.manual_seed(0)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (images / 16).float()
    order = torch.randperm(len(images))
    training, test = order[:1440], order[1440:]

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 10))
    forward = torch.compile(model) if compiled else model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = MFAC(model.parameters(), lr=0.02, momentum=0.9, ngrads=64, damp=1e-3)
    steps = EPOCHS * (len(training) // (32 * MICRO_BATCHES))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.02, total_steps=steps, cycle_momentum=False
    )
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)

    for _ in range(EPOCHS):
        shuffled = training[torch.randperm(len(training))]
        micro_batches = shuffled.split(32)
        for i, batch in enumerate(micro_batches, start=1):
            with torch.autocast("cpu", dtype):
                loss = cross_entropy(forward(images[batch]), labels[batch]) / MICRO_BATCHES
            scaler.scale(loss).backward()
            if i % MICRO_BATCHES == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                average.update_parameters(model)

    return {
        "accuracy": accuracy(model, images[test], labels[test]),
        "averaged": accuracy(average, images[test], labels[test]),
        "steps": optimizer.fisher.count,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    print(train(getattr(torch, arguments.dtype), arguments.compile))
