"""M-FAC, static algorithm: the inverse empirical Fisher of a fixed set of gradients, and pruning.

With m gradients as the rows of G (m, d) and damping λ, the damped empirical Fisher is

    F = λI + (1/m) GᵀG                                          (d, d), never formed.

Let K = GGᵀ (m, m), A = mλI + K = LLᵀ (Cholesky) and W = L⁻¹G. Then, by Woodbury's identity,

    F⁻¹x = (x − Gᵀ A⁻¹ G x) / λ                                                             (1)
    diag(F⁻¹)ⱼ = (1 − cⱼ) / λ ,  cⱼ = Σᵢ Wᵢⱼ²                                               (2)

Both need only some columns of G at a time: one Gram and one triangular product, O(dm²), and two
reads of G. To remove the weights Q and adjust those that are kept, R, at the least cost ½ δᵀFδ is
ridge regression of G_Q w_Q on G_R, the dual of which is (m, m):

    δ_R = G_Rᵀ (mλI + G_R G_Rᵀ)⁻¹ G_Q w_Q ,   δ_Q = −w_Q                                    (4)

Symbols: m gradients, d weights, b block size, G (m, d), K (m, m) Gram matrix, A = mλI + K, L its
Cholesky factor, W (m, d), H (b, b) a block of F, V = H⁻¹, λ = `damp` (always λ itself).

Differences from the paper's reference code:
1. G is paged by columns and used in matrix-matrix products; any number of pages gives one result.
2. Long sums are in float64, what is left by subtraction is compared with its error, and what cannot
   be resolved is refused, so that no saliency consists of rounding errors.
3. `joint_update` is exact for any number of weights; the paper's is `independent_update`.
4. With blocks of at most m weights, gradients are added up as they come and never stored.
5. Samples differ between recomputations; counts are exact; ties go by position.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information", NeurIPS 2021, arXiv 2107.03356, sections 3.1 (static algorithm) and 4 (pruning).
"""

import mmap
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import islice, pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import prune as torch_prune
from torch.utils.data import SequentialSampler

from checks import IN_FLOATS, check_damp, check_device, check_integer, is_real, kind
from ranks import Ranks, find_process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BlockedInverseFisher",
    "MFACPruner",
    "MagnitudePruner",
    "PagedInverseFisher",
    "inverse_bytes",
]

STRIP = 256  # rows of a triangle that are computed at once
TILE = 2**21  # numbers in a tile of G: small enough to stay in a processor's cache
PARTIAL_SUM = 2**12  # columns, at most, that are summed in float32 before float64 takes over
FILE_ROWS = 64  # rows read from a mapped file at once: each may map 2 MiB, however short it is
PARTIAL_ROWS = 128  # gradients, at most, that blocks sum in float32 before float64 takes over
BATCH = 128  # gradients that are added to blocks at once, as each time goes through all blocks


