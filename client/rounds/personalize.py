"""Train the personal adapter on top of a shared one, on the device, for its owner only."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator, Sequence

import torch

from client.data.masks import loss_weights
from client.device import Device
from client.rounds.effect import missing_effect
from client.rounds.helpers import encode_split, requested_method, training_cost
from client.rounds.local_factors import with_local_factors
from client.rounds.method_state import state_after_rounds
from client.rounds.received_adapter import receive_adapter
from client.store.store import PersonalAdapter
from common.errors import AntherError
from common.seeding import derive_seed
from conf.schemas import sampling
from models.lora.adapter import Adapter, Factors, concatenate, guides_of, init_adapter, rank
from models.lora.directions import without_zero_rank
from models.lora.norm_bound import norm_violation
from models.lora.resize import with_rank
from privacy.policy import RequestRefusedError
from protocol import messages
from training import jobs
from training.jobs import Cancelled, Examples, GeneratedImages, Job, OutOfMemory, Result, expect, first_variants
from training.personalization import Personalization
from training.variants import count_variants

PERSONAL = "personal"
TRIES, MAX_TRIES = "personalise-tries", 3  # the name is stored; don't change it

log = logging.getLogger(__name__)


def answer(request: messages.Personalize, device: Device) -> Generator[Job, Result, messages.Personalized]:
    """Train the personal adapter on top of the received or the stored shared adapter, and store both on the device.

    The result never leaves the device. The reply is built before any picture is read, and is sent whatever happens
    afterwards: a failure, or its absence, would reveal information about the pictures without noise or charge. Only the
    throttle (battery, heat, the owner using the device) ends the request without a reply.
    """
    device.policy.check_adaptable(device.report.base, device.sites, device.named_sites)
    method = requested_method(request.method)
    steps = request.steps * method.passes_per_step + method.steps_after
    device.policy.check_work(
        rank=max(request.rank, method.personal_rank(request.rank, request.rank)),  # below for that of the shared one
        steps=steps + method.drawing_steps,
        examples=request.batch_size,
        learning_rate=request.learning_rate,
    )
    device.policy.check_timesteps(request.timesteps)
    if min(request.look_every, request.patience) < 1:
        raise RequestRefusedError(
            f"look_every={request.look_every}, patience={request.patience}: each must be 1 or more"
        )
    sent = receive_adapter(request.adapter, device, rounded=request.rounded).adapter
    device.check_memory(method.personal_rank(request.rank, rank(sent)), device.sites, 0)
    # From the requested steps, never measured: the step at which training stops depends on the pictures.
    seconds, joules, quality = training_cost(device, steps * request.batch_size)
    reply = messages.Personalized(device=device.name, seconds=seconds, joules=joules, quality=quality)
    identity = hashlib.sha256(messages.to_json(request).encode() + request.adapter).hexdigest()
    try:
        yield from _once(request, method, identity, with_local_factors(sent, request.run, device), device)
    except Cancelled as error:
        if not isinstance(error, OutOfMemory):
            raise
        log.error("round %d changed nothing in the owner's personal adapter: %s", request.round, error)
    except Exception as error:
        unforeseen = None if isinstance(error, AntherError) else error
        log.error(
            "round %d changed nothing in the owner's personal adapter: %s", request.round, error, exc_info=unforeseen
        )
    return reply


def _once(
    request: messages.Personalize, method: Personalization, identity: str, sent: Adapter, device: Device
) -> Generator[Job, Result, None]:
    """Train unless this request is done, or has ended the process too often.

    Such a crash depends on the number of pictures, so without this limit repeated requests would reveal it.

    Args:
        request: the server's request.
        method: the requested method.
        identity: its hash, which identifies repeated requests.
        sent: the received shared adapter.
        device: the device that trains.
    """
    tries = device.store.number(TRIES, identity) or 0
    if tries >= MAX_TRIES:
        raise AntherError(f"training ended the worker {tries:.0f} times: free memory, or lower worker.memory_gib")
    device.store.save_number(TRIES, identity, tries + 1)
    try:
        yield from _learn(request, method, identity, sent, device)
    finally:  # success or failure: the process survived
        device.store.save_number(TRIES, identity, 0)


def _learn(
    request: messages.Personalize, method: Personalization, identity: str, sent: Adapter, device: Device
) -> Generator[Job, Result, None]:
    """Train, and store the result if it is finite, bounded in norm and not worse than the stored one.

    Args:
        request: the server's request.
        method: the requested method.
        identity: its hash, stored with the adapter.
        sent: the received shared adapter.
        device: the device that trains.
    """
    other_sites = device.store.has_other_sites(device.sites)
    current = None if other_sites else device.store.personal(device.sites)
    if current and current.request == identity:
        return  # trained before the requester crashed: training further would give a different adapter
    if other_sites:
        log.warning("the stored personal adapter is for other layers; a new one starts, and it stays a version")
    stored = current if current and current.base == device.report.base else None
    pictures = device.pictures()
    examples = yield from encode_split(device, "train", pictures.train, device.variants)
    variants = count_variants(pictures.train, device.variants)
    weights = loss_weights(pictures.train, device.variants, examples.latents.shape[2:])
    held_out = first_variants(examples, variants)  # without validation pictures: enough to detect a broken result
    stopping = None
    if pictures.validation:
        held_out = yield from encode_split(device, "validation", pictures.validation)
        every = min(request.look_every, request.steps)
        promised = device.policy.promises_privacy(device.store.ledger.history().mechanisms)
        patience = request.steps if promised else request.patience  # early stopping would leak information
        stopping = jobs.EarlyStopping(validation=held_out, every=every, patience=patience)
    shared = yield from _better(sent, stored, held_out)
    kept = state_after_rounds(request.run, request.method, device)
    start = _personal_start(method.personal_rank(request.rank, rank(shared)), shared, stored, kept, device)
    job = jobs.TrainJob(
        client=device.name,
        round=request.round,
        purpose=PERSONAL,
        seed=device.seed,
        examples=examples,
        variants=variants,
        loss_weights=weights,
        start=start,
        frozen=shared,
        steps=request.steps,
        batch_size=request.batch_size,
        learning_rate=request.learning_rate,
        early_stopping=stopping,
    )
    trained = yield from method.fit(job, shared, [picture.caption for picture in pictures.train])
    if reason := (yield from missing_effect(trained, shared, held_out)):
        log.warning("round %d: the trained personal adapter changes nothing: %s", request.round, reason)
    before = stored or PersonalAdapter(start, shared, device.report.base, identity)
    if (yield from _is_worse(trained, shared, before, held_out)):
        log.warning("round %d found no better personal adapter; the previous one stays", request.round)
        result = before._replace(request=identity)
        device.store.save_personal(result, aside=other_sites or (current is not None and stored is None))
    else:
        result = PersonalAdapter(trained, shared, device.report.base, identity)
        device.store.save_personal(result, aside=other_sites or current is not None)
    if device.previews:
        captions = [picture.caption for picture in pictures.validation or pictures.train][: device.previews]
        yield from _preview(f"round-{request.round:06d}", captions, result, device)


def _is_worse(
    trained: Adapter, shared: Adapter, before: PersonalAdapter, held_out: Examples
) -> Generator[Job, Result, bool]:
    """Return whether the trained adapter must not replace the previous one.

    Both are always measured, so that the amount of work does not depend on the outcome. NaN and infinity are always
    worse, even if the previous adapter is no better.

    Args:
        trained: the new personal adapter.
        shared: the shared adapter under it.
        before: the previous personal adapter with its shared one.
        held_out: examples on which losses are compared.
    """
    old = yield from _loss(held_out, concatenate([before.shared, before.adapter]))
    new = yield from _loss(held_out, concatenate([shared, trained]))
    if reason := norm_violation(trained):
        log.warning("the trained adapter is out of bounds: %s", reason)
        return True
    return not math.isfinite(new) or new > old


def _loss(held_out: Examples, adapter: Adapter) -> Generator[Job, Result, float]:
    return expect(float, (yield jobs.MeasureJob(examples=held_out, adapter=adapter)))


def _preview(
    name: str, captions: Sequence[str], personal: PersonalAdapter, device: Device
) -> Generator[Job, Result, None]:
    """Draw previews for the owner, as `anther device draw` does; a failure is logged and doesn't undo the training.

    Args:
        name: file name of the preview, without suffix.
        captions: one for each picture.
        personal: the adapters added to the base.
        device: the device that draws.
    """
    try:
        adapters = [personal.effective_shared, personal.adapter]
        job = jobs.GenerateJob(
            captions=captions,
            adapters=adapters,
            guides=guides_of(adapters, sampling.GUIDE_STRENGTH),
            seed=device.seed,
            steps=sampling.STEPS,
        )
        device.store.save_preview(name, expect(GeneratedImages, (yield job)).pictures)
    except Exception as error:
        log.warning("no preview of %s: %s", name, error)


def _better(sent: Adapter, stored: PersonalAdapter | None, held_out: Examples) -> Generator[Job, Result, Adapter]:
    """Select the shared adapter to store: the received one, unless the stored one has a lower loss on the owner's data.

    Both are measured in every round, so that the amount of work does not reveal which was stored.
    """
    if stored is None:
        return sent
    old = yield from _loss(held_out, stored.shared)
    new = yield from _loss(held_out, sent)
    return stored.shared if old < new or math.isnan(new) else sent


def _personal_start(
    target_rank: int, shared: Adapter, stored: PersonalAdapter | None, kept: Adapter | None, device: Device
) -> Adapter:
    """Return the initial personal adapter.

    The stored one is used if it belongs to this same shared adapter, or if the owner imported it. Otherwise that of the
    rounds is used, else a new one.

    A new one starts in the directions in which the federation found that people differ: its A is the shared adapter's
    (FedSA-LoRA, Guo et al., 2025, arXiv:2410.01463), its B is zero.

    Args:
        target_rank: rank of the personal adapter.
        shared: the shared adapter under it; A is `[rank, in]`, B is `[out, rank]`.
        stored: the stored personal adapter, if any.
        kept: the personal adapter that the method trained in the rounds, if any; sites may be missing.
        device: the device that trains.
    """
    if stored and rank(stored.adapter) == target_rank and _same(stored.shared, shared):
        return stored.adapter
    fresh = init_adapter(device.sites, target_rank, derive_seed(device.seed, device.name, PERSONAL))
    if stored and stored.is_imported:
        return with_rank(stored.adapter, target_rank, fresh)
    effective = without_zero_rank(shared)
    new = {name: Factors(torch.cat([effective[name].a, f.a])[:target_rank], f.b) for name, f in fresh.items()}
    return {**new, **kept} if kept and rank(kept) == target_rank else new


def _same(first: Adapter, second: Adapter) -> bool:
    """Return whether two adapters at the same sites are equal element by element."""
    return first is second or all(
        torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True)
    )
