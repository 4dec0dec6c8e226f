"""Stores the gradients of a sliding window, and multiplies with them.

`DenseWindow` stores G (m, d), the m gradients of d weights as rows. `CompressedWindow` stores the
largest entries of each row. Both round a gradient to their type as it enters, and compute
everything from the rounded numbers. A `Window` consists of such blocks of columns, each on its
device.

On CUDA, kernels multiply exactly, add in float64, read the window once and wait for nothing
(module `kernels`). Elsewhere, torch operations multiply in float32 and add short sums in float64,
or do everything in float64.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import cuda_kernels

__all__ = ["BLOCK", "CompressedWindow", "DenseWindow", "Window", "gram"]

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


class DenseWindow:
    """Columns of a window on one device: G (m, d) in float64, float32, bfloat16, float16 or
    float8_e4m3fn.

    The range of the last two is small. Each of their rows has a scale, a power of two, for every
    4,096 columns. A number of G is the stored number times its scale.
    """

    def __init__(self, m: int, d: int, device: torch.device, dtype: torch.dtype):
        self.m, self.dim, self.device = m, d, device
        padded = -(-d * dtype.itemsize // ALIGN) * ALIGN // dtype.itemsize
        self.G = torch.zeros(m, padded, dtype=dtype, device=device)[:, :d]
        self.state = {"G": self.G}  # all there is to save
        self.scales: Tensor | None = None
        if dtype in SCALED:
            self.scales = torch.ones(m, -(-d // BLOCK), dtype=torch.float32, device=device)
            self.state["scales"] = self.scales

    def entry(self, g: Tensor) -> Entry:
        """g (d,) as it will be stored."""
        dtype = self.G.dtype
        if self.scales is None:
            row = g.to(dtype)
            return Entry(row.to(torch.promote_types(dtype, torch.float32))[None], {"G": row})
        if kernels := cuda_kernels(self.device):
            row, scales, values = kernels.hinv_round(g.float(), self.G)
            return Entry(values[None], {"G": row, "scales": scales})
        blocks = pad(g.float(), (0, -self.dim % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1, keepdim=True)
        exponent = (largest.frexp().exponent - SCALED[dtype]).clamp(-120, 120)
        # NaN where g is not finite, since 8 bits have no Inf
        scales = torch.ldexp(1 + 0 * largest, exponent.float())
        rounded = (blocks / scales).to(dtype)
        row, values = (x.flatten()[: self.dim] for x in (rounded, rounded.float() * scales))
        return Entry(values[None], {"G": row, "scales": scales[:, 0]})

    def products(self, entry: Entry, count: Tensor, exact: bool) -> Tensor:
        """XGᵀ (·, m) in float64 for the `vectors` X of an entry, for G with ĝ as row
        j = count mod m. In the window, row j is still the old one."""
        if cuda_kernels(self.device):
            return self.products_by_kernel(entry, count)
        n, X = int(count), entry.vectors.double()
        Y = torch.stack([self.times(x, exact, min(n + 1, self.m)) for x in entry.vectors])
        Y[:, n % self.m] = X @ X[0]
        return Y

    def write(self, entry: Entry, count: Tensor, accepted: Tensor) -> None:
        """If accepted, makes the entry row j = count mod m. A vector in `state` has one row."""
        for name, rows in self.state.items():
            rows = rows if rows.ndim == 2 else rows[None]
            if rows.dtype == torch.float8_e4m3fn:  # torch does not index this type
                rows = rows.view(torch.uint8)
            j, row = count.view(1) % len(rows), entry.row[name].view(rows.dtype)[None]
            rows.index_copy_(0, j, row.where(accepted != 0, rows.index_select(0, j)))

    def replace_and_transposed_times(
        self, entry: Entry, count: Tensor, accepted: Tensor, y: Tensor, damp: Tensor, exact: bool
    ) -> Tensor:
        """`write`, then Gᵀy (d,). A compressed window adds (g − ĝ)/λ. Kernels do all of it in one
        sweep. Without them, this is not called for a gradient that is not accepted."""
        if cuda_kernels(self.device):
            return self.replace_by_kernel(entry, y, damp, count, accepted)
        self.write(entry, count, accepted)
        u = self.transposed_times(y[: int(count) + 1], exact)
        return u if len(entry.vectors) == 1 else u.add_(entry.vectors[1] / damp)

    def products_by_kernel(self, new: Entry, count: Tensor) -> Tensor:
        kernel = cuda_kernels(self.device).hinv_times
        return kernel(self.G, new.vectors[0], count, self.scales)[None]

    def replace_by_kernel(self, new: Entry, y: Tensor, damp: Tensor, *when: Tensor) -> Tensor:
        kernel, row = cuda_kernels(self.device).hinv_transposed_times, new.row
        return kernel(self.G, y, self.scales, row["G"], row.get("scales"), *when)

    def times(self, x: Tensor, exact: bool = True, n: int | None = None) -> Tensor:
        """Gx (m,) in float64 for x (d,); if n is given, 0 beyond the first n rows."""
        x, y = x.to(_type(exact)), torch.zeros(self.m, dtype=torch.float64, device=self.device)
        for rows, columns, tile in self._converted(n or self.m, x.dtype):
            y[rows].add_(_short_sums(tile, x[columns]))
        return y

    def transposed_times(self, y: Tensor, exact: bool = True) -> Tensor:
        """Gᵀy (d,) for y (n,), from the first n rows, in float64; if not `exact`, in float32."""
        # Or in float64 all the same: a tiny yᵢ would underflow, and may belong to a large row.
        dtype = _type(exact or not torch.equal(y, y.hardshrink(2**-100)))
        x, y = torch.zeros(self.dim, dtype=dtype, device=self.device), y.to(dtype)
        for rows, columns, tile in self._converted(len(y), dtype):
            x[columns].addmv_(tile.T, y[rows])
        return x

    def _converted(self, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
        """The first n rows in `dtype`, as rows, columns and this part of G: all at once if G is of
        this type, otherwise in tiles that fit in the cache."""
        if self.G.dtype == dtype:
            yield slice(n), ALL, self.G[:n]
            return
        buffer = torch.empty(TILE, dtype=dtype, device=self.device)
        # Long pieces of rows are read fastest, and products take four rows at a time.
        for columns in _parts(self.dim, TILE // 8, BLOCK):
            for rows in _parts(n, TILE // max(1, columns.stop - columns.start), 4):
                yield rows, columns, self.tile(rows, columns, buffer)

    def tiles(self, rows: slice = ALL) -> Iterator[Tensor]:
        """These rows of G in float64, a few columns at a time."""
        width = 2 * TILE // len(range(self.m)[rows])
        return (self.tile(rows, columns) for columns in _parts(self.dim, width, BLOCK))

    def tile(self, rows: slice, columns: slice, buffer: Tensor | None = None) -> Tensor:
        """A part of G, in the buffer and its type or in float64. Its columns must start at a
        multiple of BLOCK."""
        G = self.G[rows, columns]
        tile = G.double() if buffer is None else buffer[: G.numel()].view(G.shape).copy_(G)
        if self.scales is not None:
            scales = self.scales[rows, columns.start // BLOCK :].split(1, 1)
            for part, scale in zip(tile.split(BLOCK, 1), scales, strict=False):
                part.mul_(scale)
        return tile


class CompressedWindow(DenseWindow):
    """The same with only the largest entries of each gradient, the same number in each block of
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
        self.m, self.dim, self.device, self.compress = m, d, device, compress
        self.kept = _kept(BLOCK, compress)  # entries of a whole block
        k = d // BLOCK * self.kept + _kept(d % BLOCK, compress)
        starts, within = (torch.arange(*x, device="cpu") for x in ([0, d, BLOCK], [self.kept]))
        columns = (starts[:, None] + within).flatten()[:k].int()  # of zeros
        self.columns = columns.to(device).expand(m, k).contiguous()
        self.values = torch.zeros(self.columns.shape, dtype=dtype, device=device)
        self.error = torch.zeros(d, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.height = TILE // 20 // max(1, k)  # rows that fit in the cache
        self.state = {"error": self.error, "columns": self.columns, "values": self.values}

    def entry(self, g: Tensor) -> Entry:
        g = g.to(self.error.dtype)
        if kernels := cuda_kernels(self.device):
            columns, row, error, X = kernels.hinv_largest(self.error, g, self.values, self.kept)
        else:
            a = self.error + g
            columns = _largest(a, self.compress)
            row = a[columns].to(self.values.dtype)
            dense = torch.zeros_like(a).index_copy_(0, columns, row.to(a.dtype))  # ĝ
            # In float64, because g − ĝ may be far larger than g.
            error, X = a - dense, torch.stack([dense.double(), g.double() - dense])
        return Entry(X, {"error": error, "columns": columns.int(), "values": row})

    def products_by_kernel(self, new: Entry, count: Tensor) -> Tensor:
        kernel, row = cuda_kernels(self.device).hinv_sparse_times, new.row
        given = self.columns, self.values, new.vectors, count
        return kernel(*given, row["columns"], row["values"])

    def replace_by_kernel(self, new: Entry, y: Tensor, damp: Tensor, *when: Tensor) -> Tensor:
        kernel, row = cuda_kernels(self.device).hinv_sparse_replace, new.row
        window = self.columns, self.values, y, self.error
        new_row = row["columns"], row["values"], row["error"]
        return kernel(*window, *new_row, new.vectors[1], damp, *when)

    def times(self, x: Tensor, exact: bool = True, n: int | None = None) -> Tensor:
        x, y = x.double(), torch.zeros(self.m, dtype=torch.float64, device=self.device)
        for rows in _parts(n or self.m, self.height):
            columns, values = self.columns[rows], self.values[rows]
            y[rows] = x.index_select(0, columns.flatten()).view(values.shape).mul_(values).sum(1)
        return y

    def transposed_times(self, y: Tensor, exact: bool = True) -> Tensor:
        x = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for rows in _parts(len(y), self.height):
            products = self.values[rows] * y[rows, None]
            x.index_add_(0, self.columns[rows].flatten(), products.flatten())
        return x

    def tile(self, rows: slice, columns: slice, buffer: Tensor | None = None) -> Tensor:
        blocks = columns.start // BLOCK, -(-columns.stop // BLOCK)
        entries = slice(blocks[0] * self.kept, blocks[1] * self.kept)
        values = self.values[rows, entries].double()
        tile = values.new_zeros(len(values), columns.stop - columns.start)
        return tile.scatter_(1, self.columns[rows, entries].long() - columns.start, values)


class Window:
    """Blocks of columns side by side: the window of d weights, over one device or several.

    Methods are those of `DenseWindow`, of all blocks. An entry is a list with that of each block.
    All vectors come in and go out on `device`. Blocks are dense if `compress` is None.
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
        # Columns can be saved separately, with their parameters, unless blocks of them share scales
        # or compete for the largest entries.
        self.separable = compress is None and dtype not in SCALED
        self.blocks: list[DenseWindow] = []
        self.dims: list[int] = []  # columns of each block
        for dim, place in zip(dims, devices, strict=True):
            self.append(dim, place)

    def append(self, dim: int, device: torch.device) -> None:
        """Appends `dim` columns of zeros. The others stay where they are."""
        if self.compress is None:
            block = DenseWindow(self.m, dim, device, self.dtype)
        else:
            block = CompressedWindow(self.m, dim, device, self.dtype, self.compress)
        self.blocks.append(block)
        self.dims.append(dim)

    def entry(self, g: Tensor) -> list[Entry]:
        return self._each("entry", g.split_with_sizes(self.dims))

    def products(self, new: list[Entry], count: Tensor, exact: bool) -> Tensor:
        return reduce(torch.add, self._each("products", new, count, exact))

    def write(self, new: list[Entry], count: Tensor, accepted: Tensor) -> None:
        self._each("write", new, count, accepted)

    def replace_and_transposed_times(self, new: list[Entry], *shared: Tensor | bool) -> Tensor:
        return _joined(self._each("replace_and_transposed_times", new, *shared))

    def times(self, x: Tensor) -> Tensor:
        return reduce(torch.add, self._each("times", x.split_with_sizes(self.dims)))

    def transposed_times(self, y: Tensor) -> Tensor:
        return _joined(self._each("transposed_times", [y] * len(self.blocks)))

    def tiles(self, rows: slice = ALL) -> Iterator[Tensor]:
        """These rows of G in float64, a few columns at a time, on `device`."""
        return (tile.to(self.device) for block in self.blocks for tile in block.tiles(rows))

    def columns(self, start: int, stop: int) -> list[Tensor]:
        """Columns start to stop of a dense window, as views, one for each block that has some.
        If there are none, a view without columns."""
        pairs = zip(self.blocks, accumulate(self.dims, initial=0), strict=False)
        views = [block.G[:, max(0, start - i) : max(0, stop - i)] for block, i in pairs]
        return [view for view in views if view.shape[1]] or views[:1]

    def _each(self, method: str, parts: Iterable[Any], *shared: Tensor | bool) -> list[Any]:
        """The results of a method of all blocks, each called with its part and what they share."""
        results = []
        for block, part in zip(self.blocks, parts, strict=True):
            given = (_on(block.device, x) for x in (part, *shared))
            results.append(getattr(block, method)(*given))
        # The work has started on all devices before the first result is read.
        return [_on(self.device, x) for x in results]


def _on(device: torch.device, x: Any) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gram(tiles: Iterable[Tensor]) -> Tensor:
    """GGᵀ (m, m), from G a few columns at a time."""
    return reduce(Tensor.add_, (tile @ tile.T for tile in tiles))


def _kept(size: int, compress: float) -> int:
    """The number of entries that a compressed window stores of `size` columns."""
    return min(size, max(1, round(compress * size)))


def _parts(length: int, size: int, unit: int = 1) -> Iterator[slice]:
    """0 to `length` in slices of about `size`, a multiple of `unit`. There is at least one."""
    size = max(1, size // unit) * unit
    return (slice(i, min(i + size, length)) for i in range(0, max(1, length), size))


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
    n, whole = d // chunk, d - d % chunk
    # A batch of products x_c (1, chunk) times G_cᵀ (chunk, m) reads G as fast as G @ x, which
    # would sum all d columns in float32. Autocast leaves alone what has an `out`.
    products, rest = G.new_empty(n, 1, m), G.new_empty(m)
    chunks = G[:, :whole].view(m, n, chunk).permute(1, 2, 0)
    torch.bmm(x[:whole].view(n, 1, chunk), chunks, out=products)
    torch.mv(G[:, whole:], x[whole:], out=rest)
    return products.sum((0, 1), dtype=torch.float64) + rest


def _largest(a: Tensor, compress: float) -> Tensor:
    """The columns (k,) of the entries of a (d,) with the largest absolute values in each block."""
    whole, found = len(a) - len(a) % BLOCK, []
    for start, blocks in (0, a[:whole].view(-1, BLOCK)), (whole, a[whole:].view(1, -1)):
        k = _kept(blocks.shape[1], compress)
        columns = blocks.abs().topk(k, sorted=False).indices.sort().values
        starts = torch.arange(start, len(a), BLOCK, device=a.device)[: len(blocks), None]
        found.append((columns + starts).flatten())
    return torch.cat(found)
