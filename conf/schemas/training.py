"""Schemas of training: the frozen base, the pictures, the adapters, and the trainer's share of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schemas.checks import is_regex, none_or_positive, require, require_choice, require_color


@dataclass
class BaseConfig:
    """The frozen diffusion base."""

    path: str = MISSING
    """Name of a shipped base, or folder of a diffusers pipeline."""
    weights: str = "fp32"
    """Format of the frozen weights: fp32 (as stored, in the compute precision), int8, mixed (linear layers in 4 bits,
    others in 8) or nf4."""
    gradient_checkpointing: str = "none"
    """none, or block: recompute each block's forward pass in backward; half the memory, a fifth more time."""
    compute_dtype: str = "fp32"
    """Precision of the base's layers: fp32 or bf16 (needs hardware support). Adapters and gradients stay fp32."""
    resolution: int | None = None
    """Side of the pictures in pixels; null: the base's own."""
    device: str = "auto"
    """Torch device; auto: cuda if available."""

    def __post_init__(self) -> None:
        require(none_or_positive(self.resolution), f"base.resolution={self.resolution}: must be over 0, or null")
        require_choice("base.weights", self.weights, ("fp32", "int8", "mixed", "nf4"))
        require_choice("base.gradient_checkpointing", self.gradient_checkpointing, ("none", "block"))
        require_choice("base.compute_dtype", self.compute_dtype, ("fp32", "bf16"))


@dataclass
class ExpectedDataConfig:
    """The devices, and the pictures that each is expected to have: public numbers, from which noise is computed."""

    devices: int | None = 20
    """Number of devices."""
    train: int = 5
    """Training pictures per device."""
    validation: int = 5
    """Pictures per device that decide when training stops."""

    def __post_init__(self) -> None:
        require(self.devices is not None and self.devices >= 1, f"data.devices={self.devices}: must be 1 or more")
        for name in ("train", "validation"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}={value}: must be 1 or more")

    def known_count(self) -> int | None:
        """Return the number of devices; None: it is not known before a data set is read."""
        return self.devices

    def count(self) -> int:
        """Return the number of devices, which must be known."""
        count = self.known_count()
        assert count is not None
        return count


@dataclass
class DataConfig(ExpectedDataConfig):
    """The pictures on the devices."""

    role: str = "development"
    """Writers of the built-in data: development (for tuning) or test (evaluated once per claim)."""
    writers: int = 20
    """Number of writers; 0: only your own pictures."""
    devices: int | None = None
    """Number of devices, dealt to the writers in turn (ada, ada-0002, …), each with its own `train` glyphs. A glyph may
    be on several devices; ε then covers its copy on one of them. null: one device per writer."""
    train: int = 5
    """Training pictures per device."""
    validation: int = 5
    """Pictures per device that decide when training stops."""
    test: int = 6
    """Pictures per device that are held out from training."""
    label_skew: bool = False
    """Give each writer glyphs of one kind (digits, capital or lowercase letters, in turn), and of other kinds only if
    those run out."""
    pictures: list[str] = field(default_factory=list)
    """Your own picture folders; each replaces one writer."""
    background: str = "white"
    """Color behind transparent pictures: white, black, gray or '#rrggbb'."""
    path: str | None = None
    """Pictures of many people instead of writers (data=people): a Parquet file with the columns person, text and image,
    a folder of such files, or a folder with one picture folder for each person; null: none."""
    person: str = "person"
    """Column of data.path with the person."""
    people: int | None = None
    """Number of people of data.path who take part in the rounds, chosen by a hash of their names; null: all."""
    roles: list[str] = field(default_factory=list)
    """Only people of data.path with these values in the column role take part; empty: all."""
    evaluated_roles: list[str] = field(default_factory=list)
    """Only people with these values in the column role get a personal adapter and are evaluated; empty: all."""
    newcomers: list[str] = field(default_factory=list)
    """People of data.path who take part in no round: they join after the last one, get a personal adapter on top of the
    shared one, and are evaluated. They aren't counted in data.people."""

    def __post_init__(self) -> None:
        require_choice("data.role", self.role, ("development", "test"))
        require_color("data.background", self.background)
        if self.path is None:
            self._check_writers()
        else:
            self._check_people()

    def _check_writers(self) -> None:
        for name in ("person", "people", "roles", "evaluated_roles", "newcomers"):
            value = getattr(self, name)
            unused = value in (None, [], "person")
            require(unused, f"data.{name}={value}: requires data.path, the pictures of many people")
        require(self.writers >= 0, f"data.writers={self.writers}: must be 0 or more")
        require(1 <= self.train <= 20, f"data.train={self.train}: must be 1 to 20")
        require(1 <= self.validation <= 10, f"data.validation={self.validation}: must be 1 to 10")
        require(1 <= self.test <= 32, f"data.test={self.test}: must be 1 to 32")
        has_people = self.writers > 0 or len(self.pictures) > 0
        require(has_people, "data.writers=0: requires data.pictures; name a folder, or set data.writers")
        if self.devices is not None:
            key = f"data.devices={self.devices}"
            require(not self.pictures, f"{key}: can't be combined with data.pictures; leave one of them out")
            require(
                not self.label_skew,
                f"{key}: can't be combined with data.label_skew, because glyphs of one kind would run out; "
                "leave one of them out",
            )
            require(self.devices >= self.writers, f"{key}: must be data.writers={self.writers} or more")

    def _check_people(self) -> None:
        only = "only used without data.path; leave it out"
        require(self.path != "", "data.path: needs a value; name a Parquet file or a folder")
        require(not self.pictures, f"data.pictures: {only}")
        require(self.devices is None, f"data.devices={self.devices}: {only}, or set data.people")
        require(not self.label_skew, f"data.label_skew={self.label_skew}: {only}")
        require(bool(self.person), "data.person: must name a column, such as person")
        require(none_or_positive(self.people), f"data.people={self.people}: must be 1 or more, or null for all")
        for name in ("train", "validation", "test"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}={value}: must be 1 or more")

    def known_count(self) -> int | None:
        """Return the number of devices; None: all people of a data set that is not read yet."""
        return self.people if self.path is not None else self.devices or self.owner_count()

    def owner_count(self) -> int:
        """Return the number of people with different pictures, which is at most the number of devices."""
        return self.count() if self.path is not None else max(self.writers, len(self.pictures))


