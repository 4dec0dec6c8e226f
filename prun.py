"""M-FAC, static algorithm: the inverse empirical Fisher of a fixed set of gradients, and pruning.

With m gradients as the rows of G (m, d) and damping λ, the damped empirical Fisher is

    F = λI + (1/m) GᵀG                                          (d, d), never formed.

Let K = GGᵀ (m, m), A = mλI + K = LLᵀ (Cholesky) and W = L⁻¹G. Then, by Woodbury's identity,

    F⁻¹x = (x − Gᵀ A⁻¹ G x) / λ                                                             (1)
    diag(F⁻¹)ⱼ = (1 − cⱼ) / λ ,  cⱼ = Σᵢ Wᵢⱼ²                                               (2)

Both need only some columns of G at a time: one Gram and one triangular product, O(dm²), and two
reads of G. The joint update δ removes the weights Q and adjusts the weights R that stay, at the
least cost ½ δᵀFδ. It is ridge regression of G_Q w_Q on G_R, and its dual is (m, m):

    δ_R = G_Rᵀ (mλI + G_R G_Rᵀ)⁻¹ G_Q w_Q ,   δ_Q = −w_Q                                    (4)

A block H (b, b) of F with b ≤ m is formed instead. There δ_R = H_RR⁻¹ H_RQ w_Q, and removing Q
changes the inverse V = H⁻¹ to

    V ← V − V_{:Q} V_QQ⁻¹ V_{Q:}                                                            (5)

Symbols: m gradients, d weights, b block size, G (m, d), K (m, m) Gram matrix, A = mλI + K, L its
Cholesky factor, W (m, d), H (b, b) a block of F, V = H⁻¹, λ = `damp` (always λ itself).

Differences from the paper's reference code:
1. G is read by pages of columns, in matrix-matrix products. Their number does not change results.
2. Sums are in float64. Differences are compared with their rounding errors, and a damping that
   float64 does not resolve is refused, so that no saliency consists of rounding errors.
3. `joint_update` is exact for any number of weights; the paper's is `independent_update`.
4. Blocks of at most m weights add gradients up as they come and do not store them.
5. Each recomputation draws other samples. Counts are exact. Ties are broken by position.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information", NeurIPS 2021, arXiv 2107.03356, sections 3.1 (static algorithm) and 4 (pruning).
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from blocks import (
    EPS,
    RESOLVABLE,
    condition,
    fast_type,
    inverse_factor,
    leverage,
    stored_blocks,
    sum_gradients,
    too_small,
    usual_perbatch,
)
from checks import check_choice, check_device, check_integer, checked_dtype, damp_parts
from fisher import SharedInverseFisher, StaticInverseFisher, as_matrix, check_vector, in_type_of
from gradients import Batches, GradientCollector, cross_entropy, ready_for_gradients
from levels import Wanted, zeros_on_the_way
from masks import MagnitudePruner, WeightsAlive, check_model
from memory import Plan, check_sizes, fewest_pages, inverse_bytes, make_plan
from pages import Pages
from ranks import Ranks, find_process_group, or_default
from reports import Reporter, timed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BlockedInverseFisher",
    "MFACPruner",
    "MagnitudePruner",
    "PagedInverseFisher",
    "inverse_bytes",
]


# --- the inverse Fisher ---------------------------------------------------------------------------


class PagedInverseFisher(StaticInverseFisher):
    """F⁻¹ for F = λI + (1/m) GᵀG and gradients G (m, d) that stay where they are.

    F⁻¹ and its diagonal take two reads of G, by pages of columns. Products on a CPU are in float32
    as long as errors of results stay at about 1e-5, otherwise in float64. On a GPU they are in
    float64. A λ that float64 does not resolve is refused. For d ≤ m, `BlockedInverseFisher` with
    one block is faster and resolves smaller λ.

    Memory beside G: 16·m² bytes, and 8·d for the diagonal. Meanwhile 80·m² bytes and a few vectors.
    If G is not on `device`, up to three pages of 4·m·d/pages bytes there.

    Args:
        grads: G (m, d) as a tensor or array. No copy is made.
        damp: λ > 0, in units of squared gradients.
        pages: from 1 to d; it need not divide d. None: as few as fit on `device`.
        device: to compute on; that of `grads` if None.
        process_group: its processes hold some columns of G each and make the same calls. d and all
            vectors are those of this process. None: this process alone.

    Raises:
        ValueError: for arguments outside these ranges, gradients that are not finite, and a λ too
            small for these gradients in float64. All methods raise it, too.

    Example:
        >>> G = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> fisher = PagedInverseFisher(G, damp=0.5, pages=2)
        >>> fisher.diagonal().round(decimals=6)  # F is diag(1, 1, 0.5)
        tensor([1., 1., 2.], dtype=torch.float64)
        >>> fisher.joint_update([0], torch.tensor([3.0, 3.0, 3.0]))
        tensor([-3.,  0.,  0.])
    """

    _K: Tensor = torch.empty(0)  # of the columns kept, once there are any

    def __init__(
        self,
        grads: Any,
        damp: float = 1e-5,
        *,
        pages: int | None = None,
        device: torch.device | str | None = None,
        process_group: "ProcessGroup | None" = None,
    ):
        self.ranks, self.G = Ranks(process_group), as_matrix(grads)
        d = self.G.shape[1]
        self.shape, self.damp = (d, d), damp
        self.device = check_device(device or self.G.device)
        pages = fewest_pages(self.G, self.device) if pages is None else pages
        self.pages = check_integer("pages", pages, largest=d)
        self._pages = Pages(self.G, self.pages, self.device)
        self.dtype = fast_type(self.G, self.device)
        self.kept = torch.ones(d, dtype=torch.bool, device=self.device)  # R, which `remove_` sets
        self._set_gram(self.kept)
        self._factorise()

    def matvec(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,) for x (d,), by (1). In float64, as (1) cancels where x resembles gradients."""
        x64 = check_vector("x", x, self.shape[0], self.device) * self.kept
        left = x64 - self._transposed_solve(self.ranks.sum(self._pages.times(x64)))
        # The refinement squares the error of the solution, but not beyond what float64 allows.
        finest = self._roundings * EPS[torch.float64] / EPS[self.dtype]
        error = max((4 * self._roundings) ** 2, finest)
        if not error * self.ranks.norm(x64) <= RESOLVABLE * self.ranks.norm(left):
            self._to_float64()
            return self.matvec(x)
        return in_type_of(x, left / self.damp)

    def for_removal(self, in_place: bool = False) -> "PagedInverseFisher":
        """F⁻¹ to remove weights from, on the same gradients."""
        return copy.copy(self)

    def remove_(self, dropped: Tensor, w: Tensor) -> Tensor:
        """Removes the weights `dropped` (d,) from F and returns the joint update δ (d,) of `w` for
        those that are left. Its other entries have no meaning."""
        removed, kept = torch.where(dropped, w, 0), self.kept & ~dropped
        if self.ranks.sum(dropped.sum() - kept.sum()) <= 0:  # the Gram matrix of fewer columns
            K, b = map(self.ranks.sum, self._pages.gram(self.dtype, dropped, removed))
            self._K, self._subtracted = self._K - K, True
        else:
            b = self.ranks.sum(self._pages.times(removed))
            self._set_gram(kept)
        self.kept, self._diagonal = kept, None
        self._factorise()
        return self._transposed_solve(b)

    def _adjustment(self, dropped: Tensor, weights: Tensor) -> Tensor:
        return self.for_removal().remove_(dropped, weights)

    def _damp_changed(self) -> None:
        if len(self._K):
            self._factorise()

    def _compute_diagonal(self) -> Tensor:
        inverse_L, tiles = self._inverse_L.to(self.dtype), self._pages.tiles(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            c = self._assemble((columns, leverage(inverse_L, tile)) for columns, tile in tiles)
        c *= self.kept  # it has no meaning for columns that are gone
        if not self.ranks.all(self._roundings * c <= RESOLVABLE * (1 - c)):
            self._to_float64()
            return self._compute_diagonal()
        return (1 - c) / self.damp

    # --- the (m, m) side

    def _factorise(self) -> None:
        """Sets L⁻¹ of A = mλI + K and its error. Falls back to products in float64."""
        A = self._K.clone()
        A.diagonal().add_(self._shift)
        self._inverse_L = inverse_factor(A)
        self._roundings = EPS[self.dtype] * condition(self._scale + self._shift, self._inverse_L)
        # A solution with L⁻¹ from float32 products is refined once, which squares its error.
        limit = RESOLVABLE if self.dtype == torch.float64 else RESOLVABLE**0.5 / 8
        if not self._roundings <= limit:
            self._to_float64()

    def _to_float64(self) -> None:
        """Falls back to products in float64. Raises ValueError if K is of these already."""
        if self.dtype == torch.float64 and not self._subtracted:
            raise too_small(self.damp, float(self._scale.mean()))
        self.dtype = torch.float64
        self._set_gram(self.kept)
        self._factorise()

    def _set_gram(self, kept: Tensor) -> None:
        """Sets K of the columns kept, and the size of the numbers in its sums."""
        self._K, self._subtracted = self.ranks.sum(self._pages.gram(self.dtype, kept)[0]), False
        self._scale = self._K.diagonal().clone()

    @property
    def _shift(self) -> float:
        """mλ"""
        return len(self.G) * self.damp

    def _transposed_solve(self, b: Tensor) -> Tensor:
        """G_RᵀA⁻¹b (d,) in float64, 0 outside R, with a step of refinement by G itself. Products in
        `dtype` are precise enough for the correction, which is small."""
        y = self._inverse_L.T @ (self._inverse_L @ b)
        x = torch.empty(self.shape[0], dtype=torch.float64, device=self.device)
        Gx = torch.zeros_like(b)
        for columns, tile in self._pages.tiles(torch.float64):
            x[columns] = (y @ tile) * self.kept[columns]
            Gx += tile @ x[columns]
        residual = b - self._shift * y - self.ranks.sum(Gx)
        correction = self._inverse_L.T @ (self._inverse_L @ residual)
        scale = correction.abs().max().clamp(min=1e-300)  # float32 does not hold all numbers
        scaled = (correction / scale).to(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            for columns, tile in self._pages.tiles(self.dtype):
                x[columns] += (scaled @ tile).double() * scale * self.kept[columns]
        return x


# --- blocks ---------------------------------------------------------------------------------------


class BlockedInverseFisher(StaticInverseFisher):
    """F⁻¹ for F = λI + (1/m) GᵀG without its entries outside the b x b blocks on the diagonal.

    Blocks of at most m weights are formed, O(b²m + b³) each, and take 8·d·b bytes on `device`. On a
    CPU, products of stored gradients are in float32 as long as errors of the diagonal stay below
    1e-5, otherwise, and on a GPU, in float64. Gradients that are iterated over are summed in
    float64 and not kept. Larger blocks use (1), O(m²b + m³) each, and keep G.

    Args:
        grads: G (m, d) as a tensor or array; or an iterable of gradients (d,) or, faster, of
            several at a time (n, d), which may reuse its memory. From an iterable, blocks of any
            size are formed.
        blocksize: b ≥ 1. The last block is smaller where b does not divide d.
        damp: λ > 0, in units of squared gradients.
        perbatch: blocks that are worked on at once; by default as many as suit the device.
        device: to compute on; that of `grads`, or the CPU for an iterable, if None.

    Raises:
        ValueError: for arguments outside these ranges, gradients that are not finite, and a λ too
            small for these gradients in float64. All methods raise it, too.

    Example:
        >>> G = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> fisher = BlockedInverseFisher(G, blocksize=2, damp=0.5)
        >>> fisher.matvec(torch.ones(3))  # F is diag(1, 1, 0.5)
        tensor([1., 1., 2.])
    """

    def __init__(
        self,
        grads: Any,
        blocksize: int,
        damp: float = 1e-5,
        *,
        perbatch: int | None = None,
        device: torch.device | str | None = None,
    ):
        b = self.blocksize = check_integer("blocksize", blocksize)
        self.damp = damp
        stored = isinstance(grads, (Tensor, np.ndarray)) or not isinstance(grads, Iterable)
        grads = as_matrix(grads) if stored else grads
        self.device = check_device(device or getattr(grads, "device", "cpu"))
        usual = usual_perbatch(b, len(grads) if stored else None, self.device)
        perbatch = check_integer("perbatch", usual if perbatch is None else perbatch)
        if stored:
            d, self._parts = stored_blocks(grads, b, damp, perbatch, self.device)
        else:
            d, self._parts = sum_gradients(grads, b, perbatch, self.device)
        self.shape = (d, d)

    def matvec(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,) for x (d,)."""
        x64 = check_vector("x", x, self.shape[0], self.device)
        return in_type_of(x, self._each("matvec", x64))

    def for_removal(self, in_place: bool = False) -> "BlockedInverseFisher":
        """F⁻¹ to remove weights from. It takes another 8·d·b bytes, or, if `in_place`, the memory
        of this one, which must not be used any more."""
        removable, how = copy.copy(self), (self.damp, in_place)
        removable._diagonal = None
        removable._parts = [(*where, part.for_removal(*how)) for *where, part in self._parts]
        return removable

    def remove_(self, dropped: Tensor, w: Tensor) -> Tensor:
        """See `PagedInverseFisher.remove_`. Only the result of `for_removal` has it."""
        self._diagonal = None
        return self._each("remove_", dropped, w)

    def _adjustment(self, dropped: Tensor, weights: Tensor) -> Tensor:
        return self._each("adjustment", dropped, weights)

    def _compute_diagonal(self) -> Tensor:
        return self._each("diagonal")

    def _each(self, method: str, *vectors: Tensor) -> Tensor:
        """Calls a method of all blocks with their parts of vectors. Returns the results as one
        vector (d,) in float64."""

        def result(columns: slice, size: int, blocks: Any) -> Tensor:
            parts = (vector[columns].view(-1, size) for vector in vectors)
            return getattr(blocks, method)(self.damp, *parts).flatten()

        return self._assemble((part[0], result(*part)) for part in self._parts)


# --- pruning --------------------------------------------------------------------------------------


class MFACPruner(MagnitudePruner):
    """Prunes by saliency ρᵢ = wᵢ² / 2[F⁻¹]ᵢᵢ and adjusts the weights that stay.

    F⁻¹ is that of the weights alive at the last recomputation. The pruner recomputes it before the
    first pruning, in `recompute`, and whenever the parameters in `masks` have changed since it last
    wrote them. It does not watch other parameters. Until the next recomputation, every level starts
    from the weights of the last one, not from the level before. F⁻¹ stays in memory until
    `release`; see `inverse_bytes`.

    Args:
        model, params, ignore, scope, pattern, masks, keep_zeros: as for `MagnitudePruner`.
        portions: likewise. Each portion has an F⁻¹ of its own, at the weights that the portions
            before have left. One F⁻¹ is in memory at a time. Levels start from the level before.
        loader: yields batches. Each batch makes one gradient; see `gradients.Batches`.
        loss: loss(model, batch), the mean loss of a batch; by default the cross entropy of
            (inputs, targets).
        ngrads: m, the number of gradients.
        per_sample: each sample of a batch makes a gradient, not the batch as a whole. Samples are
            along dimension 0, and the loss is a mean over them. See `samples`.
        batches_at_once: batches whose gradients are computed together by torch.func where it gives
            the same numbers, without per_sample; by default as many as suit small models on a GPU.
        damp: λ > 0; or "relative", a tenth of the mean squared gradient, or "relative:0.03", that
            fraction of it. It may be changed between levels.
        blocksize: b of a block-diagonal F; None for the full F.
        perbatch, pages: see `BlockedInverseFisher` and `PagedInverseFisher`.
        update: of the weights that stay: "joint", "independent" or "none".
        rounds: parts in which the weights of a level are chosen, with the exact joint update of the
            others and of F⁻¹ after each. The fraction that stays falls by the same factor in each.
        mode: of the model while gradients are computed: "eval", "train" or "as is". Batch norm and
            dropout are always as in evaluation.
        drop_smaller: leave out batches smaller than the others; see `gradients.Batches`.
        grads_dtype: of stored gradients; None for float32, or float64 for a float64 model.
        seed: of the samples, together with the number of the recomputation.
        device: for F⁻¹; that of the first parameter if None.
        process_group: processes that share the work; None for the default group, False for none.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> loader = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(16)]
        >>> pruner = MFACPruner(model, loader, ngrads=16)  # a gradient a batch
        >>> masks = pruner.prune(0.5)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'weight': 4}
    """

    START = "start_weights", "start_masks"
    _start_weights: dict[str, Tensor]  # at the last recomputation, or empty
    _start_masks: dict[str, Tensor]  # at that time; a weight alive may happen to be 0
    _last_written: dict[str, Tensor]  # weights as the pruner left them
    _weights_alive: WeightsAlive  # by _start_masks
    _inverse: Any  # F⁻¹ of these, or None
    _mean_square: float  # of their gradients

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        params: Sequence[str] | None = None,
        *,
        ignore: Sequence[str] = (),
        scope: str = "global",
        pattern: str = "unstructured",
        masks: Mapping[str, Tensor] | None = None,
        keep_zeros: bool = False,
        portions: int | Sequence[str | Sequence[str]] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
        ngrads: int = 1024,
        per_sample: bool = False,
        batches_at_once: int | None = None,
        damp: float | str = 1e-5,
        blocksize: int | None = None,
        perbatch: int | None = None,
        pages: int | None = None,
        update: str = "joint",
        rounds: int = 1,
        mode: str = "eval",
        drop_smaller: bool = False,
        grads_dtype: torch.dtype | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        process_group: "ProcessGroup | bool | None" = None,
    ):
        which: dict[str, Any] = {"ignore": ignore, "masks": masks, "keep_zeros": keep_zeros}
        super().__init__(model, params, scope=scope, pattern=pattern, portions=portions, **which)
        params_now: list[Tensor] = list(self.params.values())
        self._ranks = Ranks(find_process_group(params_now, or_default(process_group)))
        self._report = Reporter(speaks=self._ranks.rank == 0)
        self.update = check_choice("update", update, ["joint", "independent", "none"])
        self.mode = check_choice("mode", mode, ["eval", "train", "as is"])
        if not callable(loss):
            raise ValueError(f"Invalid loss: {loss!r}; it must be a function of (model, batch)")
        self.batches, self.loss = Batches(loader, seed, drop_smaller), loss
        check_sizes(ngrads, blocksize, perbatch, pages, rounds, batches_at_once)
        self.ngrads, self.rounds, self.pages, self.per_sample = ngrads, rounds, pages, per_sample
        self.blocksize, self.perbatch, self.batches_at_once = blocksize, perbatch, batches_at_once
        if per_sample and batches_at_once is not None:
            raise ValueError(f"batches_at_once = {batches_at_once} goes without per_sample only")
        if rounds > 1 and update != "joint":
            raise ValueError(f"rounds = {rounds} goes with update='joint' only, not {update!r}")
        suitable = reduce(torch.promote_types, (p.dtype for p in params_now), torch.float32)
        self.grads_dtype = checked_dtype("grads_dtype", grads_dtype or suitable)
        self.device = check_device(device or params_now[0].device)
        self.recomputations = 0
        self.release()
        self.damp = damp

    @property
    def damp(self) -> float | str:
        """λ, or how it follows from the gradients."""
        return self._damp

    @damp.setter
    def damp(self, damp: float | str) -> None:
        constant, fraction = damp_parts(damp)
        if (inverse := self._inverse) is not None:
            before = inverse.damp
            try:
                inverse.damp = constant + fraction * self._mean_square
                inverse.diagonal()  # blocks find out here whether λ is too small
            except ValueError:
                inverse.damp = before
                raise
        self._damp, self._damp_parts = damp, (constant, fraction)

    @torch.no_grad()
    def recompute(self) -> None:
        """Collects gradients at the present weights, other samples each time, and inverts F."""
        if len(self.portions) > 1:
            raise ValueError("With portions every level computes F⁻¹ anew: leave recompute() out")
        check_model(self.model)
        self.apply_masks()
        start = self._copied_weights()
        self._invert(start, self.masks, self.recomputations)
        self.recomputations += 1
        self._start_weights, self._start_masks, self._last_written = start, self.masks, start

    def release(self) -> None:
        """Frees the memory of F⁻¹, as before fine-tuning. The next pruning recomputes it."""
        self._start_weights, self._start_masks, self._last_written = {}, {}, {}
        self._inverse = None

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run; save the model's own state at the same time. A resumed
        pruner computes F⁻¹ again, at the weights of the last recomputation if it is still valid."""
        valid = self._is_unchanged()
        start = {part: dict(getattr(self, f"_{part}")) if valid else {} for part in self.START}
        return {**super().state_dict(), "recomputations": self.recomputations, **start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state; load the model's own state before."""
        self._check_fit(state)
        recomputations = check_integer("recomputations", state["recomputations"], least=0)
        super().load_state_dict(state)
        self.recomputations, self._inverse = recomputations, None
        self._start_weights, self._start_masks = state["start_weights"], state["start_masks"]
        self._last_written = self._copied_weights()

    def _pruned(self, wanted: Wanted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masks and weights from those at the last recomputation, in one or more rounds."""
        if not self._is_unchanged():
            self.recompute()
        elif self._inverse is None:  # resumed
            self._invert(self._start_weights, self._start_masks, self.recomputations - 1)
        inverse, alive = self._inverse, self._weights_alive
        if self.rounds > 1:
            inverse = inverse.for_removal(in_place=self._one_level)
        masks, w = self._start_masks, alive.gather(self._start_weights).double()
        kept = torch.ones_like(w, dtype=torch.bool)
        pruned_since = ~alive.gather(self.masks)
        for part in range(1, self.rounds + 1):
            self._report.say(f"choice and update, {part} of {self.rounds}")
            saliency = torch.where(kept, w.square() / (2 * inverse.diagonal()), 0)
            saliency[pruned_since] = -1  # these go first, so that none comes back
            zeros = zeros_on_the_way(self._start_masks, wanted, part / self.rounds)
            masks = self._choose(masks, alive.scatter(saliency), zeros)
            dropped = kept & ~alive.gather(masks)
            kept &= ~dropped
            w = torch.where(kept, w + self._adjustment(inverse, dropped, w), 0)
        return masks, alive.scatter(w)

    def _adjustment(self, inverse: Any, dropped: Tensor, w: Tensor) -> Tensor:
        """The update of the weights that are kept."""
        if self.rounds > 1:
            return inverse.remove_(dropped, w)
        if self.update == "none":
            return torch.zeros_like(w)
        update = inverse.joint_update if self.update == "joint" else inverse.independent_update
        return update(dropped.nonzero()[:, 0], w)

    def _pruned_in_portions(self, wanted: Wanted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = super()._pruned_in_portions(wanted)
        self.recomputations += 1  # with the same samples for all portions
        return found

    def _write(self, masks: dict[str, Tensor], *weights: Any) -> None:
        super()._write(masks, *weights)
        self._last_written = self._copied_weights()

    def _is_unchanged(self) -> bool:
        """Whether F⁻¹ is still valid, as the weights are those that the pruner left."""
        return bool(self._start_weights) and all(
            torch.equal(p, self._last_written[name].to(p)) for name, p in self.params.items()
        )

    # --- from gradients to F⁻¹

    def memory_plan(
        self, ngrads: int | None = None, masks: Mapping[str, Tensor] | None = None
    ) -> Plan:
        """How F⁻¹ of the weights alive in the largest portion is computed from `ngrads` gradients.
        str(plan) is its memory. Raises ValueError if it does not fit."""
        of_portions = [[(masks or self.masks)[name] for name in names] for names in self.portions]
        alive, params = max(
            (sum(int(mask.sum()) for mask in portion), sum(mask.numel() for mask in portion))
            for portion in of_portions
        )
        if alive == 0:
            raise ValueError("All weights are pruned; there is no Fisher matrix to invert")
        return make_plan(
            ngrads or self.ngrads,
            alive,
            blocksize=self.blocksize,
            perbatch=self.perbatch,
            pages=self.pages,
            rounds=1 if self._one_level or len(self.portions) > 1 else self.rounds,
            grads_dtype=self.grads_dtype,
            device=self.device,
            world_size=self._ranks.size,
            samples=self.batches.samples if self.per_sample else 0,
            params=params,
        )

    def _invert(self, start: dict[str, Tensor], masks: dict[str, Tensor], number: int) -> None:
        """Inverts F for the weights alive in `masks`, at the weights `start`, from the samples of
        recomputation `number`."""
        self._inverse = None  # and with it the gradients of the last recomputation
        m, ranks = self.ngrads, self._ranks
        with ranks.agreed():
            plan = self.memory_plan(masks=masks)
        form, b = plan.form, plan.form.blocksize
        self._report.say(str(plan))
        self._weights_alive = alive = WeightsAlive(masks, self.device)
        d, like = len(alive.index), torch.empty(0, dtype=self.grads_dtype, device=self.device)
        blocks: dict[str, Any] = {"perbatch": self.perbatch, "device": self.device}
        with (
            timed(self.seconds, "gradients"),
            self._unregistered() as params,  # weights that are pruned now may be alive in `masks`
            ready_for_gradients(self.model, params, start, self.mode, self.batches.generators),
        ):
            how = self.per_sample, self.batches_at_once
            collector = GradientCollector(
                self.model, self.loss, params, alive.index, m, like, ranks, *how
            )
            drawn, total = self.batches.draw(number, ranks), None if self.per_sample else m
            parts = self._report.counted(drawn, "gradients", total), form.at_once, form.columns
            if form.stored:
                G = plan.store(collector.rows(*parts), m, like)
            else:
                inverse: Any = BlockedInverseFisher(collector.rows_to_sum(*parts), b, **blocks)
        self._mean_square = collector.mean_square(masks)
        constant, fraction = self._damp_parts
        damp = constant + fraction * self._mean_square
        self._report.say(f"inverse Fisher of {d:,} weights")
        with timed(self.seconds, "inverse"), ranks.agreed():
            if form.paged:
                inverse = PagedInverseFisher(
                    G, damp, pages=plan.pages, device=self.device, process_group=ranks.group
                )
            elif form.stored:
                inverse = BlockedInverseFisher(G, b, damp, **blocks)
            else:
                inverse.damp = damp
            inverse.diagonal()
        self._inverse = inverse if ranks.size == 1 else SharedInverseFisher(inverse, ranks, d)
