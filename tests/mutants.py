"""Changes a module in one place at a time, and checks whether the fast tests fail.

    python tests/mutants.py --module optim --number 200 --seed 0

The tests run first without a change, to find the lines they reach and the time they take. Tests of
more than `--slow` seconds are left out. For each change, the tests that reach its line run, the
fastest first, for `--budget` seconds or until one fails. Lines that no test reaches, because only
CUDA or several processes do, are counted separately. Annotations, docstrings and error messages do
not change.
"""

import argparse
import ast
import collections
import contextlib
import copy
import gc
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported. Only a process with one thread can fork.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import coverage
import hypothesis  # tests import these; here once rather than in each child
import matplotlib.figure  # noqa: F401
import pytest
import sklearn.datasets  # noqa: F401
import torch._dynamo
import torch.distributed.tensor  # noqa: F401

import windows  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["test_misuse", "test_torch_conventions"]
DYNAMIC = ["optim", "windows", "coefficients", "precision", "recovery", "flat", "states", "costs"]
DYNAMIC += ["checks"]
OPTIM = ["test_contract", "test_windows", "test_optim", "test_numerics", *COMMON]
TESTS = {
    **{module: OPTIM for module in DYNAMIC},
    "prun": ["test_prun_fisher", "test_pruners", "test_prune_any", "test_numerics", *COMMON],
}
MEMORY = 24 * 2**30  # bytes of address space; torch alone takes many

# --- changes --------------------------------------------------------------------------------------

SWAPS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.And: [ast.Or],
    ast.Or: [ast.And], ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div],
    ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
}  # fmt: skip
UNCHANGED = {"annotation", "returns", "decorator_list", "bases"}
MESSAGES = {"warn", "debug", "cast"}


@dataclass
class Change:
    parent: Any
    name: str  # of the parent's field
    place: int | None  # in that field, if it is a list
    old: ast.AST
    new: ast.AST
    lines: range | None = field(default=None)  # of the statement; None if all tests reach it

    def make(self) -> None:
        if self.place is None:
            setattr(self.parent, self.name, self.new)
        else:
            getattr(self.parent, self.name)[self.place] = self.new

    def __str__(self) -> str:
        operator = not isinstance(self.old, (ast.stmt, ast.expr))
        # Copies, because nodes are in two places for a moment.
        old, new = copy.deepcopy(self.parent if operator else self.old), copy.deepcopy(self.new)
        texts = [type(x).__name__ if x is new and operator else ast.unparse(x) for x in (old, new)]
        line = (self.parent if operator else self.old).lineno
        return f"{line}: " + "  ->  ".join(" ".join(text.split())[:90] for text in texts)


def others(parent: ast.AST, name: str, node: ast.AST) -> Iterator[ast.AST]:
    """Replacements of a node."""
    yield from (other() for other in SWAPS.get(type(node), []))
    match node:
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=str()):
            yield ast.Constant("other " + node.value)
        case ast.UnaryOp():
            yield node.operand
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Expr():
            yield ast.Pass()
    nothing = isinstance(node, (ast.Constant, ast.Starred))
    if isinstance(parent, ast.Call) and name == "args" and not nothing:
        yield ast.Constant(None)
    if isinstance(parent, ast.keyword) and not nothing:
        yield ast.Constant(None)
    if isinstance(parent, ast.Assign | ast.AnnAssign) and name == "value" and not nothing:
        yield ast.Constant(None)
    if isinstance(parent, ast.If | ast.IfExp | ast.While) and name == "test":
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(parent, ast.Slice) and not isinstance(node, ast.Constant):
        yield ast.BinOp(node, ast.Add(), ast.Constant(1))


