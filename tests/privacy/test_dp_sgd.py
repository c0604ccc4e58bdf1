"""Clipping: every clipped row is within its bound, and one example changes its owner's sum by at most the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from privacy.bounded_sum import MAX_NOISE_MULTIPLIER, RESOLUTION, Support
from privacy.dp_sgd import BoundedSums, check_bounds, clip_and_sum, even_bounds, normalize, poisson_sample, sum_segments
from privacy.noise import CPU

LARGEST = 2.0**60  # squares of larger numbers overflow float32, see `test_overflowing_squares_count_as_zero`
FLOATS = st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([math.nan, math.inf, -math.inf])
CLIPS = st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 2.0, 1e15, math.inf])
ROUNDING = 1e-6  # float32 rounding without privacy
CUT = 1e-5  # relative loss of a norm by clipping, in addition to truncation


@st.composite
def batches(draw: st.DrawFn, least: int = 0) -> tuple[Tensor, list[int], list[list[float]], list[int]]:
    """Draw gradients [N, D], counts [R], bounds [R, L] and segments [L], also empty owners and parts of width 0."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(lambda counts: sum(counts) >= least))
    segments = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    bounds = draw(
        st.lists(
            st.lists(CLIPS, min_size=len(segments), max_size=len(segments)), min_size=len(counts), max_size=len(counts)
        )
    )
    rows = draw(arrays.arrays(np.float32, (sum(counts), sum(segments)), elements=FLOATS))
    return torch.from_numpy(rows), counts, bounds, segments


def clip(rows: Tensor, counts: Sequence[int], bounds: Sequence[Sequence[float]], segments: Sequence[int]) -> tuple:
    """Call `clip_and_sum` on a copy, since it overwrites its input."""
    limits = torch.tensor(bounds, dtype=torch.float64).view(len(counts), len(segments))
    return clip_and_sum(rows.clone(), torch.tensor(counts, dtype=torch.long), limits, segments)


def step_of(bounds: Sequence[float]) -> float:
    return math.hypot(*bounds) / RESOLUTION or 1.0


def clip_to_steps(
    rows: Tensor, counts: Sequence[int], bounds: Sequence[Sequence[float]], segments: Sequence[int]
) -> tuple:
    """Call `clip_and_sum` with steps, and return the sums as int64."""
    limits = torch.tensor(bounds, dtype=torch.float64).view(len(counts), len(segments))
    steps = torch.tensor([step_of(each) for each in bounds], dtype=torch.float64)
    values, dropped = clip_and_sum(rows.clone(), torch.tensor(counts, dtype=torch.long), limits, segments, steps)
    assert values.dtype == torch.float64
    assert torch.equal(values, values.trunc())
    return values.long(), dropped


def clip_row(row: Tensor, bounds: Sequence[float], segments: Sequence[int]) -> Tensor:
    """Clip one row, as the sum of an owner without other rows."""
    return clip(row[None], [1], [bounds], segments)[0][0]


def reference_clip(row: np.ndarray, bounds: Sequence[float], segments: Sequence[int]) -> np.ndarray:
    """Clip by definition, in float64."""
    if not np.isfinite(row).all():
        return np.zeros(len(row))
    parts = np.split(row.astype(np.float64), np.cumsum(segments)[:-1])
    norms = [np.linalg.norm(part) for part in parts]
    return np.concatenate(
        [part * min(1.0, c / n) if n else part for part, c, n in zip(parts, bounds, norms, strict=True)]
    )


def norm(row: Tensor) -> float:
    return float(torch.linalg.vector_norm(row.double()))


@given(batches())
@settings(max_examples=100)  # a guarantee of privacy, in cheap arithmetic
def test_sums_match_loop_over_rows(batch: tuple) -> None:
    rows, counts, bounds, segments = batch
    values, dropped = clip(*batch)
    assert values.shape == (len(counts), sum(segments))
    assert values.dtype == torch.float32
    remaining = iter(rows.numpy())
    for result, bad, count, limits in zip(values, dropped, counts, bounds, strict=True):
        own = [next(remaining) for _ in range(count)]
        clipped = [reference_clip(row, limits, segments) for row in own]
        scale = sum((np.abs(row) for row in clipped), np.zeros(sum(segments)))
        expected = sum(clipped, np.zeros(sum(segments)))
        assert (np.abs(result.numpy() - expected) <= ROUNDING * scale + 1e-37).all()
        assert bad == sum(not np.isfinite(row).all() for row in own)


