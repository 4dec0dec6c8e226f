"""M-FAC, dynamic algorithm: the inverse empirical Fisher of a sliding window of gradients.

With the last m gradients as the rows of G (m, d) and damping λ, the damped empirical Fisher is

    F = λI + (1/m) GᵀG                                          (d, d), never formed.

Let K = GGᵀ (m, m) and A = mλI + K. Woodbury's identity gives every inverse-Hessian-vector product
(IHVP), and the newest gradient g, row j of G, has a shorter one, since g = Gᵀe_j:

    F⁻¹x = (x − Gᵀ A⁻¹ G x) / λ                                                             (1)
    F⁻¹g = m Gᵀz,  A z = e_j                                                                (3)

Cost of a step: O(dm + m²), two reads of the window.

Equations (2), (4) and (5) are in prun.py, (6) is in precision.py, (7) in control.py.

Symbols: m gradients in the window, d weights, G (m, d) window, K (m, m) Gram matrix,
A = mλI + K, P = A⁻¹, λ = `damp` (always λ itself); ĝ is g as the window's type rounds it, k = Gĝ,
z = A⁻¹e_j, u = F⁻¹ĝ, j = count mod m the row of ĝ.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information", NeurIPS 2021, arXiv 2107.03356, section 3.2 (dynamic algorithm).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import checks
import states
from coefficients import DOUBLE, SINGLE, TOLERANCE, Coefficients, factor
from control import Control, squared_norms
from costs import check_memory, window_bytes
from fallback import Fallback
from flat import Segment
from parameter_groups import GroupedOptimizer
from precision import DampTooSmallError, NonFiniteGradientError, Precision
from ranks import Ranks
from recovery import Recovery
from windows import Window

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MFAC", "DampTooSmallError", "DynamicInverseFisher", "NonFiniteGradientError"]
__all__ += ["window_bytes"]

Device = torch.device | str | int


class DynamicInverseFisher:
    """F⁻¹ for F = λI + (1/m) Σ gᵢgᵢᵀ, the last m = `num_grads` gradients of d = `dim` weights.

    m is the full window size from the first gradient on; a row not yet filled counts as zero.
    Results have a relative error of at most 2e-5. Memory: `window_bytes(m, d)`.

    Args:
        num_grads: m ≥ 1.
        dim: d ≥ 0.
        damp: λ, from 1e-30 to 1e30, in units of squared gradients. A change costs O(m³).
        device: of the window and of the results. Vectors that come in may live anywhere.
        shards: devices among which the columns are split, for example ``["cuda:0", "cuda:1"]``;
            a device may appear more than once.
        dtype: of the window: float64, float32, bfloat16, float16 or float8_e4m3fn, the last two
            with scales. Gradients are rounded to it; the rest is exact for the rounded ones.
        compress: the part of each gradient's entries that the window keeps, for example 0.01: the
            largest (`CompressedWindow`). F is that of the gradients as kept. None keeps all.
        process_group: processes with a part of the columns each, which make the same calls at the
            same time. `dim`, `shape` and all vectors are then those of this process. A gradient
            takes an all-reduce of m float64 numbers, 2m with `compress`. None: this process alone.

    Raises:
        ValueError: for arguments outside these ranges, or a window that does not fit in memory.

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
        device: Device | None = None,
        shards: Sequence[Device] | None = None,
        dtype: torch.dtype | str = torch.float32,
        compress: float | None = None,
        process_group: "ProcessGroup | None" = None,
    ):
        m = self.num_grads = checks.check_integer("num_grads", num_grads)
        d = checks.check_integer("dim", dim, least=0)
        self.dtype = checks.checked_dtype("dtype", dtype, compress)
        self.result_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.compress = checks.checked_compress(compress)
        devices = [] if device is None else [checks.check_device(device)]
        places = checks.check_devices("shards", shards or []) or devices or [torch.device("cpu")]
        if len(kinds := {place.type for place in places}) > 1:
            raise ValueError(f"shards are on {sorted(kinds)}; they must be on devices of one type")
        self.device = (devices or places)[0]
        n = len(places)
        dims = [d * (i + 1) // n - d * i // n for i in range(n)]
        check_memory(m, dims, places, dtype=self.dtype, compress=self.compress)
        self.ranks = Ranks(process_group)
        self.window = Window(m, dims, places, self.device, self.dtype, self.compress)
        self.coefficients = Coefficients(m, checks.check_damp(damp), self.device)
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)
        self.accepted = torch.ones_like(self.counter)  # 0 if the last gradient was refused
        self.measures_norms, self.norms = False, torch.empty(0)  # (7), if `Control` needs it
        # Products in float32 are for dense windows on the CPU.
        exact = compress is not None or kinds != {"cpu"} or self.dtype == torch.float64
        self.precision = Precision(self.coefficients, self.window, self.ranks, always_exact=exact)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)"""
        return (sum(self.window.dims),) * 2

    @property
    def count(self) -> int:
        """Gradients accepted so far. Waits for the device, where `counter` is."""
        return int(self.counter)

    @property
    def damp(self) -> float:
        """λ"""
        return self.coefficients.damp

    @damp.setter
    def damp(self, damp: float) -> None:
        damp = checks.check_damp(damp)
        if damp != self.damp:
            self.precision.invert(damp)

    def update_matvec(self, g: Tensor) -> Tensor:
        """Puts the gradient g (d,) into the window and returns u = F⁻¹g (d,), with g in F.

        Two reads of the window. Kernels on CUDA wait for nothing: a refused gradient changes
        nothing, its result is zero, and the fifth call after it raises the error.

        Raises:
            NonFiniteGradientError: g has NaN or Inf.
            DampTooSmallError: λ is too small for these gradients.
            ValueError: g is not a dense floating-point vector (d,).
        """
        return self._step(g, multiply=True)

    def update(self, g: Tensor) -> None:
        """Puts the gradient g (d,) into the window: one read of it. Raises as `update_matvec`."""
        self._step(g, multiply=False)

    def _step(self, g: Tensor, multiply: bool) -> Any:
        """Makes g row j = count mod m. If `multiply`, returns F⁻¹g (F⁻¹ĝ if not compressed)."""
        g = checks.checked_vector(g, self.shape[0]).to(self.device)
        window, side, precision = self.window, self.coefficients, self.precision
        precision.catch_up(wait=False)
        damp, entry, good = self.damp, window.entry(g), False  # ĝ
        precision.interrupted = True  # until K and the window have changed
        try:
            while not good:  # again after a failure, with another K, P or λ
                products = window.products(entry, self.counter, precision.exact)
                k, *more = self.ranks.sum(products).unbind()  # k = Gĝ
                rounding = 0.0 if precision.exact else precision.rounding
                z, self.accepted, error = side.exchange(k, self.counter, rounding)  # A z = e_j
                good = precision.accept(error)
        except ValueError:
            precision.interrupted = False
            self.damp = damp  # which may have been raised in vain
            raise
        u = None
        if not multiply:
            window.write(entry, self.counter, self.accepted)  # G_j = ĝ
        else:
            y, b = self.num_grads * z, more[0] if more else None  # b = G(g − ĝ), if compressed
            if b is not None:  # plus F⁻¹(g − ĝ) by (1): −GᵀA⁻¹b/λ here, (g − ĝ)/λ in the window
                y.addcdiv_(side.solve(b), side.damping, value=-1)
            u = window.replace_and_transposed_times(  # G_j = ĝ, then u = mGᵀz
                entry, self.counter, self.accepted, y, side.damping, precision.exact
            ).to(self.result_dtype)
            if self.measures_norms:
                self.norms = squared_norms(self, z, b, [part.vectors[-1] for part in entry])
        precision.finish(self.counter)
        self.counter += self.accepted
        return u

    def matvec(self, x: Tensor) -> Tensor:
        """F⁻¹x (d,) for x (d,), by (1), in float64: two reads of the window, or four where K is
        from float32 products. On the CPU that takes several times as long as `update_matvec`.

        Raises:
            DampTooSmallError: (1) cancels too much, since λ is too small.
            ValueError: x is not a dense floating-point vector (d,), or has NaN or Inf, or the
                result does not fit in float32.
        """
        x = checks.checked_vector(x, self.shape[0]).to(self.device, torch.float64)
        if not self.ranks.all(x.isfinite()):
            raise ValueError("Expected finite numbers in x, got NaN or Inf")
        self.precision.catch_up()
        m, window, side, ranks = self.num_grads, self.window, self.coefficients, self.ranks
        b = ranks.sum(window.times(x))
        while True:
            y, trace, rounding = side.solve(b), float(side.trace()), DOUBLE
            residual = b - side.K @ y - m * self.damp * y
            off = residual.square() @ (side.K.diagonal() + m * self.damp).reciprocal()
            if not self.precision.exact:  # a step of refinement with G itself
                image = ranks.sum(window.times(window.transposed_times(y).double()))
                y += side.solve(b - image - m * self.damp * y)
                rounding += SINGLE**2 * trace  # K errs by SINGLE √trace, refined y by its square
            u = (x - window.transposed_times(y)) / self.damp
            # As in (6), with y for z; the residual of the solve counts as there.
            terms = (trace * (y.square() @ side.K.diagonal())).sqrt() + ranks.norm(x)
            error = rounding * terms + (trace * off).sqrt()
            good = error <= TOLERANCE * self.damp * ranks.norm(u)
            if DOUBLE * trace < 1e-3 and bool(good):  # beyond, roundings could make A singular
                return checks.fitting(u, self.result_dtype, ranks.all)
            if not self.precision.recompute():
                raise self.precision.too_small(self.damp)

    def diagonal(self) -> Tensor:
        """diag(F⁻¹) (d,), each entry in (0, 1/λ], in float64. By (2), O(dm²): (1 − Σᵢ Wᵢⱼ²) / λ,
        W = L⁻¹G, A = LLᵀ. This cancels if the gradients span all weights, so with d ≤ m in one
        process, F itself is inverted, O(d²m). Raises DampTooSmallError if λ is too small."""
        self.precision.catch_up()
        m, direct = self.num_grads, self.ranks.size == 1 and self.shape[0] <= self.num_grads
        if direct:
            G = torch.cat(list(self.window.tiles()), 1)
        A = G.T @ G if direct else self.precision.gram()
        A.diagonal().add_(m * self.damp)  # mF if direct
        L = factor(A)
        inverse = torch.cholesky_inverse(L).diagonal()
        # Roundings of A count several times in entries of the inverse, and W is squared.
        error = (8 if direct else 2) * DOUBLE * inverse * A.diagonal()
        scaled = m * self.damp * inverse  # λ diag(F⁻¹)
        if not direct:
            W = (torch.linalg.solve_triangular(L, t, upper=False) for t in self.window.tiles())
            scaled = 1 - torch.cat([w.square().sum(0) for w in W])
            error = error.max() * (1 - scaled) / scaled
        if not self.ranks.all((0 <= error) & (error <= TOLERANCE)):  # which NaN fails, too
            raise self.precision.too_small(self.damp)
        return scaled / self.damp

    def grow(self, columns: int) -> None:
        """Appends `columns` weights with past gradients of zero. The others stay in place."""
        checks.check_integer("columns", columns, least=0)
        self.window.append(columns, self.window.blocks[-1].device)

    def state_dict(self) -> dict[str, Any]:
        """Everything, by reference. "window" lists the tensors of each block of columns."""
        self.precision.catch_up()
        return states.of_fisher(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a copy of the result of `state_dict`, from any device and number of shards. If the
        window has another size or type, or is compressed or has scales and divides its columns
        otherwise, the newest gradients enter it one by one. λ stays as it is. Raises ValueError if
        it is not a state of as many weights."""
        damp = self.damp
        states.into_fisher(self, state)
        self.damp = damp


