"""`train(base, jobs)`: many clients' local training in shared passes through one frozen base.

Adapters, gradients and moments are rows of flat buffers [S, D], a row for each job. A step draws every
job's own batch, packs all examples into passes of at most `micro_batch`, and updates every row. A private
job's examples have a slot each: the gradient of a slot is that picture's gradient, clipped before the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conf.errors import AntherError
from models.adapter import rank
from models.base import Base
from models.objective import noised, per_example_loss, target
from models.slots import Layout, Stacks, stack_adapters, to_device
from privacy.clipping import BoundedSum, clip_rows, gaussian_sigma
from training.batches import Batch, Batches
from training.inference import held_out_losses, select
from training.jobs import Train, Trained
from training.optimiser import AdamW
from training.passes import pass_size, run_passes

_Slot = tuple[int, bool, float, list[tuple[int, int]]]
"""(row, whether it is one private picture, weight, entries as (pooled picture, place in the batch))."""


class _Pack(NamedTuple):
    """One pass: s slots that are rows of the flat buffer (again), n entries."""

    rows: Tensor  # [s] row of each slot
    private: Tensor  # [s] whether the slot is one picture of a private job
    slots: Tensor  # [n] slot of each entry
    weights: Tensor  # [n] an entry's share in the gradient of its slot
    pictures: Tensor  # [n] index into the pooled examples
    t: Tensor  # [n]
    noise: Tensor  # [n, c, h, w]


def train(base: Base, jobs: Sequence[Train], *, micro_batch: int, timesteps: int) -> list[Trained | Exception]:
    """Train every job; results in the jobs' order. A job whose loss is not finite fails alone.

    `timesteps` is the number of fixed timesteps of a look at validation examples (`held_out_losses`).
    """
    return _Cohort(base, jobs, micro_batch, timesteps).run() if jobs else []


class _Cohort:
    def __init__(self, base: Base, jobs: Sequence[Train], micro_batch: int, timesteps: int) -> None:
        self.base, self.jobs, self.micro_batch, self.timesteps = base, jobs, micro_batch, timesteps
        device = base.device
        self.layout = Layout(base.sites, max(rank(job.start) for job in jobs))
        self.rows = torch.stack([self.layout.pack(job.start) for job in jobs]).to(device)
        self.masks = torch.stack([self.layout.mask(job.start) for job in jobs]).to(device)
        self.frozen = to_device(stack_adapters(base.sites, [job.frozen for job in jobs]), device)
        self.latents = torch.cat([job.examples.latents for job in jobs]).to(device)
        self.context = torch.cat([job.examples.context for job in jobs]).to(device)
        counts = torch.tensor([len(job.examples) for job in jobs])
        self.offsets = (counts.cumsum(0) - counts).tolist()
        self.batches = [Batches(job, len(base.schedule)) for job in jobs]
        rates = torch.tensor([[job.learning_rate] for job in jobs], device=device)
        self.optimiser = AdamW(self.rows, rates)
        self.losses = torch.zeros(len(jobs), device=device)  # summed over entries
        self.entries = [0] * len(jobs)
        self.best: dict[int, tuple[float, Tensor]] = {}  # row -> validation loss and adapter
        self.stale = [0] * len(jobs)  # looks since the best

    def run(self) -> list[Trained | Exception]:
        results: list[Trained | Exception | None] = [None] * len(self.jobs)
        active = list(range(len(self.jobs)))
        step = 0
        while active:
            self._look(step, active)
            for row in [row for row in active if self._finished(row, step)]:
                results[row] = self._result(row, step)
                active.remove(row)
            if active:
                self._step(active)
                step += 1
        return [result for result in results if result is not None]

    def _step(self, active: list[int]) -> None:
        batches = {row: self.batches[row].next() for row in active}
        gradients = torch.zeros_like(self.rows)
        sums = {row: self._clipped(row, self.rows[:0]) for row in active if self.jobs[row].privacy}
        packs = list(self._packs(batches))
        for pack, found in zip(packs, run_passes(self.base.device, self._pass, packs), strict=True):
            self._accumulate(pack, *found, gradients, sums)
        for row, bounded in sums.items():
            gradients[row] = self._privatised(row, bounded)
        self.optimiser.step(gradients)

    def _pass(self, pack: _Pack) -> tuple[Tensor, Tensor]:
        """Forward and backward: the gradient [s, D] of each slot, the loss [n] of each entry."""
        schedule = self.base.schedule
        leaves = self.rows[pack.rows].requires_grad_()
        x0, context = self.latents[pack.pictures], self.context[pack.pictures]
        x = noised(schedule, x0, pack.noise, pack.t)
        frozen = self.frozen if _common(self.frozen) else select(self.frozen, pack.rows.tolist())
        output = self.base.denoise(x, pack.t, context, [frozen, self.layout.stacks(leaves)], pack.slots)
        losses = per_example_loss(output, target(schedule, x0, pack.noise, pack.t))
        (found,) = torch.autograd.grad((losses * pack.weights).sum(), leaves)
        return found, losses.detach()

    def _accumulate(
        self, pack: _Pack, found: Tensor, losses: Tensor, gradients: Tensor, sums: dict[int, BoundedSum]
    ) -> None:
        """Add the pack's gradients to the rows, those of private pictures to their clipped sums."""
        self.losses.index_add_(0, pack.rows[pack.slots], losses)
        for row in sums.keys() & set(pack.rows.tolist()):
            sums[row] += self._clipped(row, found[pack.rows == row])
        plain = ~pack.private
        gradients.index_add_(0, pack.rows[plain], found[plain])

    def _clipped(self, row: int, pictures: Tensor) -> BoundedSum:
        """The sum [D] of one client's clipped per-picture gradients [m, D]; m may be 0."""
        privacy = self.jobs[row].privacy
        assert privacy
        return clip_rows(pictures, privacy.clip).sum()

    def _privatised(self, row: int, bounded: BoundedSum) -> Tensor:
        """Noise the sum, then divide by the plan's public constant: the gradient [D] of one client.

        One picture more or less moves the sum by at most C (add/remove-one); the noise has σ·C, on the
        numbers that this client's adapter really has, also when the Poisson batch was empty.
        """
        job, mask = self.jobs[row], self.masks[row]
        assert job.privacy
        assert job.noise
        noised_sum = bounded.values.clone()
        sigma = gaussian_sigma(bounded, job.privacy.noise_multiplier)
        noised_sum[mask] += sigma * job.noise.gaussian(int(mask.sum())).to(noised_sum)
        return noised_sum / job.batch_size

    def _packs(self, batches: dict[int, Batch]) -> Iterator[_Pack]:
        """Passes of at most `micro_batch` entries, across job boundaries; a private picture is never split."""
        device = self.base.device
        slots = [slot for row, batch in batches.items() for slot in self._slots(row, batch)]
        size = pass_size(device, sum(len(batch.t) for batch in batches.values()), self.micro_batch)
        while slots:
            taken: list[_Slot] = []
            room = size
            while slots and room > 0:
                row, private, weight, entries = slots[0]
                if private and len(entries) > room and taken:
                    break
                now, later = (entries, []) if private else (entries[:room], entries[room:])
                taken.append((row, private, weight, now))
                room -= len(now)
                slots[:1] = [(row, private, weight, later)] if later else []
            flat = [(row, entry) for row, _, _, entries in taken for entry in entries]
            yield _Pack(
                rows=torch.tensor([row for row, *_ in taken], device=device),
                private=torch.tensor([private for _, private, *_ in taken], device=device),
                slots=torch.tensor([s for s, (*_, entries) in enumerate(taken) for _ in entries], device=device),
                weights=torch.tensor([weight for *_, weight, entries in taken for _ in entries], device=device),
                pictures=torch.tensor([picture for _, (picture, _) in flat], device=device),
                t=torch.stack([batches[row].t[i] for row, (_, i) in flat]).to(device),
                noise=torch.stack([batches[row].noise[i] for row, (_, i) in flat]).to(device),
            )

    def _slots(self, row: int, batch: Batch) -> list[_Slot]:
        """The slots of one job's step."""
        job, offset = self.jobs[row], self.offsets[row]
        pictures = (batch.pictures + offset).tolist()
        self.entries[row] += len(batch.t)
        if not job.privacy:
            return [(row, False, 1 / len(pictures), [(picture, i) for i, picture in enumerate(pictures)])]
        draws = job.privacy.draws
        return [
            (row, True, 1 / draws, [(picture, i * draws + k) for k in range(draws)])
            for i, picture in enumerate(pictures)
        ]

    def _look(self, step: int, active: list[int]) -> None:
        """Measure, on their own validation examples, the jobs whose turn it is; keep the best adapter of each."""
        looking, pools = [], []
        for row in active:
            stopping = self.jobs[row].early_stopping
            if stopping and (step % stopping.every == 0 or step == self.jobs[row].steps):
                looking.append(row)
                pools.append(stopping.validation)
        adapters = [select(self.frozen, looking), self.layout.stacks(self.rows[looking])] if looking else []
        found = held_out_losses(self.base, pools, adapters, timesteps=self.timesteps, micro_batch=self.micro_batch)
        for row, loss in zip(looking, found, strict=True):
            self.stale[row] += 1
            if row not in self.best or loss < self.best[row][0]:
                self.best[row] = (loss, self.rows[row].clone())
                self.stale[row] = 0

    def _finished(self, row: int, step: int) -> bool:
        stopping = self.jobs[row].early_stopping
        return step >= self.jobs[row].steps or bool(stopping and self.stale[row] >= stopping.patience)

    def _result(self, row: int, step: int) -> Trained | Exception:
        job = self.jobs[row]
        final = self.best[row][1] if row in self.best else self.rows[row]
        if not final.isfinite().all() or not (job.privacy or self.losses[row].isfinite()):
            rate = job.learning_rate
            return AntherError(
                f"{job.client}: training became not finite by step {step}; learning_rate={rate} too high?"
            )
        loss = self.losses[row].item() / self.entries[row] if self.entries[row] else math.nan
        return Trained(self.layout.unpack(final, job.start), loss, step)


def _common(stacks: Stacks) -> bool:
    """Whether one slot serves everyone (or there is none)."""
    return all(stack.a.shape[0] == 1 for stack in stacks.values())