def private(batch: tuple) -> tuple:
    """Replace infinite bounds."""
    rows, counts, bounds, segments = batch
    return rows, counts, [[0.1 if math.isinf(bound) else bound for bound in each] for each in bounds], segments


def exact_square(steps: Tensor, bounds: Sequence[float]) -> Fraction:
    """Compute ‖steps‖² of a part in units of the value, exactly."""
    return sum(count * count for count in steps.tolist()) * Fraction(step_of(bounds)) ** 2


@given(batches(least=1), st.data())
@settings(max_examples=100)  # a guarantee of privacy, in cheap arithmetic
def test_removing_row_changes_owner_sum_within_bound(batch: tuple, data: st.DataObject) -> None:
    """Exact arithmetic, without rounding."""
    rows, counts, bounds, segments = private(batch)
    removed = data.draw(st.integers(0, len(rows) - 1))
    owner = next(i for i in range(len(counts)) if removed < sum(counts[: i + 1]))
    rest = torch.cat([rows[:removed], rows[removed + 1 :]])
    fewer = [count - (i == owner) for i, count in enumerate(counts)]
    before, bad = clip_to_steps(rows, counts, bounds, segments)
    after, bad_after = clip_to_steps(rest, fewer, bounds, segments)
    moved = before[owner] - after[owner]
    for part, bound in zip(moved.split(segments), bounds[owner], strict=True):
        assert exact_square(part, bounds[owner]) <= Fraction(bound) ** 2
    others = [i for i in range(len(counts)) if i != owner]
    assert torch.equal(before[others], after[others])
    assert torch.equal(bad[others], bad_after[others])


@given(batches())
@example((torch.tensor([[0.75 / RESOLUTION]]), [1], [[1.0]], [1]))  # the nearest step is larger
def test_truncation_removes_less_than_a_step(batch: tuple) -> None:
    rows, counts, bounds, segments = private(batch)
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    for row, owner in zip(rows, owners, strict=True):
        steps, _ = clip_to_steps(row[None], [1], [bounds[owner]], segments)
        result, expected = (
            steps[0].numpy() * step_of(bounds[owner]),
            reference_clip(row.numpy(), bounds[owner], segments),
        )
        assert (np.abs(result) <= np.abs(expected) * (1 + 1e-12)).all()
        assert (np.abs(result - expected) <= step_of(bounds[owner]) + CUT * np.abs(expected)).all()
        for part, bound in zip(steps[0].split(segments), bounds[owner], strict=True):
            assert exact_square(part, bounds[owner]) <= Fraction(bound) ** 2


@given(batches())
def test_rows_without_steps_are_within_bounds(batch: tuple) -> None:
    rows, counts, bounds, segments = batch
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    for row, owner in zip(rows, owners, strict=True):
        clipped = clip_row(row, bounds[owner], segments)
        assert clipped.isfinite().all()
        for part, bound in zip(clipped.split(segments), bounds[owner], strict=True):
            assert norm(part) <= bound * (1 + CUT)


