"""Tests of update sizes on a published base's shapes, and of known gains."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from bench.quality.traffic import (
    FP32,
    TRAINED,
    UPLOAD_ENCODINGS,
    UpdateEncoding,
    downloads,
    encodings,
    gain_kept,
    gain_table,
    size_table,
    update_sizes,
)
from models.lora.adapter import Site

SITES = {"x": Site(320, 320), "y": Site(768, 320)}
INT4, HALF = UpdateEncoding("int4"), UpdateEncoding("int4", 0.5)


def test_update_bytes_include_scales_and_headers() -> None:
    sizes_of = update_sizes(SITES, 8)
    numbers = 8 * (320 + 320 + 768 + 320)
    assert 0 < sizes_of["factors"]["fp32"] - 4 * numbers < 500
    assert sizes_of["factors"]["int4"] * 8 == 4.25 * numbers
    assert sizes_of["factors"]["int8"] * 8 == 8.25 * numbers
    assert sizes_of["factors"]["fp16"] * 8 == 16.25 * numbers
    assert sizes_of["factors"][HALF.name] * 8 == 2.25 * numbers
    outputs = 8 * (320 + 320)
    assert sizes_of["B alone"]["int4"] * 8 == 4.25 * outputs
    assert sizes_of["A alone"]["int4"] * 8 == 4.25 * (numbers - outputs)
    assert sizes_of["cores"]["int4"] * 8 == 4.25 * 2 * 64
    assert sizes_of.keys() == TRAINED.keys()


def test_sizes_below_the_target_are_marked() -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(
        size_table("b", 8, {"factors": {encoding.name: 10**6 for encoding in UPLOAD_ENCODINGS} | {"int4": 1000}})
    )
    assert [("int4" in line, "✓" in line) for line in output.getvalue().splitlines() if "│ int4 " in line] == [
        (True, True)
    ]
    assert output.getvalue().count("✓") == 1


def ran(gain: float, bytes_up: int = 100) -> dict[str, Any]:
    """Make a run whose first writer gains `gain`, and whose second twice that."""
    return {
        "losses": {"base": [1.0, 2.0], "shared": [1 - gain, 2 - 2 * gain]},
        "bytes_up": bytes_up,
        "bytes_down": 4 * bytes_up,
    }


def test_gain_kept_is_relative_to_fp32() -> None:
    mean, low, high = gain_kept([ran(0.3), ran(0.3)], [ran(0.4), ran(0.2)])
    assert mean == pytest.approx(1.0)
    assert low < 1 < high
    assert gain_kept([ran(0.1)], [ran(0.4)])[0] == pytest.approx(0.25)
    output = io.StringIO()
    Console(file=output, width=160).print(
        gain_table({("fedit", FP32): [ran(0.4, 800)], ("fedit", INT4): [ran(0.38, 100)]})
    )
    assert "95.0%" in output.getvalue()
    assert "8.0" in output.getvalue()


def test_exact_sends_all_blocks() -> None:
    down = [UpdateEncoding("fp32", down="int4"), UpdateEncoding("int4", down="int4")]
    assert encodings("exact", ["int4"], ["int4"]) == [FP32, INT4, *down]
    assert encodings("fedit", ["int4"], ["int4"]) == [FP32, INT4, HALF, UpdateEncoding("int4", 0.25), *down]
    assert encodings("cores", ["int4"], ["int4"]) == [FP32, INT4, HALF, UpdateEncoding("int4", 0.25)]
    assert encodings("fedit", [], ["int4"]) == [FP32, down[0]]


def test_whole_adapter_is_sent_down() -> None:
    sizes_of, numbers = downloads(SITES, 8), 8 * (320 + 320 + 768 + 320)
    assert 0 < sizes_of["fp32"] - 4 * numbers < 500
    assert [sizes_of[precision] * 8 / numbers for precision in ("fp16", "int8", "int4")] == [16.25, 8.25, 4.25]
    assert UpdateEncoding("int4", down="int8").overrides[-1] == "compression.download=int8"
