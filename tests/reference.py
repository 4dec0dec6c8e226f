"""Dense oracles: the definitions as code, whatever they cost.

They share no code with the tested modules. `G` (m, d) has a gradient in each row. It is a tensor,
or anything that `torch.as_tensor` takes. All is in float64 unless a dtype is given.
"""

from decimal import Context, Decimal, localcontext

import numpy as np
import torch

DIGITS = Context(prec=150)  # beyond any cancellation of numbers from 1e-45 to 1e38


def dense_fisher(G, damp: float) -> torch.Tensor:
    """The damped empirical Fisher λI + GᵀG/m, (d, d)."""
    G = torch.as_tensor(G).double()
    m, d = G.shape
    return damp * torch.eye(d, dtype=torch.float64) + G.T @ G / m


def dense_inverse(G, damp: float) -> torch.Tensor:
    """The inverse of `dense_fisher`, (d, d)."""
    return torch.linalg.inv(dense_fisher(G, damp))


def woodbury_column(G, damp: float, j: int) -> torch.Tensor:
    """F⁻¹g_j (d,) for row j of G, from an m × m solve. For cases where (d, d) is too large or too
    ill-conditioned: here a gradient scaled by c only scales a row and a column."""
    G, m = torch.as_tensor(G).double(), len(G)
    A = G @ G.T + m * damp * torch.eye(m, dtype=torch.float64)
    e = torch.eye(m, dtype=torch.float64)[j]
    return m * G.T @ torch.cholesky_solve(e[:, None], torch.linalg.cholesky(A))[:, 0]


def ring(rows, m: int) -> torch.Tensor:
    """The window (m, d) after rows (n, d) have entered. Unused rows are zero."""
    G = torch.zeros(m, len(rows[0]), dtype=rows[0].dtype)
    for t, row in enumerate(rows):
        G[t % m] = row
    return G


def exact_inverse(G, damp: float, size: int | None = None) -> np.ndarray:
    """The inverse of dense_fisher, or of its blocks of `size` on the diagonal, as Decimals (d, d).

    By elimination in 150 digits, which suffice for any scale of float32 gradients and any rank.
    """
    G = torch.as_tensor(G)
    m, d = G.shape
    size = size or d
    with localcontext(DIGITS):
        rows = decimals(G)
        inverse = np.full((d, d), Decimal(0))
        for start in range(0, d, size):
            block = slice(start, start + size)
            F = rows[:, block].T @ rows[:, block] / Decimal(m)
            b = len(F)
            F = np.concatenate([F + np.diag([Decimal(damp)] * b), decimals(torch.eye(b))], axis=1)
            for i in range(b):
                F[i] = F[i] / F[i, i]
                others = np.arange(b) != i
                F[others] = F[others] - F[others, i : i + 1] * F[i]
            inverse[block, block] = F[:, b:]
    return inverse


def exact_times(inverse: np.ndarray, x) -> torch.Tensor:
    """An `exact_inverse` times x (d,), rounded once, to float64."""
    with localcontext(DIGITS):
        return torch.tensor([float(v) for v in inverse @ decimals(x)], dtype=torch.float64)


def decimals(x) -> np.ndarray:
    """A tensor as an array of Decimals, exactly."""
    x = torch.as_tensor(x).double()
    values = np.array([Decimal(v) for v in x.flatten().tolist()], dtype=object)
    return values.reshape(x.shape)


def as_kept(
    gradients, compress: float | None = None, dtype=torch.float32, sizes=None, block=4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (n, d) as a window stores them one after the other, and the final error (d,).

    They are rounded to `dtype`. With `compress`, c has the largest entries of a = error + g in each
    block of columns, this fraction of them, and the error becomes a - c. Each of `sizes` starts a
    new block.
    """
    rows, error = [], torch.zeros_like(gradients[0])
    for g in gradients:
        a = error + g
        c = torch.zeros_like(a)
        start = 0
        for size in sizes or [len(a)]:
            for first in range(start, start + size, block):
                columns = slice(first, min(first + block, start + size))
                part = a[columns]
                number = len(part) if compress is None else max(1, round(compress * len(part)))
                largest = sorted(range(len(part)), key=lambda i: -abs(part[i].item()))[:number]
                c[first + torch.tensor(largest)] = rounded(part[largest], dtype).to(c.dtype)
            start += size
        rows.append(c)
        if compress is not None:
            error = a - c
    return torch.stack(rows), error


# For each type: significant bits, the exponent of the smallest number, and for types with scales
# the exponent of a block's largest number.
FORMATS = {
    torch.float64: (53, -1074, None),
    torch.float32: (24, -149, None),
    torch.bfloat16: (8, -133, None),
    torch.float16: (11, -24, 15),
    torch.float8_e4m3fn: (4, -9, 8),
}


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A block x (n,) rounded to `dtype`, for some types times a scale, a power of two."""
    bits, smallest, largest = FORMATS[dtype]
    values = x.double().numpy()
    exponent = 0 if largest is None else np.frexp(np.abs(values).max())[1] - largest
    values = np.ldexp(values, -exponent)
    step = np.maximum(np.frexp(values)[1] - bits, smallest)
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(values, -step)), step + exponent))


def recursion(G, damp: float, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Sherman-Morrison, one gradient at a time, as in the paper.

    vᵢ = F_{i-1}⁻¹ gᵢ and qᵢ = m + gᵢᵀvᵢ, so that F⁻¹ = I/λ - Σᵢ vᵢvᵢᵀ/qᵢ. Returns V (m, d), q (m,).
    """
    G = torch.as_tensor(G).to(dtype)
    m = len(G)
    V, q = torch.empty_like(G), G.new_empty(m)
    for i, g in enumerate(G):
        V[i] = g / damp - (V[:i] @ g / q[:i]) @ V[:i]
        q[i] = m + g @ V[i]
    return V, q


def recursion_diagonal(G, damp: float, dtype=torch.float64) -> torch.Tensor:
    """diag(F⁻¹), (d,), from the recursion."""
    V, q = recursion(G, damp, dtype)
    return 1 / damp - (V.square() / q[:, None]).sum(0)


def joint_removal(F: torch.Tensor, drop, w: torch.Tensor) -> torch.Tensor:
    """The update δ (d,) of the weights `w` that removes `drop` at the least cost ½ δᵀFδ.

    The group formula of Optimal Brain Surgeon, δ = -F⁻¹E_Q (E_QᵀF⁻¹E_Q)⁻¹ w_Q, for any dense F.
    """
    inverse = torch.linalg.inv(F.double())
    return -inverse[:, drop] @ torch.linalg.solve(inverse[drop][:, drop], w.double()[drop])


def independent_removal(F: torch.Tensor, drop, w: torch.Tensor) -> torch.Tensor:
    """The paper's update δ (d,): every weight of `drop` removed as if it were alone, then 0."""
    inverse = torch.linalg.inv(F.double())
    w = w.double()
    delta = -inverse[:, drop] @ (w[drop] / inverse.diagonal()[drop])
    delta[drop] = -w[drop]
    return delta
