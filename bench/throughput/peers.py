"""The forms that the cohort is compared with: one client at a time, each as well as it can be done.

All train LoRA factors of rank 8 on the same frozen UNet with the same examples, loss and AdamW:

- `PeftPeer`: diffusers' own `add_adapter` and a plain training step, as in diffusers' training scripts;
- `OpacusPeer`: the same under Opacus' hooks and `DPOptimizer`;
- `bench.throughput.opacus_baseline.Hooks`: the least that DP-SGD on LoRA needs.

Low precision has more than one way to keep the factors; which one serves a peer best is measured (`FactorPrecision`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bench.lib.workloads import BATCH, LEARNING_RATE, PRIVACY, RANK, SITES
from models.diffusion.objective import Schedule, add_noise, per_example_loss, target
from training.jobs import Examples

FactorPrecision = Literal["autocast", "fp32", "compute"]
"""How a peft peer holds its factors below a base in bf16:

autocast  fp32 factors, bf16 products by `torch.autocast`, which also runs the norms in fp32
fp32      fp32 factors and fp32 products, since peft casts what enters a factor to the factor's dtype
compute   bf16 factors, gradients, moments and noise: less precise than the cohort, and the least work

With everything in fp32 the three are the same.
"""


class Peer(Protocol):
    """A training loop of one client."""

    def step(self, pictures: Tensor) -> None:
        """One step on these examples, indices [n] on the CPU."""
        ...


class PeerBatch(NamedTuple):
    """What a step sees: x_t, t, context and what the network is to predict."""

    x: Tensor  # [n, c, h, w]
    t: Tensor  # [n]
    context: Tensor  # [n, tokens, d]
    wanted: Tensor  # [n, c, h, w]


def draw(examples: Examples, schedule: Schedule, pictures: Tensor) -> PeerBatch:
    """Random timesteps and noise, drawn on the device."""
    x0 = examples.latents[pictures]
    t = torch.randint(len(schedule), (len(pictures),), device=x0.device)
    noise = torch.randn_like(x0)
    return PeerBatch(add_noise(schedule, x0, noise, t), t, examples.context[pictures], target(schedule, x0, noise, t))


def losses(unet: nn.Module, batch: PeerBatch) -> Tensor:
    """Loss of each example [n]."""
    dtype = next(unet.parameters()).dtype
    output = unet(batch.x.to(dtype), batch.t, encoder_hidden_states=batch.context.to(dtype), return_dict=False)[0]
    return per_example_loss(output, batch.wanted)


class PeftPeer:
    """diffusers + peft + torch.optim.AdamW, not private."""

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
    """diffusers + peft + Opacus: per-example gradients by its hooks, its clip, sum, noise and scale."""

    def __init__(self, unet: nn.Module, examples: Examples, schedule: Schedule, *, factors: FactorPrecision) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.examples, self.schedule = examples, schedule
        self.parameters = add_lora(unet, factors)
        self.autocast = torch.autocast(examples.latents.device.type, torch.bfloat16, factors == "autocast")
        self.unet: nn.Module = GradSampleModule(unet.train())  # its hooks are silent in eval(); there is no dropout
        self.optimizer = DPOptimizer(
            torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=0.0),
            noise_multiplier=PRIVACY.noise_multiplier,
            max_grad_norm=PRIVACY.clip,
            expected_batch_size=BATCH,
        )

    def step(self, pictures: Tensor) -> None:
        if len(pictures):
            self.backward(draw(self.examples, self.schedule, pictures.to(self.examples.latents.device)))
        else:  # attention can't reshape an empty batch; the noise is due all the same
            for parameter in self.parameters:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, batch: PeerBatch) -> None:
        """Leave every parameter's per-example gradients [n, …] in its `grad_sample`."""
        with self.autocast:
            loss = losses(self.unet, batch).mean()
        loss.backward()


def add_lora(unet: nn.Module, factors: FactorPrecision) -> list[nn.Parameter]:
    """Give a UNet peft's LoRA layers; their parameters."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=SITES))  # type: ignore[operator]
    if factors != "compute":
        cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]
