"""The device's own floor: the server can ask for less, never for weaker privacy.

It is `policy.toml` beside the device's store, written by its owner's hand. What is not in it has these defaults, which
are also those of a device without the file:

- It takes part in runs without privacy until it has first taken part in one with privacy. From then on it shares
  nothing without noise, whatever it is asked for, and nothing that would bring it over ε = EPSILON_UNSAID per picture.
  So the first run decides, and no later one can take back what that promised.
- Whoever writes `max_epsilon` has asked for privacy from the beginning: nothing at all is shared without noise.

A refusal says what was asked for and what is allowed, both of which are the server's business, and of the pictures
nothing. With fewer than `min_pictures` a device refuses to share without noise; asked with noise it trains on none, and
replies with noise alone (`client.rounds.train`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path

from common import strict_json
from common.errors import AntherError
from privacy.accounting import Mechanism, NonPrivate, PoissonGaussian, epsilon
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, TrainingPlan

DEFAULT_MAX_EPSILON = 16.0
"""Cap of an owner who named none: at δ = 1e-5 it is room for one run of ε = 8 at δ = 1e-3, and not for two."""

MEASURES = ("none", "noised", "raw")
MOST_PICTURES = 100_000
"""That a private request may assume a device to have: it takes memory and time for as many, whatever it has."""
_LOUDEST = 1e6  # σ: more drowns everything, and much more overflows


class RequestRefusedError(AntherError):
    """A device's no, with its reason. The reason tells nothing of the pictures and may go to the server."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the owner of a device allows. A request beyond it is refused, never silently weakened.

    Raises:
        AntherError: a value outside its range.
    """

    max_epsilon: float | None = None
    """Cap on ε per picture of everything that the device ever shares: with one, nothing is shared without noise,
    neither an adapter nor a loss on its pictures. None: see above."""
    delta: float = 1e-5
    """δ at which the cap is meant, whatever δ a plan asks for."""
    min_noise_multiplier: float = 0.05
    """σ below it promises nothing, and its ε takes long to compute."""
    max_clip: float = 100.0
    """Bound on the clip of a gradient, and of a gain."""
    min_pictures: int = 1
    """Training pictures below which none of them enters what is shared."""
    sites: str = ".*"
    """Regular expression on the whole names of the layers that an adapter may sit at, e.g. `.*attn[12].*`."""
    bases: tuple[str, ...] = ()
    """Content hashes of the bases that may be adapted; none: whichever the device holds."""
    measures: str = "raw"
    """The most that may be told of how an adapter does on its pictures: nothing (`none`), a gain with noise, paid from
    the same ε (`noised`), or losses as they are (`raw`), if nothing forbids sharing without noise."""
    max_rank: int = 1024
    max_steps: int = 10_000
    """In one round."""
    max_batch: int = 1024
    """Examples in one step, counting every draw."""
    max_learning_rate: float = 10.0
    """Of either optimizer: AdamW takes steps of about its rate, and plain SGD seldom needs more."""
    max_timesteps: int = 32
    """At which the loss of a picture is measured."""
    min_sampling_rate: float = 1e-4
    """q below it hides nothing more, and its ε takes long to compute."""

    def __post_init__(self) -> None:
        cap = self.max_epsilon
        for name, valid, rule in (
            ("max_epsilon", cap is None or 0 < cap < math.inf, "over 0"),
            ("delta", 0 < self.delta < 1, "between 0 and 1"),
            ("min_noise_multiplier", 0 < self.min_noise_multiplier < math.inf, "over 0"),
            ("max_clip", 0 < self.max_clip < math.inf, "over 0"),
            ("min_pictures", self.min_pictures >= 0, "0 or more"),
            ("sites", _compiles(self.sites), "a regular expression"),
            ("bases", all(re.fullmatch("[0-9a-f]{64}", base) for base in self.bases), "hashes of 64 hex digits"),
            ("measures", self.measures in MEASURES, f"one of {', '.join(MEASURES)}"),
            ("max_rank", self.max_rank >= 1, "1 or more"),
            ("max_steps", self.max_steps >= 1, "1 or more"),
            ("max_batch", self.max_batch >= 1, "1 or more"),
            ("max_learning_rate", 0 < self.max_learning_rate < math.inf, "over 0"),
            ("max_timesteps", self.max_timesteps >= 1, "1 or more"),
            ("min_sampling_rate", 0 < self.min_sampling_rate <= 1, "over 0, and 1 at most"),
        ):
            if not valid:
                raise AntherError(f"policy: {name}={getattr(self, name)} must be {rule}")

    def check_adaptable(self, base: str, sites: Iterable[str]) -> None:
        """Raises Refusal unless adapters may be had for this base, and sit at all of these sites."""
        if self.bases and base not in self.bases:
            raise RequestRefusedError(f"base {base[:12]} is not among those that this device allows")
        allowed = re.compile(self.sites)
        if forbidden := next(filterfalse(allowed.fullmatch, sites), None):
            raise RequestRefusedError(f"site {forbidden}: this device allows {self.sites}")

    def check_plan(self, plan: TrainingPlan) -> None:
        """Raises Refusal unless this plan alone is allowed; what it adds up to is for `check_spending`."""
        draws = plan.privacy.draws if plan.privacy else 1
        self.check_work(
            rank=plan.rank, steps=plan.steps, examples=plan.batch_size * draws, learning_rate=plan.learning_rate
        )
        if plan.privacy:
            self._check_privacy(plan, plan.privacy)
        elif self.max_epsilon is not None:
            raise RequestRefusedError("this device shares nothing without example privacy")

    def check_work(self, *, rank: int, steps: int, examples: int, learning_rate: float) -> None:
        """Raises Refusal for more work than the owner allows."""
        for name, value, most in (
            ("rank", rank, self.max_rank),
            ("steps", steps, self.max_steps),
            ("examples a step", examples, self.max_batch),
        ):
            if not 1 <= value <= most:
                raise RequestRefusedError(f"{name}: {value} asked, this device allows 1 to {most}")
        if not 0 < learning_rate <= self.max_learning_rate:
            raise RequestRefusedError(
                f"learning_rate: {learning_rate} asked, this device allows up to {self.max_learning_rate:g}"
            )

    def check_timesteps(self, timesteps: int) -> None:
        """Raises Refusal for more looks at each picture than the owner allows."""
        if not 1 <= timesteps <= self.max_timesteps:
            raise RequestRefusedError(f"timesteps: {timesteps} asked, this device allows 1 to {self.max_timesteps}")

    def check_measure(self, privacy: EvaluationPrivacy | None) -> None:
        """Raises Refusal if so much may not be told of an adapter's losses; None: all, without noise."""
        if self.measures == "none":
            raise RequestRefusedError("this device tells no measure of its pictures")
        if privacy is None:
            if self.measures != "raw" or self.max_epsilon is not None:
                raise RequestRefusedError("this device tells no measure of its pictures without noise")
            return
        self._check_noise(privacy)
        if not 1 <= privacy.pictures <= MOST_PICTURES:
            raise RequestRefusedError(f"privacy.pictures: {privacy.pictures} asked, must be 1 to {MOST_PICTURES:,}")

    def check_pictures(self, count: int) -> None:
        """Raises Refusal for fewer training pictures than the owner wants to hide each one among."""
        if count < self.min_pictures:
            raise RequestRefusedError("this device's own minimum of pictures is not met")

    def promises(self, past: Iterable[Mechanism]) -> bool:
        """Whether privacy is promised: by the owner's cap, or by what was shared before."""
        return self.max_epsilon is not None or any(isinstance(event, PoissonGaussian) for event in past)

    def check_spending(self, past: Sequence[Mechanism], new: Mechanism) -> None:
        """Raises Refusal if `new` would bring the whole above the cap, or is less than what was promised before."""
        if isinstance(new, NonPrivate):
            if self.max_epsilon is not None:
                raise RequestRefusedError("this device shares nothing without example privacy")
            if any(isinstance(event, PoissonGaussian) for event in past):
                raise RequestRefusedError(
                    "this device has shared with example privacy before, and shares nothing without it since"
                )
            return
        if any(isinstance(event, NonPrivate) for event in past):
            raise RequestRefusedError("this device has shared without privacy before, so no ε can be promised any more")
        cap = DEFAULT_MAX_EPSILON if self.max_epsilon is None else self.max_epsilon
        cost = epsilon([*past, new], self.delta)
        if cost.value > cap:
            raise RequestRefusedError(f"it would bring this device to {cost}; it allows {cap:g}")

    def _check_privacy(self, plan: TrainingPlan, privacy: ExamplePrivacy) -> None:
        """Raises Refusal for parameters with which DP-SGD would promise nothing."""
        self._check_noise(privacy)
        rate = privacy.sampling_rate
        if not self.min_sampling_rate <= rate <= 1:
            raise RequestRefusedError(
                f"privacy.sampling_rate: {rate} asked, this device allows {self.min_sampling_rate:g} to 1"
            )
        if plan.batch_size > MOST_PICTURES * rate:
            raise RequestRefusedError(f"batch_size, privacy.sampling_rate: they assume over {MOST_PICTURES:,} pictures")
        if privacy.draws < 1:
            raise RequestRefusedError(f"privacy.noise_multiplicity: {privacy.draws} asked, which promises nothing")

    def _check_noise(self, privacy: ExamplePrivacy | EvaluationPrivacy) -> None:
        sigma, least = privacy.noise_multiplier, self.min_noise_multiplier
        if not least <= sigma <= _LOUDEST:
            raise RequestRefusedError(
                f"privacy.noise_multiplier: {sigma} asked, this device allows {least:g} to {_LOUDEST:g}"
            )
        if not 0 < privacy.clip <= self.max_clip:
            raise RequestRefusedError(
                f"privacy.clip_norm: {privacy.clip} asked, this device allows up to {self.max_clip:g}"
            )
        if not 0 < privacy.delta < 1:
            raise RequestRefusedError(f"privacy.delta: {privacy.delta} asked, which promises nothing")


def load(path: Path) -> Policy:
    """The policy in a TOML file, `max_epsilon = 4.0` and so on; the default one if there is no file.

    Raises:
        AntherError: the file is not TOML, or has an unknown key or a value of another type or out of range.
    """
    if not path.exists():
        return Policy()
    default = dataclasses.asdict(Policy()) | {"bases": []}
    try:
        return strict_json.from_plain(Policy, default | tomllib.loads(path.read_text(encoding="utf-8")), "policy")
    except AntherError as error:
        raise AntherError(f"{path}: {error}") from error
    except ValueError as error:  # of TOML, of UTF-8, of a type
        raise AntherError(f"{path}: {error}; the keys are {', '.join(default)}") from error


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
