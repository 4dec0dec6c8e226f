"""Right to a stated error, or refused: every inverse Fisher against exact arithmetic.

Gradients of any scale, equal, parallel, zero, of any rank, one huge among small ones. An answer is
right to ERROR, relative to its norm, or a ValueError says what to do. MFAC_EXAMPLES=5000 in the
environment looks at that many cases, other ones each time.
"""

import math
import os
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_inverse, exact_times, woodbury_column

from optim import DampTooSmallError, DynamicInverseFisher, NonFiniteGradientError
from prun import BlockedInverseFisher, PagedInverseFisher

ERROR = 2e-5
EXAMPLES = os.environ.get("MFAC_EXAMPLES")
examples = settings(
    max_examples=int(EXAMPLES or 30), deadline=None, derandomize=EXAMPLES is None, database=None
)
# Below, float32 has few digits left, in results or in what they are made of.
UNDERFLOW = 1e-36

DYNAMIC = {
    "float32": {},
    "shards": {"shards": ["cpu", "cpu"]},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float8": {"dtype": torch.float8_e4m3fn},
    "compressed": {"compress": 0.5},
    "compressed bfloat16": {"compress": 0.5, "dtype": torch.bfloat16},
}


def spread(low, high, *shape, generator):
    """10 to the power of numbers evenly spread between low and high."""
    return 10 ** (low + (high - low) * torch.rand(*shape, generator=generator).double())


def gradients(kind, n, d, scale, generator):
    """n gradients (n, d) in float32."""
    r = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    G = r(n, d)
    if kind == "common part":
        G += 10 * r(d)
    elif kind == "equal":
        G[::2] = G[0].clone()
    elif kind == "zero":
        G[torch.rand(n, generator=generator) < 0.5] = 0
    elif kind == "rank one":
        G = r(n, 1) * G[:1]
    elif kind == "one huge":
        G[int(torch.randint(n, (), generator=generator))] *= 1e6
    elif kind == "nearly parallel":
        G = G[0] + float(spread(-7, -2, (), generator=generator)) * r(n, d)
    elif kind == "1e-10 and 1e10 in turn":
        G[::2] *= 1e-10
        G[1::2] *= 1e10
    elif kind == "each of another scale":
        G *= spread(-20, 18, n, 1, generator=generator) / scale
    elif kind == "each weight of another scale":
        G *= spread(-8, 8, d, generator=generator)
    elif kind == "mostly zeros":
        G[torch.rand(n, d, generator=generator) < 0.7] = 0
    return (scale * G).clamp(-1e30, 1e30).float()


KINDS = [
    "plain",
    "common part",
    "equal",
    "zero",
    "rank one",
    "one huge",
    "nearly parallel",
    "1e-10 and 1e10 in turn",
    "each of another scale",
    "each weight of another scale",
    "mostly zeros",
]


@dataclass
class Case:
    m: int
    damp: float
    G: torch.Tensor  # (n, d), twice through a window of m and a little more
    x: torch.Tensor  # (2, d)
    size: int  # of blocks

    @property
    def d(self):
        return self.G.shape[1]


