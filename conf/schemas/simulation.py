"""The typed schema of a simulation, `conf/simulate.yaml`: every key that exists, its unit and its limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

AGGREGATIONS = tuple(sorted(file.stem for file in (Path(__file__).parents[1] / "strategy").glob("*.yaml")))


def require(condition: bool, message: str) -> None:
    """Refuse a value with one line."""
    if not condition:
        raise ValueError(message)


def require_choice(key: str, value: str, options: tuple[str, ...]) -> None:
    """Refuse a value that is none of the options; what is missing yet is Hydra's to complain about."""
    require(value in (*options, MISSING), f"{key}={value}: must be one of: {', '.join(options)}")


def require_color(key: str, color: str) -> None:
    """Refuse what isn't a color to put transparent pictures on."""
    known = color in ("white", "black", "gray") or re.fullmatch(r"#[0-9a-fA-F]{6}", color)
    require(bool(known), f"{key}={color}: must be white, black, gray or '#rrggbb'")


def _none_or_positive(value: float | None) -> bool:
    return value is None or value > 0


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass
class BaseConfig:
    """The frozen diffusion base."""

    path: str = MISSING  # name of a shipped base, or the folder of a diffusers pipeline
    weights: str = "fp32"  # how the frozen weights are held: int8, mixed (linear layers in 4 bits, others in 8) or nf4;
    # fp32: as the folder has them, in the precision of compute
    checkpointing: str = "none"  # block: run each block's forward again in backward: half the memory, a fifth more time
    compute: str = "fp32"  # precision of the base's layers; adapters and gradients stay fp32. bf16 needs a chip for it
    resolution: int | None = None  # side of pictures in pixels; null: what the base was made for
    device: str = "auto"  # torch device; auto: cuda if there is one

    def __post_init__(self) -> None:
        require(_none_or_positive(self.resolution), f"base.resolution={self.resolution}: must be over 0, or null")
        require_choice("base.weights", self.weights, ("fp32", "int8", "mixed", "nf4"))
        require_choice("base.checkpointing", self.checkpointing, ("none", "block"))
        require_choice("base.compute", self.compute, ("fp32", "bf16"))


@dataclass
class DataConfig:
    """Whose pictures are on the devices."""

    role: str = "development"  # which writers: development (tune on these) or test (looked at once per claim)
    writers: int = 20  # how many; 0: none but your own pictures
    devices: int | None = None  # dealt to the writers in turn, ada, ada-0002, …, each with train glyphs of its own (one
    # glyph may be on several: ε is of its copy on one); null: one device for each writer
    train: int = 5  # glyphs that a writer gives
    validation: int = 5  # glyphs that decide when to stop
    test: int = 6  # glyphs that nobody trains on
    skew: bool = False  # label skew: a writer gives glyphs of one kind (digits, capital or lowercase letters, in turn),
    # and of the others only if those run out
    pictures: list[str] = field(default_factory=list)  # your own folders: each takes the place of a writer
    background: str = "white"  # what shows through where a picture is transparent: white, black, gray or '#rrggbb'

    def __post_init__(self) -> None:
        require_choice("data.role", self.role, ("development", "test"))
        require_color("data.background", self.background)
        require(self.writers >= 0, f"data.writers={self.writers}: must be 0 or more")
        require(1 <= self.train <= 20, f"data.train={self.train}: a writer gives 1 to 20 glyphs")
        require(1 <= self.validation <= 10, f"data.validation={self.validation}: must be 1 to 10")
        require(1 <= self.test <= 32, f"data.test={self.test}: must be 1 to 32")
        somebody = self.writers > 0 or len(self.pictures) > 0
        require(somebody, "data.writers=0: name a folder in data.pictures, or ask for writers")
        if self.devices is not None:
            own = "your own pictures are on one device each: leave data.devices or data.pictures out"
            require(not self.pictures, f"data.devices={self.devices}: {own}")
            alike = "one device each, or its glyphs of one kind would run out; leave data.devices or data.skew out"
            require(not self.skew, f"data.devices={self.devices}: with data.skew a writer is on {alike}")
            few = f"fewer than data.writers={self.writers}, which are one device each at least"
            require(self.devices >= self.writers, f"data.devices={self.devices}: {few}")

    def count(self) -> int:
        """How many devices there are."""
        return max(self.writers, len(self.pictures)) if self.devices is None else self.devices


