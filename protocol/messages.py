"""The messages between the server and a device.

Each is a frozen dataclass of plain values, so that it can be sent as JSON and checked field by field. Adapters are sent
next to the JSON as bytes of `protocol.tensor_codec`. Field names are the wire format.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from common import strict_json
from common.errors import AntherError
from protocol import limits

OLDEST, NEWEST = 3, 3
"""Supported versions of this protocol. Each message contains its version. A receiver that doesn't support it reports
which side has to update, and parses nothing else of the message.

1: devices read sites and timesteps from the server's configuration. 2: sites and timesteps are fields of the messages.
3: so is the method of personalization.
"""

MAX_JSON_CHARS = 128 * 1024
"""Maximum number of characters of a message's JSON. Our longest messages contain the names of all sites of a base
twice, about 40,000 characters each.
"""


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """State of a device, coarse on purpose, since detailed traces identify people."""

    device: str
    """The device's own stable name, which keys its randomness; never Flower's node id."""
    base: str
    """Content hash of the device's base."""
    profile: str
    """Type of hardware, e.g. `pi4_4gb`."""
    memory_gib: float
    examples_per_second: float
    """Training examples (forward and backward) per second, measured or from its profile."""
    watts: float
    """Power in watts while training, measured or estimated."""
    uplink_mbps: float
    downlink_mbps: float
    metered: bool = False
    battery: float | None = None
    """Remaining charge as a fraction, in steps of one fifth. None: no battery."""
    battery_wh: float | None = None
    """Capacity in watt-hours, by type of device. None: no battery, or unknown."""
    charging: bool = False
    busy: bool = False
    """Whether its owner uses the device."""
    hot: bool = False
    """Whether the device throttles, or is about to."""
    rank: int | None = None
    """Maximum rank that the device trains. None: any."""
    sites: tuple[str, ...] | None = None
    """Sites that the device can train. None: any."""
    pictures: bool = True
    """Whether the device has pictures to train on. Always True where privacy is guaranteed: the answer would reveal
    them.
    """


@dataclass(frozen=True, kw_only=True)
class ExamplePrivacy:
    """DP-SGD on the device. The adversary is everyone else, the unit is one picture, the relation is add/remove-one.

    There is no seed in a plan: with the seed of the noise, the noise could be subtracted.
    """

    noise_multiplier: float
    """σ: each step adds N(0, (σ·clip)² I) to the sum of clipped gradients."""
    clip: float
    """C: bound on the L2 norm of one picture's gradient."""
    sampling_rate: float
    """q of the Poisson batches."""
    draws: int
    """Noise multiplicity: (t, ε) draws per picture, averaged before clipping."""
    delta: float


@dataclass(frozen=True, kw_only=True)
class MethodOption:
    """Argument of a method's constructor."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class PersonalizationMethod:
    """Method of `training.personalization`."""

    name: str = "lora"
    options: tuple[MethodOption, ...] = ()

    def arguments(self) -> dict[str, float]:
        """Return the options by name."""
        return {option.name: option.value for option in self.options}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The work of one device in one round."""

    run: str
    round: int
    base: str
    rank: int
    """Rank that the device trains. Further directions of the sent adapter are applied but frozen."""
    trains: str = "both"
    """Factors that are trained and sent back: `both`; `a` or `b` only; `cores`, which are C [rank, rank] of B = L C,
    where L is sent with the adapter; or `split`, where both are trained, but B stays on the device.
    """
    sites: tuple[str, ...] | None = None
    """Names of the sites that the device trains; other sites of the sent adapter are applied but frozen. None: all."""
    steps: int
    batch_size: int
    """Examples per step; under DP the public constant that the noised sum is divided by."""
    learning_rate: float
    optimiser: str = "adamw"
    """Optimizer on the device: `adamw` or `sgd`."""
    proximal: float = 0.0
    """μ of FedProx: μ/2 ‖w − w_t‖² is added to the loss, with w_t at the start of the round."""
    scaffold: bool = False
    """Correct gradients by control variates (`models.lora.scaffold`). The server's are sent with the adapter."""
    personalization: PersonalizationMethod | None = None
    """Method that takes part in the round; None: the adapter is trained as it is."""
    privacy: ExamplePrivacy | None = None
    update: str = "fp32"
    """Format of the result: `fp32`, the adapter itself; or `fp16`, `int8` or `int4`, its quantized change
    (`protocol.quantization`).
    """
    keep: float = 1.0
    """Fraction of the blocks of a quantized change that is sent, those with the largest norms."""
    feedback: bool = False
    """Error feedback: add the quantization error of the last round to this round's change. Requires that directions
    keep their meaning between rounds.
    """


@dataclass(frozen=True, kw_only=True)
class QuantizedFormat:
    """Format of an adapter that is sent quantized (`protocol.quantization`)."""

    precision: str
    """`fp16`, `int8` or `int4`."""
    rank: int
    """Rank of every site, which the bytes don't contain."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the shared adapter by a plan, starting from the sent adapter."""

    plan: TrainingPlan
    adapter: bytes
    rounded: QuantizedFormat | None = None
    """None: `adapter` is not quantized."""
    adapted: tuple[str, ...] | None = None
    """See `Query.adapted`."""
    echo: int = 0
    """Number of events in the device's ledger according to its last reply. If the ledger has fewer events, it was
    rolled back, and the device refuses. Otherwise the number has no effect: it never grants budget.
    """


