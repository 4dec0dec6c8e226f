"""What torch expects of any optimizer, for groups that share a window: groups are added and
changed, parameters are frozen and replaced, states are saved and loaded.
"""

from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import fallback
import states
from checks import check_group, checked_masks, kind
from flat import Flat, is_trained
from ranks import as_dtensor, find_process_group, is_dtensor, local, placed_as
from recovery import Recovery, warn_user

__all__ = ["GroupedOptimizer"]

ALGORITHMS = ("mfac", *fallback.SETTINGS)


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimizer whose trained parameters are the vector `flat`, with columns in `fisher`. A
    subclass makes both in `build`. `shared` are the settings that all groups share."""

    flat: Flat
    fisher: Any
    stages: list[list[Tensor]]  # parameters with columns, a list for each time the window has grown
    _recovery: Recovery
    _settings: dict[str, Any]  # how to make `fisher`

    def __init__(
        self, params: Any, defaults: dict[str, Any], shared: dict[str, Any], process_group: Any
    ):
        self._shared, self.process_group = shared, process_group
        super().__init__(params, defaults)
        # Masks belong to the parameters given now, not to groups that are added later.
        self.defaults["sparse"] = defaults["sparse"] is True
        self.place(self._trained())

    def build(self, params: list[Tensor], grow: bool) -> None:
        """Makes `flat` of these parameters, and an empty `fisher`. To `grow`, keeps `fisher`, and
        appends the columns that it lacks."""
        raise NotImplementedError

    def place(self, params: list[Tensor], grow: bool = False) -> None:
        """Gives columns to these parameters: in a new window or, to `grow`, in the present one."""
        stages = [*self.stages, params] if grow else [params]
        self.build([p for stage in stages for p in stage], grow)
        self.stages = stages
        self._params = [list(group["params"]) for group in self.param_groups]
        # torch.distributed.checkpoint looks up here which names `state_dict` will have.
        for p in self.flat.params if self.fisher.window.separable else []:
            self.state[p]["grads"] = None
        momentum = any(self.param_groups[i]["momentum"] != 0 for i, _ in self.numbered(["mfac"]))
        if momentum or any("momentum_buffer" in self.state[p] for p in self.flat.params):
            self.velocity()
        for i, p in self.numbered(fallback.SETTINGS):
            if is_trained(p):
                fallback.prepare(self.param_groups[i], p, self.state)

    def _trained(self) -> list[Tensor]:
        return [p for _, p in self.numbered(["mfac"]) if is_trained(p)]

    def numbered(self, algorithms: Collection[str] = ALGORITHMS) -> list[tuple[int, Tensor]]:
        """(group, parameter) for each parameter in groups of these algorithms."""
        groups = [(i, g) for i, g in enumerate(self.param_groups) if g["algorithm"] in algorithms]
        return [(i, p) for i, group in groups for p in group["params"]]

    def velocity(self) -> Tensor:
        """v (d,), zeros at first. The state of each parameter has a view of it, in its shape."""
        flat = self.flat
        if flat.momentum is None:
            flat.momentum = torch.zeros_like(flat.vector)
            views = [view for segment in flat.segments for view in segment.views]
            for p, x in zip(flat.params, views, strict=True):
                here = flat.momentum.as_strided(x.shape, x.stride(), x.storage_offset())
                before = self.state[p].get("momentum_buffer")
                if before is not None and before.shape == p.shape:
                    here.copy_(local(before))
                if is_dtensor(p):
                    here = as_dtensor(here, p.shape, p.device_mesh, p.placements)
                self.state[p]["momentum_buffer"] = here
        return flat.momentum

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Its columns of the window start with zeros."""
        if isinstance(param_group, dict):  # torch refuses others
            param_group = fallback.complete(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["algorithm"] != "mfac":
                fallback.strip(group, self.defaults)
            check_group(group, self._shared)
            masks = checked_masks(group["params"], group.get("sparse", False))
            sharing = find_process_group([p for _, p in self.numbered()], self.process_group)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        if "sparse" in group:
            group["sparse"] = bool(group["sparse"])
        if group is self.param_groups[0]:
            group["fisher"] = None  # torch.distributed.checkpoint must know where it will be
        for p, mask in zip(group["params"], masks, strict=True):
            if mask is not None:
                self.state[p]["mask"] = placed_as(p, mask)
        if hasattr(self, "flat"):  # otherwise this is the constructor
            if sharing is not self.flat.ranks.group:
                self._start_anew("Other processes share the window now")
            self.follow()

    def follow(self) -> None:
        """Gives columns to parameters that are trained by now. If parameters have gone, for example
        because a framework has replaced them, the window starts anew."""
        every = [group["params"] for group in self.param_groups]
        now, then = ([list(map(id, group)) for group in x] for x in (every, self._params))
        if now == then and self.flat.covers():
            return
        replace_params(self.state, [*chain(*self._params)], [*chain(*every)])
        before, params = set(map(id, self.flat.params)), self.numbered(["mfac"])
        if before <= {id(p) for _, p in params}:
            self.place([p for p in self._trained() if id(p) not in before], grow=True)
        else:
            self._start_anew("The parameters of the optimizer have changed")

    def _start_anew(self, why: str) -> None:
        if self.fisher.count:
            warn_user(f"{why}: its window starts anew")
        self._recovery.steps = 0  # of the schedule of a relative λ
        self.place(self._trained())

    @property
    def damp(self) -> float | str:
        """λ as set, or "relative:f". A change costs O(m³), at m = 1024 about as much as a step."""
        return self._recovery.given

    @damp.setter
    def damp(self, damp: float | str) -> None:
        self._recovery.catch_up(self.fisher)
        self._recovery.set_damp(self.fisher, damp)

    @property
    def damp_in_use(self) -> float:
        """λ, or the multiple of it that these gradients need."""
        return self.fisher.damp

    raised_steps = property(lambda self: self._recovery.raised_steps, doc="Steps with more damp.")
    skipped_steps = property(
        lambda self: self._recovery.skipped_steps, doc="Steps with NaN or Inf."
    )

    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer. The columns of the window are in the state of each parameter
        ("grads"), the rest is in the first group ("fisher"). Tensors are references where possible.
        If ranks have parts of one, it is a DTensor, for torch.distributed.checkpoint."""
        self._recovery.catch_up(self.fisher)
        # The first post-hook, so that other hooks see everything.
        with self.register_state_dict_post_hook(states.add_window, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of the result of `state_dict`. `ngrads`, `damp`, `window_dtype` and
        `compress` stay as constructed. If the state has others, its newest gradients enter one by
        one. Raises ValueError if it belongs to other parameters, or to another optimizer."""
        if not isinstance(state_dict, dict):
            raise ValueError(f"Expected a state dict of MFAC, got {kind(state_dict)}")
        # The last pre-hook and the first post-hook, so that other hooks see everything.
        with (
            self.register_load_state_dict_pre_hook(states.set_aside),
            self.register_load_state_dict_post_hook(states.load, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def __repr__(self) -> str:
        fisher = self.fisher
        window = f"Window (ngrads: {fisher.num_grads}, damp: {self.damp}, {fisher.dtype})"
        groups = super().__repr__().replace("    fisher: None\n", "")
        return f"{groups[:-1]}{window}\n)"

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all attributes, where torch has only defaults, state and groups, but
        no hooks, no scheduler's wrapper of `step`, and no group, which the inverse Fisher has."""
        left = [name for name in vars(self) if "hook" in name or "step" in name]
        return {k: x for k, x in vars(self).items() if k not in [*left, "process_group"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "process_group" not in vars(self):
            self.process_group = self.fisher.ranks.group


def replace_params(state: dict[Any, Any], old: list[Tensor], new: list[Tensor]) -> None:
    """Drops the state of parameters that have gone. Those in their places get their masks."""
    known, present = set(map(id, old)), set(map(id, new))
    for p, q in zip(old, new, strict=False):
        if "mask" in state.get(p, {}) and id(q) not in known and q.shape == p.shape:
            state[q]["mask"] = placed_as(q, state[p]["mask"])
    for p in [p for p in state if isinstance(p, Tensor) and id(p) not in present]:
        del state[p]