@st.composite
def cases(draw):
    m, d, size = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    scale = 10 ** draw(st.floats(-20, 18) | st.floats(-3, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n = 2 * m + draw(st.integers(0, 2))
    return Case(
        m,
        10 ** draw(st.floats(-10, 3)),
        gradients(draw(st.sampled_from(KINDS)), n, d, scale, generator),
        torch.randn(2, d, generator=generator, dtype=torch.float64),
        size,
    )


def assert_close(result, expected, tolerance=ERROR):
    """Relative to the norm, of numbers whose squares may leave float64."""
    error = (result.double() - expected).abs()
    error[error < UNDERFLOW] = 0
    largest = max(float(expected.abs().max()), 1e-300)
    assert (error / largest).norm() <= tolerance * (expected / largest).norm()


def answer(call, *arguments):
    """What it returns, or None if it refuses with advice."""
    try:
        return call(*arguments)
    except ValueError as refusal:
        assert re.search("too small for gradients .*(damp to about|is large enough)", str(refusal))
        return None


def advised(refusal):
    """The two values of damp that a window's refusal names."""
    found = re.search(r"damp to about (\S+) or, if that is not enough, to (\S+)$", str(refusal))
    return float(found[1]), float(found[2])


def check_operator(fisher, inverse, G, x, tolerance=ERROR):
    """matvec and diagonal, if they answer, and how many did not."""
    d, damp = len(inverse), fisher.damp
    refused, products = 0, []
    for v in (*x, G[0].double(), G.double().sum(0)):
        y = answer(fisher.matvec, v)
        refused += y is None
        products.append(y)
        if y is not None:
            assert_close(y, exact_times(inverse, v), tolerance)
            y = y.double()
            slack = tolerance * v.norm() * y.norm() + UNDERFLOW
            assert -slack <= v @ y <= (1 + 1e-6) * v @ v / damp + UNDERFLOW
    if products[0] is not None and products[1] is not None:
        (u, v), (Fu, Fv) = x, (y.double() for y in products[:2])
        slack = tolerance * (u.norm() * Fv.norm() + v.norm() * Fu.norm()) + UNDERFLOW
        assert abs(u @ Fv - v @ Fu) <= slack
        both = answer(fisher.matvec, 2 * u - 3 * v)
        if both is not None:
            slack = tolerance * (both.norm() + 2 * Fu.norm() + 3 * Fv.norm()) + UNDERFLOW
            assert (both.double() - (2 * Fu - 3 * Fv)).norm() <= slack
    diagonal = answer(fisher.diagonal)
    if diagonal is None:
        return refused + 1
    diagonal = diagonal.double()
    expected = torch.tensor([float(inverse[i, i]) for i in range(d)], dtype=torch.float64)
    error = (diagonal - expected).abs()
    assert ((error <= tolerance * expected) | (error < UNDERFLOW)).all()
    assert ((diagonal > 0) | (expected < UNDERFLOW)).all()
    assert (diagonal <= (1 + 1e-6) / damp).all()
    return refused


def window(fisher):
    """G (m, d) in float64, as it is kept."""
    return torch.cat(list(fisher.window.tiles()), 1)


# --- the dynamic one ------------------------------------------------------------------------------


def test_an_inverse_spoilt_by_a_small_damp_is_computed_anew():
    """Parallel gradients leave roundings in P that are as large as what a zero one leaves of it."""
    generator = torch.Generator().manual_seed(0)
    for size in torch.rand(100, generator=generator):
        fisher = DynamicInverseFisher(2, 3, 1e-2)
        fisher.precision.raises_damp = True  # as in an optimizer
        g = torch.randn(3, generator=generator)
        for gradient in (g, size * g):
            fisher.update(gradient)
        fisher.damp = 1e-28
        fisher.update(torch.zeros(3))
        x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        G = window(fisher)
        check_operator(fisher, exact_inverse(G, fisher.damp), G, x)


@pytest.mark.parametrize("options", DYNAMIC.values(), ids=list(DYNAMIC))
@examples
@given(case=cases())
def test_a_window_is_right_after_every_exchange_or_says_what_to_do(options, case):
    fisher, compressed = (
        DynamicInverseFisher(case.m, case.d, case.damp, **options),
        "compress" in options,
    )
    for g in case.G:
        while True:
            before = window(fisher), fisher.count
            try:
                result = (fisher.update if compressed else fisher.update_matvec)(g)
            except ValueError as refusal:
                assert torch.equal(window(fisher), before[0]) and fisher.count == before[1]
                if fisher.damp == 1e30:
                    return  # too large for any damp
                fisher.damp = advised(refusal)[1]
            else:
                break
        G = window(fisher)
        if not compressed:  # where g is lost in an error that may be far larger
            g = G[(fisher.count - 1) % case.m]
            assert_close(result, exact_times(exact_inverse(G, fisher.damp), g))
    if 1e-20 < fisher.damp < 1e20:
        check_operator(fisher, exact_inverse(G, fisher.damp), G, case.x)


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_parallel_gradients_are_answered_right_or_refused_once_damp_has_fallen(noise):
    generator = torch.Generator().manual_seed(0)
    for damp in 10.0 ** -torch.arange(8.0, 18.0, 0.25, dtype=torch.float64).repeat(4):
        fisher = DynamicInverseFisher(3, 2, 1e-2)
        for size in torch.randn(4, generator=generator):
            fisher.update(
                size * torch.tensor([1.0, 0.0]) + noise * torch.randn(2, generator=generator)
            )
        try:
            fisher.damp = float(damp)
        except DampTooSmallError:
            continue
        G = window(fisher)
        x = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        check_operator(fisher, exact_inverse(G, fisher.damp), G, x)


@pytest.mark.parametrize("options", DYNAMIC.values(), ids=list(DYNAMIC))
@examples
@given(
    seed=st.integers(0, 2**32),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    places=st.sets(st.integers(0, 9), max_size=4),
)
def test_nan_and_inf_anywhere_leave_the_window_that_would_be_without(options, seed, bad, places):
    m, d = 3, 7
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(10, d, generator=generator)
    for t in places:
        G[t, int(torch.randint(d, (), generator=generator))] = bad
    fisher, other = (DynamicInverseFisher(m, d, 1e-3, **options) for _ in range(2))
    for t, g in enumerate(G):
        if t in places:
            with pytest.raises(NonFiniteGradientError):
                fisher.update_matvec(g)
        else:
            assert torch.equal(fisher.update_matvec(g), other.update_matvec(g))
    for tensors in (
        (window(fisher), window(other)),
        (fisher.diagonal(), other.diagonal()),
        (fisher.coefficients.K, other.coefficients.K),
        (fisher.coefficients.P, other.coefficients.P),
    ):
        assert torch.equal(*tensors)
    x = torch.ones(d).index_fill_(0, torch.tensor([seed % d]), bad)
    with pytest.raises(ValueError, match="finite numbers in x"):
        fisher.matvec(x)


# --- float32, and when it is left -----------------------------------------------------------------


@examples
@given(
    kind=st.sampled_from(["ordinary", "nearly parallel", "badly scaled", "parallel to few"]),
    m=st.sampled_from([4, 16, 48]),
    d=st.sampled_from([60, 700, 9000]),
    strength=st.floats(-3, 8),
    noise=st.floats(-6, 0),
    seed=st.integers(0, 2**32),
)
def test_what_float32_gives_is_within_the_promise(kind, m, d, strength, noise, seed):
    """Gradients of squared norm 10**strength·mλ, a round of them and a little more."""
    r = lambda *n: torch.randn(*n, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    damp, G = 1e-5, r(m + 5, d)
    if kind == "nearly parallel":
        G = G[0] + 10**noise * G
    elif kind == "badly scaled":
        G = G * 10 ** (2 * r(m + 5, 1)) * 10 ** r(d)
    elif kind == "parallel to few":
        G = G[:3].repeat(m, 1)[: m + 5] + 10**noise * G
    G = G * (10**strength * m * damp / G.square().sum(1).mean()) ** 0.5
    fisher, kept = DynamicInverseFisher(m, d, damp), torch.zeros(m, d)
    for t, g in enumerate(G):
        kept[t % m] = g
        try:
            result = fisher.update_matvec(g)
        except DampTooSmallError:
            return
        expected = woodbury_column(kept, damp, t % m)
        assert (result - expected).norm() <= ERROR * expected.norm()
        if fisher.precision.exact:
            return


def test_rough_gradients_after_smooth_ones_are_within_the_promise():
    """Products of zeros and ones are exact, and say nothing about what follows."""
    errors = []
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        m, d = 24, 100
        fisher, G = DynamicInverseFisher(m, d, 10 ** (-1 - seed / 8)), torch.zeros(m, d)
        base, noise = torch.randn(d, generator=rng), 10 ** (-1.3 - seed % 8 / 5)
        for t in range(90):
            if t < 71:
                g = (torch.rand(d, generator=rng) < 0.05).float()
            else:
                g = base + noise * torch.randn(d, generator=rng)
            G[t % m], u = g, fisher.update_matvec(g)
            if t > 71:
                exact = woodbury_column(G, fisher.damp, t % m)
                errors.append(float((u - exact).norm() / exact.norm()))
    assert max(errors) < ERROR


# --- the static ones ------------------------------------------------------------------------------

STATIC = {
    "paged": lambda case: (PagedInverseFisher(case.G, case.damp, pages=case.d), case.d),
    "paged, float64": lambda case: (PagedInverseFisher(case.G.double(), case.damp), case.d),
    "blocked": lambda case: (BlockedInverseFisher(case.G, case.size, case.damp), case.size),
    "accumulated": lambda case: (
        BlockedInverseFisher(iter(case.G), case.size, case.damp, perbatch=2),
        case.size,
    ),
    "bfloat16": lambda case: (
        BlockedInverseFisher(case.G.bfloat16(), case.size, case.damp),
        case.size,
    ),
}


@pytest.mark.parametrize("form", STATIC)
@examples
@given(case=cases())
def test_fixed_gradients_are_inverted_or_refused(form, case):
    if form == "bfloat16":
        case.G = case.G.bfloat16().float()
    case.G = case.G[: case.m]
    made = answer(STATIC[form], case)
    if made is None:
        assert case.damp < 1e-5 * float(case.G.double().square().sum()) / case.m
        return
    fisher, size = made
    check_operator(fisher, exact_inverse(case.G, case.damp, size), case.G, case.x)


@pytest.mark.parametrize("form", STATIC)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, 7)])
def test_nan_and_inf_anywhere_are_refused(form, bad, place):
    case = Case(5, 1e-3, torch.randn(5, 8), torch.zeros(2, 8), 3)
    case.G[place] = bad
    with pytest.raises(ValueError, match=r"^The gradients have NaN"):
        STATIC[form](case)[0].diagonal()


