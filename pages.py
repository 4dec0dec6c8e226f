"""Gradients G (m, d), read a few columns at a time, on the device where the work is done."""

from collections.abc import Iterator

import torch
from torch import Tensor

from blocks import tile_size

PARTIAL_SUM = 2**12  # columns, at most, that are summed in float32 before float64 takes over


class Pages:
    """G, which stays where it is and is never written to, in pages and tiles of columns.

    To a CUDA device a page travels through pinned memory, on a stream of its own. As kernels are
    asynchronous, this goes on while the device still works on the page before.

    Args:
        G: (m, d)
        pages: how many are made of G; it need not divide d.
        device: where tiles come.
    """

    def __init__(self, G: Tensor, pages: int, device: torch.device):
        self.G, self.pages, self.device = G, pages, device
        to_cuda = device.type == "cuda" and G.device.type == "cpu"
        self._copying = torch.cuda.Stream(device) if to_cuda else None

    def tiles(
        self, dtype: torch.dtype, index: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """(positions, columns) in `dtype` for all columns of G in their order, or for those of
        `index`. The memory of a tile is used again for the next one."""
        width = max(1, min(tile_size(self.device) // len(self.G), self.G.shape[1]))
        if dtype == torch.float32:
            width = min(PARTIAL_SUM, width)
        buffer = torch.empty(len(self.G), width, dtype=dtype, device=self.device)
        for start, page in self._pages(index, width):
            for i in range(0, page.shape[1], width):
                tile = page[:, i : i + width]
                if tile.dtype != dtype:  # in the same memory, as new tiles would fragment it
                    tile = buffer[:, : tile.shape[1]].copy_(tile)
                yield slice(start + i, start + i + tile.shape[1]), tile

    def _pages(self, index: Tensor | None, width: int) -> Iterator[tuple[int, Tensor]]:
        """(position of its first column, page on the device) for each page."""
        n = self.G.shape[1] if index is None else len(index)
        pages = self.pages
        if index is not None and self._copying is None:
            pages = max(pages, -(-n // width))  # what is gathered is a copy
        for i in range(pages):
            start, stop = n * i // pages, n * (i + 1) // pages
            if index is None:
                page = self.G[:, start:stop]
            else:
                page = self.G.index_select(1, index[start:stop].to(self.G.device))
            if self._copying is not None:
                pinned = torch.empty(page.shape, dtype=page.dtype, device="cpu", pin_memory=True)
                pinned.copy_(page)
                with torch.cuda.stream(self._copying):
                    page = pinned.to(self.device, non_blocking=True)
                working = torch.cuda.current_stream(self.device)
                working.wait_stream(self._copying)
                page.record_stream(working)
            yield start, page.to(self.device)
