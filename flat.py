"""The trained parameters of an optimizer as one vector, and the columns of the window it maps to.

Element-wise operations of the optimizer act on the vector. Parameters take part where gradients
are copied into it, where weights decay, and where its pieces are subtracted from the weights. Each
is one foreach call over views that are made once.
"""

import itertools
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from checks import check_dense
from control import layerwise
from ranks import Ranks, is_dtensor, local, sharded_dim


class Segment:
    """Parameters of one group, type and device, side by side in the vector from `start` on.
    `fixed` (d,) is True where masks freeze weights."""

    def __init__(self, group: int, params: list[Tensor], start: int, vector: Tensor, fixed: Tensor):
        self.group, self.params = group, params
        self.sizes = [local(p).numel() for p in params]
        self.span = slice(start, start + sum(self.sizes))
        self.numbers = vector[self.span]
        self.views = pieces(self.numbers, params)
        # A foreach subtraction is one launch only for tensors of one type and device, so `update`
        # has those of the parameters. A foreach copy converts by itself.
        self.update = self.numbers.to(params[0].device, params[0].dtype)  # `numbers` if it fits
        self.updates = pieces(self.update, params)
        self.present = [True] * len(params)  # whether each has a gradient
        self.distributed = any(map(is_dtensor, params))
        self.repeats = torch.tensor(self.sizes, device=vector.device)
        self.fixed = fixed[self.span] if bool(fixed[self.span].any()) else None

    def gather(self) -> bool:
        """Copies gradients into the vector, zeros for missing ones. False if all are missing.
        Raises ValueError if one is sparse."""
        found: list[Any] = [p.grad for p in self.params]
        self.present = [g is not None for g in found]
        grads = self._pick(found)
        if len(grads) < len(found):
            self.numbers.zero_()
            self.update.zero_()  # `add_weights` adds all of it, also where no gradient is
        if grads:
            check_dense(grads)
            torch._foreach_copy_(self._pick(self.views), grads)
        return bool(grads)

    def add_weights(self, alpha: float) -> None:
        """Adds alpha·w to the vector where there is a gradient."""
        if self.update is self.numbers:
            torch._foreach_add_(self._pick(self.views), self._pick(self.params), alpha=alpha)
        else:
            torch._foreach_copy_(self._pick(self.updates), self._pick(self.params))
            self.numbers.add_(self.update.to(self.numbers), alpha=alpha)

    def average(self, v: Tensor, u: Tensor, weight: float | Tensor) -> Tensor:
        """v ← v + weight·(u − v) where there is a gradient. Elsewhere v stays, by u ← v."""
        if not all(self.present):
            lacking = [not present for present in self.present]
            new, old = ([*itertools.compress(x.split(self.sizes), lacking)] for x in (u, v))
            torch._foreach_copy_(new, old)
        return v.lerp_(u, weight)

    def normalized(self, v: Tensor, ranks: Ranks) -> Tensor:
        """`layerwise` of v."""
        shared = sharded_dim(self.params[0]) is not None
        parts = list(v.split(self.sizes))
        return layerwise(v, self.params, parts, self.repeats, ranks if shared else None)

    def descend(self, v: Tensor, lr: float | Tensor, decay: float) -> None:
        """w ← w − lr·(v + decay·w) for the parameters that have a gradient."""
        if decay == 0:
            torch.mul(v, lr, out=self.numbers)
        else:
            self.numbers.copy_(v)
            self.add_weights(decay)
            self.numbers.mul_(lr)
            if self.fixed is not None:
                self.numbers.masked_fill_(self.fixed, 0)
        if self.update is not self.numbers:
            self.update.copy_(self.numbers)
        torch._foreach_sub_(self._pick(self.params), self._pick(self.updates))

    def _pick(self, entries: list[Tensor]) -> list[Tensor]:
        """The local parts of those entries, one a parameter, whose parameters have a gradient."""
        found = [*itertools.compress(entries, self.present)]
        return [*map(local, found)] if self.distributed else found


