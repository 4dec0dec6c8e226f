"""The (m, m) side of the dynamic algorithm: A⁻¹ for A = mλI + K, as rows of the window come and go.

With the last m gradients as the rows of G (m, d), K = GGᵀ is their Gram matrix and λ the damping
`damp`. Nothing here sees the window or waits for a device: when row j is replaced by g, k = Gg
comes in and z = A⁻¹e_j goes out. All in float64.
"""

import torch
from torch import Tensor

from kernels import cuda_kernels

__all__ = ["Coefficients", "factor"]

TOLERANCE = 2e-5  # relative error of F⁻¹g, at most
SINGLE, DOUBLE = 2.0**-23, 2.0**-52  # relative errors of products, at most


def factor(A: Tensor) -> Tensor:
    """L (m, m) of A = LLᵀ, all NaN if A is not positive definite.

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
        self.damp = damp
        self.K = torch.zeros(m, m, dtype=torch.float64, device=device)
        self.P = torch.eye(m, dtype=torch.float64, device=device) / (m * damp)

    def invert(self, damp: float) -> bool:
        """Computes P from K for damping λ = `damp`, O(m³). False, and nothing changes, if A is not
        positive definite."""
        A = self.K.clone()
        A.diagonal().add_(len(A) * damp)
        P = torch.cholesky_inverse(factor(A)).contiguous()  # kernels take rows
        if not bool(P[0, 0].isfinite()):
            return False
        self.P, self.damp = P, damp
        return True

    def exchange(
        self, k: Tensor, count: Tensor, rounding: float, exact: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Makes k (m,) row and column j = count mod m of K: O(m²).

        Returns z = A⁻¹e_j (m,); whether it is accepted, 1 or 0; and the relative error of F⁻¹g, by
        (5) for products in float64 (`exact`) or float32 with this `rounding`, on the CPU followed
        by that for float32. Where it exceeds `TOLERANCE`, or k_j is not finite, nothing changes and
        z is zero.

        With ' for "without row and column j", and p = P[:, j] before the exchange,

            P' = P − ppᵀ/p_j,   u = P'k' = A'⁻¹k',   s = A_jj − k'ᵀu,   ũ = u with ũ_j = −1
            P ← P' + ũũᵀ/s,     z = −ũ/s
        """
        m, shift = len(k), len(k) * self.damp
        if kernels := cuda_kernels(k.device):
            z, accepted, error = torch.empty_like(k), torch.empty_like(count), k.new_empty(1)
            kernels.hinv_update(self.P, self.K, k, count, self.damp, TOLERANCE, z, error, accepted)
            return z, accepted, error
        j = count.view(1) % m
        p = self.P.index_select(1, j)[:, 0]
        p_j, k_j = p.index_select(0, j), k.index_select(0, j)
        others = k.index_fill(0, j, 0)  # k'

        def solve_without_j(x: Tensor) -> Tensor:
            y = self.P @ x
            return y.sub_(p * (y.index_select(0, j) / p_j)).index_fill_(0, j, 0)

        u = solve_without_j(others)
        # One step of refinement: P'k' cancels for nearly parallel gradients, and P would keep that.
        residual = (others - self.K @ u).sub_(u, alpha=shift).index_fill_(0, j, 0)
        u += solve_without_j(residual)
        s = k_j + shift - others @ u  # Schur complement, s ≥ mλ
        image = (self.K @ u).index_copy_(0, j, others @ u).sub_(k)  # Kũ, with the new row of K
        u.index_fill_(0, j, -1)

        # (5), where all but the trace is multiplied by s.
        K_diagonal = self.K.diagonal().index_copy(0, j, k_j)
        A_diagonal = K_diagonal + shift
        P_diagonal = (self.P.diagonal() - p.square() / p_j).index_fill_(0, j, 0) + u.square() / s
        condition = (P_diagonal @ A_diagonal).sqrt()
        terms = u.square() @ K_diagonal
        # zᵀKz may cancel to its own rounding error. Then nothing is known, and 0 is safe.
        norm = ((u @ image) - m * DOUBLE / 2 * terms).clamp_(min=0).sqrt()
        terms = terms.sqrt()
        residual = image.add_(u, alpha=shift).index_add_(0, j, s)  # e_j − Az
        residual = (residual.square() / A_diagonal).sum().sqrt() * condition
        float64 = terms * DOUBLE * condition + residual
        float32 = terms * (rounding * condition + SINGLE / 8 * m**0.5) + residual
        errors = torch.stack([float64 if exact else float32, float32]) / norm
        errors = errors.where((s > 0) & (condition > 0), torch.inf).where(k_j != 0, 0)
        errors = errors.nan_to_num_(torch.inf, torch.inf).where(k_j.isfinite(), torch.nan)
        accepted = errors[:1] <= TOLERANCE

        z = (u / -s).where(accepted, 0)
        # Equal factors on both sides keep P symmetric. Rounding leaves its row j as far off as p_j,
        # which may be far larger than z.
        factors = torch.stack([p / p_j.sqrt(), u / s.sqrt()]).where(accepted, 0)
        self.P.addmm_(factors.T * factors.new_tensor([-1, 1]), factors)
        for matrix, row in ((self.P, z.where(accepted, p)), (self.K, k)):
            row = row.where(accepted, matrix.index_select(0, j)[0])
            matrix.index_copy_(0, j, row[None]).index_copy_(1, j, row[:, None])
        return z, accepted[0].long(), errors

    def solve(self, y: Tensor) -> Tensor:
        """A⁻¹y (m,), with a step of refinement."""
        x = self.P @ y
        return x + self.P @ (y - self.K @ x - len(y) * self.damp * x)

    def trace(self) -> Tensor:
        """Σᵢ PᵢᵢAᵢᵢ: m for orthogonal gradients, large for nearly parallel ones."""
        return self.P.diagonal() @ self.K.diagonal() + len(self.K) * self.damp * self.P.trace()
