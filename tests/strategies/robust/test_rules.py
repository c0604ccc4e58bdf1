"""Rules on whole changes, against numpy on vectors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.robust import UpdateGeometry
from strategies.robust.afa import AFA, outlying, similarity
from strategies.robust.foolsgold import FoolsGold, originality
from strategies.robust.geometric import GeometricMedian
from strategies.robust.gram import changes
from strategies.robust.krum import MultiKrum, count
from strategies.robust.norm import NormBound
from tests.helpers.means import random_adapter, rounds

RULES = {
    "norm": NormBound(),
    "fixed": NormBound(bound=2.0),
    "krum": MultiKrum(outliers=0.2),
    "foolsgold": FoolsGold(),
    "afa": AFA(),
    "geometric": GeometricMedian(),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def of_vectors(vectors, weights=None):
    """Changes at one site, [K, D]."""
    flat = torch.as_tensor(np.asarray(vectors), dtype=torch.float64)
    weights = torch.ones(len(flat), dtype=torch.float64) if weights is None else torch.tensor(weights).double()
    there = torch.ones(1, len(flat), dtype=torch.bool)
    gram = flat @ flat.T
    return UpdateGeometry(
        gram[None], gram.diagonal()[None], torch.zeros(1).long(), there, weights, torch.ones_like(weights)
    )


def mean(judged, vectors):
    """What an exact aggregation makes of it."""
    shares = (judged.weights / judged.weights.sum()).numpy()
    return (shares * judged.scales.numpy()) @ np.asarray(vectors)


@st.composite
def attacked(draw, most=0.2):
    """Honest vectors around something, at most a fifth of others anywhere, and how many are honest; mixed up."""
    n = draw(st.integers(5, 24))
    bad = draw(st.integers(0, count(most, n)))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    size = 10.0 ** draw(st.integers(-3, 5))
    honest = random.normal(size=6) + random.normal(size=(n - bad, 6))
    others = size * random.normal(size=(bad, 6))
    if draw(st.booleans()) and bad:  # who agree
        others[:] = others[0]
    return random.permutation(np.concatenate([honest, others])), honest


@rules
@settings(max_examples=30, deadline=None)
@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_devices_is_nothing_and_somebody_stays(rule, round, shuffled):
    current, updates = round
    if rule in (RULES["krum"], RULES["foolsgold"]):  # of equals, and by rounding, one may be kept for the others
        updates = [(random_adapter(4, 7 + number), weight) for number, (_, weight) in enumerate(updates)]
    found = rule.reweight(changes(current, updates))
    assert (found.weights > 0).any()
    assert (found.weights >= 0).all()
    assert ((found.scales >= 0) & (found.scales <= 1)).all()
    order = list(range(len(updates)))
    shuffled.shuffle(order)
    other = rule.reweight(changes(current, [updates[place] for place in order]))
    assert torch.allclose(other.weights, found.weights[order], rtol=1e-4, atol=1e-6)
    assert torch.allclose(other.scales, found.scales[order], rtol=1e-6)


@rules
def test_equal_changes_and_one_alone_give_themselves(rule):
    one = np.array([0.3, -0.2, 0.1])
    for vectors in ([one], [one] * 7, [0 * one] * 7):
        assert np.allclose(mean(rule.reweight(of_vectors(vectors)), vectors), vectors[0])


@rules
def test_nothing_trained_is_nothing_to_judge(rule):
    current = random_adapter(4, 0)
    for updates in ([(random_adapter(0, 1), 1.0)], [({}, 2.0), (random_adapter(0, 1), 1.0)]):
        given = changes(current, updates)
        assert torch.equal(rule.reweight(given).weights, given.weights)


@rules
def test_who_trained_nothing_is_nothing_to_the_others(rule):
    current = random_adapter(4, 0)
    updates = [(random_adapter(4, number), 1.0) for number in range(1, 8)]
    alone, beside = (rule.reweight(changes(current, given)) for given in (updates, [*updates, ({}, 1.0)]))
    assert beside.weights.isfinite().all()
    assert beside.scales[-1] == 1
    if rule is not RULES["krum"]:  # which leaves out as many of eight as of seven
        shares, before = (weights / weights.sum() for weights in (beside.weights[:-1], alone.weights))
        assert torch.allclose(shares, before, rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(attacked())
def test_no_change_counts_with_more_than_an_honest_norm(found):
    vectors, honest = found
    judged = RULES["norm"].reweight(of_vectors(vectors))
    norms = np.linalg.norm(vectors, axis=1)
    bound = np.sort(norms)[(len(norms) - 1) // 2]
    assert np.allclose(judged.scales, np.minimum(1, bound / norms))
    assert bound <= np.linalg.norm(honest, axis=1).max() * (1 + 1e-9)
    scaled = judged.scales.numpy()[:, None] * vectors
    assert np.allclose(judged.gram[0], scaled @ scaled.T)


def test_a_fixed_bound_and_a_factor():
    vectors = np.diag([1.0, 2.0, 4.0])
    assert RULES["fixed"].reweight(of_vectors(vectors)).scales.tolist() == pytest.approx([1, 1, 0.5])
    assert NormBound(factor=1.5).reweight(of_vectors(vectors)).scales.tolist() == pytest.approx([1, 1, 0.75])


@settings(max_examples=30, deadline=None)
@given(attacked())
def test_krum_is_blanchards(found):
    vectors, honest = found
    n, f = len(vectors), count(0.2, len(vectors))
    judged = RULES["krum"].reweight(of_vectors(vectors))
    if n < 2 * f + 3:
        f = (n - 3) // 2
    apart = ((vectors[:, None] - vectors) ** 2).sum(2)
    scores = [np.sort(np.delete(apart[i], i))[: n - f - 2].sum() for i in range(n)]
    kept = judged.weights.numpy() > 0
    assert kept.sum() == n - f
    if f:
        assert max(np.array(scores)[kept]) <= min(np.array(scores)[~kept]) * (1 + 1e-9) + 1e-9
    spread = np.linalg.norm(honest[:, None] - honest, axis=2).max()
    nearest = np.linalg.norm(vectors[kept][:, None] - honest, axis=2).min(1).max()
    assert nearest <= spread * max(1.0, ((n - f - 2) / 2) ** 0.5) + 1e-9


@settings(max_examples=30, deadline=None)
@given(attacked(), st.booleans())
def test_no_other_point_has_a_smaller_sum_of_distances(found, weighted):
    vectors, _ = found
    random = np.random.default_rng(0)
    weights = random.uniform(0.5, 2.0, len(vectors)) if weighted else np.ones(len(vectors))
    z = mean(RULES["geometric"].reweight(of_vectors(vectors, weights)), vectors)

    def total(point):
        return weights @ np.linalg.norm(vectors - point, axis=1)

    slack = 1e-3 * np.median(np.linalg.norm(vectors - vectors.mean(0), axis=1)) * weights.sum()
    assert total(z) <= min(total(vector) for vector in vectors) + slack
    for _ in range(20):
        assert total(z) <= total(z + random.normal(size=6) * 10.0 ** random.uniform(-4, 1)) + slack


@settings(max_examples=30, deadline=None)
@given(attacked())
def test_a_fifth_of_outliers_moves_the_geometric_median_no_further_than_its_bound(found):
    vectors, honest = found
    z = mean(RULES["geometric"].reweight(of_vectors(vectors)), vectors)
    middle = honest.mean(0)
    share = 1 - len(honest) / len(vectors)
    bound = 2 * (1 - share) / (1 - 2 * share) * np.linalg.norm(honest - middle, axis=1).max()
    assert np.linalg.norm(z - middle) <= bound * (1 + 1e-2)


def by_the_paper(cosines):
    """Algorithm 1 of FoolsGold, from the cosines on, κ = 1; a cosine below 0 is no likeness."""
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


@settings(max_examples=25, deadline=None)
@given(attacked())
def test_foolsgold_is_the_papers(found):
    vectors, _ = found
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = of_vectors(vectors).cosines()
    assert np.allclose(cosines, unit @ unit.T, atol=1e-6)
    if (wanted := by_the_paper(cosines.numpy())).any():
        assert np.allclose(RULES["foolsgold"].reweight(of_vectors(vectors)).weights, wanted, atol=1e-6)


def test_those_who_agree_are_found_at_any_size_and_the_others_are_left():
    random = np.random.default_rng(0)
    honest, agreed = random.normal(size=(16, 1000)), random.normal(size=1000)
    for size in (0.01, 1.0, 100.0):
        vectors = np.concatenate([honest, size * np.stack([agreed] * 4)])
        assert RULES["foolsgold"].reweight(of_vectors(vectors)).weights.tolist() == [1.0] * 16 + [0.0] * 4


def test_if_all_are_one_nobody_is_more_original():
    assert not originality(torch.ones(3, 3)).any()
    one = of_vectors([[1.0, 2.0]] * 3)
    assert (RULES["foolsgold"].reweight(one).weights > 0).any()


def by_algorithm_1(cosines, weights, xi=2.0, step=0.5):
    """AFA, from the cosines on, with the median's deviation: who is left."""
    left = [k for k, weight in enumerate(weights) if weight > 0]
    while len(left) > 2:
        s = {
            k: np.average([cosines[k][j] for j in left if j != k], weights=[weights[j] for j in left if j != k])
            for k in left
        }
        middle = np.median(list(s.values()))
        sigma = 1.4826 * np.median([abs(value - middle) for value in s.values()])
        low = np.mean(list(s.values())) < middle
        bad = [k for k in left if (s[k] < middle - xi * sigma if low else s[k] > middle + xi * sigma)]
        if not bad:
            break
        left, xi = [k for k in left if k not in bad], xi + step
    return left


