"""λ of an optimizer, and steps that it skips because of NaN or Inf."""

import math
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, cuda

from checks import RANGE, check_choice, damp_parts
from precision import NonFiniteGradientError

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["Recovery", "warn_user"]

IN_A_ROW = 100  # consecutive skipped steps, at most
COUNTS = ("skipped_steps", "raised_steps", "steps")
T = TypeVar("T")


class Recovery:
    """Sets λ, and counts the steps that are skipped or need a larger one.

    A gradient with NaN or Inf skips the step. If λ is too small, the inverse Fisher takes the
    smallest sufficient multiple of it by 10, 100, ... With `damp` "relative:f", λ is f·tr K/(md),
    the fraction f of the mean eigenvalue of GᵀG/m. Scaling all gradients by a factor then scales
    F⁻¹g by its inverse.

    Before steps 0, 1, 2, 4, 8, ... while the window fills, then once in a round of m steps, a
    relative λ is updated, and a λ that was raised is set again. A change costs O(m³). An update
    makes the host wait for CUDA.

    Args:
        on_nonfinite: "skip" or "raise".
        damp: λ, or "relative:f"; "relative" is "relative:0.1".
    """

    def __init__(self, on_nonfinite: str, damp: float | str):
        check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        self.on_nonfinite = on_nonfinite
        constant, self.fraction = damp_parts(damp, RANGE)
        self.given = constant or damp  # as it was set
        self.damp = constant or 1e-5  # λ before it is raised
        self.steps = self.skipped_steps = self.raised_steps = 0
        self._error: NonFiniteGradientError | None = None  # to raise at the end of the step

    def set_damp(self, fisher: "DynamicInverseFisher", damp: float | str) -> None:
        constant, fraction = damp_parts(damp, RANGE)
        fisher.damp = wanted = constant or self._relative(fisher, fraction)
        self.damp, self.fraction, self.given = wanted, fraction, constant or damp

    def _relative(
        self, fisher: "DynamicInverseFisher", fraction: float, g: Tensor | None = None
    ) -> float:
        """f·tr K/(md), or `damp` as it is if this is 0 or not finite. If K is 0, ‖g‖² stands
        in for its trace."""
        square = 0.0 if g is None else float(g.square().sum(dtype=torch.float64))
        own = fisher.coefficients.K.new_tensor([fisher.shape[0], square])
        d, square = fisher.ranks.sum(own).tolist()
        trace = float(fisher.coefficients.K.trace()) or square
        damp = fraction * trace / (fisher.num_grads * max(1, d))
        return min(max(damp, RANGE[0]), RANGE[1]) if 0 < damp < math.inf else self.damp

    def update_matvec(self, fisher: "DynamicInverseFisher", g: Tensor) -> Tensor | None:
        """F⁻¹g (d,) for λ = `damp` or a multiple of it; None if the step is skipped."""
        self.catch_up(fisher, wait=False)
        n, m = self.steps, fisher.num_grads
        due = n % m == 0 or (n < m and n & (n - 1) == 0)  # 0 and powers of two
        due &= not (fisher.counter.is_cuda and cuda.is_current_stream_capturing())
        if due and self.fraction:
            self.damp = self._relative(fisher, self.fraction, g)

        def call() -> Tensor:
            if due:
                fisher.damp = self.damp
            return fisher.update_matvec(g)

        u = self.attempt(fisher, call)
        if u is None:
            return None
        self.steps += 1
        if fisher.damp != self.damp:
            self.raised_steps += 1
            if self.raised_steps == 1:
                warn_user(
                    f"damp = {self.damp:g} is too small for these gradients: {fisher.damp:g} is "
                    "used, or more, as long as needed and without another warning; raised_steps "
                    "counts the steps"
                )
        return u

    def catch_up(self, fisher: "DynamicInverseFisher", wait: bool = True) -> None:
        """`Precision.catch_up`, which may find several steps on CUDA that were skipped."""
        skipped = -1
        while skipped != self.skipped_steps:
            skipped = self.skipped_steps
            self.attempt(fisher, lambda: fisher.precision.catch_up(wait))

    def attempt(self, fisher: "DynamicInverseFisher", call: Callable[[], T]) -> T | None:
        """The result of `call`. NaN or Inf makes it None, and counts as a skipped step."""
        try:
            return call()
        except NonFiniteGradientError as error:
            self.skipped_steps += 1
            if fisher.precision.nonfinite >= IN_A_ROW:
                raise NonFiniteGradientError(
                    f"{IN_A_ROW} gradients in a row have NaN or Inf; look for NaN in the "
                    "parameters, return to a checkpoint, and train with a lower lr"
                ) from error
            if self.on_nonfinite == "raise":
                self._error = error
            elif self.skipped_steps == 1:
                warn_user(
                    "A gradient with NaN or Inf: this step is skipped. Later ones like it are "
                    "skipped without another warning; skipped_steps counts them"
                )
            return None

    def raise_error(self) -> None:
        """Raises the error of a skipped step, once, if `on_nonfinite` is "raise"."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def state_dict(self) -> dict[str, Any]:
        """The counts, λ as it was set, and λ before it is raised."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return counts | {"given": str(self.given), "unraised": self.damp}

    def load_state_dict(self, state: dict[str, Any], fisher: "DynamicInverseFisher") -> None:
        """Loads the counts. λ stays that of the state, which the inverse Fisher has, if the state
        has the same setting of λ and as many gradients. Otherwise it is set anew."""
        vars(self).update({name: state[name] for name in COUNTS})
        if (state["given"], len(state["K"])) == (str(self.given), fisher.num_grads):
            self.damp = state["unraised"]
        else:
            self.set_damp(fisher, self.given)


def warn_user(message: str) -> None:
    """Warns with the line of the caller outside torch and outside this project's modules."""
    level, frame = 1, sys._getframe()
    inside = ("torch", "optim", "parameter_groups", "recovery", "states", "mfac")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
