"""The personal adapter: trained on top of a shared one, on the device, for its owner alone."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator, Sequence

import torch

from client.device import Device
from client.rounds.helpers import encode_split, expect, training_cost
from client.rounds.local_factors import with_local_factors
from client.rounds.received_adapter import receive_adapter
from client.runtime.throttled_jobs import OutOfMemory
from client.store.store import PersonalAdapter
from common.errors import AntherError
from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, concatenate, init_adapter, rank
from models.lora.norm_bound import norm_violation
from privacy.policy import RequestRefusedError
from protocol import messages
from training import jobs
from training.jobs import Cancelled, Examples, GeneratedImages, Job, Result, TrainedAdapter

PERSONAL = "personal"
PREVIEW_STEPS = 8
TRIES, MOST_TRIES = "personalise-tries", 3

log = logging.getLogger(__name__)


def answer(request: messages.Personalize, device: Device) -> Generator[Job, Result, messages.Personalized]:
    """Train the personal adapter on top of the shared one sent, or of the one kept, and keep both on the device.

    What comes of it is the owner's alone. The reply is made before any picture is looked at, and from there on it is
    given whatever happens: a failure, or the lack of one, would tell of the pictures without noise or charge. Only a
    guard that stops for the battery, for heat or for its owner ends it without a reply.
    """
    device.policy.check_adaptable(device.report.base, device.sites)
    device.policy.check_work(
        rank=request.rank, steps=request.steps, examples=request.batch_size, learning_rate=request.learning_rate
    )
    device.policy.check_timesteps(request.timesteps)
    device.check_memory(request.rank, device.sites)
    if min(request.look_every, request.patience) < 1:
        raise RequestRefusedError(
            f"look_every={request.look_every}, patience={request.patience}: each must be 1 or more"
        )
    sent = receive_adapter(request.adapter, device, rounded=request.rounded).adapter
    # Of the steps asked for, and never measured: when training stops tells of the pictures.
    seconds, joules, quality = training_cost(device, request.steps * request.batch_size)
    reply = messages.Personalized(device=device.name, seconds=seconds, joules=joules, quality=quality)
    identity = hashlib.sha256(messages.to_json(request).encode() + request.adapter).hexdigest()
    try:
        yield from _once(request, identity, with_local_factors(sent, request.run, device), device)
    except Cancelled as error:
        if not isinstance(error, OutOfMemory):
            raise
        log.error("nothing was learnt for its owner in round %d: %s", request.round, error)
    except Exception as error:
        unforeseen = None if isinstance(error, AntherError) else error
        log.error("nothing was learnt for its owner in round %d: %s", request.round, error, exc_info=unforeseen)
    return reply


def _once(request: messages.Personalize, identity: str, sent: Adapter, device: Device) -> Generator[Job, Result, None]:
    """Do what was asked for, unless it is done or has ended this process too often: with how many pictures it does,
    whoever asks for the reply again and again would find out.
    """
    tries = device.store.number(TRIES, identity) or 0
    if tries >= MOST_TRIES:
        raise AntherError(f"it has ended the worker {tries:.0f} times: give it more memory, or lower worker.memory_gib")
    device.store.save_number(TRIES, identity, tries + 1)
    try:
        yield from _learn(request, identity, sent, device)
    finally:  # whatever it came to, this process is there to see it
        device.store.save_number(TRIES, identity, 0)


def _learn(request: messages.Personalize, identity: str, sent: Adapter, device: Device) -> Generator[Job, Result, None]:
    """Train, and keep what was trained where it is finite, of bounded norm and no worse than what was there."""
    there = device.store.personal(device.sites)
    if there and there.request == identity:
        return  # made before a crash of whoever asked: training on from it would give another one
    stored = there if there and there.base == device.report.base else None
    pictures = device.pictures()
    examples = yield from encode_split(device, "train", pictures.train)
    judges, stopping = examples, None  # those trained on, where there are no others: they show what is broken
    if pictures.validation:
        judges = yield from encode_split(device, "validation", pictures.validation)
        every = min(request.look_every, request.steps)
        promised = device.policy.promises_privacy(device.store.ledger.history().mechanisms)
        patience = request.steps if promised else request.patience  # the step at which it ends would tell of pictures
        stopping = jobs.EarlyStopping(validation=judges, every=every, patience=patience)
    shared = yield from _better(sent, stored, judges)
    start = _personal_start(request.rank, shared, stored, device)
    trained = expect(
        TrainedAdapter,
        (
            yield jobs.TrainJob(
                client=device.name,
                round=request.round,
                purpose=PERSONAL,
                seed=device.seed,
                examples=examples,
                start=start,
                frozen=shared,
                steps=request.steps,
                batch_size=request.batch_size,
                learning_rate=request.learning_rate,
                early_stopping=stopping,
            )
        ),
    ).adapter
    before = stored or PersonalAdapter(start, shared, device.report.base, identity)
    if (yield from _is_worse(trained, shared, before, judges)):
        log.warning("round %d taught nothing better than what was there, which stays", request.round)
        found = before._replace(request=identity)
        device.store.save_personal(found, aside=there is not None and stored is None)
    else:
        found = PersonalAdapter(trained, shared, device.report.base, identity)
        device.store.save_personal(found, aside=there is not None)
    if device.previews:
        captions = [picture.caption for picture in pictures.validation or pictures.train][: device.previews]
        yield from _preview(f"round-{request.round:06d}", captions, (found.shared, found.adapter), device)


def _is_worse(
    trained: Adapter, shared: Adapter, before: PersonalAdapter, judges: Examples
) -> Generator[Job, Result, bool]:
    """Whether what was trained may not take the place of what was there before: both are measured, whatever they are.

    NaN and infinity are worse than anything, also where what was there is no better.
    """
    old = yield from _loss(judges, concatenate([before.shared, before.adapter]))
    new = yield from _loss(judges, concatenate([shared, trained]))
    if wrong := norm_violation(trained):
        log.warning("what was trained is out of bounds: %s", wrong)
        return True
    return not math.isfinite(new) or new > old


def _loss(judges: Examples, adapter: Adapter) -> Generator[Job, Result, float]:
    return expect(float, (yield jobs.MeasureJob(examples=judges, adapter=adapter)))


def _preview(
    name: str, captions: Sequence[str], adapters: Sequence[Adapter], device: Device
) -> Generator[Job, Result, None]:
    """Draw what was learnt, for the owner to see; it is learnt though it can't be drawn."""
    try:
        job = jobs.GenerateJob(captions=captions, adapters=adapters, seed=device.seed, steps=PREVIEW_STEPS)
        device.store.save_preview(name, expect(GeneratedImages, (yield job)).pictures)
    except Exception as error:
        log.warning("no preview of %s: %s", name, error)


def _better(sent: Adapter, stored: PersonalAdapter | None, judges: Examples) -> Generator[Job, Result, Adapter]:
    """The shared adapter to keep: the one sent, unless the one kept so far does better on the owner's own pictures.

    Both are measured whichever was kept before, so that what there is to do doesn't tell.
    """
    if stored is None:
        return sent
    kept = yield from _loss(judges, stored.shared)
    new = yield from _loss(judges, sent)
    return stored.shared if kept < new or math.isnan(new) else sent


def _personal_start(rank_asked: int, shared: Adapter, stored: PersonalAdapter | None, device: Device) -> Adapter:
    """Where the personal adapter was left, if it sits on this same shared adapter; else a new one.

    A new one looks where the federation found that people differ: its A is the shared adapter's (Guo et al., 2025,
    arXiv:2410.01463), its B is zero.
    """
    if stored and rank(stored.adapter) == rank_asked and _same(stored.shared, shared):
        return stored.adapter
    fresh = init_adapter(device.sites, rank_asked, derive_seed(device.seed, device.name, PERSONAL))
    return {name: Factors(torch.cat([shared[name].a, f.a])[:rank_asked], f.b) for name, f in fresh.items()}


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters at the same sites are equal, number by number."""
    return one is other or all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
