"""Exact goodness-of-fit tests of noise and batches, for a mechanism whose inputs are all known.

Every observation is first transformed to a number that is standard normal and independent of all others if the
mechanism is the claimed one: the residual of a release divided by the standard deviation of the noise, or the
randomized quantile residual of a batch (Dunn & Smyth, 1996). A common battery then tests these numbers: their
distribution, variance and extremes, and their dependence at every lag.

Each test returns a p-value that is valid for finite samples: for an honest mechanism it is at most p with probability
at most p. So a Bonferroni bound over all tests of an audit bounds its false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MIN_PRODUCTS = 64  # minimum number of products in a sum of an autocorrelation
_CANDIDATES = 200  # lags with the largest normalized sums, whose p-values are computed
_MAX_NUMBER = 1e3  # no honest number is larger; an infinite number would make statistics undefined
_WINDOW = 8  # consecutive numbers that no two releases share by chance


class Check(NamedTuple):
    """Result of one test of one set of numbers. Field names are stored in reports."""

    name: str
    p_value: float
    """Upper bound on the probability that an honest mechanism gives a statistic at least this extreme."""
    shown: str
    """Description of the statistic."""


def battery(releases: Sequence[np.ndarray]) -> list[Check]:
    """Test whether these vectors [d] consist of independent standard normal numbers.

    The autocorrelations are computed over the concatenated vectors, so that they detect a dependence within a vector,
    at any lag, and between any two vectors. Autocorrelations of the squares detect it even if signs were flipped.
    """
    releases = [
        np.nan_to_num(np.ravel(release), nan=_MAX_NUMBER).clip(-_MAX_NUMBER, _MAX_NUMBER) for release in releases
    ]
    numbers = np.concatenate(releases)
    checks = [distribution(numbers), variance(numbers), extremes(numbers)]
    checks += [
        autocorrelation(numbers, "autocorrelation"),
        autocorrelation(_normal_from_squares(numbers), "of the squares"),
    ]
    by_size: dict[int, list[np.ndarray]] = {}
    for release in releases:
        by_size.setdefault(release.size, []).append(release)
    checks += [between(np.stack(rows)) for rows in by_size.values() if len(rows) > 1]
    return checks


def distribution(numbers: np.ndarray) -> Check:
    """Test numbers [n] against N(0, 1) (Kolmogorov-Smirnov)."""
    from scipy.stats import kstest

    result = kstest(numbers, "norm")
    return Check("distribution", float(result.pvalue), f"KS distance {result.statistic:.2g} of {len(numbers)} numbers")


def variance(numbers: np.ndarray) -> Check:
    """Test Σ x² of numbers [n] against χ² with n degrees of freedom, on both sides."""
    from scipy.stats import chi2

    total = float(np.square(numbers).sum())
    p_value = 2 * min(chi2.cdf(total, len(numbers)), chi2.sf(total, len(numbers)))
    return Check("variance", min(1.0, float(p_value)), f"σ is {math.sqrt(total / len(numbers)):.4f} × the claimed one")


def shortfall(count: int, significance: float, power: float) -> float:
    """Return the smallest relative shortfall of σ that `variance` detects.

    Noise with standard deviation f σ gives Σ x² = f² χ²: the shortfall is detected if this is below the critical value.

    Args:
        count: number of tested numbers.
        significance: significance of the test.
        power: probability of detection.
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
    """Test the largest |Σ_i x_i x_{i+k}| over all lags k of independent standard normal numbers [n]."""
    n = len(numbers)
    if n <= 2 * _MIN_PRODUCTS:
        return Check(name, 1.0, "too few numbers")
    padded = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(numbers, padded)
    sums = np.fft.irfft(np.square(spectrum.real) + np.square(spectrum.imag), padded)[1 : n - _MIN_PRODUCTS]
    counts = n - np.arange(1, n - _MIN_PRODUCTS)
    scores = np.abs(sums) / np.sqrt(counts)
    lags = np.argsort(scores)[-_CANDIDATES:]
    p_values = [products_p_value(abs(float(sums[lag])), int(counts[lag])) for lag in lags]
    best = int(np.argmin(p_values))
    lag = int(lags[best])
    p_value = min(1.0, 2 * len(sums) * p_values[best])
    return Check(name, p_value, f"largest at lag {lag + 1} of {len(sums)}: {sums[lag] / counts[lag]:+.2g}")


def between(rows: np.ndarray) -> Check:
    """Test the largest |Σ_i x_i y_i| over all pairs of releases [R, d]."""
    count, size = rows.shape
    sums = np.abs(np.triu(rows @ rows.T, 1))
    largest = float(sums.max())
    p_value = min(1.0, count * (count - 1) * products_p_value(largest, size))
    return Check("between releases", p_value, f"largest of {count} releases: {largest / size:.2g}")


