"""The (m, m) side of the dynamic algorithm: A⁻¹ for A = mλI + K, while rows of the window change.

With the last m gradients as the rows of G (m, d), K = GGᵀ is their Gram matrix and λ the damping
`damp`. This module does not access the window. When g becomes row j, it takes k = Gg and returns
z = A⁻¹e_j. Everything is in float64. On CUDA one kernel does it and waits for nothing.
"""

import math

import torch
from torch import Tensor

from kernels import cuda_kernels

__all__ = ["Coefficients", "factor"]

TOLERANCE = 2e-5  # relative error of F⁻¹g, at most
SINGLE, DOUBLE = 2.0**-23, 2.0**-52  # relative errors of products, at most
REFINED = 1e-13  # relative error of A'u that refinement does not reduce


def factor(A: Tensor) -> Tensor:
    """L (m, m) with A = LLᵀ. All NaN if A is not positive definite."""
    L, failed = torch.linalg.cholesky_ex(A)
    return L.masked_fill_(failed != 0, torch.nan)


class Coefficients:
    """K and P = A⁻¹ (m, m), for the m gradients of the window."""

    def __init__(self, m: int, damp: float, device: torch.device):
        self.damping = torch.full((), damp, dtype=torch.float64, device=device)
        self.damp = damp
        self.K = torch.zeros(m, m, dtype=torch.float64, device=device)
        self.P = torch.eye(m, dtype=torch.float64, device=device) / (m * damp)

    @property
    def damp(self) -> float:
        """λ. `damping` is λ on the device, where a captured step reads it."""
        return self._damp

    @damp.setter
    def damp(self, damp: float) -> None:
        self._damp = damp
        self.damping.fill_(damp)

    def invert(self, damp: float) -> bool:
        """Sets λ to `damp` and computes P from K, O(m³). If A is not positive definite, returns
        False and changes nothing."""
        A = self.K.clone()
        A.diagonal().add_(len(A) * damp)
        P = torch.cholesky_inverse(factor(A)).contiguous()  # kernels take rows
        if not bool(P[0, 0].isfinite()):
            return False
        self.P.copy_(P)  # in place, as a captured step needs
        self.damp = damp
        return True

    def exchange(
        self, k: Tensor, count: Tensor, rounding: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Makes k (m,) row and column j = count mod m of K: O(m²).

        Returns z = A⁻¹e_j (m,), accepted (1 or 0), and the relative error of F⁻¹g by (6), for
        products in float32 with this `rounding`, or in float64 if it is 0. Kernels return the error
        as a tensor (1,) on their device. If it exceeds `TOLERANCE` or k_j is not finite, nothing
        changes and z is zero.

        Let ' mean "without row and column j", and p = P[:, j]/√P_jj before the exchange. Then

            P' = P − ppᵀ,   u = P'k' = A'⁻¹k',   s = A_jj − k'ᵀu,   ũ = u with ũ_j = −1
            P ← P' + ũũᵀ/s,     z = −ũ/s
        """
        if kernels := cuda_kernels(k.device):
            z, accepted, found = torch.empty_like(k), torch.empty_like(count), k.new_empty(1)
            side = self.P, self.K, k, count, self.damping, TOLERANCE
            kernels.hinv_update(*side, z, found, accepted)
            return z, accepted, found
        m, j, P, K = len(k), int(count) % len(k), self.P, self.K
        shift, k_j, others = m * self.damp, float(k[j]), k.clone()
        others[j].zero_()  # k'
        A_diagonal, p = K.diagonal() + shift, P[j] / P[j, j].sqrt()
        u, residual = torch.zeros_like(k), others
        for _ in range(2):
            u += (P @ residual).sub_(p, alpha=float(p @ residual))
            u[j].zero_()
            residual = torch.addmv(others, K, u, alpha=-1).sub_(u, alpha=shift)  # k' − A'u
            residual[j].zero_()
            off = float(residual @ (residual / A_diagonal))  # ‖D⁻¹(k' − A'u)‖², D as in (6)
            # One step of refinement, unless only rounding is left: P'k' cancels for nearly parallel
            # gradients, and P would keep the error.
            if off < REFINED**2 * (k_j + shift):
                break
        projected = float(u @ (others + residual))  # k'ᵀA'⁻¹k', up to the square of the error of u
        s = k_j + shift - projected  # Schur complement, s ≥ mλ

        # The terms of (6) for ũ = −sz: all squares are s² times those of z.
        length, terms = float(u @ u), k_j + float(u.square() @ K.diagonal())
        trace = float((P.diagonal() - p.square()) @ A_diagonal)
        trace += (terms + shift * (length + 1)) / (s or math.nan)
        # ũᵀKũ less its own rounding error. If nothing is left, the error is unknown, and infinite.
        left = k_j - projected - shift * length - m * DOUBLE / 2 * terms

        r, q = (rounding, SINGLE / 2 * (1 + m / 16) ** 0.5) if rounding else (DOUBLE, 0)
        error = math.inf
        if k_j == 0 or not math.isfinite(k_j):
            error = 0 * k_j  # 0, as F⁻¹g is, or NaN, as g is not finite
        elif s > 0 and 0 < trace < math.inf and 0 < left < math.inf and off < math.inf:
            error = ((off * trace) ** 0.5 + terms**0.5 * (r * trace**0.5 + q)) / left**0.5
        if not error <= TOLERANCE:
            return torch.zeros_like(k), torch.zeros_like(count), error

        u[j] = -1  # ũ
        # The same factors on both sides keep P symmetric. The error of its row j is a rounding of
        # P_jj, which may be far larger than z, so z overwrites this row.
        z, v = u / -s, u / s**0.5
        P.addmm_(torch.stack([-p, v], 1), torch.stack([p, v]))
        P[j] = P[:, j] = z
        K[j] = K[:, j] = k
        return z, torch.ones_like(count), error

    def solve(self, y: Tensor) -> Tensor:
        """A⁻¹y (m,), with a step of refinement."""
        x = self.P @ y
        residual = torch.addmv(y, self.K, x, alpha=-1).addcmul_(self.damping, x, value=-len(y))
        return torch.addmv(x, self.P, residual)

    def trace(self) -> Tensor:
        """Σᵢ PᵢᵢAᵢᵢ: m for orthogonal gradients, large for nearly parallel ones."""
        return self.P.diagonal() @ self.K.diagonal() + len(self.K) * self.damp * self.P.trace()
