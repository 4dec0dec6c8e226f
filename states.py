"""Saves and loads the states of an inverse Fisher and of an optimizer.

A state of the same window is copied, with the same bits. If it has another number of gradients,
another type or another compression, its newest gradients enter the window one after the other, as
many as fit. Everything is read and checked before anything changes.
"""

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from checks import checked_dtype, is_number, kind
from precision import NonFiniteGradientError
from ranks import Ranks, as_dtensor, is_dtensor, local, placed_as, sharded_dim
from windows import Window

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["add_window", "into_fisher", "load", "of_fisher", "read"]

REFUSAL = "This state dict is not one of MFAC, belongs to another model, or is damaged: "


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


def into_fisher(fisher: "DynamicInverseFisher", state: Any) -> None:
    """Loads a copy of the result of `of_fisher`, with its λ. Raises ValueError if the state is not
    one, or has another number of weights."""
    with fisher.ranks.agreed(), _reading():  # ranks may have been given different states
        dims = [next(iter(block.values())).shape[-1] for block in state["window"]]
        saved = _saved_window(fisher, state, dims, fisher.shape[0])
    _fill(fisher, state, saved)


def _saved_window(fisher: Any, state: dict[str, Any], dims: list[int], dim: int) -> Window:
    """The window of a state, by reference, whose blocks have `dims` columns. Raises ValueError if
    this is not a state of an inverse Fisher of `dim` weights, whatever its settings."""
    m, compress, meta = len(state["K"]), state["compress"] or None, torch.device("meta")
    square = torch.empty(m, m, dtype=torch.float64, device=meta)
    _check(state, {**of_fisher(fisher), "K": square, "P": square})
    dtype = checked_dtype("dtype", state["dtype"], compress)
    window = Window(m, dims, [meta] * len(dims), fisher.device, dtype, compress)
    for block, found in zip(window.blocks, state["window"], strict=True):
        if not window.separable:  # parts of several ranks are padded to the longest one
            found = {name: found[name][..., : x.shape[-1]] for name, x in block.state.items()}
        _check(found, block.state)
        vars(block).update(found, state=found)  # in place of tensors on "meta"
    if sum(dims) != dim:
        raise ValueError(
            f"The state dict has {sum(dims)} weights, but this inverse Fisher {dim}; build it with "
            "the same weights"
        )
    return window


def _fill(fisher: "DynamicInverseFisher", state: dict[str, Any], saved: Window) -> None:
    """Copies a state. If its window, `saved`, has another size or type, its newest rows enter."""
    window, side, start = fisher.window, fisher.coefficients, 0
    fisher.precision.load_state_dict(state["precision"])
    same = all(getattr(window, name) == getattr(saved, name) for name in ("m", "dtype", "compress"))
    if not same or not (window.separable or window.dims == saved.dims):
        stored = [x for b in window.blocks for name, x in b.state.items() if name != "columns"]
        for tensor in (side.K, fisher.counter, *stored):
            tensor.zero_()
        side.invert(state["damp"])
        count = state["count"]
        for i in range(count - min(count, saved.m, window.m), count):
            row = saved.tiles(slice(i % saved.m, i % saved.m + 1))
            with contextlib.suppress(NonFiniteGradientError):
                fisher.update(torch.cat([*row], 1)[0])
        return
    for i, block in enumerate(saved.blocks):
        if window.separable:  # blocks may divide the columns in other ways
            own = window.columns(start, start := start + block.dim)
            parts = block.G.split([x.shape[1] for x in own], 1)
        else:
            own, parts = ([*b.state.values()] for b in (window.blocks[i], block))
        for x, part in zip(own, parts, strict=True):
            x.copy_(part)
    fisher.counter.fill_(state["count"])
    side.K.copy_(state["K"])
    side.P.copy_(state["P"])
    side.damp = state["damp"]


def _check(state: dict[str, Any], like: dict[str, Any]) -> None:
    """Raises ValueError unless the state has what `like` has, in its types and shapes."""
    for name, wanted in like.items():
        x = state[name]
        if isinstance(wanted, dict):
            _check(x, wanted)
        elif kind(x) != kind(wanted) or (is_number(x) and not x >= 0):
            limit, found = (" of at least 0", repr(x)) if is_number(wanted) else ("", kind(x))
            raise ValueError(f"{REFUSAL}{name} must be {kind(wanted)}{limit}, got {found}")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Errors that come from a state of another structure become a ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{REFUSAL}{type(error).__name__} {error}") from error


