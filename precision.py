"""Estimates the error of F⁻¹g, then goes on, falls back to float64, or refuses the gradient.

K (m, m) is a sum of rounded products, so its entries have errors of up to r‖gᵢ‖‖gₗ‖. With
A = mλI + K, P = A⁻¹ and D = diag(A)^½, the error of u = mGᵀz, A z = e_j, is δu = −m GᵀP δK z.
‖GᵀP^½‖ ≤ 1 and ‖P^½D‖² ≤ Σᵢ PᵢᵢAᵢᵢ, so for independent roundings

    ‖δu‖/‖u‖ ≲ (r (Σᵢ PᵢᵢAᵢᵢ)^½ + q) (Σᵢ zᵢ²Kᵢᵢ / zᵀKz)^½                             (6)

The root of the trace measures how nearly parallel the gradients are. The last factor measures the
cancellation in Gᵀz, and q is the relative error of this product. The residual e_j − Az of the solve
takes the place of δK z. In float64, r = 2⁻⁵² and q is negligible. In float32, q = 2⁻²⁴(1 + m/16)^½,
for z as it is rounded and sums of m terms, and r is measured, because the error of short sums
depends on the gradients: it is 0.02 to 1 unit roundoff. Now and then, the products of the newest
gradients are computed in float64 as well. r is twice the root mean square of the difference.
"""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from checks import RANGE
from coefficients import SINGLE, TOLERANCE, Coefficients
from ranks import Ranks
from windows import Window, gram

__all__ = ["DampTooSmallError", "NonFiniteGradientError", "Precision"]

UNREAD = 4  # exchanges on CUDA whose results are read later
MEASURED, INTERVAL = 8, 32  # products of 8 gradients are measured, once in 32 steps


class NonFiniteGradientError(ValueError):
    """A gradient with NaN or Inf was refused. The window has not changed.

    Example:
        >>> from optim import DynamicInverseFisher
        >>> DynamicInverseFisher(num_grads=2, dim=1).update(torch.tensor([torch.nan]))
        Traceback (most recent call last):
        precision.NonFiniteGradientError: The gradient has NaN or Inf; the window is unchanged
    """


class DampTooSmallError(ValueError):
    """λ is too small for these gradients, even in float64. The window has not changed.

    Example:
        >>> from optim import DynamicInverseFisher
        >>> fisher = DynamicInverseFisher(num_grads=2, dim=1, damp=1e-20)
        >>> fisher.update(torch.ones(1))
        >>> fisher.update(torch.ones(1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        precision.DampTooSmallError: damp = 1e-20 is too small for gradients of squared norm ...
    """


