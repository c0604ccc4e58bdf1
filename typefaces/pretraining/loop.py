"""Resumable training loop of the three stages: autoencoder, denoiser, judge.

Step n draws all random numbers from a generator seeded by (seed, n), so that a resumed run continues exactly as if it
had not been interrupted. A checkpoint is one safetensors file with JSON in its header, and replaces the previous one
atomically.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from common.errors import AntherError
from conf.schemas.pretraining import StageConfig

Loss = Callable[[Generator], Tensor]
M = TypeVar("M", bound=nn.Module)


def progress(stage: StageConfig, step: int, elapsed: float) -> float:
    """Return the completed fraction of the stage: of its steps or of its seconds, whichever is larger.

    Args:
        stage: configuration of the stage.
        step: optimizer step.
        elapsed: seconds since the start of the stage.
    """
    by_time = elapsed / stage.seconds if stage.seconds else 0.0
    return min(1.0, max(step / stage.steps, by_time))


def learning_rate(stage: StageConfig, step: int, done: float) -> float:
    """Return the learning rate: linear warm-up, then a cosine to zero (Loshchilov & Hutter, 2017).

    Args:
        stage: configuration of the stage.
        step: optimizer step.
        done: completed fraction of the stage.
    """
    return stage.lr * min(1.0, (step + 1) / stage.warmup) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(stage: StageConfig, step: int) -> float:
    """Return the EMA decay, smaller at first: min(decay, (1 + n) / (10 + n))."""
    return min(stage.ema_decay, (1 + step) / (10 + step))


def step_generator(seed: int, step: int, device: torch.device) -> Generator:
    """Return the random generator of one step.

    Args:
        seed: seed of the training.
        step: index of the step.
        device: device of the generator.
    """
    return Generator(device).manual_seed(seed * 1_000_003 + step)


def train(model: M, loss: Loss, *, stage: StageConfig, name: str, seed: int, folder: Path, resume: bool) -> M:
    """Train a model in place.

    Args:
        model: module with gradients.
        loss: returns the loss of a batch drawn from a generator.
        stage: configuration of the stage.
        name: name of the checkpoint file, and in messages.
        seed: seed of all random numbers.
        folder: folder of the checkpoint.
        resume: continue from the checkpoint, if it exists.

    Returns:
        A copy with averaged weights, in eval mode.
    """
    file = folder / f"{name}.safetensors"
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=stage.weight_decay, fused=device.type == "cuda"
    )
    average = {key: value.detach().clone() for key, value in parameters.items()}
    step, elapsed = restore(file, parameters, average, optimizer) if resume and file.exists() else (0, 0.0)
    model.train()
    started, previous = None, elapsed
    while (done := progress(stage, step, elapsed)) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(stage, step, done)
        with torch.autocast(device.type, torch.bfloat16) if stage.bf16 else nullcontext():
            value = loss(step_generator(seed, step, device))
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(
            list(average.values()), [p.detach() for p in parameters.values()], 1 - ema_decay(stage, step)
        )
        step += 1
        if started is None:  # the first step compiles and is not counted as training time
            report(name, step, elapsed, value)
            started = time.perf_counter()
        elapsed = previous + time.perf_counter() - started
        if step % stage.log_interval == 0:
            report(name, step, elapsed, value)
        if step % stage.checkpoint_interval == 0:
            save(file, parameters, average, optimizer, step, elapsed)
    save(file, parameters, average, optimizer, step, elapsed)
    averaged = copy.deepcopy(model)
    averaged.load_state_dict(average, strict=False)  # buffers are not averaged
    averaged.eval().requires_grad_(False)
    return averaged


def report(name: str, step: int, elapsed: float, loss: Tensor) -> None:
    """Print one line about a step; synchronizes with the device, and stops a run that has diverged.

    Args:
        name: name of the stage.
        step: optimizer step.
        elapsed: seconds since the start of the stage.
        loss: scalar loss.

    Raises:
        AntherError: the loss is not finite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise AntherError(f"{name}: the loss is {value} at step {step}; lower {name}.lr")
    print(f"{name} step {step} {elapsed:.0f} s loss {value:.4f}", flush=True)


def save(
    file: Path,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    elapsed: float,
) -> None:
    """Save a checkpoint.

    Args:
        file: safetensors.
        parameters: trained weights by name.
        average: averaged weights by name.
        optimizer: optimizer whose state is saved.
        step: optimizer step.
        elapsed: seconds since the start of the stage.
    """
    tensors = {f"model.{key}": value.detach() for key, value in parameters.items()}
    tensors |= {f"average.{key}": value for key, value in average.items()}
    for key, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}.{key}"] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, partial, metadata={"progress": json.dumps({"step": step, "elapsed": elapsed})})
    partial.replace(file)


def restore(
    file: Path, parameters: dict[str, nn.Parameter], average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load a checkpoint of `save` in place.

    Args:
        file: safetensors.
        parameters: trained weights by name.
        average: averaged weights by name.
        optimizer: optimizer of the parameters.

    Returns:
        Step and elapsed seconds.

    Raises:
        AntherError: the file is damaged or belongs to another architecture.
    """
    try:
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            position = json.loads(stored.metadata()["progress"])
            for key, parameter in parameters.items():
                parameter.copy_(stored.get_tensor(f"model.{key}"))
                average[key].copy_(stored.get_tensor(f"average.{key}"))
                optimizer.state[parameter] = {
                    kind: stored.get_tensor(f"{kind}.{key}").to(parameter.device)
                    for kind in ("step", "exp_avg", "exp_avg_sq")
                }
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise AntherError(f"{file}: no checkpoint of this architecture: start with resume=false") from error
    return int(position["step"]), float(position["elapsed"])
