"""The (m, m) side of the dynamic algorithm: A⁻¹ for A = mλI + K, as rows of the window come and go.

With the last m gradients as the rows of G (m, d), K = GGᵀ is their Gram matrix and λ the damping
`damp`. Nothing here sees the window or waits for a GPU: when row j is exchanged, k = Gg comes in
and z = A⁻¹e_j goes out. Where A is not positive definite, as rounded, the results are NaN.

`IncrementalCoefficients` keep P = A⁻¹, O(m²) an exchange; `PaperCoefficients` are those of section
3.2 of the paper (arXiv 2107.03356), O(m³). All in float64.
"""

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["IncrementalCoefficients", "PaperCoefficients", "cuda_kernels", "unit"]

logger = logging.getLogger("optim")


def cuda_kernels(device: torch.device) -> ModuleType | None:
    """The extension hinv_cuda for a CUDA device if it is installed, else None.

    Example:
        >>> cuda_kernels(torch.device("cpu")) is None
        True
    """
    return _extension() if device.type == "cuda" else None


@functools.cache
def _extension() -> ModuleType | None:
    try:
        import hinv_cuda
    except ImportError as error:
        logger.debug("the (m, m) side runs on torch operations: %s", error)
        return None
    logger.debug("the (m, m) side runs on the kernels of %s", hinv_cuda.__file__)
    return hinv_cuda


def factor(A: Tensor) -> Tensor:
    """L (m, m) of A = LLᵀ, all NaN if A is not positive definite."""
    L, failed = torch.linalg.cholesky_ex(A)
    return L.masked_fill_(failed != 0, torch.nan)


def unit(j: int, like: Tensor) -> Tensor:
    """e_j, as long as `like`.

    Example:
        >>> unit(1, like=torch.ones(3))
        tensor([0., 1., 0.])
    """
    e = torch.zeros_like(like)
    e[j] = 1
    return e