def skipped(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in MESSAGES
    return False


def changes(node: ast.AST, lines: range | None = None, local: bool = False) -> Iterator[Change]:
    """All changes below a node."""
    for name, value in ast.iter_fields(node):
        if name in UNCHANGED:
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or skipped(child):
                continue
            within = local or (isinstance(node, ast.FunctionDef) and name == "body")
            header = isinstance(node, ast.stmt) and isinstance(child, ast.expr)
            if within and (isinstance(child, ast.stmt) or (header and hasattr(node, "body"))):
                lines = range(child.lineno, child.end_lineno + 1)
            for new in others(node, name, child):
                yield Change(node, name, place, child, new, lines if within else None)
            yield from changes(child, lines, within)


# --- tests ----------------------------------------------------------------------------------------


class Selected:
    """A pytest plugin that runs only the tests of these names, in this order."""

    def __init__(self, names: list[str]):
        self.order = {name: i for i, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        known = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(known, key=lambda item: self.order[item.nodeid])


class Noted:
    """A pytest plugin that finds the tests that reach each line of a file, and their time."""

    def __init__(self, path: str):
        self.path, self.seconds = path, {}
        self.coverage = coverage.Coverage(data_file=None, include=[path])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        began = sum(os.times()[:4])  # of processors, because other processes may run
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = sum(os.times()[:4]) - began

    def reached(self) -> dict[int, set[str]]:
        lines = self.coverage.get_data().contexts_by_lineno(self.path)
        return collections.defaultdict(set, {line: {*names} for line, names in lines.items()})


def run(module: str, tree: ast.Module, plugin: Any) -> int:
    """Runs the tests with a module made from this tree. Returns their exit status."""
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    hypothesis.settings.load_profile("mutants")
    made = sys.modules[module] = types.ModuleType(module)
    made.__file__ = str(ROOT / f"{module}.py")
    exec(compile(ast.fix_missing_locations(tree), made.__file__, "exec"), made.__dict__)
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS[module]]
    if isinstance(plugin, Selected):
        files = [file for file in files if any(Path(file).name in name for name in plugin.order)]
    with tempfile.TemporaryDirectory() as folder:
        without = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "--assert=plain"]
        options = ["-x", f"--basetemp={folder}/tests", f"--rootdir={ROOT}"]
        return int(pytest.main([*options, *without, *files], plugins=[plugin]))


def forked(call: Callable[[], int], limit: int = 0) -> int:
    """Runs the call in a child without output. Returns its exit status, or minus its signal."""
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.alarm(limit)
            status = call()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=list(TESTS), default="optim")
    parser.add_argument("--number", type=int, default=100, help="of changes")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--slow", type=float, default=3, help="seconds; longer tests are left out")
    parser.add_argument("--budget", type=float, default=20, help="seconds of tests for a change")
    parser.add_argument("--lines", type=int, nargs="*", help="changes of these lines alone")
    args = parser.parse_args(arguments)
    path, noted = ROOT / f"{args.module}.py", Noted(str(ROOT / f"{args.module}.py"))
    tree = ast.parse(path.read_text())
    gc.freeze()
    with tempfile.NamedTemporaryFile() as file:

        def baseline() -> int:
            with noted.coverage.collect():
                status = run(args.module, tree, noted)
            Path(file.name).write_bytes(pickle.dumps((noted.reached(), noted.seconds)))
            return status

        if forked(baseline) != 0:
            print("The tests fail without any change")
            return 1
        reached, seconds = pickle.loads(Path(file.name).read_bytes())
    names = sorted((n for n in seconds if seconds[n] < args.slow), key=seconds.__getitem__)
    print(f"{len(names)} tests of {sum(map(seconds.get, names)):.0f} s", flush=True)
    found = list(changes(tree))
    random.Random(args.seed).shuffle(found)
    if args.lines:
        found = [change for change in found if int(str(change).split(":")[0]) in args.lines]
    counts: collections.Counter[str] = collections.Counter()
    began = time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):
        for change in found[: args.number]:
            near, least = [], 0.0
            tests = (
                names if change.lines is None else set().union(*(reached[i] for i in change.lines))
            )
            for name in names:
                if name in tests:
                    least += seconds[name]
                    if least < args.budget or not near:
                        near.append(name)
            start = time.perf_counter()

            def attempt(change: Change = change, near: list[str] = near) -> int:
                change.make()
                return run(args.module, tree, Selected(near))

            # A change that makes tests hang counts as found.
            status = forked(attempt, limit=30 + 5 * round(args.budget)) if near else None
            outcome = "out of reach" if status is None else "killed" if status else "survived"
            outcome = "hung" if status == -signal.SIGALRM else outcome
            counts[outcome] += 1
            took = time.perf_counter() - start
            print(f"{outcome} ({took:.0f} s): {args.module}.py:{change}", flush=True)
    took, left = time.perf_counter() - began, counts.total() - counts["out of reach"]
    print(f"{args.module}.py, seed {args.seed}: {counts.total()} of {len(found)} changes")
    print(f"{counts['out of reach']} out of reach; of {left} others {counts['killed']} killed, "
          f"{counts['hung']} hung, {counts['survived']} survived; {took:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