@pytest.mark.parametrize("bounds", [[1e-12], [1e15], [3e18], [1e30], [1e300], [1e-12, 1e15], [0.0, 1.0], [0.0, 0.0]])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-23, 1e-12, 1.0, 1e15, 1.8e19 / 64])
def test_rows_of_any_scale_are_exactly_within_bounds(bounds: list[float], scale: float) -> None:
    torch.manual_seed(0)
    segments = [4096 // len(bounds)] * len(bounds)
    rows = torch.cat([torch.randn(3, 4096), torch.ones(1, 4096), torch.rand(2, 4096) ** 40]) * scale
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        steps, _ = clip_to_steps(
            rows.to(dtype).to(torch.promote_types(dtype, torch.float32)), [1] * 6, [bounds] * 6, segments
        )
        for row in steps:
            for part, bound in zip(row.split(segments), bounds, strict=True):
                assert exact_square(part, bounds) <= Fraction(bound) ** 2


def test_bfloat16_gradients_are_rejected() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        clip_to_steps(torch.zeros(1, 2, dtype=torch.bfloat16), [1], [[1.0]], [2])


def test_sums_of_many_units_are_exact() -> None:
    """300 units of 2²⁰ − 1 steps exceed the exact integers of float32."""
    rows = torch.full((300, 1), 2.0)
    steps, _ = clip_to_steps(rows, [300], [[1.0]], [1])
    one, _ = clip_to_steps(rows[:1], [1], [[1.0]], [1])
    assert one.item() in range(RESOLUTION - 8, RESOLUTION)
    assert steps.item() == 300 * one.item()


ADVERSARIAL: dict[str, Callable[[int], Tensor]] = {
    "positive": lambda size: torch.rand(4, size),
    "falling": lambda size: torch.linspace(1, 0, size)[None],
    "large": lambda size: torch.rand(4, size) * 1e16,
    "huge": lambda size: torch.rand(4, size) * 1e30,
    "tiny": lambda size: torch.rand(4, size) * 1e-30,
    "smallest": lambda size: torch.full((1, size), 1e-45),
    "largest": lambda size: torch.full((1, size), 3e38),
    "one large among tiny": lambda size: torch.full((2, size), 1e-4).index_fill_(1, torch.tensor(0), 1e4),
}


def assert_clipped(rows: Tensor) -> None:
    """Assert that rows are clipped to the bound, not below it, within rounding."""
    lengths = torch.linalg.vector_norm(rows.double(), dim=1)
    for bound in (1e-12, 0.3, 1.0):
        values, dropped = clip_to_steps(rows, [1] * len(rows), [[bound]] * len(rows), [rows.shape[1]])
        assert values.abs().max() <= RESOLUTION
        squares = (values * values).sum(1)  # exact in int64, since each is at most 2⁴⁰
        assert squares.max() <= RESOLUTION**2
        long = (lengths > bound) & (dropped == 0)
        norms = squares.double().sqrt() / RESOLUTION
        assert (norms[long] >= 1 - CUT - rows.shape[1] ** 0.5 / RESOLUTION).all()


@pytest.mark.parametrize("size", [1, 4095, 4097, 200_000])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_long_rows_are_within_the_bound(kind: str, size: int) -> None:
    torch.manual_seed(0)
    assert_clipped(ADVERSARIAL[kind](size))


@pytest.mark.parametrize("size", [4095, 4097, 200_000])
def test_constant_rows_are_within_the_bound(size: int) -> None:
    """Adding the same square repeatedly to a growing sum rounds it down each time."""
    values = torch.linspace(0.5, 2.0, 400 if size < 5000 else 20)
    assert_clipped(values[:, None].expand(-1, size).contiguous())


@pytest.mark.parametrize("size", [1, 2, 4097])
@pytest.mark.parametrize("value", [1e20, 1e30, 3e38])
def test_overflowing_squares_count_as_zero(size: int, value: float) -> None:
    """Scaled by C / norm, which float32 can't represent either, they could have twice the norm C."""
    rows = torch.zeros(2, size)
    rows[0, -1], rows[1, -1] = value, 1.0
    for bound in (1e-12, 1e-6, 1.0, math.inf):
        values, dropped = clip(rows, [1, 1], [[bound]] * 2, [size])
        assert values[0].eq(0).all()
        assert dropped.tolist() == [1.0, 0.0]
        assert norm(values[1]) == pytest.approx(min(bound, 1.0))


def test_infinite_bound_leaves_rows_unchanged() -> None:
    rows = torch.tensor([[3e18, -3e18], [1e-40, 0.0], [math.nan, 1.0], [1.0, -math.inf]])
    values, dropped = clip(rows, [1, 1, 1, 1], [[math.inf]] * 4, [2])
    assert torch.equal(values[:2], rows[:2])
    assert values[2:].eq(0).all()
    assert dropped.tolist() == [0, 0, 1, 1]


def test_nan_drops_all_parts_of_its_row() -> None:
    rows = torch.tensor([[1.0, math.nan], [0.5, 0.5], [0.25, 0.25]])
    values, dropped = clip(rows, [2, 1], [[1.0, 1.0], [1.0, 1.0]], [1, 1])
    assert values.tolist() == [[0.5, 0.5], [0.25, 0.25]]
    assert dropped.tolist() == [1, 0]


def test_no_owners_and_no_rows() -> None:
    values, dropped = clip(torch.zeros(0, 3), [], [], [1, 2])
    assert values.shape == (0, 3)
    assert dropped.shape == (0,)
    values, dropped = clip(torch.zeros(0, 3), [0, 0], [[1.0, 2.0]] * 2, [1, 2])
    assert values.tolist() == [[0.0] * 3] * 2
    assert dropped.tolist() == [0.0, 0.0]


@given(counts=st.lists(st.integers(0, 3), max_size=5), width=st.sampled_from([None, 0, 2]))
def test_segments_are_summed_in_order(counts: list[int], width: int | None) -> None:
    values = torch.randn(sum(counts), *([] if width is None else [width]))
    result = sum_segments(values, torch.tensor(counts, dtype=torch.long))
    assert result.shape == (len(counts), *values.shape[1:])
    for total, part in zip(result, values.split(counts) if counts else [], strict=True):
        torch.testing.assert_close(total, part.sum(0))


@given(clip=st.floats(1e-6, 1e6), parts=st.lists(st.booleans(), max_size=9))
def test_even_bounds_combine_to_the_clip(clip: float, parts: list[bool]) -> None:
    bounds = even_bounds(clip, parts)
    assert [bound > 0 for bound in bounds] == parts
    assert len({bound for bound in bounds if bound}) <= 1
    assert math.hypot(*bounds) == pytest.approx(clip if any(parts) else 0.0)


class _RecordedNoise:
    """Noise source that returns 1, 2, … and records the size and standard deviation that it was asked for."""

    release = False

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return torch.arange(math.floor(size * rate))

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        self.asked.append((size, stddev))
        return torch.arange(1, size + 1, device=device)


@given(bounds=st.lists(CLIPS, min_size=1, max_size=4), sigma=st.floats(0, 100))
def test_noise_is_sigma_times_the_sensitivity(bounds: list[float], sigma: float) -> None:
    """The stddev is in steps; the L2 norm of the bounds is `RESOLUTION` steps."""
    source, result = _RecordedNoise(), BoundedSums(1, [1] * len(bounds), like=torch.zeros(0), private=True)
    if math.inf in bounds:
        with pytest.raises(ValueError, match="unbounded" if sigma else "finite bound"):
            result.reset([0], [bounds], [sigma])
        return
    result.reset([0], [bounds], [sigma])
    noise = result.draw_noise(0, source)
    if not sigma or not any(bounds):
        assert noise is None
        assert source.asked == []
    else:
        ((size, stddev),) = source.asked
        assert size == len(bounds)
        assert stddev * step_of(bounds) == pytest.approx(sigma * math.hypot(*bounds))


def test_only_the_support_gets_noise() -> None:
    result, mask = sums(), torch.tensor([True, False, False, True, True])
    result.reset([0], [[3.0, 4.0]], [2.0], [Support(mask, 3)])
    source = _RecordedNoise()
    noise = result.draw_noise(0, source)
    assert noise is not None
    assert noise.tolist() == [1, 0, 0, 2, 3]
    assert source.asked == [(3, 2.0 * RESOLUTION)]
    assert torch.equal(result.pop_noised([0], {0: noise})[0], noise * step_of([3.0, 4.0]))


def test_private_sum_requires_a_source() -> None:
    result = sums()
    result.reset([0], [[1.0, 1.0]], [1.0])
    with pytest.raises(ValueError, match="noise source"):
        result.draw_noise(0, None)


def test_batch_and_divisor_come_from_public_numbers() -> None:
    assert poisson_sample(10, 0.3, _RecordedNoise()).tolist() == [0, 1, 2]
    assert poisson_sample(0, 0.3, _RecordedNoise()).tolist() == []
    assert normalize(torch.tensor([[2.0, 4.0], [0.0, 9.0]]), torch.tensor([[4.0], [3.0]])).tolist() == [
        [0.5, 1.0],
        [0.0, 3.0],
    ]


def sums(clients: int = 3, segments: Sequence[int] = (2, 3), *, private: bool = True) -> BoundedSums:
    return BoundedSums(clients, segments, like=torch.zeros(0), private=private)


def add_pass(found: BoundedSums, rows: Tensor, counts: Sequence[int], clients: Sequence[int]) -> None:
    """Add the gradients of one pass."""
    index = torch.tensor(clients)
    found.add(index, found.clip(index, rows.clone(), torch.tensor(counts)))


class TestBoundedSums:
    @pytest.mark.parametrize("private", [True, False])
    @given(data=st.data())
    def test_microbatches_add_up_to_the_batch(self, private: bool, data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        counts = data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3))
        rows = {client: torch.randn(count, 5) for client, count in enumerate(counts)}
        bounds = [[1.0, 0.5], [2.0, 3.0], [0.0, 1e-3]] if private else [[math.inf, math.inf]] * 3
        result = sums(private=private)
        result.reset([0, 1, 2], bounds, [0.0] * 3)
        order = data.draw(st.permutations([client for client, count in enumerate(counts) for _ in range(count)]))
        used = dict.fromkeys(rows, 0)
        for client in order:  # in random order, one row at a time
            add_pass(result, rows[client][used[client]][None], [1], [client])
            used[client] += 1
        if private:
            whole, _ = clip_to_steps(torch.cat(list(rows.values())), counts, bounds, [2, 3])
            steps = torch.tensor([[step_of(each)] for each in bounds], dtype=torch.float64)
            assert torch.equal(result.pop_noised([0, 1, 2], {}), (whole * steps).float())
        else:
            whole, _ = clip(torch.cat(list(rows.values())), counts, bounds, [2, 3])
            torch.testing.assert_close(result.pop_noised([0, 1, 2], {}), whole)

    def test_noise_is_added_in_whole_steps(self) -> None:
        result, rows = sums(), torch.randn(3, 5)
        result.reset([0, 1, 2], [[3.0, 4.0], [1.0, 1.0], [2.0, 2.0]], [2.0, 0.0, 0.0])
        source = _RecordedNoise()
        assert [result.draw_noise(client, source) is None for client in range(3)] == [False, True, True]
        assert source.asked == [(5, 2.0 * RESOLUTION)]
        add_pass(result, rows, [1, 1, 1], [0, 1, 2])
        noise = torch.randint(-(2**40), 2**40, (5,))
        expected, _ = clip_to_steps(rows, [1, 1, 1], result.bounds.tolist(), [2, 3])
        expected[0] += noise
        values = expected * torch.tensor([[step_of(each)] for each in result.bounds.tolist()], dtype=torch.float64)
        unasked = {1: torch.full((5,), 10**9), 2: torch.full((5,), 10**9)}
        assert torch.equal(result.pop_noised([2, 0, 1], {0: noise, **unasked}), values[[2, 0, 1]].float())

    def test_empty_batch_adds_noise(self) -> None:
        result, noise = sums(), torch.arange(5)
        result.reset([1], [[0.6, 0.8]], [0.5])
        add_pass(result, torch.zeros(0, 5), [0], [1])
        assert torch.equal(result.pop_noised([1], {1: noise})[0], noise / RESOLUTION)

    def test_nothing_is_released_twice(self) -> None:
        result = sums(private=False)
        result.reset([0], [[math.inf, math.inf]], [0.0])
        add_pass(result, torch.ones(1, 5), [1], [0])
        assert result.pop_noised([0], {}).tolist() == [[1.0] * 5]
        assert result.pop_noised([0], {}).tolist() == [[0.0] * 5]

    def test_private_sum_requires_noise(self) -> None:
        result = sums()
        result.reset([0, 1], [[1.0, 1.0]] * 2, [1.0] * 2)
        with pytest.raises(KeyError):
            result.pop_noised([0, 1], {0: torch.zeros(5, dtype=torch.int64)})

    def test_result_is_not_a_view(self) -> None:
        for private in (True, False):
            result = sums(private=private)
            result.reset([0], [[1.0, 1.0]], [0.0])
            result.pop_noised([0], {}).fill_(7.0)
            assert result.pop_noised([0], {}).tolist() == [[0.0] * 5]

    def test_other_clients_are_unchanged(self) -> None:
        result = sums()
        result.reset([0, 1], [[1.0, 1.0], [2.0, 1.0]], [1.0, 0.0])
        rows = torch.tensor([[math.nan] * 5, [1.0] * 5])
        add_pass(result, rows, [1, 1], [0, 1])
        add_pass(result, rows, [1, 1], [1, 0])
        bounds = result.bounds[1].clone()
        result.pop_noised([0], {0: torch.zeros(5, dtype=torch.int64)})
        result.reset([0, 2], [[5.0, 5.0]] * 2, [1.0] * 2)
        assert torch.equal(result.bounds[1], bounds)
        assert result.dropped.tolist() == [0.0, 1.0, 0.0]
        expected = torch.tensor([[1.0, 1.0, *[3**-0.5] * 3]])
        torch.testing.assert_close(result.pop_noised([1], {}), expected, rtol=CUT, atol=2 * step_of([2.0, 1.0]))

    def test_reset_clears_sums(self) -> None:
        result = sums()
        result.reset([0], [[1.0, 1.0]], [3.0])
        add_pass(result, torch.tensor([[1.0] * 5, [math.inf] * 5]), [2], [0])
        assert result.dropped.tolist() == [1.0, 0.0, 0.0]
        result.reset([0], [[2.0, 1.0]], [0.0])
        assert result.dropped.tolist() == [0.0] * 3
        assert result.pop_noised([0], {}).tolist() == [[0.0] * 5]

    def test_default_bounds_are_infinite(self) -> None:
        result = sums(private=False)
        assert result.bounds.eq(math.inf).all()
        assert result.bounds.dtype == torch.float64

    @pytest.mark.parametrize("bound", [-1.0, math.nan, 1e-13, -math.inf])
    def test_invalid_bounds_are_rejected(self, bound: float) -> None:
        for bounds in ([bound, 1.0], [1.0, bound]):
            with pytest.raises(ValueError, match="clip"):
                check_bounds(bounds, 0.0)
            with pytest.raises(ValueError, match="clip"):
                sums().reset([0], [bounds], [0.0])

    def test_noise_on_unbounded_sum_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="unbounded"):
            sums().reset([0], [[1.0, math.inf]], [1.0])

    def test_number_of_bounds_must_match_clients(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            sums().reset([0, 1], [[1.0, 1.0]], [1.0, 1.0])

    def test_noise_on_non_private_sums_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="not private"):
            sums(private=False).reset([0], [[1.0, 1.0]], [1.0])

    def test_private_sum_without_bound_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="finite bound"):
            sums().reset([0], [[1.0, math.inf]], [0.0])

    @pytest.mark.parametrize("sigma", [math.nan, math.inf, -1.0, 1.01 * MAX_NOISE_MULTIPLIER])
    def test_excessive_noise_is_rejected(self, sigma: float) -> None:
        with pytest.raises(ValueError, match="noise_multiplier"):
            sums().reset([0], [[1.0, 1.0]], [sigma])

    def test_largest_noise_is_exact(self) -> None:
        result = sums()
        result.reset([0], [[1.0, 1.0]], [MAX_NOISE_MULTIPLIER])
        most = int(MAX_NOISE_MULTIPLIER * RESOLUTION) * 64
        add_pass(result, torch.full((1, 5), -9.0), [1], [0])
        own, _ = clip_to_steps(torch.full((1, 5), -9.0), [1], [[1.0, 1.0]], [2, 3])
        noised = result._values[[0]] + most
        assert torch.equal(noised.long(), own + most)

    def test_float64_gradients_stay_float64(self) -> None:
        result = BoundedSums(1, [2], like=torch.zeros(0, dtype=torch.float64), private=True)
        result.reset([0], [[1.0]], [0.0])
        rows, one = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([0])
        result.add(one, result.clip(one, rows, torch.tensor([1])))
        assert (result.pop_noised([0], {}) - torch.tensor([[0.6, 0.8]], dtype=torch.float64)).abs().max() < CUT