class IncrementalCoefficients:
    """P = A⁻¹ (m, m) in float64, exchanged in O(m²) when a row of the window changes.

    P is computed anew from A once every m exchanges.

    Example:
        >>> side = IncrementalCoefficients(2, damp=0.5, device=torch.device("cpu"))
        >>> z, condition = side.exchange(0, torch.tensor([3.0, 0.0], dtype=torch.float64))
        >>> round(float(z[0]), 6)  # A is diag(4, 1)
        0.25
    """

    def __init__(self, m: int, damp: float, device: torch.device):
        self.damp = damp
        self.K = torch.zeros(m, m, dtype=torch.float64, device=device)
        self.P = torch.eye(m, dtype=torch.float64, device=device) / (m * damp)
        self.age = 0  # exchanges since P was computed from A

    def refactor(self, damp: float) -> None:
        """Computes P from K for damping λ = `damp`, O(m³)."""
        A = self.K.clone()
        A.diagonal().add_(len(A) * damp)
        self.P = torch.cholesky_inverse(factor(A)).contiguous()  # the old one may be in a state
        self.damp, self.age = damp, 0

    def exchange(self, j: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Makes k (m,) row and column j of K; returns z = A⁻¹e_j (m,) and the condition, which is
        infinite where z does not solve its equation."""
        self.age += 1
        kernels = cuda_kernels(k.device)
        if kernels and self.age < len(k):
            z, health = torch.empty_like(k), k.new_empty(3)
            kernels.hinv_update(self.P, self.K, k, j, self.damp, z, health)
            _, residual, condition = health
        else:
            self.K[j] = self.K[:, j] = k
            if self.age < len(k):
                z = self._exchange_inverse(j, k)
            else:
                self.refactor(self.damp)
                z = self.solve(unit(j, k))
            residual, condition = self._residual(j, z), self.condition()
        return z, condition.where(residual < 1e-6, torch.inf)  # also where it is NaN

    def _exchange_inverse(self, j: int, k: Tensor) -> Tensor:
        """The rank-two update of P; returns its new column j. NaN where rounding prevents it."""
        p = self.P[:, j].clone()

        def solve_without_j(x: Tensor) -> Tensor:
            """(A without j)⁻¹x, with entry j set to 0, for x_j = 0."""
            y = self.P @ x - p * (p @ x / p[j])
            y[j] = 0
            return y

        kk = k.clone()  # k'
        kk[j] = 0
        u = solve_without_j(kk)
        # A step of refinement: P k' cancels where gradients are nearly parallel, and P keeps that.
        r = kk - self._A_times(u)
        r[j] = 0
        u += solve_without_j(r)
        s = k[j] + len(k) * self.damp - kk @ u  # Schur complement; s ≥ mλ
        u[j] = -1
        # P − p pᵀ/p_j + u uᵀ/s in one sweep; equal factors on both sides keep P symmetric.
        down, up = p / p[j].sqrt(), u / s.sqrt()
        self.P.addmm_(torch.stack([-down, up], dim=1), torch.stack([down, up]))
        z = -u / s
        self.P[j] = self.P[:, j] = z  # rounding leaves as much as p_j, which may be far larger
        return z

    def _residual(self, j: int, z: Tensor) -> Tensor:
        """The largest entry of e_j − Az in units of row and column: small gradients count as much
        as large ones."""
        a = self._A_diagonal()
        r = unit(j, z) - self._A_times(z)
        return (r.abs() * (a[j] / a).sqrt()).max()

    def solve(self, y: Tensor) -> Tensor:
        """A⁻¹y (m,), with a step of refinement."""
        x = self.P @ y
        return x + self.P @ (y - self._A_times(x))

    def _A_times(self, y: Tensor) -> Tensor:
        return self.K @ y + len(y) * self.damp * y

    def _A_diagonal(self) -> Tensor:
        return self.K.diagonal() + len(self.K) * self.damp

    def condition(self) -> Tensor:
        """max_i P_ii A_ii: 1 for orthogonal gradients, large for nearly parallel ones."""
        return (self.P.diagonal() * self._A_diagonal()).max()

    def state_dict(self) -> dict[str, Any]:
        return {"K": self.K, "damp": self.damp, "P": self.P, "age": self.age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.K.copy_(state["K"])
        self.refactor(state["damp"])
        if "P" in state:  # not where it comes from PaperCoefficients
            self.P = state["P"].to(self.P.device, copy=True)
            self.age = state["age"]


class PaperCoefficients:
    """The paper's B and q, computed anew from K for each gradient: O(m³).

    With C = mI + K/λ = L̂ diag(q) L̂ᵀ and B = λ⁻¹L̂⁻¹, A⁻¹ = λ Bᵀ diag(1/q) B.

    Example:
        >>> side = PaperCoefficients(2, damp=0.5, device=torch.device("cpu"))
        >>> z, condition = side.exchange(0, torch.tensor([3.0, 0.0], dtype=torch.float64))
        >>> round(float(z[0]), 6)  # A is diag(4, 1)
        0.25
    """

    def __init__(self, m: int, damp: float, device: torch.device):
        self.K = torch.zeros(m, m, dtype=torch.float64, device=device)
        self.refactor(damp)

    def refactor(self, damp: float) -> None:
        """Computes B and q from K for damping λ = `damp`."""
        C = self.K / damp
        C.diagonal().add_(len(C))
        L = factor(C)
        self.q = L.diagonal().square()
        L_hat = (L / L.diagonal()).contiguous()
        self.B = torch.eye(len(C), dtype=C.dtype, device=C.device) / damp
        if kernels := cuda_kernels(C.device):
            kernels.hinv_setup(L_hat, self.B)
        else:
            self.B = torch.linalg.solve_triangular(L_hat, self.B, upper=False)
        self.damp = damp

    def exchange(self, j: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Makes k (m,) row and column j of K; returns z = A⁻¹e_j (m,) and the condition."""
        self.K[j] = self.K[:, j] = k
        self.refactor(self.damp)
        return self.solve(unit(j, k)), self.condition()

    def solve(self, y: Tensor) -> Tensor:
        """A⁻¹y (m,)."""
        return self.damp * (self.B.T @ (self.B @ y / self.q))

    def condition(self) -> Tensor:
        """max_i (A⁻¹)_ii A_ii: 1 for orthogonal gradients, large for nearly parallel ones."""
        inverse_diagonal = self.damp * (self.B.square().T @ (1 / self.q))
        return (inverse_diagonal * (self.K.diagonal() + len(self.K) * self.damp)).max()

    def state_dict(self) -> dict[str, Any]:
        return {"K": self.K, "damp": self.damp}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.K.copy_(state["K"])
        self.refactor(state["damp"])


COEFFICIENTS: dict[str, type[IncrementalCoefficients] | type[PaperCoefficients]] = {
    "incremental": IncrementalCoefficients,
    "paper": PaperCoefficients,
}