class MFAC(GroupedOptimizer):
    """Preconditions the gradient with the inverse empirical Fisher of the last `ngrads` gradients.

    For each parameter w with gradient g, group by group,

        g ← −g                                  only if `maximize`
        g ← g + weight_decay·w                  L2 decay; it enters the window
        u ← F⁻¹g                                one window over all groups
        u ← u·min(1, n/m, …)                    only if `warmup`, `max_step` or `max_norm`
        v ← momentum·v + (1 − momentum)·u       an exponential moving average, from v = 0
        v ← v·‖w‖/‖v‖                           only if `normalize`; the average is kept unscaled
        w ← w − lr·v                            with decoupled decay, w − lr·(v + weight_decay·w)

    A parameter whose `grad` is None has a zero gradient in the window and stays as it is. If all
    are None, nothing changes. A gradient with NaN or Inf skips the whole step. If `damp` is too
    small for the gradients, it is multiplied by 10, 100, ... for as long as needed.

    A step reads the window twice and does not wait for a GPU. It can be captured in a CUDA graph. A
    captured step is skipped if its gradient has NaN or Inf, or needs more `damp`. Memory is
    `window_bytes(ngrads, d)`: 4·ngrads·d bytes for d weights; half of it with window_dtype
    bfloat16, a quarter with float8_e4m3fn, about 2 % with `compress=0.01`. Parameters take no
    memory until they require or have a gradient.

    Args:
        params: parameters, or groups of them, each with its own `lr`, `momentum`, `weight_decay`,
            `sparse`, `maximize`, `normalize` and `decoupled_weight_decay`. A group with `algorithm`
            "adamw" or "sgd" and its settings stays out of the window, see `mfac_groups`.
        lr: learning rate, a float or a tensor.
        momentum: in [0, 1).
        weight_decay: at least 0.
        ngrads: m, the size of the window.
        damp: λ, from 1e-30 to 1e30 in units of squared gradients, or "relative:0.1" for this
            fraction of their mean square tr K/(md), updated once a round. May be assigned to later.
        moddev: device of the model, as in the paper's code; the default for `optdev`.
        optdev: device of the window and its arithmetic; by default that of the first parameter.
        gpus: devices among which the window's columns are split, in place of `optdev` alone.
        sparse: True keeps the weights that are zero now at zero and out of the window, in
            parameters of two or more dimensions. A list gives one mask a parameter (True: trained),
            of the parameter's shape, or None for all of it.
        window_dtype, compress: as in `DynamicInverseFisher`. With `compress`, start at lr = damp.
        on_nonfinite: "skip" counts the step in `skipped_steps`, warns the first time, and raises
            NonFiniteGradientError after 100 in a row; "raise" raises it at once, or on CUDA at the
            end of the fifth step after it.
        maximize: maximizes the objective. Weight decay shrinks the weights all the same.
        process_group: processes that share one window. Each calls `step` and keeps a part of the
            columns, and all end a step with the same weights. Parameters and gradients, and which
            are None, must be the same in all of them, as with DDP. None: this process has a window
            of its own, or, if parameters are DTensors, as with FSDP2, shares it with the processes
            they are sharded over. Each then keeps the columns of its shards.
        warmup: scales u by n/m while the window has n < m gradients.
        max_step, max_norm: bounds of lr²gᵀF⁻¹g and of ‖u‖, see module `control`.
        normalize: "layer" gives each parameter's update the norm of its weights, as LAMB does.
        decoupled_weight_decay: decay as in AdamW, outside the window, instead of L2 decay.

    Raises:
        ValueError: for arguments outside these ranges, or a window that does not fit in memory.

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
        damp: float | str = 1e-5,
        moddev: Device | None = None,
        optdev: Device | None = None,
        gpus: Sequence[Device] | None = None,
        sparse: bool | Sequence[Tensor | None] = False,
        *,
        window_dtype: torch.dtype | str = torch.float32,
        compress: float | None = None,
        on_nonfinite: str = "skip",
        maximize: bool = False,
        process_group: "ProcessGroup | None" = None,
        warmup: bool = False,
        max_step: float | None = None,
        max_norm: float | None = None,
        normalize: str | None = None,
        decoupled_weight_decay: bool = False,
    ):
        self._recovery = Recovery(on_nonfinite, damp)
        self._control = Control(warmup, max_step, max_norm)
        given = {"optdev": optdev, "moddev": moddev}
        devices = [checks.check_device(d, name) for name, d in given.items() if d is not None]
        self._settings = {
            "device": devices[0] if devices else None,  # that of the first parameter
            "num_grads": checks.check_integer("ngrads", ngrads),
            "shards": checks.check_devices("gpus", gpus or []),
            "dtype": checks.checked_dtype("window_dtype", window_dtype, compress),
            "compress": compress,
        }
        shared: dict[str, Any] = dict(ngrads=ngrads, damp=damp, window_dtype=window_dtype)
        shared |= dict(compress=compress, on_nonfinite=on_nonfinite, warmup=warmup, gpus=gpus)
        shared |= dict(max_step=max_step, max_norm=max_norm, moddev=moddev, optdev=optdev)
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"sparse": sparse, "maximize": maximize, "normalize": normalize}
        defaults |= {"decoupled_weight_decay": decoupled_weight_decay, "algorithm": "mfac"}
        super().__init__(params, defaults, shared, process_group)

    @torch.compiler.disable(reason="MFAC.step is few launches already; it is not for torch.compile")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure`, if given, computes loss and gradients; returns its result. Raises
        ValueError if a gradient is sparse, or if a parameter has another shape than at first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow()
        segments = [(s, self.param_groups[s.group]) for s in self.flat.segments if s.gather()]
        for segment, group in segments:
            if group["maximize"]:
                segment.numbers.neg_()
            if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
                segment.add_weights(group["weight_decay"])
        device, others = self.fisher.device, Fallback(self.param_groups, self.state)
        nan = self.fisher.ranks.sum(others.nan(device)) if others.parts else None
        if segments:
            g = self.flat.gradient()
            if nan is not None:
                g[:1] += nan  # NaN in any group skips the step of all
            u = self._recovery.update_matvec(self.fisher, g)
            if u is not None:
                u = self.flat.spread(u)
                # On CUDA, the host has not read whether g was accepted. If it is 0, nothing moves.
                accepted: Any = self.fisher.accepted.to(u.dtype) if u.is_cuda else 1
                for segment, group in segments:
                    self._descend(segment, group, u, accepted)
                if nan is not None:  # g has no entry for NaN if masks freeze everything
                    accepted = accepted * nan.isfinite()
                others.step(accepted)
        elif nan is not None:  # NaN or 0, as the error of an exchange
            self._recovery.attempt(self.fisher, lambda: self.fisher.precision.accept(nan))
            others.step(nan.isfinite())
        self._recovery.raise_error()
        return loss

    def _descend(self, segment: Segment, group: dict[str, Any], u: Tensor, accepted: Any) -> None:
        """w ← w − lr·v for the parameters of a segment, v from its part of u = F⁻¹g."""
        v, lr, momentum = u[segment.span], group["lr"], group["momentum"]
        decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0
        self._control.scale_(v, self.fisher, lr)
        if momentum != 0:
            velocity = self.velocity()[segment.span]
            v = segment.average(velocity, v, (1 - momentum) * accepted)
        if group["normalize"] is not None:
            v = segment.normalized(v, self.flat.ranks)
        segment.descend(v, lr * accepted, decay)

    def build(self, dim: int, device: torch.device, group: Any) -> None:
        own = dict(dim=dim, damp=self._recovery.damp, device=device)
        self.fisher = DynamicInverseFisher(process_group=group, **{**self._settings, **own})
        self.fisher.precision.raises_damp = True
        self._control.attach(self.fisher)