@dataclass
class ProfileConfig:
    """One kind of device. Values are estimates unless its file says otherwise."""

    name: str = MISSING
    uplink_mbps: float = MISSING
    downlink_mbps: float = MISSING
    metered: bool = False
    device: str | None = None  # its hardware, by the name of a file of conf/device; null: as stated in the next three
    memory_gib: float | None = None  # null: its hardware's
    examples_per_second: float | None = None  # training examples of the base; null: predicted from its hardware
    measured_on: str | None = None  # base whose rate that is, at its own resolution: for another base or resolution it
    # is predicted from the hardware; null: of the run's base, whatever it is
    watts: float | None = None  # while training; null: its hardware's
    rank: int | None = None  # the highest that it trains; null: any
    sites: str | None = None  # regular expression on the names of the only layers that it trains; null: any
    # What only fleet.timed knows of:
    share: int = 1  # devices of this kind in each turn that profiles are dealt in
    charger_watts: float = 0.0  # into a battery
    plugged: list[float] = field(default_factory=lambda: [0.0, 24.0])  # from when to when on the owner's clock, hours,
    # in pairs; what ends before it begins ends the day after
    idle: list[float] = field(default_factory=lambda: [0.0, 24.0])  # from when to when its owner doesn't use it
    leaves: bool = False  # breaks off what it does when its owner unplugs it, or begins to use it
    drop_out: float = 0.0  # probability that it vanishes in an hour of work, for no reason that anybody knows
    hot_after: float | None = None  # seconds at work until it is hot; null: it stays cool
    cool_after: float = 600.0  # seconds at rest until it is cool again
    hot_speed: float = 1.0  # share of its full speed that it works at while it is hot

    def __post_init__(self) -> None:
        for name in ("memory_gib", "examples_per_second", "watts"):
            value = getattr(self, name)
            require(_none_or_positive(value), f"fleet.profiles: {name}={value} of {self.name}: must be over 0")
            said = f"fleet.profiles: {name} of {self.name}: state it, or name its hardware (device)"
            require(value is not None or self.device is not None, said)
        measured = f"fleet.profiles: measured_on={self.measured_on} of {self.name}: name its hardware too (device)"
        require(self.measured_on is None or self.device is not None, measured)
        for name in ("uplink_mbps", "downlink_mbps", "share", "cool_after", "hot_speed"):
            value = getattr(self, name)
            require(value == MISSING or value > 0, f"fleet.profiles: {name}={value} of {self.name}: must be over 0")
        rank, only = self.rank, self.sites
        require(_none_or_positive(rank), f"fleet.profiles: rank={rank} of {self.name}: must be 1 or more, or null")
        pattern = f"fleet.profiles: sites={only} of {self.name}: not a regular expression"
        require(only is None or _compiles(only), pattern)
        for name in ("plugged", "idle"):
            hours = getattr(self, name)
            pairs = len(hours) % 2 == 0 and all(0 <= hour <= 24 for hour in hours)
            require(pairs, f"fleet.profiles: {name}={hours} of {self.name}: must be pairs of hours, 0 to 24")
        for name, most in (("drop_out", 1.0), ("hot_speed", 1.0), ("charger_watts", 1e4)):
            value = getattr(self, name)
            require(0 <= value <= most, f"fleet.profiles: {name}={value} of {self.name}: must be 0 to {most:g}")
        require(self.drop_out < 1, f"fleet.profiles: drop_out={self.drop_out} of {self.name}: must be under 1")
        hot = self.hot_after
        require(_none_or_positive(hot), f"fleet.profiles: hot_after={hot} of {self.name}: must be over 0, or null")


@dataclass
class WorkloadConfig:
    """How many times what the base takes a simulated device has to give, as if its base were a larger one."""

    memory: float = 1.0  # of a pass, beside what a process takes by itself
    arithmetic: float = 1.0  # of a pass: operations, and bytes moved

    def __post_init__(self) -> None:
        for name in ("memory", "arithmetic"):
            value = getattr(self, name)
            require(value > 0, f"fleet.workload.{name}={value}: must be over 0")


