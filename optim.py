"""M-FAC, dynamic algorithm: the inverse empirical Fisher of a sliding window of gradients.

With the last m gradients as the rows of G (m, d) and damping λ, the damped empirical Fisher is

    F = λI + (1/m) GᵀG                                          (d, d), never formed.

Let K = GGᵀ (m, m) and A = mλI + K. Woodbury's identity gives every inverse-Hessian-vector product
(IHVP), and the newest gradient g, row j of G, has a shorter one, since g = Gᵀe_j:

    F⁻¹x = (x − Gᵀ A⁻¹ G x) / λ                                                             (1)
    F⁻¹g = m Gᵀz,  A z = e_j                                                                (3)

Cost of exchanging a gradient and of one IHVP: O(dm + m²), two reads of the window.

Symbols: m gradients in the window, d weights, G (m, d) window, K (m, m) Gram matrix,
A = mλI + K, P = A⁻¹, λ = `damp` (always λ itself); k = Gg, z = A⁻¹e_j, j the row of g.

Differences from the paper's reference code:
1. The (m, m) side is updated in O(m²) rather than computed anew in O(m³) for each gradient.
2. It is kept in float64 and checked, so that nearly parallel gradients and small λ stay right.
3. Weights that are zero at construction are frozen (`sparse`) in matrices only, not in vectors.
4. `state_dict` holds everything, so that a resumed run is the uninterrupted one.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information", NeurIPS 2021, arXiv 2107.03356, section 3.2 (dynamic algorithm).
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from checks import (
    IN_FLOATS,
    check_damp,
    check_device,
    check_devices,
    check_integer,
    checked_compress,
    checked_dtype,
    is_real,
    kind,
)
from coefficients import COEFFICIENTS, factor, unit
from ranks import Columns, Ranks, find_process_group, local, placed_as, sharded_dim
from windows import (
    CompressedWindow,
    DenseWindow,
    check_saved_window,
    gram,
    step_traffic,
    window_bytes,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MFAC", "DynamicInverseFisher", "NonFiniteGradientError", "step_traffic", "window_bytes"]


class NonFiniteGradientError(ValueError):
    """A gradient with NaN or Inf was refused; the window is as it was.

    Example:
        >>> fisher = DynamicInverseFisher(num_grads=2, dim=1)
        >>> try:
        ...     fisher.update(torch.tensor([torch.nan]))
        ... except NonFiniteGradientError as error:
        ...     print(error)
        The gradient has NaN or Inf; the window is unchanged
    """


# --- the inverse Fisher ---------------------------------------------------------------------------


def _even(d: int, parts: int) -> list[int]:
    """d columns split evenly: the sizes of the parts."""
    bounds = [d * i // parts for i in range(parts + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


# The entries of K are off by about 1e-8 of the squared gradient norms when summed over float32
# products, by 1e-16 in float64, and A⁻¹ multiplies that by the condition. Beyond the first limit
# everything is computed in float64, beyond the second nothing is.
CONDITION_LIMIT = {torch.float32: 1e1, torch.float64: 1e11}

# What cancels in Gᵀz multiplies the error again. Beyond this much of both, five digits are not
# certain, and the result is computed in another way.
LOST = {torch.float32: 1e2, torch.float64: 2e10}

# A GPU's checks are read a step late, so there the first such step moves nothing if three digits
# are not certain, either.
USABLE = {torch.float32: 1e4, torch.float64: 4e12}

EPS, RESOLVED = torch.finfo(torch.float64).eps, 1e-5  # relative errors: of numbers, of results


class _Unread:
    """Numbers on their way from a device, which nobody waits for until they are read."""

    def __init__(self, numbers: Sequence[Tensor]):
        sent = torch.stack([number.double() for number in numbers])
        self.numbers, self.arrived = sent, None
        if sent.is_cuda:
            self.numbers = torch.empty(sent.shape, dtype=sent.dtype, device="cpu", pin_memory=True)
            self.numbers.copy_(sent, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(sent.device))

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()


class DynamicInverseFisher:
    """F⁻¹ for F = λI + (1/m) Σ gᵢgᵢᵀ, the last m = `num_grads` gradients of d = `dim` weights.

    m is the full window size from the first gradient on; a row not yet filled counts as zero.

    Memory: one window of m·d numbers of `dtype`, where `device` or `shards` say, or with `compress`
    that part of it, and two (m, m) float64 matrices. Vectors may live anywhere; results come back
    on `device`, in float32 or wider.

    Args:
        num_grads: m ≥ 1.
        dim: d ≥ 0.
        damp: λ > 0, in units of squared gradients. May be assigned to at any time.
        device: of the window and of the results.
        shards: devices among which the columns are split, for example ``["cuda:0", "cuda:1"]``;
            a device may appear more than once.
        dtype: of the window. Gradients are rounded to it on entry, everything else is computed
            from the rounded ones in float32 or float64.
        compress: the part of each gradient's entries that the window keeps, for example 0.01: the
            largest, with those of the gradients before that were not kept (`CompressedWindow`). F
            is that of the gradients as kept. None keeps all.
        coefficients: "incremental", O(dm + m²) a gradient, or "paper", O(dm + m³).
        process_group: processes with a part of the columns each, which make the same calls at the
            same time. `dim`, `shape` and all vectors are then those of this process; an exchange
            sums up m + 1 float64 numbers of each. None: this process alone.

    Raises:
        ValueError: for arguments outside these ranges, and where λ is too small for the gradients.

    Example:
        >>> fisher = DynamicInverseFisher(num_grads=2, dim=3, damp=0.5)
        >>> fisher.update(torch.tensor([1.0, 0.0, 0.0]))
        >>> fisher.matvec(torch.tensor([1.0, 1.0, 1.0]))  # F is diag(1, 0.5, 0.5)
        tensor([1., 2., 2.])
    """

    def __init__(
        self,
        num_grads: int,
        dim: int,
        damp: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        shards: Sequence[torch.device | str | int] | None = None,
        dtype: torch.dtype = torch.float32,
        compress: float | None = None,
        coefficients: str = "incremental",
        process_group: "ProcessGroup | None" = None,
    ):
        num_grads, dim = check_integer("num_grads", num_grads), check_integer("dim", dim, least=0)
        damp = check_damp(damp)
        dtype, compress = checked_dtype("dtype", dtype), checked_compress(compress)
        if coefficients not in list(COEFFICIENTS):
            raise ValueError(
                f"Invalid coefficients: {coefficients!r}; they must be one of {list(COEFFICIENTS)}"
            )
        devices = [] if device is None else [check_device(device)]
        self.shards = check_devices("shards", shards or []) or devices or [torch.device("cpu")]
        self.device = (devices or self.shards)[0]
        self.ranks = Ranks(process_group)
        self.count = 0  # gradients seen; the next one becomes row count mod m
        self._clear(num_grads, _even(dim, len(self.shards)), dtype, compress)
        self.compute_dtype = self.result_dtype
        self.coefficients = COEFFICIENTS[coefficients](num_grads, damp, self.device)
        self.condition = 1.0  # as last read
        self.lazy = self.device.type == "cuda"  # checks are read a step late, without waiting
        self.accepted: float | Tensor = 1.0  # 0 if the last F⁻¹g is refused: then it is zero
        self._cancels: float = False  # whether Gᵀz did, when it was last read
        self._strained = False  # whether it did beyond LOST
        self._unread: _Unread | None = None

    @property
    def _late(self) -> bool:
        """Whether to leave checks unread; where much cancels, results have to wait for them."""
        return self.lazy and not self._strained

    @property
    def result_dtype(self) -> torch.dtype:
        """Of results, and of products that need no more: `dtype`, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)"""
        d = sum(window.dim for window in self.windows)
        return d, d

    @property
    def damp(self) -> float:
        """λ"""
        return self.coefficients.damp

    @damp.setter
    def damp(self, damp: float) -> None:
        self.settle()
        self._refactor(check_damp(damp))

    def update(self, g: Tensor) -> None:
        """Puts the gradient g (d,) into the window, in place of the oldest.

        On CUDA this and `update_matvec` don't wait for the device. What they find out is read by
        the next call, which raises it or sees to it. A gradient with NaN or Inf is left out of the
        window all the same, and a result that is not to be trusted is zero.

        Raises:
            NonFiniteGradientError: g has NaN or Inf (after rounding to the window's type).
            ValueError: g has another shape, or λ is too small for these gradients.
        """
        _, finite, condition = self._exchange(g)
        if self._late:
            no = torch.zeros_like(finite)
            self._leave_unread(finite, condition, no, torch.ones_like(condition))

    def update_matvec(self, g: Tensor) -> Tensor:
        """Puts the gradient g (d,) into the window and returns F⁻¹g (d,), with g included in F.

        Two reads of the window, three if it is compressed, or more where roundings would take over.
        Raises as `update`.
        """
        z, finite, condition = self._exchange(g)
        if self.compress is None:
            result, cancels, error = self._column(z, condition)
        else:
            result, cancels, error = self._compressed_matvec(g, condition)
        if self._late:
            self._leave_unread(finite, condition, cancels, error)
            usable = finite & (error <= USABLE[self.compute_dtype])
            self.accepted = usable.to(self.result_dtype)
            return result.where(usable, 0).to(self.result_dtype)
        self.accepted, self._strained = 1.0, not error <= LOST[self.compute_dtype]
        if self._strained:
            if self.compute_dtype != torch.float64:
                self._to_float64(self.damp)
            if self.compress is None:  # g as rounded
                j = (self.count - 1) % self.num_grads
                g = torch.cat([window.row(j).to(self.device) for window in self.windows])
            return self.matvec(g)
        return result.to(self.result_dtype)

    def _column(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mGᵀz (d,), whether its terms cancel so far that float32 is too short for them, and by how
        much the roundings in K are multiplied in it."""
        # The terms are of norms zᵢ²Kᵢᵢ, their sum is of norm zᵀKz.
        K = self.coefficients.K
        terms, left = z.square() @ K.diagonal(), z @ (K @ z)
        cancels = ~(terms < 1e3 * left)
        dtype = self._dtype(cancels)
        result = self._transposed_window_times(self.num_grads * z, dtype)
        terms, left = self.num_grads * terms.sqrt(), self.num_grads * left.sqrt()
        if self._late or cancels:  # left is mostly rounding
            left = self.ranks.norm(result)
        error = condition * (terms / left).where(terms > 0, 1)
        return result, cancels, error

    def _compressed_matvec(self, g: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F⁻¹g (d,) by (1), as the newest row holds other entries than g, and the same of it."""
        dtype = self._dtype(torch.zeros_like(condition, dtype=torch.bool))
        g = g.detach().to(self.device, dtype)
        square = g.square().sum(dtype=torch.float64).view(1)
        sums = self.ranks.sum(torch.cat([self._local_window_times(g, dtype), square]))
        b, square = sums[:-1], sums[-1]
        y = self.coefficients.solve(b)
        result = (g - self._transposed_window_times(y, dtype)) / self.damp
        # λ‖F⁻¹g‖ is at least λ gᵀF⁻¹g / ‖g‖.
        ratio = (square / (square - b @ y)).where(square > 0, 1)
        ratio = ratio.where(ratio > 0, torch.inf)
        return result, ~(ratio < 1e2), condition * ratio

    def _dtype(self, cancels: Tensor) -> torch.dtype:
        """That of products: float64 where they cancel, or did when that was last read."""
        extreme = not 1e-15 < self.damp < 1e15  # z, up to 1/mλ, may leave the range of float32
        exactly = extreme or (self._cancels if self._late else cancels)
        return torch.float64 if exactly else self.compute_dtype

    @property
    def refused(self) -> bool:
        """Whether `settle` will say that the last gradient had NaN or Inf. Other than that, which
        may compute K anew, this takes no other process."""
        return self._unread is not None and not self._unread.read()[0]

    def settle(self) -> None:
        """Reads what the last exchange on CUDA found out, and sees to it. Raises as `update`."""
        if self._unread is None:
            return
        (finite, condition, self._cancels, error), self._unread = self._unread.read(), None
        if not finite:  # the row was written with what it held before
            self.count -= 1
        self._strained = not error <= LOST[self.compute_dtype]
        sound, exactly = self._sound(condition), self.compute_dtype == torch.float64
        if not sound:
            self._refactor(self.damp)
        elif self._strained and not exactly:
            self._to_float64(self.damp)
        if not finite:
            raise NonFiniteGradientError("The gradient has NaN or Inf; the window is unchanged")

    def matvec(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,) for x (d,), by (1): four reads of the window, and up to 12 more where that
        does not resolve the result.

        In float64, as (1) cancels where x resembles the gradients.
        """
        x = self._checked(x).to(self.device, torch.float64)
        if not self.ranks.all(x.isfinite()):
            raise ValueError("Expected finite numbers in x, got NaN or Inf")
        self.settle()
        if not self._sound(self.condition):  # the last exchange was refused
            raise ValueError(self._advice(self.damp))
        # y of (1) is as far off as K, squared by its refinement, but not beyond float64.
        rounding = 4 * torch.finfo(self.compute_dtype).eps * self.condition
        rounding = max(rounding**2, EPS * self.condition)
        result, residual = torch.zeros_like(x), x
        for _ in range(3):
            result += self._woodbury(residual)
            error = rounding * self.ranks.norm(residual) + 4 * EPS * self.ranks.norm(x)
            if error <= RESOLVED * self.damp * self.ranks.norm(result):
                return self._fitting(result)
            residual = x - self._fisher_times(result)
        raise ValueError(self._advice(self.damp))

    def diagonal(self) -> Tensor:
        """diag(F⁻¹) (d,), each entry in (0, 1/λ], in float64. By (2), O(dm²): (1 − Σᵢ Wᵢⱼ²) / λ,
        W = L⁻¹G, A = LLᵀ; for d ≤ m from F itself, O(d²m)."""
        self.settle()
        m, tiles = self.num_grads, (tile for window in self.windows for tile in window.tiles())
        direct = self.ranks.size == 1 and self.shape[0] <= m
        if direct:
            G = torch.cat([tile.to(self.device) for tile in tiles], 1)
            A = G.T @ G
        else:
            A = self._gram()
        A.diagonal().add_(m * self.damp)
        L = factor(A)
        inverse = torch.cholesky_inverse(L).diagonal()
        error = EPS * inverse * A.diagonal()
        if direct:
            result = m * self.damp * inverse
        else:
            W = (torch.linalg.solve_triangular(L, t.to(self.device), upper=False) for t in tiles)
            result = 1 - torch.cat([w.square().sum(0) for w in W])
            error = error.max() * (1 - result) / result
        if not self.ranks.all((0 <= error) & (error <= RESOLVED)):  # nor are NaN
            raise ValueError(self._advice(self.damp))
        return self._fitting(result / self.damp)

    def grow(self, columns: int) -> None:
        """Appends `columns` weights with past gradients of zero; K and P stay as they are."""
        columns, last = check_integer("columns", columns, least=0), self.windows[-1]
        if self.compress is None:
            last.G = torch.cat([last.G, last.G.new_zeros(self.num_grads, columns)], dim=1)
        else:
            self.windows.append(self._window(columns, last.device))

    def forget(self) -> None:
        """Computes K and A⁻¹ anew from a window that has lost columns, O(dm²)."""
        self.coefficients.K.copy_(self._gram())
        self._refactor(self.damp)

    def check_window(self) -> None:
        """Raises ValueError if K is not of this window: of several processes each may have loaded
        what the first one saved of its own."""
        tiles = (tile.to(self.device) for window in self.windows for tile in window.tiles())
        squares = functools.reduce(torch.add, (tile.square().sum(1) for tile in tiles))
        found, expected = self.ranks.sum(squares), self.coefficients.K.diagonal()
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-30):
            raise ValueError(
                "The window is not the one that belongs to the state dict; each process must load "
                "what it saved itself, or a state that was made whole, as by full_state_dict=True"
            )

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start to stop of a window that is not compressed (m, stop − start); a view if one
        shard has them."""
        start, stop = check_integer("start", start, 0), check_integer("stop", stop, 0)
        if not (self.compress is None and start <= stop <= self.shape[0]):
            raise ValueError(
                f"Invalid columns: {start} to {stop} of a window of {self.shape[0]} with compress "
                f"= {self.compress}; they must be within one that is not compressed"
            )
        views = self._views(start, stop) or [self.windows[0].G[:, :0]]
        return views[0] if len(views) == 1 else torch.cat([v.to(self.device) for v in views], 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything, by reference. "window" is a list of column blocks, or of what compressed
        windows hold."""
        self.settle()
        compress = {} if self.compress is None else {"compress": self.compress}
        return {
            "window": [window.state for window in self.windows],
            **compress,
            "count": self.count,
            "exact": self.compute_dtype == torch.float64,
            "coefficients": self.coefficients.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave, from any device and any number of shards.

        The window takes on the saved sizes m and d, type and compression.
        """
        _check_state(state)
        self._unread, self._strained = None, False
        m, blocks = len(state["coefficients"]["K"]), state["window"]
        compress = state.get("compress")
        if compress is None:
            d = sum(block.shape[1] for block in blocks)
            dtype = blocks[0].dtype if blocks else self.dtype
            dims = _even(d, len(self.shards))
        else:  # blocks of columns begin anew in each window, so these are as they were
            dims, dtype = [len(block["error"]) for block in blocks], blocks[0]["values"].dtype
        dims_now = [window.dim for window in self.windows]
        if (m, dims, dtype, compress) != (self.num_grads, dims_now, self.dtype, self.compress):
            self._clear(m, dims, dtype, compress)
            self.coefficients = type(self.coefficients)(m, self.damp, self.device)
        if compress is None:
            start = 0
            for block in blocks:
                views = self._views(start, start := start + block.shape[1])
                parts = block.split([view.shape[1] for view in views], 1)
                for view, part in zip(views, parts, strict=True):
                    view.copy_(part)
        else:
            for window, block in zip(self.windows, blocks, strict=True):
                for name, tensor in window.state.items():
                    tensor.copy_(block[name])
        self.count = state["count"]
        self.compute_dtype = torch.float64 if state["exact"] else self.result_dtype
        self.coefficients.load_state_dict(state["coefficients"])
        self.condition = float(self.coefficients.condition())

    # --- internals

    def _clear(self, m: int, dims: list[int], dtype: torch.dtype, compress: float | None) -> None:
        """Makes windows of zeros, with as many columns as `dims` says, spread over the shards."""
        self.num_grads, self.dtype, self.compress = m, dtype, compress
        # Of one kind. Those that were are gone before the new ones come.
        self.windows: list[Any] = []
        stop, twice = 0, max(1, 2 * sum(dims))
        for dim in dims:
            stop += dim
            shard = (2 * stop - dim) * len(self.shards) // twice  # where its middle column belongs
            self.windows.append(self._window(dim, self.shards[min(shard, len(self.shards) - 1)]))

    def _window(self, dim: int, device: torch.device) -> DenseWindow | CompressedWindow:
        if self.compress is None:
            return DenseWindow(self.num_grads, dim, device, self.dtype)
        return CompressedWindow(self.num_grads, dim, device, self.dtype, self.compress)

    def _exchange(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes g into the oldest row j; returns z = A⁻¹e_j (m,), whether g is finite, and the
        condition. Both have been seen to unless `lazy`."""
        self.settle()
        parts = self._split(self._checked(g))
        j = self.count % self.num_grads
        if j == 0 and self.condition < 0.5 * CONDITION_LIMIT[self.result_dtype]:
            self.compute_dtype = self.result_dtype  # once a round, the way back from float64
        self.count += 1
        written = [w.write(j, part) for w, part in zip(self.windows, parts, strict=True)]
        # Whether all of g is finite no rank knows alone, so that it travels with k.
        broken = sum((~finite).to(self.device, torch.float64) for finite, _ in written)
        row = [window.row(j) for window in self.windows]
        k = self._local_window_times(row, self.compute_dtype)
        sums = self.ranks.sum(torch.cat([k, broken.view(1)]))
        k, finite = sums[:-1], sums[-1] == 0
        if self._late or not finite:
            for window, (_, before) in zip(self.windows, written, strict=True):
                window.restore(j, before, (~finite).to(window.device))
        if not (self._late or finite):
            self.count -= 1
            raise NonFiniteGradientError("The gradient has NaN or Inf; the window is unchanged")
        k = k.where(finite, self.coefficients.K[j])
        z, condition = self.coefficients.exchange(j, k)
        if not (self._late or self._sound(condition)):
            self._refactor(self.damp)
            z = self.coefficients.solve(unit(j, k))
        return z, finite, condition

    def _leave_unread(self, *numbers: Tensor) -> None:
        if not (numbers[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            self._unread = _Unread(numbers)

    def _sound(self, condition: float | Tensor) -> bool:
        """Whether K is precise enough for A⁻¹."""
        self.condition = float(condition)
        return self.condition < CONDITION_LIMIT[self.compute_dtype]

    def _refactor(self, damp: float) -> None:
        """Computes A⁻¹ anew for damping λ, if need be from K in float64, O(dm²)."""
        self.coefficients.refactor(damp)
        if self._sound(self.coefficients.condition()):
            return
        self._to_float64(damp)

    def _to_float64(self, damp: float) -> None:
        """Computes K and A⁻¹ anew in float64, for damping λ, O(dm²)."""
        self.compute_dtype = torch.float64
        self.coefficients.K.copy_(self._gram())
        self.coefficients.refactor(damp)
        if not self._sound(self.coefficients.condition()):
            raise ValueError(self._advice(damp))

    def _advice(self, damp: float) -> str:
        """What to do. The first damp does for A, the second for any product with F⁻¹, too."""
        largest = float(self.coefficients.K.diagonal().max())
        return (
            f"damp = {damp:g} is too small for gradients of squared norm up to {largest:g}, even "
            f"in float64; raise damp to about {1e-10 * largest:.0e} or, if that is not enough, to "
            f"{1e-6 * largest:.0e}"
        )

    def _checked(self, x: Tensor) -> Tensor:
        if not is_real(x):
            raise ValueError(f"Expected a vector {IN_FLOATS}, got {kind(x)}")
        if x.shape != self.shape[:1]:
            raise ValueError(f"Expected a vector of shape {self.shape[:1]}, got {tuple(x.shape)}")
        return x.detach()

    def _fitting(self, result: Tensor) -> Tensor:
        """The result in the type of all results."""
        fitted = result.to(self.result_dtype)
        if not self.ranks.all(fitted.isfinite()):
            raise ValueError(
                f"Results of up to {float(pad(result.abs(), (0, 1)).max()):.3g} do not fit "
                f"{fitted.dtype}; use dtype=torch.float64, or a higher damp"
            )
        return fitted

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (d,) cut up among the windows."""
        return x.split([window.dim for window in self.windows])

    def _views(self, start: int, stop: int) -> list[Tensor]:
        """The parts of the windows that hold columns start to stop."""
        views = []
        for window in self.windows:
            if start < window.dim and stop > 0:
                views.append(window.G[:, max(start, 0) : stop])
            start, stop = start - window.dim, stop - window.dim
        return views

    def _woodbury(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,) by (1). y = A⁻¹Gx takes a step of refinement with G itself, as K may be of
        float32 precision only."""
        b = self._window_times(x, torch.float64)
        y = self.coefficients.solve(b)
        r = b - self._window_times(self._transposed_window_times(y, torch.float64), torch.float64)
        y += self.coefficients.solve(r - self.num_grads * self.damp * y)
        return (x - self._transposed_window_times(y, torch.float64)) / self.damp

    def _fisher_times(self, x: Tensor) -> Tensor:
        """Fx (d,)."""
        y = self._window_times(x, torch.float64) / self.num_grads
        return self.damp * x + self._transposed_window_times(y, torch.float64)

    def _gram(self) -> Tensor:
        """K (m, m), anew from the window."""
        grams = (gram(window.tiles()).to(self.device) for window in self.windows)
        return self.ranks.sum(functools.reduce(torch.add, grams))

    def _window_times(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Gx (m,) in float64 for x (d,)."""
        return self.ranks.sum(self._local_window_times(x, dtype))

    def _local_window_times(self, x: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """This rank's part of Gx (m,) in float64 for x (d,), whole or split; rows not yet filled
        are left out."""
        rows = min(self.count, self.num_grads)
        parts = zip(self.windows, self._split(x) if isinstance(x, Tensor) else x, strict=True)
        # All products are started before any is collected, so that devices work side by side.
        products = [window.times(part.to(window.device), rows, dtype) for window, part in parts]
        y = torch.zeros(self.num_grads, dtype=torch.float64, device=self.device)
        for product in products:
            y[:rows] += product.to(self.device)
        return y

    def _transposed_window_times(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Gᵀy (d,) for y (m,)."""
        y = y[: self.count]
        products = [window.transposed_times(y.to(window.device), dtype) for window in self.windows]
        return torch.cat([product.to(self.device) for product in products])


def _check_state(state: Any) -> None:
    """Raises ValueError if this is no state of a DynamicInverseFisher."""
    names = {"window", "count", "exact", "coefficients"}
    if not (isinstance(state, dict) and names <= state.keys()):
        found = list(state) if isinstance(state, dict) else kind(state)
        raise ValueError(f"Expected a state dict with {sorted(names)}, got {found}")
    check_integer("count", state["count"], least=0)
    compress, blocks = checked_compress(state.get("compress")), state["window"]
    given = state["coefficients"]
    shared: dict[str, Any] = given if isinstance(given, dict) else {}
    K: Any = shared.get("K")
    P: Any = shared.get("P", K)
    check_damp(shared.get("damp"))
    square = is_real(K) and is_real(P) and K.ndim == 2 and K.shape == K.T.shape == P.shape
    if not (square and len(K) and bool(K.isfinite().all()) and isinstance(blocks, list)):
        raise ValueError("The state dict is damaged: K must be a finite square matrix, P like it")
    for block in blocks:
        check_saved_window(block, len(K), compressed=compress is not None)


# --- the optimizer --------------------------------------------------------------------------------


class MFAC(torch.optim.Optimizer):
    """Preconditions the gradient with the inverse empirical Fisher of the last `ngrads` gradients.

    For each parameter w with gradient g, group by group,

        g ← −g                                  only if `maximize`
        g ← g + weight_decay·w                  L2 decay; it enters the window
        u ← F⁻¹g                                one window over all groups
        v ← momentum·v + (1 − momentum)·u       an exponential moving average, from v = 0
        w ← w − lr·v

    A parameter whose `grad` is None has a zero gradient in the window and stays as it is. If all
    are None, nothing happens at all. A gradient with NaN or Inf skips the whole step: weights,
    momentum and window stay as they are.

    Memory: `window_bytes(ngrads, d)`, that is 4·ngrads·d bytes and a little, for d weights; half of
    it with `window_dtype=torch.bfloat16`, about 2 % with `compress=0.01`.

    Args:
        params: parameters, or groups of them, each with its own `lr`, `momentum`, `weight_decay`,
            `sparse` and `maximize`.
        lr: learning rate, a float or a tensor.
        momentum: in [0, 1).
        weight_decay: at least 0.
        ngrads: m, the size of the window.
        damp: λ > 0, in units of squared gradients; the attribute `damp` may be assigned to.
        moddev: device of the model, as in the paper's code; the default for `optdev`.
        optdev: device of the window and its arithmetic; by default that of the first parameter. A
            step moves one vector of d numbers there, and one back.
        gpus: devices among which the window's columns are split, in place of `optdev` alone.
        sparse: True keeps the weights that are zero now at zero and out of the window, in
            parameters of two or more dimensions. A list gives one mask a parameter (True: trained),
            of the parameter's shape, or None for all of it.
        window_dtype, compress: `dtype` and `compress` of `DynamicInverseFisher`.
        coefficients: as there.
        on_nonfinite: "skip" counts the step in `skipped_steps` and warns the first time; "raise"
            raises NonFiniteGradientError.
        maximize: climbs instead; the weight decay shrinks the weights all the same.
        process_group: processes that train together, in each of which `step` is called: each keeps
            its part of the window, and all end a step with the same weights. Parameters are the
            same in all of them, with gradients that have been averaged, as by DDP, or DTensors, as
            by FSDP2, whose window lives where they do. A `grad` is None in all of them or in none:
            one without any would leave the others waiting. By default the default group, if there
            is one, or that of the DTensors; False: this process alone.

    Raises:
        ValueError: for arguments outside these ranges, and in `step` where `damp` is too small for
            the gradients.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = MFAC(model.parameters(), lr=1e-3, ngrads=8)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        weight_decay: float = 0,
        ngrads: int = 1024,
        damp: float = 1e-5,
        moddev: torch.device | str | int | None = None,
        optdev: torch.device | str | int | None = None,
        gpus: Sequence[torch.device | str | int] | None = None,
        sparse: bool | Sequence[Tensor | None] = False,
        *,
        window_dtype: torch.dtype = torch.float32,
        compress: float | None = None,
        coefficients: str = "incremental",
        on_nonfinite: str = "skip",
        maximize: bool = False,
        process_group: "ProcessGroup | bool | None" = None,
    ):
        if on_nonfinite not in ("skip", "raise"):
            raise ValueError(f"Invalid on_nonfinite: {on_nonfinite!r}; it is 'skip' or 'raise'")
        self.on_nonfinite = on_nonfinite
        self._skipped_steps = 0
        self._found: dict[Tensor, Columns] = {}  # by `_columns`
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "sparse": sparse,
                "maximize": maximize,
            },
        )
        # Masks belong to the parameters given now, not to groups that are added later.
        self.defaults["sparse"] = sparse is True
        ranks = Ranks(find_process_group([p for p, _ in self._parameters()], process_group))
        self._ranks = ranks
        first = next((p.device for p, _ in self._parameters()), torch.device("cpu"))
        given = {"optdev": optdev, "moddev": moddev}
        devices = [check_device(d, name) for name, d in given.items() if d is not None]
        shards = check_devices("gpus", gpus or [])
        self.fisher = DynamicInverseFisher(
            ngrads,
            sum(self._sizes()),
            damp,
            device=(devices or [first])[0],
            shards=shards,
            dtype=checked_dtype("window_dtype", window_dtype),
            compress=compress,
            coefficients=coefficients,
            process_group=ranks.group,
        )
        self._mark_state()

    @property
    def damp(self) -> float:
        """λ"""
        return self.fisher.damp

    @damp.setter
    def damp(self, damp: float) -> None:
        self._unless_nonfinite(self.fisher.settle)
        self.fisher.damp = damp

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for a gradient with NaN or Inf. One process of several may ask alone."""
        return self._skipped_steps + (self.on_nonfinite == "skip" and self.fisher.refused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; the window gets columns for it whose history is zero."""
        super().add_param_group(param_group)  # first, so that it is torch's errors that come first
        group = self.param_groups[-1]
        try:
            _check_group(group)
            masks = _masks(group["params"], group["sparse"])
            if hasattr(self, "fisher"):
                find_process_group(group["params"], self._ranks.group or False)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        group["sparse"] = bool(group["sparse"])
        for p, mask in zip(group["params"], masks, strict=True):
            if mask is not None:
                self.state[p]["mask"] = placed_as(p, mask)
        if hasattr(self, "fisher"):
            self.fisher.grow(sum(self._sizes()) - self.fisher.shape[0])
            self._mark_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which computes loss and gradients anew, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        if all(p.grad is None for p, _ in parameters):
            return loss
        # Neighbours on one device go to the window as one vector, and come back as one.
        runs = [list(run) for _, run in itertools.groupby(parameters, lambda x: x[0].device)]
        gradients = [torch.cat([self._gradient(p, group) for p, group in run]) for run in runs]
        g = torch.cat([part.to(self.fisher.device) for part in gradients])
        self._unless_nonfinite(self.fisher.settle)  # what the last step left unread
        update = self._unless_nonfinite(self.fisher.update_matvec, g)
        if update is None:
            return loss
        updates, accepted = iter(self._gathered(update)), self.fisher.accepted
        for run in runs:
            device = run[0][0].device
            parts = list(itertools.islice(updates, len(run)))
            if device != update.device:
                parts = torch.cat(parts).to(device).split([len(part) for part in parts])
            if isinstance(accepted, Tensor):
                accepted = accepted.to(device)
            for (p, group), u in zip(run, parts, strict=True):
                if p.grad is not None:
                    self._descend(p, u, group, accepted)
        return loss

    def _unless_nonfinite(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call returns, or None where it refuses a gradient with NaN or Inf."""
        try:
            return call(*arguments)
        except NonFiniteGradientError:
            if self.on_nonfinite == "raise":
                raise
            if self._skipped_steps == 0:
                warnings.warn(
                    "A gradient with NaN or Inf: this step is skipped, and so are later ones, "
                    "without another warning; skipped_steps counts them",
                    stacklevel=4,
                )
            self._skipped_steps += 1
            return None

    def _gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """This rank's columns of p in the gradient that enters the window."""
        g = torch.zeros_like(p) if p.grad is None else p.grad
        if g.layout != torch.strided:
            raise ValueError(
                "MFAC does not support sparse gradients; use sparse=False in the module"
            )
        g, w = local(g).to(self.fisher.result_dtype), local(p)
        if group["maximize"]:
            g = -g
        if group["weight_decay"] != 0 and p.grad is not None:
            g = g.add(w, alpha=group["weight_decay"])
        return self._columns(p).take(g)

    def _gathered(self, update: Tensor) -> list[Tensor]:
        """The update of each parameter, flattened, from the columns (d,) of this rank."""
        columns = [self._columns(p) for p, _ in self._parameters()]
        parts = list(update.split([each.size for each in columns]))
        whole = [i for i, each in enumerate(columns) if each.sharded is None]
        if self._ranks.size > 1 and whole:
            gathered = self._ranks.gather(torch.cat([parts[i] for i in whole]))
            split = gathered.split([len(parts[i]) for i in whole], dim=1)
            for i, part in zip(whole, split, strict=True):
                parts[i] = part.flatten()
        return [part[: each.weights] for each, part in zip(columns, parts, strict=True)]

    def _descend(
        self, p: Tensor, u: Tensor, group: dict[str, Any], accepted: float | Tensor
    ) -> None:
        """Moves p against the update u of its weights."""
        u, momentum, w = self._columns(p).put(u), group["momentum"], local(p)
        if momentum != 0:
            u = local(self._velocity(p)).lerp_(u, (1 - momentum) * accepted)
        w.sub_((group["lr"] * accepted * u).view(w.shape))

    def _velocity(self, p: Tensor) -> Tensor:
        """v of p."""
        if "momentum_buffer" not in self.state[p]:
            v = torch.zeros_like(p, dtype=self.fisher.result_dtype)
            self.state[p]["momentum_buffer"] = v
        return self.state[p]["momentum_buffer"]

    def _columns(self, p: Tensor) -> Columns:
        """The columns of p. Found once, as a GPU has to be waited for."""
        if p not in self._found:
            self._found[p] = Columns(p, self.state[p].get("mask"), self._ranks)
        return self._found[p]

    def _parameters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every parameter with its group, in the order of the window's columns."""
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def _sizes(self) -> list[int]:
        return [self._columns(p).size for p, _ in self._parameters()]

    # --- state

    def _mark_state(self) -> None:
        """Enters what `state_dict` will have for each parameter, as None, into the state: for
        torch.distributed.checkpoint, which goes by its keys, and takes steps where it is empty."""
        parameters = [p for p, _ in self._parameters()]
        for p, group in self._parameters():
            for name in ("grads", "fisher"):
                self.state[p].pop(name, None)
            if self.fisher.compress is None:
                self.state[p]["grads"] = None
            if group["momentum"] != 0:
                self._velocity(p)
        if parameters:
            self.state[self._shared_home()]["fisher"] = None

    def _shared_home(self) -> Tensor:
        """The parameter whose state has what all share: the first that is trained."""
        parameters = [p for p, _ in self._parameters()]
        return next((p for p in parameters if p.requires_grad), parameters[0])

    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer, with the window's columns in each parameter's state ("grads"), and
        in that of the first what they share ("fisher"), with a window that is compressed. By
        reference, except for windows in several shards. With a process group, what ranks have of
        their own is a DTensor, for torch.distributed.checkpoint.
        """
        self._unless_nonfinite(self.fisher.settle)
        # As the first of the post-hooks, so that those of others see everything.
        handle = self.register_state_dict_post_hook(cast(Any, MFAC._add_window), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _add_window(self, state_dict: dict[str, Any]) -> None:
        shared = {**self.fisher.state_dict(), "skipped_steps": self._skipped_steps}
        windows = shared.pop("window")
        if self.fisher.compress is not None:
            shared["ranks"] = self._ranks.size
            shared["window"] = {
                str(i): {name: self._ranks.as_saved(x, x.ndim - 1) for name, x in window.items()}
                for i, window in enumerate(windows)
            }
        start = 0
        for i, (p, _) in enumerate(self._parameters()):
            entries = dict(state_dict["state"][i])
            if "grads" in entries:
                columns = self._columns(p)
                found = self.fisher.columns(start, start := start + columns.size)
                entries["grads"] = columns.to_save(found)
            if "fisher" in entries:
                entries["fisher"] = shared
            state_dict["state"][i] = entries

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave: groups, momentum, masks, window, damp, ngrads;
        with a process group of what all gave, as DTensors or complete.

        Raises:
            ValueError: it belongs to other parameters, or to another optimizer.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"Expected a state dict of MFAC, got {kind(state_dict)}")
        saved: list[dict[str, Any]] = []
        shared: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            """Keeps from the base class what it would round to the types of the parameters."""
            saved.extend(self._checked_state(state_dict))
            if saved:
                shared.update(_shared(saved))
            ids = {i for group in state_dict["param_groups"] for i in group["params"]}
            others = {key: v for key, v in state_dict["state"].items() if key not in ids}
            return {**state_dict, "state": others}

        def put(_: torch.optim.Optimizer) -> None:
            if not saved:
                return
            for (p, _group), entries in zip(self._parameters(), saved, strict=True):
                self.state[p] = {
                    name: placed_as(p, value)
                    for name, value in entries.items()
                    if name not in ("grads", "fisher")
                }
            self._found.clear()
            self._skipped_steps = shared.pop("skipped_steps")
            complete = True
            if "window" in shared:
                windows = shared["window"]
                shared["window"] = [
                    {name: self._ranks.own(x, x.ndim - 1) for name, x in windows[str(i)].items()}
                    for i in range(len(windows))
                ]
            else:
                m = len(shared["coefficients"]["K"])
                shared["window"] = [
                    self._loaded_columns(p, entries, m)
                    for (p, _), entries in zip(self._parameters(), saved, strict=True)
                ]
                complete = all("grads" in entries for entries in saved)
            self.fisher.load_state_dict(shared)
            if not complete:  # frozen parameters may be left out on the way
                self.fisher.forget()
            elif self._ranks.size > 1:
                self.fisher.check_window()
            self._mark_state()

        # The last of the pre-hooks and the first of the post-hooks: those of others see everything.
        handles = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _loaded_columns(self, p: Tensor, entries: dict[str, Any], m: int) -> Tensor:
        """This rank's columns (m, ·) of p, from its saved state; zeros if there are none."""
        if "grads" in entries:
            return self._columns(p).saved(entries["grads"], entries.get("mask"))
        size, fisher = self._columns(p).size, self.fisher
        return torch.zeros(m, size, dtype=fisher.dtype, device=fisher.device)

    def _checked_state(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """One entry a parameter, if the state dict belongs to these parameters."""
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"This state dict is not one of MFAC: it has {list(state_dict)} only")
        parameters, saved_state = [p for p, _ in self._parameters()], state_dict["state"]
        saved = [
            saved_state.get(i, {}) for group in state_dict["param_groups"] for i in group["params"]
        ]
        if not saved:
            return saved
        shared, total = _shared(saved), 0
        for p, entries in zip(parameters, saved, strict=False):
            named = {name: value for name, value in entries.items() if name != "fisher"}
            if not all(isinstance(value, Tensor) for value in named.values()):
                raise ValueError(f"The state dict is damaged: not all of {list(named)} are tensors")
            mask, weights = entries.get("mask"), p.numel()
            some = mask is not None and sharded_dim(mask) is None
            trained = int(local(mask).sum()) if some else weights
            total += trained if sharded_dim(p) is None else weights
            shapes = [tuple(v.shape) for name, v in named.items() if name != "grads"]
            columns = entries["grads"].shape[1:].numel() if "grads" in entries else trained
            fits = columns in (trained, weights)  # as they are saved if whole, or if sharded
            if any(shape != p.shape for shape in shapes) or not fits:
                raise ValueError(
                    f"The state dict belongs to another model: it has {columns} weights {shapes} "
                    f"where this one has a parameter of shape {tuple(p.shape)}"
                )
        check_integer("skipped_steps", shared.get("skipped_steps"), least=0)
        grads = [local(entries["grads"]).flatten(1) for entries in saved if "grads" in entries]
        windows = list(shared["window"].values()) if "window" in shared else grads
        _check_state({**shared, "window": windows})
        if "window" not in shared:
            return saved
        if shared["ranks"] != self._ranks.size:
            raise ValueError(
                f"A compressed window of {shared['ranks']} processes can't be loaded into "
                f"{self._ranks.size}: go on with as many"
            )
        columns = sum(window["error"].numel() for window in shared["window"].values())
        if self._ranks.size == 1 and columns != total:
            raise ValueError(
                f"The state dict belongs to another model: it has {columns} weights, this one "
                f"{total}"
            )
        return saved

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: the base class keeps only the defaults, the state and the groups."""
        self._unless_nonfinite(self.fisher.settle)
        own: dict[str, Any] = {"fisher": self.fisher, "on_nonfinite": self.on_nonfinite}
        own |= {"_skipped_steps": self._skipped_steps, "_found": {}, "_ranks": self._ranks}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)  # saved before there was such a setting


# --- checks ---------------------------------------------------------------------------------------


def _shared(saved: list[dict[str, Any]]) -> dict[str, Any]:
    """A copy of what all parameters share, which one of them has in its saved state."""
    for entries in saved:
        if isinstance(entries.get("fisher"), dict):
            return dict(entries["fisher"])
    raise ValueError("This state dict is not one of MFAC: no parameter has an entry 'fisher'")


def _check_group(group: dict[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= group["lr"]:
        raise ValueError(f"Invalid learning rate: {group['lr']}; it must be at least 0")
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"Invalid momentum: {group['momentum']}; it must be in [0, 1)")
    if not 0.0 <= group["weight_decay"]:
        raise ValueError(f"Invalid weight_decay: {group['weight_decay']}; it must be at least 0")
    for p in group["params"]:
        if not (p.is_complex() or p.is_floating_point()):
            raise ValueError(f"MFAC trains floating-point parameters, got one of {p.dtype}")
        if p.is_complex():
            raise ValueError(
                f"MFAC does not support complex parameters, got one of {p.dtype}; keep real and "
                "imaginary part as a real parameter and use torch.view_as_complex in the module"
            )


def _masks(params: list[Tensor], sparse: bool | Sequence[Tensor | None]) -> list[Tensor | None]:
    """One mask a parameter, True where it is trained, or None for all of it."""
    if isinstance(sparse, bool):
        return [p.detach() != 0 if sparse and p.dim() >= 2 else None for p in params]
    if not isinstance(sparse, (list, tuple)):
        raise ValueError(f"Invalid sparse: {sparse!r}; it must be True, False or a list of masks")
    if len(sparse) != len(params):
        raise ValueError(
            f"Invalid sparse: {len(sparse)} masks for {len(params)} parameters; give one mask (or "
            "None) a parameter, for each group its own list"
        )
    for p, mask in zip(params, sparse, strict=True):
        if mask is None:
            continue
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == p.shape):
            kind = f"{mask.dtype}, {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
            raise ValueError(
                f"Invalid sparse: a mask ({kind}) for a parameter of shape {tuple(p.shape)}; give "
                "a bool tensor of the same shape"
            )
    return list(sparse)
