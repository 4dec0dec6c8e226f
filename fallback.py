"""Groups that AdamW or SGD train: everything but the matrices in the middle of the net.

Norms, biases, embeddings and the head have gradients of another scale than the matrices between
them, so one window does not suit both. A group with `algorithm="adamw"` or `"sgd"` stays out of the
window. torch's own functions train it with the settings of the group. Their defaults are

    adamw   lr 1e-3, betas (0.9, 0.999), eps 1e-8, weight_decay 1e-2     as torch.optim.AdamW
    sgd     lr 1e-3, momentum 0, weight_decay 0, nesterov False          as torch.optim.SGD

and `maximize` is that of `MFAC`. A gradient with NaN or Inf in any group skips the step of all
groups. On CUDA the device decides that, and the host does not wait.
"""

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import AdamW, adamw
from torch.optim.sgd import SGD, sgd

from checks import check_choice, check_dense, is_number, require
from ranks import local

__all__ = ["SETTINGS", "Fallback", "mfac_groups"]

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2),
    "sgd": dict(lr=1e-3, momentum=0, weight_decay=0, nesterov=False),
}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
OUTSIDE = (nn.Embedding, nn.EmbeddingBag, *NORMS)


def mfac_groups(
    model: nn.Module,
    algorithm: str = "adamw",
    *,
    head: nn.Module | None = None,
    others: nn.Module | Tensor | Iterable[nn.Module | Tensor] = (),
    **settings: Any,
) -> list[dict[str, Any]]:
    """Two groups for `MFAC`: the matrices in the middle of the net, and all else for `algorithm`.

    All else is: embeddings, what belongs to normalisation layers, the head, parameters of fewer
    than two dimensions, and whatever is tied to one of them.

    Args:
        model: the model; each parameter is named once, however often it is used.
        algorithm: of the second group, "adamw" or "sgd".
        head: the layer that makes the outputs; None: the last torch.nn.Linear.
        others: more modules and parameters for the second group, such as position embeddings that
            are parameters of the model itself.
        settings: of the second group, such as its `lr`.

    Raises:
        ValueError: no matrix is left for M-FAC, or `algorithm` is unknown.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 9))
        >>> groups = mfac_groups(model, lr=1e-2)
        >>> [[tuple(p.shape) for p in group["params"]] for group in groups]
        [[(4, 4)], [(9, 4), (4,), (9, 4), (9,)]]
        >>> from optim import MFAC
        >>> optimizer = MFAC(groups, lr=3e-3, ngrads=8)
    """
    check_choice("algorithm", algorithm, list(SETTINGS))
    others = [others] if isinstance(others, (nn.Module, Tensor)) else list(others)
    for x in others:
        require(isinstance(x, (nn.Module, Tensor)), "others", x, "a module or a parameter")
    unknown = sorted(settings.keys() - SETTINGS[algorithm].keys() - {"maximize"})
    require(not unknown, "settings", unknown, f"among {[*SETTINGS[algorithm], 'maximize']}")
    modules = list(model.modules())
    outside = [*others, *(module for module in modules if isinstance(module, OUTSIDE))]
    last = [module for module in modules if isinstance(module, nn.Linear)][-1:]
    outside += last if head is None else [head]
    apart = {id(p) for x in outside for p in ([x] if isinstance(x, Tensor) else x.parameters())}
    params = list(model.parameters())  # tied ones once
    matrices = [p for p in params if p.ndim >= 2 and id(p) not in apart]
    if not matrices:
        raise ValueError(
            "No matrix is left for M-FAC between embeddings and head; give MFAC "
            "model.parameters() to have it train everything"
        )
    rest = [p for p in params if p.ndim < 2 or id(p) in apart]
    return [{"params": matrices}, {"params": rest, "algorithm": algorithm, **settings}]


