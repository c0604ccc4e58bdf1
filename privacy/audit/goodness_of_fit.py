"""Exact tests of a mechanism whose inputs are all known: do its noise and its batches match the claim?

Every observation is first turned into a number that is standard normal, independent of all others, if the mechanism is
the claimed one: the residual of a release divided by the standard deviation of the noise, or the randomized quantile
residual of a batch (Dunn & Smyth, 1996). One battery then tests these numbers: their distribution, variance and
extremes, and their dependence at every lag.

Each test returns a p-value that holds for finite samples: an honest mechanism gets one of at most p with probability at
most p. So a Bonferroni bound over all tests of an audit is a bound on its false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_FEWEST = 64  # products in a sum of an autocorrelation
_CANDIDATES = 200  # lags whose p-value is computed: those of largest normalized sum
_BEYOND = 1e3  # no honest number is larger; an infinite number would make statistics undefined
_WINDOW = 8  # numbers in a row that no two releases share by chance


class Check(NamedTuple):
    """One test of one set of numbers."""

    name: str
    p_value: float
    """Upper bound on the probability that an honest mechanism gives a statistic at least this extreme."""
    shown: str
    """Description of the statistic."""


def battery(releases: Sequence[np.ndarray]) -> list[Check]:
    """Test whether these vectors [d] each hold independent standard normal numbers.

    The autocorrelations are computed over the concatenated vectors, so that they detect a dependence within a vector,
    at any lag, and between any two vectors. Autocorrelations of the squares detect it even if signs were flipped.
    """
    releases = [np.nan_to_num(np.ravel(release), nan=_BEYOND).clip(-_BEYOND, _BEYOND) for release in releases]
    numbers = np.concatenate(releases)
    found = [distribution(numbers), variance(numbers), extremes(numbers)]
    found += [autocorrelation(numbers, "autocorrelation"), autocorrelation(_sizes(numbers), "of the squares")]
    alike: dict[int, list[np.ndarray]] = {}
    for release in releases:
        alike.setdefault(release.size, []).append(release)
    found += [between(np.stack(rows)) for rows in alike.values() if len(rows) > 1]
    return found


def distribution(numbers: np.ndarray) -> Check:
    """Kolmogorov and Smirnov's test of numbers [n] against N(0, 1)."""
    from scipy.stats import kstest

    found = kstest(numbers, "norm")
    return Check("distribution", float(found.pvalue), f"KS distance {found.statistic:.2g} of {len(numbers)} numbers")


def variance(numbers: np.ndarray) -> Check:
    """Σ x² of numbers [n] against χ² with n degrees of freedom, on both sides."""
    from scipy.stats import chi2

    total = float(np.square(numbers).sum())
    p_value = 2 * min(chi2.cdf(total, len(numbers)), chi2.sf(total, len(numbers)))
    return Check("variance", min(1.0, float(p_value)), f"σ is {math.sqrt(total / len(numbers)):.4f} × the claimed one")


def shortfall(count: int, significance: float, power: float) -> float:
    """The smallest relative shortfall of σ that `variance` finds in this many numbers with probability `power`.

    Noise of standard deviation f σ gives Σ x² = f² χ²: the shortfall is found if this is below the critical value.
    """
    from scipy.stats import chi2

    return float(1 - math.sqrt(chi2.ppf(significance / 2, count) / chi2.ppf(power, count)))


def extremes(numbers: np.ndarray) -> Check:
    """Test the largest |x| of numbers [n]: too large, or too small because tails are truncated."""
    from scipy.special import log_ndtr

    largest = float(np.abs(numbers).max(initial=0.0))
    tail = 2 * math.exp(float(log_ndtr(-largest)))
    below = math.exp(len(numbers) * math.log1p(-tail)) if tail < 1 else 0.0
    return Check("extremes", min(1.0, 2 * min(len(numbers) * tail, below)), f"largest |x| {largest:.2f}")


