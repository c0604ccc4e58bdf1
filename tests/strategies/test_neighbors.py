"""One device more or less moves the server's sum by its clip at most, and the count by one half: with real devices.

As in `tests.privacy.test_neighbors` all noise is left out, everybody has a personal adapter from the second round on,
and whatever is released is replaced by something that is the same in both runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord
from torch import Tensor

from client.data import Pictures
from models.base.base import Base
from models.lora.adapter import to_tensors
from privacy.central import AdaptiveClip, ClippedUpdates, GaussianMechanism, NoisedMean
from privacy.noise import NoiseSource
from privacy.snr import signal_to_noise
from privacy.storage import FileStorage
from protocol import records, tensor_codec
from server.ledger import ServerLedger
from simulations.grid.cohort import CohortGrid
from strategies.aggregation import Aggregation
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsb import FedSB
from strategies.central_dp import CentralDP, DeviceBudget
from strategies.planning.plan import PlanLimits
from strategies.private_evaluation import CentralDPEvaluation, EvaluationPolicy
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson
from strategies.strategy import Federated
from tests.helpers.devices import PRIVACY
from tests.helpers.neighbors import (
    PLENTY,
    NoNoise,
    adapter,
    device_with_base,
    intercept_gradients,
    lora_xs_bases,
    personalize_request,
    plan,
    random_picture,
)
from training.engine import perform
from training.jobs import Job, Result, TrainJob

NAMES = "abc"
SAMPLES = {1: [0, 1], 2: [1, 2]}  # of rounds: who is in a secret sample, if it is there; `a` is not in the second
PLACES = (0, 1, 2)  # of a device's pictures
EXPECTED, GAIN, OF_PICTURES = 3.0, 1e-4, 1e-3  # devices, and clips of a device's gain and of a picture's gradient
ADAPTIVE = AdaptiveClip(quantile=0.5, rate=0.5, noise_stddev=2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of making a run private per device."""

    clip: float = 1e-3  # every update of the tiny base is far longer
    adaptive: AdaptiveClip | None = None
    rule: Aggregation = dataclasses.field(default_factory=FedIT)
    both: bool = False
    rate: float = 1.0  # of a secret sample; 1: everyone
    together: bool = False  # in shared passes, as no real devices are


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the server was about to tell of each round, without its noise."""

    sums: list[Tensor]
    counts: list[float]
    """Σ (b_k − ½), where the clip adapts."""
    gains: list[float]
    """Sums of the devices' clipped mean gains."""
    adapters: list[bytes]
    """That went out."""
    steps: list[Tensor]
    """What each private step of the first device would tell its optimiser, in units of the sum."""


MODES = {
    "fixed clip": Mode(),
    "adaptive clip": Mode(adaptive=ADAPTIVE),
    "nothing clipped": Mode(clip=100.0, adaptive=ADAPTIVE),
    "cores": Mode(rule=FedSB()),
    "secret sample": Mode(rate=0.5),
    "both levels": Mode(both=True),
    "both levels, cores, adaptive clip": Mode(both=True, rule=FedSB(), adaptive=ADAPTIVE),
    "in shared passes": Mode(together=True),
}
QUICK = {"adaptive clip"}


def strategy(base: Base, folder: Path, present: Sequence[str], mode: Mode) -> Federated:
    between = lora_xs_bases(base) if isinstance(mode.rule, FedSB) else None
    numbers = [NAMES.index(name) for name in present]
    hidden = CentralDPEvaluation(noise_multiplier=5.0, clip=GAIN, devices=3, noise=lambda _round: NoNoise())
    asked = plan(base, privacy=dataclasses.replace(PRIVACY, clip=OF_PICTURES) if mode.both else None)
    return Federated(
        plan=asked,
        sites=base.sites,
        aggregation=mode.rule,
        selection=Everyone()
        if mode.rate == 1
        else Poisson(rate=mode.rate, coins=lambda number: NoNoise(numbers, [SAMPLES[number]])),
        limits=PlanLimits(),
        measuring=EvaluationPolicy(every=0) if mode.both else EvaluationPolicy(every=1, central_noise=hidden),
        lora_xs_bases=between,
        accept_simulated=True,
        central_dp=CentralDP(
            run=asked.run,
            sites=base.sites,
            mechanism=GaussianMechanism(noise_multiplier=1.5, expected=EXPECTED, adaptive=mode.adaptive),
            sampling_rate=mode.rate,
            clip=mode.clip,
            budget=DeviceBudget(epsilon=1000.0, delta=1e-3, participations=2 if mode.rate == 1 else None),
            noise=lambda _round: NoNoise(),
            ledger=ServerLedger(FileStorage(folder / "server")),
            lora_xs_bases=between,
        ),
    )