@dataclass
class EligibilityConfig:
    """What must hold of a device that is asked to train; by default nothing."""

    idle: bool = False  # its owner does not use it
    battery: float | None = None  # share of a full battery that it has, unless it charges; null: any
    cool: bool = False  # it is not hot
    unmetered: bool = False  # its link costs nothing
    memory_gib: float | None = None  # that it has at least; null: any
    pictures: bool = False  # it has some

    def __post_init__(self) -> None:
        least = self.battery
        require(
            least is None or 0 < least <= 1, f"fleet.eligible.battery={least}: must be over 0 and at most 1, or null"
        )
        memory = self.memory_gib
        require(_none_or_positive(memory), f"fleet.eligible.memory_gib={memory}: must be over 0, or null")


@dataclass
class FleetConfig:
    """Which devices the writers hold, and which of them are asked in a round, drawn anew each time."""

    profiles: list[ProfileConfig] = MISSING  # dealt to the writers in turn
    sample: int | None = None  # devices asked to train each round; null: all of them
    rate: float | None = None  # instead of sample: the probability with which each is asked, by itself and in secret
    evaluate: int | None = None  # devices asked to measure each round's adapter; null: as many as sample
    overselect: float = 1.0  # so many times `sample` devices are asked, and the first `sample` replies end a round; a
    # simulation needs a timed fleet for it
    concurrency: int | None = None  # devices that are at work at any time, with strategy.timing=async; null: 10
    timed: bool = False  # devices live on a virtual clock: work takes them time, memory, battery, and they grow hot
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)  # of a timed fleet
    zones: float = 0.0  # hours by which owners' clocks differ at most (a timed fleet)
    jitter: float = 1.0  # hours by which a day of theirs differs from another at most (a timed fleet)
    trace: str | None = None  # CSV or JSON of when devices are plugged in and idle, instead of the profiles' hours
    eligible: EligibilityConfig = field(
        default_factory=EligibilityConfig
    )  # with fleet.rate, and under privacy=device, others are drawn
    # all the same, and contribute nothing
    report_age: float = 600.0  # seconds after which a device is asked anew for its state, where somebody goes by it

    def __post_init__(self) -> None:
        require(len(self.profiles) > 0, "fleet.profiles is empty: name at least one kind of device")
        require(_none_or_positive(self.sample), f"fleet.sample={self.sample}: must be 1 or more, or null for all")
        require(_none_or_positive(self.evaluate), f"fleet.evaluate={self.evaluate}: must be 1 or more, or null")
        require(self.report_age >= 0, f"fleet.report_age={self.report_age}: must be 0 or more")
        rate = self.rate
        require(rate is None or 0 < rate <= 1, f"fleet.rate={rate}: must be over 0 and at most 1, or null")
        both = f"fleet.rate={rate} fleet.sample={self.sample}: choose one of them"
        require(rate is None or self.sample is None, both)
        over = f"fleet.overselect={self.overselect}"
        require(1 <= self.overselect <= 10, f"{over}: must be 1 to 10")
        require(self.overselect == 1 or self.sample is not None, f"{over}: more than what? set fleet.sample")
        working = self.concurrency
        require(_none_or_positive(working), f"fleet.concurrency={working}: must be 1 or more, or null")
        for name, most in (("zones", 24.0), ("jitter", 12.0)):
            value = getattr(self, name)
            require(0 <= value <= most, f"fleet.{name}={value}: must be 0 to {most:g} hours")
        for profile in self.profiles if self.timed else ():
            needs = f"fleet.timed: {profile.name} names no hardware: set device to the name of a file of conf/device"
            require(profile.device is not None, needs)
        require(
            self.trace is None or self.timed, f"fleet.trace={self.trace}: only a fleet with timed=true lives by one"
        )


@dataclass
class OortConfig:
    """What Oort's utility and its exploration go by (OSDI 2021), for selection=oort and energy."""

    alpha: float = 2.0  # penalty of devices that take longer than most
    exploration: float = 0.9  # share of the first round's devices that were never asked before
    decay: float = 0.98  # of that share in each round
    least: float = 0.3  # that it falls to
    cutoff: float = 0.95  # who has this share of the utility of the last one chosen may take its place
    clip: float = 0.9  # quantile that utilities are cut at
    preferred: float = 0.3  # quantile of all devices' seconds that a round is to take at first
    window: int = 20  # rounds between two looks of the pacer, which moves that quantile
    step: float = 0.05  # by so much
    most: int | None = None  # rounds after which a device is left alone while there are others; null: no limit

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"selection.oort.alpha={self.alpha}: must be 0 or more")
        for name in ("exploration", "decay", "least", "cutoff", "clip", "preferred", "step"):
            value = getattr(self, name)
            require(0 < value <= 1, f"selection.oort.{name}={value}: must be over 0 and at most 1")
        require(self.window >= 1, f"selection.oort.window={self.window}: must be 1 or more")
        require(_none_or_positive(self.most), f"selection.oort.most={self.most}: must be 1 or more, or null")


