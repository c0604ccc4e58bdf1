"""Who points against the others is left out, as FLTrust does (Cao et al., 2021, arXiv:2012.13995, §IV).

There an update counts by ReLU(cos) with one that the server trains on pictures of its own. Here the server has none:
what the others have in common takes its place, and found out is who they are.
"""

from __future__ import annotations

from strategies.robust import Changes, Filtering
from strategies.robust.afa import similarity

_PASSES = 10


class Aligned:
    """Those whose mean cosine with the others that are left is 0 or more, again and again until they stay the same.

    Who was left out comes back if it goes along with those who are left: pointing against attackers is no fault.
    """

    sensitivity = Filtering(
        bounded=False, reason="who points where the others do counts: one device decides whether the others do"
    )

    def judge(self, changes: Changes) -> Changes:
        there = changes.there
        cosines, common = changes.among(there).cosines(), changes.common()[there[:, None], there]
        given = changes.weights[there]
        left = given
        for _ in range(_PASSES):
            against = similarity(cosines, left * common) < 0
            found = given.masked_fill(against, 0.0)
            if not found.any() or found.equal(left):
                break
            left = found
        return changes._replace(weights=changes.weights.index_copy(0, there, left))