@dataclass(frozen=True, kw_only=True)
class Update:
    """Result of a plan, with its rank and sites, and its cost.

    Unless the plan's `update` is `fp32`, `adapter` is the change from the sent adapter.
    """

    device: str
    run: str
    round: int
    rank: int
    adapter: bytes
    release: bool
    """False if simulated noise was used. A server that is not in test mode rejects such an update."""
    seconds: float
    joules: float
    quality: str
    """Source of seconds and joules: `measured` or `estimate`."""
    loss: float | None
    """Mean training loss. None under DP, since it is not noised."""
    epsilon: float | None
    """ε of the composition of the device's ledger, per picture at the plan's δ. None without DP."""
    events: int
    """Number of events in the device's ledger now, which the server echoes (`Train.echo`)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPrivacy:
    """The Gaussian mechanism on a sum of gains, each clipped to [−clip, clip]. The unit is one picture."""

    noise_multiplier: float
    """σ: N(0, (σ·clip)²) is added to the sum."""
    clip: float
    """Bound on the change of one picture's loss."""
    pictures: int
    """Public constant that the noised sum is divided by."""
    delta: float


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate the sent adapter on the device's validation pictures."""

    run: str
    round: int
    adapter: bytes
    rounded: QuantizedFormat | None = None
    """See `Train.rounded`."""
    adapted: tuple[str, ...] | None = None
    """See `Query.adapted`."""
    timesteps: int = 3
    """Number of fixed timesteps at which the loss of each picture is measured."""
    privacy: EvaluationPrivacy | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean validation losses of the base and of the sent adapter; or, if requested with privacy, a noised gain."""

    device: str
    round: int
    base: float | None
    shared: float | None
    gain: float | None = None
    """Mean reduction of the base's loss by the adapter over pictures, clipped and noised on the device."""
    release: bool = True
    """See `Update.release`; applies to a noised gain only."""
    epsilon: float | None = None
    """See `Update.epsilon`, including the cost of this gain; None without a noised one."""


@dataclass(frozen=True, kw_only=True)
class Personalize:
    """Train the personal adapter on top of the sent shared one. Nothing of it is sent back."""

    run: str
    round: int
    adapter: bytes
    rank: int
    steps: int
    batch_size: int
    learning_rate: float
    look_every: int
    """Steps between two evaluations on the validation pictures; the best adapter is kept."""
    patience: int
    """Evaluations without improvement before training ends."""
    rounded: QuantizedFormat | None = None
    """See `Train.rounded`."""
    adapted: tuple[str, ...] | None = None
    """See `Query.adapted`."""
    timesteps: int = 3
    """See `Evaluate.timesteps`."""
    method: PersonalizationMethod = PersonalizationMethod()


@dataclass(frozen=True, kw_only=True)
class Personalized:
    """Confirmation that the device has a personal adapter, with its cost, but no measure of its pictures."""

    device: str
    seconds: float
    joules: float
    quality: str


@dataclass(frozen=True, kw_only=True)
class Query:
    """Request the device's report."""

    adapted: tuple[str, ...] | None = None
    """Names of the base's layers that have adapters in this run. None: the default ones of the base's family."""


Request = Query | Train | Evaluate | Personalize
Reply = DeviceReport | Update | Evaluation | Personalized

T = TypeVar("T", DeviceReport, Update, Evaluation, Personalized, Query, Train, Evaluate, Personalize)


def payloads(message: Request | Reply) -> dict[str, bytes]:
    """Return the fields that are sent next to the JSON, by name: those with bytes."""
    return {name: value for name, value in vars(message).items() if isinstance(value, bytes)}


def to_json(message: Request | Reply) -> str:
    """Encode all fields except the payloads. ValueError for a number that is not finite."""
    attached = payloads(message)
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return strict_json.dumps({name: value for name, value in fields.items() if name not in attached})


def from_json(kind: type[T], text: str, **attached: bytes) -> T:
    """Decode a message that `to_json` encoded, with its payloads.

    Args:
        kind: class of the message.
        text: JSON.
        attached: payloads by name of the field.

    Raises:
        AntherError: names the field that is unknown, missing, of a wrong type, not finite, or outside
            `protocol.limits`.
    """
    if len(text) > MAX_JSON_CHARS:
        raise AntherError(f"{kind.__name__}: a message of {len(text)} characters is too long")
    try:
        parsed = strict_json.loads(text)
        if not isinstance(parsed, dict):
            raise ValueError("not a JSON object")
        if duplicates := parsed.keys() & attached.keys():
            raise ValueError(f"{min(duplicates)}: must be sent next to the JSON, not in it")
        message = strict_json.from_plain(kind, parsed | attached, kind.__name__)
        limits.check(message)
        return message
    except ValueError as error:
        raise AntherError(f"malformed message: {error}") from None