@dataclass
class SelectionConfig:
    """Which devices make up a fleet.sample."""

    name: str = "sample"
    oort: OortConfig = field(default_factory=OortConfig)
    weight: float | None = None  # of utility, beside the power that a round leaves (energy); null: 0.25
    more: float | None = None  # devices drawn for each that is asked, of which the best are (deadline, loss_fair,
    # thrifty); null: 2

    def __post_init__(self) -> None:
        require_choice(
            "selection.name", self.name, ("sample", "round_robin", "oort", "energy", "deadline", "loss_fair", "thrifty")
        )
        weight, more = self.weight, self.more
        require(weight is None or 0 <= weight <= 1, f"selection.weight={weight}: must be 0 to 1, or null")
        require(more is None or more >= 1, f"selection.more={more}: must be 1 or more, or null")


@dataclass
class StrategyConfig:
    """How adapters are combined and devices asked."""

    aggregation: str = MISSING
    max_rank: int | None = None  # cap on the rank of the global adapter (exact); null: none, and adapter.shared.rank
    # for the others
    energy: float | None = None  # no more of the mean's directions than hold this share of its σ² (exact); null: all
    weights: str = "device"  # of what is averaged (exact): whole devices; or rank_slice: each slice of rank among those
    # that trained so many
    metered_rank: int = (
        4  # rank asked of a device on a metered link (strategies that mix ranks; not private per device)
    )
    deadline: float | None = None  # seconds a round may take a device: fewer steps for slow ones; null: no limit
    planning: str = "full"  # full: every device trains at every site; device: at those that are worth most of what it
    # can hold and has time and power for
    joules: float | None = None  # that a round's training may take of a device: fewer steps; null: no limit
    battery_share: float | None = None  # of what is left in its battery, that a round may take of a device which does
    # not charge: fewer steps; null: no limit
    update: str = "fp32"  # how devices send what they trained: fp32; or its change in fp16, int8 or int4, rounded at
    # random after any noise. Where directions keep their meaning (fedit, ffa, fedsa, fedsb, hetlora) what rounding left
    # goes into the next round
    metered_update: str | None = None  # how devices on a metered link, or with less than 2 Mbit/s up, send it instead:
    # fp16, int8 or int4, if that is fewer bits (not private per device); null: as all do
    download: str = "fp32"  # how adapters are sent to devices: fp32; or in fp16, int8 or int4, rounded at random. What
    # rounding took the server keeps, unless the rule turns its factors (flexlora, flora, fedsvd, raflora)
    keep: float = 1.0  # share of a rounded change that is sent: its largest blocks; the others wait for a later round
    decay: bool = False  # devices' shared learning rate falls to zero over the rounds, along a cosine
    correction: str = "none"  # of what devices drift by; scaffold: by control variates, of plain SGD
    # (adapter.shared.optimiser=sgd) and of rules that average what keeps its meaning (fedit, ffa, fedsa, fedsb)
    optimiser: str = "none"  # the server's step along what a round's mean changes, unless the rule turns its factors:
    # fedavgm, fedadam or fedyogi; none: the mean is the next adapter
    server_rate: float | None = None  # η of that step; null: 1 for fedavgm, 0.003 for the others
    momentum: float | None = None  # β of fedavgm, β₁ of the others; null: 0.9
    second_moment: float | None = None  # β₂ (fedadam, fedyogi); null: 0.99
    tau: float | None = None  # τ (fedadam, fedyogi): the smallest change of a number that still counts as one; null:
    # 0.001
    robust: list[str] = field(default_factory=list)  # what is done about malicious updates, in this order: replay,
    # which is first, drops what was sent in an earlier round; norm, krum, foolsgold, afa, geometric judge whole ones;
    # median or trimmed goes by entries of the product, and is last
    outliers: float | None = None  # share of devices that krum leaves out, and trimmed at each end of an entry's
    # values; null: 0.2
    norm_bound: float | None = None  # of one device's change (norm); null: norm_factor times the median of all
    norm_factor: float | None = None  # null: 1
    timing: str = "sync"  # sync: a round waits for its devices; async: devices train all the time, and a round is over
    # whenever `buffer` updates are there (FedBuff); a simulation needs a timed fleet for it
    buffer: int | None = None  # updates of a round, with timing=async: one of each device; of fewer devices than that,
    # a share; null: 10
    quorum: int = 1  # a round with fewer good replies keeps the adapter
    timeout: float = 3600.0  # seconds that a round waits, for devices that can be asked and for their replies

    def __post_init__(self) -> None:
        require_choice("strategy.aggregation", self.aggregation, AGGREGATIONS)
        require_choice("strategy.weights", self.weights, ("device", "rank_slice"))
        require_choice("strategy.planning", self.planning, ("full", "device"))
        require_choice("strategy.update", self.update, ("fp32", "fp16", "int8", "int4"))
        if self.metered_update is not None:
            require_choice("strategy.metered_update", self.metered_update, ("fp16", "int8", "int4"))
        require_choice("strategy.download", self.download, ("fp32", "fp16", "int8", "int4"))
        require(0 < self.keep <= 1, f"strategy.keep={self.keep}: must be over 0 and at most 1")
        whole = f"strategy.keep={self.keep}: fp32 is sent whole; choose strategy.update=int4, int8 or fp16"
        require(self.keep == 1 or self.update != "fp32", whole)
        require_choice("strategy.correction", self.correction, ("none", "scaffold"))
        require_choice("strategy.optimiser", self.optimiser, ("none", "fedavgm", "fedadam", "fedyogi"))
        rate = self.server_rate
        require(_none_or_positive(rate), f"strategy.server_rate={rate}: must be over 0, or null")
        for name in ("momentum", "second_moment"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"strategy.{name}={value}: must be 0 or more, and under 1")
        require(_none_or_positive(self.tau), f"strategy.tau={self.tau}: must be over 0")
        share = self.energy
        require(share is None or 0 < share <= 1, f"strategy.energy={share}: must be over 0 and at most 1, or null")
        require(_none_or_positive(self.max_rank), f"strategy.max_rank={self.max_rank}: must be 1 or more, or null")
        require(self.metered_rank > 0, f"strategy.metered_rank={self.metered_rank}: must be 1 or more")
        require(_none_or_positive(self.deadline), f"strategy.deadline={self.deadline}: must be over 0, or null")
        for place, name in enumerate(self.robust):
            require_choice(
                "strategy.robust",
                name,
                ("replay", "norm", "krum", "foolsgold", "afa", "geometric", "median", "trimmed"),
            )
            first = name != "replay" or place == 0
            require(first, "strategy.robust: replay looks at each reply as it comes, before any rule: put it first")
            last = name not in ("median", "trimmed") or place == len(self.robust) - 1
            require(last, f"strategy.robust: {name} makes one update of all, put it last")
        cut = self.outliers
        require(cut is None or 0 <= cut < 0.5, f"strategy.outliers={cut}: must be 0 or more and less than half")
        require(_none_or_positive(self.norm_bound), f"strategy.norm_bound={self.norm_bound}: must be over 0, or null")
        require(_none_or_positive(self.norm_factor), f"strategy.norm_factor={self.norm_factor}: must be over 0")
        require_choice("strategy.timing", self.timing, ("sync", "async"))
        require(_none_or_positive(self.buffer), f"strategy.buffer={self.buffer}: must be 1 or more, or null")
        require(self.quorum >= 1, f"strategy.quorum={self.quorum}: must be 1 or more")
        require(self.timeout > 0, f"strategy.timeout={self.timeout}: must be over 0")
        require(_none_or_positive(self.joules), f"strategy.joules={self.joules}: must be over 0, or null")
        part = self.battery_share
        wrong = f"strategy.battery_share={part}: must be over 0 and at most 1, or null"
        require(part is None or 0 < part <= 1, wrong)