@examples
@given(case=cases(), seed=st.integers(0, 2**32))
def test_order_pages_blocks_and_portions_do_not_matter(case, seed):
    """Every way is right to ERROR, so that two are within twice that of each other."""
    order = np.random.default_rng(seed).permutation(len(case.G))
    shuffled, size, d = case.G[order], case.size, case.d
    for groups in (
        [lambda G, p=p: PagedInverseFisher(G, case.damp, pages=p) for p in {1, d, -(-d // 2)}],
        [
            lambda G: BlockedInverseFisher(G, size, case.damp),
            lambda G: BlockedInverseFisher(G, size, case.damp, perbatch=1),
            lambda G: BlockedInverseFisher(iter(G), size, case.damp),
            lambda G: BlockedInverseFisher(iter(G.split(2)), size, case.damp, perbatch=3),
        ],
    ):
        found = [answer(lambda: make(G).diagonal()) for make in groups for G in (case.G, shuffled)]  # noqa: B023
        found = [diagonal for diagonal in found if diagonal is not None]
        for diagonal in found[1:]:
            torch.testing.assert_close(diagonal, found[0], rtol=2 * ERROR, atol=0)


# --- many exchanges -------------------------------------------------------------------------------


def drift(fisher):
    """How far P is from A⁻¹, relative to its largest entry, once columns are of one scale; and the
    condition of A then."""
    G = window(fisher)
    A = G @ G.T
    A.diagonal().add_(len(G) * fisher.damp)
    units = A.diagonal().rsqrt()
    expected = torch.linalg.inv(A * units[:, None] * units)
    found = fisher.coefficients.P / units[:, None] / units
    return float((found - expected).abs().max() / expected.abs().max()), float(expected.trace())


def adversary(kind, t, m, d, generator):
    """Gradient t of a sequence that is meant to break an incremental inverse."""
    common = torch.linspace(-1, 1, d)
    g = torch.randn(d, generator=generator)
    return {
        "plain": lambda: g,
        "huge, in and out": lambda: 1e6 * g if t % (m + 3) == 0 else g,
        "parallel": lambda: 100 * common + 0.1 * g,
        "equal": lambda: common,
        "1e-10 and 1e10 in turn": lambda: g * (1e-10 if t % 2 else 1e10),
        "zero": lambda: g if t % (3 * m) < m else 0 * g,
    }[kind]()


ADVERSARIES = ["plain", "huge, in and out", "parallel", "equal", "1e-10 and 1e10 in turn", "zero"]


def drifts(kind, steps, m=16, d=40, damp=1e-3):
    """{number of exchanges: the largest drift in the m before}, and the largest condition."""
    fisher = DynamicInverseFisher(m, d, damp, dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(kind))
    found, recent, condition = {}, [], 0.0
    for t in range(max(steps)):
        fisher.update(adversary(kind, t, m, d, generator))
        if any(n - m <= t < n for n in steps):
            recent.append(drift(fisher))
        if t + 1 in steps:
            errors, conditions = zip(*recent, strict=True)
            found[t + 1], recent = max(errors), []
            condition = max(condition, *conditions)
    return found, condition


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_a_thousand_exchanges_leave_no_more_error_than_a_hundred(kind):
    """Of what float64 and the condition allow; tests/long_run.py has 10,000."""
    found, condition = drifts(kind, [100, 1000])
    assert max(found.values()) <= 1e-14 * max(condition, 10)
