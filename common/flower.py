"""Environment of Flower's programs: offline, and with a separate home."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common import processes

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}


def environment(home: Path) -> dict[str, str]:
    """Return our environment with `home` as Flower's home. Nothing is sent outside of the federation, and nothing is
    installed.
    """
    commands = str(Path(sys.executable).parent)  # Flower finds its own programs by PATH
    path = os.environ.get("PATH", "")
    return processes.environment({**OFFLINE, "FLWR_HOME": str(home), "PATH": f"{commands}{os.pathsep}{path}"})
