"""The report page is self-contained and complete."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.report import formatting
from server.report.charts import LABEL_GAP, LineSeries, line_chart, nice_ticks, spread, whole_ticks
from server.report.page import DeviceRow, GalleryRow, Report, gain, highlights, render, write
from server.report.pictures import PAGE, SIDE, Thumbnails, png
from server.report.snippet import LoadingSnippet

LOSSES = {"base": 0.12, "local": 0.105, "shared": 0.108, "personal": 0.096}
VOID = {"img", "meta"}


def picture(tone: int) -> np.ndarray:
    pixels = np.full((64, 64), 255, np.uint8)
    pixels[8:40, 8:40] = tone
    return pixels


def writer(name: str, tone: int) -> GalleryRow:
    arms = ("real", "base", "local", "shared", "personal")
    return GalleryRow(
        name=name,
        kind="handwriting",
        given=[picture(tone), picture(tone + 1)],
        given_captions=["capital letter A", "digit 7"],
        captions=["lowercase letter g", "capital letter Q"],
        arms={arm: [picture(tone + 2 + i), picture(tone + 12 + i)] for i, arm in enumerate(arms)},
    )


USE = LoadingSnippet(base="/bases/b", adapters="/runs/r/adapters", network="unet", resolution=64)


def report(**changes: Any) -> Report:
    summary = {
        "rounds": 3,
        "clients": 2,
        "loss": LOSSES,
        "legibility": {"base": 0.97, "local": 0.93, "shared": 0.96, "personal": 0.95},
        "style": {"base": 0.05, "local": 0.6, "shared": 0.2, "personal": 0.8},
        "bytes": {"up": 3_700_000, "down": 3_900_000},
        "epsilon": None,
        "seconds": 112.4,
        "peak_rss_mib": 1320.0,
        "seed": 5,
        "config_hash": "3f9ac1d2" * 8,
    }
    rounds = [
        {
            "round": number,
            "base": 0.12,
            "shared": 0.12 - 0.004 * number,
            "gain": None,
            "gain_error": None,
            "bytes_up": 1_000_000,
            "bytes_down": 2_000_000,
            "seconds": 50.0,
            "joules": 400.0,
            "epsilon": None,
            "dropped": {},
        }
        for number in range(4)
    ]
    devices = [
        DeviceRow("Ada <hand>", "pi4_4gb", 8, 12, 61.0, 390.0, 1_850_000, 1_950_000, None, 3, LOSSES),
        DeviceRow("Bert", "laptop", 8, 12, 8.0, 120.0, 1_850_000, 1_950_000, None, 2, {**LOSSES, "personal": 0.084}),
    ]
    full = Report(
        title="Two devices trained together",
        command="anther simulate rounds=3 seed=5",
        config_yaml="rounds: 3\nseed: 5\n",
        summary=summary,
        rounds=rounds,
        devices=devices,
        gallery=[writer("Ada <hand>", 20), writer("Bert", 60)],
        use=USE,
        strategy="exact",
    )
    return dataclasses.replace(full, **changes)


class Page(HTMLParser):
    """Checks that elements nest, and collects images and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def text_of(html: str) -> str:
    return " ".join(Page(html).text.split())


