"""The files and commands of the system that we run on; tests put a folder and fakes in their place."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TERMUX = "/data/data/com.termux/files/usr/bin"  # beside PATH: PRoot sees Termux's commands there


@dataclass(frozen=True)
class System:
    """Where sensors are. Whatever can't be read is None: no sensor is one that everybody has."""

    root: Path = Path("/")
    path: str | None = None
    """Folders of commands, as in PATH; None: PATH itself."""
    timeout: float = 5.0
    """Seconds that a command may take."""

    def text(self, file: str | Path) -> str | None:
        """What a file says, without the space around it."""
        try:
            return (self.root / file).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:  # it isn't there, is root's alone, or its driver has nothing to say now
            return None

    def number(self, file: str | Path) -> float | None:
        """A file's number, which is finite."""
        return to_number(self.text(file))

    def found(self, pattern: str) -> list[Path]:
        """What matches under the root, sorted."""
        return sorted(self.root.glob(pattern))

    def has(self, command: str) -> bool:
        """Whether there is such a command."""
        return self._which(command) is not None

    def output(self, *command: str) -> str | None:
        """What a command prints; None if there is none such, it fails or takes too long."""
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
    """A finite number, if the text is one."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
