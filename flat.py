"""The trained parameters of an optimizer as one vector, and the columns of the window it maps to.

What an optimizer does to each number alone is done to the vector. Parameters meet it in two places:
their gradients are copied in, and its pieces are subtracted from the weights, each by one foreach
call over views that are made once.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import fallback
import states
from checks import check_group, checked_masks
from control import layerwise
from ranks import (
    Ranks,
    dtensor_like,
    find_process_group,
    is_dtensor,
    local,
    placed_as,
    sharded_dim,
)
from recovery import Recovery, warn_user

__all__ = ["Flat", "Segment", "views"]

Mask = Callable[[Tensor], Tensor | None]
ALGORITHMS = ("mfac", *fallback.SETTINGS)


class Segment:
    """Parameters of one group, type and device, side by side in the vector.

    Args:
        group: index of their group.
        params: the parameters.
        start: of their numbers in the vector.
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
        self.lacking: list[int] = []  # parameters without a gradient
        self.sizes = torch.tensor([view.numel() for view in self.views], device=vector.device)
        self.fixed: Tensor | None = None  # where in `numbers` masks keep weights as they are
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
        """Copies gradients into the vector, 0 where there is none; False if there is none at all.

        Raises:
            ValueError: a gradient has another shape than its parameter had, or is sparse.
        """
        found = [p.grad for p in self.params]
        self.lacking = [i for i, g in enumerate(found) if g is None]
        if self.lacking:
            self.staging.zero_()
        grads = self._local([g for g in found if g is not None])
        if not grads:
            self.numbers.zero_()
            return False
        if [g.shape for g in grads] != self._present(self.shapes):
            self._refuse(grads)
        if any(g.layout is not torch.strided for g in grads):
            raise ValueError(
                "MFAC does not support sparse gradients; use sparse=False in the module"
            )
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
        parts = views(v, self.params)
        return layerwise(v, self.params, parts, self.sizes, ranks if shared else None)

    def average(self, v: Tensor, u: Tensor, weight: float | Tensor) -> Tensor:
        """v ← v + weight·(u − v) where there is a gradient, for what v and u (d,) have of it."""
        v, u = v[self.span], u[self.span]
        kept = [(x, x.clone()) for x in (views(v, self.params)[i] for i in self.lacking)]
        v.lerp_(u, weight)
        for x, before in kept:
            x.copy_(before)
        return v

    def moved(self) -> bool:
        """Whether the parameters have another type or device by now."""
        first = local(self.params[0])
        return (first.dtype, first.device) != (self.dtype, self.device)

    def _weights(self) -> list[Tensor]:
        return self._local(self._present(self.params))

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(map(local, tensors)) if self.sharded else tensors

    def _present(self, things: list) -> list:
        """Of one thing for each parameter, those of parameters with a gradient."""
        if not self.lacking:
            return things
        return [x for i, x in enumerate(things) if i not in self.lacking]

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

    There is a column of the window for each number of the vector, but for those that a mask keeps
    as they are and, where replicated parameters share a window, those that other ranks have.
    Columns are in the order of the weights; the vector is in that of memory.

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
        """For copy and pickle, which do not keep what is a view of what: `extended` makes segments
        anew."""
        return {**self.__dict__, "segments": [], "_seen": []}

    def covers(self, params: list[tuple[int, Tensor]]) -> bool:
        """Whether these parameters, with the index of their group, are those of the vector. The
        first time that they are, checks that other ranks have the same."""
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

    def extended(self, params: list[tuple[int, Tensor]]) -> "Flat | None":
        """A vector with places for those that are trained by now, too, at its end. None if some of
        those that had places have gone."""
        groups = {id(p): i for i, p in params}
        if not all(id(p) in groups for p in self.params):
            return None
        known = {id(p) for p in self.params}
        new = [(i, p) for i, p in params if id(p) not in known and is_trained(p)]
        every = [(groups[id(p)], p) for p in self.params] + new
        return Flat(every, self.mask, self.ranks, self.vector.device, self.vector.dtype)

    @property
    def size(self) -> int:
        """Columns of this process."""
        return len(self.vector) if self.index is None else len(self.index)

    def gradient(self) -> Tensor:
        """The columns (size,) of the vector."""
        return self.vector if self.index is None else self.vector.index_select(0, self.index)

    def spread(self, u: Tensor) -> Tensor:
        """A vector (d,) with u (size,) in its columns, that of other ranks in theirs, else 0."""
        if self.index is None:
            return u
        whole = torch.zeros_like(self.vector).index_copy_(0, self.index, u)
        if self._sent is not None:
            gathered = self.ranks.gather(pad(u, (0, 1))[self._sent]).flatten()
            whole.index_copy_(0, self._received, gathered[self._filled])
        return whole


