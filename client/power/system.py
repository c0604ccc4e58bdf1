"""Files and commands of the system; tests replace them with a folder and fakes."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TERMUX = "/data/data/com.termux/files/usr/bin"  # in addition to PATH: under PRoot, Termux's commands are here


@dataclass(frozen=True)
class System:
    """Access to sensors. Anything that can't be read is None: no sensor exists on every device."""

    root: Path = Path("/")
    path: str | None = None
    """Folders of commands, in the format of PATH; None: PATH itself."""
    timeout: float = 5.0
    """Maximum seconds of a command."""

    def text(self, file: str | Path) -> str | None:
        """Return a file's content, stripped; None if it can't be read."""
        try:
            return (self.root / file).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:  # missing, readable by root only, or the driver has no value now
            return None

    def number(self, file: str | Path) -> float | None:
        """Return the finite number in a file; None if there is none."""
        return to_number(self.text(file))

    def glob(self, pattern: str) -> list[Path]:
        """List the paths that match a pattern below the root, sorted."""
        return sorted(self.root.glob(pattern))

    def has(self, command: str) -> bool:
        """Return whether a command exists."""
        return self._which(command) is not None

    def output(self, *command: str) -> str | None:
        """Return the standard output of a command; None if it doesn't exist, fails or takes too long."""
        program = self._which(command[0])
        if program is None:
            return None
        try:
            done = subprocess.run(
                [program, *command[1:]],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=self.timeout,
                env=os.environ | {"LC_ALL": "C"},
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return None if done.returncode else done.stdout.decode(errors="replace")

    def _which(self, command: str) -> str | None:
        path = f"{os.environ.get('PATH', os.defpath)}:{TERMUX}" if self.path is None else self.path
        return shutil.which(command, path=path)


def to_number(text: str | None) -> float | None:
    """Parse a finite number; None if the text isn't one."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
