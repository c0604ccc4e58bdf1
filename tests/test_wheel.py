"""Contents of the wheel and of the Flower App Bundle."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from io import BytesIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "anther",
    "client",
    "conf",
    "models",
    "privacy",
    "protocol",
    "common",
    "server",
    "simulations",
    "strategies",
    "training",
    "typefaces",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build the wheel and return the names of its files."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob("anther-*.whl")
    return zipfile.ZipFile(file).namelist()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.integration
def test_wheel_holds_the_packages_only(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert sum(name.endswith(".dist-info/licenses/LICENSE") for name in wheel) == 1


@pytest.mark.integration
def test_wheel_holds_all_data_files(wheel: list[str]) -> None:
    expected = [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in {".py", ".yaml", ".html", ".json", ".parquet", ".safetensors", ".txt"}
    ]
    assert len(expected) > 60
    assert sorted(set(expected) - set(wheel)) == []


def docker_context() -> set[str]:
    """Top-level names that `.dockerignore` lets into an image's build context."""
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert {rule for rule in rules[1:] if not rule.startswith("!")} == {"**/__pycache__"}
    return allowed


def test_image_context_has_all_sources_of_the_wheel() -> None:
    """`deploy/venv.sh` builds the wheel from the build context, so that needs all that the wheel is built from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    metadata = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    assert docker_context() == {*packages, *metadata, "deploy"}
    assert all((ROOT / name).exists() for name in docker_context())


@pytest.mark.integration
def test_wheel_shares_no_path_with_a_dependency(wheel: list[str]) -> None:
    ours = {name for name in wheel if ".dist-info/" not in name}
    installed = {distribution.metadata["Name"]: distribution for distribution in distributions()}
    owned = {
        str(file): name
        for name, distribution in installed.items()
        if canonical(name) != "anther"
        for file in distribution.files or []
    }
    assert len(owned) > 1000, "no dependency is installed here"
    assert {name: owned[name] for name in ours & set(owned)} == {}
    # Their module with the name of one of our packages would shadow it, or be shadowed.
    tops = {path.split("/")[0].removesuffix(".py"): name for path, name in owned.items()}
    assert {package: tops[package] for package in PACKAGES & set(tops)} == {}


def test_app_bundle_is_complete_for_devices() -> None:
    build = pytest.importorskip("flwr.cli.build")
    tops = [path for path in ROOT.iterdir() if path.name not in {".git", ".venv", "outputs", "multirun"}]
    files = {
        path.relative_to(ROOT).as_posix(): path
        for path in [*tops, *(inner for top in tops for inner in top.rglob("*"))]
        if path.is_file()
    }
    bundle, _ = build.build_fab_from_files(files)
    names = zipfile.ZipFile(BytesIO(bundle)).namelist()
    for needed in ("client/app.py", "server/app.py", "conf/simulate.yaml", "conf/fleet/mixed.yaml", "pyproject.toml"):
        assert needed in names
    assert {name.split("/")[0] for name in names if "/" in name} <= PACKAGES - {"simulations", "typefaces"} | {".info"}
    assert len(bundle) < 2_500_000  # code only: the smallest base is six times as large
