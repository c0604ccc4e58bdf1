"""Compare two private training steps on an emulated Pi 4 with the same steps on this machine.

    make smoke-aarch64
    anther bench aarch64 --root FOLDER

FOLDER is a Debian for arm64 with Anther installed from its lock (`deploy/smoke/root.sh`). qemu-user emulates a
Cortex-A72, which stops at instructions that a Pi 4 lacks. The run shows that the lock installs, that exactly its
versions are installed, and that training gives the same result. It shows neither speed nor heat. Most of the remaining
difference is that of the schedule: in float32, σ = √(1 − ᾱ) differs by a relative 4e-4 at the third timestep, which is
drawn for one of the pictures, and hardly at other timesteps.
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
MAX_DIFFERENCE = 1e-4
"""Largest relative difference of the change of any site."""
TIMEOUT = 900.0  # seconds
ILLEGAL = 132  # 128 + SIGILL: the exit status in a shell; Python reports -4


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 1 if the results differ, or if other versions than the lock's are installed."""
    parser = argparse.ArgumentParser(
        prog="anther bench aarch64",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--cpu", default="cortex-a72", help="qemu's name of the processor")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    record = compare(run_emulated(args.root, args.cpu), run_native(), LOCK.read_text(encoding="utf-8"))
    record = {"command": f"python -m bench.reliability.aarch64 --root ROOT --cpu {args.cpu}", "cpu": args.cpu, **record}
    args.results.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    return 0 if record["ok"] else 1


def run_native() -> dict[str, Any]:
    """Run the steps on this machine."""
    return _run_steps([sys.executable, "-m", "bench.reliability.dp_smoke"])


def run_emulated(root: Path, cpu: str) -> dict[str, Any]:
    """Run the steps with the arm64 Python in `root`."""
    command = ["nice", "-n", "15", "chroot", str(root), "/usr/bin/env", "-i", f"QEMU_CPU={cpu}", "HOME=/tmp"]
    command += ["OMP_NUM_THREADS=1", "PATH=/usr/bin:/bin", PYTHON, "-"]
    version = subprocess.run(["qemu-aarch64-static", "--version"], capture_output=True, text=True, check=True).stdout
    return {**_run_steps(command, STEPS.read_text(encoding="utf-8")), "qemu": version.splitlines()[0]}


def compare(arm: Mapping[str, Any], x86: Mapping[str, Any], lock: str) -> dict[str, Any]:
    """Compare the two runs, and the installed packages with the lock.

    Args:
        arm: output of the emulated run.
        x86: output of the run on this machine.
        lock: text of the lock file.
    """
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in arm["packages"].items()}
    mismatches = {name: installed.get(name) for name, version in locked.items() if installed.get(name) != version}
    cuda = sorted(name for name in installed if re.search(r"nvidia|cuda|triton", name))
    arm_products, x86_products = decode_products(arm), decode_products(x86)
    differences = {
        site: float(np.linalg.norm(arm_products[site] - x86_products[site]) / np.linalg.norm(x86_products[site]))
        for site in sorted(x86_products)
    }
    worst = max(differences, key=lambda site: differences[site])
    copied_keys = ("machine", "python", "loss", "steps", "seconds_to_load", "seconds_to_train", "peak_mib")
    right = (
        arm["machine"] == "aarch64" and arm["steps"] == x86["steps"] == 2 and arm_products.keys() == x86_products.keys()
    )
    return {
        "ok": right and differences[worst] <= MAX_DIFFERENCE and not mismatches and not cuda,
        "apart": {
            "most": MAX_DIFFERENCE,
            "worst": differences[worst],
            "at": worst,
            "median": float(np.median([*differences.values()])),
        },
        "loss_apart": abs(arm["loss"] - x86["loss"]),
        "sites": len(differences),
        "base": arm["base"],
        "lock": {
            "sha256": hashlib.sha256(lock.encode()).hexdigest(),
            "packages": len(locked),
            "amiss": mismatches,
            "cuda": cuda,
        },
        "aarch64": {**{key: arm[key] for key in copied_keys}, "qemu": arm.get("qemu"), **versions(installed)},
        "x86": {**{key: x86[key] for key in copied_keys}, **versions(x86["packages"]), **machine(torch.device("cpu"))},
    }


def versions(packages: Mapping[str, str]) -> dict[str, str | None]:
    """Select the versions of the packages that a result depends on."""
    return {name: packages.get(name) for name in ("torch", "numpy", "diffusers", "flwr")}


def decode_products(output: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Decode the product B A `[out, in]` of each site."""
    flat, result, offset = np.frombuffer(base64.b64decode(output["products"]), "<f4").astype(np.float64), {}, 0
    for site, shape in output["shapes"].items():
        size = int(np.prod(shape))
        result[site] = flat[offset : offset + size].reshape(shape)
        offset += size
    assert offset == flat.size
    return result


def _run_steps(command: Sequence[str], program: str | None = None) -> dict[str, Any]:
    """Run a command, and parse the JSON on its last line of output."""
    started = time.perf_counter()
    process = subprocess.run(
        command, cwd=ROOT, input=program, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if process.returncode in (ILLEGAL, -4):
        raise SystemExit(f"{command[-2]}: illegal instruction (SIGILL) on this processor: check the installed PyTorch")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with status {process.returncode}:\n{process.stderr[-3000:]}")
    return {**json.loads(process.stdout.splitlines()[-1]), "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    sys.exit(main())
