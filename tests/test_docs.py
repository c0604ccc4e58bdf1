"""Documentation: the commands, keys, files and messages that it names exist."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from anther.commands import COMMANDS, benchmarks
from conf.explain import known_keys
from conf.schemas.audit import AuditConfig
from conf.schemas.node import NodeConfig
from conf.schemas.planning import PlanConfig
from conf.schemas.server import ServeConfig
from conf.schemas.simulation import SimulationConfig

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
PACKAGES = "bench|client|common|models|privacy|server|simulations|strategies|training|typefaces"
KEYS = {
    key for schema in (SimulationConfig, ServeConfig, NodeConfig, AuditConfig, PlanConfig) for key in known_keys(schema)
}
OTHERS = {
    "hydra.run.dir",
    "memory",  # cgroup_enable=memory, on a kernel's command line
    "cgroup_enable",
    "overrides",  # of Flower's own run
    "preset",
    "min_majority",  # of the rule in docs/extending.md
    "aggregation.min_majority",
}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code(page: str) -> Iterator[str]:
    """Yield the code of a page: blocks that aren't Python, and code within lines."""
    blocks = re.findall(r"^```(?!python)\w*\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
    yield from blocks
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL))


def python_code(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_is_valid(page: str) -> None:
    for number, block in enumerate(python_code(page)):
        ast.parse(block, f"{page}, block {number}")


def test_examples_import_what_exists() -> None:
    """Imports of our packages; those of others may not be installed."""
    modules = "".join(python_code("docs/simulation.md"))
    for module, name in re.findall(rf"^from ((?:anther|{PACKAGES})[\w.]*) import (\w+)", modules, re.MULTILINE):
        assert hasattr(importlib.import_module(module), name), (module, name)


def commands(page: str) -> set[str]:
    """Find the commands of `anther` at the beginning of lines and of inline code."""
    named = r"(?m)^(?:sudo |\$ )?anther ((?:device |bench )?[a-z][a-z_-]*)\b(?![.:/])"
    return {name for part in code(page) for name in re.findall(named, part)} - {"device", "bench"}


def modules(page: str) -> set[str]:
    """Find the modules of `python -m`, also in a container."""
    named = r"(?:python -m|--rm client|exec \w+ python -m)\s+"
    return {module for part in code(page) for module in re.findall(rf"{named}((?:{PACKAGES})(?:\.\w+)+)", part)}


def keys(page: str) -> set[str]:
    """Find the configuration keys that are set."""
    return {key for part in code(page) for key in re.findall(r"(?:^|[\s'\"`(\[])([a-z_]+(?:\.[a-z_]+)*)=(?!=)", part)}


def test_commands_exist() -> None:
    found = {page: commands(page) for page in PAGES}
    assert len(set().union(*found.values())) >= 20
    known = {*COMMANDS, *(f"bench {name}" for name in benchmarks())}
    assert {page: names - known for page, names in found.items() if names - known} == {}


def test_modules_can_be_run() -> None:
    for module in set().union(*map(modules, PAGES)):
        file = ROOT / f"{module.replace('.', '/')}.py"
        file = file if file.exists() else file.with_suffix("") / "__main__.py"
        assert file.exists(), module
        assert '__name__ == "__main__"' in file.read_text(encoding="utf-8"), module


def test_keys_exist() -> None:
    found = {page: keys(page) for page in PAGES if page != "docs/renames.md"}
    assert len(set().union(*found.values())) > 40
    known = KEYS | OTHERS
    assert {page: names - known for page, names in found.items() if names - known} == {}


def test_keys_that_stand_by_themselves_exist() -> None:
    heads = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
    named = {key for part in code("docs/deploy.md") for key in re.findall(rf"^((?:{heads})\.[a-z_.]+)$", part)}
    named = {key for key in named if not (ROOT / f"{key.replace('.', '/')}.py").exists()}  # a module
    assert len(named) > 8
    assert named - KEYS - {"server.conf"} == set()


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text(page))
    for link in links:
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_linked_headings_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", text(page))
    targets = [((ROOT / page).parent / file if file else ROOT / page, anchor) for file, anchor in links]
    assert [(file.name, anchor) for file, anchor in targets if anchor not in headings(file)] == []


def program_texts() -> list[str]:
    """List every text of the programs, with an ellipsis for each inserted value."""
    found = []
    for room in ("client", "server", "strategies", "privacy", "protocol", "models", "conf", "common"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.mark.integration
def test_explained_messages_exist() -> None:
    section = text("docs/deploy.md").partition("\n## Troubleshooting")[2].partition("\n## ")[0]
    messages = [row[1] for row in re.finditer(r"^\| `([^`]+)` \|", section, re.MULTILINE)]
    assert len(messages) > 30
    programs = program_texts()
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(re.sub(r"%[\w.]*[sdf]", "…", text)) for text in programs), message


def test_installers_exist() -> None:
    for file in re.findall(r"\b(deploy/[\w./-]+\.(?:sh|yaml))", text("docs/deploy.md")):
        assert (ROOT / file).exists(), file
    for name in (
        "deploy/install.sh",
        "deploy/venv.sh",
        "deploy/anther",
        "deploy/termux/install.sh",
        "deploy/locks/lock.sh",
    ):
        assert (ROOT / name).stat().st_mode & 0o111, name
