"""Stores the gradients of a sliding window, and multiplies with them.

`DenseWindow` stores G (m, d), the m gradients of d weights as rows. `CompressedWindow` stores the
largest entries of each row. Both round a gradient to their type as it enters, and compute
everything from the rounded numbers. A `Window` consists of such blocks of columns, each on its
device.

On CUDA, kernels multiply exactly, add in float64, read the window once and wait for nothing
(module `kernels`). Elsewhere, torch operations multiply in float32 and add short sums in float64,
or do everything in float64.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import cuda_kernels

__all__ = ["BLOCK", "CompressedWindow", "DenseWindow", "Window", "gram", "kept"]

BLOCK = 2**12  # columns that share a scale, or that compete for the largest entries
CHUNK = 2**12  # columns, at most, of a sum in float32; the sum over chunks is in float64
TILE = 13 * 2**18  # numbers converted at a time: twelve rows of ResNet-20, which fit in the cache
ALIGN = 128  # bytes: rows start at multiples of it, so that kernels can read 16 bytes at a time
ALL = slice(None)
SCALED = {torch.float16: 15, torch.float8_e4m3fn: 8}  # types with scales, their largest exponent


class Entry(NamedTuple):
    """A gradient g as a block stores it."""

    vectors: Tensor  # ĝ (1, d), the stored numbers; if compressed, ĝ and g − ĝ (2, d) in float64
    row: dict[str, Tensor]  # the tensors to store, by the names of `state`


class Block:
    """Columns of a window on one device. `DenseWindow` documents what a subclass has besides."""

    state: dict[str, Tensor]  # all there is to save
    times: Callable[..., Tensor]
    transposed_times: Callable[..., Tensor]

    def __init__(self, m: int, dim: int, device: torch.device):
        self.m, self.dim, self.device = m, dim, device

    def products(self, entry: Entry, count: Tensor, exact: bool) -> Tensor:
        """GXᵀ (n, m) in float64 for the n vectors X of an entry, for G with ĝ as row
        j = count mod m. In the window, row j is still the old one."""
        n, X = int(count), entry.vectors.double()
        Y = torch.stack([self.times(x, exact, min(n + 1, self.m)) for x in entry.vectors])
        Y[:, n % self.m].copy_(X @ X[0])
        return Y

    def write(self, entry: Entry, count: Tensor, accepted: Tensor) -> None:
        """If accepted, makes the entry row j = count mod m. A vector in `state` has one row."""
        for name, rows in self.state.items():
            rows = torch.atleast_2d(rows)
            if rows.dtype == torch.float8_e4m3fn:  # torch does not index this type
                rows = rows.view(torch.uint8)
            j, row = count.view(1) % len(rows), entry.row[name].view(rows.dtype)[None]
            rows.index_copy_(0, j, row.where(accepted != 0, rows.index_select(0, j)))

    def replace_and_transposed_times(
        self, entry: Entry, count: Tensor, accepted: Tensor, y: Tensor, damp: Tensor, exact: bool
    ) -> Tensor:
        """`write`, then Gᵀy (d,). A compressed window adds (g − ĝ)/λ. Kernels do all of it in one
        sweep; without them, a gradient that is not accepted does not come here."""
        self.write(entry, count, accepted)
        u = self.transposed_times(y[: int(count) + 1], exact)
        return u if len(entry.vectors) == 1 else u.add_(entry.vectors[1] / damp)


class DenseWindow(Block):
    """G (m, d) on one device, in float64, float32, bfloat16, float16 or float8_e4m3fn.

    The range of the last two is small. Each of their rows has a scale, a power of two, for every
    4,096 columns. A number of G is the stored number times its scale.
    """

    def __init__(self, m: int, d: int, device: torch.device, dtype: torch.dtype):
        super().__init__(m, d, device)
        padded = -(-d * dtype.itemsize // ALIGN) * ALIGN // dtype.itemsize
        self.G = torch.zeros(m, padded, dtype=dtype, device=device)[:, :d]
        self.state = {"G": self.G}
        self.scales: Tensor | None = None
        if dtype in SCALED:
            self.scales = torch.ones(m, -(-d // BLOCK), dtype=torch.float32, device=device)
            self.state["scales"] = self.scales

    def entry(self, g: Tensor) -> Entry:
        """g (d,) as it will be stored."""
        if self.scales is None:
            row = g.to(self.G.dtype)
            return Entry(row.to(torch.promote_types(row.dtype, torch.float32))[None], {"G": row})
        if kernels := cuda_kernels(self.device):
            row, scales, values = kernels.hinv_round(g.float(), self.G)
            return Entry(values[None], {"G": row, "scales": scales})
        blocks = pad(g.float(), (0, -self.dim % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        exponent = largest.frexp().exponent - SCALED[self.G.dtype]
        ones = 1 + 0 * largest  # NaN where g is not finite, since 8 bits have no Inf
        scales = torch.ldexp(ones, exponent.clamp(-120, 120).float())
        rounded = (blocks / scales[:, None]).to(self.G.dtype)
        values = (rounded.float() * scales[:, None]).flatten()[: self.dim]
        return Entry(values[None], {"G": rounded.flatten()[: self.dim], "scales": scales})

    def products(self, entry: Entry, count: Tensor, exact: bool) -> Tensor:
        if kernels := cuda_kernels(self.device):
            return kernels.hinv_times(self.G, entry.vectors[0], count, self.scales)[None]
        return super().products(entry, count, exact)

    def replace_and_transposed_times(
        self, entry: Entry, count: Tensor, accepted: Tensor, y: Tensor, damp: Tensor, exact: bool
    ) -> Tensor:
        if kernels := cuda_kernels(self.device):
            new = entry.row["G"], entry.row.get("scales"), count, accepted
            return kernels.hinv_transposed_times(self.G, y, self.scales, *new)
        return super().replace_and_transposed_times(entry, count, accepted, y, damp, exact)

    def times(self, x: Tensor, exact: bool = True, rows: int | None = None) -> Tensor:
        """Gx (m,) in float64 for x (d,); 0 beyond the first `rows`, if given."""
        x, y = x.to(_type(exact)), torch.zeros(self.m, dtype=torch.float64, device=self.device)
        for some, columns, tile in self._converted(rows or self.m, x.dtype):
            y[some] += _short_sums(tile, x[columns])
        return y

    def transposed_times(self, y: Tensor, exact: bool = True) -> Tensor:
        """Gᵀy (d,) for y (n,), from the first n rows, in float64, or in float32 if not `exact`."""
        # A tiny yᵢ would underflow in float32, and may belong to a large row.
        dtype = _type(exact or not torch.equal(y, y.hardshrink(2**-100)))
        x, y = torch.zeros(self.dim, dtype=dtype, device=self.device), y.to(dtype)
        for some, columns, tile in self._converted(len(y), dtype):
            x[columns].addmv_(tile.T, y[some])
        return x

    def tiles(self, rows: slice = ALL) -> Iterator[Tensor]:
        """These rows of G in float64, a few columns at a time."""
        width = -(-2 * TILE // len(self.G[rows]) // BLOCK) * BLOCK
        for start in range(0, max(1, self.dim), width):
            yield self._tile(rows, slice(start, min(start + width, self.dim)), torch.float64)

    def _converted(self, rows: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
        """The first rows in `dtype`: all at once if they are of this type, otherwise in tiles that
        fit in the cache."""
        if self.G.dtype == dtype or self.dim == 0:
            yield slice(0, rows), slice(0, self.dim), self.G[:rows].to(dtype)
            return
        # Long pieces of rows are read fastest, and products take four rows at a time.
        size = TILE if self.device.type == "cpu" else 8 * TILE  # to launch fewer kernels
        width = min(self.dim, -(-size // 8 // BLOCK) * BLOCK)
        height = min(rows, max(4, size // width // 4 * 4))
        buffer = torch.empty(height * width, dtype=dtype, device=self.device)
        for start in range(0, self.dim, width):
            columns = slice(start, min(start + width, self.dim))
            for row in range(0, rows, height):
                some = slice(row, min(row + height, rows))
                yield some, columns, self._tile(some, columns, dtype, buffer)

    def _tile(
        self, rows: slice, columns: slice, dtype: torch.dtype, buffer: Tensor | None = None
    ) -> Tensor:
        """A part of G in `dtype`. Its columns must start at a multiple of BLOCK."""
        G = self.G[rows, columns]
        if G.dtype == dtype:
            return G
        tile = torch.empty_like(G, dtype=dtype) if buffer is None else buffer[: G.numel()]
        tile = tile.view(G.shape).copy_(G)
        if self.scales is not None:
            scales = self.scales[rows, columns.start // BLOCK : -(-columns.stop // BLOCK)].to(dtype)
            n = G.shape[1] // BLOCK
            tile[:, : n * BLOCK].unflatten(1, (-1, BLOCK)).mul_(scales[:, :n, None])
            tile[:, n * BLOCK :] *= scales[:, n:]
        return tile


class CompressedWindow(Block):
    """G (m, d) with only the largest entries of each gradient, the same number in each block of
    columns, in float64, float32 or bfloat16.

    The entries that a gradient loses are added to the next one (error feedback; EFCP, arXiv
    2306.06098). The largest entries of a = g + error become the row ĝ, and the error becomes a − ĝ.
    """

    def __init__(self, m: int, d: int, device: torch.device, dtype: torch.dtype, compress: float):
        if d >= 2**31:
            raise ValueError(
                f"A compressed window of {d:,} weights in one process; the limit is 2,147,483,647: "
                "share it among processes, or use window_dtype=torch.float8_e4m3fn"
            )
        super().__init__(m, d, device)
        self.compress = compress
        self.error = torch.zeros(d, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.columns = _largest(self.error, compress).int().repeat(m, 1)
        self.values = torch.zeros(self.columns.shape, dtype=dtype, device=device)
        self.state = {"error": self.error, "columns": self.columns, "values": self.values}

    def entry(self, g: Tensor) -> Entry:
        g = g.to(self.error.dtype)
        if kernels := cuda_kernels(self.device):
            most = kept(min(self.dim, BLOCK), self.compress)
            columns, row, error, X = kernels.hinv_largest(self.error, g, self.values, most)
            return Entry(X, {"error": error, "columns": columns, "values": row})
        a = self.error + g
        columns = _largest(a, self.compress)
        row = a.index_select(0, columns).to(self.values.dtype)
        largest = torch.zeros_like(a).index_copy_(0, columns, row.to(a.dtype))
        parts = {"error": a - largest, "columns": columns.int(), "values": row}
        largest = largest.double()  # g − ĝ may be far larger than g
        return Entry(torch.stack([largest, g.double() - largest]), parts)

    def products(self, entry: Entry, count: Tensor, exact: bool) -> Tensor:
        if kernels := cuda_kernels(self.device):
            new = count, entry.row["columns"], entry.row["values"]
            return kernels.hinv_sparse_times(self.columns, self.values, entry.vectors, *new)
        return super().products(entry, count, exact)

    def replace_and_transposed_times(
        self, entry: Entry, count: Tensor, accepted: Tensor, y: Tensor, damp: Tensor, exact: bool
    ) -> Tensor:
        if kernels := cuda_kernels(self.device):
            new = *(entry.row[name] for name in ("columns", "values", "error")), entry.vectors[1]
            window = self.columns, self.values, y, self.error
            return kernels.hinv_sparse_replace(*window, *new, damp, count, accepted)
        return super().replace_and_transposed_times(entry, count, accepted, y, damp, exact)

    def times(self, x: Tensor, exact: bool = True, rows: int | None = None) -> Tensor:
        x, y = x.double(), torch.zeros(self.m, dtype=torch.float64, device=self.device)
        for some in self._few(rows or self.m):
            columns, values = self.columns[some], self.values[some]
            y[some] = x.index_select(0, columns.flatten()).view(values.shape).mul_(values).sum(1)
        return y

    def transposed_times(self, y: Tensor, exact: bool = True) -> Tensor:
        x = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for some in self._few(len(y)):
            products = self.values[some] * y[some, None]
            x.index_add_(0, self.columns[some].flatten(), products.flatten())
        return x

    def tiles(self, rows: slice = ALL) -> Iterator[Tensor]:
        m, count = len(self.values[rows]), kept(BLOCK, self.compress)
        blocks = max(1, 2 * TILE // (m * BLOCK))
        for block in range(0, max(1, -(-self.dim // BLOCK)), blocks):
            start, stop = block * BLOCK, min(self.dim, (block + blocks) * BLOCK)
            entries = slice(block * count, (block + blocks) * count)
            tile = torch.zeros(m, stop - start, dtype=torch.float64, device=self.device)
            columns = (self.columns[rows, entries] - start).long()
            yield tile.scatter_(1, columns, self.values[rows, entries].double())

    def _few(self, rows: int) -> Iterator[slice]:
        """The first rows, a few at a time."""
        # On a CPU they fit in the cache. Elsewhere fewer kernels are launched.
        size = TILE // 20 if self.device.type == "cpu" else TILE // 4
        height = max(1, size // max(1, self.values.shape[1]))
        for row in range(0, rows, height):
            yield slice(row, min(row + height, rows))


class Window:
    """Blocks of columns side by side: the window of d weights, over one device or several.

    Methods are those of `Block`, of all blocks. An entry is a list with that of each block.

    Args:
        m: gradients.
        dims: columns of each block.
        devices: device of each block.
        device: device of all vectors that come in and go out.
        dtype, compress: of all blocks. They are dense if `compress` is None.
    """

    def __init__(
        self,
        m: int,
        dims: Sequence[int],
        devices: Sequence[torch.device],
        device: torch.device,
        dtype: torch.dtype,
        compress: float | None = None,
    ):
        self.m, self.device, self.dtype, self.compress = m, device, dtype, compress
        self.blocks: list[Any] = []
        for dim, place in zip(dims, devices, strict=True):
            self.append(dim, place)

    def append(self, dim: int, device: torch.device) -> None:
        """Appends `dim` columns of zeros. The others stay where they are."""
        if self.compress is None:
            self.blocks.append(DenseWindow(self.m, dim, device, self.dtype))
        else:
            block = CompressedWindow(self.m, dim, device, self.dtype, self.compress)
            self.blocks.append(block)

    @property
    def separable(self) -> bool:
        """Whether columns can be saved separately, with their parameters. They cannot if blocks of
        them share scales or compete for the largest entries."""
        return self.compress is None and self.dtype not in SCALED

    @property
    def dims(self) -> list[int]:
        return [block.dim for block in self.blocks]

    def entry(self, g: Tensor) -> list[Entry]:
        return [block.entry(part) for block, part in self._split(g)]

    def products(self, new: list[Entry], count: Tensor, exact: bool) -> Tensor:
        pairs = zip(self.blocks, new, strict=True)
        return self._sum([b.products(entry, count.to(b.device), exact) for b, entry in pairs])

    def write(self, new: list[Entry], count: Tensor, accepted: Tensor) -> None:
        for block, entry in zip(self.blocks, new, strict=True):
            block.write(entry, count.to(block.device), accepted.to(block.device))

    def replace_and_transposed_times(
        self,
        new: list[Entry],
        count: Tensor,
        accepted: Tensor,
        y: Tensor,
        damp: Tensor,
        exact: bool,
    ) -> Tensor:
        parts = []
        for block, entry in zip(self.blocks, new, strict=True):
            there = (x.to(block.device) for x in (count, accepted, y, damp))
            parts.append(block.replace_and_transposed_times(entry, *there, exact))
        return self._joined(parts)

    def times(self, x: Tensor) -> Tensor:
        return self._sum([block.times(part) for block, part in self._split(x)])

    def transposed_times(self, y: Tensor) -> Tensor:
        return self._joined([block.transposed_times(y.to(block.device)) for block in self.blocks])

    def tiles(self, rows: slice = ALL) -> Iterator[Tensor]:
        """These rows of G in float64, a few columns at a time, on `device`."""
        return (tile.to(self.device) for block in self.blocks for tile in block.tiles(rows))

    def columns(self, start: int, stop: int) -> list[Tensor]:
        """Columns start to stop of a dense window, as views, one for each block that has some."""
        views = []
        for block in self.blocks:
            if max(start, 0) < min(stop, block.dim):
                views.append(block.G[:, max(start, 0) : stop])
            start, stop = start - block.dim, stop - block.dim
        return views or [self.blocks[0].G[:, :0]]

    def _split(self, x: Tensor) -> Iterator[tuple[Any, Tensor]]:
        parts = zip(self.blocks, x.split(self.dims), strict=True)
        return ((block, part.to(block.device)) for block, part in parts)

    # The work has started on all devices before the first result is read.

    def _joined(self, parts: list[Tensor]) -> Tensor:
        parts = [part.to(self.device) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        return reduce(torch.add, (part.to(self.device) for part in parts))


def gram(tiles: Iterable[Tensor]) -> Tensor:
    """GGᵀ (m, m), from G a few columns at a time."""
    tiles = iter(tiles)
    tile = next(tiles)
    K = tile @ tile.T
    for tile in tiles:
        K.addmm_(tile, tile.T)
    return K


def kept(size: int, compress: float) -> int:
    """The number of entries that a compressed window stores of `size` columns."""
    return min(size, max(1, round(compress * size)))


def _type(exact: bool) -> torch.dtype:
    """The type of products: float32 if it suffices and the process has not allowed less precision,
    as with TF32. Changing that setting here would also change it for other threads."""
    mkldnn: Any = torch.backends.mkldnn  # torch's annotations lack `matmul`
    full = mkldnn.matmul.fp32_precision in ("ieee", "none")
    return torch.float32 if full and not exact else torch.float64


def _short_sums(G: Tensor, x: Tensor) -> Tensor:
    """Gx in float64, as a sum over products of a few columns each in the type of G."""
    if G.dtype == torch.float64:
        return G @ x
    # Pieces of rows below 16 kB are read more slowly, but with few weights that hardly counts, and
    # more sums are more precise.
    m, d = G.shape
    chunk = CHUNK if d >= 64 * CHUNK else max(16, d // 256 // 16 * 16)
    whole = d - d % chunk
    # A batch of products x_c (1, chunk) times G_cᵀ (chunk, m) reads G as fast as G @ x, which
    # would sum all d columns in float32. Autocast leaves alone what has an `out`.
    products, rest = G.new_empty(whole // chunk, 1, m), G.new_empty(m)
    chunks = G[:, :whole].unflatten(1, (-1, chunk)).permute(1, 2, 0)
    torch.bmm(x[:whole].view(-1, 1, chunk), chunks, out=products)
    torch.mv(G[:, whole:], x[whole:], out=rest)
    return products.sum((0, 1), dtype=torch.float64) + rest


def _largest(a: Tensor, compress: float) -> Tensor:
    """The columns (k,) of the entries of a (d,) with the largest absolute values in each block."""
    whole = len(a) - len(a) % BLOCK
    found = [
        blocks.abs().topk(kept(blocks.shape[1], compress), sorted=False).indices.sort().values
        for blocks in (a[:whole].view(-1, BLOCK), a[whole:].view(1, -1))
    ]
    found[0] += torch.arange(0, whole, BLOCK, device=a.device)[:, None]
    found[1] += whole
    return torch.cat([columns.flatten() for columns in found])
