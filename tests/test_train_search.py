"""benchmarks/train_search.py: a tiny search, what it records, and what it skips when it goes on."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import train_search

GRIDS = {
    "sgd": [{"lr": 0.1, "momentum": 0.9}, {"lr": 1e30, "momentum": 0.9}],
    "adamw": [{"lr": 0.01}, {"lr": 0.02}],
    "muon": [{"lr": 0.05, "lr_adamw": 0.01}, {"lr": 0.1, "lr_adamw": 0.01}],
    "mfac": [
        {"lr": lr, "lr_adamw": 0.01, "ngrads": 8, "momentum": 0.9, "damp": 1e-5}
        | {"normalize": "layer", "warmup": 1}
        for lr in (0.05, 0.1)
    ],
}
LENGTHS = {"short": 10, "middle": 20, "long": 30}


def search(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Runs the script on the digits, with few steps and settings."""
    problem = train_search.digits()
    few = [(x[:100], y[:100]) for x, y in problem.validation]
    problem = replace(problem, validation=few, lengths=LENGTHS)
    monkeypatch.setattr(train_search, "digits", lambda: problem)
    monkeypatch.setattr(train_search, "GRIDS", {"digits": GRIDS})
    monkeypatch.setattr(train_search, "SEEDS", (0, 1))
    monkeypatch.setattr(sys, "argv", ["train_search.py", "--problems", "digits", *flags])
    train_search.main()


def test_search_goes_on_where_it_was_and_reports(monkeypatch, tmp_path, capsys):
    path, figure = tmp_path / "search.csv", tmp_path / "search.png"
    flags = ["--csv", str(path), "--table", "--plot", str(figure)]
    with pytest.raises(SystemExit, match="2"):  # there is nothing to draw yet
        search(monkeypatch, *flags, "--rounds")
    assert "--plot needs runs" in capsys.readouterr().err
    search(monkeypatch, *flags, "--rounds", "broad")
    assert capsys.readouterr().out.count(" (1 of 2 seeds) |") == 3 * 4
    begun = path.read_text()
    search(monkeypatch, *flags, "--rounds", "broad", "best", "without")
    done = path.read_text()
    assert done.startswith(begun)
    capsys.readouterr()
    search(monkeypatch, *flags, "--rounds", "broad", "best", "without")
    assert path.read_text() == done
    shown = capsys.readouterr().out
    assert shown.count(" ± ") == 3 * 4 * len(LENGTHS) + 2 * 6
    assert figure.stat().st_size > 10_000 and path.with_suffix(".json").exists()

    rows = list(csv.DictReader(done.splitlines()))
    assert list(rows[0]) == train_search.COLUMNS
    # 8 of the grid; 4 best x 6, whose middle with seed 0 is there; 5 without x 2 lengths x 2 seeds
    assert len(rows) == 8 + 4 * 5 + 5 * 4
    turns = [row["optimizer"] for row in rows]  # fair wherever it is cut off
    assert turns[: 8 + 4 * 5] == list(GRIDS) * 7
    (diverged,) = [row for row in rows if row["loss"] == "inf"]
    assert diverged["settings"] == "lr=1e+30 momentum=0.9"
    for row in rows:
        if row is not diverged:
            assert float(row["loss"]) < 2.3  # log 10 is 2.303
            assert row["steps"].split()[-1] == str(LENGTHS[row["length"]])
            assert row["losses"].split()[-1] == f"{float(row['loss']):.5g}"


def test_images_are_searched_with_squares_of_pixels_averaged():
    whole, pooled = (train_search.images("digits", pool=pool) for pool in (1, 2))
    (x, y), (small, labels) = next(whole.batches(3)), next(pooled.batches(3))
    assert x.shape == (128, 3, 32, 32) and torch.equal(y, labels)
    expected = x.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
    torch.testing.assert_close(small, expected)
    assert pooled.lengths == whole.lengths == {"short": 24, "middle": 96, "long": 360}
    assert sum(len(y) for _, y in pooled.validation) == 360


def test_images_take_the_settings_of_the_pooled_ones(tmp_path):
    record, grid = train_search.Record(tmp_path / "search.csv"), train_search.GRIDS["pooled"]["sgd"]
    for i, settings in enumerate(grid):
        key = "pooled", "sgd", train_search.as_text(settings), "short", "0"
        record.rows[key] = {"loss": str(2.0 - i)}
    best = [train_search.as_text(settings) for settings in grid[:1:-1]]
    assert record.best("images", "sgd", 2) == record.best("pooled", "sgd", 2) == best
    assert not train_search.plan("broad", record, "images", "sgd")


def test_text_is_in_one_split_only(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("a ~\n\té", encoding="utf-8")
    assert train_search.encoded([path]).tolist() == [66, 1, 95, 0, 96, 96]
    problem = train_search.text()
    (x, y), other = next(problem.batches(0)), next(problem.batches(1))
    assert x.shape == y.shape == (32, 64) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(next(problem.batches(0))[0], x) and not torch.equal(other[0], x)
    assert len(set(train_search.sources())) == len(train_search.sources()) > 100
