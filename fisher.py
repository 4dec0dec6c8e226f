"""The common part of both forms of the static inverse Fisher: arguments, damping, updates,
processes."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from checks import IN_FLOATS, WIDE, check_damp, checked_vector, fitting, is_real, kind
from ranks import Ranks


class StaticInverseFisher:
    """Damping and the updates, for both forms."""

    shape: tuple[int, int]
    device: torch.device
    _diagonal: Tensor | None

    @property
    def damp(self) -> float:
        """λ. It may be changed at any time. That costs a new factorisation of (m, m) or (b, b)
        matrices and, when it is needed again, the diagonal."""
        return self._damp

    @damp.setter
    def damp(self, damp: float) -> None:
        before: Any = getattr(self, "_damp", None)
        self._damp, self._diagonal = check_damp(damp, WIDE), None
        try:
            self._damp_changed()
        except ValueError:  # too small for these gradients
            self._damp = before
            self._damp_changed()
            raise

    def matvec(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def diagonal(self) -> Tensor:
        """diag(F⁻¹) (d,) in float64, each entry in (0, 1/λ]."""
        if self._diagonal is None:
            self._diagonal = self._compute_diagonal()
        return self._diagonal.clone()

    def joint_update(self, drop: Any, w: Tensor) -> Tensor:
        """The exact update δ (d,) of the weights w (d,) when those at the indices `drop` are
        removed together: the least ½ δᵀFδ with δ = −w at `drop`."""
        dropped, weights = check_removal(drop, w, self.shape[0], self.device)
        return in_type_of(w, torch.where(dropped, -weights, self._adjustment(dropped, weights)))

    def independent_update(self, drop: Any, w: Tensor) -> Tensor:
        """The paper's update δ (d,) of the weights w (d,) when those at the indices `drop` are
        removed as if each were alone: δ = −F⁻¹ Σᵢ eᵢwᵢ/[F⁻¹]ᵢᵢ, and then δ = −w at `drop`."""
        dropped, weights = check_removal(drop, w, self.shape[0], self.device)
        delta = -self.matvec(torch.where(dropped, weights / self.diagonal(), 0))
        return in_type_of(w, torch.where(dropped, -weights, delta))

    def _damp_changed(self) -> None:
        pass

    def _compute_diagonal(self) -> Tensor:
        raise NotImplementedError

    def _adjustment(self, dropped: Tensor, weights: Tensor) -> Tensor:
        """δ_R. Entries at Q are ignored."""
        raise NotImplementedError

    def _assemble(self, parts: Iterable[tuple[slice, Tensor]]) -> Tensor:
        """A vector (d,) in float64 from [(columns, values)]. Each part is copied before the next is
        made: small tensors that stay between large ones would fragment the memory."""
        x = torch.empty(self.shape[0], dtype=torch.float64, device=self.device)
        for columns, values in parts:
            x[columns] = values
        return x


class SharedInverseFisher:
    """F⁻¹ of d weights. Each rank has a `part`, for its chunk of the columns."""

    def __init__(self, part: Any, ranks: Ranks, d: int):
        self.part, self.ranks, self.d = part, ranks, d

    @property
    def damp(self) -> float:
        return self.part.damp

    @damp.setter
    def damp(self, damp: float) -> None:
        with self.ranks.agreed():
            self.part.damp = damp

    def diagonal(self) -> Tensor:
        with self.ranks.agreed():
            diagonal = self.part.diagonal()
        return self._whole(diagonal)

    def independent_update(self, drop: Tensor, w: Tensor) -> Tensor:
        return self._update(self.part.independent_update, drop, w)

    def joint_update(self, drop: Tensor, w: Tensor) -> Tensor:
        return self._update(self.part.joint_update, drop, w)

    def _update(
        self, update: Callable[[Tensor, Tensor], Tensor], drop: Tensor, w: Tensor
    ) -> Tensor:
        dropped = torch.zeros_like(w, dtype=torch.bool).index_fill_(0, drop, True)
        own = self._own(dropped).nonzero()[:, 0]
        with self.ranks.agreed():
            part = update(own, self._own(w))
        return self._whole(part)

    def for_removal(self, in_place: bool = False) -> "SharedInverseFisher":
        return SharedInverseFisher(self.part.for_removal(in_place), self.ranks, self.d)

    def remove_(self, dropped: Tensor, w: Tensor) -> Tensor:
        with self.ranks.agreed():
            part = self.part.remove_(self._own(dropped), self._own(w))
        return self._whole(part)

    def _own(self, x: Tensor) -> Tensor:
        """This rank's chunk, with zeros beyond the last weight."""
        chunk = self.part.shape[0]
        start = self.ranks.rank * chunk
        return pad(x, (0, self.ranks.size * chunk - self.d))[start : start + chunk]

    def _whole(self, x: Tensor) -> Tensor:
        return self.ranks.gather(x).flatten()[: self.d]


# --- arguments ------------------------------------------------------------------------------------


def as_matrix(grads: Any) -> Tensor:
    """The gradients (m, d) as a tensor on the same memory."""
    if isinstance(grads, np.ndarray) and grads.dtype in (np.float16, np.float32, np.float64):
        with warnings.catch_warnings():  # of arrays that are read-only; nothing here writes
            warnings.simplefilter("ignore", UserWarning)
            grads = torch.from_numpy(grads)
    if not (is_real(grads) and grads.ndim == 2):
        raise ValueError(f"Expected gradients (m, d) {IN_FLOATS}, got {kind(grads)}")
    if 0 in grads.shape:
        raise ValueError(f"Expected at least one gradient of one weight, got {tuple(grads.shape)}")
    return grads.detach()


def check_vector(name: str, x: Tensor, d: int, device: torch.device) -> Tensor:
    """x (d,) in float64 on the device."""
    x = checked_vector(x, d, name)
    if not bool(x.isfinite().all()):
        raise ValueError(f"Expected finite numbers in {name}, got NaN or Inf")
    return x.to(device, torch.float64)


def in_type_of(x: Tensor, result: Tensor) -> Tensor:
    """The result in the type of x and where x is."""
    return fitting(result, x.dtype).to(x.device)


def check_removal(drop: Any, w: Tensor, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of d weights the indices `drop` name, (d,) bool, and the weights in float64."""
    try:
        index = drop if isinstance(drop, Tensor) else torch.as_tensor(drop, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # no numbers at all
        index = torch.tensor([-1], device="cpu")
    integral = index.dtype != torch.bool and torch.can_cast(index.dtype, torch.int64)
    fits = index.ndim == 1 and (integral or not len(index))  # [] is of floats
    index = index.to(device, torch.int64)
    if not (fits and bool(((0 <= index) & (index < d)).all())):
        raise ValueError(
            f"Expected drop to be a list of indices below {d}, got {drop}; of a mask take "
            "mask.nonzero()[:, 0]"
        )
    dropped = torch.zeros(d, dtype=torch.bool, device=device).index_fill_(0, index, True)
    return dropped, check_vector("w", w, d, device)
