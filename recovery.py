"""λ of an optimizer, and its reaction to a gradient that the inverse Fisher refuses: it skips the
step, or raises λ."""

import math
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, cuda

from checks import RANGE, check_choice, damp_parts
from precision import DampTooSmallError, NonFiniteGradientError

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["Recovery", "warn_user"]

IN_A_ROW = 100  # consecutive skipped steps, at most
COUNTS = ("skipped_steps", "raised_steps", "tried", "steps")
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
        self.steps = self.skipped_steps = self.raised_steps = 0
        self.tried = 0  # `raised_steps` when λ was last raised, or last tried unraised
        self._error: NonFiniteGradientError | None = None  # to raise at the end of the step

    def set_damp(self, fisher: "DynamicInverseFisher", damp: float | str) -> None:
        """Sets λ. If it is too small, raises DampTooSmallError and changes nothing."""
        wanted, fraction = damp_parts(damp, *RANGE)
        wanted = wanted or self._relative(fisher, fraction)
        fisher.damp = wanted
        self.damp, self.given, self.fraction = wanted, damp if fraction else wanted, fraction

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
        n, m = self.steps, fisher.num_grads
        return n % m == 0 if n >= m else n & (n - 1) == 0  # which holds for 0 and powers of two

    def update_matvec(
        self, fisher: "DynamicInverseFisher", g: Tensor, veto: Tensor | None = None
    ) -> Tensor | None:
        """F⁻¹g (d,) for λ = `damp` or a multiple of it; None if the step is skipped."""
        before, due = fisher.damp, self._is_due(fisher)
        retry = before != self.damp and self.raised_steps - self.tried >= fisher.num_grads
        self.catch_up(fisher, wait=due or retry)
        if due:
            self.damp = self._relative(fisher, self.fraction, g)
        damp = self.damp if due or retry else fisher.damp

        def attempt() -> Tensor:
            u = fisher.update_matvec(g, veto=veto)
            if fisher.damp != before:  # so that no further steps are lost while λ is too small
                fisher.precision.catch_up()
            return u

        try:
            u = self.with_enough_damp(fisher, attempt, damp)
        except NonFiniteGradientError as error:
            self._skip(fisher, error)
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

    def abstain(self, fisher: "DynamicInverseFisher", veto: Tensor | None) -> Tensor:
        """Takes the place of `update_matvec` if no rank has a gradient, with as many messages.
        Returns whether gradients of other groups are finite. On CUDA nobody waits for that."""
        if self._is_due(fisher):  # the first message of `update_matvec`
            fisher.ranks.sum_of_present(fisher.coefficients.K.new_zeros(1, 2), False)
        finite = fisher.abstain(veto)
        if not finite.is_cuda:
            fisher.precision.nonfinite = 0 if finite else fisher.precision.nonfinite + 1
            if not finite:
                error = NonFiniteGradientError("A gradient has NaN or Inf; nothing is changed")
                self._skip(fisher, error)
        return finite

    def catch_up(self, fisher: "DynamicInverseFisher", wait: bool = True) -> None:
        """Reads the errors of earlier steps on CUDA, all of them with `wait` or once λ has been
        raised, and raises λ if one of them needs that."""
        before = fisher.damp
        while True:
            try:
                return self.with_enough_damp(
                    fisher, lambda: fisher.precision.catch_up(wait or fisher.damp != before)
                )
            except NonFiniteGradientError as error:
                self._skip(fisher, error)

    def with_enough_damp(
        self, fisher: "DynamicInverseFisher", call: Callable[[], T], damp: float | None = None
    ) -> T:
        """The result of `call`, with λ = `damp`, by default the present one, or the smallest
        sufficient multiple of it by 10, 100, ..."""
        before = fisher.damp
        damp = damp or before
        while True:
            try:
                if damp != fisher.damp:
                    self.tried = self.raised_steps
                    fisher.damp = damp
                return call()
            except DampTooSmallError as error:
                damp *= 10
                if damp > RANGE[1]:
                    with suppress(DampTooSmallError):
                        fisher.damp = before
                    fisher.precision.nonfinite += 1
                    raise NonFiniteGradientError(
                        "The gradient is too large for any damp"
                    ) from error

    def _skip(self, fisher: "DynamicInverseFisher", error: NonFiniteGradientError) -> None:
        self.skipped_steps += 1
        if fisher.precision.nonfinite >= IN_A_ROW:
            raise NonFiniteGradientError(
                f"{IN_A_ROW} gradients in a row have NaN or Inf; look for NaN in the parameters, "
                "return to a checkpoint, and train with a lower lr"
            ) from error
        if self.on_nonfinite == "raise":
            self._error = error
        elif self.skipped_steps == 1:
            warn_user(
                "A gradient with NaN or Inf: this step is skipped. Later ones like it are skipped "
                "without another warning; skipped_steps counts them"
            )

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
        """Loads the counts. The λ that was in use when the state was saved stays in use if it is
        that of the same setting, or if the present setting is too small."""
        vars(self).update({name: state[name] for name in COUNTS})
        if state["given"] == str(self.given):
            self.damp = state["unraised"]
        else:
            with suppress(DampTooSmallError):
                self.set_damp(fisher, self.given)


def warn_user(message: str) -> None:
    """Warns with the line of the caller outside torch and outside this project's modules."""
    level, frame = 1, sys._getframe()
    inside = ("torch", "optim", "parameter_groups", "recovery", "states", "mfac")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