@dataclass
class LocalTrainingConfig:
    """Training of one adapter on one device."""

    rank: int = 8
    """Rank of the adapter."""
    steps: int = 4
    """Optimizer steps: per round (shared), or the maximum (personal)."""
    batch_size: int = 4
    """Pictures per step."""
    lr: float = 1e-3
    """Learning rate."""

    def check(self, key: str) -> None:
        """Raise ValueError for a value out of range; `key` is the full name of this group."""
        for name in ("rank", "steps", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{key}.{name}={value}: must be 1 or more")
        require(self.lr > 0, f"{key}.lr={self.lr}: must be over 0")


@dataclass
class SharedTrainingConfig(LocalTrainingConfig):
    """Training of the federated adapter in one round."""

    lr_schedule: str = "constant"
    """Learning rate over the rounds: constant, or cosine (falls to zero)."""
    optimizer: str = "adamw"
    """adamw or sgd. With sgd the steps add up to the sum of gradients, as drift_correction requires."""
    proximal_mu: float = 0.0
    """μ of FedProx: adds μ/2 ‖w − w_t‖² to the loss, where w_t is the adapter at the start of the round; 0: off."""

    def __post_init__(self) -> None:
        require_choice("adapter.shared.lr_schedule", self.lr_schedule, ("constant", "cosine"))
        require_choice("adapter.shared.optimizer", self.optimizer, ("adamw", "sgd"))
        require(self.proximal_mu >= 0, f"adapter.shared.proximal_mu={self.proximal_mu}: must be 0 or more")


@dataclass
class LocalBaselineConfig:
    """Training without a federation, for comparison. Its steps and rank are the totals of shared and personal."""

    lr: float = 1e-3
    """Learning rate."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"adapter.baseline_local.lr={self.lr}: must be over 0")


@dataclass
class AdapterConfig:
    """Placement and training of the LoRA adapters."""

    sites: str | None = "attention"
    """Layers of the base that have adapters: attention (the projections of every attention), linear (every linear
    layer), all (every linear and convolution layer), or a regular expression on their names; null: attention."""
    lora_xs_bases: str | None = None
    """Frozen factors for aggregation=fedsb, which trains small cores between them (rank² numbers per site, so less
    noise under privacy): a shipped name or a file; null: for every other rule."""
    shared: SharedTrainingConfig = field(default_factory=SharedTrainingConfig)
    personal: LocalTrainingConfig = field(default_factory=LocalTrainingConfig)
    baseline_local: LocalBaselineConfig = field(default_factory=LocalBaselineConfig)
    eval_interval: int = 5
    """Steps between evaluations on the validation glyphs (personal, baseline_local)."""
    patience: int = 3
    """Evaluations without improvement before training stops."""

    def __post_init__(self) -> None:
        self.shared.check("adapter.shared")
        self.personal.check("adapter.personal")
        if self.sites == "attention":
            self.sites = None  # as earlier versions stored and hashed it
        require(self.sites is None or is_regex(self.sites), f"adapter.sites={self.sites}: not a regular expression")
        require(self.eval_interval >= 1, f"adapter.eval_interval={self.eval_interval}: must be 1 or more")
        require(self.patience >= 1, f"adapter.patience={self.patience}: must be 1 or more")


@dataclass
class TrainerConfig:
    """Resources of this machine for the trainer."""

    memory_gib: float | None = None
    """Memory budget for training, of RAM or GPU memory, in GiB; null: a fixed fraction, kept when the run is
    resumed."""
    compile: bool = False
    """Compile the base first (GPU only): takes minutes for a large base; passes are a fifth faster."""

    def __post_init__(self) -> None:
        require(none_or_positive(self.memory_gib), f"trainer.memory_gib={self.memory_gib}: must be over 0, or null")
