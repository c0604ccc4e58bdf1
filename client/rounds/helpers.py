"""What every answer needs: the result of a job, pictures encoded once, and what work is estimated to cost.

A private answer takes its pictures from `private_pictures`, which never fails: from its first look at them on, nothing that it
does tells of them but what was noised. The reason for an error, or that there was one, would.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from client.data import MissingPicture, fingerprint
from client.device import Device
from client.power.conditions import ESTIMATE
from client.power.meter import TrainingCost
from privacy.ledger.entries import LedgerHistory
from privacy.policy import RequestRefusedError
from training import jobs
from training.jobs import Cancelled, Examples, GeneratedImages, Job, Picture, Result, TrainedAdapter

log = logging.getLogger(__name__)

_BLANK = Picture(np.zeros((8, 8), np.uint8), "")
T = TypeVar("T", Examples, TrainedAdapter, float, Tensor, GeneratedImages)


def expect(kind: type[T], result: Result) -> T:
    """The result of a job, which must be of its kind."""
    if not isinstance(result, kind):
        raise TypeError(f"a driver sent {type(result).__name__} for {kind.__name__}")
    return result


def encode_split(device: Device, split: str, pictures: Sequence[Picture]) -> Generator[Job, Result, Examples]:
    """The pictures of a split as the denoiser sees them, encoded once."""
    key = cache_key(device, pictures)
    examples = device.store.examples(split, key)
    if examples is None:
        examples = expect(Examples, (yield jobs.EncodeJob(pictures=pictures)))
        device.store.save_examples(split, key, examples)
    return examples


def private_pictures(device: Device, split: str, assumed: int) -> tuple[Picture, ...]:
    """The pictures of a split that a private job may use: of its first `assumed` places, in the order of names.

    The neighbors that ε compares are a place with its picture and the same place without one: whatever is missing,
    damaged or can't be encoded is absent, and nobody moves up. With no more pictures than places that is one picture
    added or removed, and the bound of the Poisson-sampled Gaussian is the same. With more, one whose line is removed
    too lets another in, and what is bounded is what two pictures change.

    Args:
        assumed: N, how many pictures a plan assumes, which bounds memory and time for all devices alike.
    """
    try:
        listed: tuple[Picture, ...] = getattr((device.listed or device.pictures)(), split)
    except Exception as error:
        log.error("none of the pictures can be used, and a private reply is noise alone: %s", error)
        return ()
    if len(listed) > assumed:
        log.warning(
            "of %d pictures (%s) the first %d by name are used: the plan assumes so many", len(listed), split, assumed
        )
    return tuple(picture for picture in listed[:assumed] if not isinstance(picture, MissingPicture))


def encode_usable(
    device: Device, split: str, pictures: Sequence[Picture]
) -> Generator[Job, Result, tuple[tuple[Picture, ...], Examples]]:
    """Those of a private job's pictures that can be encoded, and what the denoiser sees of them, maybe nothing."""
    if pictures:
        try:
            return tuple(pictures), (yield from encode_split(device, split, pictures))
        except Cancelled:
            raise
        except Exception as error:
            log.error("a picture (%s) can't be encoded, and counts as absent: %s", split, error)
    kept, found = [], []
    for picture in pictures:
        try:
            found.append(expect(Examples, (yield jobs.EncodeJob(pictures=[picture]))))
            kept.append(picture)
        except Cancelled:
            raise
        except Exception as error:
            log.error("%s: %s", picture.caption, error)
    if not found:
        found = [Examples(*(part[:0] for part in expect(Examples, (yield jobs.EncodeJob(pictures=[_BLANK])))))]
    return tuple(kept), Examples(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def finite_epsilon(delta: float, history: LedgerHistory) -> float:
    """ε of all that is charged, as a private reply tells it.

    Raises Refusal, before anything is trained or measured, if that is no number. JSON has none for it, so the reply
    would fail afterwards, as often as it is asked for.
    """
    if math.isinf(found := history.spent(delta).value):
        raise RequestRefusedError(f"privacy.delta: {delta} asked, at which this device can promise no ε")
    return found


def cache_key(device: Device, pictures: Sequence[Picture]) -> str:
    """Of what the base makes of pictures, seen at the device's resolution."""
    return f"{device.report.base}:{device.resolution}:{fingerprint(pictures)}"


def training_cost(device: Device, examples: int, *, lasting: int | None = None, measured: bool = False) -> TrainingCost:
    """What training on so many examples takes: an estimate, which says nothing of the pictures.

    Args:
        lasting: examples whose time it takes, if it waits at the end.
        measured: what the device's meter found, if it has one. That tells of the pictures, by how long batches took
            and when training ended.
    """
    if measured and device.spent is not None and (found := device.spent()) is not None:
        return found
    rate = device.report.examples_per_second
    return TrainingCost((lasting or examples) / rate, examples / rate * device.report.watts, ESTIMATE)
