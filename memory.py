"""Memory of the static inverse Fisher: how much it takes, and where gradients are stored."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blocks import BATCH, tile_size, usual_perbatch
from checks import check_device, check_integer
from costs import available_memory

__all__ = ["inverse_bytes"]

FILE = "file"  # in place of a device, for gradients in a temporary file
MOST_PAGES = 1024  # of those that are chosen automatically
ROWS = 16  # gradients that a process collects before they are stored


@dataclass(frozen=True)
class Form:
    """How F⁻¹ of d weights is computed from m gradients, by one or more processes."""

    blocksize: int  # d for the full F
    columns: int  # the weights of one process
    stored: bool  # gradients are stored; otherwise blocks add them up as they come
    paged: bool  # the full F by `PagedInverseFisher`; otherwise blocks
    at_once: int  # gradients that one process collects before they are stored or added

    @staticmethod
    def of(m: int, d: int, blocksize: int | None, world_size: int = 1) -> "Form":
        """A full F of at most m weights is one block, unless several processes share it."""
        b = min(blocksize or d, d)
        paged = b == d and (d > m or world_size > 1)
        stored = paged or b > m
        blocks = -(-d // b)
        columns = -(-d // world_size) if paged else min(d, b * -(-blocks // world_size))
        at_once = ROWS if stored else BATCH // world_size
        return Form(b, columns, stored, paged, max(1, min(at_once, -(-m // world_size))))


def inverse_bytes(
    ngrads: int,
    dim: int,
    *,
    blocksize: int | None = None,
    perbatch: int | None = None,
    pages: int = 1,
    rounds: int = 1,
    grads_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    grads_device: torch.device | str | None = None,
    world_size: int = 1,
    samples: int = 0,
    params: int | None = None,
) -> dict[torch.device, int]:
    """The most bytes that `MFACPruner` takes for `dim` weights alive, by device.

    They are for gradients, matrices, vectors and tiles of a recomputation and the prunings after
    it. The model and a backward pass come on top.

    Args:
        grads_device: for stored gradients: a device, or "file" for a temporary file, which is not
            counted. None: on `device`.
        world_size: processes that share the work. The bytes are those of one of them.
        samples: in a batch, with `per_sample`.
        params: weights in the gradient of a sample, pruned ones too; `dim` if None.

    Example:
        >>> main = torch.device("cpu")
        >>> full = inverse_bytes(1024, 270_896)[main]
        >>> inverse_bytes(1024, 270_896, blocksize=128)[main] < full / 2
        True
    """
    m, d = ngrads, check_integer("dim", dim)
    check_sizes(m, blocksize, perbatch, pages, rounds)
    form = Form.of(m, d, blocksize, check_integer("world_size", world_size))
    device = check_device(device, present=False)
    place: Any = device if grads_device is None else grads_device
    if place != FILE:
        place = check_device(place, present=False)
    b, columns, number = form.blocksize, form.columns, grads_dtype.itemsize
    # Gradients before they are stored or added up, what processes exchange of them, and tiles.
    collected = 40 * min(tile_size(device), m * columns)
    collected += number * form.at_once * d * (3 if world_size > 1 else 1)
    if samples:
        collected += 2 * number * (samples * (params or d) + (BATCH + samples) * d)
    usual = usual_perbatch(b, m if form.stored else None, device)
    blocks = 1 if form.paged else perbatch or usual
    if not form.stored:  # sums, later a batch of them while it is inverted, and what rounds change
        batch = 48 * b * min(blocks * b, columns)
        sums = (16 if rounds > 1 else 8) * b * columns
        return {device: 160 * d + sums + max(collected, batch)}
    needed = {device: 160 * d + collected}
    # Gram matrices and factors: of all columns, or of a batch of blocks.
    needed[device] += 80 * blocks * m**2 + (0 if form.paged else min(blocks * b, d) * m * 32)
    gradients = number * m * columns
    if place != FILE:
        needed[place] = needed.get(place, 0) + gradients
    if form.paged and device.type != "cpu" and place != device:  # pages, copied ahead
        main = torch.device("cpu")
        needed[main] = needed.get(main, 0) + gradients // pages
        needed[device] += 3 * gradients // pages
    return needed


def check_sizes(
    ngrads: int,
    blocksize: int | None,
    perbatch: int | None,
    pages: int | None,
    rounds: int,
    batches_at_once: int | None = None,
) -> None:
    """Raises ValueError unless these are counts that go together."""
    sizes = {"ngrads": ngrads, "blocksize": blocksize, "perbatch": perbatch, "pages": pages}
    sizes["batches_at_once"] = batches_at_once
    for name, value in {**sizes, "rounds": rounds}.items():
        if value is not None or name in ("ngrads", "rounds"):
            check_integer(name, value)
    if blocksize is None and perbatch is not None:
        raise ValueError(f"perbatch = {perbatch} goes with a blocksize only: leave it out")
    if blocksize is not None and pages is not None and pages > 1:
        raise ValueError(f"pages = {pages} goes without a blocksize only: leave one out")


# --- the choice -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A way to compute F⁻¹ with the memory that is free."""

    form: Form
    place: torch.device | str  # of stored gradients: a device, or FILE
    pages: int
    needed: dict[torch.device, int]
    in_file: int  # bytes

    def __str__(self) -> str:
        text = f"inverse Fisher: {in_gigabytes(self.needed)}"
        if self.in_file:
            text += f" and {self.in_file / 1e9:.3g} GB in a file in {tempfile.gettempdir()}"
        return text + (f", {self.pages} pages" if self.pages > 1 else "")

    def store(self, parts: Iterable[Tensor], ngrads: int, like: Tensor) -> Tensor:
        """Stores `parts` (n, columns) of G in the planned place. Returns G (m, columns)."""
        shape = ngrads, self.form.columns
        if self.place == FILE:
            G = empty_file(*shape, like.dtype)
        else:
            pinned = like.is_cuda and self.place == torch.device("cpu")
            G = torch.empty(shape, dtype=like.dtype, device=self.place, pin_memory=pinned)
        stop = 0
        for rows in parts:
            start, stop = stop, stop + len(rows)
            G[start:stop] = rows
        return G