# --- the optimizer --------------------------------------------------------------------------------


def add_window(optimizer: Any, state: dict[str, Any]) -> None:
    """Adds the window to the result of `state_dict`, as a hook."""
    flat, fisher, window = optimizer.flat, optimizer.fisher, optimizer.fisher.window
    ranks, number = flat.ranks, _numbers(optimizer, state)
    place = {p: i for i, p in enumerate(optimizer.groups_of())}
    shared = {**of_fisher(fisher), **optimizer._recovery.state_dict()}
    shared["order"] = [[place[p] for p in stage] for stage in optimizer.stages]
    blocks = shared.pop("window")
    if window.separable:
        for p, span in zip(flat.params, flat.columns, strict=True):
            G, *others = window.columns(span.start, span.stop)
            if others:
                G = torch.cat([x.to(fisher.device) for x in (G, *others)], 1)
            entries = state["state"][number[p]]
            state["state"][number[p]] = {**entries, "grads": _to_save(ranks, p, entries, G)}
    else:
        dims = torch.tensor([window.dims], device=fisher.device)
        shared["dims"] = ranks.as_sharded(dims, 0, ranks.size)
        shared["window"] = {
            str(i): {name: ranks.as_sharded(x, x.ndim - 1) for name, x in block.items()}
            for i, block in enumerate(blocks)
        }
    state["param_groups"][0]["fisher"] = shared


def _numbers(optimizer: Any, state_dict: dict[str, Any]) -> dict[Tensor, Any]:
    """The parameters with their numbers, or names, in a state dict."""
    both = optimizer.param_groups, state_dict["param_groups"]
    params, numbers = ([x for group in groups for x in group["params"]] for groups in both)
    return dict(zip(params, numbers, strict=True))


