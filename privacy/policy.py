"""The device's own floor: the server can ask for less, never for weaker privacy."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.errors import AntherError
from privacy.accounting import Mechanism, NonPrivate, PoissonGaussian, epsilon
from protocol.messages import ExamplePrivacy, TrainingPlan


class Refusal(AntherError):  # noqa: N818 - a no is no error
    """A device's no, with its reason. The reason tells nothing of the pictures and may go to the server."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the owner of a device allows. A request beyond it is refused, never silently weakened.

    Raises:
        AntherError: a value outside its range.
    """

    max_epsilon: float | None = None
    """Cap on ε per picture of everything that the device ever shares: with one, nothing is shared without noise,
    neither an adapter nor a loss on its pictures. None: the owner asks for no privacy."""
    delta: float = 1e-5
    """δ at which `max_epsilon` is meant, whatever δ a plan asks for."""
    min_noise_multiplier: float = 0.05
    """σ below it promises nothing, and its ε takes long to compute."""
    max_rank: int = 1024
    max_steps: int = 10_000
    """In one round."""
    max_batch: int = 1024
    """Examples in one step, counting every draw."""

    def __post_init__(self) -> None:
        if self.max_epsilon is not None and not self.max_epsilon > 0:
            raise AntherError(f"policy: max_epsilon={self.max_epsilon} must be over 0")
        if not 0 < self.delta < 1:
            raise AntherError(f"policy: delta={self.delta} must lie between 0 and 1")

    def check_plan(self, plan: TrainingPlan) -> None:
        """Raises Refusal unless this plan alone is allowed; what it adds up to is for `check_spending`."""
        draws = plan.privacy.draws if plan.privacy else 1
        self.check_work(
            rank=plan.rank, steps=plan.steps, examples=plan.batch_size * draws, learning_rate=plan.learning_rate
        )
        if plan.privacy:
            self._check_privacy(plan.privacy)
        elif self.max_epsilon is not None:
            raise Refusal("this device shares nothing without example privacy")

    def check_work(self, *, rank: int, steps: int, examples: int, learning_rate: float) -> None:
        """Raises Refusal for more work than the owner allows."""
        for name, value, most in (
            ("rank", rank, self.max_rank),
            ("steps", steps, self.max_steps),
            ("examples a step", examples, self.max_batch),
        ):
            if not 1 <= value <= most:
                raise Refusal(f"{name}: {value} asked, this device allows 1 to {most}")
        if not 0 < learning_rate < math.inf:
            raise Refusal(f"learning_rate: {learning_rate} asked, must be a number over 0")

    def check_measure(self) -> None:
        """Raises Refusal if losses on one's pictures may not be told: they are a release without noise."""
        if self.max_epsilon is not None:
            raise Refusal("this device tells no measure of its pictures: a loss is shared without noise")

    def check_spending(self, past: Sequence[Mechanism], new: Mechanism) -> None:
        """Raises Refusal if `new` would bring the whole above `max_epsilon`, or could promise nothing any more."""
        if isinstance(new, PoissonGaussian) and any(isinstance(event, NonPrivate) for event in past):
            raise Refusal("this device has shared without privacy before, so no ε can be promised; start a new store")
        if self.max_epsilon is None:
            return
        cost = epsilon([*past, new], self.delta)
        if cost.value > self.max_epsilon:
            raise Refusal(f"the round would bring this device to {cost}; it allows {self.max_epsilon:g}")

    def _check_privacy(self, privacy: ExamplePrivacy) -> None:
        """Raises Refusal for parameters with which DP-SGD would promise nothing."""
        for name, valid in (
            ("noise_multiplier", self.min_noise_multiplier <= privacy.noise_multiplier < math.inf),
            ("clip", 0 < privacy.clip < math.inf),
            ("sampling_rate", 0 < privacy.sampling_rate <= 1),
            ("delta", 0 < privacy.delta < 1),
            ("draws", privacy.draws >= 1),
        ):
            if not valid:
                raise Refusal(f"privacy.{name}: {getattr(privacy, name)} asked, which promises nothing")


def load(path: Path) -> Policy:
    """The policy in a TOML file, `max_epsilon = 4.0` and so on; the default one if there is no file.

    Raises:
        AntherError: the file is not TOML, or has an unknown key or a value out of range.
    """
    if not path.exists():
        return Policy()
    try:
        return Policy(**tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        known = ", ".join(Policy.__dataclass_fields__)
        raise AntherError(f"{path}: {error}; the keys are {known}") from error