class Flat:
    """The vector of d numbers, its segments, and its columns.

    Each number of the vector has a column of the window, except where a mask freezes it. If ranks
    share the window of replicated parameters, each rank has a part of these columns. The vector is
    in the order of memory, so that gradients are copied fast. Columns are in the order of the
    weights, so that a state fits any memory format.

    Args:
        params: (group, parameter) for each one with columns, in their order.
        masks: of each parameter, True where it is trained; None if all of it is.
        ranks: the processes that share the window.
        device, dtype: of the vector.
    """

    def __init__(
        self,
        params: Sequence[tuple[int, Tensor]],
        masks: Sequence[Tensor | None],
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.params, self.ranks, self._compared = [p for _, p in params], ranks, False
        d = sum(local(p).numel() for p in self.params)
        self.vector = torch.zeros(d, dtype=dtype, device=device)
        self.momentum: Tensor | None = None  # v (d,), if there is any

        order = torch.arange(d, device=device)
        own, tables, fixed = [], [], torch.ones(d, dtype=torch.bool, device=device)
        for p, place, mask in zip(self.params, pieces(order, self.params), masks, strict=True):
            places = place.flatten() if mask is None else place[local(mask).to(device)]
            fixed[places] = False
            if ranks.size > 1 and sharded_dim(p) is None:  # three ranks have 3, 3, 1 of 7 columns
                table = pad(places, (0, -len(places) % ranks.size), value=d)
                tables.append(table.view(ranks.size, -1))
                places = ranks.part(places)
            own.append(places)
        self.columns = [slice(*ends) for ends in pairwise(accumulate(map(len, own), initial=0))]
        # Places of the columns of all ranks (ranks, ·), where parameters are replicated. Rows are
        # padded with d, a place after the vector.
        self.shared = torch.cat(tables, 1) if tables else None
        index = torch.cat([order[:0], *own])  # places of the columns of this rank; None if all
        self.index = index if tables or not torch.equal(index, order) else None

        self.segments: list[Segment] = []
        start = 0
        for (group, *_), run in groupby(params, _alike):
            self.segments.append(Segment(group, [p for _, p in run], start, self.vector, fixed))
            start = self.segments[-1].span.stop

    @property
    def size(self) -> int:
        """Columns of this process."""
        return len(self.vector) if self.index is None else len(self.index)

    def gradient(self) -> Tensor:
        """The columns (size,) of the vector. The first time, checks that other ranks have the same
        parameters. That is in a step, because DDP may make them the same after construction."""
        if not self._compared:
            self.ranks.check_same(self.params, self.vector.device)
            self._compared = True
        return self.vector if self.index is None else self.vector.index_select(0, self.index)

    def spread(self, u: Tensor) -> Tensor:
        """The vector (d,) with u (size,) in the columns of this rank, the u of other ranks in
        theirs, and 0 elsewhere."""
        if self.index is None:
            return u
        whole = u.new_zeros(len(self.vector) + 1).index_copy_(0, self.index, u)
        if self.shared is not None:
            own = whole.index_select(0, self.shared[self.ranks.rank])
            whole.index_copy_(0, self.shared.flatten(), self.ranks.gather(own).flatten())
        return whole[:-1]


def _alike(x: tuple[int, Tensor]) -> tuple[Any, ...]:
    """The properties that the parameters of a segment share."""
    group, p = x
    return group, p.dtype, p.device, sharded_dim(p) is None


def is_trained(p: Tensor) -> bool:
    """Whether p takes columns of the window."""
    return p.numel() > 0 and (p.requires_grad or p.grad is not None)


def pieces(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of the vector, in the shapes and memory order of the local parts of parameters."""
    found, start = [], vector.storage_offset()
    for p in map(local, params):
        stride = torch.empty_like(p, device="meta").stride()  # that of p, if p has no gaps
        found.append(vector.as_strided(p.shape, stride, start))
        start += p.numel()
    return found
