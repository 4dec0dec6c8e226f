"""M-FAC for linear layers: one inverse for all rows of a weight, and a sweep over its columns.

Let W (p, q) be the weight of a linear layer, a row an output. A sample with inputs aₜ, the rows of
A (T, q), and gradients δₜ of the outputs, the rows of Δ (T, p), at T positions (words) has the
gradient ΔᵀA (p, q), with rows gᵢ. All blocks Fᵢ = E[gᵢgᵢᵀ] of F, one a row of W, are taken to be
the same one but for a factor,

    Fᵢ ≈ (rᵢ / tr S) S ,   S = Σᵢ E[gᵢgᵢᵀ] = E[AᵀΔΔᵀA] ,   rᵢ = E‖gᵢ‖²                        (8)

so that their traces are exact and S averages over the gradients of all rows. Only (q, q) numbers
are stored and inverted. Columns are pruned from left to right, a few at a time, B, and the columns
C after them make up for it. With S + λI = RRᵀ and U = R⁻¹, both upper triangular, the inverse of
S + λI for the columns B and C has the blocks

    V_BB = U_BBᵀ U_BB ,   V_BC = U_BBᵀ U_BC                                                  (9)

The least cost of removing the weights Q of a row in B is that of (5), and the rest follows:

    δ_B = −V_{BQ} V_QQ⁻¹ w_Q ,   δ_C = V_CB V_BB⁻¹ δ_B = (U_BB⁻¹ U_BC)ᵀ δ_B                   (10)

Cost: O(T q²) a sample, O(q³) a layer, and O(b² + q) a weight with b columns at a time.

S is the input's factor of K-FAC (Martens, Grosse, arXiv 1503.05671), but for whole samples. The
sweep is that of SparseGPT (Frantar, Alistarh, arXiv 2301.00774). There S has the inputs alone, all
rows and layers count the same, and one column is removed at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from checks import damp_parts
from gradients import GradientCollector, ready_for_gradients
from levels import Wanted
from masks import Pattern, WeightsAlive
from prun import MFACPruner
from reports import timed
from samples import OuterProducts, linear_layers

__all__ = ["MFACRowPruner"]

COLUMNS = 32  # at a time, or a multiple of the pattern's groups
# Arguments of MFACPruner that have no meaning here.
OF_BLOCKS: tuple[str, ...] = "blocksize", "perbatch", "pages", "update", "rounds", "grads_dtype"
OF_BLOCKS += "per_sample", "batches_at_once", "process_group"


class SharedRows:
    """S (q, q) and r (p,) of (8), as sums over samples."""

    def __init__(self, p: int, q: int, like: Tensor):
        self.S, self.r = like.new_zeros(q, q), like.new_zeros(p)

    def add_(self, deltas: Tensor, inputs: Tensor) -> None:
        """Adds samples: gradients of outputs (n, T, p) and inputs (n, T, q)."""
        self.S += inputs.flatten(0, 1).T @ (deltas @ deltas.mT @ inputs).flatten(0, 1)
        self.r += (inputs @ inputs.mT @ deltas * deltas).sum((0, 1))

    def prepare(self, fraction: float, size: int) -> None:
        """Sets U, with this fraction of the mean of S's diagonal as λ, and for `size` columns at a
        time the diagonal of their V_BB (q,)."""
        S = self.S.to(torch.float64, copy=True)
        S.diagonal().add_(fraction * S.diagonal().mean())
        R = torch.linalg.cholesky(S.flip(0, 1)).flip(0, 1)
        eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
        self.U = torch.linalg.solve_triangular(R, eye, upper=True).to(self.S)
        self.diagonal = torch.cat([self.U[B, B].square().sum(0) for B in self.blocks(size)])

    def blocks(self, size: int) -> Iterator[slice]:
        """Columns, `size` at a time."""
        q = len(self.S)
        return (slice(start, min(start + size, q)) for start in range(0, q, size))

    def saliency(self, W: Tensor, B: slice = slice(None)) -> Tensor:
        """wᵢⱼ² / 2[Fᵢ⁻¹]ⱼⱼ for W (p, ·) in the columns B, with F for these and later columns."""
        return W.square() * (self.r / (2 * self.S.trace()))[:, None] / self.diagonal[B]

    def prune_(
        self, W: Tensor, alive: Tensor, chosen: Tensor, pattern: Pattern, size: int
    ) -> Tensor:
        """Prunes W (p, q), from the mask `alive` (p, q), and returns the new mask. Columns B lose
        as many weights as in the mask `chosen`: those of the lowest saliencies, once the columns
        before have been pruned."""
        U, masks = self.U, []
        alive, chosen = alive.to(W.device), chosen.to(W.device)
        for B in self.blocks(size):
            count = int((alive[:, B] & ~chosen[:, B]).sum())
            saliency = self.saliency(W[:, B], B)
            masks += pattern.choose([saliency], [alive[:, B]], [1], count)
            change = removal(U[B, B].T @ U[B, B], W[:, B], ~masks[-1])
            W[:, B] += change
            spread = torch.linalg.solve_triangular(U[B, B], U[B, B.stop :], upper=True)
            W[:, B.stop :] += change @ spread
        return torch.cat(masks, dim=1)


def removal(V: Tensor, W: Tensor, gone: Tensor) -> Tensor:
    """δ_B (p, b) of (10) for the rows of W (p, b), of which `gone` (p, b) go, and V_BB (b, b)."""
    V_QQ = V * (gone[:, :, None] & gone[:, None, :])
    V_QQ.diagonal(dim1=1, dim2=2).add_(~gone)
    solved = torch.cholesky_solve((W * gone)[:, :, None], torch.linalg.cholesky(V_QQ))
    return torch.where(gone, -W, -solved[:, :, 0] @ V)


class MFACRowPruner(MFACPruner):
    """Prunes linear layers with one inverse for all rows of a weight, (8), column after column.

    It keeps the products within rows of F, as an average over rows. That takes q² numbers for q
    inputs of a layer, not a block for each weight, and is less noisy than separate blocks.
    Gradients are of samples, from inputs and gradients of outputs, in one process.

    Args:
        model, loader, params: as for `MFACPruner`.
        damp: "relative:0.01" or another fraction of the mean squared gradient of each row.
        options: ignore, scope, pattern, masks, keep_zeros, portions, loss, ngrads, mode,
            drop_smaller, seed and device, as for `MFACPruner` with per_sample=True. With portions,
            each is pruned by gradients of the model that those before have left.

    Raises:
        ValueError: for other arguments of `MFACPruner`, weights of other layers, or used by others
            than their layers; in `prune` also for layers without gradients.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> loader = [(torch.randn(8, 8), torch.randint(4, (8,))) for _ in range(16)]
        >>> pruner = MFACRowPruner(model, loader, ngrads=128, pattern="2:4")
        >>> masks = pruner.prune(0.5)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'0.weight': 64, '2.weight': 32}
    """

    _inverse: dict[str, SharedRows] | None

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        params: Sequence[str] | None = None,
        *,
        damp: str = "relative:0.01",
        **options: Any,
    ):
        if wrong := [name for name in OF_BLOCKS if name in options]:
            raise ValueError(f"{wrong[0]} is for MFACPruner only: leave it out")
        options |= {"damp": damp, "per_sample": True, "process_group": False}
        super().__init__(model, loader, params, **options)
        layers = linear_layers(model, self.params)
        known = {id(p) for layer in layers for p in layer.parameters(recurse=False) if p.ndim == 2}
        if others := [name for name, p in self.params.items() if id(p) not in known]:
            raise ValueError(
                f"Not the weights of linear layers: {', '.join(others)}; leave them out with "
                "ignore, or use MFACPruner"
            )

    @property
    def damp(self) -> float | str:
        """λ, as a fraction of the mean of S's diagonal."""
        return self._damp

    @damp.setter
    def damp(self, damp: float | str) -> None:
        constant, fraction = damp_parts(damp)
        if constant:
            raise ValueError(f"Invalid damp: {damp!r}; it must be relative, as 'relative:0.01'")
        self._damp, self._fraction = damp, fraction

    def memory_plan(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError: it is of blocks and pages, and there are none."""
        raise ValueError("No plan: MFACRowPruner takes 20 bytes a pair of inputs of a weight")

    def _pruned(self, wanted: Wanted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self._is_unchanged():
            self.recompute()
        elif self._inverse is None:  # resumed
            self._invert(self._start_weights, self._start_masks, self.recomputations - 1)
        try:
            return self._swept(self._inverse or {}, wanted)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"damp = {self.damp!r} is too small for {self.ngrads:,} gradients; use more of "
                "either"
            ) from error

    def _swept(
        self, layers: dict[str, SharedRows], wanted: Wanted
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masks and weights after a sweep over each layer."""
        self._report.say("choice and update")
        size = -(-COLUMNS // self.pattern.group) * self.pattern.group
        weights, saliencies = {}, {}
        for name, rows in layers.items():
            rows.prepare(self._fraction, size)
            weights[name] = self._by_rows(name, self._start_weights[name]).to(rows.S, copy=True)
            saliencies[name] = self._by_rows(name, rows.saliency(weights[name]))
        chosen = self._choose(self.masks, saliencies, wanted)
        masks = {}
        for name, rows in layers.items():
            alive, then = (self._by_rows(name, of[name]) for of in (self.masks, chosen))
            alive = rows.prune_(weights[name], alive, then, self.pattern, size)
            masks[name] = self._by_rows(name, alive)
            weights[name] = self._by_rows(name, weights[name])
        return masks, weights

    def _invert(self, start: dict[str, Tensor], masks: dict[str, Tensor], number: int) -> None:
        """Collects S and r of the layers, at `start`, for recomputation `number`."""
        self._inverse = None
        index = WeightsAlive(masks, self.device).index
        like = torch.empty(0, dtype=self.grads_dtype, device=self.device)
        found = {}
        for name, mask in masks.items():
            p, q = self._by_rows(name, mask).shape
            found[name] = SharedRows(p, q, like)
        with (
            timed(self.seconds, "gradients"),
            self._unregistered() as params,
            ready_for_gradients(self.model, params, start, self.mode, self.batches.generators),
        ):
            collector = GradientCollector(
                self.model, self.loss, params, index, self.ngrads, like, self._ranks, True
            )
            batches = self._report.counted(self.batches.draw(number), "gradients", None)
            for rows in collector.rows_to_sum(batches, 1, len(index)):
                if not isinstance(rows, OuterProducts):
                    raise ValueError(
                        "Linear layers are called without samples along dimension 0, or their "
                        "weights are used by others, too; use MFACPruner"
                    )
                for factors in rows.batches:
                    for (name, shared), (left, right) in zip(found.items(), factors, strict=True):
                        outputs_first = self.input_dimensions[name] == 1
                        shared.add_(*((left, right) if outputs_first else (right, left)))
        if without := [name for name, shared in found.items() if not shared.S.any()]:
            raise ValueError(
                f"The gradients of {', '.join(without)} are zero; leave them out with ignore, or "
                "see that the loss depends on them"
            )
        self._inverse = found

    def _by_rows(self, name: str, x: Tensor) -> Tensor:
        """x with the outputs along dimension 0; twice gives x."""
        return x if self.input_dimensions[name] == 1 else x.T
