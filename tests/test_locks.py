"""The locks of `make locks`: for each kind of machine all that Anther needs, nothing of CUDA's, everything by hash."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "deploy" / "locks"
MACHINES = {"aarch64": "2.9.1", "x86_64": None}
"""The PyTorch of each lock; None: it comes from elsewhere."""


def locked(name: str) -> dict[str, str]:
    """Version by package; each line is a package, a hash or the header."""
    found: dict[str, str] = {}
    for line in (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"([a-z0-9-]+)==(\S+) \\", line):
            found[match[1]] = match[2]
        else:
            assert re.fullmatch(r"# .*|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    return found


def hashes(name: str) -> Iterator[tuple[str, int]]:
    """How many hashes each package has."""
    for block in re.split(r"\n(?=[a-z])", (LOCKS / f"{name}.txt").read_text(encoding="utf-8"))[1:]:
        yield block.split("==")[0], block.count("--hash=sha256:")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_is_made_for_cuda(machine: str) -> None:
    assert [name for name in locked(machine) if re.search(r"nvidia|cuda|cudnn|nccl|triton|^cu\d", name)] == []


@pytest.mark.parametrize("machine", MACHINES)
def test_all_that_the_project_needs_is_there_in_its_range(machine: str) -> None:
    found = locked(machine)
    for text in project()["dependencies"]:
        needed = Requirement(text)
        name = canonicalize_name(needed.name)
        if name == "torch" and MACHINES[machine] is None:
            assert name not in found
            continue
        assert name in found, name
        assert needed.specifier.contains(found[name], prereleases=True), f"{text}: {found[name]}"


def test_pytorch_is_one_that_a_pi_4_runs() -> None:
    assert locked("aarch64")["torch"] == MACHINES["aarch64"]
    assert Requirement(next(d for d in project()["dependencies"] if d.startswith("torch"))).specifier.contains("2.9.1")


def test_both_machines_run_the_same_releases() -> None:
    arm, x86 = locked("aarch64"), locked("x86_64")
    assert {name: version for name, version in arm.items() if name != "torch"} == {
        name: version for name, version in x86.items() if name != "setuptools"
    }


@pytest.mark.parametrize("name", [*MACHINES, "build"])
def test_every_package_has_a_hash(name: str) -> None:
    found = dict(hashes(name))
    assert found.keys() == locked(name).keys()
    assert min(found.values()) >= 1


def test_what_builds_is_what_the_project_builds_with() -> None:
    found = locked("build")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("extra", ["ray", "opacus", "pytest", "ruff", "mypy"])
def test_a_device_gets_nothing_of_development(extra: str) -> None:
    assert all(extra not in locked(machine) for machine in MACHINES)
