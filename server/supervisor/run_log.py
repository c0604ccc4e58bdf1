"""A run's log for its operator: Anther's records as plain lines with the time, and Flower's warnings and errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from common.service import say

MARK = "anther: "
"""Prefix of our lines in Flower's log."""

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NOISE = ("Using SuperLink: ", "Successfully installed ")
_LEVEL = re.compile(r"\s*(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+(?:\d[-\d :,.]*)?:\s*")


class MarkingHandler(logging.Handler):
    """Handler that marks Anther's records, to distinguish them from Flower's, and passes them to a handler of Flower.

    Args:
        inner: Flower's handler.
    """

    def __init__(self, inner: logging.Handler) -> None:
        super().__init__()
        self._inner = inner

    def emit(self, record: logging.LogRecord) -> None:
        copied = logging.makeLogRecord(record.__dict__)
        copied.msg, copied.args = MARK + record.getMessage(), None
        self._inner.handle(copied)


class ConsoleHandler(logging.Handler):
    """Handler that prints records of the server's own process."""

    def emit(self, record: logging.LogRecord) -> None:
        say(_with_level(record.levelname, record.getMessage()))


def log_to_console(*loggers: str) -> None:
    """Print records of these loggers from INFO on, in this process."""
    for name in loggers:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(ConsoleHandler())


def log_through_flower(*loggers: str) -> None:
    """Pass records of these loggers, from INFO on, to Flower's handlers, whose output `flwr run --stream` shows."""
    for name in loggers:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        for handler in logging.getLogger("flwr").handlers:
            logger.addHandler(MarkingHandler(handler))


def print_log(lines: Iterable[str]) -> None:
    """Print a run's log as it arrives."""
    for line in lines:
        if text := format_line(line):
            say(text)


def format_line(line: str) -> str | None:
    """Convert a line of Flower's log for the operator; None for a line that only reports Flower's own progress."""
    plain = _ANSI.sub("", line).rstrip()
    level = match[1] if (match := _LEVEL.match(plain)) else None
    text = plain[match.end() :] if match else plain
    if text.startswith(MARK):
        return _with_level(level or "INFO", text.removeprefix(MARK))
    if not text.strip() or level in ("DEBUG", "INFO") or text.startswith(_NOISE):
        return None
    return _with_level(level or "INFO", text)


def _with_level(level: str, text: str) -> str:
    return text if level == "INFO" else f"{level.lower()}: {text}"
