"""What the static inverse Fisher takes, before it is computed, and what is free."""

from typing import Any

import torch
from torch import Tensor

from blocks import BATCH, tile_size
from checks import check_device, check_integer
from costs import available_memory

__all__ = ["inverse_bytes"]


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
) -> dict[torch.device, int]:
    """Bytes that `MFACPruner` takes for `dim` weights alive, in main memory and on `device`.

    The model and a backward pass come on top. The factors are for the most that a recomputation
    and the prunings after it hold at any time: gradients, matrices, vectors, and tiles.
    `grads_device` is where gradients are kept that have to be, `device` if None.

    Example:
        >>> main = torch.device("cpu")
        >>> full = inverse_bytes(1024, 270_896)[main]
        >>> inverse_bytes(1024, 270_896, blocksize=128)[main] < full / 2
        True
    """
    m, d = ngrads, check_integer("dim", dim)
    check_sizes(m, blocksize, perbatch, pages, rounds)
    device = check_device(device, present=False)
    place = device if grads_device is None else check_device(grads_device, present=False)
    b, tile = min(blocksize or d, d), tile_size(device)
    needed = {device: 160 * d + 40 * tile}
    if b <= m:  # sums, a batch of them while it is inverted, and the inverse that rounds change
        usual = tile // (32 if device.type == "cpu" else 4)
        batch = max(b**2, usual) if perbatch is None else b * min(perbatch * b, d)
        needed[device] += (16 if rounds > 1 else 8) * b * d + 48 * batch
        gradients, place = grads_dtype.itemsize * min(BATCH, m) * d, device
    else:  # Gram matrices and factors: of all columns, or of a batch of blocks
        gradients = grads_dtype.itemsize * m * d
        blocks = perbatch or max(1, tile // 4 // (m * b))
        needed[device] += 80 * m**2 if b == d else min(blocks * b, d) * m * 32 + 80 * blocks * m**2
    needed[place] = needed.get(place, 0) + gradients
    if place != device:  # pages in pinned memory, and on the device, while others are copied
        needed[place] += gradients // pages
        needed[device] += 3 * gradients // pages
    return needed


def check_sizes(
    ngrads: int, blocksize: int | None, perbatch: int | None, pages: int, rounds: int
) -> None:
    """Raises ValueError unless these are counts that go together."""
    sizes = {"ngrads": ngrads, "blocksize": blocksize, "perbatch": perbatch, "pages": pages}
    for name, value in {**sizes, "rounds": rounds}.items():
        if value is not None or name in ("ngrads", "pages", "rounds"):
            check_integer(name, value)
    if blocksize is None and perbatch is not None:
        raise ValueError(f"perbatch = {perbatch} goes with a blocksize only: leave it out")
    if blocksize is not None and pages > 1:
        raise ValueError(f"pages = {pages} goes without a blocksize only: leave one out")


def gradient_buffer(
    rows: int,
    ngrads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    device: torch.device,
    **sizes: Any,
) -> Tensor:
    """Memory for gradients (rows, dim), of `ngrads` in all, where `place_for_gradients` says."""
    place = place_for_gradients(ngrads, dim, device=device, grads_dtype=dtype, **sizes)
    pinned = place.type == "cpu" and device.type == "cuda"
    return torch.empty(rows, dim, dtype=dtype, device=place, pin_memory=pinned)


def place_for_gradients(
    ngrads: int, dim: int, *, device: torch.device, processes: int = 1, **sizes: Any
) -> torch.device:
    """Where gradients that are kept fit with all else: `device`, or else main memory, but not if
    processes share them, as they are exchanged on the device. The rest as for `inverse_bytes`.
    Raises ValueError where they do not fit."""
    share, copies = -(-dim // processes), min(processes, 2)  # before and after the exchange
    for place in dict.fromkeys([device, torch.device("cpu")]) if processes == 1 else [device]:
        needed = inverse_bytes(ngrads, share, device=device, grads_device=place, **sizes)
        needed = {where: copies * size for where, size in needed.items()}
        free = {where: available_memory(where) for where in needed}
        if all(size <= free[where] for where, size in needed.items()):
            return place
    takes, left = (
        " and ".join(f"{size / 2**30:.2f} GiB on {where}" for where, size in sizes.items())
        for sizes in (needed, free)
    )
    raise ValueError(
        f"The inverse Fisher takes {takes}, but free are {left}: use fewer gradients, a blocksize, "
        "portions, or on a GPU more pages"
    )
