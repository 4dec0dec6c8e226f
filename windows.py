"""Where the gradients of a sliding window are kept, and the products with them.

`DenseWindow` keeps G (m, d), the m gradients of d weights as rows, as it is, and `CompressedWindow`
the largest entries of each row. Both round what enters to their type, compute everything from what
they keep, and have one interface: `write` and `restore`, `row`, `times` (Gx), `transposed_times`
(Gᵀy), `tiles` (G a few columns at a time) and `state`. Nothing here waits for a GPU.

What they cost is said beforehand by `window_bytes` and `step_traffic`.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from checks import check_integer, checked_compress, checked_dtype, is_real
from ranks import local

__all__ = [
    "CompressedWindow",
    "DenseWindow",
    "full_precision",
    "gram",
    "step_traffic",
    "window_bytes",
]

CHUNK = 2**12  # columns, at most, summed in the type of the product; float64 sums the chunks
TILE = 13 * 2**18  # numbers converted at a time: twelve rows of ResNet-20, which cache holds
BLOCK = 2**12  # columns of a compressed window among which the largest entries are found


@contextlib.contextmanager
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


class DenseWindow:
    """G (m, d), or some of its columns, on one device. Gradients are rounded to its type on entry;
    products are computed from the rounded ones, in the type that is asked for.

    Example:
        >>> window = DenseWindow(2, 3, torch.device("cpu"), torch.float32)
        >>> finite, before = window.write(0, torch.tensor([1.0, 2.0, 3.0]))
        >>> window.times(torch.ones(3), rows=2, dtype=torch.float32)
        tensor([6., 0.], dtype=torch.float64)
    """

    def __init__(self, m: int, d: int, device: torch.device, dtype: torch.dtype):
        self.G = torch.zeros(m, d, dtype=dtype, device=device)

    @property
    def dim(self) -> int:
        """d"""
        return self.G.shape[1]

    @property
    def device(self) -> torch.device:
        return self.G.device

    @property
    def state(self) -> Tensor:
        """All there is to save."""
        return self.G

    def write(self, j: int, g: Tensor) -> tuple[Tensor, Tensor]:
        """Makes g (d,), rounded, row j. Returns whether that is finite, and what was there."""
        before = self.G[j].clone()
        self.G[j] = g
        return self.G[j].isfinite().all(), before

    def restore(self, j: int, before: Tensor, where: Tensor) -> None:
        """Takes the last `write`, to row j, back where `where` is true."""
        self.G[j] = before.where(where, self.G[j])

    def row(self, j: int) -> Tensor:
        """Row j (d,)."""
        return self.G[j]

    def times(self, x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """The first rows of G, times x (d,), in float64 (rows,), summed over products of a few
        columns in `dtype`."""
        x = x.to(dtype)
        y = torch.zeros(rows, dtype=torch.float64, device=self.device)
        with full_precision(self.device):
            for columns, tiles in self._converted(rows, dtype):
                y += _product((tile for _, tile in tiles), x[columns])
        return y

    def transposed_times(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Gᵀy (d,), computed in `dtype`, for y of as many numbers as rows count."""
        y = y.to(dtype)
        x = torch.zeros(self.dim, dtype=dtype, device=self.device)
        with full_precision(self.device):
            for columns, tiles in self._converted(len(y), dtype):
                for some, tile in tiles:
                    x[columns].addmv_(tile.T, y[some])
        return x

    def tiles(self) -> Iterator[Tensor]:
        """G in float64, a few columns (m, ·) at a time."""
        for tile in self.G.split(max(1, 2 * TILE // len(self.G)), dim=1):
            yield tile.double()

    def _converted(
        self, rows: int, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Iterable[tuple[slice, Tensor]]]]:
        """The first rows in `dtype`, at once if they have it already, otherwise in small tiles:
        columns, with the tiles that hold them, a few rows each."""
        G = self.G[:rows]
        if G.dtype == dtype or G.numel() == 0:
            yield slice(None), [(slice(None), G.to(dtype))]
            return
        # Long pieces of rows are read fastest, and products take them by fours.
        size = TILE if self.device.type == "cpu" else 8 * TILE  # which launches fewer kernels
        width = math.ceil(self.dim / math.ceil(self.dim / (size // 8)))
        height = size // width // 4 * 4
        buffer = torch.empty(min(G.numel(), height * width), dtype=dtype, device=self.device)

        def tiles(columns: slice) -> Iterator[tuple[slice, Tensor]]:
            for row in range(0, rows, height):
                some = slice(row, row + height)
                tile = G[some, columns]
                yield some, buffer[: tile.numel()].view(tile.shape).copy_(tile)

        for column in range(0, self.dim, width):
            columns = slice(column, column + width)
            yield columns, tiles(columns)


def _product(tiles: Iterable[Tensor], x: Tensor) -> Tensor:
    """Gx in float64 for G in tiles of rows, summed over products of a few columns in its type."""
    chunk = max(1, len(x) // max(16, math.ceil(len(x) / CHUNK)))
    chunk -= chunk % 16 if chunk > 16 else 0
    whole = len(x) - len(x) % chunk
    products, rest = [], []
    for G in tiles:
        # One batch of products x_c (1, chunk) times G_cᵀ (chunk, m) reads G no slower than G @ x
        # does, which would leave all d columns to a single float32 sum.
        chunks = G[:, :whole].unflatten(1, (-1, chunk)).permute(1, 2, 0)
        products.append(torch.bmm(x[:whole].view(-1, 1, chunk), chunks))
        rest.append(G[:, whole:] @ x[whole:])
    return torch.cat(products, 2).sum((0, 1), dtype=torch.float64) + torch.cat(rest)


class CompressedWindow:
    """G (m, d) with the largest entries of each gradient alone: k in each row, of which each block
    of columns has its share.

    What a gradient loses is carried over to the next one (error feedback; EFCP, arXiv 2306.06098):
    of a = g + error, the row gets the entries c that are largest, and the error becomes a − c.

    Products gather and scatter. On CUDA, scattered numbers are added in any order, so that the last
    bits may differ from run to run.

    Example:
        >>> window = CompressedWindow(2, 4, torch.device("cpu"), torch.float32, compress=0.5)
        >>> finite, before = window.write(0, torch.tensor([1.0, -4.0, 3.0, 2.0]))
        >>> window.row(0)
        tensor([ 0., -4.,  3.,  0.])
        >>> window.error
        tensor([1., 0., 0., 2.])
    """

    def __init__(self, m: int, d: int, device: torch.device, dtype: torch.dtype, compress: float):
        self.compress = compress
        self.error = torch.zeros(d, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.columns = _largest(self.error, compress).repeat(m, 1)
        self.values = torch.zeros(self.columns.shape, dtype=dtype, device=device)

    @property
    def dim(self) -> int:
        """d"""
        return len(self.error)

    @property
    def device(self) -> torch.device:
        return self.error.device

    @property
    def state(self) -> dict[str, Tensor]:
        """All there is to save."""
        return {"error": self.error, "columns": self.columns, "values": self.values}

    def write(self, j: int, g: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Makes the largest of g + error row j, and the rest the error. Returns whether all of it
        is finite, and what was there."""
        before = tuple(kept.clone() for kept in self._parts(j))
        self.error += g.to(self.error)
        self.columns[j] = _largest(self.error, self.compress)
        self.values[j] = self.error.index_select(0, self.columns[j])
        self.error.index_add_(0, self.columns[j], self.values[j].to(self.error), alpha=-1)
        return self.error.isfinite().all() & self.values[j].isfinite().all(), before

    def restore(self, j: int, before: tuple[Tensor, ...], where: Tensor) -> None:
        """Takes the last `write`, to row j, back where `where` is true."""
        for kept, old in zip(self._parts(j), before, strict=True):
            kept.copy_(old.where(where, kept))

    def _parts(self, j: int) -> tuple[Tensor, ...]:
        """All that `write` changes."""
        return self.error, self.columns[j], self.values[j]

    def row(self, j: int) -> Tensor:
        """Row j (d,)."""
        values = self.values[j].to(self.error.dtype)
        return torch.zeros_like(self.error).index_add_(0, self.columns[j], values)

    def times(self, x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """The first rows of G, times x (d,): (rows,), sums in float64 of products in `dtype`."""
        x = x.to(dtype)
        y = torch.zeros(rows, dtype=torch.float64, device=self.device)
        for some in self._few(rows):
            columns, values = self.columns[some], self.values[some]
            products = x.index_select(0, columns.flatten()).view(values.shape).mul_(values)
            y[some] = products.sum(1, dtype=torch.float64)
        return y

    def transposed_times(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Gᵀy (d,), computed in `dtype`, for y of as many numbers as rows count."""
        y = y.to(dtype)
        x = torch.zeros(self.dim, dtype=dtype, device=self.device)
        for some in self._few(len(y)):
            products = self.values[some] * y[some, None]
            x.index_add_(0, self.columns[some].flatten(), products.flatten())
        return x

    def tiles(self) -> Iterator[Tensor]:
        """G in float64, a few columns (m, ·) at a time."""
        m, kept = len(self.values), _kept(BLOCK, self.compress)
        blocks = max(1, 2 * TILE // (m * BLOCK))
        for block in range(0, max(1, math.ceil(self.dim / BLOCK)), blocks):
            start, stop = block * BLOCK, min(self.dim, (block + blocks) * BLOCK)
            entries = slice(block * kept, (block + blocks) * kept)
            tile = torch.zeros(m, stop - start, dtype=torch.float64, device=self.device)
            columns = (self.columns[:, entries] - start).long()
            yield tile.scatter_(1, columns, self.values[:, entries].double())

    def _few(self, rows: int) -> Iterator[slice]:
        """The first rows, a few at a time."""
        size = TILE // 20 if self.device.type == "cpu" else TILE // 4  # for cache, or few kernels
        height = max(1, size // max(1, self.values.shape[1]))
        for row in range(0, rows, height):
            yield slice(row, min(row + height, rows))


def _kept(size: int, compress: float) -> int:
    """How many entries of a block of columns are kept."""
    return min(size, max(1, round(compress * size)))


def _largest(a: Tensor, compress: float) -> Tensor:
    """Where the entries of a (d,) are that are largest in absolute value, in each block: (k,)."""
    whole = len(a) - len(a) % BLOCK
    found = [
        blocks.abs().topk(_kept(blocks.shape[1], compress), sorted=False).indices.sort().values
        for blocks in (a[:whole].view(-1, BLOCK), a[whole:].view(1, -1))
    ]
    found[0] += torch.arange(0, whole, BLOCK, device=a.device)[:, None]
    found[1] += whole
    return torch.cat([columns.flatten() for columns in found]).to(_index_type(len(a)))


def _index_type(d: int) -> torch.dtype:
    return torch.int32 if d < 2**31 else torch.int64


def gram(tiles: Iterable[Tensor]) -> Tensor:
    """GGᵀ (m, m), from G a few columns at a time.

    Example:
        >>> gram(torch.tensor([[3.0, 0.0], [0.0, 4.0]]).split(1, dim=1))
        tensor([[ 9.,  0.],
                [ 0., 16.]])
    """
    tiles = iter(tiles)
    tile = next(tiles)
    K = tile @ tile.T
    for tile in tiles:
        K.addmm_(tile, tile.T)
    return K


def check_saved_window(block: Any, m: int, compressed: bool) -> None:
    """Raises ValueError if this is no `state` of a window of m gradients."""
    error: Any = None
    columns: Any = None
    rows, rule = block, f"its window must have {m} rows"
    if compressed:
        parts = block if isinstance(block, dict) else {}
        error, columns, rows = (parts.get(name) for name in ("error", "columns", "values"))
        rule += ", with the column of each entry, from 0 to d - 1"
    fits = is_real(rows) and rows.ndim == 2 and len(rows) == m
    if fits and compressed:
        indices = isinstance(columns, Tensor) and columns.dtype in (torch.int32, torch.int64)
        fits = indices and columns.shape == rows.shape and is_real(error) and error.ndim == 1
    if fits and compressed:
        index = local(columns)
        fits = bool(((0 <= index) & (index < len(local(error)))).all())
    if not fits:
        raise ValueError(f"The state dict is damaged: {rule}")


# --- cost, before it is paid ----------------------------------------------------------------------


def window_bytes(
    ngrads: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    compress: float | None = None,
    world_size: int = 1,
) -> int:
    """Bytes on each of `world_size` devices for a window of `ngrads` gradients of `dim` weights.

    m·d numbers of `dtype`, or, with `compress`, that part of them with 4 bytes each for its column,
    and d for the error; and 16m² for K and P.

    Example:
        >>> window_bytes(1024, 272_474)  # ResNet-20: 1.13 GB
        1132830720
    """
    m, d, dtype, compress, ranks = _checked_sizes(ngrads, dim, dtype, compress, world_size)
    own = -(-d // ranks)
    error = 0 if compress is None else own * torch.promote_types(dtype, torch.float32).itemsize
    return m * _row_bytes(own, dtype, compress) + error + 16 * m**2


def step_traffic(
    ngrads: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    compress: float | None = None,
    world_size: int = 1,
    sharded: bool = False,
) -> tuple[int, int]:
    """Bytes that a step moves on each device: those read of the window, twice its part, or three
    times if it is compressed, and those sent over the network.

    In a ring of devices, m + 1 float64 numbers of each are summed up, twice if compressed, and
    the d float32 numbers of the update are gathered, unless parameters are `sharded` likewise.

    Example:
        >>> step_traffic(1024, 272_474)
        (2232107008, 0)
    """
    m, d, dtype, compress, ranks = _checked_sizes(ngrads, dim, dtype, compress, world_size)
    products = 1 if compress is None else 2  # of the window with a vector, beside its transposed
    read = (products + 1) * m * _row_bytes(-(-d // ranks), dtype, compress)
    passed_on = products * 16 * (m + 1) + (0 if sharded else 4 * d)
    return read, passed_on * (ranks - 1) // ranks


def _checked_sizes(
    ngrads: int, dim: int, dtype: torch.dtype, compress: float | None, world_size: int
) -> tuple[int, int, torch.dtype, float | None, int]:
    m, d = check_integer("ngrads", ngrads, least=0), check_integer("dim", dim, least=0)
    ranks = check_integer("world_size", world_size)
    return m, d, checked_dtype("dtype", dtype), checked_compress(compress), ranks


def _row_bytes(d: int, dtype: torch.dtype, compress: float | None) -> int:
    """Bytes of a gradient of d weights in the window."""
    if compress is None:
        return d * dtype.itemsize
    blocks, rest = divmod(d, BLOCK)
    kept = blocks * _kept(BLOCK, compress) + _kept(rest, compress)
    return kept * (dtype.itemsize + _index_type(d).itemsize)
