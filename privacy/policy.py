"""Policy of a device's owner: the server may request less than it allows, but never weaker privacy.

The policy is `policy.toml` next to the device's store, edited by its owner. Missing keys, and a missing file, mean
these defaults:

- The device takes part in runs without privacy until it first takes part in one with privacy. From then on it refuses
  every request to share without noise, or to exceed ε = `DEFAULT_MAX_EPSILON` per picture. So a run's guarantee can't
  be revoked by a later run.
- If the owner sets `max_epsilon`, privacy is required from the beginning: nothing is shared without noise.

A refusal states the request and the limit, which the server may know, and nothing about the pictures. With
fewer than `min_pictures`, a device refuses to share without noise; if asked with noise, it trains on no picture and
replies with noise only (`client.rounds.train`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path

from common import strict_json
from common.errors import AntherError
from privacy.accounting import Mechanism, NonPrivate, PoissonGaussian, epsilon
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, TrainingPlan

DEFAULT_MAX_EPSILON = 16.0
"""Cap on ε if the owner sets none: at δ = 1e-5 enough for one run of ε = 8 at δ = 1e-3, and not for two."""

MEASURES = ("none", "noised", "raw")
MAX_PICTURES = 100_000
"""Maximum number of pictures that a private request may assume: it determines memory and time on every device."""
_MAX_NOISE_MULTIPLIER = 1e6  # more noise hides every signal, and much more overflows


class RequestRefusedError(AntherError):
    """Raised if a device refuses a request. The reason reveals nothing about the pictures and may be sent to the
    server."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Limits that the owner of a device sets. A request beyond them is refused, never silently weakened.

    Raises:
        AntherError: a value is out of range.
    """

    max_epsilon: float | None = None
    """Cap on ε per picture of everything that the device ever shares. With a cap, nothing is shared without noise,
    neither an adapter nor a loss on its pictures. None: see the module's docstring."""
    delta: float = 1e-5
    """δ at which ε is compared with the cap, for any δ of a plan."""
    min_noise_multiplier: float = 0.05
    """Minimum σ. A smaller one gives no meaningful guarantee, and its ε takes long to compute."""
    max_clip: float = 100.0
    """Maximum clip of a gradient, and of a gain."""
    min_pictures: int = 1
    """Minimum number of training pictures: with fewer, none of them is used for anything that is shared."""
    sites: str = ".*"
    """Layers that may have an adapter: attention, linear, all, or a regular expression for their full names, e.g.
    `.*attn[12].*`."""
    bases: tuple[str, ...] = ()
    """Content hashes of the bases that may be adapted. Empty: any base on the device."""
    measures: str = "raw"
    """Maximum information that may be reported about an adapter's loss on the pictures: nothing (`none`), a noised
    gain, charged to the same ε (`noised`), or exact losses (`raw`), if sharing without noise is allowed."""
    max_rank: int = 1024
    max_steps: int = 10_000
    """Maximum number of optimizer steps per round."""
    max_batch: int = 1024
    """Maximum number of examples per step, counting every draw."""
    max_learning_rate: float = 10.0
    """Maximum learning rate of both optimizers: AdamW takes steps of about its learning rate, and plain SGD seldom
    needs more."""
    max_timesteps: int = 32
    """Maximum number of timesteps at which the loss of a picture is measured."""
    min_sampling_rate: float = 1e-4
    """Minimum q. A smaller one gives no further amplification, and its ε takes long to compute."""

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
            ("min_sampling_rate", 0 < self.min_sampling_rate <= 1, "over 0 and at most 1"),
        ):
            if not valid:
                raise AntherError(f"policy: {name}={getattr(self, name)} must be {rule}")

    def check_adaptable(self, base: str, sites: Iterable[str], named_sites: Mapping[str, Collection[str]]) -> None:
        """Raise RequestRefusedError unless adapters of this base at all of these sites are allowed.

        Args:
            base: content hash of the base.
            sites: names of the adapted layers.
            named_sites: those of them that each name means.
        """
        if self.bases and base not in self.bases:
            raise RequestRefusedError(f"base {base[:12]} is not among those that this device allows")
        named = named_sites.get(self.sites)
        allowed = re.compile(self.sites).fullmatch if named is None else named.__contains__
        if forbidden := next(filterfalse(allowed, sites), None):
            raise RequestRefusedError(f"site {forbidden}: this device allows {self.sites}")

    def check_plan(self, plan: TrainingPlan) -> None:
        """Raise RequestRefusedError unless this plan is allowed by itself; `check_spending` checks its composition."""
        draws = plan.privacy.draws if plan.privacy else 1
        self.check_work(
            rank=plan.rank, steps=plan.steps, examples=plan.batch_size * draws, learning_rate=plan.learning_rate
        )
        if plan.privacy:
            self._check_privacy(plan, plan.privacy)
        elif self.max_epsilon is not None:
            raise RequestRefusedError("this device shares nothing without example privacy")

    def check_work(self, *, rank: int, steps: int, examples: int, learning_rate: float) -> None:
        """Raise RequestRefusedError for more work than the owner allows.

        Args:
            rank: rank of the adapter.
            steps: steps of the round.
            examples: examples per step, counting every draw.
            learning_rate: learning rate.
        """
        for name, value, limit in (
            ("rank", rank, self.max_rank),
            ("steps", steps, self.max_steps),
            ("examples per step", examples, self.max_batch),
        ):
            if not 1 <= value <= limit:
                raise RequestRefusedError(f"{name}={value}: this device allows 1 to {limit}")
        if not 0 < learning_rate <= self.max_learning_rate:
            raise RequestRefusedError(
                f"learning_rate={learning_rate}: this device allows up to {self.max_learning_rate:g}"
            )

    def check_timesteps(self, timesteps: int) -> None:
        """Raise RequestRefusedError for more timesteps per picture than the owner allows."""
        if not 1 <= timesteps <= self.max_timesteps:
            raise RequestRefusedError(f"timesteps={timesteps}: this device allows 1 to {self.max_timesteps}")

    def check_evaluation(self, privacy: EvaluationPrivacy | None) -> None:
        """Raise RequestRefusedError unless losses on the pictures may be reported with this noise; None: exact
        losses."""
        if self.measures == "none":
            raise RequestRefusedError("this device reports no losses on its pictures")
        if privacy is None:
            if self.measures != "raw" or self.max_epsilon is not None:
                raise RequestRefusedError("this device reports no losses on its pictures without noise")
            return
        self._check_noise(privacy)
        if not 1 <= privacy.pictures <= MAX_PICTURES:
            raise RequestRefusedError(f"privacy.pictures={privacy.pictures}: must be 1 to {MAX_PICTURES:,}")

    def check_pictures(self, count: int) -> None:
        """Raise RequestRefusedError for fewer training pictures than the owner's minimum."""
        if count < self.min_pictures:
            raise RequestRefusedError("this device's own minimum of pictures is not met")

    def promises_privacy(self, past: Iterable[Mechanism]) -> bool:
        """Whether everything that is shared must be private: by the owner's cap, or after an earlier private
        release."""
        return self.max_epsilon is not None or any(isinstance(event, PoissonGaussian) for event in past)

    def check_spending(self, past: Sequence[Mechanism], new: Mechanism) -> None:
        """Raise RequestRefusedError if `new` exceeds the cap together with `past`, or breaks an earlier guarantee."""
        if isinstance(new, NonPrivate):
            if self.max_epsilon is not None:
                raise RequestRefusedError("this device shares nothing without example privacy")
            if any(isinstance(event, PoissonGaussian) for event in past):
                raise RequestRefusedError(
                    "this device has shared with example privacy before, and shares nothing without it since"
                )
            return
        if any(isinstance(event, NonPrivate) for event in past):
            raise RequestRefusedError("this device has shared without privacy before, so no ε can be promised anymore")
        cap = DEFAULT_MAX_EPSILON if self.max_epsilon is None else self.max_epsilon
        cost = epsilon([*past, new], self.delta)
        if cost.value > cap:
            raise RequestRefusedError(f"it would bring this device to {cost}; it allows {cap:g}")

    def _check_privacy(self, plan: TrainingPlan, privacy: ExamplePrivacy) -> None:
        """Raise RequestRefusedError for parameters with which DP-SGD gives no meaningful guarantee."""
        self._check_noise(privacy)
        rate = privacy.sampling_rate
        if not self.min_sampling_rate <= rate <= 1:
            raise RequestRefusedError(
                f"privacy.sampling_rate={rate}: this device allows {self.min_sampling_rate:g} to 1"
            )
        if plan.batch_size > MAX_PICTURES * rate:
            raise RequestRefusedError(f"batch_size, privacy.sampling_rate: imply over {MAX_PICTURES:,} pictures")
        if privacy.draws < 1:
            raise RequestRefusedError(f"privacy.noise_multiplicity={privacy.draws}: must be 1 or more")

    def _check_noise(self, privacy: ExamplePrivacy | EvaluationPrivacy) -> None:
        sigma, minimum = privacy.noise_multiplier, self.min_noise_multiplier
        if not minimum <= sigma <= _MAX_NOISE_MULTIPLIER:
            raise RequestRefusedError(
                f"privacy.noise_multiplier={sigma}: this device allows {minimum:g} to {_MAX_NOISE_MULTIPLIER:g}"
            )
        if not 0 < privacy.clip <= self.max_clip:
            raise RequestRefusedError(f"privacy.clip_norm={privacy.clip}: this device allows up to {self.max_clip:g}")
        if not 0 < privacy.delta < 1:
            raise RequestRefusedError(f"privacy.delta={privacy.delta}: must be between 0 and 1")


def load(path: Path) -> Policy:
    """Load a policy from a TOML file (`max_epsilon = 4.0` and so on), or the default policy if there is no file.

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
    except ValueError as error:  # from TOML, UTF-8 or a type
        raise AntherError(f"{path}: {error}; the keys are {', '.join(default)}") from error


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