def read(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict from which torch loads the settings of the groups alone, as a hook. For `load`,
    the entry "aside" of its state has the rest, which torch would round to the parameters' types.
    Raises ValueError if it belongs to other parameters or to another optimizer, or is damaged."""
    fisher, ranks, own = optimizer.fisher, optimizer.flat.ranks, optimizer.param_groups
    with ranks.agreed(), _reading():
        groups, state = state_dict["param_groups"], state_dict["state"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
            return state_dict  # torch refuses it
        saved, here = ([group.get("algorithm", "mfac") for group in x] for x in (groups, own))
        if saved != here:
            raise ValueError(f"{REFUSAL}it has groups of algorithm {saved}, this optimizer {here}")
        shared, numbers = groups[0]["fisher"], _numbers(optimizer, state_dict)
        _check(shared, {**optimizer._recovery.state_dict(), "order": []})
        params, pairs = [*numbers], [(p, state.get(i, {})) for p, i in numbers.items()]
        entries = {p: _own_entries(p, optimizer.state.get(p, {}), x) for p, x in pairs}
        # torch.distributed.checkpoint may lack columns, or number the parameters in another order.
        whole, order = "window" in shared, [[params[i] for i in stage] for stage in shared["order"]]
        grads, placed = {p: x for p, x in pairs if "grads" in x}, {*chain(*order)}
        stages = [[p for p in stage if whole or p in grads] for stage in order]
        stages.append([p for p in grads if p not in placed])
        flat = optimizer.lay_out([*chain(*stages)], entries)
        if whole:
            dims, blocks = _own_blocks(ranks, shared)
        else:
            dims = [span.stop - span.start for span in flat.columns]
            blocks = [{"G": _from_saved(ranks, p, grads[p], entries[p])} for p in flat.params]
        shared = {**shared, "window": blocks}
        window = _saved_window(fisher, shared, dims, flat.size)
    complete = whole or placed <= grads.keys()
    if complete and ranks.size > 1:
        _check_ranks(ranks, window, shared["K"])
    others = {key: state[key] for key in state.keys() - {*numbers.values()}}
    groups = [{**groups[0], "fisher": None}, *groups[1:]]
    aside = shared, window, entries, stages, complete
    return {**state_dict, "state": {**others, "aside": aside}, "param_groups": groups}


def load(optimizer: Any) -> None:
    """Loads a copy of what `read` has found, as a hook."""
    shared, window, entries, stages, complete = optimizer.state.pop("aside")
    optimizer.state.update({p: found for p, found in entries.items() if found})
    optimizer.place_anew(filter(None, stages))
    _fill(optimizer.fisher, shared, window)
    if not complete:  # K has parts of columns that are not there
        optimizer.fisher.precision.invert(optimizer.fisher.damp, anew=True)
    optimizer.follow()  # what is trained besides gets columns
    optimizer._recovery.load_state_dict(shared, optimizer.fisher)


def _own_entries(p: Tensor, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A copy, on the device of p, of its entries in a state but for columns. If the state has no
    mask, its `own` one stays."""
    n, mask = p.numel(), saved.get("mask")
    for name, x in saved.items():
        fits = x.shape == (() if name == "step" else p.shape)
        if name == "grads":  # (m, ·), of all weights or of those that are trained
            fits = x.shape[1:].numel() in (n, n if mask is None else int(local(mask).sum()))
        if not fits:
            raise ValueError(f"{REFUSAL}{name} is {kind(x)}, the parameter {kind(p)}")
    masks = {name: x for name, x in own.items() if name == "mask"}
    found = {name: placed_as(p, x) for name, x in (masks | saved).items() if name != "grads"}
    if found.keys() >= {"mask", "momentum_buffer"}:
        found["momentum_buffer"] *= found["mask"]  # the state may be from before the mask
    return found


def _own_blocks(ranks: Ranks, shared: dict[str, Any]) -> tuple[list[int], list[dict[str, Tensor]]]:
    """The columns of each block of a window that was saved as a whole, and this rank's parts."""
    size = len(shared["dims"])
    if size != ranks.size:
        raise ValueError(
            f"The state dict has a window that is compressed or has scales, of {size} processes; "
            f"load it in as many, not {ranks.size}, or start a new window"
        )
    dims = ranks.part(shared["dims"])[0].tolist()
    blocks = [shared["window"][str(i)] for i in range(len(dims))]
    return dims, [{name: ranks.part(x, x.ndim - 1) for name, x in b.items()} for b in blocks]


def _to_save(ranks: Ranks, p: Tensor, entries: dict[str, Any], G: Tensor) -> Tensor:
    """The columns G (m, ·) of p as (m, trained weights), or (m, *shape) if p is sharded."""
    dim, mask = sharded_dim(p), entries.get("mask")
    if dim is None:
        return ranks.as_sharded(G, 1, p.numel() if mask is None else int(local(mask).sum()))
    from torch.distributed.tensor import Shard

    G = G if mask is None else _spread(G, local(mask))
    placements = [Shard(dim + 1) if x.is_shard() else x for x in cast(Any, p).placements]
    shape, mesh = (len(G), *p.shape), cast(Any, p).device_mesh
    return as_dtensor(G.reshape(len(G), *local(p).shape), shape, mesh, placements)


def _from_saved(ranks: Ranks, p: Tensor, saved: dict[str, Any], own: dict[str, Any]) -> Tensor:
    """The columns (m, ·) of p in this process, from the results of `_to_save` in all processes."""
    grads, dim, mask = saved["grads"], sharded_dim(p), own.get("mask")
    G = local(grads).flatten(1)
    if dim is None and is_dtensor(grads):
        return G  # these columns already
    if dim is not None and not is_dtensor(grads):  # all columns, from full_state_dict=True
        G = _spread(G, saved["mask"]) if G.shape[1] < p.numel() else G
        G = ranks.part(G.view(len(G), *p.shape), dim + 1).flatten(1)
    if mask is not None and G.shape[1] == local(p).numel():
        G = G[:, local(mask).flatten().to(G.device)]
    return ranks.part(G, 1) if dim is None else G


def _spread(G: Tensor, mask: Tensor) -> Tensor:
    """The columns G of the trained weights (m, ·) among zeros for the others."""
    index = mask.flatten().nonzero()[:, 0].to(G.device)
    return G.new_zeros(len(G), mask.numel()).index_copy_(1, index, G)


def _check_ranks(ranks: Ranks, window: Window, K: Tensor) -> None:
    """Raises ValueError if K does not belong to this window, for example because each process has
    loaded the state of one of them."""
    squares = torch.stack([tile.square().sum(1) for tile in window.tiles()]).sum(0)
    found, expected = ranks.sum(squares), K.diagonal().to(window.device)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-30):
        raise ValueError(
            "The window does not belong to the state dict; load in each process the state that it "
            "saved itself, or a complete one, as from full_state_dict=True"
        )
