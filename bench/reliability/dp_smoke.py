"""Two private training steps on the glyph base, with the result as one line of JSON.

    anther bench dp_smoke

This is a single file that needs only installed packages, so that another machine's Python can read it from standard
input (`bench.reliability.aarch64`). Noise and batches are simulated with seed 7, so every machine draws the same.
"""

from __future__ import annotations

import base64
import json
import platform
import resource
import time
from importlib.metadata import distributions

import numpy as np
import torch

from models.base.base import load
from models.lora.adapter import init_adapter
from privacy.noise import SimulatedNoise
from training.engine import perform
from training.jobs import DPSGD, EncodeJob, Examples, Picture, TrainedAdapter, TrainJob
from typefaces import dataset

SEED, RANK, STEPS, PICTURES, BATCH = 7, 4, 2, 8, 4
PRIVACY = DPSGD(noise_multiplier=0.5, clip=0.01, sampling_rate=BATCH / PICTURES)
MEMORY = 1 << 30  # budget in bytes


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.backends.nnpack.set_flags(False)  # avoids its warning on unknown processors
    base = load("glyphs")
    writer = dataset.load("development")[0]
    captions = [dataset.caption(glyph) for glyph in dataset.GLYPHS[:PICTURES]]
    pictures = [Picture(np.asarray(image), caption) for image, caption in zip(writer.images, captions, strict=False)]
    (examples,) = perform(base, [EncodeJob(pictures=pictures)], memory=MEMORY, timesteps=1)
    assert isinstance(examples, Examples), examples
    loaded = time.perf_counter()
    job = TrainJob(
        client="smoke",
        round=1,
        purpose="shared",
        seed=SEED,
        examples=examples,
        start=init_adapter(base.sites, RANK, SEED),
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=1e-2,
        privacy=PRIVACY,
        noise=SimulatedNoise(seed=SEED, client="smoke", round=1, purpose="shared"),
        names=tuple(captions),
    )
    (trained,) = perform(base, [job], memory=MEMORY, timesteps=1)
    assert isinstance(trained, TrainedAdapter), trained
    products = {site: (b @ a).numpy() for site, (a, b) in sorted(trained.adapter.items())}
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "python": platform.python_version(),
                "base": base.hash,
                "loss": trained.loss,
                "steps": trained.steps,
                "seconds_to_load": loaded - started,
                "seconds_to_train": time.perf_counter() - loaded,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "packages": {package.name: package.version for package in distributions()},
                "shapes": {site: product.shape for site, product in products.items()},
                "products": base64.b64encode(b"".join(p.astype("<f4").tobytes() for p in products.values())).decode(),
            }
        )
    )


if __name__ == "__main__":
    main()
