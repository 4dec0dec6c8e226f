"""Saves and loads the states of an inverse Fisher and of an optimizer.

A state of the same window is copied, with the same bits. If it has another number of gradients,
another type or another compression, its newest gradients enter the window one after the other, as
many as fit.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from checks import check_damp, check_integer, checked_dtype, is_real, kind
from fallback import SETTINGS, restore
from flat import Flat
from precision import DampTooSmallError
from ranks import as_dtensor, is_dtensor, local, placed_as, sharded_dim
from windows import BLOCK, SCALED

if TYPE_CHECKING:
    from optim import DynamicInverseFisher
    from parameter_groups import GroupedOptimizer

__all__ = [
    "add_window",
    "into_fisher",
    "into_optimizer",
    "of_fisher",
]


# --- the inverse Fisher ---------------------------------------------------------------------------


def of_fisher(fisher: "DynamicInverseFisher") -> dict[str, Any]:
    """Everything a DynamicInverseFisher holds, by reference."""
    side = fisher.coefficients
    return {
        "window": [block.state for block in fisher.window.blocks],
        "dims": fisher.window.dims,
        "count": fisher.count,
        "damp": fisher.damp,
        "exact": fisher.precision.exact,
        "precision": fisher.precision.state_dict(),
        "K": side.K,
        "P": side.P,
        "dtype": str(fisher.dtype).removeprefix("torch."),
        "compress": fisher.compress or 0.0,
    }


def into_fisher(
    fisher: "DynamicInverseFisher",
    state: Any,
    update: Callable[[Tensor], Any] | None = None,
    complete: bool = True,
) -> None:
    """Loads a copy of the result of `of_fisher`.

    Args:
        fisher: the inverse Fisher to load into.
        state: the state to load.
        update: called with each gradient if the window is another; by default `fisher.update`.
        complete: whether K includes all columns; otherwise it is recomputed.

    Raises:
        ValueError: it is not such a state, or it has another number of weights.
    """
    with fisher.ranks.agreed():  # each may have loaded what another one saved
        _check_shared(state)
        m, dtype = len(state["K"]), getattr(torch, state["dtype"])
        compress = state["compress"] or None
        dims = [_checked_block(block, m, dtype, compress) for block in state["window"]]
        if sum(dims) != fisher.shape[0]:
            raise ValueError(
                f"The state dict has {sum(dims)} weights, but this inverse Fisher "
                f"{fisher.shape[0]}; build it with the same weights"
            )
    separable = compress is None and dtype not in SCALED
    same = (m, dtype, compress) == (fisher.num_grads, fisher.dtype, fisher.compress)
    side, precision = fisher.coefficients, fisher.precision
    precision.forget()
    if same and sum(state["dims"]) == sum(dims):
        fisher.window.divide(state["dims"])  # for the same rounding of sums over blocks
    if not (same and (separable or dims == fisher.window.dims)):
        for tensor in (side.K, fisher.counter, *_stored(fisher)):
            tensor.zero_()
        side.invert(fisher.damp)
        for j in _newest(state["count"], m, fisher.num_grads):
            g = torch.cat([_row(block, j, dtype, compress) for block in state["window"]])
            (update or fisher.update)(g.to(fisher.device))
        return
    if separable:
        start = 0
        for block in state["window"]:
            views = fisher.window.columns(start, start := start + block["G"].shape[1])
            parts = block["G"].split([view.shape[1] for view in views], 1)
            for view, part in zip(views, parts, strict=True):
                view.copy_(part)
    else:
        for mine, block in zip(fisher.window.blocks, state["window"], strict=True):
            for name, tensor in mine.state.items():
                tensor.copy_(block[name])
    fisher.counter.fill_(state["count"])
    precision.exact = precision.always_exact or state["exact"]
    precision.load_state_dict(state["precision"])
    side.K.copy_(state["K"])
    side.P.copy_(state["P"])
    wanted, side.damp = fisher.damp, float(state["damp"])
    if not complete:
        precision.invert(side.damp, anew=True)
    if wanted != side.damp:
        precision.set_damp(wanted)


def _stored(fisher: "DynamicInverseFisher") -> Iterator[Tensor]:
    """All numbers of the window. Columns of a compressed one are none."""
    for block in fisher.window.blocks:
        yield from (tensor for name, tensor in block.state.items() if name != "columns")


def _newest(count: int, saved: int, wanted: int) -> list[int]:
    """The rows of the newest gradients in a ring of `saved` rows, oldest first."""
    return [j % saved for j in range(count - min(count, saved, wanted), count)]


def _row(block: dict[str, Tensor], j: int, dtype: torch.dtype, compress: float | None) -> Tensor:
    """Gradient j (d,) of a saved block."""
    if compress is not None:
        g = torch.zeros_like(block["error"])
        return g.index_copy_(0, block["columns"][j].long(), block["values"][j].to(g.dtype))
    if dtype not in SCALED:
        return block["G"][j]
    return (
        block["G"][j].float() * block["scales"][j].repeat_interleave(BLOCK)[: block["G"].shape[1]]
    )


def _check_shared(state: Any) -> None:
    names = ("window", "dims", "count", "damp", "exact", "precision", "K", "P", "dtype", "compress")
    if not (isinstance(state, dict) and all(name in state for name in names)):
        found = list(state) if isinstance(state, dict) else kind(state)
        raise ValueError(f"Expected a state dict with {list(names)}, got {found}")
    check_integer("count", state["count"], least=0)
    check_damp(state["damp"])
    checked_dtype("dtype", state["dtype"], state["compress"] or None)
    K, P = state["K"], state["P"]
    square = is_real(K) and is_real(P) and K.ndim == 2 and K.shape == K.T.shape == P.shape
    if not (square and len(K) and bool(K.isfinite().all()) and isinstance(state["exact"], bool)):
        raise ValueError(
            "The state dict is damaged: K must be a finite square matrix, and P of the same shape"
        )
    if not (isinstance(state["window"], list) and isinstance(state["dims"], list)):
        raise ValueError("The state dict is damaged: its window must be a list of blocks")
    for dim in state["dims"]:
        check_integer("dims", dim, least=0)
    numbers = state["precision"].values() if isinstance(state["precision"], dict) else [None]
    if not all(isinstance(x, float) and x >= 0 for x in numbers):
        raise ValueError("The state dict is damaged: its precision must be numbers of at least 0")


def _checked_block(block: Any, m: int, dtype: torch.dtype, compress: float | None) -> int:
    """The number of columns of a saved block of m gradients."""
    wanted = {"G": (dtype, 2)}
    if compress is not None:
        real = torch.promote_types(dtype, torch.float32)
        wanted = {"error": (real, 1), "columns": (torch.int32, 2), "values": (dtype, 2)}
    elif dtype in SCALED:
        wanted["scales"] = (torch.float32, 2)
    parts: dict[str, Any] = block if isinstance(block, dict) else {}
    fits = all(
        isinstance(x := parts.get(name), Tensor)
        and (x.layout, x.dtype, x.ndim) == (torch.strided, *kind)
        and (x.ndim == 1 or len(x) == m)
        for name, kind in wanted.items()
    )
    d = parts[next(iter(wanted))].shape[-1] if fits else 0
    if fits and compress is not None:
        columns = parts["columns"]
        fits = columns.shape == parts["values"].shape and bool(
            ((columns >= 0) & (columns < d)).all()
        )
    elif fits and dtype in SCALED:
        fits = parts["scales"].shape[1] == -(-d // BLOCK)
    if not fits:
        raise ValueError(f"The state dict is damaged: its window must have {m} rows of {dtype}")
    return d


# --- the optimizer --------------------------------------------------------------------------------


def add_window(optimizer: Any, state: dict[str, Any]) -> None:
    """Adds the window to the result of `state_dict`: a hook of a `GroupedOptimizer`."""
    flat, fisher = optimizer.flat, optimizer.fisher
    shared = of_fisher(fisher)
    blocks = shared.pop("window")
    numbers = {id(p): i for i, (_, p) in enumerate(optimizer.numbered())}
    order = [numbers[id(p)] for p in flat.params]  # of the columns
    if fisher.window.separable:
        none = fisher.window.blocks[0].G[:, :0]
        for i, p, span in zip(order, flat.params, flat.columns, strict=True):
            views = fisher.window.columns(span.start, span.stop)
            if len(views) > 1:
                views = [torch.cat([x.to(fisher.device) for x in [none, *views]], 1)]
            state["state"][i] = {**state["state"][i], "grads": _to_save(flat, p, views[0])}
    else:
        shared["window"] = {
            str(i): {name: flat.ranks.as_saved(x, x.ndim - 1) for name, x in block.items()}
            for i, block in enumerate(blocks)
        }
    shared |= {"order": order, "ranks": flat.ranks.size, "wanted_damp": optimizer.damp}
    state["param_groups"][0]["fisher"] = shared | optimizer._recovery.state_dict()


def into_optimizer(
    optimizer: "GroupedOptimizer",
    state_dict: dict[str, Any],
    load: Callable[[dict[str, Any]], None],
) -> None:
    """Loads a copy of a state with a window, before and after `load`.

    Raises:
        ValueError: it belongs to other parameters, or to another optimizer.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"Expected a state dict of MFAC, got {kind(state_dict)}")
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"This state dict is not one of MFAC: it has only {list(state_dict)}")
    params = [p for _, p in optimizer.numbered()]
    saved: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    masks = [optimizer.state[p].get("mask") for p in params]

    def take(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hides entries from the base class, which would round them to the parameters' types."""
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in optimizer.param_groups]:
            return state_dict  # the base class refuses it
        first, *others = groups
        if not isinstance(first.get("fisher"), dict):
            raise ValueError("This state dict is not one of MFAC: its first group has no 'fisher'")
        for group, own in zip(groups, optimizer.param_groups, strict=True):
            if (was := group.get("algorithm", "mfac")) != own["algorithm"]:
                raise ValueError(
                    f"The state dict has a group of algorithm {was!r}, but this optimizer has "
                    f"{own['algorithm']!r} there; build the optimizer with the saved groups"
                )
        shared.update(first["fisher"])
        ids = [i for group in groups for i in group["params"]]
        saved.extend(state_dict["state"].get(i, {}) for i in ids)
        # Check as much as possible before anything changes.
        _check_parameters(params, saved, shared)
        optimizer._recovery.load_state_dict(shared)
        rest = {key: v for key, v in state_dict["state"].items() if key not in ids}
        first = {**first, "fisher": None}
        return {**state_dict, "state": rest, "param_groups": [first, *others]}

    def put(_: torch.optim.Optimizer) -> None:
        for p, entries, mask in zip(params, saved, masks, strict=True):
            mask = entries.get("mask", mask)
            if mask is not None:
                optimizer.state[p]["mask"] = placed_as(p, mask)
        order, whole = shared["order"], "window" in shared
        if not whole:  # torch.distributed.checkpoint may have dropped some, or be another's
            place = {number: i for i, number in enumerate(order)}
            order = [i for i, entries in enumerate(saved) if "grads" in entries]
            order.sort(key=lambda i: place.get(i, len(place)))
        optimizer.build([params[i] for i in order])
        flat, fisher = optimizer.flat, optimizer.fisher
        entries_of = {id(p): found for p, found in zip(params, saved, strict=True)}
        if whole:
            blocks = _own_blocks(fisher, shared)
        else:
            blocks = [{"G": _from_saved(flat, p, entries_of[id(p)])} for p in flat.params]

        def update(g: Tensor) -> None:
            optimizer._recovery.update_matvec(fisher, g)

        if shared.get("wanted_damp") == optimizer.damp:  # the state may use a multiple of it
            fisher.coefficients.damp = shared["damp"]
        with contextlib.suppress(DampTooSmallError):  # then the λ of the state stays
            complete = len(order) == len(shared["order"])
            into_fisher(fisher, {**shared, "window": blocks}, update, complete)
        optimizer._recovery.load_state_dict(shared)  # not as `update` left it
        if flat.ranks.size > 1:
            _check_ranks(fisher)
        optimizer.follow()  # what is trained besides gets columns
        optimizer.name_state()
        if shared.get("wanted_damp") != optimizer.damp:  # a relative λ is that of this window
            with contextlib.suppress(DampTooSmallError):
                optimizer.damp = optimizer.damp
        for i, p in optimizer.numbered(SETTINGS):
            if entries_of[id(p)]:
                restore(optimizer.param_groups[i], p, optimizer.state, entries_of[id(p)])
        for p in optimizer.flat.params:
            if "momentum_buffer" in entries_of[id(p)]:
                optimizer.velocity()
                value = placed_as(p, entries_of[id(p)]["momentum_buffer"])
                if (mask := flat.mask(p)) is not None:
                    value *= mask  # the state may be from before the mask
                local(optimizer.state[p]["momentum_buffer"]).copy_(local(value))

    # The last pre-hook and the first post-hook, so that other hooks see everything.
    with (
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(put, prepend=True),
    ):
        load(state_dict)


