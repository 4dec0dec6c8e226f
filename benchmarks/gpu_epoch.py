"""Time of training ResNet-20 on images like those of CIFAR-10, with SGD and M-FAC.

    python benchmarks/gpu_epoch.py [--ngrads 512] [--batches 200] [--without_compile] [--json FILE]

Prints a line for each way to run a step: milliseconds a batch of 128, seconds an epoch of 391
batches, and the ratio of M-FAC to SGD. The images are random and on the device. The first pass over
the batches is a warm-up, the second one is timed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from optim_step import environment

import datautils
import main_common
import main_optim
import models
import optim_settings

EPOCH = 391  # batches
WAYS = {
    "one operation after the other": {},
    "graph": {"graph": True},
    "graph, cudnn.benchmark": {"graph": True, "benchmark": True},
    "graph, contiguous": {"graph": True, "format": torch.contiguous_format},
    "graph, amp": {"graph": True, "amp": True},
    "graph, amp, contiguous": {"graph": True, "amp": True, "format": torch.contiguous_format},
    "graph, compile": {"graph": True, "compile": True},
    "graph, compile, contiguous": {
        "graph": True, "compile": True, "format": torch.contiguous_format
    },
    "graph, compile, amp": {"graph": True, "compile": True, "amp": True},
    "graph, deterministic": {"graph": True, "deterministic": True},
}  # fmt: skip


def milliseconds(data: datautils.Data, optim: str, ngrads: int, device, **way) -> float:
    """Milliseconds of a step."""
    main_common.FORMAT = way.get("format", torch.channels_last)
    torch.backends.cudnn.benchmark = way.get("benchmark", False)
    if way.get("deterministic"):
        main_common.make_deterministic()  # for the rest of the process, so this way is the last
    given = {"dataset": "cifar10", "optim": optim, "device": str(device)}
    settings = optim_settings.choose_settings(
        given | ({"ngrads": ngrads} if optim == "mfac" else {})
    )
    torch.manual_seed(0)
    model = models.build("resnet20", 10).to(device, memory_format=main_common.FORMAT)
    optimizer, _ = main_optim.build_optimizer(model, settings, device, main_common.ALONE)
    trained = torch.compile(model, dynamic=False) if way.get("compile") else model
    how = {"amp": way.get("amp", False), "graph": way.get("graph", False)}
    step = main_common.TrainingStep(trained, optimizer, **how)
    loader = data.loader("train", settings["batchsize"], device=device)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    for epoch in range(2):
        loader.set_epoch(epoch)
        figures = main_common.train_epoch(
            trained, loader, optimizer, scheduler, device=device, step=step
        )
    return 1000 * figures["seconds"] / len(loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ngrads", type=int, default=512, help="gradients in the window")
    parser.add_argument("--batches", type=int, default=200, help="batches a pass")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--without_compile", action="store_true", help="no ways with torch.compile")
    parser.add_argument("--json", type=Path, help="write the times")
    args = parser.parse_args()
    n = 128 * args.batches
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,))
    parts = {"train": (images, labels), "test": (images[:1], labels[:1])}
    data = datautils._in_memory("cifar10", [str(i) for i in range(10)], parts)
    device, rows = main_common.find_device(args.device), []
    print(f"{'':32} {'sgd':>18} {'mfac':>18}   mfac / sgd")
    for name, way in WAYS.items():
        if (way.get("compile") and args.without_compile) or (way and device.type != "cuda"):
            continue
        row: dict = {"way": name}
        for optim in ("sgd", "mfac"):
            try:
                row[optim] = milliseconds(data, optim, args.ngrads, device, **way)
            except Exception as error:  # the other ways still count
                row[optim] = float("nan")
                print(f"{name}, {optim}: {type(error).__name__}: {error}", file=sys.stderr)
        rows.append(row)
        shown = [f"{row[o]:6.2f} ms {row[o] * EPOCH / 1000:6.2f} s" for o in ("sgd", "mfac")]
        ratio = row["mfac"] / row["sgd"]
        print(f"{name:32} {shown[0]:>18} {shown[1]:>18} {ratio:10.2f}", flush=True)
    if args.json:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        found = {"environment": environment() | {"gpu": gpu}, "ngrads": args.ngrads, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
