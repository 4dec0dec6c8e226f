"""Several processes give the same results as one, to rounding; through torchrun, with gloo."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("gloo")


def start(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment | variables, **pipes)


def torchrun(processes, *arguments):
    """A run in so many processes, which has to be waited for."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return start("-m", *several, *arguments)


def work(*plan):
    """Checks of distributed_worker.py, and what they print."""
    return output(start(ROOT / "tests/distributed_worker.py", *plan))


def output(process, timeout=300):
    """What a run has printed; it has to end well."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-5000:]
    return out


CHECKS = ["steps", "mixed", "messages", "skipped", "differing", "lost", "zero", "fsdp1", "swapped"]
CHECKS += ["controlled", "vetoed", "added", "checkpoints", "thawed", "grown", "single"]
CHECKS += ["batch_norm", "found", "inverses", "pruning", "samples", "disagreement", "save"]


def test_every_process_gets_what_one_process_would(tmp_path):
    """And a run goes on in another number of them."""
    work(f"3:{','.join(CHECKS)}", "4:go_on,refused", "1:go_on", tmp_path)


def test_libraries_with_ddp_resume_to_the_same_bits(tmp_path):
    """See trainers_worker.py."""
    output(start(ROOT / "tests/trainers_worker.py", tmp_path))


def test_one_process_has_everything():
    x, alone = torch.arange(12.0).view(3, 4), Ranks()
    for part in (alone.sum(x), alone.part(x), alone.as_sharded(x, 0)):
        assert torch.equal(part, torch.arange(12.0).view(3, 4))
    assert torch.equal(alone.exchange(x, [3], 4), x) and alone.chunk(4) == 4
    assert torch.equal(alone.gather(x[1]), x[1:2])
    assert float(alone.norm(x)) == pytest.approx(506**0.5)  # of the squares up to 11
    assert alone.all(x >= 0) and not alone.all(x > 0)


def script(name, *arguments):
    return [str(ROOT / name), "--model", "resnet20", "--device", "cpu", *map(str, arguments)]


def run_alone(call):
    """The call of a script, in this process."""
    path, *flags = call
    import_module(Path(path).stem).main([str(flag) for flag in flags])


def state_dict(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_close(path, other, tolerance):
    """Models that are the same but for roundings, which the running means add up."""
    a, b = state_dict(path), state_dict(other)
    for name in a:
        x, y = a[name].double(), b[name].double()
        assert float((x - y).norm()) <= tolerance * (1 + float(y.norm())), name


def test_both_scripts(dataset, tmp_path):
    """Training in three processes and pruning with fine-tuning in two are like those in one.
    Batches of 27 leave one of 26, so that parts differ in size."""
    common = ["--dataset", dataset, "--batchsize", "27", "--seed", "3"]
    train = [*common, "--lr", "1e-3", "--ngrads", "8", "--epochs", 2, "--save"]
    alone, path = tmp_path / "alone.pth", tmp_path / "shared.pth"
    prune = [*common, "--checkpoint", path, "--ngrads", "6", "--npergrad", "8"]
    prune += ["--sparsities", "0.4", "0.5", "--nepochs", "2", "--lr", "1e-3"]
    prune += ["--schedule", "cosine", "--distill", "--reestimate_bn", "--out"]
    calls = {
        "training": script("main_optim.py", *train, path),
        "pruning": script("main_prun.py", *prune, tmp_path / "pruned-shared"),
    }
    for name, (_, *flags) in calls.items():
        (tmp_path / name).write_text("\n".join(flags))
    out = work("3:training", "2:pruning_script", tmp_path)
    run_alone(script("main_optim.py", *train, alone))
    run_alone(script("main_prun.py", *prune, tmp_path / "pruned-alone"))

    assert out.count("# ") == 2, "the first process alone prints"
    assert out.count("epoch 1/2") == 1 and out.count("epoch 2/2") == 1
    assert out.count("step 0") == out.count("step 1") == 2, "pruned, and fine-tuned"
    assert_close(path, alone, 1e-3)
    assert {file.suffix for file in tmp_path.glob("shared*")} == {".pth", ".state", ".csv", ".png"}
    saved = torch.load(path.with_suffix(".state"), weights_only=True)["optimizer"]["state"]
    assert all(type(entries["grads"]) is torch.Tensor for entries in saved.values())
    ending = "-step0.pth"
    assert_close(tmp_path / f"pruned-shared{ending}", tmp_path / f"pruned-alone{ending}", 1e-3)


@pytest.mark.cuda(gpus=2)
def test_both_scripts_on_two_gpus(dataset, tmp_path):
    """By torchrun and NCCL, like on one, to the roundings of float32, which training adds up."""
    common = ["--dataset", dataset, "--batchsize", "27", "--seed", "3", "--lr", "1e-3"]
    train = [*common, "--ngrads", "8", "--epochs", 2, "--graph", "no", "--save"]
    alone, path = tmp_path / "alone.pth", tmp_path / "shared.pth"
    prune = [*common, "--checkpoint", path, "--ngrads", "6", "--npergrad", 8, "--sparsities"]
    prune += [0.5, "--nepochs", "1", "--out"]
    ends = tmp_path / "pruned-alone", tmp_path / "pruned-shared"
    for name, flags, (one, several) in (
        ("main_optim.py", train, (alone, path)),
        ("main_prun.py", prune, ends),
    ):
        output(torchrun(2, *script(name, *flags, several, "--device", "cuda")))  # the last counts
        output(start(*script(name, *flags, one, "--device", "cuda")))
    assert_close(path, alone, 1e-2)
    assert_close(tmp_path / "pruned-shared-step0.pth", tmp_path / "pruned-alone-step0.pth", 1e-1)


def children(pid):
    """The processes that `pid` has started."""
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in text.stdout.split()]


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(dataset, tmp_path):
    path = tmp_path / "net.pth"
    call = script("main_optim.py", "--dataset", dataset, "--ngrads", 8, "--save", path)
    call += ["--epochs", 12]
    running = torchrun(2, *call)
    deadline = time.monotonic() + 200
    while not path.with_suffix(".state").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(children(running.pid)[-1], signal.SIGKILL)
    _, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "another process of this run has ended" in err or "SIGKILL" in err, err[-3000:]
    done = len(torch.load(path.with_suffix(".state"), weights_only=True)["history"])
    assert 1 <= done < 12
    run_alone([*call, "--resume"])
    history = torch.load(path.with_suffix(".state"), weights_only=True)["history"]
    assert [row["epoch"] for row in history] == list(range(1, 13))


def test_a_mistake_is_reported_once():
    running = torchrun(2, *script("main_optim.py", "--lr", "nothing"))
    _, err = running.communicate(timeout=100)
    assert running.returncode != 0
    assert err.count("--lr: nothing is not a number above 0") == 1


def test_a_process_that_fails_alone_says_why(tmp_path):
    running = start(ROOT / "tests/distributed_worker.py", "2:one_fails", tmp_path)
    _, err = running.communicate(timeout=100)
    assert running.returncode != 0 and err.count("script: error: only here") == 1
