"""A real `flwr run`: Flower builds, installs and simulates the app bundle."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.lib.tiny import ATTENTION
from models.base.base import Base
from server.rounds import checkpoint

ROOT = Path(__file__).parents[2]
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture
def environment(tmp_path, pipeline_folder):
    """Environment with its own Flower home; its SuperLink, which outlives the command, is ended afterwards."""
    flower = tmp_path / "flower"
    yield (
        os.environ
        | OFFLINE
        | {
            "FLWR_HOME": str(flower),
            "ANTHER_HOME": str(tmp_path / "anther"),
            "ANTHER_DATA_ROOT": str(tmp_path / "owners"),
            "ANTHER_TEST": "true",
            "ANTHER_BASE": str(pipeline_folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
    )
    for process in Path("/proc").glob("[0-9]*"):
        try:
            belongs = f"FLWR_HOME={flower}".encode() in (process / "environ").read_bytes().split(b"\0")
            if belongs:
                os.kill(int(process.name), signal.SIGTERM)
        except OSError:
            continue


@pytest.mark.stress
@pytest.mark.skipif(sys.platform != "linux", reason="finds Flower's processes in /proc")
def test_flower_runs_the_bundle(tmp_path, environment, pipeline_folder):
    pytest.importorskip("ray", reason="pip install anther[ray]")
    app = tmp_path / "anther-app"
    packages = ["client", "common", "conf", "models", "privacy", "protocol", "server", "strategies", "training"]
    for package in packages:
        shutil.copytree(ROOT / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, app / name)
    random = np.random.default_rng(0)
    for owner in ("a", "b"):
        folder = tmp_path / "owners" / owner
        folder.mkdir(parents=True)
        names = [f"{k}.png" for k in range(6)]
        for name in names:
            Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / name)
        lines = [json.dumps({"file_name": name, "text": name}) for name in names]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    overrides = (
        f"rounds=2 base.path={pipeline_folder} base.device=cpu adapter.shared.rank=2 planning.metered_rank=1 "
        "evaluation.timesteps=1 adapter.personal.steps=1 adapter.eval_interval=1"
    )
    done = subprocess.run(
        [
            "flwr",
            "run",
            str(app),
            "--stream",
            "--federation-config",
            "num-supernodes=2 client-resources-num-cpus=1",
            "-c",
            f'overrides="{overrides}"',
        ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "anther: round 2 of 2: 2 of 2 replied" in done.stdout + done.stderr, (
        done.stdout[-3000:] + done.stderr[-1000:]
    )
    (run,) = (tmp_path / "anther" / "runs").iterdir()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert list((run / "tensorboard").iterdir())
    state = checkpoint.load(run / "checkpoints", sites=Base(pipeline_folder, sites=ATTENTION).sites)
    assert state.round == 2
    assert state.history[2].validation.shared != state.history[2].validation.base
    assert all((tmp_path / "anther" / "devices" / owner / "personal.safetensors").is_file() for owner in "ab")
