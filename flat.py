"""The trained parameters of an optimizer as one vector, and the columns of the window it maps to.

Element-wise operations of the optimizer act on the vector. Parameters take part in two places:
their gradients are copied into it, and its pieces are subtracted from the weights. Each is one
foreach call over views that are made once.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from checks import check_dense
from control import layerwise
from ranks import Ranks, is_dtensor, local, sharded_dim

__all__ = ["Flat", "Segment", "views"]

Mask = Callable[[Tensor], Tensor | None]


class Segment:
    """Parameters of one group, type and device, side by side in the vector.

    Args:
        group: index of their group.
        params: the parameters.
        start: where their numbers start in the vector.
        vector: the vector (d,).
        mask: as for `Flat`.
    """

    def __init__(self, group: int, params: list[Tensor], start: int, vector: Tensor, mask: Mask):
        self.group, self.params, first = group, params, local(params[0])
        self.sharded = any(map(is_dtensor, params))
        self.dtype, self.device = first.dtype, first.device
        self.span = slice(start, start + sum(local(p).numel() for p in params))
        self.numbers = vector[self.span]
        # Foreach calls are fast for tensors of one type and device, so these are the parameters'.
        same = (vector.dtype, vector.device) == (self.dtype, self.device)
        self.staging = self.numbers if same else self.numbers.to(self.device, self.dtype)
        self.views = views(self.staging, params)
        self.shapes = [view.shape for view in self.views]
        self.lacking: set[int] = set()  # indices of parameters without a gradient
        self.sizes = torch.tensor([view.numel() for view in self.views], device=vector.device)
        self.fixed: Tensor | None = None  # positions in `numbers` of weights that masks freeze
        masks = list(map(mask, params))
        if any(mask is not None for mask in masks):
            places = views(torch.arange(len(self.numbers), device=vector.device), params)
            pairs = [
                (x, local(y).to(x.device))
                for x, y in zip(places, masks, strict=True)
                if y is not None
            ]
            self.fixed = torch.cat([x[~y] for x, y in pairs])

    def gather(self) -> bool:
        """Copies gradients into the vector, zeros for missing ones. False if all are missing.

        Raises:
            ValueError: a gradient has another shape than its parameter had, or is sparse.
        """
        found = [p.grad for p in self.params]
        self.lacking = {i for i, g in enumerate(found) if g is None}
        if self.lacking:
            self.staging.zero_()
        grads = self._local([g for g in found if g is not None])
        if not grads:
            self.numbers.zero_()
            return False
        if [g.shape for g in grads] != self._present(self.shapes):
            self._refuse(grads)
        check_dense(grads)
        if any(g.dtype != self.dtype for g in grads):  # `grad_dtype`: into the vector as they are
            self.numbers.zero_()
            torch._foreach_copy_(self._present(self.parts(self.numbers)), grads)
            return True
        torch._foreach_copy_(self._present(self.views), grads)
        if self.staging is not self.numbers:
            self.numbers.copy_(self.staging)
        return True

    def add_weights(self, alpha: float) -> None:
        """Adds alpha·w to the vector where there is a gradient."""
        views, weights = self._present(self.views), self._weights()
        if self.staging is self.numbers:
            torch._foreach_add_(views, weights, alpha=alpha)
        else:  # in the type of the vector
            torch._foreach_copy_(views, weights)
            self.numbers.add_(self.staging.to(self.numbers), alpha=alpha)

    def descend(self, step: Tensor, lr: float | Tensor, decay: float = 0) -> None:
        """w ← w − lr·(step + decay·w) for the parameters that have a gradient."""
        if decay == 0:
            torch.mul(step, lr, out=self.numbers)
        else:
            self.numbers.copy_(step)
            self.add_weights(decay)
            self.numbers.mul_(lr)
            if self.fixed is not None:
                self.numbers.index_fill_(0, self.fixed, 0)
        if self.staging is not self.numbers:
            self.staging.copy_(self.numbers)
        torch._foreach_sub_(self._weights(), self._present(self.views))

    def normalized(self, v: Tensor, ranks: Ranks) -> Tensor:
        """`layerwise` of this segment's part v of a vector."""
        shared = sharded_dim(self.params[0]) is not None
        parts = self.parts(v)
        return layerwise(v, self.params, parts, self.sizes, ranks if shared else None)

    def average(self, v: Tensor, u: Tensor, weight: float | Tensor) -> Tensor:
        """v ← v + weight·(u − v) where there is a gradient. v and u are vectors (d,); returns this
        segment's part of v."""
        v, u = v[self.span], u[self.span]
        parts = self.parts(v) if self.lacking else []
        kept = {i: parts[i].clone() for i in self.lacking}
        v.lerp_(u, weight)
        for i, before in kept.items():
            parts[i].copy_(before)
        return v

    def parts(self, v: Tensor) -> list[Tensor]:
        """The pieces of this segment's part v of a vector, in the memory order of `views`, which
        stays as it is if that of a parameter changes."""
        start = v.storage_offset() - self.staging.storage_offset()
        return [v.as_strided(x.shape, x.stride(), start + x.storage_offset()) for x in self.views]

    def moved(self) -> bool:
        """Whether the parameters have another type or device by now."""
        first = local(self.params[0])
        return (first.dtype, first.device) != (self.dtype, self.device)

    def _weights(self) -> list[Tensor]:
        return self._local(self._present(self.params))

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(map(local, tensors)) if self.sharded else tensors

    def _present(self, entries: list) -> list:
        """From one entry for each parameter, those of the parameters with a gradient."""
        if not self.lacking:
            return entries
        return [x for i, x in enumerate(entries) if i not in self.lacking]

    def _refuse(self, grads: list[Tensor]) -> None:
        for g, shape in zip(grads, self._present(self.shapes), strict=True):
            if g.shape != shape:
                raise ValueError(
                    f"A parameter of group {self.group} has a gradient of shape {tuple(g.shape)}, "
                    f"but had shape {tuple(shape)} when it got its place in the window; build the "
                    "optimizer anew after layers have been replaced or resized"
                )


