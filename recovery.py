"""λ of an optimizer, and its reaction to a gradient that the inverse Fisher refuses: it skips the
step, or raises λ."""

import contextlib
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, cuda

from checks import RANGE, check_choice, check_damp, check_integer, damp_parts
from precision import DampTooSmallError, NonFiniteGradientError

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["Recovery", "warn_user"]

IN_A_ROW = 100  # consecutive skipped steps, at most
T = TypeVar("T")


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
        constant, self.fraction = damp_parts(damp, *RANGE)
        self.given = constant or damp  # as it was set
        self.damp = constant or 1e-5  # λ before it is raised
        self._steps = 0  # steps with a relative λ
        self.skipped_steps = self.raised_steps = 0
        self._tried = 0  # raised steps when λ itself was last tried
        self.last_raised = 0.0  # the λ in use before that, to go back to
        self._late: NonFiniteGradientError | None = None

    def start_anew(self) -> None:
        """Begins the schedule of a relative λ again, for an empty window."""
        self._steps, self.last_raised = 0, 0.0

    def settle(self, fisher: "DynamicInverseFisher", wait: bool = True) -> None:
        """Reads the results of steps on CUDA, and keeps an error for `raise_late`."""
        while True:
            try:
                return self._raising(fisher, partial(fisher.precision.settle, wait))
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
        wanted, fraction = damp_parts(damp, *RANGE)
        wanted = wanted or self._relative(fisher, fraction)
        fisher.damp = wanted
        self.given, self.fraction = damp if fraction else wanted, fraction
        self.damp, self.last_raised = wanted, 0.0

    def _relative(
        self, fisher: "DynamicInverseFisher", fraction: float, g: Tensor | None = None
    ) -> float:
        """f·tr K/(md), or the present λ if this is 0 or not finite. If the window is empty, g is
        in its place."""
        numbers = fisher.coefficients.K.new_zeros(1, 2)  # d, and ‖g‖²
        numbers[0, 0] = fisher.shape[0]
        if g is not None:
            numbers[0, 1] = g.square().sum(dtype=numbers.dtype)
        (d, square), trace = fisher.ranks.sum_of_present(numbers)[0], fisher.coefficients.K.trace()
        mean = float(torch.where(trace == 0, square, trace) / (fisher.num_grads * d))
        return min(max(fraction * mean, RANGE[0]), RANGE[1]) if 0 < mean < math.inf else self.damp

    def _is_due(self, fisher: "DynamicInverseFisher") -> bool:
        """Whether to update a relative λ."""
        if not self.fraction or (fisher.counter.is_cuda and cuda.is_current_stream_capturing()):
            return False
        n, m = self._steps, fisher.num_grads
        return n % m == 0 if n >= m else n & (n - 1) == 0  # which holds for 0 and powers of two

    def update_matvec(
        self, fisher: "DynamicInverseFisher", g: Tensor, veto: Tensor | None = None
    ) -> Tensor | None:
        """F⁻¹g (d,) for λ = `damp` or a multiple of it; None if the step is skipped."""
        again = self.raised_steps - self._tried >= fisher.num_grads
        if self._is_due(fisher):
            self.damp, again = self._relative(fisher, self.fraction, g), True
        if again and fisher.damp != self.damp:
            self._tried, self.last_raised = self.raised_steps, fisher.damp
            with contextlib.suppress(DampTooSmallError):
                fisher.damp = self.damp
        try:
            u = self._raising(fisher, partial(fisher.update_matvec, g, veto=veto))
        except NonFiniteGradientError as error:
            self._skip(fisher, error)
            if self.on_nonfinite == "raise":
                raise
            return None
        self._steps += 1
        if fisher.damp != self.damp:
            self.raised_steps += 1
            if self.raised_steps == 1:
                warn_user(
                    f"damp = {self.damp:g} is too small for these gradients: {fisher.damp:g} is "
                    "used, or more, as long as needed and without another warning; raised_steps "
                    "counts the steps"
                )
        elif not fisher.precision.unread:  # λ suffices
            self.last_raised = 0.0
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

    def abstain(self, fisher: "DynamicInverseFisher", veto: Tensor | None) -> Tensor:
        """`DynamicInverseFisher.abstain`, with the messages of `update_matvec`."""
        if self._is_due(fisher):
            fisher.ranks.sum_of_present(fisher.coefficients.K.new_zeros(1, 2), False)
        return fisher.abstain(veto)

    def check_others(self, fisher: "DynamicInverseFisher", finite: Tensor) -> None:
        """Counts a step without gradients for the window as skipped if others have NaN or Inf. On
        CUDA nobody waits for that."""
        if finite.is_cuda:
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

    def _raising(self, fisher: "DynamicInverseFisher", call: Callable[[], T]) -> T:
        """The result of `call`. If λ is too small for it, raises λ and tries again."""
        while True:
            try:
                return call()
            except DampTooSmallError as error:
                self._raise_damp(fisher, error)

    def _raise_damp(self, fisher: "DynamicInverseFisher", error: DampTooSmallError) -> None:
        self._tried = self.raised_steps
        before = fisher.damp
        damp, self.last_raised = max(10 * before, self.last_raised), 0.0
        while fisher.damp == before:
            if damp > RANGE[1]:
                fisher.precision.nonfinite += 1
                raise NonFiniteGradientError("The gradient is too large for any damp") from error
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
