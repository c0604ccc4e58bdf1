"""Peers of the cohort: implementations that train one client at a time, each as fast as possible.

All train LoRA factors of rank 8 on the same frozen UNet with the same examples, loss and AdamW:

- `PeftPeer`: diffusers' `add_adapter` and a plain training step, as in diffusers' training scripts;
- `OpacusPeer`: the same with Opacus' hooks and `DPOptimizer`;
- `bench.throughput.opacus_baseline.HooksPeer`: minimal DP-SGD on LoRA.

In low precision there are several ways to store the factors; all are measured (`FactorPrecision`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bench.lib.workloads import BATCH, LEARNING_RATE, PRIVACY, RANK, SITES
from models.diffusion.objective import Schedule, add_noise, per_example_loss, target
from training.jobs import Examples

FactorPrecision = Literal["autocast", "fp32", "compute"]
"""Precision of a peft peer's factors on a base in bf16:

autocast  fp32 factors, bf16 products by `torch.autocast`, which also runs normalizations in fp32
fp32      fp32 factors and fp32 products, because peft casts a factor's input to the factor's dtype
compute   bf16 factors, gradients, moments and noise: less precise than the cohort, and the least work

On a base in fp32 all three are the same.
"""


class Peer(Protocol):
    """A training loop of one client."""

    def step(self, pictures: Tensor) -> None:
        """Run one step on these examples, indices `[n]` on the CPU."""
        ...


class PeerBatch(NamedTuple):
    """Inputs of a step and its prediction target."""

    x: Tensor  # x_t [n, c, h, w]
    t: Tensor  # [n]
    context: Tensor  # [n, tokens, d]
    prediction_target: Tensor  # [n, c, h, w]


def draw(examples: Examples, schedule: Schedule, pictures: Tensor) -> PeerBatch:
    """Draw timesteps and noise on the device.

    Args:
        examples: the client's examples.
        schedule: the noise schedule.
        pictures: indices of the batch `[n]`.
    """
    x0 = examples.latents[pictures]
    t = torch.randint(len(schedule), (len(pictures),), device=x0.device)
    noise = torch.randn_like(x0)
    return PeerBatch(add_noise(schedule, x0, noise, t), t, examples.context[pictures], target(schedule, x0, noise, t))


def losses(unet: nn.Module, batch: PeerBatch) -> Tensor:
    """Compute the loss of each example `[n]`."""
    dtype = next(unet.parameters()).dtype
    output = unet(batch.x.to(dtype), batch.t, encoder_hidden_states=batch.context.to(dtype), return_dict=False)[0]
    return per_example_loss(output, batch.prediction_target)


class PeftPeer:
    """Non-private training with diffusers, peft and torch.optim.AdamW.

    Args:
        unet: the frozen network.
        examples: the client's examples.
        schedule: the noise schedule.
        factors: precision of the factors.
    """

    def __init__(self, unet: nn.Module, examples: Examples, schedule: Schedule, *, factors: FactorPrecision) -> None:
        self.unet, self.examples, self.schedule = unet, examples, schedule
        self.parameters = add_lora(unet, factors)
        self.autocast = torch.autocast(examples.latents.device.type, torch.bfloat16, factors == "autocast")
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=0.0)

    def step(self, pictures: Tensor) -> None:
        batch = draw(self.examples, self.schedule, pictures.to(self.examples.latents.device))
        with self.autocast:
            loss = losses(self.unet, batch).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class OpacusPeer:
    """Private training with diffusers, peft and Opacus: per-example gradients, clipping, sum, noise and scale.

    Args:
        unet: the frozen network.
        examples: the client's examples.
        schedule: the noise schedule.
        factors: precision of the factors.
    """

    def __init__(self, unet: nn.Module, examples: Examples, schedule: Schedule, *, factors: FactorPrecision) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.examples, self.schedule = examples, schedule
        self.parameters = add_lora(unet, factors)
        self.autocast = torch.autocast(examples.latents.device.type, torch.bfloat16, factors == "autocast")
        self.unet: nn.Module = GradSampleModule(unet.train())  # its hooks do nothing in eval(); there is no dropout
        self.optimizer = DPOptimizer(
            torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=0.0),
            noise_multiplier=PRIVACY.noise_multiplier,
            max_grad_norm=PRIVACY.clip,
            expected_batch_size=BATCH,
        )

    def step(self, pictures: Tensor) -> None:
        if len(pictures):
            self.backward(draw(self.examples, self.schedule, pictures.to(self.examples.latents.device)))
        else:  # attention can't reshape an empty batch; noise is still added
            for parameter in self.parameters:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, batch: PeerBatch) -> None:
        """Store every parameter's per-example gradients `[n, …]` in its `grad_sample`."""
        with self.autocast:
            loss = losses(self.unet, batch).mean()
        loss.backward()


def add_lora(unet: nn.Module, factors: FactorPrecision) -> list[nn.Parameter]:
    """Add peft's LoRA layers to a UNet, and return their parameters."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=SITES))  # type: ignore[operator]
    if factors != "compute":
        cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]
