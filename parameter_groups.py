"""What torch expects of any optimizer, for groups that share a window: groups are added and
changed, parameters are frozen and replaced, states are saved and loaded.
"""

from collections import ChainMap
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import fallback
import states
from checks import check_group, checked_masks, kind
from flat import Flat, is_trained
from ranks import Ranks, as_dtensor, find_process_group, is_dtensor, local, placed_as
from recovery import Recovery, warn_user

__all__ = ["GroupedOptimizer"]

ALGORITHMS = ("mfac", *fallback.SETTINGS)


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimizer whose trained parameters are the vector `flat`, with columns in `fisher`, which
    a subclass makes in `build`. `shared` are the settings that all groups share."""

    flat: Flat
    fisher: Any
    _recovery: Recovery
    _settings: dict[str, Any]  # how to make `fisher`
    _seen: Any = None  # what the layout was made for; None: it must be made anew
    _waiting: list[Tensor]  # parameters without columns, until they are trained

    def __init__(
        self, params: Any, defaults: dict[str, Any], shared: dict[str, Any], process_group: Any
    ):
        self._shared, self.process_group = shared, process_group
        self._params: list[Tensor] = []  # of all groups, when the layout was made
        # Parameters with columns, and their shapes, for each time the window has grown.
        self.stages: list[dict[Tensor, torch.Size]] = []
        super().__init__(params, defaults)
        # Masks belong to the parameters given now, not to groups that are added later.
        self.defaults["sparse"] = defaults["sparse"] is True
        self.follow()

    def build(self, dim: int, device: torch.device, group: Any) -> None:
        """Makes an empty `fisher` of `dim` columns, which the processes of a group share."""
        raise NotImplementedError

    def follow(self) -> None:
        """Gives columns to parameters that are trained by now. If parameters have gone, for example
        because a framework has replaced them, the window starts anew. Raises ValueError if one has
        got another shape, or if the window does not fit in memory; the next call tries again."""
        every = [group["params"] for group in self.param_groups]
        seen = [[*map(id, x)] for x in every], [(p.dtype, p.shape) for x in every for p in x]
        if (
            seen == self._seen
            and not any(map(is_trained, self._waiting))
            and all(x.params[0].device == x.update.device for x in self.flat.segments)
        ):
            return
        groups, placed = self.groups_of(["mfac"]), ChainMap(*self.stages)
        self._replace_params()
        group = find_process_group([*self.groups_of()], self.process_group)
        if placed and (placed.keys() - groups or group is not self.fisher.ranks.group):
            if self.fisher.count:
                warn_user("The parameters of the optimizer have changed: its window starts anew")
            self._recovery.steps = 0  # of the schedule of a relative λ
            self.place_anew([])  # frees the old window before the new one is made
            placed = ChainMap()
        for p, shape in placed.items():
            if p.shape != shape:
                raise ValueError(
                    f"A parameter of group {groups[p]} has shape {tuple(p.shape)}, but had shape "
                    f"{tuple(shape)} when it got its place in the window; build the optimizer anew "
                    "after layers have been replaced or resized"
                )
        others = [p for p in groups if p not in placed]
        self.place([p for p in others if is_trained(p)])
        self._seen, self._waiting = seen, [p for p in others if not is_trained(p)]

    def _replace_params(self) -> None:
        """Drops the state of parameters that have gone, but hands masks on to their successors."""
        old, new = self._params, [*self.groups_of()]
        for p, q in zip(old, new, strict=False):
            if "mask" in self.state.get(p, {}) and q not in {*old} and q.shape == p.shape:
                self.state[q]["mask"] = placed_as(q, self.state[p]["mask"])
        for p in {*old} - {*new}:
            self.state.pop(p, None)
        self._params = new

    def place_anew(self, stages: Iterable[list[Tensor]]) -> None:
        """Replaces the window by an empty one with columns for these parameters."""
        self.stages, self._seen = [], None
        for p in self.groups_of():
            self.state.get(p, {}).pop("grads", None)  # which `place` announces anew
        for stage in ([], *stages):
            self.place(stage)

    def place(self, params: list[Tensor]) -> None:
        """Gives columns to these parameters, after those of `stages`."""
        stages = [*self.stages, {p: p.shape for p in params}]
        flat = self.lay_out([*chain(*stages)], self.state)
        if not self.stages:
            self.build(flat.size, flat.vector.device, flat.ranks.group)
        elif params:
            self.fisher.grow(flat.size - self.fisher.shape[0])
        self.flat, self.stages = flat, [*filter(None, stages)]
        # torch.distributed.checkpoint looks up here which names `state_dict` will have.
        for p in flat.params if self.fisher.window.separable else []:
            self.state[p]["grads"] = None
        momentum = any(self.param_groups[i]["momentum"] for i in self.groups_of(["mfac"]).values())
        if momentum or any("momentum_buffer" in self.state[p] for p in flat.params):
            self.velocity()
        for p, i in self.groups_of(fallback.SETTINGS).items():
            if is_trained(p):
                fallback.prepare(self.param_groups[i], p, self.state)

    def lay_out(self, params: list[Tensor], state: dict[Any, Any]) -> Flat:
        """The vector of these parameters, with the masks in `state`."""
        groups, settings = self.groups_of(["mfac"]), self._settings
        ranks = Ranks(find_process_group([*self.groups_of()], self.process_group))
        device = settings["device"] or next((p.device for p in groups), torch.device("cpu"))
        device = self.fisher.device if self.stages else device
        dtype = torch.float64 if settings["dtype"] == torch.float64 else torch.float32
        masks = [state.get(p, {}).get("mask") for p in params]
        return Flat([(groups[p], p) for p in params], masks, ranks, device, dtype)

    def groups_of(self, algorithms: Collection[str] = ALGORITHMS) -> dict[Tensor, int]:
        """The parameters in groups of these algorithms, each with the number of its group."""
        groups = [(i, g) for i, g in enumerate(self.param_groups) if g["algorithm"] in algorithms]
        return {p: i for i, group in groups for p in group["params"]}

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
            find_process_group([*self.groups_of()], self.process_group)
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
            self.follow()

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
        ("grads"), the rest is in the first group ("fisher"). Tensors are references where possible,
        and DTensors where ranks have parts of them, for torch.distributed.checkpoint."""
        with suppress(ValueError):  # the next step raises it again, and the window is empty
            self.follow()
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
        self.follow()
        # The last pre-hook and the first post-hook, so that other hooks see everything.
        with (
            self.register_load_state_dict_pre_hook(states.read),
            self.register_load_state_dict_post_hook(states.load, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def __repr__(self) -> str:
        fisher = self.fisher
        window = f"Window (ngrads: {fisher.num_grads}, damp: {self.damp}, {fisher.dtype})"
        groups = super().__repr__().replace("    fisher: None\n", "")
        return f"{groups[:-1]}{window}\n)"

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle. torch keeps defaults, state and groups; this keeps all but hooks, a
        scheduler's wrapper of `step`, `flat` (copies would lose its views), and the process group
        (`fisher` has it)."""
        left = [name for name in vars(self) if "hook" in name or "step" in name]
        left += ["process_group", "flat", "_seen"]
        return {k: x for k, x in vars(self).items() if k not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "flat" not in vars(self):  # this is a copy
            self.process_group = self.fisher.ranks.group
            self.follow()
