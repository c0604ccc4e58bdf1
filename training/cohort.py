"""`train(base, jobs)`: local training of many clients in shared passes through one frozen base.

Every resident job has a row in flat buffers, and every entry of a pass (one picture at one timestep) has a slot with a
copy of its client's adapter: the gradient of a slot *is* the entry's gradient. The entries of all clients wait in one
queue. A client's step ends when its last entry is done, and its next step is queued behind the others. So passes are
full until the end, jobs leave while others enter, and no job waits for the slowest:

    admit → evaluate → finish, or sample a batch → passes, clip and sum → noise and optimizer step → evaluate → …

Private jobs have separate passes of a fixed size (`training.public_schedule`): an entry's gradient is a function of its
picture, streams and adapter, to the last bit, whatever the other entries are.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import AntherError
from models.diffusion.denoiser import Denoiser
from privacy.dp_sgd import normalize
from training.batches import BatchSampler, EntryQueue, Microbatch
from training.buffers import BufferSpec, check_job
from training.capacity import InsufficientMemoryError, plan_passes
from training.inference import held_out_losses
from training.jobs import Cancelled, TrainedAdapter, TrainJob
from training.passes import (
    BuffersKey,
    PassResult,
    clip_unit,
    gradients,
    keep_buffers,
    on_device,
    reduce,
    run_passes,
    take_buffers,
    without_denormals,
)
from training.public_schedule import Stopwatch, TurnBudget, TurnCount

log = logging.getLogger(__name__)

Outcome = TrainedAdapter | Exception


def train(
    base: Denoiser, jobs: Sequence[TrainJob], *, memory: int, timesteps: int, compiled: bool = False
) -> list[Outcome]:
    """Train all jobs. A job that fails doesn't affect the others.

    A private job whose numbers overflow doesn't fail: it returns its initial adapter after its public duration.

    Jobs share passes unless they differ in the shape of their examples, in privacy and clipping, in their optimizer, or
    in their trained or fixed factors.

    Args:
        base: the base.
        jobs: jobs of any clients.
        memory: bytes on the device for rows and passes.
        timesteps: number of fixed timesteps when evaluating validation examples (`held_out_losses`).
        compiled: compile full passes, which takes minutes for a large network (CUDA only).

    Returns:
        Results in the order of the jobs; the exception of a job that failed.

    Raises:
        InsufficientMemoryError: `memory` is too small for each of the jobs. If it is too small for some of them, only
            these fail.
    """
    outcomes: list[Outcome] = [AntherError("not trained")] * len(jobs)
    for job_indices in groups(jobs):
        try:
            cohort = _Cohort(base, [jobs[job_index] for job_index in job_indices], memory, timesteps, compiled)
        except Exception as error:  # these examples don't form a pass
            results: list[Outcome] = [error] * len(job_indices)
        else:
            results = cohort.run()
        for job_index, outcome in zip(job_indices, results, strict=True):
            outcomes[job_index] = outcome
    if outcomes and all(isinstance(outcome, InsufficientMemoryError) for outcome in outcomes):
        raise outcomes[0]  # type: ignore[misc]
    return outcomes


def groups(jobs: Sequence[TrainJob]) -> list[list[int]]:
    """Return the indices of jobs that share passes, in the order of the first job of each group."""
    found: dict[object, list[int]] = {}
    for job_index, job in enumerate(jobs):
        latents, context = job.examples
        clips = (job.clips_per_site, job.unit) if job.privacy else None
        kind = (latents.shape[1:], context.shape[1:], clips, job.fixed_key, job.optimizer)
        found.setdefault(kind, []).append(job_index)
    return list(found.values())


@dataclass
class _Resident:
    """Job in progress."""

    job_index: int  # among the jobs
    job: TrainJob
    batches: BatchSampler
    turns: TurnBudget | None  # of a private job
    step: int = 0  # completed steps
    pending: int = 0  # entries of this step without a result so far
    entries: int = 0  # total number of entries
    best: tuple[float, Tensor] | None = None  # validation loss and adapter
    since_best: int = 0  # evaluations since the best one
    validation_losses: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether no further step follows."""
        stopping = self.job.early_stopping
        return self.step >= self.job.steps or bool(stopping and self.since_best >= stopping.patience)


