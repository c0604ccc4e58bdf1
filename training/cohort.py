"""`train(base, jobs)`: many clients' local training in shared passes through one frozen base.

Every job that is resident has a row in flat buffers, and every entry of a pass (one picture at one timestep) has a
slot with a copy of its client's adapter: the gradient of a slot *is* the entry's gradient. Entries wait in one queue,
whoever they belong to; a client's step ends when its last entry is through, and its next one queues up behind the
others. So passes are full until the end, jobs leave and others enter, and nobody waits for the slowest.

Private jobs have passes of their own, all of one size (`training.pass_size`): an entry's gradient is a function of its
picture, streams and adapter, to the last bit, whichever others there are.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from common.errors import AntherError
from models.base.denoiser import Denoiser
from training.batches import BatchSampler, StepBatch
from training.buffers import BufferSpec, CohortBuffers, check
from training.capacity import InsufficientMemoryError, capacity, entry_bytes, max_pass_size
from training.cuda_graphs import GraphedPasses
from training.inference import held_out_losses
from training.jobs import Cancelled, TrainedAdapter, TrainJob
from training.memory import inference_share, training_share
from training.microbatching import EntryQueue, Microbatch
from training.parallel_passes import Stopwatch, run_passes, without_denormals, workers
from training.pass_size import fixed_pass_size
from training.public_duration import TurnCount, scheduled_turns
from training.step import PassResult, clip_whole, gradients, on_device, reduce

log = logging.getLogger(__name__)

Outcome = TrainedAdapter | Exception

_BUFFERS = "buffers of the last cohort"
FEW_TURNS = 5


def train(
    base: Denoiser, jobs: Sequence[TrainJob], *, memory: int, timesteps: int, compiled: bool = False
) -> list[Outcome]:
    """Train every job; results in the jobs' order. A job that fails does so alone.

    A private job whose numbers overflow is no failure: it ends where it started, in its public time.

    Jobs that differ in the shape of their examples, in privacy and what they clip, in their optimiser, or in what of
    their adapter is trained or stays don't share passes; all others do.

    Args:
        memory: bytes of the device's memory for rows and passes.
        timesteps: fixed timesteps of a look at validation examples (`held_out_losses`).
        compiled: have full passes compiled, which takes minutes for a large network (CUDA only).

    Raises:
        TooLittleMemoryError: `memory` holds none of the jobs; one that it doesn't hold fails alone.
    """
    groups: dict[object, list[int]] = {}
    for place, job in enumerate(jobs):
        latents, context = job.examples
        clips = (job.clips_per_site, job.unit) if job.privacy else None
        kind = (latents.shape[1:], context.shape[1:], clips, job.fixed_key, job.optimizer)
        groups.setdefault(kind, []).append(place)
    outcomes: list[Outcome] = [AntherError("not trained")] * len(jobs)
    for places in groups.values():
        try:
            cohort = _Cohort(base, [jobs[place] for place in places], memory, timesteps, compiled)
        except Exception as error:  # no pass can be made of such examples
            found: list[Outcome] = [error] * len(places)
        else:
            found = cohort.run()
        for place, outcome in zip(places, found, strict=True):
            outcomes[place] = outcome
    if outcomes and all(isinstance(outcome, InsufficientMemoryError) for outcome in outcomes):
        raise outcomes[0]  # type: ignore[misc]
    return outcomes


@dataclass
class _Resident:
    """A job that is under way."""

    place: int  # among the jobs
    job: TrainJob
    batches: BatchSampler = field(init=False)
    step: int = 0  # completed steps
    pending: int = 0  # entries of this step that are not through yet
    entries: int = 0  # seen in all
    best: tuple[float, Tensor] | None = None  # validation loss and adapter
    stale: int = 0  # looks since the best
    turns: TurnCount = field(init=False)  # of a private job's pictures
    planned: int = 0  # turns that a private job is given
    left: int = 0  # of them

    def schedule(self, turns: TurnCount) -> None:
        """Give a private job its public number of turns. One has more pictures than assumed in simulations alone."""
        assert self.job.privacy
        assumed_pictures = max(self.job.assumed_pictures, self.job.pictures)
        self.turns = turns
        self.planned = self.left = scheduled_turns(
            assumed_pictures, self.job.privacy.sampling_rate, self.job.steps, turns
        )

    def cut(self, batch: StepBatch) -> StepBatch:
        """What the turns that are left are enough for of a Poisson batch; the others count as not drawn."""
        units = min(batch.size // batch.per_unit, self.turns.holding(self.left))
        self.left -= self.turns(units)
        return batch.part(slice(units * batch.per_unit))


@dataclass
class _Cohort:
    """The jobs of one group, resident or still to come."""

    base: Denoiser
    jobs: list[TrainJob]
    memory: int
    timesteps: int
    compiled: bool
    residents: dict[int, _Resident] = field(default_factory=dict)  # by row

    def __post_init__(self) -> None:
        found = capacity(self.base, self.jobs, self.memory)
        self.private = self.jobs[0].privacy is not None
        self.at_once = min(workers(self.base.device), found.entries)
        self.size = max_pass_size(self.base.device, found.entries)
        self.spare = found.room  # bytes for looks, between passes
        if self.base.device.type == "cuda":  # captured passes keep their memory; their size holds a step of everybody
            most, self.spare = max(1, training_share(self.size)), inference_share(found.room)
            self.size = -(-found.expected // -(-found.expected // most)) if not self.private else most
        if self.private:
            entry = entry_bytes(self.base, BufferSpec.of(self.jobs))
            self.size = fixed_pass_size(self.base.device, self.jobs[: found.jobs], self.size, entry)
        self.key = (BufferSpec.of(self.jobs), found.jobs, self.size, self.compiled, self.private)
        self.rows, self.captured = _buffers(self.base, *self.key)
        self.queue = EntryQueue()
        self.pieces: dict[int, Tensor] = {}  # by row: what is there of a unit that is larger than a pass
        self.vacant = list(reversed(range(found.jobs)))
        self.outcomes: list[Outcome] = [AntherError("not trained")] * len(self.jobs)
        self.coming = deque(range(len(self.jobs)))
        # Time is for a device, which trains one job at a time.
        self.watch = Stopwatch(self.base.device) if self.private and len(self.jobs) == 1 else None

    def run(self) -> list[Outcome]:
        self._settle(self._admit())
        while self.residents:
            packs = self._packs()
            with nullcontext() if self.watch is None else self.watch:
                for pack, found in zip(packs, run_passes(self.base.device, self._pass, packs), strict=True):
                    self._accumulate(pack, found)
            self._still_wanted(list(self.residents))
            through = [row for row, resident in self.residents.items() if not resident.pending]
            self._settle(self._step(through) + self._admit())
        self.base.cache[_BUFFERS] = self.key, (self.rows, self.captured)
        return self.outcomes

    def _packs(self) -> list[Microbatch]:
        """What runs now: a pack for each core, of its share of what waits; if private, all of one size."""
        share = -(-len(self.queue) // self.at_once)
        packs: list[Microbatch] = []
        while len(self.queue) and len(packs) < self.at_once:
            if self.private:
                packs.append(self.queue.take(self.size).filled(self.size))
            else:
                packs.append(self.queue.take(min(max(share, self.queue.unit), self.size)))
        return packs

    def _pass(self, pack: Microbatch) -> PassResult:
        entries = on_device(pack, self.base.device)
        with without_denormals(self.base.device) if self.private else nullcontext():
            found = self.captured(entries) if self.captured else gradients(self.base, self.rows, entries)
            return reduce(self.rows, pack, *found)

    def _admit(self) -> list[int]:
        """Fill vacant rows with the next jobs; those rows."""
        entering: dict[int, TrainJob] = {}
        while self.vacant and self.coming:
            place, row = self.coming.popleft(), self.vacant.pop()
            job = self.jobs[place]
            self.residents[row] = _Resident(place, job)
            try:
                check(job, self.base.sites)
                self.residents[row].batches = BatchSampler(job)
                if self.private:
                    self.residents[row].schedule(TurnCount.of(job, self.size, self.at_once))
                entering[row] = job
            except Exception as error:
                self._leave(row, error)
        if entering:
            self.rows.load(entering)
        return list(entering)

    def _settle(self, rows: list[int]) -> None:
        """Bring clients between two steps into the next, or out and others in, until nobody is between two steps."""
        while rows:
            self._look(rows)
            self._release([row for row in rows if self._finished(self.residents[row])])
            waiting = self._begin([row for row in rows if row in self.residents])
            empty = [row for row in waiting if not self.residents[row].pending]  # no pass, after which they'd be asked
            rows = self._step(self._still_wanted(empty)) + self._admit()

    def _begin(self, rows: list[int]) -> list[int]:
        """Draw the next batches, which may be empty under DP, and queue them; the rows that could."""
        begun = []
        for row in rows:
            resident = self.residents[row]
            try:
                batch = resident.batches.next()
                batch = resident.cut(batch) if self.private else batch
            except Exception as error:  # whatever a job brings along: its noise source, say
                self._leave(row, error)
                continue
            resident.pending = batch.size
            resident.entries += batch.size
            self.queue.push(row, batch._replace(examples=batch.examples + self.rows.place(row)))
            begun.append(row)
        return begun

    def _accumulate(self, pack: Microbatch, found: PassResult) -> None:
        """Add what a pass found to the sums of its clients."""
        clipped = found.clipped
        if found.piece is not None:
            row = int(pack.clients[0])
            self.pieces[row] = self.pieces.get(row, 0.0) + found.piece  # a copy: the next pass may overwrite it
            if pack.last:
                clipped = clip_whole(self.rows, found.clients, self.pieces.pop(row))
        if clipped is not None:
            self.rows.sums.add(found.clients, clipped)
        self.rows.losses.index_add_(0, found.clients, found.losses)
        for row, entries in zip(pack.clients.tolist(), pack.entries.tolist(), strict=True):
            self.residents[row].pending -= entries

    def _step(self, rows: list[int]) -> list[int]:
        """One step of the optimiser for clients whose batch is through; the rows that could.

        The sum of a private client is noised, whether or not its batch was empty, and divided by the plan's public
        constant, never by a count of pictures.
        """
        noises, through = {}, []
        for row in rows:
            try:
                noise = self.rows.noise(row, self.residents[row].job)
            except Exception as error:
                self._leave(row, error)
                continue
            through.append(row)
            self.residents[row].step += 1
            if noise is not None:
                noises[row] = noise
        if through:
            index = torch.tensor(through, device=self.base.device)
            gradients = self.rows.sums.pop_noised(through, noises).div_(self.rows.divisors[index])
            self.rows.optimizer.step(through, self.rows.corrected(index, gradients))
        return through

    def _still_wanted(self, rows: list[int]) -> list[int]:
        """Let those go that were cancelled; the others."""
        for resident, row in [(self.residents[row], row) for row in rows]:
            try:
                if resident.job.cancelled():
                    self._leave(row, Cancelled(f"{resident.job.client}: cancelled after step {resident.step}"))
            except Exception as error:
                self._leave(row, error)
        return [row for row in rows if row in self.residents]

    def _look(self, rows: list[int]) -> None:
        """Measure, on their own validation examples, the clients whose turn it is; keep the best adapter of each."""
        looking, pools = [], []
        for row in rows:
            job, step = self.residents[row].job, self.residents[row].step
            if (stopping := job.early_stopping) and (step % stopping.every == 0 or step == job.steps):
                looking.append(row)
                pools.append(stopping.validation)
        if not looking:
            return
        index = torch.tensor(looking, device=self.base.device)
        adapters = [self.rows.frozen(index), self.rows.layout.stacks(self.rows.adapters[index].to(self.base.dtype))]
        found = held_out_losses(self.base, pools, adapters, timesteps=self.timesteps, memory=self.spare)
        for row, loss in zip(looking, found, strict=True):
            resident = self.residents[row]
            resident.stale += 1
            if resident.best is None or loss < resident.best[0]:
                resident.best, resident.stale = (loss, self.rows.adapters[row].clone()), 0

    def _finished(self, resident: _Resident) -> bool:
        stopping = resident.job.early_stopping
        return resident.step >= resident.job.steps or bool(stopping and resident.stale >= stopping.patience)

    def _release(self, rows: list[int]) -> None:
        """Let clients go with what they have come for, fetched from the device together."""
        if not rows:
            return
        index = torch.tensor(rows, device=self.base.device)
        adapters = self.rows.adapters[index]
        for place, row in enumerate(rows):
            if best := self.residents[row].best:
                adapters[place] = best[1]
        # A private client isn't told of gradients that were not finite: they counted as zero.
        sound = self.rows.losses[index].isfinite() & (self.rows.sums.dropped[index] == 0)
        finite = adapters.isfinite().all(1)
        fetched = adapters.to("cpu", non_blocking=True)  # there once the next line has waited: it comes behind it
        told = torch.stack([finite.double(), sound.double(), self.rows.losses[index]]).T.tolist()
        for row, adapter, (whole, fine, loss) in zip(rows, fetched, told, strict=True):
            resident = self.residents[row]
            job, entries, step = resident.job, resident.entries, resident.step
            hint = f"learning_rate={job.learning_rate} too high?"
            failed = f"{job.client}: training became not finite by step {step}; {hint}"
            if job.privacy and not whole:  # an error would come early, and each further try would be one more release
                log.warning("%s It ends where it started", failed)
            if job.privacy or (whole and fine):
                mean = loss / entries if entries else math.nan
                found = self.rows.layout.unpack(adapter, job.start) if whole else job.start
                self._leave(row, TrainedAdapter(found, mean, step, self._idle(row, resident)))
            else:
                self._leave(row, AntherError(failed))

    def _idle(self, row: int, resident: _Resident) -> float:
        """Seconds that are left of a private job's turns, each as long as the median of those that it took.

        If these were few, some more are run that find nothing: the first ones of all take longer than others.
        """
        if self.watch is None:
            return 0.0
        nothing = Microbatch.nothing(row, self.rows.place(row), self.size, resident.job.unit)
        for _ in range(len(self.watch), min(FEW_TURNS, resident.planned)):
            with self.watch:
                list(run_passes(self.base.device, self._pass, [nothing] * self.at_once))
        seconds = self.watch.seconds()
        return max(0.0, resident.planned * median(seconds) - sum(seconds)) if seconds else 0.0

    def _leave(self, row: int, outcome: Outcome) -> None:
        resident = self.residents.pop(row)
        self.outcomes[resident.place] = outcome
        if resident.pending:
            self.queue.drop(row)
        self.pieces.pop(row, None)
        self.vacant.append(row)


def free_buffers(base: Denoiser) -> None:
    """Of the buffers that the last call has left for the next."""
    base.cache.pop(_BUFFERS, None)


def _buffers(
    base: Denoiser, shape: BufferSpec, capacity: int, size: int, compiled: bool, private: bool
) -> tuple[CohortBuffers, GraphedPasses | None]:
    """Buffers, and on a GPU a captured pass over them: the last call's, if they fit. Rounds are much alike."""
    key = (shape, capacity, size, compiled, private)
    known, buffers = base.cache.pop(_BUFFERS, (None, None))
    if known != key:
        del buffers  # before others are made
        rows = CohortBuffers(base, shape, capacity)
        captured = None
        if base.device.type == "cuda":
            captured = GraphedPasses(base, rows, size, compiled=compiled, one_size=private)
        buffers = rows, captured
    return buffers
