"""Implementations of a client-step that `bench.throughput.cohort` times, one repeat at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol, get_args

import torch
from torch import Tensor, nn

from bench.lib.workloads import BATCH, EXAMPLES, POISSON_SIZES, SITES, Workload, build, examples, jobs, schedule
from bench.throughput.opacus_baseline import HooksPeer
from bench.throughput.peers import FactorPrecision, OpacusPeer, Peer, PeftPeer
from models.diffusion.denoiser import PRECISIONS, Denoiser
from models.diffusion.objective import Schedule
from training.cohort import train
from training.jobs import Examples

PEERS = ("peft", "opacus", "hooks", "one")
CLIENTS_OF_ONE = 4  # clients per repeat of `one`


@dataclass(frozen=True)
class TimingSettings:
    """Settings shared by all variants of one run."""

    device: torch.device
    precision: str  # 'fp32' | 'bf16', of weights and activations
    repeats: int
    steps: int  # steps of each job of the cohort
    clients: int | None  # clients of the cohort; None: the workload's number
    memory: int  # bytes that the cohort may use
    compiled: bool

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and activations."""
        return PRECISIONS[self.precision]


class StepVariant(Protocol):
    """Implementation of training that is timed one repeat at a time."""

    client_steps: int  # per repeat

    def prepare(self) -> None:
        """Prepare the next repeat; not timed."""
        ...

    def run(self) -> int:
        """Run one repeat, and return its number of examples."""
        ...


class PeerVariant:
    """Peer that trains one client."""

    client_steps = len(POISSON_SIZES)

    def __init__(self, peer: Peer, *, private: bool) -> None:
        self.peer = peer
        self.sizes = POISSON_SIZES if private else (BATCH,) * len(POISSON_SIZES)
        self.pictures: list[Tensor] = []

    def prepare(self) -> None:
        self.pictures = [torch.randperm(EXAMPLES)[:size] for size in self.sizes]

    def run(self) -> int:
        for pictures in self.pictures:
            self.peer.step(pictures)
        return sum(self.sizes)


class CohortVariant:
    """Cohort trainer, with new jobs for each repeat.

    Args:
        denoiser: the base with adapter sites.
        workload: the base's workload.
        setting: settings of the run.
        clients: number of clients.
        private: whether jobs are private.
        together: whether clients share passes, or are trained one after the other.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        workload: Workload,
        setting: TimingSettings,
        *,
        clients: int,
        private: bool,
        together: bool,
    ) -> None:
        self.denoiser, self.private, self.steps = denoiser, private, setting.steps
        self.data = [examples(workload, client, torch.device("cpu")) for client in range(clients)]
        self.client_steps, self.round, self.together = clients * setting.steps, 0, together
        self.train = partial(train, denoiser, memory=setting.memory, timesteps=4, compiled=setting.compiled)

    def prepare(self) -> None:
        self.round += 1
        self.jobs, self.noise = jobs(
            self.data, self.denoiser.sites, steps=self.steps, round=self.round, private=self.private
        )

    def run(self) -> int:
        groups = [self.jobs] if self.together else [[job] for job in self.jobs]
        for group in groups:
            for result in self.train(group):
                if isinstance(result, Exception):
                    raise result
        return sum(noise.drawn for noise in self.noise) if self.private else self.client_steps * BATCH


def step_variants(
    workload: Workload, setting: TimingSettings, peers: Sequence[str]
) -> Iterator[Mapping[str, Callable[[], StepVariant]]]:
    """Yield groups of variants by name. Repeats within a group alternate; only one group is in memory at a time.

    Args:
        workload: the base and its number of clients.
        setting: settings of the run.
        peers: names of `PEERS` to include.
    """
    device = setting.device
    ways: tuple[FactorPrecision, ...] = get_args(FactorPrecision) if setting.precision == "bf16" else ("fp32",)

    def network() -> nn.Module:
        return build(workload, device, setting.dtype)

    def data() -> tuple[Examples, Schedule]:
        return examples(workload, 0, device), schedule(device)

    def peft(way: FactorPrecision) -> StepVariant:
        return PeerVariant(PeftPeer(network(), *data(), factors=way), private=False)

    def opacus(way: FactorPrecision) -> StepVariant:
        return PeerVariant(OpacusPeer(network(), *data(), factors=way), private=True)

    def hooks() -> StepVariant:
        return PeerVariant(HooksPeer(network(), *data(), graphs=device.type == "cuda"), private=True)

    for way in ways:
        if "peft" in peers:
            yield {f"peft {way}": partial(peft, way)}
        if "opacus" in peers:
            yield {f"opacus {way}": partial(opacus, way)}
    if "hooks" in peers:
        yield {"hooks": hooks}

    @cache
    def denoiser() -> Denoiser:
        unet = build(workload, device)
        return Denoiser(unet, schedule(device), sites=SITES, device=str(device), compute=setting.precision)

    def cohort(clients: int, private: bool, together: bool = True) -> StepVariant:
        return CohortVariant(denoiser(), workload, setting, clients=clients, private=private, together=together)

    clients = setting.clients or workload.clients
    group = {"cohort": partial(cohort, clients, False), "cohort DP": partial(cohort, clients, True)}
    if "one" in peers:
        group["one"] = partial(cohort, CLIENTS_OF_ONE, True, together=False)
    yield group