def two_rounds(
    base: Base,
    folder: Path,
    present: Sequence[str],
    mode: Mode,
    patch: pytest.MonkeyPatch,
    members: Sequence[int] = PLACES,
) -> Seen:
    """A server and those of the devices that are there.

    Args:
        members: which of its pictures the first of all devices has.
    """
    seen = Seen([], [], [], [], [])
    held = dict.fromkeys(NAMES, PLACES) | {NAMES[0]: members}
    really = GaussianMechanism.release

    def release(self: GaussianMechanism, clipped: ClippedUpdates, noise: NoiseSource) -> NoisedMean:
        released = really(self, clipped, noise)
        clip = clipped.total.sensitivity.norm
        seen.sums.append(released.mean * self.expected)
        if self.adaptive:
            below = self.adaptive.quantile - math.log(released.next_clip / clip) / self.adaptive.rate
            seen.counts.append((below - 0.5) * self.expected)
        other = torch.linspace(-1e-3, 1e-3, len(released.mean), dtype=torch.float64)
        snr = signal_to_noise(other, released.noise_stddev)
        return dataclasses.replace(released, mean=other, next_clip=clip * 1.5 if self.adaptive else clip, snr=snr)

    patch.setattr(GaussianMechanism, "release", release)
    devices = [device_with_base(base, folder, name, pictures(name, held[name]), source(held[name])) for name in present]
    federated = strategy(base, folder, present, mode)

    def performed(asked: list[Job]) -> Sequence[Result | Exception]:
        if not (isinstance(asked[0], TrainJob) and asked[0].privacy) or mode.together:
            return perform(base, asked, memory=PLENTY, timesteps=2)
        with intercept_gradients(OF_PICTURES, asked[0].round) as told:
            found = perform(base, asked, memory=PLENTY, timesteps=2)
        seen.steps.extend(told if asked[0].client == NAMES[0] else [])
        return found

    grid = CohortGrid(devices, performed, batched=mode.together)
    current = records.adapter_to_record(tensor_codec.encode(to_tensors(adapter(base, 1, federated.lora_xs_bases))))
    for number in (1, 2):
        seen.adapters.append(records.adapter_from_record(current))
        asked = federated.configure_train(number, current, ConfigRecord(), grid)
        found, _ = federated.aggregate_train(number, grid.send_and_receive(asked))
        assert found is not None
        assert federated.trained is not None
        assert federated.trained.dropped == {}
        assert federated.central_dp is not None
        federated.central_dp.resume(federated.trained.central)
        current = found
        if federated.is_evaluated(number):
            asked = federated.configure_evaluate(number, current, ConfigRecord(), grid)
            federated.aggregate_evaluate(number, grid.send_and_receive(asked))
            assert federated.validation is not None
            assert federated.validation.gain is not None
            seen.gains.append(federated.validation.gain * 3)
        sent = personalize_request(adapter(base, number, federated.lora_xs_bases), number)
        told = federated.aggregate_personalise(grid.send_and_receive(federated.configure_personalise(sent, grid)))
        assert told.devices == tuple(present)
    seen.adapters.append(records.adapter_from_record(current))
    return seen


def pictures(name: str, members: Sequence[int]) -> Pictures:
    first = 10 * NAMES.index(name)
    return Pictures(tuple(random_picture(first + member) for member in members), (random_picture(first + 9),), ())


def source(members: Sequence[int]) -> Callable[[int, str], NoiseSource]:
    """Of a device's own noise, left out, and batches: the first picture alone, nobody, everybody, all but the first."""
    return lambda _round, _purpose: NoNoise(members, [[0], [], PLACES, PLACES[1:]])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODES]
)
def test_one_device_moves_the_sum_by_the_clip_at_most(
    base: Base, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All modes: python -m pytest -m "slow or not slow" tests/strategies/test_neighbors.py"""
    mode = MODES[name]
    runs = []
    for present in ("abc", "bc"):
        with monkeypatch.context() as patch:
            runs.append(two_rounds(base, tmp_path / present, present, mode, patch))
    having, without = runs
    assert having.adapters == without.adapters  # or the second round would be another experiment
    clips = [mode.clip, mode.clip * (1.5 if mode.adaptive else 1.0)]
    rounding = 1e-4 if mode.together else 1e-9
    took_part = [True, mode.rate == 1]
    for one, other, clip, there in zip(having.sums, without.sums, clips, took_part, strict=True):
        moved = float((one - other).norm())
        assert moved <= clip * (1 + rounding)
        assert moved > 0.9 * min(clip, 0.01) if there else moved == 0
        assert other.norm() > 0
    if mode.adaptive:
        found = [a - b for a, b in zip(having.counts, without.counts, strict=True)]
        assert [abs(moved) for moved in found] == pytest.approx([0.5, 0.5], abs=1e-9)
    if not mode.both:
        found = [abs(a - b) for a, b in zip(having.gains, without.gains, strict=True)]
        assert all(0 < moved <= GAIN * (1 + 1e-9) for moved in found)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [FedIT(), FedSB()], ids=["factors", "cores"])
def test_under_both_levels_a_picture_is_hidden_on_its_device(
    base: Base, tmp_path: Path, rule: Aggregation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server then sees is the same to the last bit, once every noised iterate is.

    Ten seconds: python -m pytest -m slow tests/strategies/test_neighbors.py
    """
    runs = []
    for members in (PLACES, PLACES[1:]):
        with monkeypatch.context() as patch:
            mode = Mode(both=True, rule=rule, adaptive=ADAPTIVE)
            runs.append(two_rounds(base, tmp_path / str(members), "ab", mode, patch, members))
    having, without = runs
    moved = torch.stack([(a - b).norm() for a, b in zip(having.steps, without.steps, strict=True)]) / OF_PICTURES
    assert moved.tolist() == pytest.approx(2 * [1.0, 0.0, 1.0, 0.0], abs=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(having.sums, without.sums, strict=True))
    assert having.counts == without.counts