def make_plan(
    ngrads: int,
    dim: int,
    *,
    device: torch.device,
    pages: int | None = None,
    grads_dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Plan:
    """The first way that fits in memory: gradients on `device`, in main memory, or in a file; with
    as few pages as possible if `pages` is None. `sizes` are other arguments of `inverse_bytes`.
    Raises ValueError if no way fits."""
    form = Form.of(ngrads, dim, sizes.get("blocksize"), sizes.get("world_size", 1))
    main = torch.device("cpu")
    free = {where: available_memory(where) for where in dict.fromkeys([device, main])}
    places: list[Any] = list(free) if form.stored else [device]
    in_file = grads_dtype.itemsize * ngrads * form.columns
    if form.stored and in_file <= free_in_folder():
        places.append(FILE)
    options: dict[str, Any] = {"device": device, "grads_dtype": grads_dtype, **sizes}
    needed: dict[torch.device, int] = {}
    for place in places:
        copied = form.paged and device.type != "cpu" and place != device
        for count in page_counts(form.columns) if copied and pages is None else [pages or 1]:
            needed = inverse_bytes(ngrads, dim, pages=count, grads_device=place, **options)
            if all(size <= free[where] for where, size in needed.items()):
                count = min(count, form.columns)
                return Plan(form, place, count, needed, in_file if place == FILE else 0)

    def fits(blocksize: int) -> bool:
        try:
            make_plan(ngrads, dim, **options | {"blocksize": blocksize})
        except ValueError:
            return False
        return True

    smaller = [f"a blocksize of {b}" for b in (128, 16) if b < form.blocksize and fits(b)]
    advice = ", ".join([*smaller[:1], "fewer gradients", "portions"])
    raise ValueError(
        f"The inverse Fisher takes {in_gigabytes(needed)}, but free are {in_gigabytes(free)}: "
        f"use {advice}"
    )


def page_counts(columns: int) -> Iterator[int]:
    """Powers of two."""
    count = 1
    while count <= min(columns, MOST_PAGES):
        yield count
        count *= 2


def fewest_pages(G: Tensor, device: torch.device) -> int:
    """The smallest number of pages that fit on a device; 1 if G is there already."""
    if G.device == device or device.type == "cpu":
        return 1
    free, counts = available_memory(device), list(page_counts(G.shape[1]))
    for count in counts:
        options: dict[str, Any] = {"pages": count, "grads_dtype": G.dtype, "grads_device": G.device}
        if inverse_bytes(*G.shape, device=device, **options)[device] <= free:
            return count
    return counts[-1]


def in_gigabytes(sizes: dict[torch.device, int]) -> str:
    return " and ".join(f"{size / 1e9:.3g} GB on {place}" for place, size in sizes.items())


# --- gradients in a file --------------------------------------------------------------------------


def free_in_folder() -> int:
    """Bytes that this process may write to the folder for temporary files (TMPDIR). The processes
    on this machine share them."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def empty_file(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix in a file without a name, which the system deletes with the tensor."""
    numbers = rows * columns
    with tempfile.NamedTemporaryFile(prefix="mfac-") as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full later would kill the process
            os.posix_fallocate(file.fileno(), 0, numbers * dtype.itemsize)
        mapped = torch.from_file(file.name, shared=True, size=numbers, dtype=dtype, device="cpu")
    return mapped.view(rows, columns)
