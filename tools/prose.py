"""Check prose against docs/style.md:  python -m tools.prose [PATH …]

The patterns below are common in drafts of this project and almost absent from the documentation of comparable code
bases (PyTorch, Opacus, Flower, diffusers). Each has a limit per 1,000 words, which every file has to meet: docstrings,
comments, messages, test names, Markdown, and the text of configuration files, scripts and templates.

A limit allows a long page a few occurrences and a short file none.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Pattern:
    """One pattern, its limit per 1,000 words, and the advice that is printed with a finding."""

    name: str
    expression: re.Pattern[str]
    limit: float
    advice: str


PATTERNS = (
    Pattern("person", re.compile(r"\b(?:who|whom|no|some|any|every)(?:ever|body)\b", re.I), 0.2, "name the role"),
    Pattern(
        "nominal what",
        re.compile(
            r"\b[Ww]hat (?:is|was|has|are|it|they|a|the|there|that|devices|one|comes|training|rounding)\b",
        ),
        0.5,
        "use the noun",
    ),
    Pattern("of which", re.compile(r"\bof (?:which|whom|whose|what)\b"), 0.2, "split the sentence"),
    Pattern("initial Of", re.compile(r"(?:^|[.:;]\s)(?:Of|As of) [a-z]", re.M), 0.05, "begin with the subject"),
    Pattern("so many", re.compile(r"\bso (?:many|much)\b", re.I), 0.05, "give the number or its name"),
    Pattern("alone", re.compile(r"\balone\b", re.I), 0.3, "write only, or by itself"),
    Pattern("told", re.compile(r"\b(?:tells? of|told of|is told)\b", re.I), 0.1, "write reports, or describes"),
    Pattern(
        "British spelling",
        re.compile(
            r"\b\w*(?:(?:personal|quant|optim|initial|normal|serial|organ|recogn|summar|general|real|minim|maxim|token|"
            r"standard|author|custom|visual|synchron|random|regular|utili)is(?:e[drs]?|ing|ations?)"
            r"|(?:behavi|col|neighb|hon|fav|lab)our\w*|licenc\w+|centre[ds]?|gr(?:ey)\w*|enrol(?:s|ment)?)\b",
            re.I,
        ),
        0.0,
        "use US spelling",
    ),
)
TEXT = {".md", ".yaml", ".yml", ".toml", ".sh", ".html", ".service", ".conf", ".cff"}
NAMES = {"Makefile", "Dockerfile.client", "Dockerfile.server"}
SENTENCE = re.compile(r"[^\W\d_]+ [^\W\d_]+ [^\W\d_]+")


@dataclass(frozen=True)
class Finding:
    """A file that exceeds the limit of one pattern."""

    path: str
    pattern: Pattern
    matches: tuple[str, ...]
    allowed: int

    def __str__(self) -> str:
        shown = "; ".join(self.matches[:4])
        allowed = f", allowed: {self.allowed}" if self.allowed else ""
        return f"{self.path}: {self.pattern.name} × {len(self.matches)}{allowed} ({self.pattern.advice}): {shown}"


def check(path: str, text: str) -> list[Finding]:
    """Check the prose of one file against every limit.

    Args:
        path: name of the file in findings.
        text: its prose, as `prose` returns it.

    Returns:
        One finding for each pattern whose rate is above its limit.
    """
    words = len(re.findall(r"[^\W\d_]+", text))
    findings = []
    for pattern in PATTERNS:
        allowed = int(pattern.limit * words / 1000)
        matches = tuple(_context(text, match) for match in pattern.expression.finditer(text))
        if len(matches) > allowed:
            findings.append(Finding(path, pattern, matches, allowed))
    return findings


def prose(path: Path) -> str:
    """Return the prose of one file: for Python its docstrings, comments, messages and test names; else its text."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return "\n".join(_python_prose(source))
    if path.suffix == ".md":
        text = re.sub(r"^ *```.*?^ *```", "", source, flags=re.MULTILINE | re.DOTALL)
        return re.sub(r"`[^`\n]+`", "", text)
    return re.sub(r"^ *# ?", "", source, flags=re.MULTILINE)


def files(root: Path = ROOT) -> list[Path]:
    """List the tracked files of a repository that contain prose."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
    paths = [root / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.suffix in TEXT | {".py"} or path.name in NAMES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings in these files or folders (default: all tracked files); return 1 if there is one."""
    selected = [Path(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    listed = [file for path in selected for file in ([path] if path.is_file() else path.rglob("*.*"))]
    paths = listed if selected else files()
    chosen = [path for path in paths if path.suffix in TEXT | {".py"} or path.name in NAMES]
    findings = [finding for path in chosen for finding in check(_relative(path), prose(path))]
    print("\n".join(map(str, findings)) or f"{len(chosen)} files meet docs/style.md")
    return int(bool(findings))


def _python_prose(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name.replace("_", " ")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and SENTENCE.search(node.value):
            yield node.value
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    ]
    yield "\n".join(token.string.lstrip("# ") for token in comments)


def _context(text: str, match: re.Match[str]) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    line = text[start : match.end() + 30].split("\n")[0]
    return "…" + line[max(0, match.start() - start - 30) :] + "…"


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())
