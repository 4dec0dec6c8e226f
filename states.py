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

from checks import checked_dtype, is_number, kind
from flat import Flat
from precision import NonFiniteGradientError
from ranks import Ranks, as_dtensor, is_dtensor, local, placed_as, sharded_dim
from windows import BLOCK, Window

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["add_window", "into_fisher", "load", "of_fisher", "set_aside"]


# --- the inverse Fisher ---------------------------------------------------------------------------


def of_fisher(fisher: "DynamicInverseFisher") -> dict[str, Any]:
    """Everything a DynamicInverseFisher holds, by reference."""
    return {
        "window": [block.state for block in fisher.window.blocks],
        "count": fisher.count,
        "damp": fisher.damp,
        "precision": fisher.precision.state_dict(),
        "K": fisher.coefficients.K,
        "P": fisher.coefficients.P,
        "dtype": str(fisher.dtype).removeprefix("torch."),
        "compress": fisher.compress or 0.0,
    }


def into_fisher(
    fisher: "DynamicInverseFisher", state: Any, enter: Callable[[Tensor], Any] | None = None
) -> None:
    """Loads a copy of the result of `of_fisher`, with its λ. `enter`, by default `fisher.update`,
    is called with each gradient if the window is another. Raises ValueError if the state is not
    one, or has another number of weights."""
    with fisher.ranks.agreed():  # each may have loaded what another one saved
        dims = _checked_dims(fisher, state)
        if sum(dims) != fisher.shape[0]:
            raise ValueError(
                f"The state dict has {sum(dims)} weights, but this inverse Fisher "
                f"{fisher.shape[0]}; build it with the same weights"
            )
    window, side = fisher.window, fisher.coefficients
    saved, own = ((len(x["K"]), x["dtype"], x["compress"]) for x in (state, of_fisher(fisher)))
    fisher.precision.load_state_dict(state["precision"])
    if saved != own or not (window.separable or dims == window.dims):
        stored = [x for b in window.blocks for name, x in b.state.items() if name != "columns"]
        for tensor in (side.K, fisher.counter, *stored):
            tensor.zero_()
        side.invert(state["damp"])
        m, count = len(state["K"]), state["count"]
        for i in range(count - min(count, m, fisher.num_grads), count):
            g = torch.cat([_row(block, i % m) for block in state["window"]])
            (enter or fisher.update)(g.to(fisher.device))
        return
    start = 0
    for i, block in enumerate(state["window"]):
        if window.separable:  # blocks may divide the columns in another way
            views = window.columns(start, start := start + dims[i])
            parts = block["G"].split([view.shape[1] for view in views], 1)
            pairs: Any = zip(views, parts, strict=True)
        else:
            pairs = ((x, block[name]) for name, x in window.blocks[i].state.items())
        for x, value in pairs:
            x.copy_(value)
    fisher.counter.fill_(state["count"])
    side.K.copy_(state["K"])
    side.P.copy_(state["P"])
    side.damp = state["damp"]


def _row(block: dict[str, Tensor], j: int) -> Tensor:
    """Gradient j (d,) of a saved block."""
    if "columns" in block:
        g = torch.zeros_like(block["error"])
        return g.index_copy_(0, block["columns"][j].long(), block["values"][j].to(g.dtype))
    g = block["G"][j]
    if "scales" in block:
        g = g.float() * block["scales"][j].repeat_interleave(BLOCK)[: len(g)]
    return g


def _checked_dims(fisher: "DynamicInverseFisher", state: Any) -> list[int]:
    """The numbers of columns of the blocks. Raises ValueError if this is not a state of an inverse
    Fisher, whatever its settings."""
    with _reading():
        _check(state, {k: x for k, x in of_fisher(fisher).items() if not isinstance(x, Tensor)})
        square = torch.empty(len(state["K"]), len(state["K"]), dtype=torch.float64, device="meta")
        _check(state, {"K": square, "P": square})
        dims = [block["error" if state["compress"] else "G"].shape[-1] for block in state["window"]]
        for block, like in zip(state["window"], _blocks_like(state, dims), strict=True):
            _check(block, like)
    return dims


