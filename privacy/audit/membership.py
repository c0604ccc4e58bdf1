"""Who was trained on, by a score of every picture: ROC, AUC and their intervals.

Pictures of one writer are alike, so intervals come from drawing whole writers anew. And some letters are easier than
others, so members are compared with others *of the same letter*: where membership was drawn without looking at the
pictures, an attack that knows nothing has an AUC of 0.5, however many more small letters than digits were trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FPR = 0.01  # the rate of false alarms at which an attack is also judged


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class AttackTrial:
    """One attack on n pictures: everything is [n].

    Raises:
        ValueError: lengths differ, a score is not finite, or there is nobody to tell apart.
    """

    scores: np.ndarray
    """Higher for a picture that seems to be a member."""
    members: np.ndarray
    """bool: whether it is one."""
    writers: np.ndarray
    """int: whose picture it is."""
    letters: np.ndarray
    """int: what it shows; members are compared with others that show the same."""

    def __post_init__(self) -> None:
        if not len(self.scores) == len(self.members) == len(self.writers) == len(self.letters):
            raise ValueError("scores, members, writers and letters must be of one length")
        if not np.isfinite(self.scores).all():
            raise ValueError("a score is not finite")
        if not matched_weights(np.ones(len(self.scores)), self.members, self.letters)[self.members].any():
            raise ValueError("no member shows what somebody else's picture shows too")


class RocCurve(NamedTuple):
    """The curve through (0, 0) and (1, 1), a point at each distinct score."""

    fpr: np.ndarray
    tpr: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the curve: the probability that a member scores higher than another, ties counted half."""
        return float(np.sum(np.diff(self.fpr) * (self.tpr[1:] + self.tpr[:-1]) / 2))

    def tpr_at(self, fpr: float) -> float:
        """The largest share of members found with at most this share of false alarms."""
        return float(self.tpr[np.searchsorted(self.fpr, fpr, side="right") - 1])


@dataclass(frozen=True)
class MembershipResult:
    """How well an attack tells members."""

    auc: Interval
    tpr: Interval
    """True positives at 1 % false ones."""
    roc: RocCurve
    members: int
    others: int


def matched_weights(weights: np.ndarray, members: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """Weights [n] under which members and others show the same letters; what only one side shows counts nothing."""
    size = int(letters.max()) + 1
    inside = np.bincount(letters, weights * members, size)
    outside = np.bincount(letters, weights * ~members, size)
    ratio = np.divide(inside, outside, out=np.zeros(size), where=outside > 0)
    return weights * np.where(members, (outside > 0)[letters], ratio[letters])


def roc(trial: AttackTrial, weights: np.ndarray | None = None) -> RocCurve:
    """The curve of an attack, each picture counted with its weight [n] (default: 1) and matched by letter."""
    order = np.argsort(-trial.scores, kind="stable")
    last = np.append(np.diff(trial.scores[order]) != 0, True)  # of each run of equal scores
    return _roc(trial, np.ones(len(order)) if weights is None else weights, order, last)


def judge(trial: AttackTrial, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> MembershipResult:
    """AUC and TPR at 1 % FPR with percentile intervals over writers drawn anew, with replacement (Efron, 1979)."""
    order = np.argsort(-trial.scores, kind="stable")
    last = np.append(np.diff(trial.scores[order]) != 0, True)
    _, owner = np.unique(trial.writers, return_inverse=True)
    count, generator = int(owner.max()) + 1, np.random.default_rng(seed)
    drawn: list[tuple[float, float]] = []
    while len(drawn) < resamples:
        times = generator.multinomial(count, np.full(count, 1 / count)).astype(float)[owner]
        if not (matched_weights(times, trial.members, trial.letters) * trial.members).any():
            continue  # no two pictures of one letter: only where there are hardly any
        curve = _roc(trial, times, order, last)
        drawn.append((curve.auc, curve.tpr_at(FPR)))
    ends = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    whole = _roc(trial, np.ones(len(order)), order, last)
    return MembershipResult(
        auc=Interval(whole.auc, *map(float, ends[:, 0])),
        tpr=Interval(whole.tpr_at(FPR), *map(float, ends[:, 1])),
        roc=whole,
        members=int(trial.members.sum()),
        others=int((~trial.members).sum()),
    )


def _roc(trial: AttackTrial, weights: np.ndarray, order: np.ndarray, last: np.ndarray) -> RocCurve:
    weights = matched_weights(weights, trial.members, trial.letters)[order]
    members = trial.members[order]
    found, alarms = np.cumsum(weights * members)[last], np.cumsum(weights * ~members)[last]
    return RocCurve(np.append(0.0, alarms / alarms[-1]), np.append(0.0, found / found[-1]))
