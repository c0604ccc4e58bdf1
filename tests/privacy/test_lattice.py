"""The set of possible releases doesn't depend on the data: attacks on the lattice of the noise fail.

An adversary who knows all data except one unit checks of each released number whether it is possible without that unit,
i.e. whether float32 noise, scaled and added to the known sum, could give it (Mironov, 2012). For floating point noise
the answer is always yes without the unit, and often no with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from client.data import Pictures
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from models.base.base import Base
from models.lora.adapter import Adapter, Factors, adapter_shapes, to_tensors
from models.lora.trainable import trained_layout
from privacy.bounded_sum import RESOLUTION
from privacy.central import GaussianMechanism, clip_and_sum
from privacy.dp_sgd import BoundedSums
from privacy.noise import CPU, NoiseSource, SecureNoise
from privacy.noised_gain import clipped_sum, noised_mean
from protocol import tensor_codec
from protocol.messages import ExamplePrivacy, Train
from strategies.aggregation.ffa import FFA
from strategies.central_dp import changes
from tests.helpers.central import central_dp
from tests.helpers.fleet import SITES
from tests.helpers.neighbors import PLENTY, NoNoise, adapter, device_with_base, plan, random_picture
from tests.helpers.reference_trainer import assert_same_bits, private
from training.cohort import train
from training.engine import perform
from training.jobs import TrainedAdapter

SIGMA, CLIP = 3.75, 2.0**-6  # ε = 1 at δ = 1e-5 without sampling
STEP = CLIP / RESOLUTION  # a power of two, so that float32 represents every whole step under 2²⁴
RANK = 2
BATCH = 8  # divisor of the sums; division is exact


def count_off_lattice(released: Tensor, known: Tensor, scale: float) -> int:
    """Count numbers that are not fl32(known + scale · n) for any float32 n near the nearest n."""
    expected, known64 = released.numpy().astype(np.float32), known.double().numpy()
    nearest = ((expected.astype(np.float64) - known64) / scale).astype(np.float32)
    possible = np.zeros(expected.shape, bool)
    for other in (nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))):
        possible |= (scale * other.astype(np.float64) + known64).astype(np.float32) == expected
    return int((~possible).sum())


def to_whole_steps(values: Tensor, step: float) -> np.ndarray:
    """Convert values to whole numbers of steps."""
    steps = values.double() / step
    assert torch.equal(steps, steps.round())
    return steps.numpy().astype(np.int64)


def assert_similar_counts(without: int, having: int, numbers: int) -> None:
    """Assert that two counts differ by no more than chance."""
    assert abs(without - having) < 5 * max(1.0, 2 * numbers * 0.25) ** 0.5
    assert stats.fisher_exact([[without, numbers - without], [having, numbers - having]]).pvalue > 1e-6


class _EmptyBatchNoise(SecureNoise):
    """Secure noise source with empty batches."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.empty(0, dtype=torch.long)


def device_release(base: Base, folder: Path, count: int, noise: NoiseSource) -> Tensor:
    """Return the server's view of one SGD step at B = 0: the noised sum [D], computed by the device's own code."""
    held_pictures = Pictures(tuple(random_picture(seed) for seed in range(count)), (), ())
    device = device_with_base(base, folder, "d", held_pictures, lambda _round, _purpose: noise)
    sent = {name: Factors(a, torch.zeros_like(b)) for name, (a, b) in adapter(base, 1).items()}
    privacy = ExamplePrivacy(noise_multiplier=SIGMA, clip=CLIP, sampling_rate=1.0, draws=1, delta=1e-3)
    asked = plan(base, round=1, steps=1, batch_size=BATCH, learning_rate=1.0, optimiser="sgd", privacy=privacy)

    def performed(jobs: list) -> Sequence:
        return perform(base, jobs, memory=PLENTY, timesteps=1)

    request = Train(plan=asked, adapter=tensor_codec.encode(to_tensors(sent)))
    reply = run_handlers({"d": handle(request, device)}, performed)["d"]
    assert not isinstance(reply, Exception), reply
    rank = next(iter(sent.values())).a.shape[0]
    tensors = tensor_codec.decode(reply.adapter, adapter_shapes(base.sites, rank))
    return -BATCH * torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.endswith("lora_B")])


@pytest.mark.integration
def test_device_release_is_consistent_with_any_pictures(base: Base, tmp_path: Path) -> None:
    known = device_release(base, tmp_path / "known", 4, NoNoise(range(4)))
    assert known.norm() > CLIP  # the attack has a target
    off = []
    for number, (count, noise) in enumerate(
        [(4, SecureNoise()), (5, SecureNoise()), (5, _EmptyBatchNoise())]
    ):  # with and without the fifth, and with none
        released = torch.cat([device_release(base, tmp_path / f"{number} {i}", count, noise) for i in (0, 1)])
        steps = to_whole_steps(released, STEP)
        assert steps.std() == pytest.approx(SIGMA * RESOLUTION, rel=0.1)
        for modulus in (2, 3, 16):  # the last bits of the sum are hidden
            assert stats.chisquare(np.bincount(steps[np.abs(steps) < 2**24] % modulus)).pvalue > 1e-6
        off.append(
            [count_off_lattice(released, sums, SIGMA * CLIP) for sums in (torch.cat([known, known]), 0 * released)]
        )
    numbers = 2 * len(known)
    for hypothesis in (0, 1):  # the hypotheses of these four, and of none
        assert off[0][hypothesis] > 0.01 * numbers
        for other in (1, 2):
            assert_similar_counts(off[0][hypothesis], off[other][hypothesis], numbers)


