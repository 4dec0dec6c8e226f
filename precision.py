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
        >>> fisher = DynamicInverseFisher(num_grads=2, dim=1)
        >>> try:
        ...     fisher.update(torch.tensor([torch.nan]))
        ... except NonFiniteGradientError as error:
        ...     print(error)
        The gradient has NaN or Inf; the window is unchanged
    """


class DampTooSmallError(ValueError):
    """λ is too small for these gradients, even in float64. The window has not changed.

    Example:
        >>> from optim import DynamicInverseFisher
        >>> fisher = DynamicInverseFisher(num_grads=2, dim=2, damp=1e-20)
        >>> fisher.update(torch.tensor([1.0, 1.0]))
        >>> try:
        ...     fisher.update(torch.tensor([1.0, 1.0]))
        ... except DampTooSmallError as error:
        ...     print(str(error).split(";")[0])
        damp = 1e-20 is too small for gradients of squared norm up to 2, even in float64
    """


class Precision:
    """Keeps the error of results within `TOLERANCE`, with the fastest arithmetic that suffices.

    On the CPU, products start in float32. If (6) is too large, they fall back to float64 for at
    least the rest of a round of m gradients. On CUDA everything is float64, and the error of an
    exchange is read before the fifth one after it, so that nothing waits. If (6) is too large

        with products in float32    K is recomputed in float64 from the window, and P from K,
        in float64                  P is recomputed from K,
        with a P as recomputed      λ is too small: DampTooSmallError.
    """

    def __init__(self, side: Coefficients, window: Window, ranks: Ranks, always_exact: bool):
        self.side, self.window, self.ranks = side, window, ranks
        self.always_exact = self.exact = always_exact
        self.interrupted = False  # while K and the window may disagree, as after an exception
        self._mean_square = (SINGLE / 4) ** 2  # of relative errors of products in float32
        self._largest = 0.0  # largest error of this round, as estimated for float32
        self.nonfinite = 0  # consecutive gradients that were not finite
        self._fresh = True  # whether P was computed from the present K
        self.unread: deque[tuple[Tensor, torch.cuda.Event, bool | None]] = deque()

    def exchange(self, k: Tensor, count: Tensor) -> tuple[Tensor, Tensor, bool]:
        """`Coefficients.exchange`: z, whether it is accepted, and whether the result is good. If
        not, K or P has been recomputed, and another attempt is more precise. The caller then writes
        the row and calls `finish`.

        Raises:
            NonFiniteGradientError, DampTooSmallError: nothing has changed. On CUDA, z is zero
                instead, and a later `catch_up` raises.
        """
        self.interrupted = True
        z, accepted, errors = self.side.exchange(k, count, self.rounding, self.exact)
        try:
            if good := self._accepts(errors):
                self._fresh = False
            else:
                self.recompute()
        except ValueError:
            self.interrupted = False
            raise
        return z, accepted, good

    def finish(self, count: Tensor) -> None:
        """Ends an exchange when row j = count mod m of the window is written. After m gradients,
        returns to float32 if that would have sufficed for all of them."""
        self.interrupted = False
        if self.always_exact:
            return
        m, n = len(self.side.K), int(count)
        j, rows = n % m, min(m, MEASURED)
        if not self.exact and n % INTERVAL == MEASURED - 1 and j >= rows - 1:
            self._measure(slice(j + 1 - rows, j + 1))
        if j == m - 1:
            self.exact &= self._largest >= 0.75 * TOLERANCE
            self._largest = 0.0

    @property
    def rounding(self) -> float:
        """r of products in float32."""
        return 2 * self._mean_square**0.5

    def _measure(self, rows: slice) -> None:
        """Measures the products of these gradients, relative to their norms. The mean so far counts
        as much as eight of them."""
        K = self.gram(rows)
        squares = torch.outer(K.diagonal(), K.diagonal()).fill_diagonal_(0)
        errors = ((self.side.K[rows, rows] - K).square() / squares)[squares > 0]
        mean = (8 * self._mean_square + float(errors.sum())) / (8 + len(errors))
        # The next gradients may be rougher than these, whose products may even be exact. Sums over
        # 16 columns, each with an error of one unit roundoff, are what the mean must allow for.
        d = float(self.ranks.sum(K.new_tensor(sum(self.window.dims))))
        self._mean_square = max(mean, (SINGLE / 4) ** 2 * min(1, 16 / max(1, d)))

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
            errors, arrived, fresh = self.unread[0]
            if not (wait or len(self.unread) > UNREAD):  # by number: ranks must do the same
                return
            arrived.synchronize()
            self.unread.popleft()
            if not self._judge(*errors.tolist()) and fresh is not None:
                self._fresh = fresh
                self.recompute()

    def state_dict(self) -> dict[str, Any]:
        """What decides between float32 and float64."""
        return {"exact": self.exact, "mean_square": self._mean_square, "largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.exact = self.always_exact or state["exact"]
        self._mean_square, self._largest = state["mean_square"], state["largest"]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "unread": deque()}  # events can't be copied

    def set_damp(self, damp: float) -> None:
        """Sets λ to `damp`. Raises DampTooSmallError and keeps the present λ if it is too small."""
        # Unread errors of the old λ no longer matter, but gradients with NaN or Inf still count.
        self.unread = deque((errors, arrived, None) for errors, arrived, _ in self.unread)
        self.invert(damp)

    def gram(self, rows: slice = slice(None)) -> Tensor:
        """These rows and columns of K in float64, anew from the window, O(dm²) for all."""
        return self.ranks.sum(gram(self.window.tiles(rows)))

    def reset(self) -> None:
        """Drops the unread errors, because another window replaces this one."""
        self.unread.clear()
        self.interrupted, self._fresh, self._largest = False, False, 0.0

    def recompute(self) -> None:
        """Reduces an error that is too large: recomputes K in float64, or else P from K."""
        if self.exact and self._fresh:
            raise self.too_small(self.side.damp)
        self.invert(self.side.damp, anew=not self.exact)

    def invert(self, damp: float, anew: bool = False) -> None:
        """Computes P from K for λ = `damp`, and before that K in float64 from the window, if this
        is asked for, or if it is needed and K is from float32."""
        done = not anew and self.side.invert(damp)
        if not done and (anew or not self.exact):
            self.exact = True
            self.side.K.copy_(self.gram())
            done = self.side.invert(damp)
        if not done:
            raise self.too_small(damp)
        self._fresh = True

    def too_small(self, damp: float) -> DampTooSmallError:
        largest = float(self.side.K.diagonal().max())
        return DampTooSmallError(
            f"damp = {damp:g} is too small for gradients of squared norm up to {largest:g}, even "
            f"in float64; raise damp to about {min(1e30, max(10 * damp, 1e-10 * largest)):.0e} or, "
            f"if that is not enough, to {min(1e30, max(100 * damp, 1e-6 * largest)):.0e}"
        )

    def _accepts(self, errors: Tensor | tuple[float, float]) -> bool:
        """Whether the exchange is good. On CUDA this is True, and `catch_up` decides later."""
        if not (isinstance(errors, Tensor) and errors.is_cuda):
            return self._judge(*map(float, errors))
        if not torch.cuda.is_current_stream_capturing():
            numbers = errors.to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream(errors.device).record_event()
            self.unread.append((numbers, arrived, self._fresh))
        return True

    def _judge(self, error: float, in_float32: float = 0.0) -> bool:
        self._largest = max(self._largest, in_float32)
        if math.isnan(error):
            self.nonfinite += 1
            raise NonFiniteGradientError("The gradient has NaN or Inf; the window is unchanged")
        if good := error <= TOLERANCE:
            self.nonfinite = 0
        return good
