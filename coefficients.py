"""The (m, m) side of the dynamic algorithm: A⁻¹ for A = mλI + K, while rows of the window change.

With the last m gradients as the rows of G (m, d), K = GGᵀ is their Gram matrix and λ the damping
`damp`. This module does not access the window. When g replaces row j, it takes k = Gg and returns
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
    """L (m, m) with A = LLᵀ. All NaN if A is not positive definite.

    Example:
        >>> factor(torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
        tensor([[2., 0.],
                [0., 3.]])
    """
    L, failed = torch.linalg.cholesky_ex(A)
    return L.masked_fill_(failed != 0, torch.nan)


class Coefficients:
    """K and P = A⁻¹ (m, m), for the m gradients of the window.

    Example:
        >>> side = Coefficients(2, damp=0.5, device=torch.device("cpu"))
        >>> k = torch.tensor([3.0, 0.0], dtype=torch.float64)
        >>> z, accepted, errors = side.exchange(k, torch.tensor(0), rounding=2**-23)
        >>> round(float(z[0]), 6)  # A is diag(4, 1)
        0.25
    """

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
        """Computes P from K for damping λ = `damp`, O(m³). If A is not positive definite, returns
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
        self, k: Tensor, count: Tensor, rounding: float, exact: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | tuple[float, float]]:
        """Makes k (m,) row and column j = count mod m of K: O(m²).

        Returns z = A⁻¹e_j (m,), accepted (1 or 0), and the relative error of F⁻¹g by (6), for
        products in float64 (`exact`) or in float32 with this `rounding`. Kernels return this error
        as a tensor (1,) on their device. Elsewhere it is a pair with the error for float32. If the
        error exceeds `TOLERANCE` or k_j is not finite, nothing changes and z is zero.

        Let ' mean "without row and column j", and p = P[:, j] before the exchange. Then

            P' = P − ppᵀ/p_j,   u = P'k' = A'⁻¹k',   s = A_jj − k'ᵀu,   ũ = u with ũ_j = −1
            P ← P' + ũũᵀ/s,     z = −ũ/s
        """
        m, shift = len(k), len(k) * self.damp
        if kernels := cuda_kernels(k.device):
            z, accepted, error = torch.empty_like(k), torch.empty_like(count), k.new_empty(1)
            side = self.P, self.K, k, count, self.damping, TOLERANCE
            kernels.hinv_update(*side, z, error, accepted)
            return z, accepted, error
        j = int(count) % m
        k_j, p, others = float(k[j]), self.P[j].clone(), k.clone()
        others[j] = 0  # k'

        def solve_without_j(x: Tensor) -> Tensor:
            y = self.P @ x
            y -= p * (y[j] / p[j])
            y[j] = 0
            return y

        def residual(u: Tensor, Ku: Tensor) -> Tensor:
            """k' − A'u"""
            r = (others - Ku).sub_(u, alpha=shift)
            r[j] = 0
            return r

        K_diagonal = self.K.diagonal().clone()
        K_diagonal[j] = k_j
        A_diagonal = K_diagonal + shift
        u = solve_without_j(others)
        Ku = self.K @ u
        # One step of refinement, unless only rounding is left: P'k' cancels for nearly parallel
        # gradients, and P would keep the error.
        r = residual(u, Ku)
        if not float((r.square() / A_diagonal).max()) < REFINED**2 * (k_j + shift):
            u += solve_without_j(r)
            Ku = self.K @ u
            r = residual(u, Ku)
        projected = float(others @ u)
        s = k_j + shift - projected  # Schur complement, s ≥ mλ
        # All squares from here on are s² times those of the formulas, as u = −sz.
        off = float((r.square() / A_diagonal).sum())  # ‖D⁻¹(e_j − Az)‖²
        Ku -= k
        Ku[j] = projected - k_j  # now Kũ, with the new row of K
        u[j] = -1
        P_diagonal = self.P.diagonal() - p.square() / p[j] + u.square() / s
        P_diagonal[j] = 1 / s if s else 0
        trace, terms = float(P_diagonal @ A_diagonal), float(u.square() @ K_diagonal)
        # zᵀKz may cancel down to its own rounding error. Then the error is unknown, and infinite.
        left = float(u @ Ku) - m * DOUBLE / 2 * terms

        errors = math.inf, math.inf
        if k_j == 0:  # then F⁻¹g is 0
            errors = 0.0, 0.0
        elif not math.isfinite(k_j):
            errors = math.nan, math.nan
        elif s > 0 and 0 < trace < math.inf and 0 < left < math.inf and off < math.inf:  # (6)
            float64 = (off * trace) ** 0.5 + terms**0.5 * DOUBLE * trace**0.5
            float32 = (off * trace) ** 0.5 + terms**0.5 * (
                rounding * trace**0.5 + SINGLE / 2 * (1 + m / 16) ** 0.5
            )
            errors = (float64 if exact else float32) / left**0.5, float32 / left**0.5
        if not errors[0] <= TOLERANCE:
            return torch.zeros_like(k), torch.zeros_like(count), errors

        z = u / -s
        # The same factors on both sides keep P symmetric. The error of its row j is a rounding of
        # p_j, which may be far larger than z, so z overwrites this row.
        factors = torch.stack([p / p[j].sqrt(), u / s**0.5])
        self.P.addmm_(torch.stack([-factors[0], factors[1]], 1), factors)
        self.P[j] = self.P[:, j] = z
        self.K[j] = self.K[:, j] = k
        return z, torch.ones_like(count), errors

    def solve(self, y: Tensor) -> Tensor:
        """A⁻¹y (m,), with a step of refinement."""
        x = self.P @ y
        residual = torch.addmv(y, self.K, x, alpha=-1).addcmul_(self.damping, x, value=-len(y))
        return torch.addmv(x, self.P, residual)

    def trace(self) -> Tensor:
        """Σᵢ PᵢᵢAᵢᵢ: m for orthogonal gradients, large for nearly parallel ones."""
        return self.P.diagonal() @ self.K.diagonal() + len(self.K) * self.damp * self.P.trace()
