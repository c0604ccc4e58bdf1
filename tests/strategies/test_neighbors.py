"""Adding or removing one real device moves the server's sum by at most its clip, and the count by one half.

As in `tests.privacy.test_neighbors`, there is no noise, every device has a personal adapter from the second round on,
and releases are replaced by values that are equal in both runs.
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
from privacy.bounded_sum import RESOLUTION
from privacy.central import AdaptiveClip, ClippedUpdates, GaussianMechanism, NoisedMean
from privacy.noise import NoiseSource
from privacy.snr import signal_to_noise
from privacy.storage import FileStorage
from protocol import records, tensor_codec
from server.ledger import ServerLedger
from server.rounds.loop import personalize
from simulations.grid.cohort import CohortGrid
from strategies.aggregation import Aggregation
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsb import FedSB
from strategies.central_dp import CentralDP, DeviceBudget
from strategies.flower_strategy import FlowerStrategy
from strategies.planning.plan import PlanLimits
from strategies.round.private_evaluation import CentralDPEvaluation, EvaluationPolicy
from strategies.selection.everyone import Everyone
from strategies.selection.poisson import Poisson
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
from tests.helpers.samples import sampled
from tests.helpers.strategies import make_strategy
from training.engine import perform
from training.jobs import Job, Result, TrainJob

NAMES = "abc"
SAMPLES = {1: [0, 1], 2: [1, 2]}  # by round: indices of the sampled devices; `a` is not in the second
PLACES = (0, 1, 2)  # indices of a device's pictures
EXPECTED, GAIN, OF_PICTURES = 3.0, 1e-4, 1e-3  # devices, clip of a device's gain, clip of a picture's gradient
ADAPTIVE = AdaptiveClip(quantile=0.5, rate=0.5, noise_stddev=2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyMode:
    """Variant of a run with device-level privacy."""

    clip: float = 1e-3  # every update of the tiny base is far larger
    adaptive: AdaptiveClip | None = None
    rule: Aggregation = dataclasses.field(default_factory=FedIT)
    both: bool = False
    rate: float = 1.0  # of a secret sample; 1: all devices
    shared_passes: bool = False  # in shared passes, unlike real devices


@dataclasses.dataclass(frozen=True)
class ServerView:
    """Values of each round that the server would release, without noise."""

    sums: list[Tensor]
    counts: list[float]
    """Σ (b_k − ½), with an adaptive clip."""
    gains: list[float]
    """Sums of the devices' clipped mean gains."""
    adapters: list[bytes]
    """Adapters that were sent."""
    steps: list[Tensor]
    """Input of the optimizer in each private step of the first device, in units of the sum."""


MODES = {
    "fixed clip": PrivacyMode(),
    "adaptive clip": PrivacyMode(adaptive=ADAPTIVE),
    "nothing clipped": PrivacyMode(clip=100.0, adaptive=ADAPTIVE),
    "cores": PrivacyMode(rule=FedSB()),
    "secret sample": PrivacyMode(rate=0.5),
    "both levels": PrivacyMode(both=True),
    "both levels, cores, adaptive clip": PrivacyMode(both=True, rule=FedSB(), adaptive=ADAPTIVE),
    "in shared passes": PrivacyMode(shared_passes=True),
}
QUICK = {"adaptive clip"}


def strategy(base: Base, folder: Path, present: Sequence[str], mode: PrivacyMode) -> FlowerStrategy:
    bases = lora_xs_bases(base) if isinstance(mode.rule, FedSB) else None
    numbers = [NAMES.index(name) for name in present]
    noise = CentralDPEvaluation(noise_multiplier=5.0, clip=GAIN, devices=3, noise=lambda _round: NoNoise())
    full = plan(base, privacy=dataclasses.replace(PRIVACY, clip=OF_PICTURES) if mode.both else None)
    return make_strategy(
        plan=full,
        sites=base.sites,
        aggregation=mode.rule,
        selection=Everyone()
        if mode.rate == 1
        else Poisson(rate=mode.rate, rng=lambda number: NoNoise(numbers, [SAMPLES[number]])),
        limits=PlanLimits(),
        evaluation_policy=EvaluationPolicy(interval=0)
        if mode.both
        else EvaluationPolicy(interval=1, central_noise=noise),
        lora_xs_bases=bases,
        accept_simulated=True,
        central_dp=CentralDP(
            run=full.run,
            sites=base.sites,
            mechanism=GaussianMechanism(noise_multiplier=1.5, expected=EXPECTED, adaptive=mode.adaptive),
            sampling_rate=mode.rate,
            clip=mode.clip,
            budget=DeviceBudget(epsilon=1000.0, delta=1e-3, participations=2 if mode.rate == 1 else None),
            noise=lambda _round: NoNoise(),
            ledger=ServerLedger(FileStorage(folder / "server")),
            lora_xs_bases=bases,
        ),
    )


