"""Terminal output: live, plain and narrow."""

import io
from typing import Any

import pytest
from rich.console import Console

from privacy.accounting import DEVICE, Guarantee
from simulations.report.display import Display, bar, compare, gain, relative_to_base, results_table
from simulations.report.time_left import RunWork

SUMMARY: dict[str, Any] = {
    "rounds": 3,
    "clients": 20,
    "loss": {"base": 0.12, "local": 0.105, "shared": 0.108, "personal": 0.096},
    "legibility": {"base": 0.97, "local": 0.93, "shared": 0.96, "personal": 0.95},
    "style": {"base": None, "local": None, "shared": None, "personal": None},
    "bytes": {"up": 3_700_000, "down": 3_900_000},
    "epsilon": None,
    "seconds": 112.4,
}
PATH = "/somewhere/with a long name that would not fit on a line/outputs/2026-01-02/03-04-05/report.html"


class FakeClock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(number: int, **changes: Any) -> dict[str, Any]:
    full = {
        "round": number,
        "base": 0.12,
        "shared": 0.12 - 0.004 * number,
        "replied": 20,
        "dropped": 0,
        "bytes_up": 1_200_000,
        "bytes_down": 1_300_000,
    }
    return full | changes


def console(**settings: Any) -> Console:
    return Console(file=io.StringIO(), highlight=False, **({"width": 100} | settings))


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(console: Console, *, stop: bool = False, epsilon: float | None = None) -> str:
    clock = FakeClock()
    with Display(3, console=console, clock=clock) as display:
        display.phase("encoding", total=20)
        display.advance(20)
        display.phase("training")
        display.round({"round": 0, "base": 0.12, "shared": 0.12})
        for number in (1, 2, 3):
            clock.now += 10
            guarantees = () if epsilon is None else (Guarantee(epsilon, 1e-3), Guarantee(7.0, 1e-4, DEVICE))
            display.round(record(number, guarantees=guarantees))
        if stop:
            display.interrupted("anther simulate resume=true")
        else:
            summary = SUMMARY if epsilon is None else SUMMARY | {"epsilon": PROMISE}
            display.finish(summary, {"report": PATH})
    return printed(console)


PROMISE = {"value": 7.94, "delta": 1e-3, "unit": "image", "relation": "add_or_remove_one"}


def test_plain_lines_without_terminal() -> None:
    lines = run(console()).splitlines()
    assert lines[:3] == [
        " 0:00  encoding …",
        " 0:00  training …",
        " 0:00  round 0 of 3  loss 0.120   as the base",
    ]
    assert lines[3] == (
        " 0:10  round 1 of 3  loss 0.116   3.3 % below the base    20 devices  1.2 MB up, 1.3 MB down  about 20 s left"
    )
    assert "about 10 s left" in lines[4]
    assert "left" not in lines[5]
    assert lines[-1] == f"report: {PATH}"
    assert "\x1b" not in "".join(lines)


def test_results_are_a_table() -> None:
    rows = {line.split("  ")[0].strip(): line.split() for line in run(console()).splitlines()}
    assert rows["shared + personal"][3:] == ["0.0960", "20", "%", "95", "%"]
    assert rows["local"] == ["local", "0.105", "12", "%", "93", "%"]
    assert rows["base"] == ["base", "0.120", "97", "%"]
    assert "style" not in rows["unseen pictures"], "there are no style scores"


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}])
def test_dumb_terminal_gets_plain_lines(environment: dict[str, str]) -> None:
    output = run(console(force_terminal=True, _environ=environment))
    assert "\x1b[2K" not in output
    assert "round 3 of 3" in output


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_live_output_fits_any_width(width: int) -> None:
    output = run(console(force_terminal=True, width=width, _environ={"TERM": "xterm-256color"}), epsilon=2.5)
    assert "\x1b[" in output
    assert "round 1 of 3" in output
    assert PATH in output, "a path is never wrapped"
    assert "ε = 7.94 per image, δ = 0.001, add or remove one; simulated noise, so not a release" in output
    if width == 200:
        assert "20 devices" in output
        assert "ε=2.5 per image (δ=0.001, add or remove one)" in output
        assert "ε=7 per device (δ=0.0001, add or remove one)" in output


def test_no_color_if_not_wanted() -> None:
    output = run(console(force_terminal=True, _environ={"TERM": "xterm", "NO_COLOR": "1"}))
    assert "\x1b[33m" not in output
    assert "\x1b[36m" not in output