class Precision:
    """Keeps the error of results within `TOLERANCE`, with the fastest arithmetic that suffices.

    On the CPU, products start in float32. Where (6) is too large, the exchange is repeated with

        K recomputed    from the window in float64; products stay in float64 for the rest of a
                        round of m gradients
        P recomputed    from this K
        10λ             if `raises_damp`, as for an optimizer. Otherwise DampTooSmallError

    the first of these that is new. On CUDA all products are in float64, and the error of an
    exchange is read before the fifth one after it, so that nothing waits. If it is too large, this
    gradient is lost, P is recomputed, and the error of the next exchange is read at once.
    """

    def __init__(self, side: Coefficients, window: Window, ranks: Ranks, always_exact: bool):
        self.side, self.window, self.ranks = side, window, ranks
        self.always_exact = self.exact = always_exact  # whether products are in float64
        self.raises_damp = False
        self.fresh = False  # whether P was computed from the present K
        self.interrupted = False  # while K and the window may disagree, as after an exception
        self.nonfinite = 0  # consecutive gradients that were not finite
        self.unread: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.rounding = SINGLE / 2  # r of products in float32

    def accept(self, error: Tensor | float) -> bool:
        """Whether the error from `Coefficients.exchange` is small enough, or is read later. If not,
        K, P or λ has changed, and the exchange must be repeated.

        Raises:
            NonFiniteGradientError, DampTooSmallError: the exchange has changed nothing.
        """
        if self._is_late(error) or self._is_good(float(error)):
            self.fresh = False
            return True
        if not self.recompute():
            self.invert(self._larger(self.side.damp))
        return False

    def catch_up(self, wait: bool = True) -> None:
        """Reads the errors of exchanges on CUDA, and repairs K after an interruption. Without
        `wait`, the last few exchanges may stay unread.

        Raises:
            NonFiniteGradientError, DampTooSmallError: from such an exchange.
        """
        if self.interrupted:
            self.invert(self.side.damp, anew=True)
            self.interrupted = False
        while self.unread and not torch.cuda.is_current_stream_capturing():
            if not wait and len(self.unread) <= UNREAD:  # not by arrival: ranks must do the same
                return
            error, arrived = self.unread.popleft()
            arrived.synchronize()
            if not self._is_good(float(error)):
                wait |= self.recompute()  # the other errors are those of the old P

    def finish(self, count: Tensor) -> None:
        """Ends an exchange when row j = count mod m of the window is written. After a round of m
        gradients, returns to float32."""
        self.interrupted = False
        if self.always_exact:
            return
        m, n = len(self.side.K), int(count)
        j, rows = n % m, min(m, MEASURED)
        if not self.exact and n % INTERVAL == MEASURED - 1 and j >= rows - 1:
            self._measure(slice(j + 1 - rows, j + 1))
        if j == m - 1:
            self.exact = False

    def _measure(self, rows: slice) -> None:
        """Measures the products of these gradients, relative to their norms. The mean so far counts
        as much as eight of them."""
        K = self.gram(rows)
        squares = torch.outer(K.diagonal(), K.diagonal()).fill_diagonal_(0)
        errors = ((self.side.K[rows, rows] - K).square() / squares)[squares > 0]
        mean = (2 * self.rounding**2 + float(errors.sum())) / (8 + len(errors))
        # The next gradients may be rougher than these, whose products may even be exact. So r is at
        # least that of d/16 independent sums, each with an error of one unit roundoff.
        d = float(self.ranks.sum(K.new_tensor(sum(self.window.dims))))
        self.rounding = 2 * max(mean, (SINGLE / 4) ** 2 * min(1, 16 / max(1, d))) ** 0.5

    def gram(self, rows: slice = slice(None)) -> Tensor:
        """These rows and columns of K in float64, anew from the window, O(dm²) for all."""
        return self.ranks.sum(gram(self.window.tiles(rows)))

    def recompute(self) -> bool:
        """Recomputes K, unless it is from float64, and P. Returns False if both are new already."""
        if self.exact and self.fresh:
            return False
        self.invert(self.side.damp, anew=not self.exact)
        return True

    def invert(self, damp: float, anew: bool = False) -> None:
        """Computes P from K for λ = `damp`, O(m³). If `anew`, or if A is not positive definite, K
        is first recomputed in float64 from the window. If that does not help, takes 10λ, 100λ, ...

        Raises:
            DampTooSmallError: or, if `raises_damp`, NonFiniteGradientError. λ stays as it was.
        """
        while anew or not self.side.invert(damp):
            if anew or not self.exact:
                self.side.K.copy_(self.gram())
                self.exact, anew = True, False
            else:
                damp = self._larger(damp)
        self.fresh = True

    def _larger(self, damp: float) -> float:
        """The λ to try if `damp` is too small. Raises an error if there is none."""
        if not self.raises_damp:
            raise self.too_small(damp)
        if 10 * damp > RANGE[1]:
            self.nonfinite += 1
            raise NonFiniteGradientError("The gradient is too large for any damp")
        return 10 * damp

    def too_small(self, damp: float) -> DampTooSmallError:
        largest = float(self.side.K.diagonal().max())
        return DampTooSmallError(
            f"damp = {damp:g} is too small for gradients of squared norm up to {largest:g}, even "
            f"in float64; raise damp to about {min(1e30, max(10 * damp, 1e-10 * largest)):.0e} or, "
            f"if that is not enough, to {min(1e30, max(100 * damp, 1e-6 * largest)):.0e}"
        )

    def _is_late(self, error: Tensor | float) -> bool:
        """Whether an error on CUDA is left to `catch_up`, or not read at all, if captured."""
        if not (isinstance(error, Tensor) and error.is_cuda):
            return False
        if torch.cuda.is_current_stream_capturing():
            return True
        if not self.fresh:
            copy = error.to("cpu", non_blocking=True)
            self.unread.append((copy, torch.cuda.current_stream(error.device).record_event()))
        return not self.fresh

    def _is_good(self, error: float) -> bool:
        if math.isnan(error):
            self.nonfinite += 1
            raise NonFiniteGradientError("The gradient has NaN or Inf; the window is unchanged")
        if good := error <= TOLERANCE:
            self.nonfinite = 0
        return good

    def state_dict(self) -> dict[str, Any]:
        """What decides between float32 and float64."""
        return {"exact": self.exact, "rounding": self.rounding}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the state. Errors not yet read are dropped, with the window that it replaces."""
        self.interrupted, self.fresh, self.unread = False, False, deque()
        self.exact, self.rounding = self.always_exact or state["exact"], state["rounding"]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "unread": deque()}  # events can't be copied
