"""Robust rules against numpy on vectors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.robust import UpdateGeometry
from strategies.robust.afa import AFA, outliers, similarity
from strategies.robust.foolsgold import FoolsGold, originality
from strategies.robust.geometric import GeometricMedian
from strategies.robust.gram import changes
from strategies.robust.krum import MultiKrum, count
from strategies.robust.norm import NormBound
from tests.helpers.means import random_adapter, rounds

RULES = {
    "norm": NormBound(),
    "fixed": NormBound(bound=2.0),
    "krum": MultiKrum(outlier_fraction=0.2),
    "foolsgold": FoolsGold(),
    "afa": AFA(),
    "geometric": GeometricMedian(),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def of_vectors(vectors, weights=None):
    """Make the geometry of changes `[K, D]` at one site."""
    flat = torch.as_tensor(np.asarray(vectors), dtype=torch.float64)
    weights = torch.ones(len(flat), dtype=torch.float64) if weights is None else torch.tensor(weights).double()
    active = torch.ones(1, len(flat), dtype=torch.bool)
    gram = flat @ flat.T
    return UpdateGeometry(
        gram[None], gram.diagonal()[None], torch.zeros(1).long(), active, weights, torch.ones_like(weights)
    )


def mean(judged, vectors):
    """Compute the mean with the weights and scales of a rule, as an exact aggregation does."""
    shares = (judged.weights / judged.weights.sum()).numpy()
    return (shares * judged.scales.numpy()) @ np.asarray(vectors)


@st.composite
def attacked(draw, fraction=0.2):
    """Draw shuffled vectors with at most a fifth of outliers, and the honest ones among them."""
    n = draw(st.integers(5, 24))
    malicious = draw(st.integers(0, count(fraction, n)))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    size = 10.0 ** draw(st.integers(-3, 5))
    honest = random.normal(size=6) + random.normal(size=(n - malicious, 6))
    outlying = size * random.normal(size=(malicious, 6))
    if draw(st.booleans()) and malicious:  # colluding
        outlying[:] = outlying[0]
    return random.permutation(np.concatenate([honest, outlying])), honest


@rules
@given(rounds(), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_a_device_remains(rule, round, shuffled):
    current, updates = round
    if rule in (RULES["krum"], RULES["foolsgold"]):  # one of several equal updates may be kept, by rounding
        updates = [(random_adapter(4, 7 + number), weight) for number, (_, weight) in enumerate(updates)]
    result = rule.reweight(changes(current, updates))
    assert (result.weights > 0).any()
    assert (result.weights >= 0).all()
    assert ((result.scales >= 0) & (result.scales <= 1)).all()
    order = list(range(len(updates)))
    shuffled.shuffle(order)
    other = rule.reweight(changes(current, [updates[index] for index in order]))
    assert torch.allclose(other.weights, result.weights[order], rtol=1e-4, atol=1e-6)
    assert torch.allclose(other.scales, result.scales[order], rtol=1e-6)


@rules
def test_equal_changes_are_unchanged(rule):
    vector = np.array([0.3, -0.2, 0.1])
    for vectors in ([vector], [vector] * 7, [0 * vector] * 7):
        assert np.allclose(mean(rule.reweight(of_vectors(vectors)), vectors), vectors[0])


@rules
def test_untrained_updates_are_unchanged(rule):
    current = random_adapter(4, 0)
    for updates in ([(random_adapter(0, 1), 1.0)], [({}, 2.0), (random_adapter(0, 1), 1.0)]):
        geometry = changes(current, updates)
        assert torch.equal(rule.reweight(geometry).weights, geometry.weights)


@rules
def test_untrained_device_does_not_affect_others(rule):
    current = random_adapter(4, 0)
    updates = [(random_adapter(4, number), 1.0) for number in range(1, 8)]
    without, with_untrained = (
        rule.reweight(changes(current, geometry)) for geometry in (updates, [*updates, ({}, 1.0)])
    )
    assert with_untrained.weights.isfinite().all()
    assert with_untrained.scales[-1] == 1
    if rule is not RULES["krum"]:  # it removes as many of eight as of seven
        shares, before = (weights / weights.sum() for weights in (with_untrained.weights[:-1], without.weights))
        assert torch.allclose(shares, before, rtol=1e-3)


@given(attacked())
def test_norm_bound_is_at_most_an_honest_norm(result):
    vectors, honest = result
    judged = RULES["norm"].reweight(of_vectors(vectors))
    norms = np.linalg.norm(vectors, axis=1)
    bound = np.sort(norms)[(len(norms) - 1) // 2]
    assert np.allclose(judged.scales, np.minimum(1, bound / norms))
    assert bound <= np.linalg.norm(honest, axis=1).max() * (1 + 1e-9)
    scaled = judged.scales.numpy()[:, None] * vectors
    assert np.allclose(judged.gram[0], scaled @ scaled.T)


def test_norm_bound_fixed_and_by_factor():
    vectors = np.diag([1.0, 2.0, 4.0])
    assert RULES["fixed"].reweight(of_vectors(vectors)).scales.tolist() == pytest.approx([1, 1, 0.5])
    assert NormBound(factor=1.5).reweight(of_vectors(vectors)).scales.tolist() == pytest.approx([1, 1, 0.75])


@given(attacked())
def test_krum_matches_the_paper(result):
    vectors, honest = result
    n, f = len(vectors), count(0.2, len(vectors))
    judged = RULES["krum"].reweight(of_vectors(vectors))
    if n < 2 * f + 3:
        f = (n - 3) // 2
    distances = ((vectors[:, None] - vectors) ** 2).sum(2)
    scores = [np.sort(np.delete(distances[i], i))[: n - f - 2].sum() for i in range(n)]
    remaining = judged.weights.numpy() > 0
    assert remaining.sum() == n - f
    if f:
        assert max(np.array(scores)[remaining]) <= min(np.array(scores)[~remaining]) * (1 + 1e-9) + 1e-9
    spread = np.linalg.norm(honest[:, None] - honest, axis=2).max()
    nearest = np.linalg.norm(vectors[remaining][:, None] - honest, axis=2).min(1).max()
    assert nearest <= spread * max(1.0, ((n - f - 2) / 2) ** 0.5) + 1e-9


@given(attacked(), st.booleans())
def test_geometric_median_minimizes_the_distances(result, weighted):
    vectors, _ = result
    random = np.random.default_rng(0)
    weights = random.uniform(0.5, 2.0, len(vectors)) if weighted else np.ones(len(vectors))
    z = mean(RULES["geometric"].reweight(of_vectors(vectors, weights)), vectors)

    def total(point):
        return weights @ np.linalg.norm(vectors - point, axis=1)

    slack = 1e-3 * np.median(np.linalg.norm(vectors - vectors.mean(0), axis=1)) * weights.sum()
    assert total(z) <= min(total(vector) for vector in vectors) + slack
    for _ in range(20):
        assert total(z) <= total(z + random.normal(size=6) * 10.0 ** random.uniform(-4, 1)) + slack


@given(attacked())
def test_geometric_median_stays_within_its_bound(result):
    vectors, honest = result
    z = mean(RULES["geometric"].reweight(of_vectors(vectors)), vectors)
    center = honest.mean(0)
    fraction = 1 - len(honest) / len(vectors)
    bound = 2 * (1 - fraction) / (1 - 2 * fraction) * np.linalg.norm(honest - center, axis=1).max()
    assert np.linalg.norm(z - center) <= bound * (1 + 1e-2)


def foolsgold_weights(cosines):
    """Compute algorithm 1 of FoolsGold from cosines, with κ = 1; negative cosines count as 0."""
    n = len(cosines)
    cs = np.where(np.eye(n, dtype=bool), 0.0, np.clip(cosines, 0, 1))
    v = cs.max(1)
    pardoned = cs.copy()
    for i in range(n):
        for j in range(n):
            if v[j] > v[i]:
                pardoned[i, j] = cs[i, j] * v[i] / v[j]
    alpha = 1 - pardoned.max(1)
    alpha = np.clip(alpha / alpha.max(), 1e-9, 1 - 1e-9)
    return np.clip(np.log(alpha / (1 - alpha)) + 0.5, 0, 1)


@given(attacked())
def test_foolsgold_matches_the_paper(result):
    vectors, _ = result
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = of_vectors(vectors).cosines()
    assert np.allclose(cosines, unit @ unit.T, atol=1e-6)
    if (expected := foolsgold_weights(cosines.numpy())).any():
        assert np.allclose(RULES["foolsgold"].reweight(of_vectors(vectors)).weights, expected, atol=1e-6)


def test_foolsgold_removes_colluders_of_any_size():
    random = np.random.default_rng(0)
    honest, agreed = random.normal(size=(16, 1000)), random.normal(size=1000)
    for size in (0.01, 1.0, 100.0):
        vectors = np.concatenate([honest, size * np.stack([agreed] * 4)])
        assert RULES["foolsgold"].reweight(of_vectors(vectors)).weights.tolist() == [1.0] * 16 + [0.0] * 4


def test_foolsgold_with_equal_changes():
    assert not originality(torch.ones(3, 3)).any()
    vector = of_vectors([[1.0, 2.0]] * 3)
    assert (RULES["foolsgold"].reweight(vector).weights > 0).any()


def afa_remaining(cosines, weights, xi=2.0, step=0.5):
    """Compute AFA from cosines, with the median absolute deviation; returns the remaining devices."""
    remaining = [k for k, weight in enumerate(weights) if weight > 0]
    while len(remaining) > 2:
        s = {
            k: np.average(
                [cosines[k][j] for j in remaining if j != k], weights=[weights[j] for j in remaining if j != k]
            )
            for k in remaining
        }
        center = np.median(list(s.values()))
        sigma = 1.4826 * np.median([abs(value - center) for value in s.values()])
        low = np.mean(list(s.values())) < center
        malicious = [k for k in remaining if (s[k] < center - xi * sigma if low else s[k] > center + xi * sigma)]
        if not malicious:
            break
        remaining, xi = [k for k in remaining if k not in malicious], xi + step
    return remaining


@given(attacked(), st.integers(0, 2**31))
def test_afa_matches_the_paper(result, seed):
    vectors, _ = result
    random = np.random.default_rng(seed)
    weights = random.uniform(0.5, 2.0, len(vectors)) * (random.uniform(size=len(vectors)) > 0.1)
    geometry = of_vectors(vectors, weights)
    judged = RULES["afa"].reweight(geometry)
    assert judged.active.tolist() == afa_remaining(geometry.cosines().numpy(), weights)
    assert torch.equal(judged.weights[judged.active], geometry.weights[judged.active])


@pytest.mark.parametrize("kind", ["flipped", "pulls back"])
def test_afa_removes_other_directions(kind):
    random = np.random.default_rng(0)
    common = random.normal(size=4000) / 4000**0.5
    honest = common + 2 * random.normal(size=(16, 4000)) / 4000**0.5  # cosines of 0.2
    own = 2 * random.normal(size=(4, 4000)) / 4000**0.5
    outlying = {"flipped": -common + own, "pulls back": own - 3 * common}[kind]
    remaining = RULES["afa"].reweight(of_vectors(np.concatenate([outlying, honest]))).active.tolist()
    assert not set(remaining) & set(range(4))
    assert len(remaining) >= 14  # few honest devices are beyond 2 σ


def test_afa_similarity_and_outliers():
    cosines = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, -0.1], [0.2, -0.1, 1.0]])
    result = similarity(cosines, torch.tensor([1.0, 2.0, 1.0]).expand(3, 3))
    assert torch.allclose(result, torch.tensor([0.4, 0.2, 0.0]))
    none = similarity(cosines, torch.diag(torch.ones(3)))
    assert none.isnan().all()
    assert not outliers(none, 2.0).any()
    assert not outliers(torch.ones(5), 2.0).any()
    assert outliers(torch.tensor([0.1, 0.11, 0.09, 0.1, -0.5]), 2.0).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [(AFA, "xi"), (AFA, "step"), (NormBound, "bound"), (NormBound, "factor"), (MultiKrum, "outlier_fraction")],
)
def test_invalid_arguments_are_refused(rule, wrong):
    with pytest.raises(ValueError, match="must be"):
        rule(**{wrong: -1.0})
