"""Does the privacy hold that is claimed?  anther audit [key=value …]

Without runs the mechanisms themselves are on trial: canaries in the training loop and canary clients in the rounds of
`privacy=device`, for some claims of ε, and once without noise, which the audit must catch or be of no use. Everything
that goes in is known, so that the noise is seen by itself too, and tested as what it ought to be. With runs the
adapters that they share are on trial: who was trained on? The exit code is 1 if a claim is refuted, a test of the noise
fails, or missing noise is missed.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from hydra.core.hydra_config import HydraConfig

from conf.cli import hydra_application, output_dir
from conf.schemas.audit import AuditConfig

if TYPE_CHECKING:
    from privacy.noise import NoiseSource
    from simulations.audit.canaries import Experiment, RecordingSource, Sources
    from simulations.audit.membership import RunGroup
    from simulations.audit.verdicts import AuditResults, ClaimResult, NoiseTestResult

COMPANY_MEMORY = 2**30  # bytes for those of a real base
MEMORY = 2**28  # bytes for the passes of canaries, which are a few numbers each
SOURCE_NUMBERS = 2**14  # of so large a σ that many of them need further bits, one by one
PASSED, FAILED = 0, 1
IMAGE, DEVICE = "image", "device"


class AuditCase(NamedTuple):
    """A claim that is put on trial."""

    seed: int
    epsilon: float
    honest: bool  # or without noise

    @property
    def name(self) -> str:
        return f"ε = {self.epsilon:g}" + ("" if self.honest else ", noise left out")


@hydra_application("audit", AuditConfig)
def main(config: AuditConfig) -> None:
    from simulations.audit.page import write
    from simulations.audit.verdicts import summary_line

    results = audit(config, print)
    if not config.runs:
        print(summary_line(results, config.false_alarms))
    page = write(results, config, Path(output_dir()), shlex.join(command()))
    print(f"page  {page}")
    sys.exit(PASSED if results.sound else FAILED)


def audit(config: AuditConfig, say: Callable[[str], object]) -> AuditResults:
    """Everything that the configuration asks for, told as it comes."""
    from simulations.audit.verdicts import AuditResults, NoiseTestResult, arm_lines, fit_lines, line

    results = AuditResults()
    if config.runs:
        for arm in arms(config):
            for words in arm_lines(arm):
                say(words)
            results.arms.append(arm)
        return results
    for trial, where, verdicts in ((loop, "training loop", results.loop), (clients, "whole devices", results.clients)):
        for found in trial(config):
            if isinstance(found, NoiseTestResult):
                results.fits.append(found)
                for words in fit_lines(found):
                    say(words)
            else:
                verdicts.append(found)
                say(line(where, found))
    for found in chain(fits(config), company(config)):
        results.fits.append(found)
        for words in fit_lines(found):
            say(words)
    return results


def arms(config: AuditConfig) -> Iterator[RunGroup]:
    """The runs on trial, those that differ in their seed alone together."""
    from simulations.audit import membership

    runs = sorted(map(membership.load, map(Path, config.runs)), key=lambda run: run.arm)
    for _, alike in groupby(runs, key=lambda run: run.arm):
        yield membership.attack(list(alike), config.membership, confidence=config.confidence, seed=config.seed)


def loop(config: AuditConfig) -> Iterator[ClaimResult | NoiseTestResult]:
    """The training loop on trial: each claim, and the noise under it."""
    from privacy.accounting import PoissonGaussian, noise_multiplier_for
    from simulations.audit.canaries import Experiment, ZeroNoise, draw_included

    asked = config.canaries
    for case in cases(asked.epsilons, config.seed) if asked.count else ():
        sigma = noise_multiplier_for(
            epsilon=case.epsilon, delta=asked.delta, sampling_rate=asked.sampling_rate, steps=asked.rounds
        )
        claim = PoissonGaussian(noise_multiplier=sigma, sampling_rate=asked.sampling_rate, steps=asked.rounds)
        included = draw_included(asked.count, case.seed)
        experiment = Experiment(claim=claim, draws=asked.draws, included=included, devices=asked.devices)

        def sources(device: str, round: int, case: AuditCase = case) -> NoiseSource:
            found = source(asked.noise, case.seed, device, round)
            return found if case.honest else ZeroNoise(found)

        yield from examine(experiment, sources, case, config)


def examine(
    experiment: Experiment, sources: Sources, case: AuditCase, config: AuditConfig
) -> Iterator[ClaimResult | NoiseTestResult]:
    """Train on canaries, and see what the releases give away; and what is left of them without the canaries."""
    from privacy.audit import goodness_of_fit
    from privacy.audit.empirical import audit
    from simulations.audit import canaries
    from simulations.audit.verdicts import ClaimResult, NoiseTestResult
    from training.cohort import train

    recorded: list[RecordingSource] = []

    def recording(device: str, round: int) -> RecordingSource:
        recorded.append(canaries.RecordingSource(sources(device, round)))
        return recorded[-1]

    jobs = canaries.jobs(experiment, recording)
    outcomes = train(canaries.network(experiment.side), jobs, memory=MEMORY, timesteps=1)
    seen = canaries.seen(experiment, outcomes)
    finding = audit(
        experiment.claim,
        config.canaries.delta,
        canaries.attacks(experiment, seen),
        experiment.included,
        confidence=config.confidence,
        false_alarms=share(config),
    )
    yield ClaimResult(case.name, finding, case.honest)
    if case.honest:
        noise, joined = canaries.residuals(experiment, seen, recorded)
        checks = goodness_of_fit.battery(noise)
        checks.append(goodness_of_fit.alignment(noise, joined, "along pictures that joined"))
        yield NoiseTestResult.of(f"noise of {case.name}", IMAGE, noise, checks, share(config))


def clients(config: AuditConfig) -> Iterator[ClaimResult | NoiseTestResult]:
    """The rounds of `privacy=device` on trial."""
    from privacy.accounting import PoissonGaussian, noise_multiplier_for
    from privacy.audit.empirical import audit, cosine_epsilon, log_likelihood_ratio
    from simulations.audit import canaries, canary_clients
    from simulations.audit.canary_clients import CanaryCohort
    from simulations.audit.verdicts import ClaimResult, NoiseTestResult

    asked = config.clients
    for case in cases(asked.epsilons, config.seed) if asked.count else ():
        sigma = noise_multiplier_for(epsilon=case.epsilon, delta=asked.delta, sampling_rate=1.0, steps=asked.rounds)
        claim = PoissonGaussian(noise_multiplier=sigma, sampling_rate=1.0, steps=asked.rounds)
        included = canaries.draw_included(asked.count, case.seed)
        cohort = CanaryCohort(claim=claim, included=included, side=math.isqrt(asked.dimension))

        def noise(round: int, case: AuditCase = case) -> NoiseSource:
            found = source("secure", case.seed, "server", round)
            return found if case.honest else canaries.ZeroNoise(found)

        found = canary_clients.run_rounds(cohort, noise)
        own = found.sums[:, : asked.count]
        finding = audit(
            claim,
            asked.delta,
            {"own releases": log_likelihood_ratio(own, claim)},
            included,
            confidence=config.confidence,
            false_alarms=share(config),
        )
        total = found.sums.sum(0)
        cosines = total[: asked.count][included] / np.linalg.norm(total)
        yield ClaimResult(case.name, finding, case.honest, cosine_epsilon(cosines, total.size, asked.delta))
        if case.honest:
            checks = canary_clients.checks(found)
            yield NoiseTestResult.of(f"noise of {case.name}", DEVICE, [found.residuals], checks, share(config))


def fits(config: AuditConfig) -> Iterator[NoiseTestResult]:
    """Situations in which everything but the noise is known, per image and per device."""
    from simulations.audit import canary_clients, known_inputs
    from simulations.audit.verdicts import NoiseTestResult

    asked = config.fits
    for situation in known_inputs.situations(asked.longest) if asked.longest else ():
        seen = known_inputs.observe(situation, partial(source, asked.noise, config.seed), config.seed, memory=MEMORY)
        yield NoiseTestResult.of(situation.name, IMAGE, seen.noise, known_inputs.checks(seen), share(config))
    if asked.longest:
        noise, checks = known_inputs.observe_source(source(asked.noise, config.seed, "device", -1), SOURCE_NUMBERS)
        yield NoiseTestResult.of("the source itself, σ = 2¹⁹", IMAGE, [noise], checks, share(config))
    for name, cohort in canary_clients.cohorts(asked.longest, config.seed) if asked.longest else ():
        released = canary_clients.run_rounds(cohort, partial(source, asked.noise, config.seed, "server"))
        yield NoiseTestResult.of(name, DEVICE, [released.residuals], canary_clients.checks(released), share(config))


def company(config: AuditConfig) -> Iterator[NoiseTestResult]:
    """Whether pictures move what others add, on the base that is shipped."""
    from models.base.base import load
    from simulations.audit import batch_independence
    from simulations.audit.verdicts import NoiseTestResult

    if config.fits.base is None:
        return
    base = load(config.fits.base, device="cpu")
    moved = batch_independence.shift(
        base, batch_independence.chaotic(base), batch_independence.random_examples(base), memory=COMPANY_MEMORY
    )
    yield NoiseTestResult(
        "pictures beside others, on a chaotic adapter", IMAGE, 0, 1.0, [batch_independence.check(moved)], 0.0
    )


def share(config: AuditConfig) -> float:
    """What each claim and situation may have of the false alarms."""
    from simulations.audit import canary_clients, known_inputs

    claims = 2 * len(config.canaries.epsilons) * bool(config.canaries.count)
    claims += 2 * len(config.clients.epsilons) * bool(config.clients.count)
    others = len(known_inputs.situations(4)) + 1 + len(canary_clients.cohorts(4, 0)) if config.fits.longest else 0
    return config.false_alarms / (claims + others)


def cases(epsilons: Sequence[float], seed: int) -> list[AuditCase]:
    """Every claim, and the smallest once more without noise: were that missed, the others would say nothing."""
    tried = [(epsilon, True) for epsilon in sorted(epsilons)]
    tried.append((min(epsilons), False))
    return [AuditCase(seed + place, epsilon, honest) for place, (epsilon, honest) in enumerate(tried)]


def source(kind: str, seed: int, device: str, round: int) -> NoiseSource:
    """Noise and Poisson batches of one device in one round."""
    from privacy.noise import SecureNoise, SimulatedNoise

    return (
        SecureNoise() if kind == "secure" else SimulatedNoise(seed=seed, client=device, round=round, purpose="shared")
    )


def command() -> list[str]:
    """The command that started this audit, as one would type it."""
    return ["python", "-m", "simulations.audit.run", *HydraConfig.get().overrides.task]


if __name__ == "__main__":
    main()
