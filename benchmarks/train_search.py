"""A search for the settings of M-FAC, SGD, AdamW and Muon, with as many runs for each.

    python benchmarks/train_search.py [--problems digits text] [--rounds broad best second without]
        [--csv FILE] [--table] [--plot FILE] [--dataset PATH]

Problems: "digits", a small CNN on handwritten digits; "text", a transformer with two layers on the
next character of Python sources, those of the standard library; with --dataset, ResNet-20 on the
"images" at PATH, and on the same "pooled", 2×2 pixels averaged, at a quarter of the cost.

Rounds: "broad" runs the grid below with seed 0, pooled images at the short length, the others at
the middle one; images take over what came out for pooled ones. "best" and "second" run the settings
of each optimizer that came out first and second at every length with three seeds; "without" runs
the first of M-FAC with one thing left out at a time, but not long. The optimizers take turns. In
every run the learning rate rises during 5 % of the steps, then falls linearly to zero. What a grid
leaves out is the optimizer's default.

Muon and M-FAC take the matrices in the middle of the net, AdamW the rest (`lr_adamw`); a
convolution is a matrix with a filter a row. A run is a row of the CSV, appended as it ends; runs
that are there already are skipped. Seconds are processor time of training, one thread, without
evaluation.
"""

import argparse
import csv
import functools
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads disturb each other
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from optim_step import environment
from torch import Tensor, nn

import datautils
import models
from mfac import MFAC, mfac_groups
from muon import Muon

Settings = dict[str, Any]
Batch = tuple[Tensor, Tensor]
RESULTS = Path(__file__).resolve().parent / "results" / "train_search.csv"
COLUMNS = ["problem", "optimizer", "settings", "length", "seed", "loss", "accuracy", "seconds"]
COLUMNS += ["steps", "losses", "accuracies", "clock"]  # of each evaluation
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon", "mfac": "M-FAC"}
LENGTHS, SEEDS, EVALUATIONS, WARMUP = ("short", "middle", "long"), (0, 1, 2), 10, 0.05
ROUNDS = "broad", "best", "second", "without"


# --- problems -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """`batches` draws batches for training without end, from a seed; `lengths` are in steps."""

    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    validation: list[Batch]
    lengths: dict[str, int]


def digits() -> Problem:
    """Half of the images to train, half to validate: 28 batches of 32 an epoch; 2, 8, 30 epochs."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, rest = order[:896], order[896:]

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((1, 16, 32, 64)):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for batch in train[torch.randperm(len(train), generator=generator)].split(32):
                yield x[batch], y[batch]

    return Problem(model, batches, [(x[rest], y[rest])], dict(short=56, middle=224, long=840))


class Transformer(nn.Module):
    """Next character: two layers before whose attention and MLP the layer norms are."""

    def __init__(self, characters: int, context: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        block = dict(nhead=4, dim_feedforward=4 * width, dropout=0.0, activation="gelu")
        layer = nn.TransformerEncoderLayer(width, **block, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        return self.head(self.blocks(x, mask, is_causal=True)).transpose(1, 2)


def sources() -> list[Path]:
    """The modules of the standard library, shuffled: the first tenth is for validation."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(paths)
    return paths


def encoded(paths: list[Path]) -> Tensor:
    """Characters as numbers: 0 for the end of a line, 1 to 95 for ASCII, 96 for others."""
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    printable = (codes >= 32) & (codes < 127)
    return torch.where(printable, codes - 31, 96 * (codes != 10)).long()


