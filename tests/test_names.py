"""Names mean one thing: no public class exists twice, and public functions document their arguments."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTED = 0.85
"""Share of public functions with three or more arguments that have an `Args:` section."""


@cache
def trees() -> list[tuple[str, ast.Module]]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [(name, ast.parse((ROOT / name).read_text(encoding="utf-8"))) for name in listed.stdout.split()]


def public_classes(tree: ast.AST) -> Iterator[str]:
    """Yield the public classes of a module; those inside functions and other classes too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public functions of a module and the public methods of its public classes."""
    for node in tree.body:
        for each in node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and not each.name.startswith("_"):
                yield each


def argument_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


@pytest.mark.integration
def test_no_public_class_name_is_used_twice() -> None:
    where = defaultdict(list)
    for file, tree in trees():
        for name in public_classes(tree):
            where[name].append(file)
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def undocumented(file: str, tree: ast.Module) -> Iterator[tuple[bool, str]]:
    for function in public_functions(tree):
        text = ast.get_docstring(function) or ""
        if len(argument_names(function)) >= 3:
            yield "Args:" in text, f"{file}:{function.lineno} {function.name}"


@pytest.mark.integration
def test_public_functions_document_their_arguments() -> None:
    found = [each for file, tree in trees() if not file.startswith("tests/") for each in undocumented(file, tree)]
    missing = [name for documented, name in found if not documented]
    assert len(found) > 100
    assert 1 - len(missing) / len(found) >= DOCUMENTED, missing
