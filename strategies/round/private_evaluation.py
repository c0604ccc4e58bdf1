"""Evaluation on devices: which rounds are evaluated, and how results are noised under privacy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from conf.schemas.federation import FederationConfig
from privacy.accounting import PoissonGaussian
from privacy.noise import NoiseSource, noise_source
from privacy.noised_gain import noise_error, noised_mean
from protocol.messages import Evaluation, EvaluationPrivacy
from strategies.round.metrics import ValidationMetrics, mean
from strategies.round.plausibility import trimmed_mean

_MAX_NOISE_STDDEVS = 8.0


@dataclass(frozen=True, kw_only=True)
class CentralDPEvaluation:
    """Server noise on the sum of the devices' mean gains; the privacy unit is one device."""

    noise_multiplier: float
    """σ: the noise on the sum is N(0, (σ·clip)²)."""
    clip: float
    """Bound on the contribution of one device's mean gain to the sum."""
    devices: int
    """Number of devices that are asked: the public divisor of the noised sum."""
    noise: Callable[[int], NoiseSource]
    """Function from a round's number to its noise source."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPolicy:
    """Schedule of evaluations on devices, and their noise: none, local or central."""

    interval: int = 1
    """Interval of evaluations, in rounds; 0: never."""
    local_noise: EvaluationPrivacy | None = None
    """Each device noises the gains of its own pictures and reports nothing else; the privacy unit is one picture."""
    central_noise: CentralDPEvaluation | None = None
    """Devices report their losses to the server, which stores and shows only a noised mean."""

    def is_due(self, round: int) -> bool:
        """Whether the adapter of this round is evaluated."""
        return self.interval > 0 and round % self.interval == 0

    def summary(self, round: int, replies: Sequence[Evaluation], dropped: Mapping[str, int]) -> ValidationMetrics:
        """Summarize the replies to an evaluation.

        Args:
            round: number of the round, for which an evaluation is due.
            replies: accepted replies (see `accepts`).
            dropped: rejected replies by reason.
        """
        dropped = dict(dropped)
        if (central := self.central_noise) is not None:
            # Noise is added even if no device replied: otherwise the result would reveal whether one did.
            gain = noised_mean(
                [reply.base - reply.shared for reply in replies if reply.base is not None and reply.shared is not None],
                clip=central.clip,
                noise_multiplier=central.noise_multiplier,
                count=central.devices,
                noise=central.noise(round),
            )
            error = noise_error(clip=central.clip, noise_multiplier=central.noise_multiplier, count=central.devices)
            return ValidationMetrics(base=None, shared=None, gain=gain, gain_error=error, dropped=dropped)
        gains = {reply.device: reply.gain for reply in replies if reply.gain is not None}
        if (local := self.local_noise) is not None:
            spent = {reply.device: reply.epsilon for reply in replies if reply.epsilon is not None}
            error = noise_error(
                clip=local.clip,
                noise_multiplier=local.noise_multiplier,
                count=local.pictures,
                means=max(1, len(gains)),
            )
            limit = local.clip + _MAX_NOISE_STDDEVS * noise_error(
                clip=local.clip, noise_multiplier=local.noise_multiplier, count=local.pictures
            )  # a mean of clipped gains plus noise exceeds it only if it is false
            gains = {name: max(-limit, min(limit, gain)) for name, gain in gains.items()}
            return ValidationMetrics(
                base=None,
                shared=None,
                gain=mean(list(gains.values())),
                gain_error=error if gains else None,
                devices=gains,
                epsilon=max(spent.values(), default=None),
                spent=spent,
                dropped=dropped,
            )
        pairs = {r.device: (r.base, r.shared) for r in replies if r.base is not None and r.shared is not None}
        return ValidationMetrics(
            base=trimmed_mean([base for base, _ in pairs.values()]),
            shared=trimmed_mean([shared for _, shared in pairs.values()]),
            improved=trimmed_mean([(base - shared) / base for base, shared in pairs.values() if base > 0]),
            devices={name: shared for name, (_, shared) in pairs.items()},
            dropped=dropped,
        )

    def accepts(self, reply: Evaluation) -> bool:
        """Whether a reply has the requested values: only a noised gain with its ε, or only both losses."""
        present = (reply.base is not None, reply.shared is not None, reply.gain is not None, reply.epsilon is not None)
        return present == ((False, False, True, True) if self.local_noise else (True, True, False, False))


def evaluation_policy(config: FederationConfig, *, simulated: bool) -> EvaluationPolicy:
    """Build the evaluation policy of a run: without noise if the run isn't private, otherwise as in `private_eval`.

    Args:
        config: configuration of the run.
        simulated: use reproducible server noise; for tests and simulations only.
    """
    settings, level = config.private_eval, config.privacy
    if not (level.of_examples or level.of_devices):
        return EvaluationPolicy()
    if not settings.interval:
        return EvaluationPolicy(interval=0)
    if level.of_examples:
        return EvaluationPolicy(
            interval=settings.interval,
            local_noise=EvaluationPrivacy(
                noise_multiplier=settings.noise_multiplier,
                clip=settings.clip,
                pictures=config.data.validation,
                delta=config.privacy.delta,
            ),
        )
    cohort = config.cohort
    size = cohort.size if cohort.eval_size is None else cohort.eval_size
    return EvaluationPolicy(
        interval=settings.interval,
        central_noise=CentralDPEvaluation(
            noise_multiplier=settings.noise_multiplier,
            clip=settings.clip,
            devices=size or config.data.count(),
            noise=partial(noise_source, purpose="measure", client="server", seed=config.seed if simulated else None),
        ),
    )


def evaluation_mechanisms(config: FederationConfig) -> tuple[PoissonGaussian, ...]:
    """Return the releases of all evaluations of a run, which are paid from the same ε as training."""
    settings, level = config.private_eval, config.privacy
    count = config.rounds // settings.interval if settings.interval and (level.of_examples or level.of_devices) else 0
    if not count:
        return ()
    return (PoissonGaussian(noise_multiplier=settings.noise_multiplier, sampling_rate=1.0, steps=count),)