@settings(max_examples=25, deadline=None)
@given(attacked(), st.integers(0, 2**31))
def test_afa_is_the_papers(found, seed):
    vectors, _ = found
    random = np.random.default_rng(seed)
    weights = random.uniform(0.5, 2.0, len(vectors)) * (random.uniform(size=len(vectors)) > 0.1)
    whole = of_vectors(vectors, weights)
    judged = RULES["afa"].reweight(whole)
    assert judged.there.tolist() == by_algorithm_1(whole.cosines().numpy(), weights)
    assert torch.equal(judged.weights[judged.there], whole.weights[judged.there])


@pytest.mark.parametrize("kind", ["flipped", "pulls back"])
def test_who_points_elsewhere_is_left_out_where_people_have_little_in_common(kind):
    random = np.random.default_rng(0)
    common = random.normal(size=4000) / 4000**0.5
    honest = common + 2 * random.normal(size=(16, 4000)) / 4000**0.5  # cosines of 0.2
    own = 2 * random.normal(size=(4, 4000)) / 4000**0.5
    others = {"flipped": -common + own, "pulls back": own - 3 * common}[kind]
    left = RULES["afa"].reweight(of_vectors(np.concatenate([others, honest]))).there.tolist()
    assert not set(left) & set(range(4))
    assert len(left) >= 14  # 2 σ of people like others are few


def test_similar_is_a_mean_over_the_others_and_half_are_never_apart():
    cosines = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, -0.1], [0.2, -0.1, 1.0]])
    found = similarity(cosines, torch.tensor([1.0, 2.0, 1.0]).expand(3, 3))
    assert torch.allclose(found, torch.tensor([0.4, 0.2, 0.0]))
    nobody = similarity(cosines, torch.diag(torch.ones(3)))
    assert nobody.isnan().all()
    assert not outlying(nobody, 2.0).any()
    assert not outlying(torch.ones(5), 2.0).any()
    assert outlying(torch.tensor([0.1, 0.11, 0.09, 0.1, -0.5]), 2.0).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [(AFA, "xi"), (AFA, "step"), (NormBound, "bound"), (NormBound, "factor"), (MultiKrum, "outliers")],
)
def test_what_makes_no_sense_is_refused(rule, wrong):
    with pytest.raises(ValueError, match="must be"):
        rule(**{wrong: -1.0})
