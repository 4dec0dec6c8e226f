"""What each process of the tests of training libraries with DistributedDataParallel does.

    python trainers_worker.py FOLDER

With each library, two processes train, and go on from the checkpoint that it saved halfway,
in which the optimizer is that of the first process: weights, momentum and window are those of the
uninterrupted run, to the bit, and of all processes.
"""

import copy
import functools
import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_worker import forked
from test_optim import assert_same_state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optim import MFAC

SETTINGS = {"lr": 0.02, "momentum": 0.9, "ngrads": 8, "damp": 1e-3}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 10, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def accelerate(folder, resume):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = MFAC(model.parameters(), **SETTINGS)
    net, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(data(), 8))
    if resume:
        accelerator.load_state(folder / "state")
    for epoch in range(1 if resume else 0, 2):
        for x, y in loader:
            prepared.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(net(x), y))
            prepared.step()
        if epoch == 0:
            accelerator.save_state(folder / "state")
    return model, optimizer


def transformers(folder, resume):
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x, labels):
            scores = self.layers(x)
            return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}

    model = Model()
    optimizer = MFAC(model.parameters(), **SETTINGS)
    arguments = TrainingArguments(
        str(folder),
        max_steps=12,
        save_steps=6,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    examples = [{"x": x, "labels": y} for x, y in data()]
    trainer = Trainer(model, arguments, train_dataset=examples, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
    return model, optimizer


def lightning(folder, resume):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

        def configure_optimizers(self):
            return MFAC(self.parameters(), **SETTINGS)

    os.environ["TORCHELASTIC_RUN_ID"] = "here"  # the processes are there: it must not start any
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy="ddp",
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = folder / "epoch=0.ckpt" if resume else None
    trainer.fit(module, DataLoader(data(), 8), ckpt_path=path)
    return module, module.optimizers().optimizer


def check(library, folder):
    def run(resume):
        model, optimizer = library(folder, resume)
        weights = {name: w.detach().clone() for name, w in model.state_dict().items()}
        return {"weights": weights, **copy.deepcopy(optimizer.state_dict())}

    expected, found = run(False), run(True)
    assert expected["param_groups"][0]["fisher"]["count"] == 12
    assert_same_state(found, expected)
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, found)
    for state in states:
        assert_same_state(state, expected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for library in (accelerate, transformers, lightning):
        importlib.import_module(library.__name__)  # here rather than in each process
        folder = Path(sys.argv[1], library.__name__)
        folder.mkdir()
        forked(2, folder, [functools.partial(check, library)])
