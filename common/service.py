"""Helpers for commands that run for months: cleanup on SIGTERM, and output with timestamps."""

from __future__ import annotations

import signal
import time
from types import FrameType


class SignalReceived(BaseException):
    """SIGTERM was received."""


def raise_on_sigterm() -> None:
    """Make SIGTERM raise SignalReceived in the main thread."""
    signal.signal(signal.SIGTERM, _stop)


def say(text: str) -> None:
    """Print a line with a timestamp."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise SignalReceived