@dataclass
class PrivateEvalConfig:
    """What the operator of a private run sees of its progress: a noised gain, paid from the same ε."""

    every: int = 0  # rounds between two; 0: none
    noise_multiplier: float = 10.0  # σ of each
    clip: float = 0.1  # bound on what the loss of one unit may fall or rise by

    def __post_init__(self) -> None:
        require(self.every >= 0, f"privacy.measuring.every={self.every}: must be 0 or more")
        sigma = self.noise_multiplier
        require(sigma > 0, f"privacy.measuring.noise_multiplier={sigma}: must be over 0")
        require(self.clip > 0, f"privacy.measuring.clip={self.clip}: must be over 0")


@dataclass
class DevicePrivacyConfig:
    """The server's clip and noise, once a round: the unit is all of one device."""

    clip: float = 1.0  # bound on the norm of one device's update; where it starts, if it is adaptive
    quantile: float | None = None  # adaptive clipping (arXiv:1905.03871): share of updates below the clip; null: fixed
    clip_rate: float = 0.2  # by how much an adaptive clip may move in one round, as a power of e
    participations: int | None = None  # rounds that one device may take part in; null: all, which ε is solved for
    epsilon: float | None = None  # null: privacy.epsilon
    delta: float | None = None  # null: privacy.delta

    def __post_init__(self) -> None:
        require(self.clip > 0, f"privacy.device.clip={self.clip}: must be over 0")
        share = self.quantile
        require(share is None or 0 < share < 1, f"privacy.device.quantile={share}: must lie between 0 and 1, or null")
        require(self.clip_rate > 0, f"privacy.device.clip_rate={self.clip_rate}: must be over 0")
        most = self.participations
        require(_none_or_positive(most), f"privacy.device.participations={most}: must be 1 or more, or null")
        require(_none_or_positive(self.epsilon), f"privacy.device.epsilon={self.epsilon}: must be over 0, or null")
        given = self.delta
        require(given is None or 0 < given < 1, f"privacy.device.delta={given}: must lie between 0 and 1, or null")