def _to_save(flat: Flat, p: Tensor, G: Tensor) -> Tensor:
    """The columns G (m, ·) of p as (m, trained weights), or (m, *shape) if p is sharded."""
    dim, mask, here = sharded_dim(p), flat.mask(p), local(p)
    if dim is None:
        return flat.ranks.as_saved(G, 1, p.numel() if mask is None else int(mask.sum()))
    if mask is not None:
        index = local(mask).flatten().nonzero()[:, 0]
        G = G.new_zeros(len(G), here.numel()).index_copy_(1, index, G)
    from torch.distributed.tensor import Shard

    placements = [Shard(dim + 1) if x.is_shard() else x for x in cast(Any, p).placements]
    shape, mesh = (len(G), *p.shape), cast(Any, p).device_mesh
    return as_dtensor(G.reshape(len(G), *here.shape), shape, mesh, placements)


def _own_blocks(fisher: "DynamicInverseFisher", shared: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The blocks of a window that was saved as a whole. If ranks share it, this rank's part without
    the padding that makes all parts equally long."""
    ranks, window = fisher.ranks, shared["window"]
    blocks = [window[str(i)] for i in range(len(window))]
    if ranks.size == shared["ranks"] == 1:
        return blocks
    saved = len(shared["K"]), shared["dtype"], shared["compress"], shared["ranks"], len(blocks)
    own = of_fisher(fisher)
    if saved != (len(own["K"]), own["dtype"], own["compress"], ranks.size, len(own["window"])):
        raise ValueError(
            f"The state dict has a shared window of {shared['ranks']} processes that is compressed "
            "or has scales (float16, float8); load it in as many processes, with the same ngrads, "
            "window_dtype and compress and the same layers trained, or start a new window"
        )
    return [
        {name: ranks.own(block[name], x.ndim - 1)[..., : x.shape[-1]] for name, x in mine.items()}
        for mine, block in zip(own["window"], blocks, strict=True)
    ]


def _from_saved(flat: Flat, p: Tensor, entries: dict[str, Any]) -> Tensor:
    """The columns (m, ·) of p in this process, from the results of `_to_save` in all processes."""
    grads, dim, mask = entries["grads"], sharded_dim(p), flat.mask(p)
    G = local(grads).flatten(1)
    if dim is None and is_dtensor(grads):
        return G
    if dim is not None and not is_dtensor(grads):
        if G.shape[1] != p.numel():
            index = entries["mask"].flatten().nonzero()[:, 0]
            G = G.new_zeros(len(G), p.numel()).index_copy_(1, index, G)
        G = flat.ranks.own(G.view(len(G), *p.shape), dim + 1).flatten(1)
    if mask is not None and G.shape[1] == local(p).numel():
        G = G[:, local(mask).flatten().to(G.device)]
    return flat.ranks.part(G, 1) if dim is None else G


def _check_parameters(
    params: list[Tensor], saved: list[dict[str, Any]], shared: dict[str, Any]
) -> None:
    """Raises ValueError if the saved entries belong to other parameters or are damaged."""
    _check_shared({**shared, "window": []})
    order = shared.get("order")
    if not isinstance(order, list):
        raise ValueError(f"The state dict is damaged: its order must be a list, got {kind(order)}")
    numbers = {check_integer("order", i, least=0) for i in order}
    if "window" in shared and not numbers <= set(range(len(params))):
        raise ValueError("The state dict belongs to another model, with more parameters")
    m, dtype = len(shared["K"]), getattr(torch, shared["dtype"])
    for block in shared.get("window", {}).values():
        parts = {name: local(x) for name, x in block.items()}
        _checked_block(parts, m, dtype, shared["compress"] or None)
    for p, entries in zip(params, saved, strict=True):
        if not all(isinstance(value, Tensor) for value in entries.values()):
            raise ValueError(f"The state dict is damaged: not all of {list(entries)} are tensors")
        shapes = [tuple(x.shape) for name, x in entries.items() if name not in ("grads", "step")]
        grads, weights = entries.get("grads"), p.numel()
        if grads is not None and (len(grads) != m or grads.dtype != dtype):
            raise ValueError(f"The state dict is damaged: its window must have {m} rows of {dtype}")
        if "mask" in entries and sharded_dim(entries["mask"]) is None:
            weights = int(local(entries["mask"]).sum())
        columns = weights if grads is None else grads.shape[1:].numel()
        if any(shape != p.shape for shape in shapes) or columns not in (weights, p.numel()):
            raise ValueError(
                f"The state dict belongs to another model: it has {columns} weights {shapes}, but "
                f"this model a parameter of shape {tuple(p.shape)}; load it into its own model"
            )


def _check_ranks(fisher: "DynamicInverseFisher") -> None:
    """Raises ValueError if K does not belong to this window, for example because each process has
    loaded the state of one of them."""
    squares = torch.stack([tile.square().sum(1) for tile in fisher.window.tiles()]).sum(0)
    found, expected = fisher.ranks.sum(squares), fisher.coefficients.K.diagonal()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-30):
        raise ValueError(
            "The window does not belong to the state dict; load in each process the state that it "
            "saved itself, or a complete one, as from full_state_dict=True"
        )
