"""Gradients G (m, d), read a few columns at a time, and products with them."""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from blocks import STRIP, tile_size

PARTIAL_SUM = 2**12  # columns, at most, that are summed in float32 before float64 takes over


class Pages:
    """G in pages and tiles of columns. G stays where it is and is never written to.

    A page for a CUDA device is copied through pinned memory on a stream of its own, while the
    device still works on the page before.

    Args:
        G: (m, d)
        pages: the number of pages; it need not divide d.
        device: for tiles and products.
    """

    def __init__(self, G: Tensor, pages: int, device: torch.device):
        self.G, self.pages, self.device = G, pages, device
        to_cuda = device.type == "cuda" and G.device.type == "cpu"
        self._copying = torch.cuda.Stream(device) if to_cuda else None

    def gram(
        self, dtype: torch.dtype, among: Tensor, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """GGᵀ (m, m) of the columns `among` (d,) bool, the lower triangle from products in `dtype`,
        and Gx (m,) of these columns; sums are in float64."""
        m = len(self.G)
        K = torch.zeros(m, m, dtype=torch.float64, device=self.device)
        Gx = K.new_zeros(m)
        index = None if bool(among.all()) else among.nonzero()[:, 0]
        x_among = x if index is None or x is None else x[index]
        with torch.autocast(self.device.type, enabled=False):
            for columns, tile in self.tiles(dtype, index):
                for i in range(0, m, STRIP):
                    stop = i + STRIP
                    K[i:stop, :stop] += tile[i:stop] @ tile[:stop].T
                if x_among is not None:
                    Gx += tile.double() @ x_among[columns]
        return K, Gx

    def times(self, x: Tensor) -> Tensor:
        """Gx (m,) in float64."""
        tiles = self.tiles(torch.float64)
        return reduce(torch.add, (tile @ x[columns] for columns, tile in tiles))

    def tiles(
        self, dtype: torch.dtype, index: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields (positions, columns) in `dtype` for all columns of G or those of `index`, in their
        order. The memory of a tile is used again for the next one."""
        width = tile_size(self.device) // len(self.G)
        if dtype == torch.float32:
            width = min(PARTIAL_SUM, 2 * width)  # of the same bytes
        width = max(1, min(width, self.G.shape[1]))
        buffer = torch.empty(len(self.G), width, dtype=dtype, device=self.device)
        for start, page in self._pages(index, width):
            for i in range(0, page.shape[1], width):
                tile = page[:, i : i + width]
                if tile.dtype != dtype:  # in the same memory, as new tiles would fragment it
                    tile = buffer[:, : tile.shape[1]].copy_(tile)
                yield slice(start + i, start + i + tile.shape[1]), tile

    def _pages(self, index: Tensor | None, width: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (position of the first column, page on the device)."""
        n = self.G.shape[1] if index is None else len(index)
        pages = self.pages
        if index is not None and self._copying is None:
            pages = max(pages, -(-n // width))  # gathering makes a copy, so tile by tile
        for i in range(pages):
            start, stop = n * i // pages, n * (i + 1) // pages
            if index is None:
                page = self.G[:, start:stop]
            else:
                columns = index[start:stop].to(self.G.device).expand(len(self.G), -1)
                page = self.G.gather(1, columns)  # in parallel on a CPU, unlike index_select
            if self._copying is not None:
                pinned = torch.empty(page.shape, dtype=page.dtype, device="cpu", pin_memory=True)
                pinned.copy_(page)
                with torch.cuda.stream(self._copying):
                    page = pinned.to(self.device, non_blocking=True)
                working = torch.cuda.current_stream(self.device)
                working.wait_stream(self._copying)
                page.record_stream(working)
            yield start, page.to(self.device)
