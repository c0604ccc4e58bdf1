"""Which numbers can be released doesn't depend on the data: attacks on the lattice of the noise find nothing.

An adversary who knows all of the data but one unit asks of each released number whether it could have come without that
unit: whether float32 noise, scaled and added to the sum that it knows, could give it (Mironov, 2012). Of releases made
with floating point noise the answer is always yes without the unit and often no with it.
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
from privacy.bounded_sum import clipped_sum, noised_mean
from privacy.central import GaussianMechanism, clip_and_sum
from privacy.clipping import BoundedGradientSums
from privacy.noise import CPU, NoiseSource, SecureNoise
from privacy.sensitivity import RESOLUTION
from protocol import tensor_codec
from protocol.messages import ExamplePrivacy, Train
from strategies.aggregation.ffa import FFA
from strategies.central_dp import changes
from tests.helpers.central import central_dp
from tests.helpers.fleet import SITES
from tests.helpers.neighbors import PLENTY, Still, adapter, device_on, picture, plan
from tests.helpers.reference_trainer import assert_same_bits, private
from training.cohort import train
from training.engine import perform
from training.jobs import TrainedAdapter

SIGMA, CLIP = 3.75, 2.0**-6  # ε = 1 at δ = 1e-5 without sampling
STEP = CLIP / RESOLUTION  # a power of two, so that float32 holds every whole step under 2²⁴
RANK = 2
BATCH = 8  # that sums are divided by: exactly


def off_lattice(released: Tensor, known: Tensor, scale: float) -> int:
    """How many numbers are no fl32(known + scale · n) of a float32 n, by the neighbours of the nearest n."""
    wanted, known64 = released.numpy().astype(np.float32), known.double().numpy()
    nearest = ((wanted.astype(np.float64) - known64) / scale).astype(np.float32)
    possible = np.zeros(wanted.shape, bool)
    for other in (nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))):
        possible |= (scale * other.astype(np.float64) + known64).astype(np.float32) == wanted
    return int((~possible).sum())


def whole_steps(values: Tensor, step: float) -> np.ndarray:
    """The values in steps, which they are whole numbers of."""
    steps = values.double() / step
    assert torch.equal(steps, steps.round())
    return steps.numpy().astype(np.int64)


def agree(without: int, having: int, numbers: int) -> None:
    """Two counts of so many numbers differ by no more than chance has it."""
    assert abs(without - having) < 5 * max(1.0, 2 * numbers * 0.25) ** 0.5
    assert stats.fisher_exact([[without, numbers - without], [having, numbers - having]]).pvalue > 1e-6


class Empty(SecureNoise):
    """Secure noise on a batch that no picture joined."""

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.empty(0, dtype=torch.long)


def of_device(base: Base, folder: Path, count: int, noise: NoiseSource) -> Tensor:
    """What a malicious server gets of one step of SGD at B = 0: the noised sum itself [D], by the device's own path."""
    held = Pictures(tuple(picture(seed) for seed in range(count)), (), ())
    device = device_on(base, folder, "d", held, lambda _round, _purpose: noise)
    sent = {name: Factors(a, torch.zeros_like(b)) for name, (a, b) in adapter(base, 1).items()}
    privacy = ExamplePrivacy(noise_multiplier=SIGMA, clip=CLIP, sampling_rate=1.0, draws=1, delta=1e-3)
    asked = plan(base, round=1, steps=1, batch_size=BATCH, learning_rate=1.0, optimiser="sgd", privacy=privacy)

    def performed(jobs: list) -> Sequence:
        return perform(base, jobs, memory=PLENTY, timesteps=1)

    request = Train(plan=asked, adapter=tensor_codec.encode(to_tensors(sent)))
    reply = run_handlers({"d": handle(request, device)}, performed)["d"]
    assert not isinstance(reply, Exception), reply
    rank = next(iter(sent.values())).a.shape[0]
    told = tensor_codec.decode(reply.adapter, adapter_shapes(base.sites, rank))
    return -BATCH * torch.cat([told[name].flatten() for name in sorted(told) if name.endswith("lora_B")])


def test_a_device_releases_whole_steps_that_fit_any_pictures(base: Base, tmp_path: Path) -> None:
    known = of_device(base, tmp_path / "known", 4, Still(range(4)))
    assert known.norm() > CLIP  # there is something to find
    off = []
    for number, (count, noise) in enumerate(
        [(4, SecureNoise()), (5, SecureNoise()), (5, Empty())]
    ):  # the fifth or not, nobody
        released = torch.cat([of_device(base, tmp_path / f"{number} {i}", count, noise) for i in (0, 1)])
        steps = whole_steps(released, STEP)
        assert steps.std() == pytest.approx(SIGMA * RESOLUTION, rel=0.1)
        for modulus in (2, 3, 16):  # the last bits of the sum are hidden in even ones
            assert stats.chisquare(np.bincount(steps[np.abs(steps) < 2**24] % modulus)).pvalue > 1e-6
        off.append([off_lattice(released, sums, SIGMA * CLIP) for sums in (torch.cat([known, known]), 0 * released)])
    numbers = 2 * len(known)
    for hypothesis in (0, 1):  # "these four", and "nobody"
        assert off[0][hypothesis] > 0.01 * numbers
        for other in (1, 2):
            agree(off[0][hypothesis], off[other][hypothesis], numbers)