def two_rounds(
    base: Base,
    folder: Path,
    present: Sequence[str],
    mode: PrivacyMode,
    patch: pytest.MonkeyPatch,
    members: Sequence[int] = PLACES,
) -> ServerView:
    """Run two rounds with the devices that are present.

    Args:
        base: tiny base.
        folder: folder for stores.
        present: names of the present devices.
        mode: privacy variant.
        patch: patches the release.
        members: indices of the pictures that the first device has.
    """
    view = ServerView([], [], [], [], [])
    pictures_of = dict.fromkeys(NAMES, PLACES) | {NAMES[0]: members}
    original = GaussianMechanism.release

    def release(self: GaussianMechanism, clipped: ClippedUpdates, noise: NoiseSource) -> NoisedMean:
        released = original(self, clipped, noise)
        clip = clipped.total.sensitivity.norm
        view.sums.append(released.mean * self.expected)
        if self.adaptive:
            below = self.adaptive.quantile - math.log(released.next_clip / clip) / self.adaptive.rate
            view.counts.append((below - 0.5) * self.expected)
        other = torch.linspace(-1e-3, 1e-3, len(released.mean), dtype=torch.float64)
        snr = signal_to_noise(other, released.noise_stddev)
        return dataclasses.replace(released, mean=other, next_clip=clip * 1.5 if self.adaptive else clip, snr=snr)

    patch.setattr(GaussianMechanism, "release", release)
    devices = [
        device_with_base(base, folder, name, pictures(name, pictures_of[name]), source(pictures_of[name]))
        for name in present
    ]
    federated = strategy(base, folder, present, mode)

    def performed(requests: list[Job]) -> Sequence[Result | Exception]:
        if not (isinstance(requests[0], TrainJob) and requests[0].privacy) or mode.shared_passes:
            return perform(base, requests, memory=PLENTY, timesteps=2)
        with intercept_gradients(OF_PICTURES, requests[0].round) as steps:
            result = perform(base, requests, memory=PLENTY, timesteps=2)
        view.steps.extend(steps if requests[0].client == NAMES[0] else [])
        return result

    grid = CohortGrid(devices, performed, batched=mode.shared_passes)
    current = records.adapter_to_record(
        tensor_codec.encode(to_tensors(adapter(base, 1, federated.format.lora_xs_bases)))
    )
    for number in (1, 2):
        view.adapters.append(records.adapter_from_record(current))
        requests = federated.configure_train(number, current, ConfigRecord(), grid)
        result, _ = federated.aggregate_train(number, grid.send_and_receive(requests))
        assert result is not None
        assert federated.trained is not None
        assert federated.trained.dropped == {}
        assert federated.central_dp is not None
        federated.central_dp.resume(federated.trained.central)
        current = result
        if federated.evaluation.policy.is_due(number):
            requests = federated.configure_evaluate(number, current, ConfigRecord(), grid)
            federated.aggregate_evaluate(number, grid.send_and_receive(requests))
            assert federated.validation is not None
            assert federated.validation.gain is not None
            view.gains.append(federated.validation.gain * 3)
        sent = personalize_request(adapter(base, number, federated.format.lora_xs_bases), number)
        personalized = personalize(grid=grid, strategy=federated, request=sent, timeout=1.0)
        assert personalized.devices == tuple(present)
    view.adapters.append(records.adapter_from_record(current))
    return view


def pictures(name: str, members: Sequence[int]) -> Pictures:
    first = 10 * NAMES.index(name)
    return Pictures(tuple(random_picture(first + member) for member in members), (random_picture(first + 9),), ())


def source(members: Sequence[int]) -> Callable[[int, str], NoiseSource]:
    """Make a noise source without noise, whose batches are the first picture, none, all, and all but the first."""
    return lambda _round, _purpose: NoNoise(members, [[0], [], PLACES, PLACES[1:]])


@pytest.mark.integration
@pytest.mark.parametrize("name", sampled(MODES, QUICK))
def test_one_device_moves_the_sum_by_at_most_the_clip(
    base: Base, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = MODES[name]
    runs = []
    for present in ("abc", "bc"):
        with monkeypatch.context() as patch:
            runs.append(two_rounds(base, tmp_path / present, present, mode, patch))
    with_device, without = runs
    assert with_device.adapters == without.adapters  # otherwise the second rounds could not be compared
    clips = [mode.clip, mode.clip * (1.5 if mode.adaptive else 1.0)]
    rounding = 1e-4 if mode.shared_passes else 1e-9
    participation = [True, mode.rate == 1]
    for one, other, clip, took_part in zip(with_device.sums, without.sums, clips, participation, strict=True):
        moved = float((one - other).norm())
        assert moved <= clip * (1 + rounding)
        assert moved > 0.9 * min(clip, 0.01) if took_part else moved == 0
        assert other.norm() > 0
    if mode.adaptive:
        result = [a - b for a, b in zip(with_device.counts, without.counts, strict=True)]
        assert [abs(moved) for moved in result] == pytest.approx([0.5, 0.5], abs=1e-9)
    if not mode.both:
        result = [abs(a - b) for a, b in zip(with_device.gains, without.gains, strict=True)]
        assert all(0 < moved <= GAIN * (1 + 1e-9) for moved in result)


@pytest.mark.stress
@pytest.mark.parametrize("rule", [FedIT(), FedSB()], ids=["factors", "cores"])
def test_both_levels_hide_a_picture_on_its_device(
    base: Base, tmp_path: Path, rule: Aggregation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's view is bitwise equal if every noised iterate is."""
    runs = []
    for members in (PLACES, PLACES[1:]):
        with monkeypatch.context() as patch:
            mode = PrivacyMode(both=True, rule=rule, adaptive=ADAPTIVE)
            runs.append(two_rounds(base, tmp_path / str(members), "ab", mode, patch, members))
    with_device, without = runs
    moved = torch.stack([(a - b).norm() for a, b in zip(with_device.steps, without.steps, strict=True)]) / OF_PICTURES
    truncated = with_device.steps[0].numel() ** 0.5 / RESOLUTION  # each number is truncated to whole steps
    assert moved.max() <= 1 + 1e-6
    assert moved.tolist() == pytest.approx(2 * [1.0, 0.0, 1.0, 0.0], abs=truncated + 2**-18)
    assert all(torch.equal(a, b) for a, b in zip(with_device.sums, without.sums, strict=True))
    assert with_device.counts == without.counts
