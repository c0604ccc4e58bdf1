"""Tests that plots are well-formed and have a mark for each number."""

from xml.etree import ElementTree

from bench.lib.plots import curves, dots, scatter

SVG = "{http://www.w3.org/2000/svg}"


def marks(text):
    return list(ElementTree.fromstring(text).iter(f"{SVG}circle"))


def test_dots_mark_the_best_rule_in_red():
    cells = {("a", "s"): (0.1, 0.05, 0.2), ("b", "s"): (0.2, 0.1, 0.3), ("a", "<t>"): (-0.1, -0.2, 0.0)}
    circles = marks(dots(["s", "<t>"], cells))
    assert [circle.get("fill") for circle in circles] == ["#4878a8", "#c0504d", "#c0504d"]


def test_scatter_draws_runs_and_their_median():
    circles = marks(
        scatter({"f": {"one": [(1.0, 2.0), (2.0, 1.0), (4.0, 4.0)], "some": [(1.0, 1.0), None]}}, x="h", y="J")
    )
    assert [circle.get("r") for circle in circles] == ["3", "3", "3", "6", "5", "3", "5"]  # 5: the legend
    left, median = circles[0], circles[3]
    assert float(left.get("cx")) < float(median.get("cx")) == float(circles[1].get("cx"))
    assert float(median.get("cy")) == float(left.get("cy"))


def test_curves_draw_points_and_intervals():
    points = {"<a>": [(1, 10.0, 8.0, 12.0), (20, 20.0, 15.0, 25.0)], "b": [(1, 5.0, 4.0, 6.0)]}
    svg = curves({"letters": points, "steps": {"b": [(5, 1.0, 0.5, 2.0)]}}, y="gain")
    assert [circle.get("fill") for circle in marks(svg)] == ["#c0504d", "#c0504d", "#4878a8", "#4878a8"]
    first, second, other, _ = marks(svg)
    assert first.get("cx") == other.get("cx")
    bottom, top = 340, 340 - 300 * 20 / (1.1 * 25)
    assert float(second.get("cy")) == round(top, 1)
    assert float(first.get("cy")) == round((bottom + top) / 2, 1)
    assert "&lt;a&gt;" in svg