@dataclass
class PrivacyConfig:
    """What is promised, about one picture, about all of one device, or both."""

    level: str = MISSING  # none; example: DP-SGD on the device; device: clip and noise on the server; both
    epsilon: float = 8.0  # for all rounds together, with what is measured; σ is solved for it
    delta: float = 1e-3
    clip: float = 0.01  # C: bound on one picture's gradient norm
    draws: int = 1  # noise multiplicity
    device: DevicePrivacyConfig = field(default_factory=DevicePrivacyConfig)
    measuring: PrivateEvalConfig = field(default_factory=PrivateEvalConfig)

    def __post_init__(self) -> None:
        require_choice("privacy.level", self.level, ("none", "example", "device", "both"))
        require(self.epsilon > 0, f"privacy.epsilon={self.epsilon}: must be over 0")
        require(0 < self.delta < 1, f"privacy.delta={self.delta}: must lie between 0 and 1")
        require(self.clip > 0, f"privacy.clip={self.clip}: must be over 0")
        require(self.draws >= 1, f"privacy.draws={self.draws}: must be 1 or more")

    @property
    def of_examples(self) -> bool:
        """Whether devices train by DP-SGD."""
        return self.level in ("example", "both")

    @property
    def of_devices(self) -> bool:
        """Whether the server clips and noises what devices send."""
        return self.level in ("device", "both")


@dataclass
class LocalTrainingConfig:
    """One adapter's training on one device."""

    rank: int = 8
    steps: int = 4  # shared: a round; personal and local: at most
    batch_size: int = 4
    learning_rate: float = 1e-3

    def check(self, key: str) -> None:
        """Refuse values out of range, by the full name that `key` gives this training."""
        for name in ("rank", "steps", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{key}.{name}={value}: must be 1 or more")
        require(self.learning_rate > 0, f"{key}.learning_rate={self.learning_rate}: must be over 0")


@dataclass
class SharedTrainingConfig(LocalTrainingConfig):
    """What a device does in a round for the adapter that is federated."""

    optimiser: str = "adamw"  # of its steps; sgd: steps add up to the sum of gradients, as strategy.correction needs
    proximal: float = (
        0.0  # μ of FedProx: the loss has μ/2 ‖w − w_t‖² beside it, where a round begins at w_t; 0: without
    )

    def __post_init__(self) -> None:
        require_choice("adapter.shared.optimiser", self.optimiser, ("adamw", "sgd"))
        require(self.proximal >= 0, f"adapter.shared.proximal={self.proximal}: must be 0 or more")


@dataclass
class LocalBaselineConfig:
    """The same device alone: total steps and total rank follow from the other two, its rate is its own."""

    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"adapter.local.learning_rate={self.learning_rate}: must be over 0")


