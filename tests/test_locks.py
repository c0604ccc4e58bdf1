"""Lock files of `make locks`: all dependencies for each kind of machine, with hashes and without CUDA packages."""

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
"""Version of PyTorch in each lock; None: it is installed separately."""


def locked(name: str) -> dict[str, str]:
    """Return versions by package; each line is a package, a hash or the header."""
    packages: dict[str, str] = {}
    for line in (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"([a-z0-9-]+)==(\S+) \\", line):
            packages[match[1]] = match[2]
        else:
            assert re.fullmatch(r"# .*|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    return packages


def hashes(name: str) -> Iterator[tuple[str, int]]:
    """Yield (package, number of hashes)."""
    for block in re.split(r"\n(?=[a-z])", (LOCKS / f"{name}.txt").read_text(encoding="utf-8"))[1:]:
        yield block.split("==")[0], block.count("--hash=sha256:")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("machine", MACHINES)
def test_locks_have_no_cuda_packages(machine: str) -> None:
    assert [name for name in locked(machine) if re.search(r"nvidia|cuda|cudnn|nccl|triton|^cu\d", name)] == []


@pytest.mark.parametrize("machine", MACHINES)
def test_locks_satisfy_the_dependencies(machine: str) -> None:
    packages = locked(machine)
    for text in project()["dependencies"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == "torch" and MACHINES[machine] is None:
            assert name not in packages
            continue
        assert name in packages, name
        assert requirement.specifier.contains(packages[name], prereleases=True), f"{text}: {packages[name]}"


def test_pytorch_runs_on_a_pi_4() -> None:
    assert locked("aarch64")["torch"] == MACHINES["aarch64"]
    assert Requirement(next(d for d in project()["dependencies"] if d.startswith("torch"))).specifier.contains("2.9.1")


def test_machines_have_equal_versions() -> None:
    arm, x86 = locked("aarch64"), locked("x86_64")
    assert {name: version for name, version in arm.items() if name != "torch"} == {
        name: version for name, version in x86.items() if name != "setuptools"
    }


@pytest.mark.parametrize("name", [*MACHINES, "build"])
def test_every_package_has_a_hash(name: str) -> None:
    packages = dict(hashes(name))
    assert packages.keys() == locked(name).keys()
    assert min(packages.values()) >= 1


def test_build_lock_matches_pyproject() -> None:
    packages = locked("build")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    for requirement in map(Requirement, requirements):
        assert requirement.specifier.contains(packages[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("extra", ["ray", "opacus", "pytest", "ruff", "mypy"])
def test_locks_have_no_development_packages(extra: str) -> None:
    assert all(extra not in locked(machine) for machine in MACHINES)
