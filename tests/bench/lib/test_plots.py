"""Tests that plots are well-formed and have a mark for each number."""

from xml.etree import ElementTree

from bench.lib.plots import dots, scatter

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