def _blocks_like(state: dict[str, Any], dims: list[int]) -> list[dict[str, Tensor]]:
    """The blocks of such a window with these numbers of columns, without memory."""
    meta, compress = torch.device("meta"), state["compress"] or None
    dtype = checked_dtype("dtype", state["dtype"], compress)
    window = Window(len(state["K"]), dims, [meta] * len(dims), meta, dtype, compress)
    return [block.state for block in window.blocks]


def _check(state: dict[str, Any], like: dict[str, Any]) -> None:
    """Raises ValueError unless the state has what `like` has, in its types and shapes."""
    for name, wanted in like.items():
        x = state[name]
        if isinstance(wanted, dict):
            _check(x, wanted)
        elif kind(x) != kind(wanted) or (is_number(x) and not x >= 0):
            limit, found = (" of at least 0", repr(x)) if is_number(wanted) else ("", kind(x))
            raise ValueError(
                f"The state dict is damaged: {name} must be {kind(wanted)}{limit}, got {found}"
            )


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Errors that come from a state of another structure become a ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"This state dict is not one of MFAC, or it is damaged: {type(error).__name__} {error}"
        ) from error


# --- the optimizer --------------------------------------------------------------------------------


def add_window(optimizer: Any, state: dict[str, Any]) -> None:
    """Adds the window to the result of `state_dict`, as a hook."""
    flat, fisher, window = optimizer.flat, optimizer.fisher, optimizer.fisher.window
    number = {id(p): i for i, (_, p) in enumerate(optimizer.numbered())}
    shared = {**of_fisher(fisher), **optimizer._recovery.state_dict(), "ranks": flat.ranks.size}
    shared["order"] = [[number[id(p)] for p in stage] for stage in optimizer.stages]
    blocks = shared.pop("window")
    if window.separable:
        for p, span in zip(flat.params, flat.columns, strict=True):
            views = window.columns(span.start, span.stop)
            if len(views) > 1:
                views = [torch.cat([x.to(fisher.device) for x in views], 1)]
            i = number[id(p)]
            state["state"][i] = {**state["state"][i], "grads": _to_save(flat, p, views[0])}
    else:
        shared["window"] = {
            str(i): {name: flat.ranks.as_sharded(x, x.ndim - 1) for name, x in block.items()}
            for i, block in enumerate(blocks)
        }
    state["param_groups"][0]["fisher"] = shared


