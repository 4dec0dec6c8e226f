"""λ of an optimizer, and its reaction to a gradient that the inverse Fisher refuses: it skips the
step, or raises λ."""

import contextlib
import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks import check_choice, check_damp, check_integer, damp_parts
from precision import DampTooSmallError, NonFiniteGradientError

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["Recovery", "warn_user"]

IN_A_ROW = 100  # consecutive skipped steps, at most


class Recovery:
    """Sets λ, continues after a refused gradient, and counts.

    A gradient with NaN or Inf skips the step. If λ is too small, the step uses the smallest
    sufficient multiple of it by 10, 100, ... Once in a round of m steps, it tries λ itself again.

    With `damp` "relative:f", λ is f·tr K/(md), the fraction f of the mean eigenvalue of GᵀG/m.
    Scaling all gradients by a factor then scales F⁻¹g by its inverse. λ is updated before steps 0
    (from g), 1, 2, 4, 8, ... while the window fills, then once in a round of m steps. An update
    costs O(m³), and on CUDA the host waits.

    Args:
        on_nonfinite: "skip" or "raise".
        damp: λ, or "relative:f"; "relative" is "relative:0.1".
    """

    def __init__(self, on_nonfinite: str, damp: float | str):
        check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        self.on_nonfinite = on_nonfinite
        constant, self.fraction = damp_parts(damp)
        self.given = damp if self.fraction else check_damp(damp)  # as it was set
        self.damp = constant or 1e-5  # λ before it is raised
        self._steps = 0  # steps with a relative λ
        self.skipped_steps = self.raised_steps = 0
        self._tried = 0  # raised steps when λ itself was last tried
        self.last_raised = 0.0  # the λ in use before that, to go back to
        self._late: NonFiniteGradientError | None = None

    def settle(self, fisher: "DynamicInverseFisher", wait: bool = True) -> None:
        """Reads the results of steps on CUDA, and keeps an error for `raise_late`."""
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
        """Raises the error that `settle` has kept, once."""
        late, self._late = self._late, None
        if late is not None:
            raise late

    def set_damp(self, fisher: "DynamicInverseFisher", damp: float | str) -> None:
        """Sets λ. If it is too small, raises DampTooSmallError and changes nothing."""
        _, fraction = damp_parts(damp)
        wanted = self._relative(fisher, fraction) if fraction else check_damp(damp)
        fisher.damp = wanted
        self.given, self.fraction = damp if fraction else wanted, fraction
        self.damp, self.last_raised = wanted, 0.0

    def _relative(
        self, fisher: "DynamicInverseFisher", fraction: float, g: Tensor | None = None
    ) -> float:
        """f·tr K/(md), or the present λ if this is 0 or not finite. An empty window counts as one
        with g."""
        d = fisher.ranks.sum(torch.tensor(float(fisher.shape[0]), device=fisher.device))
        trace = fisher.coefficients.K.trace()
        if g is not None and trace == 0:
            trace = fisher.ranks.norm(g).square()
        mean = float(trace / (fisher.num_grads * d))
        return min(max(fraction * mean, 1e-30), 1e30) if 0 < mean < math.inf else self.damp

    def _renew(self, fisher: "DynamicInverseFisher", g: Tensor) -> bool:
        """Updates a relative λ if it is due. Returns whether it was."""
        if not self.fraction or (g.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        n, m = self._steps, fisher.num_grads
        self._steps += 1
        if n % m if n >= m else n & (n - 1):  # n & (n − 1) is 0 for 0 and for powers of two
            return False
        self.damp = self._relative(fisher, self.fraction, g)
        return True

    def update_matvec(self, fisher: "DynamicInverseFisher", g: Tensor) -> Tensor | None:
        """F⁻¹g (d,) for λ = `damp` or a multiple of it; None if the step is skipped."""
        again = self._renew(fisher, g) or self.raised_steps - self._tried >= fisher.num_grads
        if again and fisher.damp != self.damp:
            self._tried, self.last_raised = self.raised_steps, fisher.damp
            with contextlib.suppress(DampTooSmallError):
                fisher.damp = self.damp
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
            if fisher.damp != self.damp:
                self.raised_steps += 1
                if self.raised_steps == 1:
                    warn_user(
                        f"damp = {self.damp:g} is too small for these gradients: {fisher.damp:g} "
                        "is used, or more, as long as needed and without another warning; "
                        "raised_steps counts the steps"
                    )
            return u

    def state_dict(self) -> dict[str, float]:
        """The counts, λ before it is raised, and when and from where it was raised last."""
        counts = {"skipped_steps": self.skipped_steps, "raised_steps": self.raised_steps}
        counts |= {"tried": self._tried, "steps": self._steps}
        return counts | {"last_raised": self.last_raised, "unraised": self.damp}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the result of `state_dict`, and ignores other entries."""
        names = ("skipped_steps", "raised_steps", "tried", "steps")
        counts = [check_integer(name, state.get(name), least=0) for name in names]
        damp = check_damp(state.get("unraised"))
        last = state.get("last_raised")
        if not (isinstance(last, float) and 0 <= last < math.inf):
            raise ValueError(
                f"The state dict is damaged: last_raised must be a λ or 0, got {last!r}"
            )
        self.skipped_steps, self.raised_steps, self._tried, self._steps = counts
        self.last_raised = last
        if self.fraction:
            self.damp = damp

    def check_others(self, fisher: "DynamicInverseFisher", finite: float | Tensor) -> None:
        """Counts a step without gradients for the window as skipped if others have NaN or Inf. On
        CUDA nobody waits for that."""
        if isinstance(finite, Tensor) and finite.is_cuda:
            return
        if bool(finite):
            fisher.precision.nonfinite = 0
            return
        fisher.precision.nonfinite += 1
        error = NonFiniteGradientError("A gradient has NaN or Inf; nothing is changed")
        self._skip(fisher, error)
        if self.on_nonfinite == "raise":
            raise error

    def _skip(self, fisher: "DynamicInverseFisher", error: NonFiniteGradientError) -> None:
        self.skipped_steps += 1
        if fisher.precision.nonfinite >= IN_A_ROW:
            raise NonFiniteGradientError(
                f"{IN_A_ROW} gradients in a row have NaN or Inf; look for NaN in the parameters, "
                "return to a checkpoint, and train with a lower lr"
            ) from error
        if self.skipped_steps == 1 and self.on_nonfinite == "skip":
            warn_user(
                "A gradient with NaN or Inf: this step is skipped. Later ones like it are skipped "
                "without another warning; skipped_steps counts them"
            )

    def _raise_damp(self, fisher: "DynamicInverseFisher") -> None:
        self._tried = self.raised_steps
        before = fisher.damp
        damp, self.last_raised = max(10 * before, self.last_raised), 0.0
        while fisher.damp == before:
            with contextlib.suppress(DampTooSmallError):
                fisher.damp = damp
            damp *= 10


def warn_user(message: str) -> None:
    """Warns with the line of the caller outside torch and outside this project's modules."""
    level, frame = 1, sys._getframe()
    inside = ("torch", "optim", "parameter_groups", "recovery", "states", "mfac")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