def products_p_value(total: float, count: int) -> float:
    """Bound P(Σ x_i x_{i+k} ≥ total) of `count` products from above, for any lag k (Chernoff bound).

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
    """Test Σ ⟨x, v⟩ / √Σ ‖v‖² of residuals x and fixed vectors v against N(0, 1).

    It detects anything that is added to a release besides its noise, if its direction is known.

    Args:
        residuals: residuals x [d].
        directions: directions v [d], one for each residual.
        name: name of the check.
    """
    from scipy.special import log_ndtr

    length = math.sqrt(sum(float(np.square(direction).sum()) for direction in directions))
    if not length:
        return Check(name, 1.0, "nothing to look for")
    score = sum(float(np.sum(x * v)) for x, v in zip(residuals, directions, strict=True)) / length
    return Check(name, 2 * math.exp(float(log_ndtr(-abs(score)))), f"{score:+.2f} standard errors")


def repeats(releases: Sequence[np.ndarray], deviation: float, name: str = "repeats") -> Check:
    """Test whether eight consecutive numbers occur twice in integer noise, anywhere.

    Two honest integers are equal with probability at most 1 / (√(2π) deviation).

    Args:
        releases: integers of each release [d].
        deviation: standard deviation of the noise.
        name: name of the check.
    """
    windows = [np.lib.stride_tricks.sliding_window_view(release, _WINDOW) for release in releases]
    factors = np.random.default_rng(0).integers(1, 2**63, _WINDOW, dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        keys = [(window.astype(np.int64).view(np.uint64) * factors).sum(1, dtype=np.uint64) for window in windows]
    hashes = np.concatenate(keys)
    order = np.argsort(hashes, kind="stable")
    same = np.nonzero(hashes[order][1:] == hashes[order][:-1])[0]
    starts = np.cumsum([0, *map(len, keys)])

    def window(position: int) -> np.ndarray:
        release = int(np.searchsorted(starts, position, side="right")) - 1
        return windows[release][position - int(starts[release])]

    count = sum(bool(np.array_equal(window(order[i]), window(order[i + 1]))) for i in same)
    pairs = len(hashes) * (len(hashes) - 1) / 2
    chance = pairs * (1 / (math.sqrt(2 * math.pi) * deviation)) ** _WINDOW
    return Check(name, min(1.0, chance) if count else 1.0, f"{count} of {len(hashes)} windows occur again")


def residues(integers: np.ndarray, name: str = "last digits") -> Check:
    """Test the remainders of integers [n] modulo 16 against the uniform distribution (χ²).

    If the noise's standard deviation exceeds 1000, they are uniform up to 10⁻¹⁰⁰⁰, for any noised sum. Noise on a
    coarser lattice misses some remainders.
    """
    from scipy.stats import chisquare

    result = chisquare(np.bincount(np.mod(integers, 16).astype(np.int64).ravel(), minlength=16))
    return Check(name, float(result.pvalue), f"χ² {result.statistic:.1f} of 15 degrees of freedom")


def collisions(integers: np.ndarray, deviation: float, name: str = "equal numbers") -> Check:
    """Test the number of equal pairs among integers [n] that are round(N(0, deviation²)).

    Two are equal with probability at most 1 / (2√π deviation). If n² is not far above the deviation, pairs are nearly
    independent, and their number is nearly Poisson. The test detects any lattice that is coarser than the integers,
    regardless of its spacing.

    Args:
        integers: noise [n].
        deviation: standard deviation of the noise.
        name: name of the check.
    """
    from scipy.stats import poisson

    _, counts = np.unique(integers, return_counts=True)
    pairs = int((counts * (counts - 1) // 2).sum())
    expected = integers.size * (integers.size - 1) / 2 / (2 * math.sqrt(math.pi) * deviation)
    return Check(name, float(poisson.sf(pairs - 1, expected)), f"{pairs} pairs, {expected:.2g} expected")


def on_grid(values: np.ndarray, name: str = "on the grid") -> Check:
    """Check that all values are multiples of the grid step. Values are given in steps, in an array of any shape."""
    off = int((np.abs(values - np.rint(values)) > 1e-6).sum())
    return Check(name, 0.0 if off else 1.0, f"{off} of {values.size} numbers are no whole steps")


def normal_from_integers(integers: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Transform integers that are round(N(0, deviation²)) to standard normal numbers, exactly.

    Each integer is spread over its interval: x = Φ⁻¹(u), u uniform between Φ((k − ½) / s) and Φ((k + ½) / s).

    Args:
        integers: noise [n].
        deviation: standard deviation s of the noise.
        generator: source of the randomization.

    Returns:
        Numbers [n].
    """
    from scipy.special import ndtr, ndtri

    sizes = np.abs(np.asarray(integers, np.float64))  # in the lower tail, where Φ is accurate
    low, high = ndtr((-sizes - 0.5) / deviation), ndtr((-sizes + 0.5) / deviation)
    spread = ndtri(low + (high - low) * generator.random(sizes.shape))
    signs = np.where(integers == 0, generator.choice([-1.0, 1.0], sizes.shape), -np.sign(integers))
    return np.asarray(signs * spread)


def normal_from_membership(joined: np.ndarray, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Transform memberships in Poisson batches to standard normal numbers.

    Args:
        joined: memberships, bool of any shape, each true with probability `rate`.
        rate: sampling rate q.
        generator: source of the randomization.

    Returns:
        Numbers of the same shape.
    """
    from scipy.special import ndtri

    uniform = generator.random(joined.shape)
    return np.asarray(ndtri(np.where(joined, 1 - rate * uniform, (1 - rate) * uniform)))


def normal_from_batch_sizes(sizes: np.ndarray, count: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Transform sizes of Poisson batches, which are Binomial(count, rate), to standard normal numbers.

    Args:
        sizes: batch sizes [n].
        count: number of pictures.
        rate: sampling rate q.
        generator: source of the randomization.

    Returns:
        Numbers [n].
    """
    from scipy.special import ndtri
    from scipy.stats import binom

    below, up_to = binom.cdf(sizes - 1, count, rate), binom.cdf(sizes, count, rate)
    return np.asarray(ndtri(below + (up_to - below) * generator.random(len(sizes))))


def _normal_from_squares(numbers: np.ndarray) -> np.ndarray:
    """Transform the squares of standard normal numbers to standard normal ones: Φ⁻¹(2 Φ(|x|) − 1)."""
    from scipy.special import ndtr, ndtri

    tails = 2 * ndtr(-np.abs(numbers))
    return np.asarray(-ndtri(tails.clip(np.finfo(float).tiny, 1 - np.finfo(float).eps)))
