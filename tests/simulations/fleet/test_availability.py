"""Charging and usage schedules."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from common.units import HOUR
from simulations.fleet.availability import DAY, DailySchedule, RecordedSchedule, load_traces


def test_daily_span_over_midnight():
    schedule = DailySchedule([22.0, 7.0], [0.0, 24.0], phase=HOUR)
    plugged = [schedule.plugged(day * DAY + hour * HOUR) for day in (0, 5) for hour in (0, 7.5, 8.5, 22, 23.5)]
    assert plugged == [True, True, False, False, True] * 2
    assert schedule.idle(1e6)
    assert schedule.next_change(0.0) == 8 * HOUR
    assert DailySchedule([0.0, 24.0], [0.0, 24.0]).next_change(0.0) == float("inf")


@given(st.floats(0, 20 * DAY), st.integers(0, 9), st.floats(0, 7200))
def test_next_change_is_the_first(time, seed, jitter):
    recorded = RecordedSchedule([(0.0, HOUR), (5 * HOUR, 30 * HOUR)])
    for schedule in (DailySchedule([21.5, 6.0], [9.0, 12.0], jitter=jitter, seed=seed), recorded):
        later = schedule.next_change(time)
        assert later > time
        for share in (0.1, 0.5, 0.999):
            between = min(time + share * (later - time), math.nextafter(later, time))
            assert (schedule.plugged(between), schedule.idle(between)) == (schedule.plugged(time), schedule.idle(time))


def test_jitter_differs_by_day_and_seed():
    starts = []
    for seed in (1, 1, 2):
        schedule = DailySchedule([12.0, 13.0], [0.0, 24.0], jitter=600.0, seed=seed)
        starts.append([schedule.next_change(day * DAY + 11 * HOUR) - day * DAY - 12 * HOUR for day in range(20)])
    assert starts[0] == starts[1] != starts[2]
    assert len(set(starts[0])) == 20
    assert all(abs(late) <= 600 for late in starts[0])


@pytest.mark.parametrize("name", ["trace.csv", "trace.json"])
def test_traces_are_loaded_and_repeat(tmp_path, name):
    file = tmp_path / name
    file.write_text(
        "device,on,off\na,10,20\nb,5,90000\na,30,40\n"
        if name.endswith("csv")
        else json.dumps({"a": [[10, 20], [30, 40]], "b": [[5, 90000]]})
    )
    traces = load_traces(file)
    assert [traces["a"].plugged(time) for time in (9, 10, 19, 20, 35, DAY + 35)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert traces["a"].idle(15)
    assert [traces["b"].plugged(time) for time in (1, 89_999, 90_001, 2 * DAY + 1, 2 * DAY + 6)] == [
        False,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "device,on,off\n",
        "device,on\na,1\n",
        "device,on,off\na,5,4\n",
        "device,on,off\na,x,4\n",
        "device,on,off\n" + 200_000 * "x" + ",1,2\n",
        "device,on,off\na,5,nan\n",
        "device,on,off\na,-1,4\n",
        "device,on,off\na,1,4\na,2,9\n",
        "\x80\x04}q\x00.",
    ],
)
def test_invalid_csv_is_one_line(tmp_path, text):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(AntherError, match=r"fleet\.trace=.*trace\.csv") as raised:
        load_traces(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "{", 100_000 * "[", '{"a": []}', '{"a": [[1]]}', '{"a": 5}', "{}"])
def test_invalid_json_is_one_line(tmp_path, text):
    file = tmp_path / "trace.json"
    file.write_text(text)
    with pytest.raises(AntherError, match=r"fleet\.trace="):
        load_traces(file)
    with pytest.raises(AntherError, match="absent"):
        load_traces(tmp_path / "absent.csv")


def test_old_days_are_not_kept():
    schedule = DailySchedule([22.0, 6.0], [0.0, 8.0], jitter=HOUR, seed=1)
    changes = [schedule.next_change(day * DAY) for day in range(100)]
    assert len(schedule._days) <= 4
    assert [schedule.next_change(day * DAY) for day in range(100)] == changes  # also for earlier times