def b_updates(count: int) -> list[Adapter]:
    """Create updates of several devices in which only B is trained."""
    updates = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        updates.append({name: Factors(f.a, torch.randn(f.b.shape, generator=generator)) for name, f in START.items()})
    return updates


START = {name: Factors(torch.ones(RANK, site.inputs), torch.zeros(site.outputs, RANK)) for name, site in SITES.items()}


def test_server_release_is_consistent_with_any_devices(tmp_path: Path) -> None:
    layout = trained_layout(SITES, RANK, "b", START)
    known = clip_and_sum(changes(layout, START, b_updates(9)), CLIP, layout.size).total
    off, rounds = [], 60
    for count in (9, 10):
        released = []
        for number in range(rounds):
            level = central_dp(
                tmp_path / f"{count}-{number}",
                clip=CLIP,
                noise=lambda _: SecureNoise(),
                mechanism=GaussianMechanism(noise_multiplier=SIGMA, expected=8.0),
            )
            level.charge_round(1, [], b"adapter")
            result, _ = level.privatize(FFA(), START, b_updates(count), round=1)
            released.append(layout.pack(result.adapter))
        values = torch.cat(released)
        steps = to_whole_steps(values, STEP / 8.0)
        assert stats.chisquare(np.bincount(steps[np.abs(steps) < 2**24] % 4)).pvalue > 1e-6
        off.append(count_off_lattice(8.0 * values, (known.steps * known.step).repeat(rounds), SIGMA * CLIP))
    assert_similar_counts(off[0], off[1], rounds * layout.size)


@pytest.mark.parametrize("sigma", [1e6, 3e4])
def test_gain_noise_has_resolution_of_its_steps(sigma: float) -> None:
    """Noise in float32 steps would rule out candidates for the sum of gains; this noise rules out none."""
    gains, clip = [0.03, -0.01, 0.2], 0.1
    truth = clipped_sum(gains, clip)
    candidates = np.arange(-3 * truth.resolution, 3 * truth.resolution + 1)
    alive, scale = np.ones(len(candidates), bool), sigma * truth.resolution
    for _ in range(40):
        gain = noised_mean(gains, clip=clip, noise_multiplier=sigma, count=1, noise=SecureNoise())
        rest = (round(gain / truth.step) - candidates).astype(np.float64)
        nearest = (rest / scale).astype(np.float32)
        possible = np.rint(scale * nearest.astype(np.float64)) == rest
        for step in (np.inf, -np.inf):
            possible |= np.rint(scale * np.nextafter(nearest, np.float32(step)).astype(np.float64)) == rest
        alive &= possible
    assert not alive[candidates == int(truth.steps)].any()  # this rule excludes the truth too


class _BalancingNoise:
    """Noise source that brings the noised sum to a fixed total, a possible release of many data sets."""

    release = False

    def __init__(self, total: Tensor, steps: Tensor, counts: tuple[int, int] = (0, 0)) -> None:
        self._left = [total - steps, torch.tensor([counts[0] - counts[1]])]

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        drawn = self._left.pop(0)
        assert drawn.shape == (size,)
        return drawn.to(device)


def test_server_outputs_depend_on_noised_integers_only(tmp_path: Path) -> None:
    """Adapter, diagnostics (e.g. signal-to-noise ratio) and metrics are equal if the noise makes the sums equal."""
    layout = trained_layout(SITES, RANK, "b", START)
    total = torch.randint(-(2**24), 2**24, (layout.size,), generator=torch.Generator().manual_seed(0))
    outputs = []
    for count in (0, 1, 7):
        steps = clip_and_sum(changes(layout, START, b_updates(count)), CLIP, layout.size).total.steps
        assert count == 0 or steps.any()
        level = central_dp(
            tmp_path / str(count),
            clip=CLIP,
            noise=lambda _, steps=steps: _BalancingNoise(total, steps),
            mechanism=GaussianMechanism(noise_multiplier=SIGMA, expected=8.0),
        )
        level.charge_round(1, [], b"adapter")
        result, facts = level.privatize(FFA(), START, b_updates(count), round=1)
        outputs.append((layout.pack(result.adapter).tolist(), result.diagnostics, replace(facts, dropped=0)))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0][1]["snr"] > 0


class _MatchingNoise:
    """Noise source with the batches of another run, whose noise brings each step's sum to the total of that run."""

    release = False

    def __init__(self, noises: Sequence[Tensor] = ()) -> None:
        self._noises = list(noises)

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        return self._noises.pop(0).to(device) if self._noises else torch.zeros(size, dtype=torch.int64, device=device)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_device_outputs_depend_on_noised_integers_only(
    base: Base, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step on other pictures, with noise that makes their sum equal: the adapter is equal, bit by bit."""
    seen: list[Tensor] = []
    original = BoundedSums.pop_noised

    def pop_noised(self: BoundedSums, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        seen.append(self._values[list(clients)][0].clone())
        return original(self, clients, noises)

    monkeypatch.setattr(BoundedSums, "pop_noised", pop_noised)
    total, outputs = torch.zeros(0), []
    for count in (0, 2, 5):
        first = private(base, "a", count=count, steps=1, optimizer=optimizer, noise=_MatchingNoise())
        (_,) = train(base, [first], memory=PLENTY, timesteps=1)
        steps = seen.pop().long()
        if not count:
            total = torch.randint_like(steps, -(2**22), 2**22)
        assert count == 0 or steps.any()
        again = replace(first, noise=_MatchingNoise([total - steps]))
        (result,) = train(base, [again], memory=PLENTY, timesteps=1)
        assert isinstance(result, TrainedAdapter), result
        assert torch.equal(seen.pop().long(), steps)
        outputs.append(result)
    assert_same_bits(outputs[0], outputs[1])
    assert_same_bits(outputs[1], outputs[2])
