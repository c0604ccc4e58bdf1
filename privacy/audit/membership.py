"""Evaluation of membership inference attacks: ROC curve, AUC, TPR and their confidence intervals.

Pictures of one writer are alike, so intervals come from resampling whole writers. Some letters are easier than others,
so members are compared with non-members *of the same letter*: if membership is independent of the pictures, an attack
without any information has an AUC of 0.5, even if many more small letters than digits were trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FPR = 0.01  # false positive rate at which an attack is evaluated too


class Interval(NamedTuple):
    """Estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class AttackTrial:
    """Scores of one attack on n pictures. All arrays are [n].

    Raises:
        ValueError: lengths differ, a score is not finite, or there are no members and non-members of one letter.
    """

    scores: np.ndarray
    """Score of each picture; higher for a more likely member."""
    members: np.ndarray
    """bool: whether the picture is a member."""
    writers: np.ndarray
    """int: writer of the picture."""
    letters: np.ndarray
    """int: letter that the picture shows. Members are compared with non-members of the same letter."""

    def __post_init__(self) -> None:
        if not len(self.scores) == len(self.members) == len(self.writers) == len(self.letters):
            raise ValueError("scores, members, writers and letters must have the same length")
        if not np.isfinite(self.scores).all():
            raise ValueError("a score is not finite")
        if not matched_weights(np.ones(len(self.scores)), self.members, self.letters)[self.members].any():
            raise ValueError("no letter is shown by both a member and a non-member")


class RocCurve(NamedTuple):
    """ROC curve through (0, 0) and (1, 1), with a point at each distinct score."""

    fpr: np.ndarray
    tpr: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the curve: probability that a member scores higher than a non-member; ties count half."""
        return float(np.sum(np.diff(self.fpr) * (self.tpr[1:] + self.tpr[:-1]) / 2))

    def tpr_at(self, fpr: float) -> float:
        """Return the largest true positive rate at a false positive rate of at most `fpr`."""
        return float(self.tpr[np.searchsorted(self.fpr, fpr, side="right") - 1])


@dataclass(frozen=True)
class MembershipResult:
    """Performance of a membership inference attack."""

    auc: Interval
    tpr: Interval
    """True positive rate at a false positive rate of 1 %."""
    roc: RocCurve
    members: int
    others: int


def matched_weights(weights: np.ndarray, members: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """Reweight pictures so that members and non-members have the same distribution of letters.

    Letters that only members or only non-members show get weight 0.

    Args:
        weights: weights before matching [n].
        members: whether each picture is a member, bool [n].
        letters: letter of each picture, int [n].

    Returns:
        Weights [n].
    """
    size = int(letters.max()) + 1
    member_counts = np.bincount(letters, weights * members, size)
    other_counts = np.bincount(letters, weights * ~members, size)
    ratio = np.divide(member_counts, other_counts, out=np.zeros(size), where=other_counts > 0)
    return weights * np.where(members, (other_counts > 0)[letters], ratio[letters])


def roc(trial: AttackTrial, weights: np.ndarray | None = None) -> RocCurve:
    """Compute the ROC curve of an attack, with weights [n] of the pictures (default: 1), matched by letter."""
    order = np.argsort(-trial.scores, kind="stable")
    is_last = np.append(np.diff(trial.scores[order]) != 0, True)  # of a run of equal scores
    return _roc(trial, np.ones(len(order)) if weights is None else weights, order, is_last)


def judge(trial: AttackTrial, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> MembershipResult:
    """Estimate AUC and TPR at 1 % FPR, with percentile bootstrap intervals over writers (Efron, 1979).

    Args:
        trial: the attack's scores.
        resamples: number of bootstrap samples.
        confidence: confidence of the intervals.
        seed: seed of the bootstrap.
    """
    order = np.argsort(-trial.scores, kind="stable")
    is_last = np.append(np.diff(trial.scores[order]) != 0, True)
    _, owner = np.unique(trial.writers, return_inverse=True)
    count, generator = int(owner.max()) + 1, np.random.default_rng(seed)
    resampled: list[tuple[float, float]] = []
    while len(resampled) < resamples:
        draws = generator.multinomial(count, np.full(count, 1 / count)).astype(float)[owner]
        if not (matched_weights(draws, trial.members, trial.letters) * trial.members).any():
            continue  # no member and non-member of one letter: happens with very few writers only
        curve = _roc(trial, draws, order, is_last)
        resampled.append((curve.auc, curve.tpr_at(FPR)))
    ends = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    point = _roc(trial, np.ones(len(order)), order, is_last)
    return MembershipResult(
        auc=Interval(point.auc, *map(float, ends[:, 0])),
        tpr=Interval(point.tpr_at(FPR), *map(float, ends[:, 1])),
        roc=point,
        members=int(trial.members.sum()),
        others=int((~trial.members).sum()),
    )


def _roc(trial: AttackTrial, weights: np.ndarray, order: np.ndarray, is_last: np.ndarray) -> RocCurve:
    weights = matched_weights(weights, trial.members, trial.letters)[order]
    members = trial.members[order]
    hits, alarms = np.cumsum(weights * members)[is_last], np.cumsum(weights * ~members)[is_last]
    return RocCurve(np.append(0.0, alarms / alarms[-1]), np.append(0.0, hits / hits[-1]))