def autocorrelation(numbers: np.ndarray, name: str) -> Check:
    """The largest |Σ_i x_i x_{i+k}| over all lags k, for independent standard normal numbers [n]."""
    n = len(numbers)
    if n <= 2 * _FEWEST:
        return Check(name, 1.0, "too few numbers")
    padded = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(numbers, padded)
    sums = np.fft.irfft(np.square(spectrum.real) + np.square(spectrum.imag), padded)[1 : n - _FEWEST]
    counts = n - np.arange(1, n - _FEWEST)
    scores = np.abs(sums) / np.sqrt(counts)
    lags = np.argsort(scores)[-_CANDIDATES:]
    p_values = [products_p_value(abs(float(sums[lag])), int(counts[lag])) for lag in lags]
    best = int(np.argmin(p_values))
    lag = int(lags[best])
    p_value = min(1.0, 2 * len(sums) * p_values[best])
    return Check(name, p_value, f"largest at lag {lag + 1} of {len(sums)}: {sums[lag] / counts[lag]:+.2g}")


def between(rows: np.ndarray) -> Check:
    """The largest |Σ_i x_i y_i| over all pairs of releases [R, d]."""
    count, size = rows.shape
    sums = np.abs(np.triu(rows @ rows.T, 1))
    one, other = np.unravel_index(int(np.argmax(sums)), sums.shape)
    p_value = min(1.0, count * (count - 1) * products_p_value(float(sums[one, other]), size))
    return Check("between releases", p_value, f"largest of {count} releases: {sums[one, other] / size:.2g}")


def products_p_value(total: float, count: int) -> float:
    """Upper bound on P(Σ x_i x_{i+k} ≥ total) of `count` products, for any lag k. Chernoff's.

    The products of a lag form paths. For a path of L numbers, E exp(t Σ x_i x_{i+1}) = D_L^(−½) with the determinants
    D_L = D_{L−1} − t² D_{L−2}, D_0 = D_1 = 1. Their ratios fall from 1 to r = (1 + √(1 − 4t²)) / 2, so that
    D_L ≥ r^(L−1): each product adds at most −½ ln r to the logarithm.
    """
    mean = total / count
    if mean <= 0:
        return 1.0
    low, high = 0.0, 0.5
    for _ in range(60):  # the best t, where 2t / (u (1 + u)) = mean with u = √(1 − 4t²)
        t = (low + high) / 2
        u = math.sqrt(1 - 4 * t * t)
        low, high = (t, high) if 2 * t < mean * u * (1 + u) else (low, t)
    exponent = low * mean + 0.5 * math.log((1 + math.sqrt(1 - 4 * low * low)) / 2)
    return math.exp(-count * max(0.0, exponent))


def alignment(residuals: Sequence[np.ndarray], directions: Sequence[np.ndarray], name: str) -> Check:
    """Σ ⟨x, v⟩ / √Σ ‖v‖² of residuals x and fixed vectors v, against N(0, 1).

    This detects anything added to a release beside its noise, if the direction to test is known.
    """
    from scipy.special import log_ndtr

    length = math.sqrt(sum(float(np.square(direction).sum()) for direction in directions))
    if not length:
        return Check(name, 1.0, "nothing to look for")
    score = sum(float(np.sum(x * v)) for x, v in zip(residuals, directions, strict=True)) / length
    return Check(name, 2 * math.exp(float(log_ndtr(-abs(score)))), f"{score:+.2f} standard errors")