def text(batch: int = 32, context: int = 64) -> Problem:
    """Batches of 32 pieces of 64 characters, drawn anywhere in the files for training."""
    paths = sources()
    held_out, train = encoded(paths[: len(paths) // 10]), encoded(paths[len(paths) // 10 :])

    def draw(codes: Tensor, count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(codes) - context, (count, 1), generator=generator)
        pieces = codes[starts + torch.arange(context + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(train, batch, generator)

    generator = torch.Generator().manual_seed(0)
    validation = [draw(held_out, 128, generator) for _ in range(4)]
    lengths = dict(short=100, middle=400, long=800)
    return Problem(lambda: Transformer(97, context), batches, validation, lengths)


def images(dataset: str, pool: int = 1) -> Problem:
    """ResNet-20, batches of 128; 2, 8 and 30 epochs. `pool` averages squares of pixels."""
    data = datautils.load(dataset)

    def pooled(loader: datautils.Loader) -> Iterator[Batch]:
        for x, y in loader:
            yield nn.functional.avg_pool2d(x, pool), y

    def model() -> nn.Module:
        return models.build("resnet20", data.num_classes).to(memory_format=torch.channels_last)

    def batches(seed: int) -> Iterator[Batch]:
        loader = data.loader("train", 128, seed=seed)
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from pooled(loader)

    epoch = len(data.loader("train", 128))
    lengths = {name: epoch * n for name, n in (("short", 2), ("middle", 8), ("long", 30))}
    return Problem(model, batches, list(pooled(data.loader("test", 1000))), lengths)


# --- optimizers -----------------------------------------------------------------------------------


def build(name: str, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    settings = dict(settings)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), **settings)
    if name == "adamw":
        beta2 = settings.pop("beta2", 0.999)
        return torch.optim.AdamW(model.parameters(), betas=(0.9, beta2), **settings)
    lr_adamw = settings.pop("lr_adamw", None)
    if name == "muon":  # with torch's default of weight decay
        return Muon(model, weight_decay=0.1, fallback={"lr": lr_adamw}, **settings)
    groups = [*model.parameters()] if lr_adamw is None else mfac_groups(model, lr=lr_adamw)
    settings |= {"ngrads": int(settings["ngrads"]), "warmup": "warmup" in settings}
    return MFAC(groups, **settings)


def product(**values: list[float]) -> list[Settings]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


CONTROLLED: Settings = dict(ngrads=256, momentum=0.9, damp=1e-5, normalize="layer", warmup=1)
GRIDS: dict[str, dict[str, list[Settings]]] = {  # as many settings for each optimizer
    "digits": {
        "sgd": product(lr=[0.03, 0.1, 0.3, 1.0], momentum=[0.8, 0.9, 0.95]),
        "adamw": product(lr=[3e-3, 1e-2, 3e-2, 1e-1], beta2=[0.95, 0.99, 0.999]),
        "muon": product(lr=[0.01, 0.03, 0.1, 0.3], lr_adamw=[3e-3, 1e-2, 3e-2]),
        "mfac": [
            CONTROLLED | {"ngrads": 128} | settings
            for settings in product(lr=[0.03, 0.05, 0.1, 0.2], lr_adamw=[3e-3, 1e-2, 3e-2])
        ],
    },
    "text": {
        "sgd": product(lr=[0.3, 1.0, 3.0], momentum=[0.9, 0.95]),
        "adamw": product(lr=[1e-2, 2e-2, 4e-2], beta2=[0.99, 0.999]),
        "muon": [
            *product(lr=[0.02, 0.04, 0.08], lr_adamw=[1e-2, 2e-2]),
            {"lr": 0.08, "lr_adamw": 0.02, "momentum": 0.9},
        ],
        "mfac": [
            CONTROLLED | {"lr": 0.035, "lr_adamw": 0.02} | settings
            for settings in (
                {},
                {"lr": 0.06},
                {"momentum": 0.95},
                {"lr": 0.02},
                {"ngrads": 128},
                {"damp": 1e-3},
            )
        ],
    },
    "pooled": {
        "sgd": [
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4} | settings
            for settings in ({}, {"lr": 0.3}, {"weight_decay": 0}, {"lr": 0.05})
        ],
        "adamw": [
            {"lr": 3e-3, "weight_decay": 0.01} | settings
            for settings in ({}, {"lr": 1e-2}, {"weight_decay": 0.1}, {"lr": 2e-3})
        ],
        "muon": [
            {"lr": 0.05, "lr_adamw": 3e-3} | settings
            for settings in ({}, {"lr": 0.1}, {"lr": 0.02}, {"lr_adamw": 1e-2})
        ],
        "mfac": [
            CONTROLLED | {"lr": 0.05, "lr_adamw": 3e-3},
            CONTROLLED | {"lr": 0.1, "lr_adamw": 3e-3},
            dict(ngrads=512, lr=3e-3, momentum=0.9, damp=1e-5),  # the paper's algorithm
            CONTROLLED | {"lr": 0.02, "lr_adamw": 3e-3},
        ],
    },
}
GRIDS["images"] = GRIDS["pooled"]
SEARCHED = {"images": "pooled"}  # whose broad round stands for it, as its own takes too long
BROAD = {"pooled": "short"}  # the length of the broad round, if it is not the middle one


# --- runs -----------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the share in % of those that are right."""
    model.eval()
    loss = right = count = 0.0
    for x, y in batches:
        logits = model(x)
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(1) == y).sum().item()
        count += y.numel()
    model.train()
    return loss / count, 100 * right / count


def train(problem: Problem, name: str, settings: Settings, length: str, seed: int) -> dict:
    """One run, as a row of the CSV; loss inf if it diverged."""
    torch.manual_seed(seed)
    model, steps = problem.model(), problem.lengths[length]
    optimizer = build(name, model, settings)
    rates = [(group, group["lr"]) for group in optimizer.param_groups]
    marks = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    warmup, clock = max(1, round(WARMUP * steps)), 0.0
    curve: list[tuple[int, float, float, float]] = []
    start = time.process_time()
    for step, (x, y) in enumerate(itertools.islice(problem.batches(seed), steps), 1):
        for group, lr in rates:
            group["lr"] = lr * min(step / warmup, (steps - step + 1) / (steps - warmup))
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step in marks or not loss.isfinite():
            clock += time.process_time() - start
            curve.append((step, *evaluate(model, problem.validation), clock))
            start = time.process_time()
            if not loss.isfinite():
                break
    at, losses, accuracies, clocks = zip(*curve, strict=True)
    final = losses[-1] if at[-1] == steps else float("inf")
    row = {"loss": final, "accuracy": accuracies[-1], "seconds": clocks[-1]}
    lists = {"steps": at, "losses": losses, "accuracies": accuracies, "clock": clocks}
    return row | {key: " ".join(f"{x:.5g}" for x in values) for key, values in lists.items()}


def as_text(settings: Settings) -> str:
    return " ".join(f"{k}={v if isinstance(v, str) else f'{v:g}'}" for k, v in settings.items())


def from_text(text: str) -> Settings:
    pairs = (pair.split("=") for pair in text.split())
    return {k: v if v.isalpha() else float(v) for k, v in pairs}


class Record:
    """The rows of a CSV file, by problem, optimizer, settings, length and seed."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            with open(path, newline="") as file:
                self.rows = {tuple(row.values())[:5]: row for row in csv.DictReader(file)}

    def add(self, row: dict[str, str]) -> None:
        """Appends a row to the file, with a head if it is the first."""
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        self.rows[tuple(row.values())[:5]] = row

    def best(self, problem: str, optimizer: str, count: int) -> list[str]:
        """The settings of the grid with the lowest loss in the broad round."""
        losses, problem = {}, SEARCHED.get(problem, problem)
        for settings in map(as_text, GRIDS[problem][optimizer]):
            key = problem, optimizer, settings, BROAD.get(problem, "middle"), "0"
            if row := self.rows.get(key):
                losses[settings] = float(row["loss"])
        return sorted(losses, key=losses.__getitem__)[:count]

    def final(self, problem: str, optimizer: str, length: str) -> list[dict[str, str]]:
        """The rows of all seeds with the settings that ran with most seeds, and of these with the
        lowest mean loss."""
        found = [
            self.seeds(problem, optimizer, s, length) for s in self.best(problem, optimizer, 2)
        ]
        return min(found, key=lambda rows: (-len(rows), sum(numbers(rows, "loss"))), default=[])

    def seeds(self, problem: str, optimizer: str, settings: str, length: str) -> list[dict]:
        """The rows of all seeds that are there."""
        keys = [(problem, optimizer, settings, length, str(seed)) for seed in SEEDS]
        return [self.rows[key] for key in keys if key in self.rows]


def numbers(rows: list[dict[str, str]], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


def plan(round: str, record: Record, problem: str, optimizer: str) -> list[tuple[str, str, int]]:
    """Settings, length and seed of each run of a round."""
    if round == "broad":
        grid = [] if problem in SEARCHED else GRIDS[problem][optimizer]
        return [(as_text(s), BROAD.get(problem, "middle"), 0) for s in grid]
    if round == "without":
        less = without(record, problem) if optimizer == "mfac" else []
        return list(itertools.product(less, LENGTHS[:2], SEEDS))
    rank = ("best", "second").index(round)
    best = record.best(problem, optimizer, 2)[rank:][:1]
    return list(itertools.product(best, LENGTHS, SEEDS))


def in_turn(
    round: str, record: Record, problem: str, optimizers: list[str]
) -> list[tuple[str, str, str, int]]:
    """The runs of a round, the optimizers in turn, so that a search that is cut off is fair."""
    plans = [[(o, *run) for run in plan(round, record, problem, o)] for o in optimizers]
    return [run for runs in itertools.zip_longest(*plans) for run in runs if run]


def without(record: Record, problem: str) -> list[str]:
    """The best settings of M-FAC with one thing less in each. Without a length for each layer, the
    rate is 2/m: a step is then about 2/‖g‖ long. Without F⁻¹, λ is so large that it is 1/λ."""
    less = []
    for settings in map(from_text, record.best(problem, "mfac", 1)):
        for name in ("normalize", "warmup", "lr_adamw", "momentum"):
            less.append({k: v for k, v in settings.items() if k != name})
        less[0]["lr"] = 2 / settings["ngrads"]
        less.append(settings | {"damp": 1e6})
    return list(map(as_text, less))


# --- report ---------------------------------------------------------------------------------------


def print_tables(record: Record) -> None:
    """Loss, accuracy and seconds of the best of each optimizer at every length: mean ± standard
    deviation over the seeds. Then their settings, and what M-FAC has without each control."""
    chosen: dict[tuple[str, str], dict[str, None]] = {}
    for column, digits in (("loss", 3), ("accuracy", 2), ("seconds", 1)):
        print(
            f"\n| {column} | {' | '.join(OPTIMIZERS.values())} |\n|---|{'---|' * len(OPTIMIZERS)}"
        )
        for problem, length in itertools.product(GRIDS, LENGTHS):
            cells = []
            for optimizer in OPTIMIZERS:
                rows = record.final(problem, optimizer, length)
                cells.append(mean_and_deviation(rows, column, digits))
                if rows:
                    chosen.setdefault((problem, optimizer), {})[rows[0]["settings"]] = None
            if any(cells):
                print(f"| {problem}, {length} | {' | '.join(cells)} |")
    for names, settings in chosen.items():
        print(f"\n{', '.join(names)}: {'; '.join(settings)}")
    for problem, length in itertools.product(GRIDS, LENGTHS[:2]):
        for settings in record.best(problem, "mfac", 1) + without(record, problem):
            if rows := record.seeds(problem, "mfac", settings, length):
                print(f"\n{problem}, {length}, {settings}: {mean_and_deviation(rows, 'loss', 3)}")


def mean_and_deviation(rows: list[dict[str, str]], column: str, digits: int) -> str:
    """How many seeds there are is said where some are missing."""
    values = numbers(rows, column)
    count = f" ({len(values)} of {len(SEEDS)} seeds)" if len(values) < len(SEEDS) else ""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}{count}" if values else ""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}{count}"


def complete(record: Record, problem: str) -> bool:
    """Whether each optimizer has run."""
    return all(any(record.final(problem, o, length) for length in LENGTHS) for o in OPTIMIZERS)


def draw(record: Record, path: Path) -> None:
    """Loss against steps and against seconds: the longest runs of each optimizer, mean and standard
    deviation over the seeds, if there are several, and where the shorter ones end."""
    from matplotlib.figure import Figure

    styles = dict(zip(OPTIMIZERS, ("-", "--", "-.", ":"), strict=True))
    colors = dict(zip(OPTIMIZERS, ("#0072B2", "#D55E00", "#CC79A7", "#009E73"), strict=True))
    markers = dict(zip(OPTIMIZERS, "osD^", strict=True))
    problems = [p for p in GRIDS if complete(record, p)]
    figure = Figure(figsize=(10, 4 * len(problems)), layout="constrained")
    grid = figure.subplots(len(problems), 2, sharey="row", squeeze=False)
    for axes, problem in zip(grid, problems, strict=True):
        for axis, column, label in zip(axes, ("steps", "clock"), ("Steps", "Seconds"), strict=True):
            axis.set(yscale="log", xlabel=label, title=problem)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(which="both", labelsize=8)
            axis.grid(alpha=0.3)
            for name, shown in OPTIMIZERS.items():
                style = {"color": colors[name], "linestyle": styles[name]}
                runs = [record.final(problem, name, length) for length in LENGTHS]
                for rows in filter(None, runs):
                    x, losses = (
                        torch.tensor([[float(v) for v in row[c].split()] for row in rows])
                        for c in (column, "losses")
                    )
                    x, mean = x.mean(0), losses.mean(0)
                    deviation = losses.std(0, correction=int(len(rows) > 1))
                    axis.plot(x[-1], mean[-1], marker=markers[name], color=colors[name])
                axis.plot(x, mean, label=shown, **style)
                band = (mean - deviation, mean + deviation)
                axis.fill_between(x, *band, color=colors[name], alpha=0.2, linewidth=0)
        axes[0].set_ylabel("Validation loss")
        axes[0].legend()
    figure.savefig(path, dpi=150)


def origin() -> dict[str, str | int]:
    """What the figures depend on, beside the settings."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()
    return {**environment(), "commit": commit, "sources": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--problems", nargs="+", choices=GRIDS, help="default: digits text, and images if given")
    add("--optims", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    add("--rounds", nargs="*", choices=ROUNDS, default=list(ROUNDS), help="none: only the report")
    add("--dataset", help="images for the third problem, as for main_optim.py")
    add("--csv", type=Path, default=RESULTS, help=f"default: {RESULTS.name} beside the others")
    add("--table", action="store_true", help="print tables")
    add("--plot", type=Path, help="draw the curves into this PNG file")
    args = parser.parse_args()
    problems = {"digits": digits, "text": text}
    if args.dataset:
        problems["pooled"] = functools.partial(images, args.dataset, pool=2)
        problems["images"] = functools.partial(images, args.dataset)
    elif unknown := {"pooled", "images"} & {*(args.problems or [])}:
        parser.error(f"--problems {min(unknown)} needs --dataset")
    torch.set_num_threads(1)
    record, count = Record(args.csv), 0
    for name in (args.problems or problems) if args.rounds else []:
        problem = problems[name]()
        for round in args.rounds:
            for optimizer, settings, length, seed in in_turn(round, record, name, args.optims):
                key = name, optimizer, settings, length, str(seed)
                if length in args.lengths and key not in record.rows:
                    row = train(problem, optimizer, from_text(settings), length, seed)
                    record.add(dict(zip(COLUMNS, key, strict=False)) | row)
                    print(*key, *(f"{float(row[c]):.4g}" for c in COLUMNS[5:8]), flush=True)
                    count += 1
    if count:
        args.csv.with_suffix(".json").write_text(json.dumps(origin(), indent=1) + "\n")
    if args.table:
        print_tables(record)
    if args.plot:
        if not any(complete(record, problem) for problem in GRIDS):
            parser.error("--plot needs runs of each optimizer: add --rounds broad")
        draw(record, args.plot)


if __name__ == "__main__":
    main()
