"""Scales and bounds of a step of M-FAC, all off by default. docs/settings.md says when to use them.

With the newest gradient g, row j of the window, A z = e_j and u = F⁻¹g = mGᵀz, two norms of the
step follow from the (m, m) side alone. They need no further pass over d numbers and, if processes
share the window, no message:

    gᵀF⁻¹g = m (1 − mλ z_j),        ‖u‖² = m² zᵀKz                                          (7)

In a compressed window, r = g − ĝ is not in the row. With b = Gr and y = mz − A⁻¹b/λ, the step is
u = Gᵀy + r/λ, and

    gᵀF⁻¹g = m (1 − mλ z_j) + 2m zᵀb + (‖r‖² − bᵀA⁻¹b)/λ,   ‖u‖² = yᵀKy + 2yᵀb/λ + ‖r‖²/λ²

where ‖r‖² takes one sum over d numbers, and a message of one number.

`Control` multiplies u by the smallest of these factors and 1, before momentum takes it:

    warmup      n/m             with n < m gradients in the window. F has 1/m from the first one
                                on: F⁻¹g is m/n times that for (1/n) Σ gᵢgᵢᵀ and damping mλ/n
    max_step    √(δ/lr²gᵀF⁻¹g)  the clip of the KL divergence of K-FAC (Martens and Grosse 2015,
                                arXiv 1503.05671; as a clip Ba et al. 2017)
    max_norm    c/‖u‖           with ‖u‖ over all groups

On CUDA everything stays on the device, and a step can be captured in a CUDA graph.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checks import is_number, require
from ranks import Ranks, local

if TYPE_CHECKING:
    from optim import DynamicInverseFisher

__all__ = ["FLOOR", "Control", "layerwise", "squared_norms"]

FLOOR = 1e-3  # the least norm of weights in `layerwise`


class Control:
    """The factor of u = F⁻¹g, as above. `max_step` is δ, `max_norm` is c; None is no bound."""

    def __init__(
        self, warmup: bool = False, max_step: float | None = None, max_norm: float | None = None
    ):
        require(isinstance(warmup, bool), "warmup", warmup, "True or False")
        for name, value in (("max_step", max_step), ("max_norm", max_norm)):
            holds = value is None or (is_number(value) and 0.0 < value < math.inf)
            require(holds, name, value, "a number above 0, or None for no bound")
        self.warmup, self.max_step, self.max_norm = warmup, max_step, max_norm

    def attach(self, fisher: "DynamicInverseFisher") -> None:
        """Makes the inverse Fisher compute the norms that are needed."""
        fisher.measures_norms = self.max_step is not None or self.max_norm is not None

    def scale_(self, u: Tensor, fisher: "DynamicInverseFisher", lr: float | Tensor) -> None:
        """Scales u, or a part of it, after its gradient has entered the window."""
        factors = []
        if self.warmup:
            factors.append(fisher.counter.double() / fisher.num_grads)
        if self.max_step is not None:
            factors.append((self.max_step / (fisher.norms[0] * lr**2)).sqrt())
        if self.max_norm is not None:
            factors.append(self.max_norm / fisher.norms[1].sqrt())
        if factors:  # x/0 is inf, which bounds nothing
            u.mul_(torch.stack([x.to(u.dtype).reshape(()) for x in factors]).amin().clamp(max=1))


def squared_norms(
    fisher: "DynamicInverseFisher", z: Tensor, b: Tensor | None, rest: list[Tensor]
) -> Tensor:
    """gᵀF⁻¹g and ‖F⁻¹g‖² (2,) in float64 by (7), zeros if g is refused; before g is counted.

    Args:
        fisher: whose K and P are those with g.
        z: A⁻¹e_j (m,).
        b: Gr (m,) of a compressed window, else None.
        rest: r, in parts.
    """
    side, m, damp = fisher.coefficients, len(z), fisher.coefficients.damping
    z_j = z.index_select(0, fisher.counter.view(1) % m)[0]
    y, natural, extra = m * z, m * (1 - m * damp * z_j), torch.zeros_like(z_j)
    if b is not None:
        squares = [part.square().sum(dtype=torch.float64).to(fisher.device) for part in rest]
        x, square = side.solve(b) / damp, fisher.ranks.sum(torch.stack(squares).sum())
        natural = natural + 2 * (y @ b) + square / damp - b @ x
        y = y - x
        extra = 2 * (y @ b) / damp + square / damp**2
    norms = torch.stack([natural, y @ (side.K @ y) + extra])
    return norms.clamp(min=0).where(fisher.accepted != 0, 0)  # rounding may take them below


def layerwise(
    v: Tensor, params: Sequence[Tensor], parts: list[Tensor], sizes: Tensor, ranks: Ranks | None
) -> Tensor:
    """v (d,) with the part v_w that belongs to each parameter w scaled to ‖w‖: v_w ‖w‖/‖v_w‖.

    As in LARS (You et al. 2017, arXiv 1708.03888) and LAMB (You et al. 2020, arXiv 1904.00962),
    lr is then the relative change of each parameter. Weights of norm below 1e-3 count as 1e-3, as
    in AGC (Brock et al. 2021, arXiv 2102.06171), so that what starts at zero can move. A part that
    is zero stays.

    Args:
        v: the vector.
        params: the parameters.
        parts: the parts of v that belong to them, as views.
        sizes: the number of entries of each part, on the device of v.
        ranks: the processes over which all of the parameters are sharded; None if none of them is.
    """
    wide = torch.promote_types(params[0].dtype, torch.float32)
    weights = torch._foreach_norm([local(p).detach() for p in params], dtype=wide)
    lengths = torch._foreach_norm(parts, dtype=torch.float64)  # float32 would overflow
    norms = torch.stack([torch.stack(lengths), torch.stack(weights).to(v.device, torch.float64)])
    if ranks is not None:
        norms = ranks.sum(norms.square()).sqrt()
    ratios = (norms[1].clamp(min=FLOOR) / norms[0]).where(norms[0] > 0, 0).to(v.dtype)
    return v * ratios.repeat_interleave(sizes, output_size=len(v))