def test_status_shows_phase_progress_and_time_left() -> None:
    clock, screen = FakeClock(), console(force_terminal=True, _environ={"TERM": "xterm"})
    display = Display(3, console=screen, clock=clock)
    display.phase("drawing", total=8)
    display.advance(6)
    assert display._status().plain == " 0:00  drawing █████████░░░ 6/8"
    display.phase("training")
    clock.now += 30
    display.round(record(1))
    clock.now += 5
    assert display._status().plain == " 0:35  round 2 of 3  training …  about 55 s left"


def test_time_left_ignores_rounds_before_resumption() -> None:
    clock, screen = FakeClock(), console()
    display = Display(3, console=screen, clock=clock)
    for number in (0, 1):
        display.round(record(number))
    clock.now += 500
    display.phase("training")
    clock.now += 7
    display.round(record(2))
    assert "about 7 s left" in printed(screen)
    assert printed(screen).count("left") == 1


def test_interrupted_states_how_to_continue() -> None:
    lines = run(console(), stop=True).splitlines()
    assert lines[-2:] == ["Stopped after round 3 of 3. To continue:", "  anther simulate resume=true"]
    screen = console()
    Display(3, console=screen).interrupted("again")
    assert "Stopped before the first round." in printed(screen)
    screen = console()
    Display(3, console=screen).interrupted(None)
    assert "nothing to continue" in printed(screen)
    assert "To continue" not in printed(screen)


def test_time_left_includes_work_after_the_rounds() -> None:
    clock, screen = FakeClock(), console()
    display = Display(2, console=screen, clock=clock)
    display.work = RunWork([1.0, 1.0], after=1.5)
    display.phase("training")
    display.round({"round": 0, "base": 0.12, "shared": 0.12})
    for number in (1, 2):
        clock.now += 10
        display.round(record(number))
    lines = printed(screen).splitlines()
    assert lines[-2].endswith("about 25 s left")
    assert lines[-1].endswith("about 15 s left")


@pytest.mark.parametrize(
    ("changes", "small"),
    [
        ({"rounds": 2, "judged": 6}, True),
        ({"rounds": 4, "judged": 20}, False),
        ({"rounds": 4, "judged": 3}, True),
    ],
)
def test_small_runs_are_marked(changes: dict[str, int], small: bool) -> None:
    screen = console()
    Display(2, console=screen).finish(SUMMARY | changes | {"strategy": "fedit"}, {})
    assert ("too small to compare" in printed(screen)) == small
    assert f"{changes['rounds']} rounds of fedit" in printed(screen)


def test_newcomers_have_a_line() -> None:
    display_console = console()
    Display(3, console=display_console).finish(
        SUMMARY | {"newcomers": {"judged": 2, "loss": {"base": 0.2, "shared": 0.19, "personal": 0.15}}}, {}
    )
    assert "2 newcomers: base 0.200, shared 0.190, shared + personal 0.150\n" in printed(display_console)
    assert "newcomer" not in run(console())


def test_runs_are_named_by_differing_settings() -> None:
    screen = console(width=120)
    compare([(["preset=quick", f"aggregation={name}"], SUMMARY) for name in ("exact", "fedit")], screen)
    rows = printed(screen).splitlines()
    assert any(row.startswith("0: aggregation=exact") and "0.0960" in row for row in rows)
    assert any(row.startswith("1: aggregation=fedit") for row in rows)
    assert "preset" not in printed(screen)


def test_dropped_replies_and_missing_losses_are_shown() -> None:
    screen = console(width=200)
    with Display(3, console=screen) as display:
        display.round(record(1, dropped=2, base=None, shared=None))
    assert "loss –" in printed(screen)
    assert "not measured" in printed(screen)
    assert "20 devices (2 dropped)" in printed(screen)


def test_refusals_and_noised_gains_are_shown() -> None:
    screen = console(width=200)
    with Display(3, console=screen) as display:
        display.round(record(1, dropped=3, refused=2, base=None, shared=None, gain=-0.0123, gain_error=0.0447))
    assert "gain -0.0123 ± 0.0447 by its noise" in printed(screen)
    assert "20 devices (3 dropped, 2 of them refusals)" in printed(screen)
    assert "loss" not in printed(screen)


def test_narrow_results_keep_loss_and_gain() -> None:
    screen = console(width=40)
    screen.print(results_table(SUMMARY, 40))
    assert "…" not in printed(screen)
    assert "legibility" not in printed(screen)


def test_gains_and_bars() -> None:
    assert relative_to_base(0.123) == "12 % below the base"
    assert relative_to_base(-0.02) == "2.0 % above the base"
    assert gain(0.1, 0.05) == 0.5
    assert bar(0.5, 4) == "██░░"
    assert bar(0.3125, 4) == "█▎░░"
    assert bar(-1.0, 4) == "░░░░"
    assert bar(9.0, 4) == "████"