def test_page_is_self_contained() -> None:
    html = render(report())
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\(|@import|<script|<link", html)
    assert "prefers-color-scheme: dark" in html


def test_every_picture_has_alt_text() -> None:
    page = Page(render(report(devices=[])))
    shown = {str(image["src"]) for image in page.images}
    for row in report().gallery:
        for pixels in [*row.given, *(pixels for pictures in row.arms.values() for pixels in pictures)]:
            assert png(pixels) in shown
    assert all(image["alt"] for image in page.images)
    assert "Bert, shared + personal: capital letter Q" in {image["alt"] for image in page.images}


def test_summary_text() -> None:
    text = text_of(render(report()))
    assert "Two devices trained together" in text
    assert "Each of 2 devices gave 2 pictures" in text
    assert "loss falls 20 % below the base's; local training gets 12 %" in text
    assert "No differential privacy" in text
    assert "estimate" in text
    assert "anther simulate rounds=3 seed=5" in text
    assert "aggregated by exact" in text
    assert "from diffusers import DiffusionPipeline pipe = DiffusionPipeline.from_pretrained('/bases/b')" in text
    assert "pipe.load_lora_weights('/runs/r/adapters/personal/Ada <hand>.with_shared.safetensors')" in text
    assert "load only this file, or the shared one counts twice" in text


def test_guarantee_has_unit_delta_and_relation() -> None:
    summary = report().summary | {
        "epsilon": {"value": 7.94, "delta": 1e-3, "unit": "image", "relation": "add_or_remove_one"}
    }
    rounds = [row | {"epsilon": None if row["round"] == 0 else 2.5 * row["round"]} for row in report().rounds]
    text = text_of(render(report(summary=summary, rounds=rounds)))
    assert "ε = 7.94 per image, δ = 0.001, add or remove one" in text
    assert "not a release" in text
    assert "ε so far" in text
    assert "No differential privacy" not in text


def test_two_guarantees() -> None:
    of_image = {"value": 7.94, "delta": 1e-3, "unit": "image", "relation": "add_or_remove_one"}
    of_device = {"value": 3.5, "delta": 1e-4, "unit": "device", "relation": "add_or_remove_one"}
    rounds = [row | {"epsilon": 2.0, "device_epsilon": 1.0} for row in report().rounds]
    html = render(report(summary=report().summary | {"epsilon": of_image, "device_epsilon": of_device}, rounds=rounds))
    assert "ε = 7.94 per image, δ = 0.001, add or remove one" in text_of(html)
    assert "ε = 3.5 per device, δ = 0.0001, add or remove one" in text_of(html)
    assert "per device" in html.split("ε so far")[1].split("</figure>")[0]
    assert "No differential privacy" not in text_of(html)
    single = text_of(render(report(summary=report().summary | {"device_epsilon": of_device})))
    assert "per device" in single
    assert "No differential privacy" not in single


def test_rising_loss() -> None:
    summary = report().summary | {"loss": LOSSES | {"personal": 0.132}}
    assert "loss rises 10 % above the base's" in text_of(render(report(summary=summary)))


def test_measured_is_not_called_an_estimate() -> None:
    assert "estimate" not in text_of(render(report(quality="measured")))


def test_dropped_replies_are_counted() -> None:
    rounds = [row | {"dropped": {"no reply": 1} if row["round"] == 2 else {}} for row in report().rounds]
    assert "1 reply was dropped: 1 no reply." in text_of(render(report(rounds=rounds)))
    rounds = [row | {"dropped": {"refused": 2, "codec": row["round"]}} for row in report().rounds]
    assert "14 replies were dropped: 8 refused, 6 codec." in text_of(render(report(rounds=rounds)))
    assert "dropped" not in text_of(render(report()))


def test_noised_gain_has_its_error() -> None:
    unmeasured = [row | {"base": None, "shared": None} for row in report().rounds]
    text = text_of(render(report(rounds=unmeasured)))
    assert "Validation loss" not in text
    assert "Gain on validation" not in text
    noised = [row | {"gain": 0.01 * row["round"], "gain_error": 0.0441} for row in unmeasured]
    noised[0] |= {"gain": None, "gain_error": None}
    text = text_of(render(report(rounds=noised)))
    assert "Gain on validation, noised" in text
    assert "± 0.0441 by its noise" in text


@pytest.mark.parametrize("judged", [{}, None, dict.fromkeys(LOSSES)])
def test_without_pictures_or_judge(judged: dict[str, None] | None) -> None:
    summary = report().summary | {"legibility": judged, "style": judged}
    text = text_of(render(report(summary=summary, gallery=[])))
    assert "Pictures of all devices" not in text
    assert "legible" not in text
    assert "2 devices trained small adapters" in text


def test_without_rounds_or_devices() -> None:
    text = text_of(render(report(rounds=[], devices=[])))
    assert "Round by round" not in text
    assert "pipe.load_lora_weights('/runs/r/adapters/shared.safetensors')" in text


def test_without_validation() -> None:
    rounds = [row | {"base": None, "shared": None} for row in report().rounds]
    assert "Bytes so far" in text_of(render(report(rounds=rounds)))


def test_color_pictures() -> None:
    color = np.zeros((40, 60, 3), np.uint8)
    color[..., 0] = 200
    row = GalleryRow("me", "", [color], ["my cat"], ["my cat in snow"], {"real": [color], "base": [color]})
    page = Page(render(report(gallery=[row])))
    content = base64.b64decode(str(page.images[0]["src"]).removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), color)


def test_write_is_atomic(tmp_path: Path) -> None:
    write(report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(report())
    with pytest.raises(KeyError):
        write(report(summary={}), tmp_path / "other.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_highlights_have_largest_gain() -> None:
    assert [row.name for row in highlights(report().gallery, report().devices)] == ["Bert", "Ada <hand>"]
    assert gain(LOSSES, "personal") == pytest.approx(0.2)
    assert gain({"base": 0.0, "shared": 0.1}, "shared") is None
    assert gain(LOSSES, "real") is None


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 37.2, [0, 10, 20, 30, 40]), (0.1048, 0.1163, [0.1, 0.105, 0.11, 0.115, 0.12])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0.2, 0.2), (-1, -1), (-3e3, 5e9), (1e-9, 2e-9)])
def test_ticks_enclose_any_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low <= high <= ticks[-1]


def test_integer_ticks() -> None:
    assert whole_ticks(1, 6) == [1, 2, 3, 4, 5, 6]
    assert whole_ticks(0, 100) == [0, 13, 26, 39, 52, 65, 78, 91]


