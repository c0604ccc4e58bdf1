"""Audit the claimed privacy:  anther audit [key=value …]

Without `runs` the mechanisms are tested: canaries in the training loop and canary clients in the rounds of
`privacy=device`, for several claims of ε, and once without noise, which the audit must detect. All inputs are known, so
the noise is also separated from the releases and tested against its claimed distribution. With `runs` the shared
adapters of finished runs are attacked by membership inference. The exit code is 1 if a claim is refuted, a test of the
noise fails, or missing noise is not detected.
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

from common.plugins import allow_installed_plugins
from conf.cli import hydra_application, output_dir, program
from conf.schemas.audit import AuditConfig

if TYPE_CHECKING:
    from privacy.noise import NoiseSource
    from simulations.audit.canaries import Experiment, RecordingSource, Sources
    from simulations.audit.membership import RunGroup
    from simulations.audit.verdicts import AuditResults, ClaimResult, NoiseTestResult

BASE_MEMORY = 2**30  # bytes for passes of a real base
CANARY_MEMORY = 2**28  # bytes for passes of canaries, which are a few numbers each
SOURCE_NUMBERS = 2**14  # samples of the largest σ; many need additional random bits
PASSED, FAILED = 0, 1
IMAGE, DEVICE = "image", "device"  # stored; don't change


class AuditCase(NamedTuple):
    """Claim to audit."""

    seed: int
    epsilon: float
    honest: bool  # False: the noise is left out

    @property
    def name(self) -> str:
        return f"ε = {self.epsilon:g}" + ("" if self.honest else ", noise left out")


@hydra_application("audit", AuditConfig)
def main(config: AuditConfig) -> None:
    from simulations.audit.page import write
    from simulations.audit.verdicts import summary_line

    results = audit(config, print)
    if not config.runs:
        print(summary_line(results, config.false_alarm_rate))
    page = write(results, config, Path(output_dir()), shlex.join(command()))
    print(f"page  {page}")
    sys.exit(PASSED if results.sound else FAILED)


def audit(config: AuditConfig, say: Callable[[str], object]) -> AuditResults:
    """Run all audits of the configuration; `say` prints each result as soon as it is available."""
    from simulations.audit.verdicts import AuditResults, NoiseTestResult, claim_line, group_lines, noise_test_lines

    results = AuditResults()
    if config.runs:
        for group in run_groups(config):
            for line in group_lines(group):
                say(line)
            results.run_groups.append(group)
        return results
    for audit_claims, title, claims in (
        (audit_training_loop, "training loop", results.training_loop),
        (audit_devices, "whole devices", results.devices),
    ):
        for result in audit_claims(config):
            if isinstance(result, NoiseTestResult):
                results.noise_tests.append(result)
                for line in noise_test_lines(result):
                    say(line)
            else:
                claims.append(result)
                say(claim_line(title, result))
    for result in chain(noise_tests(config), batch_independence_test(config)):
        results.noise_tests.append(result)
        for line in noise_test_lines(result):
            say(line)
    return results


def run_groups(config: AuditConfig) -> Iterator[RunGroup]:
    """Attack the runs to audit; runs that differ only in their seed form one group."""
    from simulations.audit import membership

    runs = sorted(map(membership.load, map(Path, config.runs)), key=lambda run: run.group_key)
    for _, group in groupby(runs, key=lambda run: run.group_key):
        yield membership.attack(list(group), config.membership, confidence=config.confidence, seed=config.seed)


def audit_training_loop(config: AuditConfig) -> Iterator[ClaimResult | NoiseTestResult]:
    """Audit the training loop: each claim, and the noise of its releases."""
    from privacy.accounting import PoissonGaussian, noise_multiplier_for
    from simulations.audit.canaries import Experiment, ZeroNoise, draw_included

    settings = config.canaries
    for case in cases(settings.epsilons, config.seed) if settings.count else ():
        sigma = noise_multiplier_for(
            epsilon=case.epsilon, delta=settings.delta, sampling_rate=settings.sampling_rate, steps=settings.rounds
        )
        claim = PoissonGaussian(noise_multiplier=sigma, sampling_rate=settings.sampling_rate, steps=settings.rounds)
        included = draw_included(settings.count, case.seed)
        experiment = Experiment(
            claim=claim, draws=settings.noise_multiplicity, included=included, devices=settings.devices
        )

        def sources(device: str, round: int, case: AuditCase = case) -> NoiseSource:
            source = noise_source(settings.noise, case.seed, device, round)
            return source if case.honest else ZeroNoise(source)

        yield from audit_experiment(experiment, sources, case, config)


def audit_experiment(
    experiment: Experiment, sources: Sources, case: AuditCase, config: AuditConfig
) -> Iterator[ClaimResult | NoiseTestResult]:
    """Train on canaries and audit the claim from the releases; then test the noise, unless the case has none.

    Args:
        experiment: the canaries and the claim.
        sources: (device, round) -> noise source.
        case: the claim to audit.
        config: configuration of the audit.
    """
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
    outcomes = train(canaries.network(experiment.side), jobs, memory=CANARY_MEMORY, timesteps=1)
    releases = canaries.canary_releases(experiment, outcomes)
    finding = audit(
        experiment.claim,
        config.canaries.delta,
        canaries.attacks(experiment, releases),
        experiment.included,
        confidence=config.confidence,
        false_alarms=false_alarm_share(config),
    )
    yield ClaimResult(case.name, finding, case.honest)
    if case.honest:
        noise, joined = canaries.residuals(experiment, releases, recorded)
        checks = goodness_of_fit.battery(noise)
        checks.append(goodness_of_fit.alignment(noise, joined, "along pictures that joined"))
        yield NoiseTestResult.of(f"noise of {case.name}", IMAGE, noise, checks, false_alarm_share(config))


def audit_devices(config: AuditConfig) -> Iterator[ClaimResult | NoiseTestResult]:
    """Audit the rounds of `privacy=device`: each claim, and the noise of its releases."""
    from privacy.accounting import PoissonGaussian, noise_multiplier_for
    from privacy.audit.empirical import audit, cosine_epsilon, log_likelihood_ratio
    from simulations.audit import canaries, canary_clients
    from simulations.audit.canary_clients import CanaryCohort
    from simulations.audit.verdicts import ClaimResult, NoiseTestResult

    settings = config.clients
    for case in cases(settings.epsilons, config.seed) if settings.count else ():
        sigma = noise_multiplier_for(
            epsilon=case.epsilon, delta=settings.delta, sampling_rate=1.0, steps=settings.rounds
        )
        claim = PoissonGaussian(noise_multiplier=sigma, sampling_rate=1.0, steps=settings.rounds)
        included = canaries.draw_included(settings.count, case.seed)
        cohort = CanaryCohort(claim=claim, included=included, side=math.isqrt(settings.dimension))

        def noise(round: int, case: AuditCase = case) -> NoiseSource:
            source = noise_source("secure", case.seed, "server", round)
            return source if case.honest else canaries.ZeroNoise(source)

        released = canary_clients.run_rounds(cohort, noise)
        own = released.sums[:, : settings.count]
        finding = audit(
            claim,
            settings.delta,
            {"own releases": log_likelihood_ratio(own, claim)},
            included,
            confidence=config.confidence,
            false_alarms=false_alarm_share(config),
        )
        total = released.sums.sum(0)
        cosines = total[: settings.count][included] / np.linalg.norm(total)
        yield ClaimResult(case.name, finding, case.honest, cosine_epsilon(cosines, total.size, settings.delta))
        if case.honest:
            checks = canary_clients.checks(released)
            yield NoiseTestResult.of(
                f"noise of {case.name}", DEVICE, [released.residuals], checks, false_alarm_share(config)
            )


def noise_tests(config: AuditConfig) -> Iterator[NoiseTestResult]:
    """Test the noise where all other inputs are known, per image and per device."""
    from simulations.audit import canary_clients, known_inputs
    from simulations.audit.verdicts import NoiseTestResult

    settings = config.noise_tests
    for situation in known_inputs.situations(settings.max_length) if settings.max_length else ():
        releases = known_inputs.observe(
            situation, partial(noise_source, settings.noise, config.seed), config.seed, memory=CANARY_MEMORY
        )
        yield NoiseTestResult.of(
            situation.name, IMAGE, releases.noise, known_inputs.checks(releases), false_alarm_share(config)
        )
    if settings.max_length:
        noise, checks = known_inputs.observe_source(
            noise_source(settings.noise, config.seed, "device", -1), SOURCE_NUMBERS
        )
        yield NoiseTestResult.of("the source itself, σ = 2¹⁹", IMAGE, [noise], checks, false_alarm_share(config))
    for name, cohort in canary_clients.cohorts(settings.max_length, config.seed) if settings.max_length else ():
        released = canary_clients.run_rounds(cohort, partial(noise_source, settings.noise, config.seed, "server"))
        yield NoiseTestResult.of(
            name, DEVICE, [released.residuals], canary_clients.checks(released), false_alarm_share(config)
        )


def batch_independence_test(config: AuditConfig) -> Iterator[NoiseTestResult]:
    """Test on the base of the configuration whether pictures change the contributions of others."""
    from models.base.base import load
    from simulations.audit import batch_independence
    from simulations.audit.verdicts import NoiseTestResult

    if config.noise_tests.base is None:
        return
    allow_installed_plugins()
    base = load(config.noise_tests.base, device="cpu")
    shift = batch_independence.max_shift(
        base,
        batch_independence.chaotic_adapter(base),
        batch_independence.random_examples(base),
        memory=BASE_MEMORY,
    )
    yield NoiseTestResult(
        "pictures beside others, on a chaotic adapter", IMAGE, 0, 1.0, [batch_independence.check(shift)], 0.0
    )


def false_alarm_share(config: AuditConfig) -> float:
    """Return each test's share of the audit's false alarm probability."""
    from simulations.audit import canary_clients, known_inputs

    claims = 2 * len(config.canaries.epsilons) * bool(config.canaries.count)
    claims += 2 * len(config.clients.epsilons) * bool(config.clients.count)
    noise_situations = (
        len(known_inputs.situations(4)) + 1 + len(canary_clients.cohorts(4, 0)) if config.noise_tests.max_length else 0
    )
    return config.false_alarm_rate / (claims + noise_situations)


def cases(epsilons: Sequence[float], seed: int) -> list[AuditCase]:
    """List all claims, and the smallest one again without noise.

    If the audit misses the missing noise, its other results have no meaning.
    """
    honest_cases = [(epsilon, True) for epsilon in sorted(epsilons)]
    all_cases = [*honest_cases, (min(epsilons), False)]
    return [AuditCase(seed + index, epsilon, honest) for index, (epsilon, honest) in enumerate(all_cases)]


def noise_source(kind: str, seed: int, device: str, round: int) -> NoiseSource:
    """Return the source of noise and Poisson batches of one device in one round.

    Args:
        kind: `secure` or `simulated`.
        seed: seed of simulated noise.
        device: name of the device.
        round: number of the round.
    """
    from privacy.noise import SecureNoise, SimulatedNoise

    return (
        SecureNoise() if kind == "secure" else SimulatedNoise(seed=seed, client=device, round=round, purpose="shared")
    )


def command() -> list[str]:
    """Return the command that started this audit."""
    return [*program("simulations.audit.run"), *HydraConfig.get().overrides.task]


if __name__ == "__main__":
    main()
