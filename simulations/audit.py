"""Does the privacy hold that is claimed?  python -m simulations.audit [key=value …]

Without runs the training loop itself is on trial: canaries in it, for some claims of ε, and once without noise, which
the audit must catch or be of no use; and canary clients against the clip and noise of whole devices. With runs the
adapters that they share are: who was trained on? The exit code is 1 if a claim is refuted, or missing noise missed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.hydra_config import HydraConfig

from conf.audit import Audit
from conf.cli import application, output_dir

if TYPE_CHECKING:
    from privacy.audit import Finding
    from privacy.noise import NoiseSource
    from simulations.audit_page import Results, Verdict
    from simulations.canaries import Experiment
    from simulations.membership import Arm

MEMORY = 2**28  # bytes for the passes of canaries, which are a few numbers each
PASSED, FAILED = 0, 1


class Case(NamedTuple):
    """A claim that is put on trial."""

    seed: int
    epsilon: float
    honest: bool  # or without noise

    @property
    def name(self) -> str:
        return f"ε = {self.epsilon:g}" + ("" if self.honest else ", noise left out")


@application("audit", Audit)
def main(config: Audit) -> None:
    from simulations.audit_page import write

    results = audit(config, print)
    page = write(results, config, Path(output_dir()), shlex.join(command()))
    print(f"page  {page}")
    sys.exit(PASSED if results.sound else FAILED)


def audit(config: Audit, say: Callable[[str], object]) -> Results:
    """Everything that the configuration asks for, told as it comes."""
    from simulations.audit_page import Results, line, lines

    results = Results([], [], [])
    if config.runs:
        for arm in arms(config):
            for words in lines(arm):
                say(words)
            results.arms.append(arm)
        return results
    for verdict in loop(config):
        say(line("training loop", verdict))
        results.loop.append(verdict)
    for verdict in clients(config):
        say(line("whole devices", verdict))
        results.clients.append(verdict)
    return results


def arms(config: Audit) -> Iterator[Arm]:
    """The runs on trial, those that differ in their seed alone together."""
    from simulations import membership

    runs = sorted(map(membership.load, map(Path, config.runs)), key=lambda run: run.arm)
    for _, alike in groupby(runs, key=lambda run: run.arm):
        yield membership.attack(list(alike), config.membership, confidence=config.confidence, seed=config.seed)


def loop(config: Audit) -> Iterator[Verdict]:
    """The training loop on trial."""
    from privacy.accounting import PoissonGaussian, noise_multiplier_for
    from simulations.audit_page import Verdict
    from simulations.canaries import Experiment, Silent, toss

    asked = config.canaries
    for case in cases(asked.epsilons, config.seed) if asked.count else ():
        sigma = noise_multiplier_for(
            epsilon=case.epsilon, delta=asked.delta, sampling_rate=asked.sampling_rate, steps=asked.rounds
        )
        claim = PoissonGaussian(noise_multiplier=sigma, sampling_rate=asked.sampling_rate, steps=asked.rounds)
        included = toss(asked.count, case.seed)
        experiment = Experiment(
            claim=claim, clip=asked.clip, draws=asked.draws, included=included, devices=asked.devices
        )

        def sources(device: str, round: int, case: Case = case) -> NoiseSource:
            found = source(asked.noise, case.seed, device, round)
            return found if case.honest else Silent(found)

        yield Verdict(case.name, examine(experiment, sources, asked.delta, config.confidence), case.honest)


def examine(
    experiment: Experiment, sources: Callable[[str, int], NoiseSource], delta: float, confidence: float
) -> Finding:
    """Train on canaries, and see what the releases give away."""
    from privacy.audit import audit
    from simulations import canaries
    from training.trainer import train

    jobs = canaries.jobs(experiment, sources)
    outcomes = train(canaries.network(experiment), jobs, memory=MEMORY, timesteps=1)
    attacks = canaries.attacks(experiment, canaries.seen(experiment, outcomes))
    return audit(experiment.claim, delta, attacks, experiment.included, confidence)


def clients(config: Audit) -> Iterator[Verdict]:
    """Clip and noise of whole devices on trial."""
    from privacy.accounting import PoissonGaussian, noise_multiplier_for
    from privacy.audit import audit, cosine_epsilon, log_likelihood_ratio
    from privacy.noise import Secure
    from simulations import canaries
    from simulations.audit_page import Verdict

    asked = config.clients
    for case in cases(asked.epsilons, config.seed) if asked.count else ():
        sigma = noise_multiplier_for(epsilon=case.epsilon, delta=asked.delta, sampling_rate=1.0, steps=asked.rounds)
        claim = PoissonGaussian(noise_multiplier=sigma, sampling_rate=1.0, steps=asked.rounds)
        noise = Secure() if case.honest else canaries.Silent(Secure())
        mechanism = partial(canaries.clip_and_noise, clip=1.0, noise_multiplier=sigma, noise=noise)
        included = canaries.toss(asked.count, case.seed)
        found = canaries.clients(
            mechanism, included, dimension=asked.dimension, clip=1.0, rounds=asked.rounds, seed=case.seed
        )
        scores = {"releases": log_likelihood_ratio(found.seen, claim)}
        finding = audit(claim, asked.delta, scores, included, config.confidence)
        yield Verdict(case.name, finding, case.honest, cosine_epsilon(found.cosines, asked.dimension, asked.delta))


def cases(epsilons: Sequence[float], seed: int) -> list[Case]:
    """Every claim, and the smallest once more without noise: were that missed, the others would say nothing."""
    tried = [(epsilon, True) for epsilon in sorted(epsilons)]
    tried.append((min(epsilons), False))
    return [Case(seed + place, epsilon, honest) for place, (epsilon, honest) in enumerate(tried)]


def source(kind: str, seed: int, device: str, round: int) -> NoiseSource:
    """Noise and Poisson batches of one device in one round."""
    from privacy.noise import Secure, Simulated

    return Secure() if kind == "secure" else Simulated(seed=seed, client=device, round=round, purpose="shared")


def command() -> list[str]:
    """The command that started this audit, as one would type it."""
    return ["python", "-m", "simulations.audit", *HydraConfig.get().overrides.task]


if __name__ == "__main__":
    main()