class Flat:
    """The vector of d numbers, its segments, and its columns.

    Each number of the vector has a column of the window, except where a mask freezes it. If ranks
    share the window of replicated parameters, each rank has a part of these columns. The vector is
    in the order of memory, so that gradients are copied fast. Columns are in the order of the
    weights, so that a state fits any memory format.

    Args:
        params: (group, parameter) for each one that is trained, in the order of the columns.
        mask: of a parameter, True where it is trained; None for all of it.
        ranks: the processes that share the window.
        device, dtype: of the vector.
    """

    def __init__(
        self,
        params: Sequence[tuple[int, Tensor]],
        mask: Mask,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.ranks, self.mask, self.params = ranks, mask, [p for _, p in params]
        sizes = [local(p).numel() for p in self.params]
        self.vector = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.momentum: Tensor | None = None  # v (d,), from `velocity`
        self.segments: list[Segment] = []
        start = 0
        for (group, *_), run in groupby(params, _alike):
            self.segments.append(Segment(group, [p for _, p in run], start, self.vector, mask))
            start = self.segments[-1].span.stop
        self._seen: list[int] = []  # ids of all parameters when `covers` was last true
        self._frozen: list[Tensor] = []
        self.columns: list[slice] = []  # of each parameter, among those of this process
        self.index: Tensor | None = None  # of the columns in the vector; None if they are all of it
        self._sent: Tensor | None = None  # see `spread`
        self._received: Any = None
        self._filled: Any = None
        self._find_columns(sizes)

    def _find_columns(self, sizes: list[int]) -> None:
        """The columns of this rank. Three ranks have 3, 3 and 1 of the 7 columns of a replicated
        parameter. In messages each has 3 places, −1 where there is no column."""
        ranks, device = self.ranks, self.vector.device
        masks = [self.mask(p) for p in self.params]
        ordered = all(local(p).is_contiguous() for p in self.params)
        whole = ordered and ranks.size == 1 and all(mask is None for mask in masks)
        own, sent, received, start, stop = [], [], [], 0, 0
        for p, size, mask in zip(self.params, sizes, masks, strict=True):
            columns = size
            if not whole:
                (place,) = views(torch.arange(start, start + size, device=device), [p])
                positions = place.flatten() if mask is None else place[local(mask).to(device)]
                if ranks.size > 1 and sharded_dim(p) is None:
                    chunk = ranks.chunk(len(positions))
                    spare = ranks.size * chunk - len(positions)
                    received.append(pad(positions, (0, spare), value=-1).view(ranks.size, chunk))
                    positions = ranks.part(positions)
                    numbers = torch.arange(stop, stop + len(positions), device=device)
                    sent.append(pad(numbers, (0, chunk - len(positions)), value=-1))
                own.append(positions)
                columns = len(positions)
            self.columns.append(slice(stop, stop + columns))
            start, stop = start + size, stop + columns
        if not whole:
            self.index = torch.cat([torch.arange(0, device=device), *own])
        if sent:
            places = torch.cat(received, 1).flatten()
            self._sent, self._filled = torch.cat(sent), places >= 0
            self._received = places[self._filled]

    def __getstate__(self) -> dict[str, Any]:
        """Without segments, as copy and pickle do not preserve views. A new vector follows."""
        return {**self.__dict__, "segments": [], "_seen": []}

    def covers(self, params: list[tuple[int, Tensor]]) -> bool:
        """Whether the vector is that of these (group, parameter) pairs. If so for the first time,
        checks that other ranks have the same parameters."""
        if self.params and not self.segments:
            return False
        if [id(p) for _, p in params] == self._seen:
            unfrozen = any(p.grad is not None for p in self._frozen)
            return not unfrozen and not any(segment.moved() for segment in self.segments)
        groups = {id(p): i for i, p in params}
        known = {id(p) for p in self.params}
        frozen = [p for _, p in params if id(p) not in known]
        same = all(groups.get(id(p)) == s.group for s in self.segments for p in s.params)
        if not same or any(is_trained(p) for p in frozen):
            return False
        self.ranks.check_same(self.params, self.vector.device)
        self._seen, self._frozen = [id(p) for _, p in params], frozen
        return True

    @property
    def size(self) -> int:
        """Columns of this process."""
        return len(self.vector) if self.index is None else len(self.index)

    def gradient(self) -> Tensor:
        """The columns (size,) of the vector."""
        return self.vector if self.index is None else self.vector.index_select(0, self.index)

    def spread(self, u: Tensor) -> Tensor:
        """The vector (d,) with u (size,) in the columns of this rank, the u of other ranks in
        theirs, and 0 elsewhere."""
        if self.index is None:
            return u
        whole = torch.zeros_like(self.vector).index_copy_(0, self.index, u)
        if self._sent is not None:
            gathered = self.ranks.gather(pad(u, (0, 1))[self._sent]).flatten()
            whole.index_copy_(0, self._received, gathered[self._filled])
        return whole


def _alike(x: tuple[int, Tensor]) -> tuple[Any, ...]:
    """The properties that the parameters of a segment share."""
    group, p = x
    return group, p.dtype, p.device, sharded_dim(p) is None


def mask_of(state: dict[Any, Any], p: Tensor) -> Tensor | None:
    """True where p is trained, from the state of an optimizer. None if all of it is."""
    return state[p].get("mask") if p in state else None


def is_trained(p: Tensor) -> bool:
    """Whether p takes columns of the window."""
    return p.requires_grad or p.grad is not None


def views(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of the vector, in the shapes and memory order of the local parts of parameters.

    Example:
        >>> views(torch.arange(4), [torch.zeros(2), torch.zeros(1, 2)])
        [tensor([0, 1]), tensor([[2, 3]])]
    """
    found, start = [], vector.storage_offset()
    for p in map(local, params):
        stride = torch.empty_like(p, device="meta").stride()  # that of p, if p has no gaps
        found.append(vector.as_strided(p.shape, stride, start))
        start += p.numel()
    return found