def test_labels_do_not_overlap() -> None:
    placed = spread([100.0, 50.0, 101.0])
    assert placed[1] == 50.0
    assert placed[2] - placed[0] == pytest.approx(LABEL_GAP)


def test_chart_with_one_round_and_gaps() -> None:
    one = line_chart([1], [LineSeries("loss", [0.1], "shared")], formatting.number, from_zero=False, x_label="round")
    assert "nan" not in one
    gaps = line_chart(
        [0, 1], [LineSeries("<ε>", [None, 2.0], "ink")], formatting.number, from_zero=True, x_label="round"
    )
    assert gaps.count("<circle") == 1
    assert "&lt;ε&gt;" in gaps
    assert line_chart([0], [LineSeries("ε", [None], "ink")], formatting.number, from_zero=True, x_label="round") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.number(0.089342), "0.0893"),
        (formatting.number(1530.4), "1,530"),
        (formatting.number(0.0), "0"),
        (formatting.number(3.2e-7), "3.20e-07"),
        (formatting.number(None), "–"),
        (formatting.short(40.0), "40"),
        (formatting.short(7.50), "7.5"),
        (formatting.percent(0.184), "18 %"),
        (formatting.percent(-0.031), "-3.1 %"),
        (formatting.percent(float("nan")), "–"),
        (formatting.data(999), "999 B"),
        (formatting.data(999_900), "1 MB"),
        (formatting.data(37_200_000), "37.2 MB"),
        (formatting.energy(1400), "1.4 kJ"),
        (formatting.energy(12.5), "12.5 J"),
        (formatting.duration(8.24), "8.2 s"),
        (formatting.duration(59.97), "1 min 0 s"),
        (formatting.duration(3 * 3600 + 600), "3 h 10 min"),
    ],
)
def test_number_formats(text: str, expected: str) -> None:
    assert text == expected


def test_photographs_have_other_texts() -> None:
    letters, photographs = text_of(render(report())), text_of(render(report(letters=False)))
    assert "the writer's own letters" in letters
    assert "the pictures themselves" in photographs
    assert "Q" in letters
    assert "Q" not in photographs  # columns of photographs have no letters as titles
    assert "writer" not in photographs.replace("nearer to this writer's", "").replace("the writer's own letter", "")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loads": False}, "reads no adapters, so it is added to the weights"),
        ({"kohya": False}, "There is no kohya layout of this base's family"),
        ({"ignored": 3}, "sd-scripts ignores 3 of the layers"),
        ({"packed": True}, "FOLDER OF THE BASE THAT WAS PACKED"),
        ({}, "….kohya.safetensors is for ComfyUI, A1111, Forge and sd-scripts"),
    ],
)
def test_compatible_tools(changes: dict[str, Any], text: str) -> None:
    assert text in text_of(render(report(use=dataclasses.replace(USE, **changes))))


@pytest.mark.parametrize("loads", [True, False])
@pytest.mark.parametrize("personal", [True, False])
def test_sentences_are_separated(loads: bool, personal: bool) -> None:
    summary = report().summary | {"loss": LOSSES if personal else {"base": 0.12, "shared": 0.108}}
    text = text_of(render(report(summary=summary, use=dataclasses.replace(USE, loads=loads))))
    section = text[text.index("Use the adapters") : text.index("from diffusers import")]
    assert " diffusers" in section
    assert " The same adapter as" in section
    assert re.findall(r"[a-z)]\.[A-Zd](?=[a-z]+ )", section) == []


@pytest.mark.parametrize(("people", "given", "columns", "side"), [(20, 40, 4, 512), (20, 5, 32, 64), (2, 4, 2, 3000)])
def test_page_size_limit(people: int, given: int, columns: int, side: int) -> None:
    """Noise is the largest picture: it doesn't compress."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    count = people * (given + 5 * columns)
    one = Thumbnails(count)(noise)
    assert count * len(one.uri) <= PAGE
    assert max(one.shape[:2]) <= SIDE
    assert one.uri == png(one)


def test_small_pictures_are_lossless() -> None:
    letter = np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8) * 255
    thumbnail = Thumbnails(20)(letter)
    data = base64.b64decode(thumbnail.uri.removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), letter)
    assert thumbnail.shape == (64, 64)


def test_thumbnail_keeps_aspect_ratio() -> None:
    photo = np.zeros((300, 600, 3), np.uint8)
    assert Thumbnails(1)(photo).shape == (64, 128, 3)


def test_singular_for_one_device() -> None:
    one = report(summary=report().summary | {"clients": 1}, gallery=[writer("Ada <hand>", 20)])
    assert "One device gave 2 pictures and trained small adapters" in text_of(render(one))
    assert "The 1 with" not in text_of(render(one))
    assert "1 device trained small adapters" in text_of(render(dataclasses.replace(one, gallery=[])))
