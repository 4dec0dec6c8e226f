"""The trained parameters of an optimizer as one vector, and the columns of the window it maps to.

Element-wise operations of the optimizer act on the vector. Parameters take part in two places:
their gradients are copied into it, and its pieces are subtracted from the weights. Each is one
foreach call over views that are made once.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from checks import check_dense
from control import layerwise
from ranks import Ranks, local, sharded_dim


class Segment:
    """Parameters of one group, type and device, side by side in the vector from `start` on.
    `fixed` (d,) is True where masks freeze weights."""

    def __init__(self, group: int, params: list[Tensor], start: int, vector: Tensor, fixed: Tensor):
        self.group, self.params = group, params
        self.dtype, self.device = params[0].dtype, params[0].device
        self.shapes = [local(p).shape for p in params]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.span = slice(start, start + sum(self.sizes))
        self.numbers = vector[self.span]
        self.views = views(self.numbers, params)
        # A foreach subtraction is one launch only for tensors of one type and device, so these
        # numbers are converted to those of the parameters at once. A copy converts by itself.
        self.update = self.numbers.to(self.device, self.dtype)  # `numbers` itself if it fits
        self.updates = views(self.update, params)
        self.lacking: set[int] = set()  # indices of parameters without a gradient
        self.repeats = torch.tensor(self.sizes, device=vector.device)
        self.fixed = fixed[self.span] if bool(fixed[self.span].any()) else None

    def gather(self) -> bool:
        """Copies gradients into the vector, zeros for missing ones. False if all are missing.

        Raises:
            ValueError: a gradient has another shape than its parameter had, or is sparse.
        """
        found = [p.grad for p in self.params]
        self.lacking = {i for i, g in enumerate(found) if g is None}
        if self.lacking:
            self.numbers.zero_()
            self.update.zero_()  # `add_weights` adds all of it
        grads, shapes = [local(g) for g in found if g is not None], self._present(self.shapes)
        if not grads:
            return False
        if [g.shape for g in grads] != shapes:
            pairs = zip(grads, shapes, strict=True)
            new, old = next((tuple(g.shape), tuple(old)) for g, old in pairs if g.shape != old)
            raise ValueError(
                f"A parameter of group {self.group} has a gradient of shape {new}, but had shape "
                f"{old} when it got its place in the window; build the optimizer anew after layers "
                "have been replaced or resized"
            )
        check_dense(grads)
        torch._foreach_copy_(self._present(self.views), grads)
        return True

    def add_weights(self, alpha: float) -> None:
        """Adds alpha·w to the vector where there is a gradient."""
        if self.update is self.numbers:
            torch._foreach_add_(self._present(self.views), self._weights(), alpha=alpha)
        else:
            torch._foreach_copy_(self._present(self.updates), self._weights())
            self.numbers.add_(self.update.to(self.numbers), alpha=alpha)

    def average(self, v: Tensor, u: Tensor, weight: float | Tensor) -> Tensor:
        """v ← v + weight·(u − v) where there is a gradient. Elsewhere u becomes v."""
        if self.lacking:
            new, old = u.split(self.sizes), v.split(self.sizes)
            torch._foreach_copy_([new[i] for i in self.lacking], [old[i] for i in self.lacking])
        return v.lerp_(u, weight)

    def normalized(self, v: Tensor, ranks: Ranks) -> Tensor:
        """`layerwise` of v."""
        shared = sharded_dim(self.params[0]) is not None
        parts = list(v.split(self.sizes))
        return layerwise(v, self.params, parts, self.repeats, ranks if shared else None)

    def descend(self, v: Tensor, lr: float | Tensor, decay: float = 0) -> None:
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
        torch._foreach_sub_(self._weights(), self._present(self.updates))

    def _weights(self) -> list[Tensor]:
        return [local(p) for p in self._present(self.params)]

    def _present(self, entries: list) -> list:
        """From one entry for each parameter, those of the parameters with a gradient."""
        if not self.lacking:
            return entries
        return [x for i, x in enumerate(entries) if i not in self.lacking]


class Flat:
    """The vector of d numbers, its segments, and its columns.

    Each number of the vector has a column of the window, except where a mask freezes it. If ranks
    share the window of replicated parameters, each rank has a part of these columns. The vector is
    in the order of memory, so that gradients are copied fast. Columns are in the order of the
    weights, so that a state fits any memory format.

    Args:
        params: (group, parameter) for each one that is trained, in the order of the columns.
        frozen: the other parameters of the same groups, which have no columns.
        state: of the optimizer, with the masks.
        ranks: the processes that share the window.
        device, dtype: of the vector.
    """

    def __init__(
        self,
        params: Sequence[tuple[int, Tensor]],
        frozen: Sequence[Tensor],
        state: dict[Any, Any],
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.params, self.ranks = [p for _, p in params], ranks
        self._frozen, self._state, self._compared = frozen, state, False
        d = sum(local(p).numel() for p in self.params)
        self.vector = torch.zeros(d, dtype=dtype, device=device)
        self.momentum: Tensor | None = None  # v (d,), from `velocity`
        fixed = self._find_columns()
        self.segments: list[Segment] = []
        start = 0
        for (group, *_), run in groupby(params, _alike):
            self.segments.append(Segment(group, [p for _, p in run], start, self.vector, fixed))
            start = self.segments[-1].span.stop

    def _find_columns(self) -> Tensor:
        """Sets `columns`, `shared` and `index`. Returns where masks freeze numbers (d,)."""
        d, device, ranks = len(self.vector), self.vector.device, self.ranks
        order, fixed = torch.arange(d, device=device), torch.zeros(d, device=device).bool()
        self.columns: list[slice] = []  # of each parameter, among those of this rank
        own, shared, stop = [order[:0]], [], 0
        for p, place in zip(self.params, views(order, self.params), strict=True):
            mask, positions = self.mask(p), place.flatten()
            if mask is not None:
                mask = local(mask).to(device)
                positions = place[mask]
                fixed[place[~mask]] = True
            if ranks.size > 1 and sharded_dim(p) is None:  # three ranks have 3, 3, 1 of 7 columns
                table = pad(positions, (0, -len(positions) % ranks.size), value=d)
                shared.append(table.view(ranks.size, -1))
                positions = ranks.part(positions)
            own.append(positions)
            self.columns.append(slice(stop, stop := stop + len(positions)))
        # Places of the columns of all ranks (ranks, ·), where parameters are replicated. Rows are
        # padded with d, a place after the vector.
        self.shared = torch.cat(shared, 1) if shared else None
        index = torch.cat(own)  # places of the columns of this rank; None if they are all there are
        self.index = index if shared or not torch.equal(index, order) else None
        return fixed

    def __getstate__(self) -> dict[str, Any]:
        """Without segments, since copies lose views. `covers` is then False: they are made anew."""
        return {**self.__dict__, "segments": []}

    def covers(self) -> bool:
        """Whether all that are trained have columns, and are of the same type and device as before.
        The first time it holds, checks that other ranks have the same parameters. That is in the
        first step, because DDP may make them the same after construction."""
        if (self.params and not self.segments) or any(map(is_trained, self._frozen)):
            return False
        for segment in self.segments:
            first = segment.params[0]
            if (first.dtype, first.device) != (segment.dtype, segment.device):
                return False
        if not self._compared:
            self.ranks.check_same(self.params, self.vector.device)
            self._compared = True
        return True

    def mask(self, p: Tensor) -> Tensor | None:
        """True where p is trained; None if all of it is."""
        return self._state[p].get("mask") if p in self._state else None

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


def views(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of the vector, in the shapes and memory order of the local parts of parameters."""
    found, start = [], vector.storage_offset()
    for p in map(local, params):
        stride = torch.empty_like(p, device="meta").stride()  # that of p, if p has no gaps
        found.append(vector.as_strided(p.shape, stride, start))
        start += p.numel()
    return found