class _Cohort:
    """Jobs of one group, resident or waiting."""

    def __init__(self, base: Denoiser, jobs: list[TrainJob], memory: int, timesteps: int, compiled: bool) -> None:
        self.base, self.jobs, self.timesteps = base, jobs, timesteps
        self.plan, self.private = plan_passes(base, jobs, memory), jobs[0].privacy is not None
        self.key = BuffersKey(BufferSpec.of(jobs), self.plan.jobs, self.plan.size, compiled, self.private)
        self.buffers, self.graphed = take_buffers(base, self.key)
        self.residents: dict[int, _Resident] = {}  # by row
        self.queue = EntryQueue()
        self.pieces: dict[int, Tensor] = {}  # by row: sum of the finished pieces of a unit
        self.free_rows = list(reversed(range(self.plan.jobs)))
        self.outcomes: list[Outcome] = [AntherError("not trained")] * len(jobs)
        self.waiting = deque(range(len(jobs)))
        # The public duration matters on a real device, which trains one job at a time.
        self.stopwatch = Stopwatch(base.device) if self.private and len(jobs) == 1 else None

    def run(self) -> list[Outcome]:
        """Train all jobs; return their results or errors."""
        between_steps = self._admit()
        while self.residents:
            if between_steps:
                self._evaluate(between_steps)
                self._finish(between_steps)
                complete = self._sample_batches(between_steps)
            else:
                complete = self._run_passes()
            between_steps = self._noise_and_step(complete) + self._admit()
        keep_buffers(self.base, self.key, self.buffers, self.graphed)
        return self.outcomes

    def _admit(self) -> list[int]:
        """Load waiting jobs into free rows; return those rows."""
        entering: dict[int, TrainJob] = {}
        while self.free_rows and self.waiting:
            job_index, row = self.waiting.popleft(), self.free_rows.pop()
            job = self.jobs[job_index]
            try:
                check_job(job, self.base.sites)
                batches, turns = BatchSampler(job), None
                if self.private:
                    turns = TurnBudget(job, TurnCount.of(job, self.plan.size, self.plan.parallel))
            except Exception as error:
                self.outcomes[job_index] = error
                self.free_rows.append(row)
                continue
            self.residents[row] = _Resident(job_index, job, batches, turns)
            entering[row] = job
        if entering:
            self.buffers.load(entering)
        return list(entering)

    def _evaluate(self, rows: list[int]) -> None:
        """Evaluate the clients that are due on their own validation examples, and keep the best adapter of each."""
        evaluated, pools = [], []
        for row in rows:
            job, step = self.residents[row].job, self.residents[row].step
            if (stopping := job.early_stopping) and (step % stopping.every == 0 or step == job.steps):
                evaluated.append(row)
                pools.append(stopping.validation)
        if not evaluated:
            return
        index = torch.tensor(evaluated, device=self.base.device)
        adapters = [
            self.buffers.frozen(index),
            self.buffers.layout.stacks(self.buffers.adapters[index].to(self.base.dtype)),
        ]
        losses = held_out_losses(self.base, pools, adapters, timesteps=self.timesteps, memory=self.plan.inference_bytes)
        for row, loss in zip(evaluated, losses, strict=True):
            resident = self.residents[row]
            resident.since_best += 1
            resident.validation_losses.append(loss)
            if resident.best is None or loss < resident.best[0]:
                resident.best, resident.since_best = (loss, self.buffers.adapters[row].clone()), 0

    def _finish(self, rows: list[int]) -> None:
        """Return the results of those clients that are done, fetched from the device together."""
        rows = [row for row in rows if self.residents[row].done]
        if not rows:
            return
        index = torch.tensor(rows, device=self.base.device)
        adapters = self.buffers.adapters[index]
        for position, row in enumerate(rows):
            if best := self.residents[row].best:
                adapters[position] = best[1]
        # Non-finite gradients are not reported to a private client: they counted as zero.
        sound = self.buffers.losses[index].isfinite() & (self.buffers.sums.dropped[index] == 0)
        finite = adapters.isfinite().all(1)
        fetched = adapters.to("cpu", non_blocking=True)  # complete after the next line
        flags = torch.stack([finite.double(), sound.double(), self.buffers.losses[index]]).T.tolist()
        for row, adapter, (is_finite, is_sound, loss) in zip(rows, fetched, flags, strict=True):
            resident = self.residents[row]
            job, entries, step = resident.job, resident.entries, resident.step
            hint = f"lower learning_rate={job.learning_rate}"
            failed = f"{job.client}: training became not finite by step {step}; {hint}"
            if job.privacy and not is_finite:  # an error would reveal it early, and a retry would be another release
                log.warning("%s. It returns its initial adapter", failed)
            if job.privacy or (is_finite and is_sound):
                mean = loss / entries if entries else math.nan
                trained = self.buffers.layout.unpack(adapter, job.start) if is_finite else job.start
                coefficients = None if job.directions is None else adapter.clone()
                idle, losses = self._idle_seconds(row, resident), tuple(resident.validation_losses)
                self._remove(row, TrainedAdapter(trained, mean, step, idle, coefficients, losses))
            else:
                self._remove(row, AntherError(failed))

    def _sample_batches(self, rows: list[int]) -> list[int]:
        """Sample the next batch of each resident client, and queue its entries.

        Returns:
            Rows whose batch is empty, which happens under DP. Their step is complete without a pass.
        """
        started = []
        for row in [row for row in rows if row in self.residents]:
            resident = self.residents[row]
            try:
                batch = resident.batches.next()
                batch = resident.turns.truncate(batch) if resident.turns else batch
            except Exception as error:  # from the job's own code, e.g. its noise source
                self._remove(row, error)
                continue
            resident.pending = batch.size
            resident.entries += batch.size
            self.queue.push(row, batch._replace(examples=batch.examples + self.buffers.first_example(row)))
            started.append(row)
        return self._drop_cancelled([row for row in started if not self.residents[row].pending])

    def _run_passes(self) -> list[int]:
        """Run the next concurrent passes, and add their results to the sums; return the rows with a complete batch."""
        microbatches = self._next_microbatches()
        with nullcontext() if self.stopwatch is None else self.stopwatch:
            results = run_passes(self.base.device, self._run_pass, microbatches)
            for microbatch, result in zip(microbatches, results, strict=True):
                self._clip_and_sum(microbatch, result)
        return [row for row in self._drop_cancelled(list(self.residents)) if not self.residents[row].pending]

    def _next_microbatches(self) -> list[Microbatch]:
        """Return the next concurrent passes: one per core, with its share of the queue; if private, all of one size."""
        share, size = -(-len(self.queue) // self.plan.parallel), self.plan.size
        microbatches: list[Microbatch] = []
        while len(self.queue) and len(microbatches) < self.plan.parallel:
            if self.private:
                microbatches.append(self.queue.pop(size).padded(size))
            else:
                microbatches.append(self.queue.pop(min(max(share, self.queue.unit), size)))
        return microbatches

    def _run_pass(self, microbatch: Microbatch) -> PassResult:
        entries = on_device(microbatch, self.base.device)
        with without_denormals(self.base.device) if self.private else nullcontext():
            result = self.graphed(entries) if self.graphed else gradients(self.base, self.buffers, entries)
            return reduce(self.buffers, microbatch, *result)

    def _clip_and_sum(self, microbatch: Microbatch, result: PassResult) -> None:
        """Add the clipped gradients of a pass to the sums of its clients. A unit in pieces is clipped when complete."""
        clipped = result.clipped
        if result.piece is not None:
            row = int(microbatch.clients[0])
            self.pieces[row] = self.pieces.get(row, 0.0) + result.piece  # a copy: the next pass may overwrite it
            if microbatch.last:
                clipped = clip_unit(self.buffers, result.clients, self.pieces.pop(row))
        if clipped is not None:
            self.buffers.sums.add(result.clients, clipped)
        self.buffers.losses.index_add_(0, result.clients, result.losses)
        for row, entries in zip(microbatch.clients.tolist(), microbatch.entries.tolist(), strict=True):
            self.residents[row].pending -= entries

    def _noise_and_step(self, rows: list[int]) -> list[int]:
        """Noise the sums of clients whose batch is complete, and take one optimizer step.

        The sum of a private client is noised, whether or not its batch was empty, and divided by the plan's public
        constant, never by a number of pictures.

        Returns:
            Rows that didn't fail.
        """
        noises, finished = {}, []
        for row in rows:
            try:
                noise = self.buffers.sums.draw_noise(row, self.residents[row].job.noise)
            except Exception as error:
                self._remove(row, error)
                continue
            finished.append(row)
            self.residents[row].step += 1
            if noise is not None:
                noises[row] = noise
        if finished:
            index = torch.tensor(finished, device=self.base.device)
            gradients = normalize(self.buffers.sums.pop_noised(finished, noises), self.buffers.divisors[index])
            self.buffers.optimizer.step(finished, self.buffers.add_corrections(index, gradients))
        return finished

    def _idle_seconds(self, row: int, resident: _Resident) -> float:
        """Return the remaining seconds of a private job's public duration."""
        if self.stopwatch is None or resident.turns is None:
            return 0.0
        first, size, unit = self.buffers.first_example(row), self.plan.size, resident.job.unit
        padding = [Microbatch.zero_weight(row, first, size, unit)] * self.plan.parallel
        return resident.turns.remaining_seconds(
            self.stopwatch, lambda: list(run_passes(self.base.device, self._run_pass, padding))
        )

    def _drop_cancelled(self, rows: list[int]) -> list[int]:
        """Remove cancelled jobs; return the other rows."""
        for resident, row in [(self.residents[row], row) for row in rows]:
            try:
                if resident.job.cancelled():
                    self._remove(row, Cancelled(f"{resident.job.client}: cancelled after step {resident.step}"))
            except Exception as error:
                self._remove(row, error)
        return [row for row in rows if row in self.residents]

    def _remove(self, row: int, outcome: Outcome) -> None:
        resident = self.residents.pop(row)
        self.outcomes[resident.job_index] = outcome
        if resident.pending:
            self.queue.drop(row)
        self.pieces.pop(row, None)
        self.free_rows.append(row)
