"""What a command that runs for months needs: an end that cleans up, and lines with the time."""

from __future__ import annotations

import signal
import time
from types import FrameType


class SignalReceived(BaseException):
    """A signal came."""


def raise_on_sigterm() -> None:
    """Have SIGTERM raise Stopped in the main thread."""
    signal.signal(signal.SIGTERM, _stop)


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise SignalReceived
