"""Programs of `anther bench startup`: each ends with its first training step, and prints when its phases ended.

A program imports nothing before its clock runs, so this module imports only Python's own.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

PICTURES = 20  # that the script encodes: as many training pictures as the simulation's four writers have


class PhaseClock:
    """Records the CPU and wall seconds since the start of the process at the end of each phase.

    Args:
        started: `time.monotonic()` of the parent process when it started this one.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.ends: dict[str, tuple[float, float]] = {}

    def end(self, phase: str) -> None:
        """Record the end of a phase; of repeated ones, the first."""
        self.ends.setdefault(phase, (time.process_time(), time.monotonic() - self.started))

    def exit(self, phase: str) -> None:
        """Record the end of the last phase, print all as JSON, and end the process."""
        self.end(phase)
        print(json.dumps(self.ends), flush=True)
        os._exit(0)  # without the exit handlers of the libraries, and without the rest of the simulation


def run_simulation(clock: PhaseClock, folder: str) -> None:
    """Run `anther simulate preset=quick` until the end of its first training step.

    Args:
        clock: clock of the process.
        folder: output folder of the run.
    """
    from simulations import run

    clock.end("command imported")

    def observe(*_: Any) -> None:
        """Observe the phases in modules that the command imports only after its configuration."""
        clock.end("configuration composed")
        from common.imports import collection_paused

        with collection_paused():  # as in the command
            from models.base import base
            from simulations import setup  # noqa: F401
            from training import optimizer
        clock.end("PyTorch imported")
        _call_after(base, "load", lambda: clock.end("base loaded"))
        _call_after(base.Base, "encode_captions", lambda: clock.end("pictures encoded"))
        _call_after(optimizer.AdamW, "step", lambda: clock.exit("first step trained"))

    _call_before(run, "simulate", observe)
    sys.argv = ["anther simulate", "preset=quick", f"hydra.run.dir={folder}"]
    run.main()


def run_script(clock: PhaseClock, folder: str) -> None:
    """Train one step on the same base as a script of diffusers and peft does, without a federation.

    Args:
        clock: clock of the process.
        folder: not used.
    """
    del folder
    import torch

    clock.end("PyTorch imported")
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    from models.files.assets import locate

    pipeline = StableDiffusionPipeline.from_pretrained(locate("glyphs"), safety_checker=None)
    clock.end("base loaded")
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    with torch.no_grad():
        pixels = torch.zeros(PICTURES, pipeline.vae.config.in_channels, side, side)
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        context = pipeline.encode_prompt(["a"] * PICTURES, "cpu", 1, False)[0]
    clock.end("pictures encoded")
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([part for part in unet.parameters() if part.requires_grad], lr=1e-3)
    noise, t = torch.randn_like(latents[:4]), torch.tensor([100, 300, 500, 700])
    loss = (unet(pipeline.scheduler.add_noise(latents[:4], noise, t), t, context[:4]).sample - noise).square().mean()
    loss.backward()
    optimizer.step()
    clock.exit("first step trained")


def import_torch(clock: PhaseClock, folder: str) -> None:
    """Import PyTorch: what no program can do without.

    Args:
        clock: clock of the process.
        folder: not used.
    """
    del folder
    import torch  # noqa: F401

    clock.exit("PyTorch imported")


PROGRAMS: dict[str, Callable[[PhaseClock, str], None]] = {
    "anther": run_simulation,
    "script": run_script,
    "torch": import_torch,
}


def _call_before(owner: Any, name: str, hook: Callable[..., None]) -> None:
    """Call `hook` with the arguments of `owner.name` before each call of it."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def observed(*args: Any, **options: Any) -> Any:
        hook(*args)
        return function(*args, **options)

    setattr(owner, name, observed)


def _call_after(owner: Any, name: str, hook: Callable[[], None]) -> None:
    """Call `hook` after each call of `owner.name`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def observed(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        hook()
        return result

    setattr(owner, name, observed)


def main() -> None:
    """Run the program that the command line names: `PROGRAM STARTED FOLDER`."""
    name, started, folder = sys.argv[1:]
    PROGRAMS[name](PhaseClock(float(started)), folder)
