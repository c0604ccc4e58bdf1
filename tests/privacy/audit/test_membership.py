"""Statistics of membership inference, compared with loops over pairs and with data of known truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from privacy.audit.membership import AttackTrial, judge, matched_weights, roc


def trial(scores: object, members: object, writers: object = None, letters: object = None) -> AttackTrial:
    scores, members = np.asarray(scores, float), np.asarray(members, bool)
    same = np.zeros(len(scores), int)
    return AttackTrial(
        scores,
        members,
        same if writers is None else np.asarray(writers),
        same if letters is None else np.asarray(letters),
    )


coins = st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=3).filter(lambda r: len({b for _, b in r}) == 2)
pictures = st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 2)), min_size=2, max_size=40)


def comparable(rows: list[tuple[int, bool, int]]) -> bool:
    return any(one[1] and not other[1] and one[2] == other[2] for one in rows for other in rows)


@given(pictures.filter(comparable))
def test_auc_is_the_mean_over_matched_pairs(rows: list[tuple[int, bool, int]]) -> None:
    """Each member is compared with the non-members, weighted to the members' distribution of letters."""
    inside = [row for row in rows if row[1] and any(not o[1] and o[2] == row[2] for o in rows)]
    outside = [row for row in rows if not row[1]]
    weight = {
        letter: sum(row[2] == letter for row in inside) / sum(row[2] == letter for row in outside)
        for letter in {row[2] for row in outside}
    }
    pairs = [
        (weight[other[2]], 1.0 if own[0] > other[0] else 0.5 if own[0] == other[0] else 0.0)
        for own in inside
        for other in outside
    ]
    expected = sum(w * won for w, won in pairs) / sum(w for w, _ in pairs)
    assert roc(trial(*zip(*[row[:2] for row in rows], strict=True), None, [r[2] for r in rows])).auc == pytest.approx(
        expected
    )


@given(coins)
def test_auc_matches_the_rank_formula(rows: list[tuple[int, bool]]) -> None:
    scores, members = map(np.array, zip(*rows, strict=True))
    n1, n0 = members.sum(), (~members).sum()
    expected = (rankdata(scores)[members].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)
    assert roc(trial(scores, members)).auc == pytest.approx(expected)


@given(coins, st.floats(0, 1))
def test_tpr_uses_the_best_allowed_threshold(rows: list[tuple[int, bool]], allowed: float) -> None:
    scores, members = map(np.array, zip(*rows, strict=True))
    rates = [(np.mean(scores[~members] >= at), np.mean(scores[members] >= at)) for at in [*scores, np.inf]]
    best = max(result for alarms, result in rates if alarms <= allowed + 1e-12)
    assert roc(trial(scores, members)).tpr_at(allowed + 1e-12) == pytest.approx(best)


def test_letters_give_no_advantage() -> None:
    """Small letters, which are easy, are most of the members: without matching, the AUC would be 0.68."""
    generator = np.random.default_rng(0)
    letters = np.concatenate([generator.choice(2, 4000, p=[0.8, 0.2]), generator.choice(2, 4000, p=[0.4, 0.6])])
    members = np.arange(8000) < 4000
    scores = -letters + 0.5 * generator.standard_normal(8000)
    assert roc(trial(scores, members)).auc > 0.65
    assert roc(trial(scores, members, None, letters)).auc == pytest.approx(0.5, abs=0.025)


def test_matching_equalizes_letters() -> None:
    members = np.array([1, 1, 1, 0, 0, 0], bool)
    letters = np.array([0, 0, 1, 0, 2, 2])
    assert matched_weights(np.ones(6), members, letters).tolist() == [1, 1, 0, 2, 0, 0]


def clustered(seed: int, shift: float = 0.0, writers: int = 40) -> AttackTrial:
    """Create scores of twenty pictures of each writer; whole writers are members, and their scores shift together."""
    generator = np.random.default_rng(seed)
    members = np.tile(np.arange(20) % 2 == 0, writers)
    owner = np.arange(writers).repeat(20)
    effect = generator.standard_normal(writers)[owner] * members
    scores = generator.standard_normal(20 * writers) + effect + shift * members
    return trial(scores, members, owner, np.zeros(20 * writers, int))


@pytest.mark.integration
def test_intervals_over_writers_have_coverage() -> None:
    covered, naive = 0, 0
    for seed in range(60):
        drawn = clustered(seed)
        by_writer = judge(drawn, resamples=100, seed=seed).auc
        alone = trial(drawn.scores, drawn.members, np.arange(len(drawn.scores)), drawn.letters)
        by_picture = judge(alone, resamples=100, seed=seed).auc
        covered += by_writer.low <= 0.5 <= by_writer.high
        naive += by_picture.low <= 0.5 <= by_picture.high
        assert by_writer.low <= by_writer.value <= by_writer.high
    assert covered >= 48  # of 60: intervals from 100 resamples cover about 92 %; 48 is three standard errors less
    assert naive <= covered - 6


def test_real_difference_is_detected() -> None:
    result = judge(clustered(1, shift=2.0), resamples=300)
    assert result.auc.low > 0.7
    assert result.tpr.value > 0.1
    assert (result.members, result.others) == (400, 400)
    assert judge(clustered(1, shift=2.0), resamples=300).auc == result.auc


def test_invalid_trials_are_rejected() -> None:
    with pytest.raises(ValueError, match="same length"):
        AttackTrial(np.zeros(2), np.zeros(3, bool), np.zeros(3, int), np.zeros(3, int))
    with pytest.raises(ValueError, match="not finite"):
        trial([np.nan, 1.0], [True, False])
    with pytest.raises(ValueError, match="both a member and a non-member"):
        trial([0.0, 1.0], [True, False], None, [0, 1])
