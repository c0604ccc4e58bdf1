"""Tests of the aarch64 comparison: products by site, and installed packages with the lock."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from bench.reliability.aarch64 import LOCK, RESULTS, compare

LOCKED = "torch==2.9.1 \\\n    --hash=sha256:00\nflwr==1.42.0 \\\n    --hash=sha256:00\n"
PRODUCTS = {"a": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.array([[0.5]])}


def make_output(machine: str, products: dict[str, np.ndarray] = PRODUCTS, **packages: str) -> dict[str, Any]:
    return {
        "machine": machine,
        "python": "3.11.2",
        "base": "0",
        "loss": 0.2,
        "steps": 2,
        "seconds_to_load": 1.0,
        "seconds_to_train": 1.0,
        "peak_mib": 1.0,
        "packages": {"torch": "2.9.1", "flwr": "1.42.0", **packages},
        "shapes": {site: list(product.shape) for site, product in products.items()},
        "products": base64.b64encode(b"".join(p.astype("<f4").tobytes() for p in products.values())).decode(),
    }


@pytest.mark.parametrize(("off", "ok"), [(0.0, True), (5e-5, True), (2e-4, False)])
def test_site_may_differ_by_1e_4(off: float, ok: bool) -> None:
    comparison = compare(
        make_output("aarch64", {**PRODUCTS, "b": PRODUCTS["b"] * (1 + off)}), make_output("x86_64"), LOCKED
    )
    assert comparison["ok"] is ok
    assert comparison["apart"]["worst"] == pytest.approx(off, rel=1e-2, abs=1e-7)


def test_installed_packages_must_match_the_lock() -> None:
    comparison = compare(make_output("aarch64", flwr="1.41.0"), make_output("x86_64"), LOCKED)
    assert not comparison["ok"]
    assert comparison["lock"]["amiss"] == {"flwr": "1.41.0"}
    comparison = compare(make_output("aarch64", **{"nvidia-cublas": "13"}), make_output("x86_64"), LOCKED)
    assert not comparison["ok"]
    assert comparison["lock"]["cuda"] == ["nvidia-cublas"]


def test_emulated_machine_must_be_aarch64() -> None:
    assert not compare(make_output("x86_64"), make_output("x86_64"), LOCKED)["ok"]


def test_results_belong_to_this_lock() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert result["ok"]
    assert result["apart"]["worst"] <= 1e-4
    assert result["lock"]["packages"] == LOCK.read_text(encoding="utf-8").count("==")
