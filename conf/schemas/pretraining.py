"""Schemas of the pretraining of the glyph base and its judge: `typefaces.train_base`, `typefaces.train_judge`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore


@dataclass
class StageConfig:
    """One run of the training loop."""

    steps: int = 1000
    """Optimizer steps at most."""
    seconds: float | None = None
    """Time budget in seconds, without compilation; the learning rate is zero at its end. null: only steps count."""
    batch_size: int = 512
    """Examples per step."""
    lr: float = 1e-3
    """Learning rate."""
    warmup: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Bound on the norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the result."""
    compile: bool = True
    """Compile the network."""
    bf16: bool = True
    """Train in bf16."""
    log_interval: int = 200
    """Steps between log lines."""
    checkpoint_interval: int = 2000
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup", "log_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds}: must be positive, or null")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be in [0, 1)")


@dataclass
class PretrainingConfig:
    """Settings of both applications."""

    dataset: str | None = None
    """Data set file; null: the built-in one."""
    output: str = "outputs/pretraining"
    """Output folder."""
    seed: int = 0
    """Seed of every random stream."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda if available."""
    resume: bool = False
    """Continue from the checkpoints in `output`."""
    held_out: float = 0.08
    """Fraction of the public designs held out from training, for measurements."""

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device}: must be one of: auto, cpu, cuda")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: must be in (0, 1)")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")


@dataclass
class TrainBaseConfig(PretrainingConfig):
    """`python -m typefaces.train_base`: autoencoder, then denoiser with text encoder, then measurements."""

    vae: StageConfig = field(default_factory=StageConfig)
    kl_weight: float = 1e-4
    """Weight of the autoencoder's KL per latent element."""
    diffusion: StageConfig = field(default_factory=StageConfig)
    min_snr: float | None = None
    """γ of min-SNR weighting; null: plain v-prediction."""
    caption_dropout: float = 0.1
    """Probability that a caption is dropped, for classifier-free guidance."""
    variants: int = 4
    """Latents per glyph: the glyph itself and variants - 1 jittered copies."""
    pen: float = 0.0
    """Fraction of the autoencoder's pictures, and of the variants, that is drawn with a pen."""
    judge: str | None = None
    """Folder of a judge that measures the samples' legibility; null: not measured."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    """Guidance scales of the measured samples."""
    sampling_steps: int = 10
    """Denoising steps per sample."""
    samples: int = 1984
    """Glyphs drawn at each guidance scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout={self.caption_dropout}: must be in [0, 1)")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight}: must not be negative")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr={self.min_snr}: must be positive, or null")
        if not 0 <= self.pen < 1:
            raise ValueError(f"pen={self.pen}: must be in [0, 1)")
        for name in ("variants", "sampling_steps", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass
class TrainJudgeConfig(PretrainingConfig):
    """`python -m typefaces.train_judge`: the classifier and style embedding."""

    judge: StageConfig = field(default_factory=StageConfig)
    style_weight: float = 0.5
    """Weight of the family loss, relative to the glyph loss."""
    label_smoothing: float = 0.05
    """Label smoothing of the glyph loss."""
    styles: int = 8
    """Styles per family: itself and styles - 1 that are slanted, widened or bolder."""
    widths: list[int] = field(default_factory=lambda: [24, 48, 96, 192])
    """Channels of the network's stages."""
    dropout: float = 0.1
    """Dropout before the glyph logits."""
    pen: float = 0.0
    """Fraction of a batch that is typefaces drawn with a pen."""
    people: str | None = None
    """Parquet file of people's handwriting; null: none."""
    people_role: str = "extra"
    """Role of the people who train the judge."""
    people_share: float = 0.35
    """Fraction of a batch that is people's handwriting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.style_weight < 0:
            raise ValueError(f"style_weight={self.style_weight}: must not be negative")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: must be in [0, 1)")
        if self.styles < 1:
            raise ValueError(f"styles={self.styles}: must be at least 1")
        if any(width < 8 or width % 8 for width in self.widths) or len(self.widths) < 2:
            raise ValueError(f"widths={self.widths}: must be two or more multiples of 8")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        if not (self.pen >= 0 and self.people_share >= 0 and self.pen + self.people_share < 1):
            raise ValueError(f"pen={self.pen}, people_share={self.people_share}: must be 0 or more, together under 1")


store = ConfigStore.instance()
store.store(name="train_base_schema", node=TrainBaseConfig)
store.store(name="train_judge_schema", node=TrainJudgeConfig)
