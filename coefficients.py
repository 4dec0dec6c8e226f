"""The (m, m) side of the dynamic algorithm: A⁻¹ for A = mλI + K, as rows of the window come and go.

With the last m gradients as the rows of G (m, d), K = GGᵀ is their Gram matrix and λ the damping
`damp`. Nothing here sees the window or waits for a device: when row j is replaced by g, k = Gg comes
in and z = A⁻¹e_j goes out. All in float64.
"""

import torch
from torch import Tensor

from kernels import cuda_kernels

__all__ = ["Coefficients", "factor"]

TOLERANCE = 2e-5  # relative error of F⁻¹g, at most


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
        >>> z, accepted, health = side.exchange(k, torch.tensor(0), 2**-53)
        >>> round(float(z[0]), 6)  # A is diag(4, 1)
        0.25
    """

    def __init__(self, m: int, damp: float, device: torch.device):
        self.damp = damp
        self.K = torch.zeros(m, m, dtype=torch.float64, device=device)
        self.P = torch.eye(m, dtype=torch.float64, device=device) / (m * damp)
        self.fresh = True  # P has been computed from K as it is

    def invert(self, damp: float) -> bool:
        """Computes P from K for damping λ = `damp`, O(m³). False, and nothing changes, if A is not
        positive definite."""
        A = self.K.clone()
        A.diagonal().add_(len(A) * damp)
        P = torch.cholesky_inverse(factor(A)).contiguous()  # kernels take rows
        if not bool(P[0, 0].isfinite()):
            return False
        self.P, self.damp, self.fresh = P, damp, True
        return True

    def exchange(self, k: Tensor, count: Tensor, roundoff: float) -> tuple[Tensor, Tensor, Tensor]:
        """Makes k (m,) row and column j = count mod m of K: O(m²).

        Returns z = A⁻¹e_j (m,), whether it is accepted, 1 or 0, and its health (3,) for `Precision`.
        Where the error exceeds the tolerance, or k_j is not finite, nothing changes and z is zero.

        With ' for "without row and column j", and p = P[:, j] before the exchange,

            P' = P − ppᵀ/p_j,   u = P'k' = A'⁻¹k',   s = A_jj − k'ᵀu,   ũ = u with ũ_j = −1
            P ← P' + ũũᵀ/s,     z = −ũ/s
        """
        m, shift = len(k), len(k) * self.damp
        if kernels := cuda_kernels(k.device):
            z, health, accepted = torch.empty_like(k), k.new_empty(3), torch.empty_like(count)
            kernels.hinv_update(self.P, self.K, k, count, self.damp, TOLERANCE, z, accepted, health)
            return z, accepted, health
        j = count.view(1) % m
        p = self.P.index_select(1, j)[:, 0]
        p_j, k_j = p.index_select(0, j), k.index_select(0, j)
        a = k_j + shift
        others = k.index_fill(0, j, 0)  # k'

        def solve_without_j(x: Tensor) -> Tensor:
            y = self.P @ x
            return y.sub_(p * (y.index_select(0, j) / p_j)).index_fill_(0, j, 0)

        u = solve_without_j(others)
        # One step of refinement: P'k' cancels for nearly parallel gradients, and P would keep that.
        residual = (others - self.K @ u).sub_(u, alpha=shift).index_fill_(0, j, 0)
        u += solve_without_j(residual)
        s = a - others @ u  # Schur complement, s ≥ mλ
        image = (self.K @ u).index_copy_(0, j, others @ u).sub_(k)  # Kũ, with the new row of K
        u.index_fill_(0, j, -1)
        z = u / -s

        K_diagonal = self.K.diagonal().index_copy(0, j, k_j)
        A_diagonal = K_diagonal + shift
        P_diagonal = (self.P.diagonal() - p.square() / p_j).index_fill_(0, j, 0) + u.square() / s
        trace = P_diagonal @ A_diagonal
        terms = u.square() @ K_diagonal
        # (zᵀKz)^½ s. Where that cancels to its own rounding error nothing is known, and 0 is safe.
        norm = ((u @ image) - m * 2.0**-53 * terms).clamp(min=0).sqrt()
        rest = image.add_(u, alpha=shift).index_add_(0, j, s)  # (e_j − Az) s
        amplification = (trace * terms).sqrt() / norm
        error = (
            roundoff * amplification + (trace * (rest.square() / A_diagonal).sum()).sqrt() / norm
        )
        error = error.where(k_j != 0, 0).where(s > 0, torch.inf)  # g = 0 makes F⁻¹g = 0
        accepted = error <= TOLERANCE
        error = error.nan_to_num(torch.inf, torch.inf).where(k_j.isfinite(), torch.nan)
        amplification = amplification.nan_to_num(0)

        z = z.where(accepted, 0)
        row = k.where(accepted, self.K.index_select(0, j)[0])
        self.K.index_copy_(0, j, row[None]).index_copy_(1, j, row[:, None])
        # Equal factors on both sides keep P symmetric. Rounding leaves row j as far off as p_j, which
        # may be far larger than z.
        down = (p / p_j.sqrt()).where(accepted, 0)
        up = (u / s.sqrt()).where(accepted, 0)
        self.P.addmm_(torch.stack([-down, up], dim=1), torch.stack([down, up]))
        row = z.where(accepted, p)
        self.P.index_copy_(0, j, row[None]).index_copy_(1, j, row[:, None])
        return z, accepted[0].long(), torch.cat([accepted.double(), error, amplification.view(1)])

    def solve(self, y: Tensor) -> Tensor:
        """A⁻¹y (m,), with a step of refinement."""
        x = self.P @ y
        return x + self.P @ (y - self.K @ x - len(y) * self.damp * x)

    def trace(self) -> Tensor:
        """Σᵢ PᵢᵢAᵢᵢ: m for orthogonal gradients, large for nearly parallel ones."""
        return self.P.diagonal() @ self.K.diagonal() + len(self.K) * self.damp * self.P.trace()