def set_aside(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict from which torch loads the settings of the groups alone, as a hook. For `load`,
    the entry "aside" of its state has the rest, which torch would round to the parameters' types.
    Raises ValueError if it belongs to other parameters or to another optimizer, or is damaged."""
    with _reading():
        groups, state = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in optimizer.param_groups]:
            return state_dict  # torch refuses it
        saved, own = (
            [group.get("algorithm", "mfac") for group in x]
            for x in (groups, optimizer.param_groups)
        )
        if saved != own:
            raise ValueError(
                f"The state dict has groups of algorithm {saved}, but this optimizer {own}; build "
                "it with the saved groups"
            )
        shared, numbers = groups[0]["fisher"], [i for group in groups for i in group["params"]]
        if "window" in shared:
            shared = {**shared, "window": _own_blocks(shared, optimizer.flat.ranks)}
        _check(shared, {**optimizer._recovery.state_dict(), "ranks": 1, "order": []})
        _checked_dims(optimizer.fisher, {"window": [], **shared})
        entries = []
        for i, (_, p) in zip(numbers, optimizer.numbered(), strict=True):
            masks = {k: x for k, x in optimizer.state.get(p, {}).items() if k == "mask"}
            entries.append(masks | state.get(i, {}))
            _check_entries(p, entries[-1], shared)
    others = {key: x for key, x in state.items() if key not in numbers}
    groups = [{**groups[0], "fisher": None}, *groups[1:]]
    return {**state_dict, "state": {**others, "aside": (shared, entries)}, "param_groups": groups}


def _own_blocks(shared: dict[str, Any], ranks: Ranks) -> list[dict[str, Tensor]]:
    """The blocks of a window that was saved as a whole: this rank's parts, padded to the length of
    the longest part."""
    if shared["ranks"] != ranks.size:
        raise ValueError(
            f"The state dict has a window of {shared['ranks']} processes that is compressed or has "
            f"scales (float16, float8); load it in as many processes (here are {ranks.size}), or "
            "start a new window"
        )
    blocks = [shared["window"][str(i)] for i in range(len(shared["window"]))]
    return [{name: ranks.part(x, x.ndim - 1) for name, x in block.items()} for block in blocks]


def _check_entries(p: Tensor, entries: dict[str, Any], shared: dict[str, Any]) -> None:
    """Raises ValueError unless these can be the entries of p."""
    window = getattr(torch, shared["dtype"]), len(shared["K"])
    columns = {p.numel(), *(int(local(x).sum()) for name, x in entries.items() if name == "mask")}
    for name, x in entries.items():
        fits = x.shape == (() if name == "step" else p.shape)
        if name == "grads":
            fits = (x.dtype, len(x)) == window and x.shape[1:].numel() in columns
        if not fits:
            raise ValueError(
                f"The state dict belongs to another model: it has {name} of {kind(x)} where this "
                f"model has a parameter of shape {tuple(p.shape)}; load it into its own model"
            )


def load(optimizer: Any) -> None:
    """Loads a copy of what `set_aside` has found, as a hook."""
    shared, entries = optimizer.state.pop("aside")
    params = [p for _, p in optimizer.numbered()]
    saved = {id(p): found for p, found in zip(params, entries, strict=True)}
    for p in params:
        own = {k: placed_as(p, x) for k, x in saved[id(p)].items() if k != "grads"}
        if own.keys() >= {"mask", "momentum_buffer"}:
            own["momentum_buffer"] *= own["mask"]  # the state may be from before the mask
        if own:
            optimizer.state[p] = own
    # torch.distributed.checkpoint may lack columns, or number the parameters in another order.
    whole, known = "window" in shared, {i for stage in shared["order"] for i in stage}
    present = [i for i, found in enumerate(entries) if whole or "grads" in found]
    stages = [[params[i] for i in stage if i in present] for stage in shared["order"]]
    if others := [params[i] for i in present if i not in known and not whole]:
        stages.append(others)
    for number, stage in enumerate(stages):
        optimizer.place(stage, grow=number > 0)
    flat, fisher, recovery = optimizer.flat, optimizer.fisher, optimizer._recovery
    blocks = shared.get("window")
    if not whole:
        blocks = [{"G": _from_saved(flat, p, saved[id(p)])} for p in flat.params]
    elif flat.ranks.size > 1:  # without padding
        pairs = zip(shared["window"], _blocks_like(shared, fisher.window.dims), strict=False)
        blocks = [{k: block[k][..., : x.shape[-1]] for k, x in own.items()} for block, own in pairs]

    def enter(g: Tensor) -> None:
        with contextlib.suppress(NonFiniteGradientError):
            fisher.update(g)

    into_fisher(fisher, {**shared, "window": blocks}, enter)
    if not known <= set(present):
        fisher.precision.invert(fisher.damp, anew=True)
    if flat.ranks.size > 1:
        _check_ranks(fisher)
    optimizer.follow()  # what is trained besides gets columns
    recovery.load_state_dict(shared, fisher)


def _to_save(flat: Flat, p: Tensor, G: Tensor) -> Tensor:
    """The columns G (m, ·) of p as (m, trained weights), or (m, *shape) if p is sharded."""
    dim, mask, here = sharded_dim(p), flat.mask(p), local(p)
    if dim is None:
        return flat.ranks.as_sharded(G, 1, p.numel() if mask is None else int(mask.sum()))
    if mask is not None:
        index = local(mask).flatten().nonzero()[:, 0]
        G = G.new_zeros(len(G), here.numel()).index_copy_(1, index, G)
    from torch.distributed.tensor import Shard

    placements = [Shard(dim + 1) if x.is_shard() else x for x in cast(Any, p).placements]
    shape, mesh = (len(G), *p.shape), cast(Any, p).device_mesh
    return as_dtensor(G.reshape(len(G), *here.shape), shape, mesh, placements)


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
        G = flat.ranks.part(G.view(len(G), *p.shape), dim + 1).flatten(1)
    if mask is not None and G.shape[1] == local(p).numel():
        G = G[:, local(mask).flatten().to(G.device)]
    return flat.ranks.part(G, 1) if dim is None else G


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
