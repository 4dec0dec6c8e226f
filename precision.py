"""How far off F⁻¹g is, and what follows: go on, fall back to float64, or refuse the gradient.

K (m, m) is summed from rounded products, so that its entries are off by up to r ‖gᵢ‖‖gₗ‖, where r
is the unit roundoff of the arithmetic: 2⁻²⁴ for float32, 2⁻⁵³ for float64. With A = mλI + K, P = A⁻¹
and D = diag(A)^½, the error of u = mGᵀz, A z = e_j, is δu = −m GᵀP δK z. Since ‖GᵀP^½‖ ≤ 1, and
‖P^½D‖² ≤ Σᵢ PᵢᵢAᵢᵢ, for independent roundings

    ‖δu‖/‖u‖ ≲ r · amplification,   amplification² = Σᵢ PᵢᵢAᵢᵢ · Σᵢ zᵢ²Kᵢᵢ / zᵀKz               (5)

The first factor is the condition of A, the second what cancels in Gᵀz. The residual e_j − Az of the
solve itself enters the same way, as ‖D⁻¹(e_j − Az)‖ (Σᵢ PᵢᵢAᵢᵢ / zᵀKz)^½. All of it costs O(m).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coefficients import TOLERANCE, Coefficients

__all__ = ["DampTooSmallError", "NonFiniteGradientError", "Precision"]

UNIT_ROUNDOFF = {False: 2.0**-24, True: 2.0**-53}  # of float32 and float64


class NonFiniteGradientError(ValueError):
    """A gradient with NaN or Inf was refused; the window is as it was.

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
    """λ is too small for these gradients, even in float64; the window is as it was.

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
    """Sees to it that results are within `TOLERANCE`, in the fastest arithmetic that does.

    On the CPU products start in float32. Where (5) is too large, they fall back to float64 for at
    least the rest of a round of m gradients. On CUDA all is float64, and what an exchange found out
    is read by the next call, so that nobody waits for the device.

    Args:
        side: K and P.
        gram: computes K in float64, anew from the window, O(dm²).
        always_exact: float64 from the start.
    """

    def __init__(self, side: Coefficients, gram: Callable[[], Tensor], always_exact: bool):
        self.side, self.gram = side, gram
        self.always_exact = self.exact = always_exact
        self.interrupted = False  # while K and the window may disagree, as after an exception
        self._largest = 0.0  # amplification in this round
        self._unread: tuple[Tensor, torch.cuda.Event] | None = None

    def exchange(
        self, products: Callable[[bool], Tensor], count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z, whether it is accepted, and the products, which it gets for float64 or not.

        Raises:
            NonFiniteGradientError, DampTooSmallError: nothing has changed. On CUDA z is zero, and the
                next `settle` raises.
        """
        if not self.always_exact and int(count) % len(self.side.K) == 0:
            self._new_round()
        while True:
            k = products(self.exact)
            self.interrupted = True
            z, accepted, health = self.side.exchange(k[0], count, UNIT_ROUNDOFF[self.exact])
            try:
                if self._accepts(health):
                    return z, accepted, k
                self.recover()
            except ValueError:
                self.interrupted = False
                raise

    def settle(self) -> None:
        """Reads what the last exchange on CUDA found out, and repairs what was interrupted.

        Raises:
            NonFiniteGradientError, DampTooSmallError: of that exchange.
        """
        if self.interrupted:
            self.rebuild()
            self.interrupted = False
        if self._unread is not None:
            (numbers, arrived), self._unread = self._unread, None
            arrived.synchronize()
            if not self._judge(*numbers.tolist()):
                self.recover()

    def set_damp(self, damp: float) -> None:
        """Makes `damp` λ, or raises DampTooSmallError and keeps the one that is."""
        self._unread = None  # a verdict about the λ that goes
        self._invert(damp)

    def rebuild(self) -> None:
        """Computes K in float64 from the window, O(dm²), and P."""
        self._invert(self.side.damp, anew=True)

    def forget(self) -> None:
        """Drops what has been found out about exchanges, as their window is replaced."""
        self._unread, self.interrupted, self._largest = None, False, 0.0

    def refuse(self) -> None:
        """Raises DampTooSmallError."""
        raise DampTooSmallError(self._advice(self.side.damp))

    def recover(self) -> None:
        """After a result that is too far off: computes K anew in float64, or else P anew from K."""
        if self.exact and self.side.fresh:
            self.refuse()
        self._invert(self.side.damp, anew=not self.exact)

    def _invert(self, damp: float, anew: bool = False) -> None:
        done = not anew and self.side.invert(damp)
        if not done and (anew or not self.exact):
            self.exact = True
            self.side.K.copy_(self.gram())
            done = self.side.invert(damp)
        if not done:
            raise DampTooSmallError(self._advice(damp))

    def _advice(self, damp: float) -> str:
        largest = float(self.side.K.diagonal().max())
        return (
            f"damp = {damp:g} is too small for gradients of squared norm up to {largest:g}, even in "
            f"float64; raise damp to about {max(10 * damp, 1e-10 * largest):.0e} or, if that is not "
            f"enough, to {max(100 * damp, 1e-6 * largest):.0e}"
        )

    def _new_round(self) -> None:
        """Goes back to float32 if that would have done for the last m gradients."""
        self.exact &= not UNIT_ROUNDOFF[False] * self._largest < TOLERANCE / 2
        self._largest = 0.0

    def _accepts(self, health: Tensor) -> bool:
        """Whether the exchange stands. On CUDA that is left to `settle`, and True."""
        if not health.is_cuda:
            return self._judge(*health.tolist())
        if not torch.cuda.is_current_stream_capturing():
            numbers = torch.empty(health.shape, dtype=health.dtype, device="cpu", pin_memory=True)
            numbers.copy_(health, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(health.device))
            self._unread = numbers, arrived
        return True

    def _judge(self, accepted: float, error: float, amplification: float) -> bool:
        self._largest = max(self._largest, amplification)
        if math.isnan(error):
            raise NonFiniteGradientError("The gradient has NaN or Inf; the window is unchanged")
        self.side.fresh &= not accepted
        return accepted != 0
