"""Blocks of the static inverse Fisher, many at once, and the precision of an inverse.

Equation numbers and symbols are those of `prun`. Blocks of at most m weights are formed. Larger
ones use Woodbury's identity.
"""

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher import as_matrix
from samples import OuterProducts

Layout = list[tuple[slice, int]]  # columns of some blocks each, with the block size

STRIP = 256  # rows of a triangle that are computed at once
PARTIAL_ROWS = 128  # gradients, at most, that blocks sum in float32 before float64 takes over
BATCH = 128  # gradients that are added to blocks at once, as each time goes through all blocks
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def usual_perbatch(b: int, m: int | None, device: torch.device) -> int:
    """How many blocks of b columns suit a device: of m stored gradients, or, with None, of sums to
    which gradients are added in several passes."""
    share = 32 if m is None and device.type == "cpu" else 4
    return max(1, tile_size(device) // share // (b * (b if m is None else min(b, m))))


def layout(d: int, b: int, perbatch: int) -> Layout:
    """The columns of each batch of blocks; a smaller last block is a batch of its own."""
    starts = sorted({*range(0, d - d % b, perbatch * b), d - d % b, d})
    return [(slice(i, j), min(b, j - i)) for i, j in pairwise(starts)]


def tile_size(device: torch.device) -> int:
    """The size of a tile: it fits in the cache of a CPU, and keeps kernels on a GPU few."""
    return 2**21 if device.type == "cpu" else 2**25


# --- precision ------------------------------------------------------------------------------------

# Products are in float64 on a GPU. On a CPU, where float32 is twice as fast, G is multiplied in
# float32 if the error of a result, estimated as below, is at most RESOLVABLE; else in float64.
# Measured: A⁻¹ is off by at most 4 roundings (of the type that K was computed in) times the
# condition, which is the largest Aᵢᵢ(A⁻¹)ᵢᵢ, and cⱼ of (2) by that fraction of itself.
RESOLVABLE = 2.0**-18  # roundings x condition that leave an error of about 1e-5


def fast_type(G: Tensor, device: torch.device) -> torch.dtype:
    """float32 where it is faster, G has no more bits, and torch computes products to all bits."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    fast = device.type == "cpu" and G.dtype != torch.float64 and precision in ("none", "ieee")
    return torch.float32 if fast else torch.float64


def inverse_factor(A: Tensor) -> Tensor:
    """L⁻¹ (..., m, m) of A = LLᵀ, from the lower triangles of A; NaN if there is no L."""
    L, failed = torch.linalg.cholesky_ex(A)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    inverse_L = torch.linalg.solve_triangular(L, eye.expand_as(A), upper=False)
    return inverse_L.masked_fill_((failed != 0)[..., None, None], torch.nan)


def condition(scale: Tensor, inverse_L: Tensor) -> float:
    """The largest scaleᵢ(A⁻¹)ᵢᵢ, where A was computed from numbers as large as scaleᵢ (..., m)."""
    return float((scale * inverse_L.square().sum(-2)).max())


def leverage(inverse_L: Tensor, tile: Tensor) -> Tensor:
    """cⱼ = Σᵢ Wᵢⱼ² (n,) in float64, W = L⁻¹G, for a tile (m, n) of G."""
    c = torch.zeros(tile.shape[1], dtype=torch.float64, device=tile.device)
    for i in range(0, len(tile), STRIP):
        stop = i + STRIP
        c += (inverse_L[i:stop, :stop] @ tile[:stop]).square_().sum(0)
    return c


def too_small(damp: float, trace: float) -> ValueError:
    """The error for a λ that is too small beside (1/m) GᵀG with this trace."""
    if not np.isfinite(trace):
        return ValueError("The gradients have NaN, Inf or squares that overflow; check the loss")
    enough = (EPS[torch.float64] / RESOLVABLE) ** 0.5 * trace
    return ValueError(
        f"damp = {damp:g} is too small for gradients of mean squared norm {trace:.3g}, even in "
        f"float64; damp = {enough:.0e} is large enough"
    )


# --- blocks of all sizes --------------------------------------------------------------------------


class DenseBlocks:
    """F⁻¹ of k blocks of b ≤ m weights, from the sums GᵀG (k, b, b) of m gradients, in float64.

    The error of the sums' diagonals is eps x scale (k, b); by default their own roundings.
    """

    def __init__(self, sums: Tensor, m: int, eps: float = 2.0**-52, scale: Tensor | None = None):
        self.sums, self.m, self.eps = sums, m, eps
        self.known_diagonals: dict[float, Tensor] = {}  # of F⁻¹, by the damp of the last factor
        self.error = eps * (sums.diagonal(dim1=1, dim2=2) if scale is None else scale) / m

    def damped(self, damp: float, kept: Tensor | None = None) -> Tensor:
        """H (k, b, b), with the rows and columns not kept (k, b) those of I."""
        H = self.sums / self.m
        H.diagonal(dim1=1, dim2=2).add_(damp)
        if kept is not None:
            H *= kept[:, :, None] & kept[:, None, :]
            H.diagonal(dim1=1, dim2=2).add_(~kept)
        return H

    def factor(self, damp: float) -> Tensor | None:
        """L⁻¹ of H = LLᵀ (k, b, b); None if the errors of the sums are too large for that."""
        inverse_L = inverse_factor(self.damped(damp))
        if not condition(self.error, inverse_L) <= RESOLVABLE:
            return None
        self.known_diagonals = {damp: inverse_L.square().sum(1)}
        return inverse_L

    def resolved_factor(self, damp: float) -> Tensor:
        inverse_L = self.factor(damp)
        if inverse_L is None and self.eps > EPS[torch.float64]:
            raise ValueError(
                f"damp = {damp:g} is too small for sums of float32 products, which were enough for "
                "the damp that the blocks were built with; build them anew with this damp"
            )
        if inverse_L is None:
            trace = float(self.sums.diagonal(dim1=1, dim2=2).sum(1).max()) / self.m
            raise too_small(damp, trace)
        return inverse_L

    def diagonal(self, damp: float) -> Tensor:
        if damp not in self.known_diagonals:
            self.resolved_factor(damp)
        return self.known_diagonals[damp]

    def matvec(self, damp: float, x: Tensor) -> Tensor:
        self.diagonal(damp)  # raises ValueError if λ is too small
        L = torch.linalg.cholesky(self.damped(damp))
        return torch.cholesky_solve(x[:, :, None], L)[:, :, 0]

    def adjustment(self, damp: float, dropped: Tensor, w: Tensor) -> Tensor:
        """δ_R = H_RR⁻¹ H_RQ w_Q"""
        self.diagonal(damp)
        L = torch.linalg.cholesky(self.damped(damp, kept=~dropped))
        right = (self.sums / self.m) @ (w * dropped)[:, :, None] * ~dropped[:, :, None]
        return torch.cholesky_solve(right, L)[:, :, 0]

    def for_removal(self, damp: float, in_place: bool) -> "RemovableDenseBlocks":
        inverse_L = self.resolved_factor(damp)
        place = self.sums if in_place else torch.empty_like(self.sums)
        return RemovableDenseBlocks(torch.bmm(inverse_L.mT, inverse_L, out=place))


class RemovableDenseBlocks:
    """V = H⁻¹ (k, b, b) of the remaining weights of k blocks, about 0 for the others."""

    def __init__(self, V: Tensor):
        self.V = V

    def diagonal(self, damp: float) -> Tensor:
        return self.V.diagonal(dim1=1, dim2=2)

    def remove_(self, damp: float, dropped: Tensor, w: Tensor) -> Tensor:
        """(5), and δ = −V_{:Q} V_QQ⁻¹ w_Q, with the rows of Q alone. Blocks that lose fewer weights
        than others have zeros in place of rows."""
        k, b = dropped.shape
        most = int(dropped.sum(1).max())
        Q = dropped.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # (k, most)
        valid = dropped.gather(1, Q)
        index = Q + torch.arange(0, k * b, b, device=Q.device)[:, None]
        rows = self.V.flatten(0, 1).index_select(0, index.flatten()).view(k, most, b)
        rows *= valid[:, :, None]
        V_QQ = rows.gather(2, Q[:, None, :].expand(-1, most, -1)) * valid[:, None, :]
        V_QQ.diagonal(dim1=1, dim2=2).add_(~valid)
        L, failed = torch.linalg.cholesky_ex(V_QQ)
        if bool(failed.any()):
            raise ValueError(f"damp = {damp:g} is too small for rounds; use more, or one round")
        removed = (w.gather(1, Q) * valid)[:, :, None]
        solved = torch.linalg.solve_triangular(L, torch.cat([rows, removed], dim=2), upper=False)
        X, y = solved[:, :, :b], solved[:, :, b:]  # XᵀX = V_{:Q} V_QQ⁻¹ V_{Q:}
        self.V.baddbmm_(X.mT, X, alpha=-1)
        return -(X.mT @ y)[:, :, 0]


class LowRankBlocks:
    """F⁻¹ of k blocks of b > m weights by (1), (2) and (4), from references to their gradients
    G (m, k·b)."""

    def __init__(self, G: Tensor, b: int, device: torch.device):
        self.G, self.b, self.device = G, b, device
        self.kept: Tensor | None = None  # (k, b); None for all

    def factor(self, damp: float, kept: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """G_R (k, m, b) in float64, with zeros beside R, L⁻¹ of A (k, m, m), and its relative
        error."""
        G = self.G.to(self.device, torch.float64).unflatten(1, (-1, self.b)).transpose(0, 1)
        if kept is not None:
            G = G * kept[:, None, :]
        A = G @ G.mT
        diagonal = A.diagonal(dim1=1, dim2=2).add_(len(self.G) * damp)
        inverse_L = inverse_factor(A)
        roundings = EPS[torch.float64] * condition(diagonal, inverse_L)
        if not roundings <= RESOLVABLE:
            raise too_small(damp, self.trace(G))
        return G, inverse_L, roundings

    def trace(self, G: Tensor) -> float:
        """The largest trace of a block of (1/m) GᵀG."""
        return float(G.square().sum((1, 2)).max()) / len(self.G)

    def diagonal(self, damp: float) -> Tensor:
        G, inverse_L, roundings = self.factor(damp, self.kept)
        c = (inverse_L @ G).square_().sum(1)
        if not bool((roundings * c <= RESOLVABLE * (1 - c)).all()):
            raise too_small(damp, self.trace(G))
        return (1 - c) / damp

    def matvec(self, damp: float, x: Tensor) -> Tensor:
        G, inverse_L, roundings = self.factor(damp, self.kept)
        y = inverse_L.mT @ (inverse_L @ (G @ x[:, :, None]))
        left = x - (G.mT @ y)[:, :, 0]
        if not bool((roundings * x.norm(dim=1) <= RESOLVABLE * left.norm(dim=1)).all()):
            raise too_small(damp, self.trace(G))
        return left / damp

    def adjustment(self, damp: float, dropped: Tensor, w: Tensor) -> Tensor:
        kept = ~dropped if self.kept is None else ~dropped & self.kept
        G_R, inverse_L, _ = self.factor(damp, kept)
        G = self.G.to(self.device, torch.float64).unflatten(1, (-1, self.b)).transpose(0, 1)
        b = G @ (w * dropped)[:, :, None]
        return (G_R.mT @ (inverse_L.mT @ (inverse_L @ b)))[:, :, 0]

    def for_removal(self, damp: float, in_place: bool) -> "LowRankBlocks":
        return copy.copy(self)

    def remove_(self, damp: float, dropped: Tensor, w: Tensor) -> Tensor:
        delta = self.adjustment(damp, dropped, w)
        self.kept = ~dropped if self.kept is None else ~dropped & self.kept
        return delta


Parts = list[tuple[slice, int, Any]]  # columns, block size, F⁻¹ of the blocks


def stored_blocks(
    G: Tensor, b: int, damp: float, perbatch: int, device: torch.device
) -> tuple[int, Parts]:
    """d and a list of (columns, block size, F⁻¹) for each batch of blocks, from gradients G (m, d)
    that are stored."""
    d = G.shape[1]
    return d, [
        (columns, size, inverse_blocks(G[:, columns], size, damp, device))
        for columns, size in layout(d, b, perbatch)
    ]


def sum_gradients(
    gradients: Iterable[Tensor | OuterProducts], b: int, perbatch: int, device: torch.device
) -> tuple[int, Parts]:
    """The same from an iterable of gradients (d,) or (n, d). Their memory may be used again for the
    next ones."""
    sums: list[tuple[slice, int, Tensor]] = []
    m = d = 0
    for rows in gradients:
        if not isinstance(rows, OuterProducts):
            rows = as_matrix(rows[None] if getattr(rows, "ndim", 2) == 1 else rows).to(device)
        if m == 0:
            d = rows.shape[1]
            parts = layout(d, b, perbatch)
            sizes = [size * (columns.stop - columns.start) for columns, size in parts]
            # At once, as many small tensors would fragment the memory.
            all_sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device).split(sizes)
            sums = [
                (*part, H.view(-1, part[1], part[1]))
                for part, H in zip(parts, all_sums, strict=True)
            ]
        if rows.shape[1] != d:
            raise ValueError(f"Expected gradients of {d} weights, got {rows.shape[1]}")
        m += rows.shape[0]
        for columns, _, H in sums:
            add_block_sums_(H, rows[:, columns])
    if m == 0:
        raise ValueError("Expected at least one gradient, got none")
    return d, [(columns, b, DenseBlocks(H, m)) for columns, b, H in sums]


def add_block_sums_(sums: Tensor, G: Tensor) -> None:
    """Adds GᵀG, all in float64, to sums (k, b, b) for G (m, k·b) in k blocks of columns."""
    for rows in G.split(BATCH):
        X = rows.double().unflatten(1, sums.shape[:2]).transpose(0, 1)  # (k, n, b)
        sums.baddbmm_(X.mT, X)


def float32_sums(G: Tensor, b: int) -> tuple[Tensor, int, float, Tensor]:
    """The arguments of `DenseBlocks` for G (m, k·b): float64 sums of float32 products."""
    blocks = G.unflatten(1, (-1, b)).permute(1, 2, 0)
    sums = torch.zeros(len(blocks), b, b, dtype=torch.float64, device=G.device)
    partial = torch.empty_like(sums, dtype=torch.float32)
    diagonals = []
    with torch.autocast(G.device.type, enabled=False):
        for X in blocks.split(PARTIAL_ROWS, dim=2):
            X = X.float()
            sums += torch.bmm(X, X.mT, out=partial)
            diagonals.append(partial.diagonal(dim1=1, dim2=2).clone())
    # Errors of partial sums are independent, so they add up as squares. `tiny` stands for products
    # that underflow in float32. Measured: the diagonal of the inverse is off by at most 12 times
    # this size times the condition, and RESOLVABLE leaves room for two.
    scale = torch.stack(diagonals).double().norm(dim=0)
    scale += len(G) * torch.finfo(torch.float32).tiny
    return sums, len(G), 6 * EPS[torch.float32], scale


def inverse_blocks(
    G: Tensor, b: int, damp: float, device: torch.device
) -> DenseBlocks | LowRankBlocks:
    """F⁻¹ of the k blocks of b columns of G (m, k·b), in the cheaper form."""
    m = len(G)
    if b > m:
        return LowRankBlocks(G, b, device)
    if fast_type(G, device) == torch.float32:
        blocks = DenseBlocks(*float32_sums(G, b))
        if blocks.factor(damp) is not None:
            return blocks
    sums = torch.zeros(G.shape[1] // b, b, b, dtype=torch.float64, device=device)
    add_block_sums_(sums, G.to(device))
    return DenseBlocks(sums, m)
