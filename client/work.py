"""What every answer needs: the result of a job, pictures encoded once, and what work is estimated to cost."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from torch import Tensor

from client.data import fingerprint
from client.device import Device
from client.power.conditions import ESTIMATE
from client.power.meter import Spent
from training import jobs
from training.jobs import Drawn, Examples, Job, Picture, Result, Trained

T = TypeVar("T", Examples, Trained, float, Tensor, Drawn)


def expect(kind: type[T], result: Result) -> T:
    """The result of a job, which must be of its kind."""
    if not isinstance(result, kind):
        raise TypeError(f"a driver sent {type(result).__name__} for {kind.__name__}")
    return result


def encoded(device: Device, split: str, pictures: Sequence[Picture]) -> Generator[Job, Result, Examples]:
    """The pictures of a split as the denoiser sees them, encoded once."""
    key = cache_key(device, pictures)
    examples = device.store.examples(split, key)
    if examples is None:
        examples = expect(Examples, (yield jobs.Encode(pictures=pictures)))
        device.store.save_examples(split, key, examples)
    return examples


def cache_key(device: Device, pictures: Sequence[Picture]) -> str:
    """Of what the base makes of pictures, seen at the device's resolution."""
    return f"{device.report.base}:{device.resolution}:{fingerprint(pictures)}"


def cost(device: Device, examples: int, *, measured: bool = False) -> Spent:
    """What training on so many examples takes: an estimate, which says nothing of the pictures.

    Args:
        measured: what the device's meter found, if it has one. That tells of the pictures, by how long batches took
            and when training ended.
    """
    if measured and device.spent is not None and (found := device.spent()) is not None:
        return found
    seconds = examples / device.report.examples_per_second
    return Spent(seconds, seconds * device.report.watts, ESTIMATE)