def inverse_bytes(
    ngrads: int,
    dim: int,
    *,
    blocksize: int | None = None,
    perbatch: int | None = None,
    pages: int = 1,
    device: torch.device | str = "cpu",
) -> dict[torch.device, int]:
    """Bytes that `MFACPruner` takes for `dim` weights alive, in main memory and on `device`.

    The model and a backward pass come on top. The factors are for the most that a recomputation
    and the prunings after it hold at any time: gradients, matrices, vectors, and tiles.

    Example:
        >>> main = torch.device("cpu")
        >>> full = inverse_bytes(1024, 270_896)[main]
        >>> inverse_bytes(1024, 270_896, blocksize=128)[main] < full / 2
        True
    """
    m, d = check_integer("ngrads", ngrads), check_integer("dim", dim)
    pages = check_integer("pages", pages)
    for name, value in (("blocksize", blocksize), ("perbatch", perbatch)):
        if value is not None:
            check_integer(name, value)
    device = check_device(device, present=False)
    main = device if device.type == "cpu" else torch.device("cpu")
    b = min(blocksize or d, d)
    if b <= m:  # the blocks of F, and the parts of a batch of them while it is inverted
        rows, page, blocks = min(BATCH, m), d, 8 * b * d + 32 * b * min((perbatch or 1) * b, d)
    else:  # a factor a block
        rows, page, blocks = m, -(-b // pages), 24 * m**2 * -(-d // b) + 56 * m**2
    rest = 130 * d + 24 * TILE
    needed = {main: 4 * rows * d + rest}
    if device != main:  # pages are in pinned memory, and on the device, while others are copied
        needed = {main: needed[main] + 8 * rows * page, device: 12 * rows * page + rest}
    needed[device] += blocks
    return needed


# --- precision ------------------------------------------------------------------------------------

# Measured: A⁻¹ is off by at most 4 roundings (of the type that K was computed in) times the
# condition, which is the largest Aᵢᵢ(A⁻¹)ᵢᵢ, and cⱼ of (2) by that fraction of itself.
RESOLVABLE = 2.0**-18  # roundings x condition that leave an error of about 1e-5
# What is computed in float32 is refined in float64 once, which squares the error.
LIMIT = {torch.float32: 2.0**-12, torch.float64: RESOLVABLE}
# Blocks are not refined. Measured with `block_grams`' scale: at most 12 roundings x condition.
BLOCK_LIMIT = {torch.float32: RESOLVABLE / 6, torch.float64: RESOLVABLE}


def inverse_factor(A: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """L⁻¹ of A = LLᵀ (..., m, m), of which the lower triangles are read, and roundings x condition
    (...).

    Aᵢᵢ was computed in `dtype` from numbers as large as scaleᵢ (..., m), so that the condition is
    max scaleᵢ(A⁻¹)ᵢᵢ. It is infinite if A is not positive definite, or not finite.
    """
    L, failed = torch.linalg.cholesky_ex(A)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    inverse_L = torch.linalg.solve_triangular(L, eye.expand_as(A), upper=False)
    condition = (scale * inverse_L.square().sum(-2)).amax(-1)
    sound = (failed == 0) & condition.isfinite()
    return inverse_L, torch.where(sound, condition * torch.finfo(dtype).eps, torch.inf)


def too_small(damp: float, trace: float) -> ValueError:
    """The error for a λ that cannot be resolved beside (1/m) GᵀG, the trace of which is given."""
    if not np.isfinite(trace):
        return ValueError("The gradients have NaN, Inf or squares that overflow; check the loss")
    enough = (torch.finfo(torch.float64).eps / RESOLVABLE) ** 0.5 * trace
    return ValueError(
        f"damp = {damp:g} is too small for gradients of mean squared norm {trace:.3g}, even in "
        f"float64; damp = {enough:.0e} is large enough"
    )


# --- products with a tile of G --------------------------------------------------------------------


def add_gram_(K: Tensor, tile: Tensor) -> None:
    """Adds GGᵀ for a tile (m, n) of G to the lower triangle of K (m, m)."""
    for i in range(0, len(tile), STRIP):
        stop = i + STRIP
        K[i:stop, :stop] += tile[i:stop] @ tile[:stop].T


def add_block_grams_(sums: Tensor, G: Tensor) -> None:
    """Adds GᵀG, all in float64, to sums (k, b, b) for G (m, k·b) in k blocks of columns."""
    for rows in G.split(BATCH):
        X = rows.double().unflatten(1, sums.shape[:2]).transpose(0, 1)  # (k, n, b)
        sums.baddbmm_(X.mT, X)


def block_grams(G: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """GᵀG (k, b, b) in float64 from products in float32, for G (m, k·b) in k blocks of columns, and
    numbers (k, b) as large as those whose roundings are its error."""
    blocks = G.unflatten(1, (-1, b)).permute(1, 2, 0)
    sums = torch.zeros(len(blocks), b, b, dtype=torch.float64, device=G.device)
    partial = torch.empty_like(sums, dtype=torch.float32)
    diagonals = []
    with full_precision(G.device):
        for X in blocks.split(PARTIAL_ROWS, dim=2):
            X = X.float()
            sums += torch.bmm(X, X.mT, out=partial)
            diagonals.append(partial.diagonal(dim1=1, dim2=2).clone())
    # Errors of partial sums are independent: one large gradient counts in full, many alike do not.
    # Beside them, `tiny` stands for products that float32 cannot hold.
    scale = torch.stack(diagonals).double().norm(dim=0)
    return sums, scale + len(G) * torch.finfo(torch.float32).tiny


def leverage(inverse_L: Tensor, tile: Tensor) -> Tensor:
    """cⱼ = Σᵢ Wᵢⱼ² (n,) in float64, W = L⁻¹G, for a tile (m, n) of G."""
    c = torch.zeros(tile.shape[1], dtype=torch.float64, device=tile.device)
    for i in range(0, len(tile), STRIP):
        stop = i + STRIP
        c += (inverse_L[i:stop, :stop] @ tile[:stop]).square_().sum(0)
    return c


# --- arguments ------------------------------------------------------------------------------------


def as_matrix(grads: Any) -> tuple[Tensor, mmap.mmap | None]:
    """The gradients (m, d) as a tensor on the same memory, and the file mapping if that is one."""
    if isinstance(grads, (str, PathLike)):
        try:
            grads = np.load(grads, mmap_mode="r")
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise ValueError(f"Cannot read gradients from {grads!s}: {error}") from error
    shared = isinstance(grads, np.memmap) and grads.mode != "c"  # "c": changes are in memory only
    mapping = grads._mmap if shared else None
    if isinstance(grads, np.ndarray) and grads.dtype in (np.float16, np.float32, np.float64):
        with warnings.catch_warnings():  # of arrays that are read-only; nothing here writes
            warnings.simplefilter("ignore", UserWarning)
            grads = torch.from_numpy(grads)
    if not (is_real(grads) and grads.ndim == 2):
        raise ValueError(f"Expected gradients (m, d) {IN_FLOATS}, got {kind(grads)}")
    if 0 in grads.shape:
        raise ValueError(f"Expected at least one gradient of one weight, got {tuple(grads.shape)}")
    return grads.detach(), mapping


def check_vector(name: str, x: Tensor, d: int, device: torch.device) -> Tensor:
    """x (d,) in float64 on the device."""
    if not (is_real(x) and x.shape == (d,)):
        raise ValueError(f"Expected {name} of shape ({d},) {IN_FLOATS}, got {kind(x)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"Expected finite numbers in {name}, got NaN or Inf")
    return x.detach().to(device, torch.float64)


def like(x: Tensor, result: Tensor) -> Tensor:
    """The result in the type of x and where x is."""
    fitted = result.to(x)
    if not bool(fitted.isfinite().all()):
        raise ValueError(
            f"Results of up to {float(result.abs().max()):.3g} do not fit {x.dtype}; use float32 "
            "or float64, or a higher damp"
        )
    return fitted


def check_removal(drop: Any, w: Tensor, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of d weights the indices `drop` name, (d,) bool, and the weights in float64."""
    try:
        index = torch.as_tensor(drop, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # no numbers at all
        index = torch.tensor([-1], device="cpu")
    integral = index.dtype != torch.bool and torch.can_cast(index.dtype, torch.int64)
    fits = index.ndim == 1 and (integral or not len(index))  # [] is of floats
    index = index.long()
    if not (fits and bool(((0 <= index) & (index < d)).all())):
        raise ValueError(
            f"Expected drop to be a list of indices below {d}, got {drop}; of a mask take "
            "mask.nonzero()[:, 0]"
        )
    dropped = torch.zeros(d, dtype=torch.bool, device="cpu").index_fill_(0, index, True)
    return dropped.to(device), check_vector("w", w, d, device)


# --- the inverse Fisher ---------------------------------------------------------------------------


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, TF32 or bfloat16 inside, whatever the process has set: K needs the bits.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu"), full_precision(x.device):
        ...     print((x @ x).dtype)
        torch.float32
    """
    mkldnn: Any = torch.backends.mkldnn  # the annotations of torch lack its matmul
    backends = torch.backends.cuda.matmul, mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class StaticInverseFisher:
    """What both forms share: the updates, of which each knows its own `_joint_update`."""

    shape: tuple[int, int]
    device: torch.device

    def matvec(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def diagonal(self) -> Tensor:
        raise NotImplementedError

    def _joint_update(self, dropped: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def joint_update(self, drop: Any, w: Tensor) -> Tensor:
        """The exact update δ (d,) of the weights w (d,) when those at the indices `drop` are
        removed together: the least ½ δᵀFδ with δ = −w at `drop`."""
        dropped, weights = check_removal(drop, w, self.shape[0], self.device)
        delta = self._joint_update(dropped, weights)
        return like(w, torch.where(dropped, -weights, delta))

    def independent_update(self, drop: Any, w: Tensor) -> Tensor:
        """The paper's update δ (d,) of the weights w (d,) when those at the indices `drop` are
        removed, each as if alone: δ = −F⁻¹ Σᵢ eᵢwᵢ/[F⁻¹]ᵢᵢ, and then δ = −w at `drop`."""
        dropped, weights = check_removal(drop, w, self.shape[0], self.device)
        delta = -self.matvec(torch.where(dropped, weights / self.diagonal(), 0))
        return like(w, torch.where(dropped, -weights, delta))

    def _assemble(self, parts: Iterable[tuple[slice, Tensor]]) -> Tensor:
        """A vector (d,) in float64 from [(columns, values)]. Each is copied before the next is
        made, as small tensors that stay between large ones that go would fragment the memory."""
        x = torch.empty(self.shape[0], dtype=torch.float64, device=self.device)
        for columns, values in parts:
            x[columns] = values
        return x


class PagedInverseFisher(StaticInverseFisher):
    """F⁻¹ for F = λI + (1/m) GᵀG and gradients G (m, d) that stay where they are.

    G is read by pages of columns and never written: twice to build F⁻¹ and its diagonal, whatever
    the number of pages. Matrix products are in float32 if that leaves an error of about 1e-5 in any
    result, else in float64; where that does not do either, damping is called too small. For d ≤ m,
    `BlockedInverseFisher` with one block is faster and resolves more.

    Memory beside G: 16·m² bytes and 8·d for the diagonal; for a moment 80·m² and a few vectors; and
    if G is not on `device` up to three pages there of 4·m·d/pages bytes. Of a `numpy.memmap` or
    file about one page is in memory at a time.

    Args:
        grads: G (m, d) as a tensor or array, or the path of a .npy file. No copy is made.
        damp: λ > 0, in units of squared gradients.
        pages: from 1 to d; it need not divide anything.
        device: where to compute, that of `grads` if None.
        process_group: processes that have some columns of G each and make the same calls at the
            same time; d and all vectors are those of this process. None: this process alone.

    Raises:
        ValueError: for arguments outside these ranges, gradients that are not finite, and where λ
            is too small beside the gradients for float64. So do all methods.

    Example:
        >>> G = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> fisher = PagedInverseFisher(G, damp=0.5, pages=2)
        >>> fisher.diagonal().round(decimals=6)  # F is diag(1, 1, 0.5)
        tensor([1., 1., 2.], dtype=torch.float64)
        >>> fisher.joint_update([0], torch.tensor([3.0, 3.0, 3.0]))
        tensor([-3.,  0.,  0.])
    """

    def __init__(
        self,
        grads: Any,
        damp: float = 1e-5,
        *,
        pages: int = 1,
        device: torch.device | str | None = None,
        process_group: "ProcessGroup | None" = None,
    ):
        self.ranks = Ranks(process_group)
        self.G, self._mapping = as_matrix(grads)
        d = self.G.shape[1]
        self.shape, self.damp = (d, d), check_damp(damp)
        self.pages = check_integer("pages", pages, largest=d)
        self.device = check_device(device or self.G.device)
        to_cuda = self.device.type == "cuda" and self.G.device.type == "cpu"
        self._copying = torch.cuda.Stream(self.device) if to_cuda else None
        self._diagonal: Tensor | None = None
        self._factorise(torch.promote_types(self.G.dtype, torch.float32))
        if self._roundings > LIMIT[self.dtype]:
            self._to_float64()

    def matvec(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,) for x (d,), by (1), in float64: it cancels where x resembles the gradients."""
        x64 = check_vector("x", x, self.shape[0], self.device)
        y = self._solve(self._inverse_L, self._times(x64), kept=torch.ones_like(x64))
        left = x64 - self._transposed_times(y)
        # The refinement squares the error of y, but not beyond what float64 allows.
        finest = self._roundings * torch.finfo(torch.float64).eps / torch.finfo(self.dtype).eps
        error = max((4 * self._roundings) ** 2, finest)
        if not error * self.ranks.norm(x64) <= RESOLVABLE * self.ranks.norm(left):
            self._to_float64()
            return self.matvec(x)
        return like(x, left / self.damp)

    def diagonal(self) -> Tensor:
        """diag(F⁻¹) (d,) in float64, each entry in (0, 1/λ], by (2)."""
        if self._diagonal is None:
            c = self._leverages()
            if not self.ranks.all(self._roundings * c <= RESOLVABLE * (1 - c)):
                self._to_float64()
                return self.diagonal()
            self._diagonal = (1 - c) / self.damp
        return self._diagonal.clone()

    def _joint_update(self, dropped: Tensor, weights: Tensor) -> Tensor:
        """δ_R of (4), R = those not dropped."""
        b = self._times(torch.where(dropped, weights, 0))
        z = self._solve(self._kept_factor(dropped), b, kept=~dropped)
        return self._transposed_times(z)

    # --- the (m, m) side

    def _factorise(self, dtype: torch.dtype) -> None:
        """Sets A, L⁻¹ and how far they are off, from products in `dtype`."""
        self.dtype, self._A = dtype, self._gram(dtype)
        self._A.diagonal().add_(self._shift)
        self._inverse_L, roundings = inverse_factor(self._A, self._A.diagonal(), dtype)
        self._roundings = float(roundings)

    def _to_float64(self) -> None:
        """The way out when float32 does not resolve something, or the error if nothing does."""
        if self.dtype == torch.float64:
            raise self._too_small()
        self._factorise(torch.float64)
        if self._roundings > LIMIT[torch.float64]:
            raise self._too_small()

    def _kept_factor(self, dropped: Tensor) -> Tensor:
        """L⁻¹ of mλI + G_R G_Rᵀ, R = those not dropped, from the smaller Gram if that will do."""
        drop, keep = dropped.nonzero()[:, 0], (~dropped).nonzero()[:, 0]
        scale = self._A.diagonal()
        more = self.ranks.sum(torch.tensor(len(drop) - len(keep), device=self.device))
        if more < 0:
            A = self._A - self._gram(self.dtype, drop)
        else:
            A = self._gram(self.dtype, keep)
            A.diagonal().add_(self._shift)
        inverse_L, roundings = inverse_factor(A, scale, self.dtype)
        if roundings > LIMIT[self.dtype]:
            A = self._gram(torch.float64, keep)
            A.diagonal().add_(self._shift)
            inverse_L, roundings = inverse_factor(A, A.diagonal(), torch.float64)
            if roundings > LIMIT[torch.float64]:
                raise self._too_small()
        return inverse_L

    def _solve(self, inverse_L: Tensor, b: Tensor, kept: Tensor) -> Tensor:
        """y (m,) of (mλI + G_R G_Rᵀ) y = b, R = `kept`, with a step of refinement by G itself."""
        y = inverse_L.T @ (inverse_L @ b)
        residual = b - self._shift * y - self._times(kept * self._transposed_times(y))
        return y + inverse_L.T @ (inverse_L @ residual)

    @property
    def _shift(self) -> float:
        """mλ"""
        return len(self.G) * self.damp

    @property
    def _width(self) -> int:
        """Columns of a tile."""
        return max(1, min(PARTIAL_SUM, TILE // len(self.G)))

    def _too_small(self) -> ValueError:
        return too_small(self.damp, float(self._A.diagonal().mean()) - self._shift)

    # --- passes over G

    def _gram(self, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
        """The lower triangle of GGᵀ (m, m) in float64, from all columns or those of `index`."""
        m = len(self.G)
        K = torch.zeros(m, m, dtype=torch.float64, device=self.device)
        with full_precision(self.device):
            for _, tile in self._tiles(dtype, index):
                add_gram_(K, tile)
        return self.ranks.sum(K)

    def _leverages(self) -> Tensor:
        """c (d,) in float64."""
        inverse_L = self._inverse_L.to(self.dtype)
        with full_precision(self.device):
            tiles = self._tiles(self.dtype)
            return self._assemble((columns, leverage(inverse_L, tile)) for columns, tile in tiles)

    def _times(self, x: Tensor) -> Tensor:
        """Gx (m,) in float64."""
        products = (tile @ x[columns] for columns, tile in self._tiles(torch.float64))
        return self.ranks.sum(reduce(torch.add, products))

    def _transposed_times(self, y: Tensor) -> Tensor:
        """Gᵀy (d,) in float64."""
        tiles = self._tiles(torch.float64)
        return self._assemble((columns, y @ tile) for columns, tile in tiles)

    def _tiles(
        self, dtype: torch.dtype, index: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """(positions, columns) for all columns of G in their order, or those of `index`."""
        buffer = torch.empty(len(self.G), self._width, dtype=dtype, device=self.device)
        for start, page in self._pages(index):
            for i in range(0, page.shape[1], self._width):
                tile = page[:, i : i + self._width]
                if tile.dtype != dtype:  # in the same memory, as new tiles would fragment it
                    tile = buffer[:, : tile.shape[1]].copy_(tile)
                yield slice(start + i, start + i + tile.shape[1]), tile

    def _pages(self, index: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """(position of its first column, page on the device) for each page.

        To a CUDA device a page travels through pinned memory, on a stream of its own. As kernels
        are asynchronous, this goes on while the device still works on the page before.
        """
        n, pages = self.G.shape[1] if index is None else len(index), self.pages
        to_cuda = self._copying is not None
        copied = to_cuda or self._mapping is not None
        if index is not None and not copied:
            pages = max(pages, -(-n // self._width))  # what is gathered is a copy as well
        for i in range(pages):
            start, stop = n * i // pages, n * (i + 1) // pages
            columns = slice(start, stop) if index is None else index[start:stop].to(self.G.device)
            if copied:
                shape, dtype = (len(self.G), stop - start), self.G.dtype
                page = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=to_cuda)
                self._fill(page, columns)
            else:
                page = self.G[:, columns].to(self.device)
            if self._copying is not None:
                with torch.cuda.stream(self._copying):
                    page = page.to(self.device, non_blocking=True)
                working = torch.cuda.current_stream(self.device)
                working.wait_stream(self._copying)
                page.record_stream(working)
            yield start, page

    def _fill(self, page: Tensor, columns: slice | Tensor) -> None:
        """Copies columns of G; what a file mapping has read for it does not stay resident."""
        for i in range(0, len(page), FILE_ROWS):
            page[i : i + FILE_ROWS] = self.G[i : i + FILE_ROWS, columns]
            if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
                self._mapping.madvise(mmap.MADV_DONTNEED)


class DenseBlocks:
    """V = H⁻¹ (k, b, b) in float64 for k blocks H of F, made in place of the sums GᵀG.

    Sums from float32 come with their `scale`. Which of their blocks are not resolved is in `lost`;
    of float64 there must be none. `hard`: float32 would not do for most.
    """

    def __init__(self, sums: Tensor, num_grads: int, damp: float, scale: Tensor | None = None):
        H = sums.div_(num_grads)
        diagonal = H.diagonal(dim1=1, dim2=2)
        trace = float(diagonal.sum(1).max())
        diagonal.add_(damp)
        dtype = torch.float64 if scale is None else torch.float32
        scale = diagonal if scale is None else scale / num_grads
        inverse_L, roundings = inverse_factor(H, scale, dtype)
        self.lost = (roundings > BLOCK_LIMIT[dtype]).nonzero()[:, 0].tolist()
        in_float32 = roundings * (torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
        self.hard = bool((in_float32 > BLOCK_LIMIT[torch.float32]).double().mean() > 0.5)
        if dtype == torch.float64 and self.lost:
            raise too_small(damp, trace)
        self.V = torch.matmul(inverse_L.mT, inverse_L, out=H)

    def matvec(self, x: Tensor) -> Tensor:
        return (self.V @ x.view(*self.V.shape[:2], 1)).flatten()

    def diagonal(self) -> Tensor:
        return self.V.diagonal(dim1=1, dim2=2).flatten()

    def joint_update(self, drop: Tensor, w: Tensor) -> Tensor:
        """δ = −V_{:Q} V_QQ⁻¹ w_Q in each block; rows and columns not in Q become those of I."""
        Q = torch.zeros_like(w).index_fill_(0, drop, 1).view(self.V.shape[:2])
        V_QQ = self.V * Q[:, :, None] * Q[:, None, :] + torch.diag_embed(1 - Q)
        removed = (Q * w.view_as(Q))[:, :, None]
        return -(self.V @ torch.cholesky_solve(removed, torch.linalg.cholesky(V_QQ))).flatten()


class BlockedInverseFisher(StaticInverseFisher):
    """F⁻¹ for F = λI + (1/m) GᵀG, of which only blocks of b x b on the diagonal are kept.

    A block of at most m weights is formed and inverted, O(b²m + b³), to 8·d·b bytes on `device` in
    all. G in memory is multiplied in float32 where that leaves an error of less than 1e-5 in the
    diagonal, else in float64. Gradients that are iterated over, and those of a mapped file, are
    added up in float64 as they come and never kept: beside sums and the gradients that came last
    this takes 1 MB or two. What was read of a file may stay in memory until the system wants it.

    A larger block is a PagedInverseFisher of its own, O(m²b + m³).

    Args:
        grads: G (m, d) as a tensor or array, or the path of a .npy file; or anything else that can
            be iterated over and yields gradients (d,) or, faster, many at a time (n, d). It may
            use its memory again for the next ones. In this case blocks are always formed.
        blocksize: b ≥ 1. The last block is smaller where b does not divide d.
        damp: λ > 0, in units of squared gradients.
        perbatch: blocks worked on at once; by default as make up 512 KiB, 4 MiB of G in memory.
        device: where to compute, that of `grads` if None (the CPU if that is no tensor).

    Raises:
        ValueError: for arguments outside these ranges, gradients that are not finite, and where λ
            is too small beside the gradients for float64. So do all methods.

    Example:
        >>> G = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> fisher = BlockedInverseFisher(G, blocksize=2, damp=0.5)
        >>> fisher.matvec(torch.ones(3))  # F is diag(1, 1, 0.5)
        tensor([1., 1., 2.])
    """

    def __init__(
        self,
        grads: Any,
        blocksize: int,
        damp: float = 1e-5,
        *,
        perbatch: int | None = None,
        device: torch.device | str | None = None,
    ):
        b = self.blocksize = check_integer("blocksize", blocksize)
        self.damp, self._exactly = check_damp(damp), False
        stored, mapping = isinstance(grads, (Tensor, np.ndarray, str, PathLike)), None
        if stored or not isinstance(grads, Iterable):
            grads, mapping = as_matrix(grads)
        self.device = check_device(device or getattr(grads, "device", "cpu"))
        in_memory = stored and mapping is None
        perbatch = max(1, 2 ** (19 if in_memory else 16) // b**2) if perbatch is None else perbatch
        self.perbatch = check_integer("perbatch", perbatch)
        if stored and (b > len(grads) or in_memory):
            self.shape = (grads.shape[1], grads.shape[1])
            layout = self._layout(1 if b > len(grads) else self.perbatch)
            self._parts: list[tuple[slice, Any]] = [
                (columns, self._part(grads[:, columns])) for columns in layout
            ]
        else:
            sums, m = self._sum(grads.split(BATCH) if stored else grads)
            self._parts = [(columns, DenseBlocks(H, m, damp)) for columns, H in sums]

    def matvec(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,) for x (d,)."""
        x64 = check_vector("x", x, self.shape[0], self.device)
        parts = ((columns, part.matvec(x64[columns])) for columns, part in self._parts)
        return like(x, self._assemble(parts))

    def diagonal(self) -> Tensor:
        """diag(F⁻¹) (d,) in float64, each entry in (0, 1/λ]."""
        return self._assemble((columns, part.diagonal()) for columns, part in self._parts)

    def _joint_update(self, dropped: Tensor, weights: Tensor) -> Tensor:
        return self._assemble(
            (columns, part.joint_update(dropped[columns].nonzero()[:, 0], weights[columns]))
            for columns, part in self._parts
        )

    def _part(self, G: Tensor) -> PagedInverseFisher | DenseBlocks:
        """F⁻¹ of the blocks of which these are the columns (m, ·)."""
        m, width = G.shape
        b = min(self.blocksize, width)
        if b > m:
            return PagedInverseFisher(G, self.damp, device=self.device)
        G = G.to(self.device)
        if G.dtype == torch.float64 or self._exactly:
            blocks = self._exact(G, b)
        else:
            sums, scale = block_grams(G, b)
            blocks = DenseBlocks(sums, m, self.damp, scale)
        self._exactly = blocks.hard  # the next ones are likely to be alike
        if blocks.lost:
            again = G.unflatten(1, (-1, b))[:, blocks.lost].flatten(1)
            blocks.V[blocks.lost] = self._exact(again, b).V
        return blocks

    def _exact(self, G: Tensor, b: int) -> DenseBlocks:
        """The same from sums in float64."""
        sums = torch.zeros(G.shape[1] // b, b, b, dtype=torch.float64, device=self.device)
        add_block_grams_(sums, G)
        return DenseBlocks(sums, len(G), self.damp)

    def _layout(self, perbatch: int) -> list[slice]:
        """The columns of each batch of blocks; a smaller last block is a batch of its own."""
        d, b = self.shape[0], self.blocksize
        starts = sorted({*range(0, d - d % b, perbatch * b), d - d % b, d})
        return [slice(*ends) for ends in pairwise(starts)]

    def _sum(self, gradients: Iterable[Tensor]) -> tuple[list[tuple[slice, Tensor]], int]:
        """[(columns, GᵀG for each of their k blocks (k, b, b) in float64)], and m."""
        sums, m = [], 0
        for rows in gradients:
            rows, _ = as_matrix(rows[None] if getattr(rows, "ndim", 2) == 1 else rows)
            n, d = rows.shape
            if m == 0:
                self.shape = (d, d)
                for columns in self._layout(self.perbatch):
                    width = columns.stop - columns.start
                    b = min(self.blocksize, width)
                    H = torch.zeros(width // b, b, b, dtype=torch.float64, device=self.device)
                    sums.append((columns, H))
            if d != self.shape[0]:
                raise ValueError(f"Expected gradients of {self.shape[0]} weights, got {d}")
            m, rows = m + n, rows.to(self.device)
            for columns, H in sums:
                add_block_grams_(H, rows[:, columns])
        if m == 0:
            raise ValueError("Expected at least one gradient, got none")
        return sums, m


class SharedInverseFisher:
    """F⁻¹ of which each rank has `part`, that of its chunk of the columns; of d weights in all."""

    def __init__(self, part: StaticInverseFisher, ranks: Ranks, d: int):
        self.part, self.ranks, self.d = part, ranks, d

    def diagonal(self) -> Tensor:
        return self._whole(self.part.diagonal())

    def joint_update(self, drop: Tensor, w: Tensor) -> Tensor:
        return self._whole(self.part.joint_update(*self._own(drop, w)))

    def independent_update(self, drop: Tensor, w: Tensor) -> Tensor:
        return self._whole(self.part.independent_update(*self._own(drop, w)))

    def _own(self, drop: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Which of this rank's weights go, and those weights, with zeros beyond the last one."""
        chunk = self.part.shape[0]
        start = self.ranks.rank * chunk
        own = pad(w, (0, self.ranks.size * chunk - self.d))[start : start + chunk]
        return drop[(start <= drop) & (drop < start + chunk)] - start, own

    def _whole(self, x: Tensor) -> Tensor:
        return self.ranks.gather(x.to(self.part.device)).flatten()[: self.d].to(x.device)


# --- which weights go -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """Of every `group` weights along the input at least `kept` stay; they go `block` at a time."""

    block: int = 1
    kept: int = 0
    group: int = 1

    @staticmethod
    def parse(pattern: str) -> "Pattern":
        """From "unstructured", "N:M" (at most N nonzeros of M) or "Bx1" (all B zero or none)."""
        name = str(pattern)
        sizes = [int(n) for n in re.findall(r"\d+", name)]
        if name == "unstructured":
            return Pattern()
        if re.fullmatch(r"\d+:\d+", name) and 0 < sizes[0] < sizes[1]:
            return Pattern(kept=sizes[0], group=sizes[1])
        if re.fullmatch(r"\d+x1", name) and sizes[0] > 1:
            return Pattern(block=sizes[0], group=sizes[0])
        raise ValueError(
            f"Invalid pattern: {pattern!r}; it must be 'unstructured', 'N:M' with 0 < N < M such "
            "as '2:4', or 'Bx1' such as '4x1'"
        )

    def fits(self, weight: Tensor) -> bool:
        """Whether the groups divide the input of the weight (out, in, ...)."""
        return self.group == 1 or (weight.ndim > 1 and weight.shape[1] % self.group == 0)

    def split(self, weight: Tensor) -> Tensor:
        """(out, in, ...) to (groups, blocks of a group, block), neighbours along the input."""
        rows = weight if self.group == 1 else weight.movedim(1, -1)
        return rows.reshape(-1, self.group // self.block, self.block)

    def join(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `split`, with one entry for each block."""
        rows = blocks[:, :, None].expand(-1, -1, self.block)
        if self.group == 1:
            return rows.reshape(shape)
        return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def choose(self, saliencies: list[Tensor], alive: list[Tensor], count: int) -> list[Tensor]:
        """Masks (True stays) once `count` of the weights alive are gone, or one block less.

        The lowest saliency, summed over a block, goes first; of equal ones the first.
        """
        scores, sizes = [], []
        for saliency, mask in zip(saliencies, alive, strict=True):
            size = self.split(mask).sum(2)
            score = self.split(saliency * mask).sum(2).where(size > 0, -1)
            rank = score.argsort(dim=1, stable=True).argsort(dim=1)
            scores.append(score.where(rank < (self.group - self.kept) // self.block, torch.inf))
            sizes.append(size)
        order = torch.cat([score.flatten() for score in scores]).argsort(stable=True)
        taken = torch.cat([size.flatten() for size in sizes])[order].cumsum(0) <= count
        stays = torch.ones_like(taken).index_put_((order,), ~taken)
        parts = stays.split([score.numel() for score in scores])
        return [
            mask & self.join(part.view_as(score), mask.shape)
            for part, score, mask in zip(parts, scores, alive, strict=True)
        ]


# --- pruners --------------------------------------------------------------------------------------


# What is pruned by default: of these layers, and of those that derive from them, these weights.
LAYERS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention
WEIGHTS = "weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"


class MagnitudePruner:
    """Zeroes the smallest weights of a model and keeps them zero.

    Which weights are pruned is in `masks`, by parameter name, True for those that stay. Weights
    that are exactly zero at construction count as pruned, and what is pruned stays so.

    Args:
        model: any module. It is pruned in place.
        params: names of the parameters to prune, as in `model.named_parameters()`; by default the
            weights of Conv1d, Conv2d, Conv3d and Linear layers and the projections of
            MultiheadAttention, as far as they fit the pattern.
        scope: "global", weights of all layers compete, or "layer", each has a sparsity of its own.
        pattern: "unstructured"; "N:M" such as "2:4", at most N of every M weights along the input
            stay; "Bx1" such as "4x1", every B weights along the input go or stay together.

    Raises:
        ValueError: for arguments outside these ranges. So do all methods.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0]))
        >>> MagnitudePruner(model).prune(0.5)
        {'weight': tensor([[False, False,  True,  True]])}
        >>> model.weight.data
        tensor([[ 0.,  0.,  3., -4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[str] | None = None,
        *,
        scope: str = "global",
        pattern: str = "unstructured",
    ):
        if scope not in ("global", "layer"):
            raise ValueError(f"Invalid scope: {scope!r}; it must be 'global' or 'layer'")
        if not isinstance(model, nn.Module):
            raise ValueError(f"Invalid model: {kind(model)}; it must be a torch.nn.Module")
        if torch_prune.is_pruned(model):
            raise ValueError(
                "The model carries masks of torch.nn.utils.prune; make them permanent with its "
                "remove function first"
            )
        self.model, self.scope, self.pattern = model, scope, Pattern.parse(pattern)
        self.params = self._select(params)
        self.masks = {name: p.detach() != 0 for name, p in self.params.items()}
        self._shown: list[tuple[nn.Module, str]] = []  # by `register`, with the parameter's name
        self.seconds = {"gradients": 0.0, "inverse": 0.0}  # spent so far
        for name, mask in self.masks.items():
            if bool((self.pattern.split(mask).sum((1, 2)) < self.pattern.kept).any()):
                raise ValueError(f"{name} already has more zeros than pattern {pattern!r} allows")

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all prunable weights."""
        return self._zeros(self.masks) / sum(mask.numel() for mask in self.masks.values())

    @torch.no_grad()
    def prune(self, target: float | Iterable[float]) -> dict[str, Tensor]:
        """Prunes to the sparsity `target` in [0, 1] and returns the masks.

        Exactly round(target·n) of n weights are pruned then, of all or of each layer by `scope`; in
        blocks as many as fit in. With scope "layer", `target` may be a list in the order of
        `masks`. A target below the present sparsity is refused.
        """
        wanted = self._count(target)
        if all(zeros == self._zeros(names) for names, zeros in wanted):
            self.apply_masks()
            return self.masks
        start, saliency = self._prepare()
        if not all(bool(values.isfinite().all()) for values in saliency.values()):
            raise ValueError("The weights or their saliencies have NaN or Inf; nothing was pruned")
        masks: dict[str, Tensor] = {}
        for names, zeros in wanted:
            # On the CPU, so that any device leads to the same choice.
            alive = [start[name].cpu() for name in names]
            more = zeros - sum(int((~mask).sum()) for mask in alive)
            chosen = self.pattern.choose([saliency[name] for name in names], alive, more)
            masks.update(zip(names, chosen, strict=True))
        self._adjust(masks)
        self._replace(masks)
        return self.masks

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets pruned weights to zero again."""
        for name, p in self.params.items():
            p.masked_fill_(~self.masks[name].to(p.device), 0)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Has the masks applied after each step of any optimizer; the handle's remove() ends it."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"Expected an optimizer of torch.optim, got {kind(optimizer)}")
        return optimizer.register_step_post_hook(lambda *_: self.apply_masks())

    def register(self) -> None:
        """Shows the masks to other tools as those of torch.nn.utils.prune, until `remove`."""
        self.remove()
        for name, p in self.params.items():
            for module in self.model.modules():
                for attribute, other in list(module.named_parameters(recurse=False)):
                    if other is p:  # which several modules have if they are tied
                        torch_prune.custom_from_mask(module, attribute, self.masks[name])
                        self._shown.append((module, attribute))

    def remove(self) -> None:
        """Makes it a plain model again, with the same weights, after `register`."""
        while self._shown:
            torch_prune.remove(*self._shown.pop())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own state."""
        return {"masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state; load the model's own state before."""
        self._check_fit(state)
        self._replace(state["masks"])

    # --- what MFACPruner does differently

    def _prepare(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The masks that pruning starts from, and saliencies."""
        self.apply_masks()
        return self.masks, {name: p.cpu().double().square() for name, p in self.params.items()}

    def _adjust(self, masks: dict[str, Tensor]) -> None:
        pass

    # --- internals

    def _select(self, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
        """The parameters to prune."""
        known = dict(self.model.named_parameters())
        if names is None:
            modules = [m for m in self.model.modules() if isinstance(m, LAYERS)]
            weights = {id(getattr(m, name, None)) for m in modules for name in WEIGHTS}
            names = [n for n, p in known.items() if id(p) in weights and self.pattern.fits(p)]
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ValueError(f"Invalid params: {names!r}; it must be a list of names")
        for name in names:
            if name not in known:
                raise ValueError(f"The model has no parameter {name!r}; it has {list(known)}")
            if not self.pattern.fits(known[name]):
                shape, group = tuple(known[name].shape), self.pattern.group
                raise ValueError(f"Groups of {group} do not divide the input of {name}, {shape}")
        if not names:
            group, advice = self.pattern.group, "name them in params"
            if group > 1:
                advice = f"no layer's input is divisible by {group}, choose another pattern"
            raise ValueError(f"There are no weights to prune; {advice}")
        return {name: known[name] for name in names}

    def _count(self, target: float | Iterable[float]) -> list[tuple[list[str], int]]:
        """[(names, number of zeros wanted among them)]"""
        names = list(self.params)
        groups = [names] if self.scope == "global" else [[name] for name in names]
        try:
            given: list[Any] = [target] * len(groups)
            if isinstance(target, Iterable):
                given = list(target)
            if isinstance(target, (set, frozenset)) or any(isinstance(t, bool) for t in given):
                raise TypeError  # of no order, or a mask of one entry perhaps
            targets = [float(each) for each in given]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Invalid sparsity: {target!r}; it must be a number, or one for each of {names}"
            ) from error
        if len(targets) != len(groups):
            raise ValueError(f"Expected {len(groups)} target sparsities, got {len(targets)}")
        wanted, highest = [], 1 - self.pattern.kept / self.pattern.group
        for group, sparsity in zip(groups, targets, strict=True):
            if not 0.0 <= sparsity <= highest:
                raise ValueError(f"Invalid sparsity: {sparsity}; it must be from 0 to {highest:g}")
            n, present = sum(self.masks[name].numel() for name in group), self._zeros(group)
            zeros = round(sparsity * n)
            if zeros < present:
                raise ValueError(
                    f"Target sparsity {sparsity:g} ({zeros} of {n} weights) is below the present "
                    f"{present / n:g} ({present}); pruned weights do not come back"
                )
            wanted.append((group, zeros))
        return wanted

    def _check_fit(self, state: Any) -> None:
        """Raises ValueError if this is no state of such a pruner for the same parameters."""
        names, maker = list(self.state_dict()), type(self).__name__
        if not (isinstance(state, Mapping) and state.keys() == set(names)):
            found = list(state) if isinstance(state, Mapping) else kind(state)
            raise ValueError(f"Expected {names} as in state_dict() of {maker}, got {found}")
        shapes = {name: p.shape for name, p in self.params.items()}
        for what in ("masks", *(part for part in ("base", "base_masks") if state.get(part))):
            saved = state[what] if isinstance(state[what], Mapping) else {}
            if {name: getattr(value, "shape", None) for name, value in saved.items()} != shapes:
                raise ValueError(f"The saved {what} belong to other parameters than this pruner's")

    def _replace(self, masks: dict[str, Tensor]) -> None:
        """Makes these the masks in force."""
        self.masks = {n: masks[n].to(p.device, torch.bool) for n, p in self.params.items()}
        self.apply_masks()
        if self._shown:
            self.register()

    def _zeros(self, names: Iterable[str]) -> int:
        """How many weights of these parameters are pruned."""
        return sum(self.masks[name].numel() - int(self.masks[name].sum()) for name in names)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross entropy of a batch (inputs, targets)."""
    tensors = isinstance(batch, (list, tuple)) and all(isinstance(t, Tensor) for t in batch)
    if not (tensors and len(batch) == 2):
        raise ValueError(f"Expected batches of (inputs, targets), got {kind(batch)}; give a loss")
    device = next(model.parameters()).device
    inputs, targets = (part.to(device) for part in batch)
    return nn.functional.cross_entropy(model(inputs), targets)


class MFACPruner(MagnitudePruner):
    """Prunes by saliency ρᵢ = wᵢ² / 2[F⁻¹]ᵢᵢ and adjusts the weights that stay.

    F⁻¹ is of the weights alive, at the last recomputation: done before the first pruning, by
    `recompute`, and whenever the parameters in `masks`, others are not watched, have changed since
    the pruner last wrote them. Until the next one, every level is pruned from the weights of that
    recomputation, not from the level before. Memory: see `inverse_bytes`; F⁻¹ is kept between
    levels, until `release`.

    Args:
        model, params, scope, pattern: as for `MagnitudePruner`.
        loader: yields batches of equal size, each of which makes one gradient, and is iterated over
            anew for each recomputation. A list of batches is shuffled. Anything else is expected
            to draw other samples each time: by `set_epoch`, its own or of a sampler that it has,
            which is called with the number of the recomputation, or by the random numbers of
            torch, from its global generator or a `generator` of theirs: these are seeded in the
            meantime, those of numpy and Python are not. Of a list, batches smaller than the largest
            are left out; of anything else those smaller than the first, and a larger one is
            refused.
        loss: the mean loss of a batch, loss(model, batch), by default the cross entropy of
            (inputs, targets).
        ngrads: m, the number of gradients.
        damp: λ > 0.
        blocksize: of a block-diagonal F; None for the full one.
        perbatch, pages: see `BlockedInverseFisher` and `PagedInverseFisher`.
        update: of the weights that stay: "joint", "independent" or "none".
        seed: of the samples, together with the number of the recomputation.
        device: for the inverse Fisher; that of the first parameter if None.
        process_group: processes that prune the same model with the same loader: each computes its
            share of the gradients and of F⁻¹. By default the default group, if there is one;
            False: this process alone.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> loader = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(16)]
        >>> pruner = MFACPruner(model, loader, ngrads=16)  # a gradient a batch
        >>> masks = pruner.prune(0.5)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'weight': 4}
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        params: Sequence[str] | None = None,
        *,
        scope: str = "global",
        pattern: str = "unstructured",
        loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
        ngrads: int = 1024,
        damp: float = 1e-5,
        blocksize: int | None = None,
        perbatch: int | None = None,
        pages: int = 1,
        update: str = "joint",
        seed: int = 0,
        device: torch.device | str | None = None,
        process_group: "ProcessGroup | bool | None" = None,
    ):
        super().__init__(model, params, scope=scope, pattern=pattern)
        self._ranks = Ranks(find_process_group(list(self.params.values()), process_group))
        if update not in ("joint", "independent", "none"):
            raise ValueError(
                f"Invalid update: {update!r}; it must be 'joint', 'independent' or 'none'"
            )
        batch_sampler = getattr(loader, "batch_sampler", None)
        sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", None)
        if isinstance(sampler, SequentialSampler):
            raise ValueError("The loader yields the same samples each time; it must shuffle")
        if not callable(loss):
            raise ValueError(f"Invalid loss: {loss!r}; it must be a function of (model, batch)")
        if isinstance(loader, str) or not isinstance(loader, Iterable):
            raise ValueError(f"Invalid loader: {loader!r}; it must yield batches, as a list does")
        self.loader, self.loss, self.update = loader, loss, update
        self._sources: tuple[Any, ...] = (
            loader,
            batch_sampler,
            sampler,
        )  # of the choice of samples
        self.seed = check_integer("seed", seed, least=0)
        self.ngrads, self.damp = check_integer("ngrads", ngrads), check_damp(damp)
        self.blocksize = None if blocksize is None else check_integer("blocksize", blocksize)
        self.perbatch = None if perbatch is None else check_integer("perbatch", perbatch)
        self.pages = check_integer("pages", pages)
        if blocksize is None and perbatch is not None:
            raise ValueError(f"perbatch = {perbatch} goes with a blocksize only: leave it out")
        if blocksize is not None and self.pages > 1:
            raise ValueError(f"pages = {pages} goes without a blocksize only: leave one out")
        self.device = check_device(device or next(iter(self.params.values())).device)
        self.recomputations = 0
        self.release()

    @torch.no_grad()
    def recompute(self) -> None:
        """Collects gradients at the present weights, other samples each time, and inverts F."""
        self.apply_masks()
        base = self._weights()
        self._invert(base, self.masks, self.recomputations)
        self.recomputations += 1
        self._base, self._base_masks, self._written = base, self.masks, base

    def release(self) -> None:
        """Forgets F⁻¹ and frees its memory, as before fine-tuning; the next pruning recomputes."""
        self._base = {}  # weights at the last recomputation
        self._base_masks = {}  # and masks: a weight alive may happen to be 0
        self._written = {}  # weights as the pruner left them
        self._index: dict[str, Tensor] = {}  # of the weights alive in each parameter, flattened
        self._inverse: StaticInverseFisher | SharedInverseFisher | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own state, saved at the same time. F⁻¹ is
        computed again from it, at the weights of the last recomputation if they still count."""
        state = {**super().state_dict(), "recomputations": self.recomputations}
        counts = self._unchanged()
        state["base"] = dict(self._base) if counts else {}
        state["base_masks"] = dict(self._base_masks) if counts else {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state; load the model's own state before."""
        self._check_fit(state)
        recomputations = check_integer("recomputations", state["recomputations"], least=0)
        super().load_state_dict(state)
        self.recomputations = recomputations
        self._base, self._base_masks = state["base"], state["base_masks"]
        self._written, self._inverse = self._weights(), None

    def _prepare(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masks and saliencies ρ (0 where a weight is pruned) at the last recomputation."""
        if not self._unchanged():
            self.recompute()
        elif self._inverse is None:  # resumed
            self._invert(self._base, self._base_masks, self.recomputations - 1)
        assert self._inverse is not None
        rho = self._alive(self._base).double().square() / (2 * self._inverse.diagonal().cpu())
        return self._base_masks, self._full(rho)

    def _adjust(self, masks: dict[str, Tensor]) -> None:
        """Updates the weights that stay."""
        w, stays = self._alive(self._base).double(), self._alive(masks)
        drop = (~stays).nonzero()[:, 0]
        assert self._inverse is not None  # _prepare has been here
        if self.update == "joint":
            w = w + self._inverse.joint_update(drop, w)
        elif self.update == "independent":
            w = w + self._inverse.independent_update(drop, w)
        for name, full in self._full(w * stays).items():
            self.params[name].copy_(full)
        self._written = self._weights()

    def _unchanged(self) -> bool:
        """Whether F⁻¹ still counts: the weights are as the pruner left them."""
        return bool(self._base) and all(
            torch.equal(p, self._written[name].to(p.device)) for name, p in self.params.items()
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def _alive(self, tensors: dict[str, Tensor]) -> Tensor:
        """The entries of the weights alive, in one vector on the CPU."""
        return torch.cat([tensors[n].detach().cpu().flatten()[i] for n, i in self._index.items()])

    def _full(self, values: Tensor) -> dict[str, Tensor]:
        """Such a vector in the shapes of the parameters, with 0 for the weights not alive."""
        parts = values.split([len(index) for index in self._index.values()])
        return {
            name: values.new_zeros(p.numel()).index_put_((index,), part).view(p.shape)
            for (name, p), index, part in zip(
                self.params.items(), self._index.values(), parts, strict=True
            )
        }

    def _invert(self, base: dict[str, Tensor], masks: dict[str, Tensor], number: int) -> None:
        """Collects the gradients of recomputation `number` at the weights `base`, and inverts F
        for those alive by `masks`."""
        self._inverse = None  # not two sets of gradients at once
        self._index = {name: mask.cpu().flatten().nonzero()[:, 0] for name, mask in masks.items()}
        d = sum(map(len, self._index.values()))
        if d == 0:
            raise ValueError("All weights are pruned; there is no Fisher matrix to invert")
        b, ranks = min(self.blocksize or d, d), self._ranks
        # As one block F⁻¹ can't be shared, however few the weights are.
        whole = b == d and (d > self.ngrads or ranks.size > 1)
        chunk = ranks.chunk(d) if whole else b * ranks.chunk(-(-d // b))  # of columns for a rank
        began, before = time.perf_counter(), self.seconds["gradients"]
        wide = any(p.dtype == torch.float64 for p in self.params.values())
        share = ranks.chunk(self.ngrads)
        at_once = whole or b > self.ngrads
        rows = share if at_once else min(BATCH, share)
        dtype = torch.float64 if wide else torch.float32
        buffer = torch.empty(rows, d, dtype=dtype, device="cpu")
        with self._as_found():
            for name, p in self.params.items():
                p.copy_(base[name])
            grads: Any = self._gradients(number, buffer, chunk)
            if at_once:
                (grads,) = grads
            with ranks.agreed():
                options: dict[str, Any] = {"damp": self.damp, "device": self.device}
                inverse: StaticInverseFisher
                if whole:
                    options |= {"pages": min(self.pages, chunk), "process_group": ranks.group}
                    inverse = PagedInverseFisher(grads, **options)
                else:
                    inverse = BlockedInverseFisher(grads, b, perbatch=self.perbatch, **options)
                inverse.diagonal()
        self._inverse = inverse if ranks.size == 1 else SharedInverseFisher(inverse, ranks, d)
        collecting = self.seconds["gradients"] - before
        self.seconds["inverse"] += time.perf_counter() - began - collecting

    def _gradients(self, number: int, buffer: Tensor, chunk: int) -> Iterator[Tensor]:
        """`ngrads` gradients (·, d) of the d weights alive, as many at a time as `buffer` holds in
        each rank; of each this rank's `chunk` of the weights."""
        count, row, began, ranks = 0, 0, time.perf_counter(), self._ranks
        params = list(self.params.values())
        for batch in islice(self._batches(number), self.ngrads):
            if count % ranks.size == ranks.rank:
                buffer[row] = self._gradient(batch, params)
                row += 1
            count += 1
            left = (count - 1) % (ranks.size * len(buffer)) + 1  # since the last exchange
            if left == ranks.size * len(buffer) or count == self.ngrads:
                counts = [-(-(left - r) // ranks.size) for r in range(ranks.size)]
                rows, row = ranks.exchange(buffer[:row], counts, chunk), 0
                self.seconds["gradients"] += time.perf_counter() - began
                yield rows
                began = time.perf_counter()
        if count < self.ngrads:
            raise ValueError(
                f"Wanted {self.ngrads} gradients, but the loader had only {count} full batches; "
                "ask for fewer gradients or smaller batches, or give more data"
            )

    def _gradient(self, batch: Any, params: Sequence[Tensor]) -> Tensor:
        """The gradient (d,) of the loss of a batch."""
        torch.clear_autocast_cache()  # casts of other weights, or without a graph
        with torch.enable_grad():
            loss = self.loss(self.model, batch)
            if not (is_real(loss) and loss.numel() == 1 and loss.requires_grad):
                raise ValueError(
                    "Expected loss(model, batch) to return a tensor of one number, with a "
                    f"graph, got {kind(loss)}; return the mean over the batch, not its item()"
                )
            grads = torch.autograd.grad(loss, params, materialize_grads=True)
        dense = [grad.to_dense() for grad in grads]  # those of an Embedding may be sparse
        return self._alive(dict(zip(self.params, dense, strict=True)))

    def _batches(self, number: int) -> Iterator[Any]:
        """The full batches of the loader for recomputation `number`."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        for generator in (torch.default_generator, *self._generators()):
            generator.manual_seed(seed)
        for source in self._sources:
            if hasattr(source, "set_epoch"):
                source.set_epoch(number)
        batches, full = self.loader, 0
        if isinstance(batches, Sequence):  # shuffled, the smaller last batch may come first
            full = max(map(batch_size, batches), default=0)
            order = torch.randperm(len(batches), device="cpu")
            batches = map(batches.__getitem__, order.tolist())
        for batch in batches:
            size = batch_size(batch)
            full = full or size
            if size > full:
                raise ValueError(f"A batch of {size} came after one of {full}; make them equal")
            if size == full:
                yield batch

    def _generators(self) -> list[torch.Generator]:
        """The random number generators that the loader has of its own."""
        found = (getattr(source, "generator", None) for source in self._sources)
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    @contextmanager
    def _as_found(self) -> Iterator[None]:
        """The model is in eval mode in here. Mode, weights, buffers and random numbers are as
        before afterwards."""
        shown = bool(self._shown)
        self.remove()  # weights that a level before has pruned may be alive in here
        modes = {module: module.training for module in self.model.modules()}
        values = [(t, t.clone()) for t in (*self.params.values(), *self.model.buffers())]
        frozen = [p for p in self.params.values() if not p.requires_grad]
        devices = {p.device for p in self.model.parameters() if p.is_cuda}
        states = [(generator, generator.get_state()) for generator in self._generators()]
        try:
            with torch.random.fork_rng(devices):
                self.model.eval()
                for p in frozen:
                    p.requires_grad_(True)
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            for p in frozen:
                p.requires_grad_(False)
            for generator, state in states:
                generator.set_state(state)
            for tensor, value in values:
                tensor.copy_(value)
            if shown:
                self.register()


def batch_size(batch: Any) -> int:
    """The length of the first tensor or list of strings in a batch, which may consist of nested
    lists, tuples and dicts; else 0."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 0
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, (list, tuple)):
        return 0
    if batch and all(isinstance(part, str) for part in batch):
        return len(batch)
    return next(filter(None, map(batch_size, batch)), 0)
