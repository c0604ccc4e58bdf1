"""The few things that a server and a device say to each other.

Each is a frozen dataclass of plain values, so that it travels as JSON and can be checked field by field.
Adapters travel beside them as bytes of `protocol.tensor_codec`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from common import strict_json
from common.errors import AntherError
from protocol import limits

OLDEST, NEWEST = 2, 2
"""Versions of this protocol that are spoken here. A message names the one that it is written in; whoever doesn't speak
it says who has to update, and nothing of the message is read.

1: a device took sites and timesteps from its server's configuration. 2: they are fields of the messages."""

MAX_JSON_CHARS = 128 * 1024
"""Characters of a message's JSON; the longest that we write names every site of a base twice, each about 40,000."""


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What a device tells of itself: coarse on purpose, since fine traces identify people."""

    device: str
    """The device's own stable name; randomness is keyed by it, never by Flower's node id."""
    base: str
    """Content hash of the base that it holds."""
    profile: str
    """Kind of hardware, e.g. `pi4_4gb`."""
    memory_gib: float
    examples_per_second: float
    """Training examples (forward and backward) per second, measured or from its profile."""
    watts: float
    """Power while training, measured or estimated."""
    uplink_mbps: float
    downlink_mbps: float
    metered: bool = False
    battery: float | None = None
    """What is left of a full one, in fifths; None: the device has none."""
    battery_wh: float | None = None
    """What a full one holds, by the kind of device; None: it has none, or nobody knows."""
    charging: bool = False
    busy: bool = False
    """Its owner uses it."""
    hot: bool = False
    """It runs slower than it could, or is about to."""
    rank: int | None = None
    """The highest that it trains; None: any."""
    sites: tuple[str, ...] | None = None
    """The only ones that it trains; None: any."""
    pictures: bool = True
    """Whether it has any to train on. Where privacy is promised it says so always: to tell would tell of them."""


@dataclass(frozen=True, kw_only=True)
class ExamplePrivacy:
    """DP-SGD on the device: adversary is everyone else, the unit is one picture, add/remove-one.

    A plan that carries a seed does not exist: whoever knows the noise seed can subtract the noise.
    """

    noise_multiplier: float
    """σ: each step adds N(0, (σ·clip)² I) to the sum of clipped gradients."""
    clip: float
    """C: bound on the norm of one picture's gradient."""
    sampling_rate: float
    """q of the Poisson batch."""
    draws: int
    """Noise multiplicity: (t, ε) draws per picture, averaged before the clip."""
    delta: float


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What one device is asked to do in one round."""

    run: str
    round: int
    base: str
    rank: int
    """Rank that the device trains; directions of the sent adapter beyond it stay frozen beside it."""
    trains: str = "both"
    """What is trained of the factors, and comes back: `both`; `a` or `b` alone; `cores`, C [rank, rank] of B = L C,
    where L travels beside the adapter; or `split`, both, of which B stays on the device and is its own."""
    sites: tuple[str, ...] | None = None
    """Names of the sites that the device trains; what was sent of the others stays frozen beside them. None: all."""
    steps: int
    batch_size: int
    """Examples a step; under DP the public constant that the noised sum is divided by."""
    learning_rate: float
    optimiser: str = "adamw"
    """Of the device's steps: `adamw` or `sgd`."""
    proximal: float = 0.0
    """μ of FedProx: the loss has μ/2 ‖w − w_t‖² beside it, with w_t where the round begins."""
    scaffold: bool = False
    """Correct gradients by control variates (`models.lora.scaffold`): the server's travels beside the adapter."""
    privacy: ExamplePrivacy | None = None
    update: str = "fp32"
    """How the result comes back: `fp32`, as it is; `fp16`, `int8` or `int4`, what training changed, rounded so
    (`protocol.quantization`)."""
    keep: float = 1.0
    """Share of a rounded change that is sent, its largest blocks."""
    feedback: bool = False
    """Add what rounding left of the last round's change to this one's: directions keep their meaning."""