@dataclass
class AdapterConfig:
    """LoRA adapters: where they sit and how they are trained."""

    sites: str | None = None  # regular expression on the names of the base's layers; null: all attentions' projections
    frame: str | None = None  # of strategy=fedsb, which trains small cores between the factors of this frame, shipped
    # by name or a file: rank² numbers a site, as privacy wants them; null: of every other strategy
    shared: SharedTrainingConfig = field(default_factory=SharedTrainingConfig)
    personal: LocalTrainingConfig = field(default_factory=LocalTrainingConfig)
    local: LocalBaselineConfig = field(default_factory=LocalBaselineConfig)
    look_every: int = 5  # steps between two looks at the validation glyphs (personal, local)
    patience: int = 3  # looks without improvement before training ends

    def __post_init__(self) -> None:
        self.shared.check("adapter.shared")
        self.personal.check("adapter.personal")
        require(self.sites is None or _compiles(self.sites), f"adapter.sites={self.sites}: not a regular expression")
        require(self.look_every >= 1, f"adapter.look_every={self.look_every}: must be 1 or more")
        require(self.patience >= 1, f"adapter.patience={self.patience}: must be 1 or more")


@dataclass
class GridConfig:
    """Who drives the clients."""

    name: str = MISSING  # cohort: jobs of many clients in one pass; serial: one at a time; ray: Flower's own simulation

    def __post_init__(self) -> None:
        require_choice("grid.name", self.name, ("cohort", "serial", "ray"))


@dataclass
class TrainerConfig:
    """What the trainer may take of this machine."""

    memory_gib: float | None = None  # of RAM, or of a GPU's memory; null: a fixed share of all, kept at resume
    compiled: bool = False  # GPU only: compile the base first, minutes for a large one; passes take a fifth less

    def __post_init__(self) -> None:
        require(_none_or_positive(self.memory_gib), f"cohort.memory_gib={self.memory_gib}: must be over 0, or null")


@dataclass
class TrackerConfig:
    """Where numbers go beside metrics.jsonl, which is always written."""

    tensorboard: bool = True


@dataclass
class EvaluationConfig:
    """How the final arms (base, local, shared, personal) are judged, and on which devices."""

    devices: int | None = None  # that get a personal adapter and are judged; null: one of each writer
    local: bool = True  # train everybody alone too, to compare: as much work again as the federation
    timesteps: int = 3  # fixed timesteps, and one fixed noise for each, per held-out glyph
    gallery: int = 4  # test glyphs drawn per writer; 0: no pictures, no judge
    sampler: str = "ddim"  # ddim; dpm: DPM-Solver++, better in few steps; for bases distilled to very few: lcm
    # (consistency) or ancestral (turbo)
    steps: int = 6  # of a drawn glyph
    guidance: float = 1.5  # classifier-free guidance; 1: none

    def __post_init__(self) -> None:
        require(_none_or_positive(self.devices), f"evaluation.devices={self.devices}: must be 1 or more, or null")
        require(self.timesteps >= 1, f"evaluation.timesteps={self.timesteps}: must be 1 or more")
        require(self.gallery >= 0, f"evaluation.gallery={self.gallery}: must be 0 or more")
        require_choice("evaluation.sampler", self.sampler, ("ddim", "dpm", "lcm", "ancestral"))
        require(self.steps >= 1, f"evaluation.steps={self.steps}: must be 1 or more")
        require(self.guidance >= 1, f"evaluation.guidance={self.guidance}: must be 1 or more")


@dataclass
class SimulationConfig:
    """A whole federation on one machine."""

    rounds: int = 4
    seed: int = 0
    resume: bool = False  # continue the run in hydra.run.dir
    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    cohort: TrainerConfig = field(default_factory=TrainerConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds={self.rounds}: must be 1 or more")
        devices = self.data.count()
        fleet, judged = self.fleet, self.evaluation.devices
        for key, asked in {
            "fleet.sample": fleet.sample,
            "fleet.evaluate": fleet.evaluate,
            "evaluation.devices": judged,
        }.items():
            require(asked is None or asked <= devices, f"{key}={asked}: there are only {devices} devices")
        require(not fleet.timed or self.grid.name != "ray", "grid=ray: a fleet with timed=true lives in one process")


ConfigStore.instance().store(name="simulation_schema", node=SimulationConfig)
