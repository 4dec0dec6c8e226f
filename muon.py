"""Muon for the matrices in the middle of the net and AdamW for the rest, to compare M-FAC with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim._muon import muon

from fallback import Fallback, complete, mfac_groups, prepare

__all__ = ["Muon"]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, which takes matrices alone, as one optimizer for a whole model.

    The groups are those of `mfac_groups`. Kernels of convolutions (out, in, h, w) count as matrices
    (out, in·h·w), as in the authors' code. Muon waits for a GPU, as it reads its learning rate.

    Args:
        model: the model.
        lr, momentum, weight_decay: of Muon; the decay is decoupled.
        fallback: settings of AdamW.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        >>> optimizer = Muon(model, lr=0.02, fallback={"lr": 1e-3})
        >>> model(torch.ones(2, 3, 3, 3)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        fallback: dict[str, Any] | None = None,
    ):
        matrices, rest = mfac_groups(model, "adamw", **(fallback or {}))
        matrices |= {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        rest = complete(rest, {}) | {"fused": next(model.parameters()).is_cuda}  # where steps are
        super().__init__([{**matrices, "algorithm": "muon"}, rest], {"maximize": False})
        for p in matrices["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.flatten(1))
        for p in rest["params"]:
            prepare(rest, p, self.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which computes loss and gradients anew, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, rest = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        matrices = [p.flatten(1).clone() for p in params]  # memory may be in another order
        grads = [p.grad.flatten(1) for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        muon(
            matrices,
            grads,
            buffers,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=True,
            ns_coefficients=(3.4445, -4.775, 2.0315),  # torch's own
            ns_steps=5,
            eps=1e-7,
            adjust_lr_fn=None,
            has_complex=False,
        )
        for p, matrix in zip(params, matrices, strict=True):
            p.copy_(matrix.view_as(p))
        others = Fallback([rest], self.state)
        others.step(others.nan(rest["params"][0].device).isfinite())
        return loss
