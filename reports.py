"""Progress of a pruner: a line on a terminal, otherwise the logger "prun"; warnings; times."""

import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

LOGGER = logging.getLogger("prun")


# Modules of the pruner; the last is that of torch.no_grad.
INSIDE = [
    "blocks",
    "gradients",
    "masks",
    "memory",
    "prun",
    "reports",
    "rows",
    "samples",
    "_contextlib",
]


def warn(message: str) -> None:
    """Warns at the line that called the pruner."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").rpartition(".")[2] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time of the block to seconds[name]."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began


@dataclass(frozen=True)
class Reporter:
    """Shows progress: on a terminal in one line of stderr, otherwise at level INFO of the logger
    "prun". `LOGGER.setLevel("ERROR")` silences both.

    Args:
        speaks: whether it shows anything, as in the first of several processes.
        prefix: before each message.
    """

    speaks: bool = True
    prefix: str = ""

    def within(self, part: str) -> "Reporter":
        """A reporter for a part of the work."""
        return replace(self, prefix=f"{self.prefix}{part}: ")

    def say(self, text: str) -> None:
        """Shows what begins, or a result."""
        if not self.speaks:
            return
        if self._on_terminal():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{(self.prefix + text)[:width]}", end="", file=sys.stderr, flush=True)
        else:
            LOGGER.info("%s%s", self.prefix, text)

    def counted(self, things: Iterable[Any], title: str, total: int | None) -> Iterator[Any]:
        """Yields the things. A terminal shows their number, and time left if `total` is known."""
        self.say(title if total is None else f"{title} of {total:,}")
        began = shown = time.perf_counter()
        for number, thing in enumerate(things):
            now = time.perf_counter()
            if now - shown > 0.1 and self._on_terminal():
                text, shown = f"{title}, batch {number + 1:,}", now
                if total is not None:
                    left = (now - began) * (total - number) / max(1, number)
                    text = f"{title} {number:,} of {total:,}, {left:.0f} s left"
                self.say(text)
            yield thing

    def clear(self) -> None:
        """Removes the line."""
        if self.speaks and self._on_terminal():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def _on_terminal(self) -> bool:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        return terminal and LOGGER.isEnabledFor(logging.WARNING)
