"""The pruning script on the digits, with few gradients."""

import csv

import pytest
import torch

import main_optim
import main_prun

SMALL = [
    "--ngrads",
    "8",
    "--npergrad",
    "8",
    "--pruner",
    "mfac",
    "--sparsities",
    "0.3",
    "0.6",
    "0.7",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """ResNet-20 after an epoch of the digits."""
    path = tmp_path_factory.mktemp("dense") / "dense.pth"
    main_optim.main(["--optim", "sgd", "--epochs", "1", "--save", str(path)])
    return path


def prune(checkpoint, out, *flags):
    main_prun.main(["--checkpoint", str(checkpoint), "--out", str(out), *SMALL, *flags])


def rows(out):
    with open(out.with_suffix(".csv")) as file:
        return list(csv.DictReader(file))


def saved(out, step):
    return torch.load(out.with_name(f"{out.name}-step{step}.pth"), weights_only=True)["state_dict"]


def test_levels_are_exact_and_measuring_changes_nothing(checkpoint, tmp_path, capsys):
    prune(checkpoint, tmp_path / "a", "--recomps", "2", "--tests", "0", "1", "2")
    prune(checkpoint, tmp_path / "b", "--recomps", "2")
    for step, sparsity in enumerate((0.3, 0.6, 0.7)):
        a, b = saved(tmp_path / "a", step), saved(tmp_path / "b", step)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        weights = [w for name, w in a.items() if name.endswith("weight") and w.ndim > 1]
        total = sum(w.numel() for w in weights)
        assert sum(int((w == 0).sum()) for w in weights) == round(sparsity * total)
    assert (tmp_path / "a.png").stat().st_size > 0
    assert "0.7000" in capsys.readouterr().out
    assert [row["test_accuracy"] != "" for row in rows(tmp_path / "a")][-3:] == [True] * 3


def test_a_run_that_is_resumed_is_the_uninterrupted_one(checkpoint, tmp_path, monkeypatch):
    prune(checkpoint, tmp_path / "whole", "--recomps", "1", "2")
    keep = main_prun.MFACPruner.prune
    calls = []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return keep(self, target)

    monkeypatch.setattr(main_prun.MFACPruner, "prune", interrupted)
    with pytest.raises(SystemExit) as stop:
        prune(checkpoint, tmp_path / "parts", "--recomps", "1", "2")
    assert stop.value.code == 130
    monkeypatch.undo()
    prune(checkpoint, tmp_path / "parts", "--recomps", "1", "2", "--resume")
    for step in range(3):
        a, b = saved(tmp_path / "whole", step), saved(tmp_path / "parts", step)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sparsities", "0.5", "0.4"], "0.4"),
        (["--sparsities", "1.5"], "1.5"),
        (["--pruner", "best"], "best"),
        (["--ngrads", "0"], "0"),
        (["--damp", "nan"], "nan"),
        (["--ngrads", "100000"], "100,000"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--pattern", "4:2"], "4:2"),
    ],
)
def test_mistakes_are_one_sentence(checkpoint, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        prune(checkpoint, tmp_path / "x", *flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and words in error and "Traceback" not in error