class Fallback:
    """One step of the groups that AdamW or SGD train.

    Args:
        groups: all groups of an optimizer.
        state: the state of the optimizer, by parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], state: dict[Any, Any]):
        self.state, self.parts = state, []
        for group in groups:
            if group["algorithm"] != "mfac":
                params = [p for p in group["params"] if p.grad is not None]
                grads = [_laid_out(local(p.grad), local(p)) for p in params]
                if params:
                    self.parts.append((group, params, grads))

    def nan(self, device: torch.device) -> Tensor:
        """NaN () if a gradient has NaN or Inf, otherwise 0."""
        every = [g for _, _, grads in self.parts for g in grads if g.numel()]
        largest = torch._foreach_norm(every, torch.inf) if every else [torch.zeros(())]
        return (0 * torch.stack([x.to(device) for x in largest])).sum(dtype=torch.float64)

    def step(self, accepted: float | Tensor = 1) -> None:
        """The step itself. Nothing changes if `accepted` is 0."""
        for group, params, grads in self.parts:
            weights, fused = [local(p) for p in params], params[0].is_cuda
            if not fused and not bool(accepted):
                continue
            entries = [prepare(group, p, self.state) for p in params]
            buffers = [[local(x[name]) for x in entries] for name in _names(group)]
            how = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
            how |= {"foreach": False, "fused": fused}
            if fused:  # then found_inf = 1 leaves everything unchanged
                device = params[0].device
                how["found_inf"] = 1 - torch.as_tensor(accepted, dtype=torch.float32, device=device)
            if group["algorithm"] == "adamw":
                steps, means, squares = buffers
                how |= {"eps": group["eps"], "amsgrad": False}
                how["beta1"], how["beta2"] = group["betas"]
                adamw(weights, grads, means, squares, [], steps, **how)
            else:
                how |= {"momentum": group["momentum"], "nesterov": group["nesterov"]}
                velocities: list[Any] = buffers[0] if buffers else [None] * len(grads)
                sgd(weights, grads, velocities, dampening=0, **how)


def complete(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy of the group, with the defaults of its algorithm. `defaults` are those of the
    optimizer. Raises ValueError if the group has a setting that its algorithm lacks."""
    algorithm = group.get("algorithm", "mfac")
    if algorithm == "mfac":
        return dict(group)
    check_choice("algorithm", algorithm, ["mfac", *SETTINGS])
    if foreign := sorted(_foreign(algorithm, defaults) & group.keys()):
        raise ValueError(
            f"Invalid group: {foreign[0]} is not a setting of algorithm {algorithm!r}, which has "
            f"{[*SETTINGS[algorithm], 'maximize']}"
        )
    return {**SETTINGS[algorithm], **group}


def strip(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Removes the settings of other algorithms, which torch has added, and checks the rest."""
    for name in _foreign(group["algorithm"], defaults):
        group.pop(name, None)
    betas, eps = group.get("betas", (0.0, 0.0)), group.get("eps", 0.0)
    two = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(is_number, betas))
    two = two and all(0.0 <= beta < 1.0 for beta in betas)
    require(two, "betas", betas, "two numbers in [0, 1)")
    require(is_number(eps) and 0.0 <= eps, "eps", eps, "a number of at least 0")
    useless = group.get("nesterov") and not group["momentum"]
    require(not useless, "nesterov", True, "False without momentum")


def prepare(group: dict[str, Any], p: Tensor, state: dict[Any, Any]) -> dict[str, Any]:
    """The entries of p in the state. New ones are zero."""
    entries = state[p]
    for name in _names(group):
        if name not in entries and name == "step":
            device = p.device if p.is_cuda else "cpu"
            entries[name] = torch.zeros((), dtype=torch.float32, device=device)
        elif name not in entries:
            entries[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        elif name != "step":  # the model may have been cast or moved
            entries[name] = entries[name].to(p.device, p.dtype)
    return entries


def _names(group: dict[str, Any]) -> tuple[str, ...]:
    if group["algorithm"] == "adamw":
        return "step", "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _foreign(algorithm: str, defaults: dict[str, Any]) -> set[str]:
    """The settings in `defaults`, and of torch's optimizers, that this algorithm lacks."""
    known = defaults.keys() | signature(AdamW).parameters.keys() | signature(SGD).parameters.keys()
    return known - SETTINGS[algorithm].keys() - {"algorithm", "maximize", "params"}


def _laid_out(g: Tensor, p: Tensor) -> Tensor:
    """The gradient g in the memory order of p, as fused functions need it."""
    check_dense([g])
    return g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
