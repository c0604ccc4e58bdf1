"""Train the judge from scratch:  python -m typefaces.train_judge

One resumable stage (`resume=true`) on public families, then evaluation on held-out public families and on the
development writers. Writes `judge/` to `output`: fp16 weights and config.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from conf.cli import hydra_application
from conf.schemas.pretraining import TrainJudgeConfig
from typefaces import dataset
from typefaces.dataset import MERGED
from typefaces.judge import STYLE, Judge, JudgeNetwork
from typefaces.pretraining.corpus import pictures
from typefaces.pretraining.judge_training import JudgeTrainee, judge_loss, measure, style_table
from typefaces.pretraining.loop import train
from typefaces.train_base import checkpoint_dir, load_public_families, torch_device


def train_judge(config: TrainJudgeConfig, images: Tensor) -> JudgeNetwork:
    """Train the judge on uint8 images [families × 62, 1, 64, 64]."""
    families = len(images) // len(dataset.GLYPHS)
    table = style_table(families, config.styles, Generator(images.device).manual_seed(config.seed))
    trainee = JudgeTrainee(styles=len(table)).to(images.device)
    network = torch.compile(trainee) if config.judge.compile else trainee

    def loss(generator: Generator) -> Tensor:
        return judge_loss(
            network,
            images,
            table=table,
            batch=config.judge.batch_size,
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


@hydra_application("train_judge", TrainJudgeConfig)
def main(config: TrainJudgeConfig) -> None:
    """Train, save and evaluate the judge."""
    device = torch_device(config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    training, held = load_public_families(config)
    network = train_judge(config, pictures(training).to(device)).half().float()  # evaluated as it is shipped
    data = Path(config.dataset) if config.dataset else None
    judge = Judge(network)
    record = {
        "glyphs": dataset.GLYPHS,
        "merged": MERGED,
        "style_dimensions": STYLE,
        "training_families": len(training),
        "metrics": {
            "held_out_public": measure(judge, held),
            "development": measure(judge, dataset.load("development", data)),
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
