"""The personal adapter: trained on top of a shared one, on the device, for its owner alone."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator, Sequence

import torch

from client.device import Device
from client.own import of_run
from client.sent import received
from client.store import Personal
from client.work import cost, encoded, expect
from models.adapter import Adapter, Factors, initial, rank
from privacy.noise import stream
from privacy.policy import Refusal
from protocol import messages
from training import jobs
from training.jobs import Drawn, Examples, Job, Result, Trained

PERSONAL = "personal"
PREVIEW_STEPS = 8

log = logging.getLogger(__name__)


def answer(request: messages.Personalise, device: Device) -> Generator[Job, Result, messages.Personalised]:
    """Train the personal adapter on top of the shared one sent, or of the one kept, and keep both on the device.

    Which of the two it is, is the owner's alone: nothing that leaves the device, now or later, depends on it.
    """
    device.policy.check_adaptable(device.report.base, device.sites)
    device.policy.check_work(
        rank=request.rank, steps=request.steps, examples=request.batch_size, learning_rate=request.learning_rate
    )
    device.check_memory(request.rank, device.sites)
    if min(request.look_every, request.patience) < 1:
        raise Refusal(f"look_every={request.look_every}, patience={request.patience}: each must be 1 or more")
    sent = of_run(received(request.adapter, device, rounded=request.rounded).adapter, request.run, device)
    # Of the steps asked for, and never measured: when training stops tells of the pictures.
    seconds, joules, quality = cost(device, request.steps * request.batch_size)
    reply = messages.Personalised(device=device.name, seconds=seconds, joules=joules, quality=quality)
    identity = hashlib.sha256(messages.to_json(request).encode() + request.adapter).hexdigest()
    stored = device.store.personal(device.sites)
    if stored and stored.request == identity:
        return reply  # made before a crash of whoever asked: training on from it would give another one
    pictures = device.pictures()
    examples = yield from encoded(device, "train", pictures.train)
    stopping, shared = None, sent
    if pictures.validation:
        validation = yield from encoded(device, "validation", pictures.validation)
        stopping = jobs.EarlyStopping(validation=validation, every=request.look_every, patience=request.patience)
        shared = yield from _better(sent, stored, validation, device)
    trained = expect(
        Trained,
        (
            yield jobs.Train(
                client=device.name,
                round=request.round,
                purpose=PERSONAL,
                seed=device.seed,
                examples=examples,
                start=_personal_start(request.rank, shared, stored, device),
                frozen=shared,
                steps=request.steps,
                batch_size=request.batch_size,
                learning_rate=request.learning_rate,
                early_stopping=stopping,
            )
        ),
    )
    is_new = stored is not None and not _same(stored.shared, shared)
    device.store.save_personal(Personal(trained.adapter, shared, device.report.base, identity), aside=is_new)
    if device.previews:
        captions = [picture.caption for picture in pictures.validation or pictures.train][: device.previews]
        yield from _preview(f"round-{request.round:06d}", captions, (shared, trained.adapter), device)
    return reply


def _preview(
    name: str, captions: Sequence[str], adapters: Sequence[Adapter], device: Device
) -> Generator[Job, Result, None]:
    """Draw what was learnt, for the owner to see; it is learnt though it can't be drawn."""
    try:
        job = jobs.Draw(captions=captions, adapters=adapters, seed=device.seed, steps=PREVIEW_STEPS)
        device.store.save_preview(name, expect(Drawn, (yield job)).pictures)
    except Exception as error:
        log.warning("no preview of %s: %s", name, error)


def _better(
    sent: Adapter, stored: Personal | None, validation: Examples, device: Device
) -> Generator[Job, Result, Adapter]:
    """The shared adapter to keep: the one sent, unless the one kept so far does better on the owner's own pictures.

    Both are measured whichever was kept before, so that what there is to do doesn't tell.
    """
    if stored is None or stored.base != device.report.base:
        return sent
    kept = expect(float, (yield jobs.Measure(examples=validation, adapter=stored.shared)))
    new = expect(float, (yield jobs.Measure(examples=validation, adapter=sent)))
    return stored.shared if kept < new or math.isnan(new) else sent


def _personal_start(rank_asked: int, shared: Adapter, stored: Personal | None, device: Device) -> Adapter:
    """Where the personal adapter was left, if it sits on this same shared adapter; else a new one.

    A new one looks where the federation found that people differ: its A is the shared adapter's (Guo et al., 2025,
    arXiv:2410.01463), its B is zero.
    """
    if (
        stored
        and stored.base == device.report.base
        and rank(stored.adapter) == rank_asked
        and _same(stored.shared, shared)
    ):
        return stored.adapter
    fresh = initial(device.sites, rank_asked, stream(device.seed, device.name, PERSONAL))
    return {name: Factors(torch.cat([shared[name].a, f.a])[:rank_asked], f.b) for name, f in fresh.items()}


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters at the same sites are equal, number by number."""
    return one is other or all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