def sent(count: int) -> list[Adapter]:
    """Updates of so many devices, of which B alone is trained."""
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        made.append({name: Factors(f.a, torch.randn(f.b.shape, generator=generator)) for name, f in START.items()})
    return made


START = {name: Factors(torch.ones(RANK, site.inputs), torch.zeros(site.outputs, RANK)) for name, site in SITES.items()}


def test_the_server_releases_whole_steps_that_fit_any_devices(tmp_path: Path) -> None:
    layout = trained_layout(SITES, RANK, "b", START)
    known = clip_and_sum(changes(layout, START, sent(9)), CLIP, layout.size).total
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
            level.open(1, [], b"adapter")
            found, _ = level.close(FFA(), START, sent(count), round=1)
            released.append(layout.pack(found.adapter))
        values = torch.cat(released)
        steps = whole_steps(values, STEP / 8.0)
        assert stats.chisquare(np.bincount(steps[np.abs(steps) < 2**24] % 4)).pvalue > 1e-6
        off.append(off_lattice(8.0 * values, (known.steps * known.step).repeat(rounds), SIGMA * CLIP))
    agree(off[0], off[1], rounds * layout.size)


@pytest.mark.parametrize("sigma", [1e6, 3e4])
def test_the_noise_on_a_gain_is_as_fine_as_its_steps(sigma: float) -> None:
    """Candidates for the sum of gains that float32 noise in steps could not have been added to are ruled out."""
    gains, clip = [0.03, -0.01, 0.2], 0.1
    truth = clipped_sum(gains, clip)
    candidates = np.arange(-3 * truth.sensitivity, 3 * truth.sensitivity + 1)
    alive, scale = np.ones(len(candidates), bool), sigma * truth.sensitivity
    for _ in range(40):
        told = noised_mean(gains, clip=clip, noise_multiplier=sigma, count=1, noise=SecureNoise())
        rest = (round(told / truth.step) - candidates).astype(np.float64)
        nearest = (rest / scale).astype(np.float32)
        possible = np.rint(scale * nearest.astype(np.float64)) == rest
        for step in (np.inf, -np.inf):
            possible |= np.rint(scale * np.nextafter(nearest, np.float32(step)).astype(np.float64)) == rest
        alive &= possible
    assert not alive[candidates == truth.steps].any()  # by that rule the truth is ruled out too


class Balancing:
    """Noise that brings what is noised to a total of its own: a release that many data could have led to."""

    release = False

    def __init__(self, total: Tensor, steps: Tensor, counts: tuple[int, int] = (0, 0)) -> None:
        self._left = [total - steps, torch.tensor([counts[0] - counts[1]])]

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        drawn = self._left.pop(0)
        assert drawn.shape == (size,)
        return drawn.to(device)


def test_all_that_the_server_tells_is_a_function_of_the_noised_integers(tmp_path: Path) -> None:
    """Adapter, diagnostics (signal to noise among them) and facts: alike if the noise brings the sums to the same."""
    layout = trained_layout(SITES, RANK, "b", START)
    total = torch.randint(-(2**24), 2**24, (layout.size,), generator=torch.Generator().manual_seed(0))
    told = []
    for count in (0, 1, 7):
        steps = clip_and_sum(changes(layout, START, sent(count)), CLIP, layout.size).total.steps
        assert count == 0 or steps.any()
        level = central_dp(
            tmp_path / str(count),
            clip=CLIP,
            noise=lambda _, steps=steps: Balancing(total, steps),
            mechanism=GaussianMechanism(noise_multiplier=SIGMA, expected=8.0),
        )
        level.open(1, [], b"adapter")
        found, facts = level.close(FFA(), START, sent(count), round=1)
        told.append((layout.pack(found.adapter).tolist(), found.diagnostics, replace(facts, dropped=0)))
    assert told[0] == told[1] == told[2]
    assert told[0][1]["snr"] > 0


class Counting:
    """The same batches as another run, with the noise that brings each step's sum to the total of that run."""

    release = False

    def __init__(self, noises: Sequence[Tensor] = ()) -> None:
        self._noises = list(noises)

    def poisson_batch(self, size: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.arange(size)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:  # noqa: ARG002
        return self._noises.pop(0).to(device) if self._noises else torch.zeros(size, dtype=torch.int64, device=device)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_that_a_device_tells_is_a_function_of_the_noised_integers(
    base: Base, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step on other pictures, with noise that brings their sum to the same: the same adapter, bit by bit."""
    seen: list[Tensor] = []
    really = BoundedGradientSums.pop_noised

    def pop_noised(self: BoundedGradientSums, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        seen.append(self._values[list(clients)][0].clone())
        return really(self, clients, noises)

    monkeypatch.setattr(BoundedGradientSums, "pop_noised", pop_noised)
    total, told = torch.zeros(0), []
    for count in (0, 2, 5):
        first = private(base, "a", count=count, steps=1, optimizer=optimizer, noise=Counting())
        (_,) = train(base, [first], memory=PLENTY, timesteps=1)
        steps = seen.pop().long()
        if not count:
            total = torch.randint_like(steps, -(2**22), 2**22)
        assert count == 0 or steps.any()
        again = replace(first, noise=Counting([total - steps]))
        (found,) = train(base, [again], memory=PLENTY, timesteps=1)
        assert isinstance(found, TrainedAdapter), found
        assert torch.equal(seen.pop().long(), steps)
        told.append(found)
    assert_same_bits(told[0], told[1])
    assert_same_bits(told[1], told[2])
