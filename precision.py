"""How far off F⁻¹g is, and what follows: go on, fall back to float64, or refuse the gradient.

K (m, m) is summed from rounded products, so that its entries are off by up to r‖gᵢ‖‖gₗ‖. With
A = mλI + K, P = A⁻¹, D = diag(A)^½, the error of u = mGᵀz, A z = e_j, is δu = −m GᵀP δK z. Since
‖GᵀP^½‖ ≤ 1, and ‖P^½D‖² ≤ Σᵢ PᵢᵢAᵢᵢ, for independent roundings

    ‖δu‖/‖u‖ ≲ (r (Σᵢ PᵢᵢAᵢᵢ)^½ + q) (Σᵢ zᵢ²Kᵢᵢ / zᵀKz)^½                             (5)

where the root of the trace says how nearly parallel gradients are, and the last factor how much
cancels in Gᵀz, which is itself off by q. The residual e_j − Az of the solve enters in the place of
δK z. In float64, r = 2⁻⁵², and q is nothing beside it. In float32, q = 2⁻²⁶m^½ for sums of m terms,
and r is measured: short sums err by 0.02 to 1 unit roundoff, depending on the gradients, so one
entry of each k is computed both ways, and r is twice the root mean square of the difference.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coefficients import SINGLE, TOLERANCE, Coefficients

__all__ = ["DampTooSmallError", "NonFiniteGradientError", "Precision"]

UNREAD = 4  # exchanges on CUDA, at most, that the host is ahead


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
    is read by one of the next calls, so that nobody waits for the device.

    Args:
        side: K and P.
        gram: computes K in float64, anew from the window, O(dm²).
        always_exact: float64 from the start.
    """

    def __init__(self, side: Coefficients, gram: Callable[[], Tensor], always_exact: bool):
        self.side, self.gram = side, gram
        self.always_exact = self.exact = always_exact
        self.interrupted = False  # while K and the window may disagree, as after an exception
        self._mean_square, self._measured = (SINGLE / 4) ** 2, 0  # of roundings in float32
        self._largest = 0.0  # error in this round, as it is or would be in float32
        self.nonfinite = 0  # gradients in a row that were not finite
        self._fresh = True  # whether P has been computed from K as it is
        self._unread: deque[tuple[Tensor, torch.cuda.Event, bool | None]] = deque()

    def exchange(
        self, products: Callable[[bool], Tensor], count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """z, whether it is accepted, and the second row of products, if they have two.

        `products` computes them, from exact products or not.

        Raises:
            NonFiniteGradientError, DampTooSmallError: nothing has changed. On CUDA z is zero, and
                a later `settle` raises.
        """
        m = len(self.side.K)
        if not self.always_exact and int(count) % m == 0:
            self._new_round()
        while True:
            k = products(self.exact)
            if k.shape[1] > m:
                i, j = (int(count) - 1) % m, int(count) % m
                self._measure(float(k[0, m]), float(k[0, j]) * float(self.side.K[i, i]))
            self.interrupted = True
            z, accepted, errors = self.side.exchange(k[0, :m], count, self.rounding, self.exact)
            try:
                if self._accepts(errors):
                    self._fresh = False
                    return z, accepted, k[1] if len(k) == 2 else None
                self.recover()
            except ValueError:
                self.interrupted = False
                raise

    @property
    def rounding(self) -> float:
        """r in float32"""
        return 2 * self._mean_square**0.5

    def _measure(self, difference: float, squares: float) -> None:
        """Takes the error of an entry of K, relative to the norms of its gradients, of which
        `squares` is the product of squares, into the mean over about max(m, 32) of them."""
        if 0 < squares < math.inf and math.isfinite(difference):
            self._measured = min(self._measured + 1, max(32, len(self.side.K)))
            mean = self._mean_square
            self._mean_square += (difference**2 / squares - mean) / (self._measured + 1)

    def settle(self, wait: bool = True) -> None:
        """Reads what exchanges on CUDA found out, and repairs what was interrupted. Unless it is to
        `wait`, the last few exchanges may be left unread.

        Raises:
            NonFiniteGradientError, DampTooSmallError: of such an exchange.
        """
        if self.interrupted:
            self.rebuild()
            self.interrupted = False
        while self._unread and not torch.cuda.is_current_stream_capturing():
            errors, arrived, fresh = self._unread[0]
            if not (wait or len(self._unread) > UNREAD or arrived.query()):
                return
            arrived.synchronize()
            self._unread.popleft()
            if not self._judge(*errors.tolist()) and fresh is not None:
                self._fresh = fresh
                self.recover()

    def state_dict(self) -> dict[str, float]:
        """What the choice between float32 and float64 goes by."""
        names = ("_mean_square", "_measured", "_largest")
        return {name: float(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes what `state_dict` gave."""
        vars(self).update({name: state.get(name, 0.0) for name in self.state_dict()})

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_unread": deque()}  # events can't be copied

    def set_damp(self, damp: float) -> None:
        """Makes `damp` λ, or raises DampTooSmallError and keeps the one that is."""
        # Verdicts about the λ that goes count no more, but those about gradients do.
        self._unread = deque((errors, arrived, None) for errors, arrived, _ in self._unread)
        self._invert(damp)

    def rebuild(self) -> None:
        """Computes K in float64 from the window, O(dm²), and P."""
        self._invert(self.side.damp, anew=True)

    def forget(self) -> None:
        """Drops what has been found out about exchanges, as their window is replaced."""
        self._unread.clear()
        self.interrupted, self._fresh, self._largest = False, False, 0.0

    def refuse(self) -> None:
        """Raises DampTooSmallError."""
        raise DampTooSmallError(self._advice(self.side.damp))

    def recover(self) -> None:
        """After a result that is too far off: computes K anew in float64, or else P anew from K."""
        if self.exact and self._fresh:
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
        self._fresh = True

    def _advice(self, damp: float) -> str:
        largest = float(self.side.K.diagonal().max())
        return (
            f"damp = {damp:g} is too small for gradients of squared norm up to {largest:g}, even "
            f"in float64; raise damp to about {min(1e30, max(10 * damp, 1e-10 * largest)):.0e} or, "
            f"if that is not enough, to {min(1e30, max(100 * damp, 1e-6 * largest)):.0e}"
        )

    def _new_round(self) -> None:
        """Goes back to float32 if that would have done for the last m gradients."""
        self.exact &= not self._largest < 0.75 * TOLERANCE
        self._largest = 0.0

    def _accepts(self, errors: Tensor | tuple[float, float]) -> bool:
        """Whether the exchange stands. On CUDA that is left to `settle`, and True."""
        if isinstance(errors, tuple):
            return self._judge(*errors)
        if not errors.is_cuda:
            return self._judge(*errors.tolist())
        if not torch.cuda.is_current_stream_capturing():
            numbers = torch.empty(errors.shape, dtype=errors.dtype, device="cpu", pin_memory=True)
            numbers.copy_(errors, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(errors.device))
            self._unread.append((numbers, arrived, self._fresh))
        return True

    def _judge(self, error: float, in_float32: float = 0.0) -> bool:
        self._largest = max(self._largest, in_float32)
        self.nonfinite = self.nonfinite + 1 if math.isnan(error) else 0
        if self.nonfinite:
            raise NonFiniteGradientError("The gradient has NaN or Inf; the window is unchanged")
        return error <= TOLERANCE
