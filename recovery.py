"""What an optimizer does about gradients that its inverse Fisher refuses: skip them, or raise λ."""

import contextlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checks import check_integer
from precision import DampTooSmallError, NonFiniteGradientError

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["Recovery", "warn_user"]

IN_A_ROW = 100  # steps skipped, at most


class Recovery:
    """Goes on after a gradient that is refused, and keeps count.

    A gradient with NaN or Inf skips a step. Where λ is too small, the smallest sufficient one of
    its multiples by 10, 100, ... is used, and once a round of m steps λ itself is tried again.

    Args:
        on_nonfinite: "skip" or "raise".
    """

    def __init__(self, on_nonfinite: str):
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"Invalid on_nonfinite: {on_nonfinite!r}; it is 'skip' or 'raise'")
        self.on_nonfinite = on_nonfinite
        self.skipped_steps = self.raised_steps = 0
        self._tried = 0  # raised steps when λ itself was last tried
        self._sufficient: float | None = None  # the multiple that was used before that
        self._late: NonFiniteGradientError | None = None

    def settle(self, fisher: "DynamicInverseFisher", wait: bool = True) -> None:
        """Reads what steps on CUDA found out, and keeps what `raise_late` is to raise."""
        while True:
            try:
                fisher.settle(wait)
                return
            except DampTooSmallError:
                self._raise_damp(fisher)
            except NonFiniteGradientError as error:
                self._skip(fisher, error)
                self._late = error if self.on_nonfinite == "raise" else None

    def raise_late(self) -> None:
        """Raises what has been found out since the last call."""
        late, self._late = self._late, None
        if late is not None:
            raise late

    def update_matvec(
        self, fisher: "DynamicInverseFisher", g: Tensor, damp: float
    ) -> Tensor | None:
        """F⁻¹g (d,) for λ = `damp` or a multiple of it; None if the step is skipped."""
        if fisher.damp != damp and self.raised_steps - self._tried >= fisher.num_grads:
            self._tried, self._sufficient = self.raised_steps, fisher.damp
            with contextlib.suppress(DampTooSmallError):
                fisher.damp = damp
        while True:
            try:
                u = fisher.update_matvec(g)
            except DampTooSmallError:
                self._raise_damp(fisher)
                continue
            except NonFiniteGradientError as error:
                self._skip(fisher, error)
                if self.on_nonfinite == "raise":
                    raise
                return None
            if fisher.damp != damp:
                self.raised_steps += 1
                if self.raised_steps == 1:
                    warn_user(
                        f"damp = {damp:g} is too small for these gradients: {fisher.damp:g} is "
                        "used, or more, for as long as needed, without another warning; "
                        "raised_steps counts the steps"
                    )
            return u

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped_steps": self.skipped_steps, "raised_steps": self.raised_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, and other entries that it leaves alone."""
        counts = {name: check_integer(name, state.get(name), least=0) for name in self.state_dict()}
        vars(self).update(counts)

    def _skip(self, fisher: "DynamicInverseFisher", error: NonFiniteGradientError) -> None:
        self.skipped_steps += 1
        if fisher.precision.nonfinite >= IN_A_ROW:
            raise NonFiniteGradientError(
                f"{IN_A_ROW} gradients in a row have NaN or Inf; look for NaN in the parameters, "
                "go back to a checkpoint, and train with a lower lr"
            ) from error
        if self.skipped_steps == 1 and self.on_nonfinite == "skip":
            warn_user(
                "A gradient with NaN or Inf: this step is skipped, and so are later ones, without "
                "another warning; skipped_steps counts them"
            )

    def _raise_damp(self, fisher: "DynamicInverseFisher") -> None:
        self._tried = self.raised_steps
        before = fisher.damp
        damp, self._sufficient = self._sufficient or 10 * before, None
        while fisher.damp == before:
            with contextlib.suppress(DampTooSmallError):
                fisher.damp = damp
            damp *= 10


def warn_user(message: str) -> None:
    """Warns at the line outside of torch and of this project's modules that led here."""
    level, frame = 1, sys._getframe()
    inside = ("torch", "optim", "flat", "recovery", "states", "mfac")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
