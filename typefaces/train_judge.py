"""Train the judge from scratch:  python -m typefaces.train_judge

One resumable stage (`resume=true`) on public families, as they are and drawn with a pen, and on people's handwriting
(`people=FILE`). Then evaluation on held-out public families, on the development writers and on development people.
Writes `judge/` to `output`: fp16 weights and config.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from conf.cli import hydra_application
from conf.schemas.pretraining import TrainJudgeConfig
from typefaces import dataset, people
from typefaces.dataset import MERGED
from typefaces.judge import STYLE, Judge, JudgeNetwork
from typefaces.people import Hand
from typefaces.pretraining.corpus import pictures
from typefaces.pretraining.judge_training import (
    PEN_STYLES,
    CharacterSource,
    JudgeTrainee,
    Penned,
    Printed,
    Written,
    judge_loss,
    measure,
    read_rate,
    style_table,
)
from typefaces.pretraining.loop import train
from typefaces.train_base import checkpoint_dir, load_public_families, torch_device


def train_judge(config: TrainJudgeConfig, images: Tensor, hands: Sequence[Hand]) -> JudgeNetwork:
    """Train the judge.

    Args:
        config: configuration of the run.
        images: typefaces, uint8 [families × 62, 1, 64, 64].
        hands: people who train it.
    """
    sources = build_sources(config, images, hands)
    styles = sum(source.styles for source, _ in sources)
    trainee = JudgeTrainee(styles=styles, widths=config.widths, dropout=config.dropout).to(images.device)
    network = torch.compile(trainee) if config.judge.compile else trainee

    def loss(generator: Generator) -> Tensor:
        return judge_loss(
            network,
            sources,
            style=config.style_weight,
            smoothing=config.label_smoothing,
            generator=generator,
        )

    averaged = train(
        trainee,
        loss,
        stage=config.judge,
        name="judge",
        seed=config.seed,
        folder=checkpoint_dir(config),
        resume=config.resume,
    )
    return averaged.judge


def measure_people(config: TrainJudgeConfig, judge: Judge) -> dict[str, dict[str, float]]:
    """Measure the judge on development people, if the file of people has some."""
    if config.people is None:
        return {}
    return {"development_people": read_rate(judge, people.load(Path(config.people), role="development"))}


def build_sources(config: TrainJudgeConfig, images: Tensor, hands: Sequence[Hand]) -> list[tuple[CharacterSource, int]]:
    """Return the sources of a batch, and the number of examples of each.

    Args:
        config: configuration of the run.
        images: typefaces, uint8 [families × 62, 1, 64, 64].
        hands: people who train the judge; empty: their share goes to typefaces.
    """
    generator, families = Generator(images.device).manual_seed(config.seed), len(images) // len(dataset.GLYPHS)
    batch, sources = config.judge.batch_size, list[tuple[CharacterSource, int]]()
    penned, written = round(config.pen * batch), round(config.people_share * batch) if hands else 0
    sources.append((Printed(images, style_table(families, config.styles, generator)), batch - penned - written))
    if penned:
        table = style_table(families, config.styles, generator, jitter=PEN_STYLES)
        sources.append((Penned(images, table, generator), penned))
    if written:
        sources.append((Written(hands, images.device), written))
    return sources


@hydra_application("train_judge", TrainJudgeConfig)
def main(config: TrainJudgeConfig) -> None:
    """Train, save and evaluate the judge."""
    device = torch_device(config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    training, held = load_public_families(config)
    hands = people.load(Path(config.people), role=config.people_role) if config.people else []
    network = train_judge(config, pictures(training).to(device), hands).half().float()  # evaluated as it is shipped
    data = Path(config.dataset) if config.dataset else None
    judge = Judge(network)
    record = {
        "glyphs": dataset.GLYPHS,
        "merged": MERGED,
        "style_dimensions": STYLE,
        "widths": list(config.widths),
        "training_families": len(training),
        "metrics": {
            "held_out_public": measure(judge, held),
            "development": measure(judge, dataset.load("development", data)),
            **measure_people(config, judge),
        },
        "data_sha256": dataset.digest(data),
        "training": asdict(config),
        "torch": torch.__version__,
    }
    folder = Path(config.output) / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous().cpu() for k, v in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["metrics"]), flush=True)


if __name__ == "__main__":
    main()
