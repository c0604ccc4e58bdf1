"""Measure this device for one minute:  anther device benchmark [--like pi4_2gb]

Measures sustained rates of matrix products, convolutions and element-wise operations, and a small training step, which
is compared with its prediction. Writes ANTHER_HOME/device.yaml, which `device=this` reads. Power and battery can't be
measured here; they are taken from the profile of a similar device.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from client.cli.plan import DONE, PROFILE, USAGE
from client.planning.plan_search import pass_seconds
from common.errors import AntherError
from common.units import GIB, MIB
from conf.schemas.planning import DeviceProfileConfig, compose_plan, devices
from models.diffusion.denoiser import Denoiser
from models.families.known import BaseSpec
from models.families.stable_diffusion import STABLE_DIFFUSION
from models.files import assets
from models.footprint.footprint import (
    DUMMY_SCHEDULE,
    Footprint,
    example_shapes,
    footprint,
    forward_backward,
    meta_denoiser,
)
from models.lora.batched_lora import Layout
from training.capacity import total_and_free

SECONDS = 60.0
FREE = 0.9  # fraction of the free memory that training may use
STEP = BaseSpec(
    family=STABLE_DIFFUSION,
    config={  # 34 million parameters
        "block_out_channels": (128, 192, 256),
        "cross_attention_dim": 128,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
)
PIXELS, RANK = 256, 8

_HEADER = """# Rates of this device, measured by `anther device benchmark` on {when} with PyTorch {torch}.
# Watts and battery are those of {like}; correct them if you know better.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="anther device benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--like", choices=devices(), default="laptop", help="device whose watts and battery to use (default: laptop)"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="approximate total time (default: 60)")
    options = parser.parse_args(arguments)
    path = assets.home() / PROFILE
    try:
        if options.seconds <= 0:
            raise AntherError(f"--seconds {options.seconds}: must be greater than 0")
        profile = measure(compose_plan([f"device={options.like}"], path).device, options.seconds)
        write(profile, path, like=options.like)
    except (AntherError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    print("\n".join(f"{key}: {_number(value)}" for key, value in asdict(profile).items()))
    print(f"written to {path}. Next: anther device plan device=this")
    return DONE


def measure(like: DeviceProfileConfig, seconds: float) -> DeviceProfileConfig:
    """Measure this device; watts and battery are taken from `like`. Takes about `seconds`.

    The training step comes first: the process's peak memory must be that of the step when it is compared with the
    prediction.
    """
    free = total_and_free(torch.device("cpu"))[1]
    step, runtime = training_step(seconds / 4)
    profile = replace(
        like,
        name=platform.node() or "this",
        memory_gib=free * FREE / GIB,
        runtime_mib=runtime / MIB,
        matrix_gflops=matrix_rate(seconds / 4) / 1e9,
        convolution_gflops=convolution_rate(seconds / 4) / 1e9,
        bandwidth_gbs=bandwidth(seconds / 4) / 1e9,
        slowdown=1.0,
    )
    try:
        return replace(profile, slowdown=step / pass_seconds(predicted_step(), profile))
    except ValueError as error:  # outside the schema's limits
        raise AntherError(f"{error}: the device was probably busy; measure again when nothing else runs") from error


def predicted_step() -> Footprint:
    """Predict the footprint of the measured step."""
    return footprint(meta_denoiser(STEP, sites=STEP.family.sites), *example_shapes(STEP, PIXELS), rank=RANK)


def training_step(seconds: float) -> tuple[float, int]:
    """Return the seconds of one forward and backward pass, and the bytes of the process beyond the prediction."""
    network = STEP.network().to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        nn.init.normal_(tensor, std=0.02)
    base = Denoiser(network, DUMMY_SCHEDULE, sites=STEP.family.sites)
    layout, (latents, context) = Layout(base.sites, RANK), example_shapes(STEP, PIXELS)
    inputs = torch.zeros(1, *latents), torch.zeros(1, *context), layout, torch.zeros(1, layout.size)
    step_seconds = mean_seconds(lambda: forward_backward(base, *inputs), seconds)
    return step_seconds, max(10 * MIB, peak_bytes() - predicted_step().peak_bytes)


def matrix_rate(seconds: float, n: int = 1024) -> float:
    """Return operations per second of a product of n×n matrices."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / mean_seconds(lambda: a @ b, seconds)


def convolution_rate(seconds: float, channels: int = 320, side: int = 32) -> float:
    """Return operations per second of a 3×3 convolution.

    Args:
        seconds: duration of the measurement.
        channels: input and output channels.
        side: height and width in pixels.
    """
    x, weight = torch.randn(1, channels, side, side), torch.randn(channels, channels, 3, 3)
    return 2 * 9 * (channels * side) ** 2 / mean_seconds(lambda: F.conv2d(x, weight, padding=1), seconds)


def bandwidth(seconds: float, numbers: int = 2**23) -> float:
    """Return bytes read and written per second by an element-wise operation; each result is newly allocated."""
    x = torch.randn(numbers)
    return 2 * x.nbytes / mean_seconds(lambda: F.silu(x), seconds)


def mean_seconds(work: Callable[[], object], seconds: float) -> float:
    """Return the mean seconds of one run of `work` over the second half of the time, when the device is hot."""
    started = time.perf_counter()
    work()
    while time.perf_counter() - started < seconds / 2:
        work()
    halfway, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - started < seconds:
        work()
        runs += 1
    return (time.perf_counter() - halfway) / runs


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write(profile: DeviceProfileConfig, path: Path, *, like: str) -> None:
    """Write the profile as YAML, atomically.

    Args:
        profile: the measured profile.
        path: the file.
        like: name of the profile that watts and battery are taken from.
    """
    header = _HEADER.format(when=datetime.now(UTC).date(), torch=torch.__version__, like=like)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(header + "".join(f"{key}: {_number(value)}\n" for key, value in asdict(profile).items()))
    temporary.replace(path)


def _number(value: object) -> str:
    match value:
        case None:
            return "null"
        case float():
            return f"{value:.4g}"
    return f'"{value}"'


if __name__ == "__main__":
    sys.exit(main())
