"""Plots are whole, and have a mark for each number."""

from xml.etree import ElementTree

from bench.lib.plots import dots, scatter

SVG = "{http://www.w3.org/2000/svg}"


def marks(text):
    return list(ElementTree.fromstring(text).iter(f"{SVG}circle"))


def test_a_dot_for_each_cell_the_best_in_red():
    cells = {("a", "s"): (0.1, 0.05, 0.2), ("b", "s"): (0.2, 0.1, 0.3), ("a", "<t>"): (-0.1, -0.2, 0.0)}
    found = marks(dots(["s", "<t>"], cells))
    assert [each.get("fill") for each in found] == ["#4878a8", "#c0504d", "#c0504d"]


def test_a_circle_for_each_run_and_one_for_their_median():
    found = marks(
        scatter({"f": {"one": [(1.0, 2.0), (2.0, 1.0), (4.0, 4.0)], "some": [(1.0, 1.0), None]}}, x="h", y="J")
    )
    assert [each.get("r") for each in found] == ["3", "3", "3", "6", "5", "3", "5"]  # a legend's is 5
    left, median = found[0], found[3]
    assert float(left.get("cx")) < float(median.get("cx")) == float(found[1].get("cx"))
    assert float(median.get("cy")) == float(left.get("cy"))
