"""Handle a training round of the shared adapter: check the plan, reserve budget, train, seal, reply."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator
from functools import lru_cache

from client.data import fingerprint
from client.data.masks import loss_weights
from client.device import Device
from client.rounds import scaffold
from client.rounds.helpers import (
    encode_split,
    encode_usable,
    finite_epsilon,
    private_pictures,
    requested_method,
    training_cost,
)
from client.rounds.local_factors import initial_local_factors, replace_b
from client.rounds.method_state import save_state_after_round, state_before_round
from client.rounds.received_adapter import receive_adapter
from client.rounds.upload import prepare_upload, save_round_state
from common import strict_json
from models.lora.trainable import trained_tensors
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.ledger.ledger import TRAIN, Reservation
from privacy.policy import RequestRefusedError
from protocol import messages
from protocol.messages import TrainingPlan
from protocol.quantization import PRECISIONS
from training import jobs
from training.jobs import Examples, Job, Picture, Result, assumed_pictures
from training.personalization import Personalization, held_bytes
from training.round_work import examples_per_round, steps_per_round
from training.variants import count_variants

SHARED = "shared"

log = logging.getLogger(__name__)


def answer(request: messages.Train, device: Device) -> Generator[Job, Result, messages.Update]:
    """Train the shared adapter, starting from the base and the received adapter only.

    The personal adapter is excluded: it is a function of every picture, so with it one changed picture would change
    every clipped gradient.

    Raises RequestRefusedError if the plan, the policy or the ledger forbids the round.
    """
    plan, ledger = request.plan, device.store.ledger
    if plan.base != device.report.base:
        raise RequestRefusedError(f"the plan is for base {plan.base[:12]}, this device has {device.report.base[:12]}")
    device.policy.check_adaptable(plan.base, device.sites, device.named_sites)
    device.policy.check_plan(plan)
    _check_form(plan)
    method = _method(plan, device)
    sent = receive_adapter(
        request.adapter,
        device,
        rounded=request.rounded,
        with_bases=plan.trains == "cores",
        controlled=plan.trains if plan.scaffold else None,
    )
    if sent.rank < plan.rank:
        raise RequestRefusedError(f"the plan trains rank {plan.rank}, the received adapter has rank {sent.rank}")
    if plan.scaffold and (sent.rank != plan.rank or plan.sites is not None or plan.optimiser != "sgd"):
        raise RequestRefusedError("drift correction (SCAFFOLD) needs the full rank, all sites and the optimizer sgd")
    if (sealed := ledger.sealed((plan.run, plan.round, TRAIN), _identity(plan), echo=request.echo)) is not None:
        return _unpack(sealed)

    start, frozen, lora_xs_bases = sent.parts(plan.rank, plan.sites)
    held = held_bytes(method, device.sites, plan.rank)
    device.check_memory(
        method.largest_rank(plan.rank), start, held
    )  # before pictures use memory: the server may know this answer
    if plan.privacy is None:
        # Before reading pictures: a refusal must not depend on them.
        device.policy.check_spending(ledger.history().mechanisms, NonPrivate())
        pictures = device.pictures().train
        device.policy.check_pictures(len(pictures))
        examples = yield from encode_split(device, "train", pictures, device.variants)
        variants = count_variants(pictures, device.variants)
        weights = loss_weights(pictures, device.variants, examples.latents.shape[2:])
    else:  # one example for each picture, so that numbers of captions don't matter
        variants = weights = None
        pictures, examples = yield from _private_examples(
            device, assumed_pictures(plan.batch_size, plan.privacy.sampling_rate)
        )
    noise = device.noise(plan.round, SHARED)
    reservation = _reservation(plan, adapter=sent.sha256, data=fingerprint(pictures), release=noise.release)
    charged = ledger.reserve(reservation, device.policy.check_spending, settles=True)
    epsilon = finite_epsilon(plan.privacy.delta, charged) if plan.privacy else None
    variate = scaffold.load_variate(plan, device, sent.control, release=noise.release)
    local_b = initial_local_factors(plan, device, noise.release) if plan.trains == "split" else None
    if local_b is not None:
        start, frozen = replace_b(start, local_b), frozen and replace_b(frozen, local_b)
    job = jobs.TrainJob(
        client=device.name,
        round=plan.round,
        purpose=SHARED,
        seed=device.seed,
        examples=examples,
        variants=variants,
        loss_weights=weights,
        start=start,
        trains="both" if plan.trains == "split" else plan.trains,
        frozen=frozen,
        lora_xs_bases=lora_xs_bases,
        steps=plan.steps,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        optimizer=plan.optimiser,
        proximal=plan.proximal,
        correction=scaffold.correction(plan, sent.control, variate, start, lora_xs_bases) if plan.scaffold else None,
        privacy=_dp_sgd(plan),
        noise=noise if plan.privacy else None,
        names=tuple(fingerprint([picture]) for picture in pictures) if plan.privacy else (),
    )
    state = state_before_round(plan, device)
    trained, state_after = yield from method.train_round(job, state)
    upload = prepare_upload(
        plan,
        device,
        start=start,
        trained=trained.adapter,
        lora_xs_bases=lora_xs_bases,
        local_b=local_b,
        history=charged,
        release=noise.release,
    )
    events = charged.events + (plan.privacy is not None)  # includes the seal, which is written before the reply is sent
    # Under DP no measurement is sent: it would reveal, without noise, the sizes of the Poisson batches.
    draws = plan.privacy.draws if plan.privacy else 1
    cost = training_cost(
        device,
        steps_per_round(plan) * plan.batch_size * draws,
        duration_examples=examples_per_round(plan),
        measured=plan.privacy is None,
    )
    reply = messages.Update(
        device=device.name,
        run=plan.run,
        round=plan.round,
        rank=plan.rank,
        adapter=upload.data,
        release=noise.release,
        seconds=cost.seconds,
        joules=cost.joules,
        quality=cost.quality,
        loss=None if plan.privacy else trained.loss,  # not noised
        epsilon=epsilon,
        events=events,
    )

    def save_state() -> None:
        save_round_state(device, upload)
        save_state_after_round(plan, device, state, state_after)
        if plan.scaffold:
            before = trained_tensors(start, plan.trains, lora_xs_bases)
            scaffold.save_variate(plan, device, sent.control, variate, upload, before, release=noise.release)

    if plan.privacy is None:
        save_state()
        return reply  # training again costs no privacy, so it needs no seal
    packed = _pack(reply)
    sealed = ledger.seal(reservation, packed)
    if sealed is not packed:
        return _unpack(sealed)
    # Only after the seal: the residual of an unsent reply would be a second release of this round.
    try:
        save_state()
    finally:  # in any case, the reply is not sent before its public time
        device.wait(trained.idle)  # if the device stops meanwhile, the sealed reply is sent on the next request
    return reply


def _method(plan: TrainingPlan, device: Device) -> Personalization:
    """Return the method of personalization that takes part in the round; without one, the plain training.

    Raises:
        RequestRefusedError: the method isn't known here, takes more steps than the owner allows, or would bring values
            that are a function of pictures, without noise, into a round with a guarantee.
    """
    if plan.personalization is None:
        return Personalization()
    name = plan.personalization.name
    method = requested_method(plan.personalization)
    if method.message_rank(method.trained_rank(plan.rank)) != plan.rank:
        raise RequestRefusedError(f"personalization={name}: rank {plan.rank} of the adapter is none of this method")
    if plan.privacy and method.in_rounds:
        raise RequestRefusedError(f"personalization={name}: its personal part of a round would enter it without noise")
    device.policy.check_work(
        rank=max(plan.rank, method.rank_in_round),
        steps=steps_per_round(plan),
        examples=plan.batch_size,
        learning_rate=plan.learning_rate,
    )
    return method


def _private_examples(
    device: Device, max_pictures: int
) -> Generator[Job, Result, tuple[tuple[Picture, ...], Examples]]:
    """Return the pictures of a private round, at most `max_pictures`, and their encoded examples.

    With fewer pictures than the owner's minimum none is used, and the reply is noise only, charged like any other. A
    refusal would reveal, without noise, that there are too few. Between a data set that reaches a minimum of m and one
    that does not, ε bounds the change of a group of m pictures: the owner who sets the minimum accepts that.
    """
    pictures = private_pictures(device, "train", max_pictures)
    usable, examples = yield from encode_usable(device, "train", pictures)
    if (minimum := device.policy.min_pictures) > len(usable):
        log.warning(
            "%d pictures can be used, fewer than min_pictures=%d in policy.toml: none of them is used",
            len(usable),
            minimum,
        )
        return (), Examples(*(part[:0] for part in examples))
    return usable, examples


def _check_form(plan: TrainingPlan) -> None:
    """Raise RequestRefusedError for a plan that could be trained, but whose result could not be encoded.

    A round that fails after training is no release. It would be trained again each time it is requested, with other
    noise and without a charge or a wait, and its duration would leak information about the pictures.
    """
    for name, value, valid in (
        ("trains", plan.trains, plan.trains in ("both", "a", "b", "cores", "split")),
        ("optimiser", plan.optimiser, plan.optimiser in ("adamw", "sgd")),
        ("proximal", plan.proximal, 0 <= plan.proximal < math.inf),
        ("update", plan.update, plan.update in ("fp32", *PRECISIONS)),
        ("keep", plan.keep, 0 < plan.keep <= 1),
    ):
        if not valid:
            raise RequestRefusedError(f"{name}={value}: no device supports this")


def _reservation(plan: TrainingPlan, *, adapter: str, data: str, release: bool) -> Reservation:
    private = plan.privacy
    return Reservation(
        run=plan.run,
        round=plan.round,
        base=plan.base,
        adapter=adapter,
        plan=_identity(plan),
        data=data,
        mechanism=PoissonGaussian(
            noise_multiplier=private.noise_multiplier, sampling_rate=private.sampling_rate, steps=plan.steps
        )
        if private
        else NonPrivate(),
        clip=private.clip if private else None,
        release=release,
    )


@lru_cache(maxsize=8)
def _identity(plan: TrainingPlan) -> str:
    """Return the SHA-256 of the plan; the server's values about the device, such as `echo`, are not included."""
    return hashlib.sha256(strict_json.dumps(plan).encode()).hexdigest()


def _dp_sgd(plan: TrainingPlan) -> jobs.DPSGD | None:
    private = plan.privacy
    if private is None:
        return None
    return jobs.DPSGD(
        noise_multiplier=private.noise_multiplier,
        clip=private.clip,
        sampling_rate=private.sampling_rate,
        draws=private.draws,
    )


def _pack(update: messages.Update) -> bytes:
    """Serialize an update for the ledger's seal: one line of JSON, then the adapter's bytes."""
    return b"\n".join([messages.to_json(update).encode(), update.adapter])


def _unpack(sealed: bytes) -> messages.Update:
    text, _, adapter = sealed.partition(b"\n")
    return messages.from_json(messages.Update, text.decode(), adapter=adapter)
