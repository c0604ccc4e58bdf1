"""The work to compute ε is bounded for any request, and merging kinds never lowers ε."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import accounting, step_kinds
from privacy.accounting import INTERVALS, MAX_POINTS, PoissonGaussian, epsilon
from privacy.step_kinds import MAX_KINDS, StepKind, merge_kinds


def random_events(*found: StepKind) -> list[PoissonGaussian]:
    return [PoissonGaussian(noise_multiplier=sigma, sampling_rate=q, steps=n) for sigma, q, n in found]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Record the number of kinds and points of every computed grid."""
    result, losses = [], accounting._composed_losses

    def counted(asked: tuple[StepKind, ...], interval: float) -> accounting._Level:
        level = losses(asked, interval)
        result.append((len(asked), level.points))
        return level

    accounting._composed_epsilon.cache_clear()
    monkeypatch.setattr(accounting, "_composed_losses", counted)
    yield result
    accounting._composed_epsilon.cache_clear()


HOSTILE = [
    [(0.161, 3.05e-8, 128), (0.846, 3.45e-7, 702)],
    [(0.05, 3e-8, 128), (0.846, 3.45e-7, 702)],
    [(0.05, 9e-9, 1000)],
    [(0.05, 1e-9, 10_000)],
    [(0.05, 1.0, 10**8)],
    [(1e-4, 1.0, 10**6)],
    [(1e6, 1e-9, 1), (1e6, 1.0, 10_000)],
    [(0.3, 1e-4, 10_000)],
    [(50 + number / 1024, 0.01, 1) for number in range(400)],
    [(0.05 * 1.01**number, 1e-4 * 1.007**number, 1 + number) for number in range(700)],
]


@pytest.mark.integration
@pytest.mark.parametrize("asked", HOSTILE, ids=map(str, range(len(HOSTILE))))
def test_work_is_bounded(asked: list[StepKind], work: list[tuple[int, int]]) -> None:
    assert epsilon(random_events(*asked), 1e-5).value >= 0
    of_asked = [points for count, points in work if count == max(count for count, _ in work)]  # empty if ε is infinite
    assert sum(of_asked) <= 1.5 * MAX_POINTS
    assert max((count for count, _ in work), default=0) <= MAX_KINDS


@pytest.mark.stress
def test_work_is_bounded_for_any_events(work: list[tuple[int, int]]) -> None:
    generator = random.Random(1)
    for _ in range(150):
        count = generator.choice((1, 2, 3, 20))
        asked = [
            (
                10 ** generator.uniform(-1.3, 6),
                min(1.0, 10 ** generator.uniform(-9, 0.3)),
                int(10 ** generator.uniform(0, 4)),
            )
            for _ in range(count)
        ]
        work.clear()
        epsilon(random_events(*asked), 1e-5)
        most = max(count for count, _ in work)
        assert sum(points for count, points in work if count == most) <= 1.5 * MAX_POINTS, asked


@pytest.mark.parametrize(
    ("asked", "delta", "before"),
    [
        ([(1.0, 0.2, 16)], 1e-5, 6.017565744262475),
        ([(0.75, 0.25, 100)], 1e-3, 23.676603359684254),
        ([(2.0, 0.1, 1000)], 1e-5, 8.279608417436329),
        ([(1.2, 0.05, 10_000)], 1e-5, 32.8808496267817),
        ([(6.0, 0.1, 600)], 1e-5, 1.6209547696269768),
        ([(1.1, 0.1, 500), (20.0, 1.0, 10)], 1e-5, 13.9404984915889),
        ([(0.3, 1e-4, 10_000)], 1e-5, 11.926885031253855),
        ([(0.5, 1e-4, 10_000)], 1e-5, 1.175602986551216),
    ],
)
def test_ordinary_runs_are_not_overestimated(asked: list[StepKind], delta: float, before: float) -> None:
    """Values from before work was bounded: not lower, and at most 0.2 % higher."""
    result = epsilon(random_events(*asked), delta).value
    assert before * (1 - 1e-4) <= result <= before * 1.002


def test_few_kinds_are_unchanged() -> None:
    few = [(1.0 + number, 0.1, 5) for number in range(MAX_KINDS)]
    assert merge_kinds(few) == tuple(few)


KIND = st.tuples(st.floats(0.05, 1e6), st.floats(1e-9, 1.0), st.integers(1, 10_000))


@given(st.lists(KIND, max_size=60))
def test_merged_kinds_dominate(asked: list[StepKind]) -> None:
    """Each kind is counted as one with no more noise and no less sampling: some assignment covers all steps."""
    result = merge_kinds(asked)
    assert len(result) <= MAX_KINDS or len(asked) <= MAX_KINDS
    assert sum(n for _, _, n in result) == sum(n for _, _, n in asked)
    for sigma, rate, _ in asked:
        assert any(other <= sigma and q >= rate for other, q, _ in result)
    assert all(sigma > 0 and 0 < q <= 1 for sigma, q, _ in result)


@given(st.floats(1e-9, 1e9), st.sampled_from([2.0**-9, 2.0**-5, 0.5, 1.0, 4.0, 64.0]))
def test_rounding_grids_are_nested(value: float, width: float) -> None:
    result = step_kinds._round_down(value, width)
    assert result <= value < result * 2.0**width * (1 + 1e-9)
    assert step_kinds._round_down(result, width) == result
    assert step_kinds._round_down(step_kinds._round_down(value, width), 2 * width) == step_kinds._round_down(
        value, 2 * width
    )


@pytest.mark.integration
def test_merged_kinds_never_understate_epsilon() -> None:
    generator = random.Random(2)
    asked = [(generator.uniform(0.8, 3), generator.uniform(0.05, 0.3), generator.randint(5, 30)) for _ in range(40)]
    exact = accounting._composed_losses(tuple(asked), INTERVALS[2]).losses.get_epsilon_for_delta(1e-5)
    result = epsilon(random_events(*asked), 1e-5).value
    assert 0.99 * exact <= result <= 2 * exact  # the exact value uses a coarser grid