@dataclass(frozen=True, kw_only=True)
class QuantizedFormat:
    """How an adapter that isn't sent whole is to be read (`protocol.quantization`)."""

    precision: str
    """`fp16`, `int8` or `int4`."""
    rank: int
    """Of every site: the bytes don't say."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the shared adapter by this plan, starting from the adapter sent."""

    plan: TrainingPlan
    adapter: bytes
    rounded: QuantizedFormat | None = None
    """None: `adapter` is whole."""
    adapted: tuple[str, ...] | None = None
    """As of a Query."""
    echo: int = 0
    """Events in the device's ledger when the server last heard of it. A ledger with fewer was rolled back, and its
    device refuses; more of them permit nothing."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What the plan has trained, at its rank and sites, and what that cost.

    In the precision that the plan asks for: what isn't fp32 is their change from what was sent.
    """

    device: str
    run: str
    round: int
    rank: int
    adapter: bytes
    release: bool
    """False when simulated noise was used: a server that is not itself in test mode rejects it."""
    seconds: float
    joules: float
    quality: str
    """How seconds and joules were had: `measured` or `estimate`."""
    loss: float | None
    """Mean training loss; None under DP: it was not noised."""
    epsilon: float | None
    """What the ledger has composed to so far, per picture at the plan's δ; None without DP."""
    events: int
    """In the device's ledger now: the server echoes it (`Train.echo`)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPrivacy:
    """The Gaussian mechanism on a sum of gains, each clipped to [−clip, clip]; the unit is one picture."""

    noise_multiplier: float
    """σ: the sum gets N(0, (σ·clip)²)."""
    clip: float
    """Bound on what one picture's loss can fall or rise by."""
    pictures: int
    """The public constant that the noised sum is divided by."""
    delta: float


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure the sent adapter on the device's own validation pictures."""

    run: str
    round: int
    adapter: bytes
    rounded: QuantizedFormat | None = None
    """As of a Train."""
    adapted: tuple[str, ...] | None = None
    """As of a Query."""
    timesteps: int = 3
    """Fixed timesteps at which the loss of each picture is measured."""
    privacy: EvaluationPrivacy | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean validation loss of the base and of the adapter sent; or, if it was asked for with privacy, a noised gain."""

    device: str
    round: int
    base: float | None
    shared: float | None
    gain: float | None = None
    """Mean over pictures of what the adapter takes off the base's loss, clipped and noised on the device."""
    release: bool = True
    """As of an Update; only meant for a noised gain."""
    epsilon: float | None = None
    """As of an Update, with what this gain cost; None without a noised one."""


@dataclass(frozen=True, kw_only=True)
class Personalize:
    """Train the personal adapter on top of the shared one sent; nothing of it comes back."""

    run: str
    round: int
    adapter: bytes
    rank: int
    steps: int
    batch_size: int
    learning_rate: float
    look_every: int
    """Steps between two looks at the validation pictures, which keep the best adapter."""
    patience: int
    """Looks without improvement before training ends."""
    rounded: QuantizedFormat | None = None
    """As of a Train."""
    adapted: tuple[str, ...] | None = None
    """As of a Query."""
    timesteps: int = 3
    """As of an Evaluate."""


@dataclass(frozen=True, kw_only=True)
class Personalized:
    """The device has a personal adapter now; its cost, and no measure of its pictures."""

    device: str
    seconds: float
    joules: float
    quality: str


@dataclass(frozen=True, kw_only=True)
class Query:
    """Ask a device for its report."""

    adapted: tuple[str, ...] | None = None
    """Names of the base's layers that adapters of this run sit at; None: those that the base's family adapts."""


Request = Query | Train | Evaluate | Personalize
Reply = DeviceReport | Update | Evaluation | Personalized

T = TypeVar("T", DeviceReport, Update, Evaluation, Personalized, Query, Train, Evaluate, Personalize)


def payloads(message: Request | Reply) -> dict[str, bytes]:
    """The fields that travel beside the JSON, by name: those whose value is bytes."""
    return {name: value for name, value in vars(message).items() if isinstance(value, bytes)}


def to_json(message: Request | Reply) -> str:
    """Every field but the payloads. ValueError for a number that is not finite."""
    beside = payloads(message)
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return strict_json.dumps({name: value for name, value in fields.items() if name not in beside})


def from_json(kind: type[T], text: str, **beside: bytes) -> T:
    """The message that `to_json` wrote, with its payloads by name.

    Raises AntherError, naming the field, for an unknown or missing one, a wrong type, a number that is not finite, or
    what `protocol.limits` allows nobody to say.
    """
    if len(text) > MAX_JSON_CHARS:
        raise AntherError(f"{kind.__name__}: a message of {len(text)} characters is too long")
    try:
        found = strict_json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        if twice := found.keys() & beside.keys():
            raise ValueError(f"{min(twice)}: travels beside the JSON, not in it")
        message = strict_json.from_plain(kind, found | beside, kind.__name__)
        limits.check(message)
        return message
    except ValueError as error:
        raise AntherError(f"malformed message: {error}") from None
