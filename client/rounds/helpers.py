"""Helpers that all request handlers share: encoded pictures, cost estimates.

A private reply takes its pictures from `private_pictures`, which never fails. From the first time the pictures are
read, only noised values may depend on them: an error message, or the mere fact of an error, would leak information.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence

import numpy as np
import torch

from client.data import MissingPicture, fingerprint
from client.data.reading import DECODING
from client.device import Device
from client.power.conditions import ESTIMATE
from client.power.meter import TrainingCost
from common.errors import AntherError
from privacy.ledger.entries import LedgerHistory
from privacy.policy import RequestRefusedError
from protocol.messages import PersonalizationMethod
from training import jobs
from training.jobs import Cancelled, Examples, Job, Picture, Result, expect
from training.personalization import Personalization, build
from training.variants import PLAIN, VariantOptions, count_variants

log = logging.getLogger(__name__)

_BLANK = Picture(np.zeros((8, 8), np.uint8), "")


def requested_method(method: PersonalizationMethod) -> Personalization:
    """Create the method that a message names; RequestRefusedError if it is unknown here, or an option is wrong."""
    try:
        return build(method.name, method.arguments())
    except AntherError as error:
        raise RequestRefusedError(str(error)) from None


def encode_split(
    device: Device, split: str, pictures: Sequence[Picture], options: VariantOptions = PLAIN
) -> Generator[Job, Result, Examples]:
    """Encode the pictures of a split for the denoiser, or load them from the cache.

    Args:
        device: the device whose store has the cache.
        split: `train`, `validation` or `test`.
        pictures: the pictures of the split.
        options: determine the examples of each picture; one by default.
    """
    if count_variants(pictures, options) is None:
        options = PLAIN
    key = cache_key(device, pictures)
    if options != PLAIN:
        key += f":{options.flip}:{options.dropout > 0}"
    examples = device.store.examples(split, key)
    if examples is None:
        examples = expect(Examples, (yield jobs.EncodeJob(pictures=pictures, options=options)))
        device.store.save_examples(split, key, examples)
    return examples


def private_pictures(device: Device, split: str, assumed: int) -> tuple[Picture, ...]:
    """Return the pictures of a split that a private job may use: those in its first `assumed` positions, by name.

    Neighboring data sets, as compared by ε, differ in one position: with its picture or without. A picture that is
    missing, damaged or cannot be encoded is absent, and no other picture takes its position. With at most `assumed`
    pictures, this is adding or removing one picture, and the bound of the Poisson-sampled Gaussian is unchanged. With
    more pictures, removing a picture together with its metadata line moves another one in, and the bound covers the
    change of two pictures.

    Args:
        device: the device whose pictures are used.
        split: `train`, `validation` or `test`.
        assumed: N, the number of pictures that a plan assumes; it bounds memory and time equally for all devices.
    """
    try:
        candidates: tuple[Picture, ...] = getattr((device.listed_pictures or device.pictures)(), split)
    except Exception as error:
        log.error("none of the pictures can be used, so the private reply contains only noise: %s", error)
        return ()
    if len(candidates) > assumed:
        log.warning(
            "of %d pictures (%s) only the first %d by name are used: the server's run assumes no more (its data.%s)",
            len(candidates),
            split,
            assumed,
            split,
        )
    return tuple(picture for picture in candidates[:assumed] if not isinstance(picture, MissingPicture))


def encode_usable(
    device: Device, split: str, pictures: Sequence[Picture]
) -> Generator[Job, Result, tuple[tuple[Picture, ...], Examples]]:
    """Encode the pictures of a private job; those that cannot be encoded are left out.

    Args:
        device: the device whose pictures are encoded.
        split: `train`, `validation` or `test`.
        pictures: the candidates.

    Returns:
        The encoded pictures and their examples, both possibly empty.
    """
    if pictures:
        try:
            return tuple(pictures), (yield from encode_split(device, split, pictures))
        except Cancelled:
            raise
        except Exception as error:
            log.error("a picture (%s) can't be encoded and counts as missing: %s", split, error)
    usable, encoded = [], []
    for picture in pictures:
        try:
            encoded.append(expect(Examples, (yield jobs.EncodeJob(pictures=[picture]))))
            usable.append(picture)
        except Cancelled:
            raise
        except Exception as error:
            log.error("%s: %s", picture.caption, error)
    if not encoded:
        encoded = [Examples(*(part[:0] for part in expect(Examples, (yield jobs.EncodeJob(pictures=[_BLANK])))))]
    return tuple(usable), Examples(*(torch.cat(parts) for parts in zip(*encoded, strict=True)))


def finite_epsilon(delta: float, history: LedgerHistory) -> float:
    """Return ε of everything charged, for a private reply.

    Raises RequestRefusedError if ε is infinite, before anything is trained or measured: JSON cannot encode infinity, so
    the reply would fail after training, each time it is requested.
    """
    if math.isinf(epsilon := history.spent(delta).value):
        raise RequestRefusedError(
            f"privacy.delta={delta}: this device can guarantee no finite ε at this δ; use a larger delta"
        )
    return epsilon


def cache_key(device: Device, pictures: Sequence[Picture]) -> str:
    """Return the cache key of pictures encoded by this base at the device's resolution."""
    return f"{device.report.base}:{device.resolution}:{DECODING}:{fingerprint(pictures)}"


def training_cost(
    device: Device, examples: int, *, duration_examples: int | None = None, measured: bool = False
) -> TrainingCost:
    """Return the cost of training on this many examples; the estimate does not depend on the pictures.

    Args:
        device: the device that trains.
        examples: number of examples that are computed.
        duration_examples: number of examples whose duration the round takes, if the device waits at its end.
        measured: prefer the device's meter, if it has one. A measurement depends on the pictures, through batch
            durations and the time at which training ended.
    """
    if measured and device.measured_cost is not None and (metered := device.measured_cost()) is not None:
        return metered
    rate = device.report.examples_per_second
    return TrainingCost((duration_examples or examples) / rate, examples / rate * device.report.watts, ESTIMATE)
