"""What README.md and docs/deploy.md tell people to type is there: modules, keys, files, and messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from anther.cli import COMMANDS
from conf.explain import known_keys
from conf.schemas.audit import AuditConfig
from conf.schemas.node import NodeConfig
from conf.schemas.planning import PlanConfig
from conf.schemas.server import ServeConfig
from conf.schemas.simulation import SimulationConfig

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/deploy.md")
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
}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code(page: str) -> Iterator[str]:
    """What is set as code: blocks, and words within lines."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
    yield from blocks
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL))


def modules(page: str) -> set[str]:
    """Modules that are to be run, also by the installed `anther` and in a container."""
    named = r"(?:python -m|anther|--rm client|exec \w+ python -m)\s+"
    return {found for part in code(page) for found in re.findall(rf"{named}((?:{PACKAGES})(?:\.\w+)+)", part)}


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_is_to_be_run_can_be(page: str) -> None:
    commands = {
        name
        for part in code(page)
        for name in re.findall(r"(?m)^(?:sudo |\$ )?anther ((?:device |bench )?[a-z][a-z-]*)\b(?![.:/])", part)
        if name not in ("device", "bench")
    }
    assert len(commands) >= 8
    assert commands - set(COMMANDS) == set()
    for module in modules(page):
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert file.exists(), module
        assert '__name__ == "__main__"' in file.read_text(encoding="utf-8"), module


@pytest.mark.parametrize("page", PAGES)
def test_every_key_is_one_of_a_schema(page: str) -> None:
    named = {key for part in code(page) for key in re.findall(r"(?:^|[\s'\"`(\[])([a-z_]+(?:\.[a-z_]+)*)=(?!=)", part)}
    assert len(named) > 10
    assert named - KEYS - OTHERS == set()


def test_every_key_that_is_named_alone_is_one_of_a_schema() -> None:
    heads = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
    named = {key for part in code("docs/deploy.md") for key in re.findall(rf"^((?:{heads})\.[a-z_.]+)$", part)}
    named = {
        key for key in named if not (ROOT / f"{key.replace('.', '/')}.py").exists()
    }  # server.supervisor.keys is a module
    assert len(named) > 8
    assert named - KEYS - {"server.conf"} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text(page))
    assert links
    for link in links:
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


def test_every_heading_that_is_linked_is_there() -> None:
    page = text("docs/deploy.md")
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", page, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings


def said() -> list[str]:
    """Every text of the programs; what is filled into one is an ellipsis."""
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


def test_every_message_that_is_explained_is_one_that_is_said() -> None:
    section = text("docs/deploy.md").partition("\n## Troubleshooting")[2].partition("\n## ")[0]
    messages = [row[1] for row in re.finditer(r"^\| `([^`]+)` \|", section, re.MULTILINE)]
    assert len(messages) > 30
    programs = said()
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(re.sub(r"%[\w.]*[sdf]", "…", text)) for text in programs), message


def test_what_installs_is_where_the_page_says() -> None:
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