class FlatOptimizer(torch.optim.Optimizer):
    """An optimizer whose trained parameters are the vector `flat`, while groups come and change.

    A subclass says in `build` how `flat` and `fisher`, what it keeps for each column, are made.

    Args:
        params, defaults: as for any optimizer; `sparse` among the defaults gives masks.
        shared: settings that groups may not have of their own.
        process_group: as for `MFAC`.
    """

    flat: Flat
    fisher: Any
    _recovery: Recovery
    _window: dict[str, Any]  # how to make `fisher`

    def __init__(
        self, params: Any, defaults: dict[str, Any], shared: dict[str, Any], process_group: Any
    ):
        self._shared, self.process_group, self._built = shared, process_group, False
        super().__init__(params, defaults)
        # Masks belong to the parameters given now, not to groups that are added later.
        self.defaults["sparse"] = defaults["sparse"] is True
        self.build()
        self.name_state()
        self._built = True

    def build(self, also: Collection[int] = ()) -> None:
        """Makes `flat` and an empty `fisher`, also for the parameters with these ids."""
        raise NotImplementedError

    def numbered(self, algorithms: Collection[str] = ALGORITHMS) -> list[tuple[int, Tensor]]:
        """Every parameter of groups of these algorithms, with the index of its group."""
        groups = [(i, g) for i, g in enumerate(self.param_groups) if g["algorithm"] in algorithms]
        return [(i, p) for i, group in groups for p in group["params"]]

    def velocity(self) -> Tensor:
        """v (d,), from zeros; the state of each parameter has a view of it in its shape."""
        flat = self.flat
        if flat.momentum is None:
            flat.momentum = torch.zeros_like(flat.vector)
        if flat.params and "momentum_buffer" not in self.state[flat.params[-1]]:
            for p, view in zip(flat.params, views(flat.momentum, flat.params), strict=True):
                self.state[p]["momentum_buffer"] = dtensor_like(p, view)
        return flat.momentum

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; the window gets columns for it whose history is zero."""
        # First, so that torch's own errors come first; of a copy, as the caller's group is kept.
        given = isinstance(param_group, dict)
        super().add_param_group(
            dict(fallback.complete(param_group, self.defaults)) if given else param_group
        )
        group = self.param_groups[-1]
        try:
            if group["algorithm"] != "mfac":
                fallback.strip(group, self.defaults)
            check_group(group, self._shared)
            masks = checked_masks(group["params"], group.get("sparse", False))
            find_process_group(group["params"], self.process_group)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        if "sparse" in group:
            group["sparse"] = bool(group["sparse"])
        if group is self.param_groups[0]:
            group["fisher"] = None  # whose place in a state torch.distributed.checkpoint must know
        for p, mask in zip(group["params"], masks, strict=True):
            if mask is not None:
                self.state[p]["mask"] = placed_as(p, mask)
        if self._built:
            self.follow()

    def follow(self) -> None:
        """Gives columns to parameters that are trained by now. Where others have gone, as when a
        framework puts its own in their place, the window starts anew."""
        params, others = self.numbered(["mfac"]), self.numbered(fallback.SETTINGS)
        known = all(p in self.state for _, p in others if p.grad is not None)
        if self.flat.covers(params) and known:
            return
        flat = self.flat.extended(params)
        if flat is None:
            if self.fisher.count:
                warn_user("The parameters of the optimizer have changed: its window starts anew")
            replace_params(self.state, self._params, [p for _, p in self.numbered()])
            self.build()
        else:
            self.fisher.grow(flat.size - self.flat.size)
            self.flat = flat
        self.name_state()

    def name_state(self) -> None:
        """Enters the names of what `state_dict` will have into the state of each parameter, since
        torch.distributed.checkpoint goes by them."""
        self._params = [p for _, p in self.numbered()]
        before = [self.state[p].pop("momentum_buffer", None) for p in self.flat.params]
        if self.fisher.window.separable:
            for p in self.flat.params:
                self.state[p]["grads"] = None
        groups = [group for group in self.param_groups if group["algorithm"] == "mfac"]
        if any(g["momentum"] != 0 for g in groups) or any(v is not None for v in before):
            self.velocity()
        for i, p in self.numbered(fallback.SETTINGS):
            if is_trained(p):
                fallback.prepare(self.param_groups[i], p, self.state)
        for p, v in zip(self.flat.params, before, strict=True):
            if v is not None and v.shape == p.shape:
                local(self.state[p]["momentum_buffer"]).copy_(local(v))

    @property
    def damp(self) -> float:
        """λ as set. A change costs O(m³), at m = 1024 about as much as a step."""
        return self._window["damp"]

    @damp.setter
    def damp(self, damp: float) -> None:
        self._recovery.settle(self.fisher)
        self.fisher.damp = damp
        self._window["damp"] = self.fisher.damp

    @property
    def damp_in_use(self) -> float:
        """λ, or the multiple of it that these gradients need."""
        return self.fisher.damp

    raised_steps = property(lambda self: self._recovery.raised_steps, doc="Steps with more damp.")
    skipped_steps = property(
        lambda self: self._recovery.skipped_steps, doc="Steps with NaN or Inf."
    )

    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer, with the window's columns in each parameter's state ("grads") and
        what all share in the first group ("fisher"). By reference, as far as one tensor holds it.
        What ranks have of their own is a DTensor, for torch.distributed.checkpoint."""
        self._recovery.settle(self.fisher)
        return states.of_optimizer(self, super().state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave. `ngrads`, `damp`, `window_dtype` and `compress`
        stay as constructed: where the state has others, the newest gradients enter one by one.
        ValueError if it belongs to other parameters, or to another optimizer."""
        states.into_optimizer(self, state_dict, super().load_state_dict)

    def __repr__(self) -> str:
        fisher = self.fisher
        window = f"Window (ngrads: {fisher.num_grads}, damp: {fisher.damp}, {fisher.dtype})"
        groups = super().__repr__().replace("    fisher: None\n", "")
        return f"{groups[:-1]}{window}\n)"

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: torch keeps only the defaults, the state and the groups. Hooks do
        not come along, nor does the process group, which the inverse Fisher has."""
        names = [name for name in vars(self) if "hook" not in name and "step" not in name]
        kept = {name: getattr(self, name) for name in names if name != "process_group"}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "process_group" not in vars(self):
            self.process_group = self.fisher.ranks.group


def _alike(x: tuple[int, Tensor]) -> tuple[Any, ...]:
    """What parameters of one segment have in common, from the group and the parameter."""
    group, p = x
    return group, p.dtype, p.device, sharded_dim(p) is None


def replace_params(state: dict[Any, Any], old: list[Tensor], new: list[Tensor]) -> None:
    """Drops what belongs to parameters that have gone. Those in their places get their masks."""
    known, present = set(map(id, old)), set(map(id, new))
    for p, q in zip(old, new, strict=False):
        mask = state[p].get("mask") if p in state else None
        if mask is not None and id(q) not in known and q.shape == p.shape:
            state[q]["mask"] = placed_as(q, mask)
    for p in [p for p in state if isinstance(p, Tensor) and id(p) not in present]:
        del state[p]


def mask_of(state: dict[Any, Any], p: Tensor) -> Tensor | None:
    """True where p is trained, by the state of an optimizer; None for all of it.

    Example:
        >>> mask_of({}, torch.zeros(2)) is None
        True
    """
    return state[p].get("mask") if p in state else None


def is_trained(p: Tensor) -> bool:
    """Whether a parameter takes columns of the window.

    Example:
        >>> is_trained(torch.nn.Parameter(torch.zeros(2), requires_grad=False))
        False
    """
    return p.requires_grad or p.grad is not None


def views(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of the vector in the shapes, and order in memory, of what is here of parameters.

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