def repeats(releases: Sequence[np.ndarray], deviation: float, name: str = "repeats") -> Check:
    """Whether eight numbers in a row occur twice in integer noise of this standard deviation, anywhere.

    Two of the honest integers are equal with probability at most 1 / (√(2π) deviation).
    """
    windows = [np.lib.stride_tricks.sliding_window_view(release, _WINDOW) for release in releases]
    factors = np.random.default_rng(0).integers(1, 2**63, _WINDOW, dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        keys = [(window.astype(np.int64).view(np.uint64) * factors).sum(1, dtype=np.uint64) for window in windows]
    hashes = np.concatenate(keys)
    order = np.argsort(hashes, kind="stable")
    same = np.nonzero(hashes[order][1:] == hashes[order][:-1])[0]
    starts = np.cumsum([0, *map(len, keys)])

    def window(place: int) -> np.ndarray:
        release = int(np.searchsorted(starts, place, side="right")) - 1
        return windows[release][place - int(starts[release])]

    count = sum(bool(np.array_equal(window(order[i]), window(order[i + 1]))) for i in same)
    pairs = len(hashes) * (len(hashes) - 1) / 2
    chance = pairs * (1 / (math.sqrt(2 * math.pi) * deviation)) ** _WINDOW
    return Check(name, min(1.0, chance) if count else 1.0, f"{count} of {len(hashes)} windows occur again")


def residues(integers: np.ndarray, name: str = "last digits") -> Check:
    """Remainders of integers [n] by 16 against the uniform distribution, by χ².

    If the noise's standard deviation exceeds 1000, they are uniform up to 10⁻¹⁰⁰⁰, regardless of the sum that they
    contain. Noise on a coarser lattice misses some remainders.
    """
    from scipy.stats import chisquare

    found = chisquare(np.bincount(np.mod(integers, 16).astype(np.int64).ravel(), minlength=16))
    return Check(name, float(found.pvalue), f"χ² {found.statistic:.1f} of 15 degrees of freedom")


def collisions(integers: np.ndarray, deviation: float, name: str = "equal numbers") -> Check:
    """How many pairs of n integers that are round(N(0, deviation²)) are equal, where n² is not far over the deviation.

    Two are equal with probability at most 1 / (2√π deviation). Pairs are then nearly independent, and their number is
    nearly Poisson. The test detects any lattice that is coarser than the integers, regardless of its spacing.
    """
    from scipy.stats import poisson

    _, counts = np.unique(integers, return_counts=True)
    pairs = int((counts * (counts - 1) // 2).sum())
    expected = integers.size * (integers.size - 1) / 2 / (2 * math.sqrt(math.pi) * deviation)
    return Check(name, float(poisson.sf(pairs - 1, expected)), f"{pairs} pairs, {expected:.2g} expected")


def on_grid(values: np.ndarray, name: str = "on the grid") -> Check:
    """Whether all values, in steps of the grid, are whole."""
    off = int((np.abs(values - np.rint(values)) > 1e-6).sum())
    return Check(name, 0.0 if off else 1.0, f"{off} of {values.size} numbers are no whole steps")


def normal_from_integers(integers: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Standard normal numbers [n] for integers that are round(N(0, deviation²)), exactly.

    Each is spread over its interval: x = Φ⁻¹(u), u uniform between Φ((k − ½) / s) and Φ((k + ½) / s).
    """
    from scipy.special import ndtr, ndtri

    sizes = np.abs(np.asarray(integers, np.float64))  # in the lower tail, where Φ has all its digits
    low, high = ndtr((-sizes - 0.5) / deviation), ndtr((-sizes + 0.5) / deviation)
    spread = ndtri(low + (high - low) * generator.random(sizes.shape))
    signs = np.where(integers == 0, generator.choice([-1.0, 1.0], sizes.shape), -np.sign(integers))
    return np.asarray(signs * spread)


def normal_from_membership(joined: np.ndarray, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Standard normal numbers for members of Poisson batches, bool of any shape, each true with probability `rate`."""
    from scipy.special import ndtri

    uniform = generator.random(joined.shape)
    return np.asarray(ndtri(np.where(joined, 1 - rate * uniform, (1 - rate) * uniform)))


def normal_from_batch_sizes(sizes: np.ndarray, count: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Standard normal numbers for sizes [n] of Poisson batches of `count` pictures: Binomial(count, rate)."""
    from scipy.special import ndtri
    from scipy.stats import binom

    below, upto = binom.cdf(sizes - 1, count, rate), binom.cdf(sizes, count, rate)
    return np.asarray(ndtri(below + (upto - below) * generator.random(len(sizes))))


def _sizes(numbers: np.ndarray) -> np.ndarray:
    """Standard normal numbers that follow from the squares of standard normal ones: Φ⁻¹(2 Φ(|x|) − 1)."""
    from scipy.special import ndtr, ndtri

    tails = 2 * ndtr(-np.abs(numbers))
    return np.asarray(-ndtri(tails.clip(np.finfo(float).tiny, 1 - np.finfo(float).eps)))
