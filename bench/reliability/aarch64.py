"""Two private steps on an emulated Pi 4, beside this machine's own:  make smoke-aarch64, or

    python -m bench.reliability.aarch64 --root FOLDER

FOLDER is a Debian for arm64 with Anther by its lock (`deploy/smoke/root.sh`). The processor is emulated by qemu-user as
a Cortex-A72, which stops at instructions that a Pi 4 lacks. Shown are that the lock installs and is what is there, and
that training comes to the same; not how fast it is, nor heat. What is still apart is mostly the schedule's: in float32
σ = √(1 − ᾱ) differs by 4e-4 of itself at the third timestep, which one of the pictures is seen at; hardly elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.lib.machine import machine

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "aarch64.json"
LOCK = ROOT / "deploy" / "locks" / "aarch64.txt"
STEPS = Path(__file__).with_name("dp_smoke.py")
PYTHON = "/opt/anther/bin/python"
APART = 1e-4
"""The most that the change of any site may differ, relative to it."""
LIMIT = 900.0  # seconds
ILLEGAL = 132  # 128 + SIGILL, as a shell says it; -4 as Python does


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 1 if they come to something else, or the lock isn't what is installed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reliability.aarch64",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--cpu", default="cortex-a72", help="as qemu calls it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    found = compared(emulated(asked.root, asked.cpu), native(), LOCK.read_text(encoding="utf-8"))
    found = {"command": f"python -m bench.reliability.aarch64 --root ROOT --cpu {asked.cpu}", "cpu": asked.cpu, **found}
    asked.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0 if found["ok"] else 1


def native() -> dict[str, Any]:
    """What this machine comes to."""
    return _said([sys.executable, "-m", "bench.reliability.dp_smoke"])


def emulated(root: Path, cpu: str) -> dict[str, Any]:
    """What an arm64 Python in `root` comes to."""
    command = ["nice", "-n", "15", "chroot", str(root), "/usr/bin/env", "-i", f"QEMU_CPU={cpu}", "HOME=/tmp"]
    command += ["OMP_NUM_THREADS=1", "PATH=/usr/bin:/bin", PYTHON, "-"]
    version = subprocess.run(["qemu-aarch64-static", "--version"], capture_output=True, text=True, check=True).stdout
    return {**_said(command, STEPS.read_text(encoding="utf-8")), "qemu": version.splitlines()[0]}


def compared(arm: Mapping[str, Any], x86: Mapping[str, Any], lock: str) -> dict[str, Any]:
    """How far apart they are, and what of the lock is installed."""
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    there = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in arm["packages"].items()}
    amiss = {name: there.get(name) for name, version in locked.items() if there.get(name) != version}
    cuda = sorted(name for name in there if re.search(r"nvidia|cuda|triton", name))
    ours, theirs = products(arm), products(x86)
    apart = {
        site: float(np.linalg.norm(ours[site] - theirs[site]) / np.linalg.norm(theirs[site])) for site in sorted(theirs)
    }
    worst = max(apart, key=lambda site: apart[site])
    kept = ("machine", "python", "loss", "steps", "seconds_to_load", "seconds_to_train", "peak_mib")
    right = arm["machine"] == "aarch64" and arm["steps"] == x86["steps"] == 2 and ours.keys() == theirs.keys()
    return {
        "ok": right and apart[worst] <= APART and not amiss and not cuda,
        "apart": {"most": APART, "worst": apart[worst], "at": worst, "median": float(np.median([*apart.values()]))},
        "loss_apart": abs(arm["loss"] - x86["loss"]),
        "sites": len(apart),
        "base": arm["base"],
        "lock": {
            "sha256": hashlib.sha256(lock.encode()).hexdigest(),
            "packages": len(locked),
            "amiss": amiss,
            "cuda": cuda,
        },
        "aarch64": {**{key: arm[key] for key in kept}, "qemu": arm.get("qemu"), **versions(there)},
        "x86": {**{key: x86[key] for key in kept}, **versions(x86["packages"]), **machine(torch.device("cpu"))},
    }


def versions(packages: Mapping[str, str]) -> dict[str, str | None]:
    return {name: packages.get(name) for name in ("torch", "numpy", "diffusers", "flwr")}


def products(said: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What each site was changed by, B A."""
    flat, found, begin = np.frombuffer(base64.b64decode(said["products"]), "<f4").astype(np.float64), {}, 0
    for site, shape in said["shapes"].items():
        size = int(np.prod(shape))
        found[site] = flat[begin : begin + size].reshape(shape)
        begin += size
    assert begin == flat.size
    return found


def _said(command: Sequence[str], program: str | None = None) -> dict[str, Any]:
    """The JSON that a program prints last."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, input=program, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode in (ILLEGAL, -4):
        raise SystemExit(f"{command[-2]}: an instruction that this processor lacks (SIGILL): which PyTorch is there?")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    sys.exit(main())
