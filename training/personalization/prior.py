"""Prior preservation: a LoRA on top that also trains on pictures which the base itself draws for the owner's captions.

With x a picture of the owner, x' one that the base draws, and captions c and c', a step minimizes

    E ‖ε − ε_θ(x_t, c)‖² + λ E ‖ε' − ε_θ(x'_t', c')‖²

(DreamBooth: Ruiz et al., 2023, arXiv:2208.12242, eq. 2, in the base's own parametrization). The second term keeps the
base's knowledge of the class, so that few pictures change it less. Use it if a LoRA on top overfits: if its pictures
lose variety, or other parts of a caption than the subject.

Captions should name the class ("a dog", not only "my dog Rex"), since the base draws them. The pictures are drawn on
the device with its own seed and are never sent.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace

from common.seeding import derive_seed
from conf.schemas import sampling
from models.lora.adapter import Adapter
from training.jobs import (
    EncodeJob,
    Examples,
    GeneratedImages,
    GenerateJob,
    Job,
    Picture,
    Prior,
    Result,
    TrainedAdapter,
    TrainJob,
    expect,
)
from training.personalization import Personalization, personalization


@personalization("prior")
class PriorPreservation(Personalization):
    """A LoRA on top, trained with prior preservation.

    Each step has a batch of the owner's pictures and one of those that the base drew.

    Args:
        pictures: pictures that the base draws for each caption.
        weight: λ, weight of their loss.
    """

    passes_per_step = 2

    def __init__(self, *, pictures: int = 1, weight: float = 1.0) -> None:
        if pictures < 1:
            raise ValueError(f"pictures={pictures}: must be 1 or more")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight={weight}: must be over 0")
        self.pictures, self.weight = pictures, weight

    @property
    def drawing_steps(self) -> int:
        """See `Personalization.drawing_steps`."""
        return self.pictures * sampling.STEPS

    def fit(self, job: TrainJob, shared: Adapter, captions: Sequence[str]) -> Generator[Job, Result, Adapter]:
        """See `Personalization.fit`."""
        del shared
        drawn = []
        distinct = list(dict.fromkeys(captions))
        for number in range(self.pictures):
            seed = derive_seed(job.seed, job.client, number, "prior")
            drawing = GenerateJob(captions=distinct, adapters=(), seed=seed, steps=sampling.STEPS)
            images = expect(GeneratedImages, (yield drawing)).pictures
            drawn += [Picture(image, caption) for image, caption in zip(images, distinct, strict=True)]
        examples = expect(Examples, (yield EncodeJob(pictures=drawn)))
        return expect(TrainedAdapter, (yield replace(job, prior=Prior(examples=examples, weight=self.weight)))).adapter
