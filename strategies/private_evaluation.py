"""What the operator of a run sees of its progress: which rounds are measured, and what hides whom in the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from common.errors import AntherError
from conf.schemas.simulation import SimulationConfig
from privacy.accounting import PoissonGaussian
from privacy.bounded_sum import noise_error, noised_mean
from privacy.noise import NoiseSource, noise_source
from protocol.messages import Evaluation, EvaluationPrivacy
from strategies.round.metrics import ValidationMetrics, mean
from strategies.round.plausibility import trimmed_mean

_FAR = 8.0  # standard deviations


@dataclass(frozen=True, kw_only=True)
class CentralDPEvaluation:
    """The server's own noise, on the sum of the devices' mean gains; the unit is all of one device."""

    noise_multiplier: float
    """σ: the sum gets N(0, (σ·clip)²)."""
    clip: float
    """Bound on what one device's mean gain adds to the sum."""
    devices: int
    """The public constant that the noised sum is divided by: how many are asked."""
    noise: Callable[[int], NoiseSource]
    """Of a round."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPolicy:
    """Devices measure the adapter of every so many rounds: openly, or hidden in noise in one of two ways."""

    every: int = 1
    """Rounds between two; 0: none is measured."""
    local_noise: EvaluationPrivacy | None = None
    """Each device noises its own pictures' gains, and tells nothing else; the unit is one picture."""
    central_noise: CentralDPEvaluation | None = None
    """Devices tell the server their losses, which stores and shows a noised mean only."""

    def due(self, round: int) -> bool:
        """Whether this round's adapter is measured."""
        return self.every > 0 and round % self.every == 0

    def summary(self, round: int, replies: Sequence[Evaluation], dropped: Mapping[str, int]) -> ValidationMetrics:
        """What is kept of the replies to a round that is due, all of which `accepts` has passed."""
        told = dict(dropped)
        if (hidden := self.central_noise) is not None:
            # Noise even if nobody replied: to tell nobody from somebody is to tell of somebody.
            gain = noised_mean(
                [reply.base - reply.shared for reply in replies if reply.base is not None and reply.shared is not None],
                clip=hidden.clip,
                noise_multiplier=hidden.noise_multiplier,
                count=hidden.devices,
                noise=hidden.noise(round),
            )
            error = noise_error(clip=hidden.clip, noise_multiplier=hidden.noise_multiplier, count=hidden.devices)
            return ValidationMetrics(base=None, shared=None, gain=gain, gain_error=error, dropped=told)
        gains = {reply.device: reply.gain for reply in replies if reply.gain is not None}
        if (private := self.local_noise) is not None:
            spent = {reply.device: reply.epsilon for reply in replies if reply.epsilon is not None}
            error = noise_error(
                clip=private.clip,
                noise_multiplier=private.noise_multiplier,
                count=private.pictures,
                means=max(1, len(gains)),
            )
            most = private.clip + _FAR * noise_error(
                clip=private.clip, noise_multiplier=private.noise_multiplier, count=private.pictures
            )  # a mean of clipped gains; beyond that no honest noise takes it
            gains = {name: max(-most, min(most, gain)) for name, gain in gains.items()}
            return ValidationMetrics(
                base=None,
                shared=None,
                gain=mean(list(gains.values())),
                gain_error=error if gains else None,
                devices=gains,
                epsilon=max(spent.values(), default=None),
                spent=spent,
                dropped=told,
            )
        pairs = {r.device: (r.base, r.shared) for r in replies if r.base is not None and r.shared is not None}
        return ValidationMetrics(
            base=trimmed_mean([base for base, _ in pairs.values()]),
            shared=trimmed_mean([shared for _, shared in pairs.values()]),
            improved=trimmed_mean([(base - shared) / base for base, shared in pairs.values() if base > 0]),
            devices={name: shared for name, (_, shared) in pairs.items()},
            dropped=told,
        )

    def accepts(self, reply: Evaluation) -> bool:
        """Whether a reply is of the form asked for: a noised gain alone, or both losses alone."""
        told = (reply.base is not None, reply.shared is not None, reply.gain is not None, reply.epsilon is not None)
        return told == ((False, False, True, True) if self.local_noise else (True, True, False, False))


def measuring(config: SimulationConfig, *, simulated: bool) -> EvaluationPolicy:
    """How a run is measured: openly without privacy, else as `private_eval` says.

    Args:
        simulated: have the server's own noise reproducible, for tests and simulations only.

    Raises AntherError for privacy=both: a gain that was noised on the device shows nothing once it is clipped again.
    """
    chosen, level = config.private_eval, config.privacy
    if not (level.of_examples or level.of_devices):
        return EvaluationPolicy()
    if not chosen.interval:
        return EvaluationPolicy(every=0)
    if level.of_examples and level.of_devices:
        raise AntherError(
            f"private_eval.interval={chosen.interval}: with privacy=both a gain is noised on the device, and clipping "
            "it again at the server leaves nothing to see: set it to 0"
        )
    if level.of_examples:
        return EvaluationPolicy(
            every=chosen.interval,
            local_noise=EvaluationPrivacy(
                noise_multiplier=chosen.noise_multiplier,
                clip=chosen.clip,
                pictures=config.data.validation,
                delta=config.privacy.delta,
            ),
        )
    cohort = config.cohort
    asked = cohort.size if cohort.eval_size is None else cohort.eval_size
    return EvaluationPolicy(
        every=chosen.interval,
        central_noise=CentralDPEvaluation(
            noise_multiplier=chosen.noise_multiplier,
            clip=chosen.clip,
            devices=asked or config.data.count(),
            noise=partial(noise_source, purpose="measure", client="server", seed=config.seed if simulated else None),
        ),
    )


def evaluation_mechanisms(config: SimulationConfig) -> tuple[PoissonGaussian, ...]:
    """What the measurements of a whole run release of one unit: paid from the same ε as training."""
    chosen, level = config.private_eval, config.privacy
    times = config.rounds // chosen.interval if chosen.interval and (level.of_examples or level.of_devices) else 0
    if not times:
        return ()
    return (PoissonGaussian(noise_multiplier=chosen.noise_multiplier, sampling_rate=1.0, steps=times),)
