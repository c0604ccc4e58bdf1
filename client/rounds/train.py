"""A round of the shared adapter: check the plan, reserve in the ledger, have it trained, seal, reply."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator
from functools import lru_cache

from client.data import fingerprint
from client.device import Device
from client.rounds import scaffold
from client.rounds.helpers import encode_split, encode_usable, expect, finite_epsilon, private_pictures, training_cost
from client.rounds.local_factors import initial_local_factors, replace_b
from client.rounds.received_adapter import receive_adapter
from client.rounds.upload import keep, prepare_upload
from common import strict_json
from models.lora.trainable import trained_tensors
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.ledger.ledger import TRAIN, Reservation
from privacy.policy import RequestRefusedError
from protocol import messages
from protocol.messages import TrainingPlan
from protocol.quantization import PRECISIONS
from training import jobs
from training.jobs import Examples, Job, Picture, Result, TrainedAdapter, assumed_pictures
from training.public_duration import scheduled_examples

SHARED = "shared"

log = logging.getLogger(__name__)


def answer(request: messages.Train, device: Device) -> Generator[Job, Result, messages.Update]:
    """Train the shared adapter from the base and the adapter sent alone.

    The personal adapter stays out: it is a function of every picture, so with it one changed picture would change
    every clipped gradient.
    """
    plan, ledger = request.plan, device.store.ledger
    if plan.base != device.report.base:
        raise RequestRefusedError(f"the plan is for base {plan.base[:12]}, this device holds {device.report.base[:12]}")
    device.policy.check_adaptable(plan.base, device.sites)
    device.policy.check_plan(plan)
    _check_form(plan)
    sent = receive_adapter(
        request.adapter,
        device,
        rounded=request.rounded,
        with_bases=plan.trains == "cores",
        controlled=plan.trains if plan.scaffold else None,
    )
    if sent.rank < plan.rank:
        raise RequestRefusedError(f"the plan trains rank {plan.rank}, the adapter sent has {sent.rank}")
    if plan.scaffold and (sent.rank != plan.rank or plan.sites is not None or plan.optimiser != "sgd"):
        raise RequestRefusedError("a control variate is of every direction that was sent, and of plain SGD")
    if (sealed := ledger.sealed((plan.run, plan.round, TRAIN), _identity(plan), echo=request.echo)) is not None:
        return _unpack(sealed)

    start, frozen, lora_xs_bases = sent.parts(plan.rank, plan.sites)
    device.check_memory(plan.rank, start)  # before pictures take any: the answer is for the server to know
    if plan.privacy is None:
        device.policy.check_spending(ledger.history().mechanisms, NonPrivate())  # before pictures: a no tells of none
        pictures = device.pictures().train
        device.policy.check_pictures(len(pictures))
        examples = yield from encode_split(device, "train", pictures)
    else:
        pictures, examples = yield from _hidden(device, assumed_pictures(plan.batch_size, plan.privacy.sampling_rate))
    noise = device.noise(plan.round, SHARED)
    reservation = _reservation(plan, adapter=sent.sha256, data=fingerprint(pictures), release=noise.release)
    charged = ledger.reserve(reservation, device.policy.check_spending, settles=True)
    epsilon = finite_epsilon(plan.privacy.delta, charged) if plan.privacy else None
    mine = scaffold.own(plan, device, sent.control, release=noise.release)
    own = initial_local_factors(plan, device, noise.release) if plan.trains == "split" else None
    if own is not None:
        start, frozen = replace_b(start, own), frozen and replace_b(frozen, own)
    trained = expect(
        TrainedAdapter,
        (
            yield jobs.TrainJob(
                client=device.name,
                round=plan.round,
                purpose=SHARED,
                seed=device.seed,
                examples=examples,
                start=start,
                trains="both" if plan.trains == "split" else plan.trains,
                frozen=frozen,
                lora_xs_bases=lora_xs_bases,
                steps=plan.steps,
                batch_size=plan.batch_size,
                learning_rate=plan.learning_rate,
                optimizer=plan.optimiser,
                proximal=plan.proximal,
                correction=scaffold.correction(plan, sent.control, mine, start, lora_xs_bases)
                if plan.scaffold
                else None,
                privacy=_dp_sgd(plan),
                noise=noise if plan.privacy else None,
                names=tuple(fingerprint([picture]) for picture in pictures) if plan.privacy else (),
            )
        ),
    )
    goes = prepare_upload(
        plan,
        device,
        start=start,
        trained=trained.adapter,
        lora_xs_bases=lora_xs_bases,
        own=own,
        history=charged,
        release=noise.release,
    )
    events = charged.events + (plan.privacy is not None)  # with the seal, which comes before anybody reads this
    # Under DP nothing that was measured leaves: it would tell, without noise, how large the Poisson batches were.
    draws, whole = plan.privacy.draws if plan.privacy else 1, scheduled_examples(plan)
    spent = training_cost(device, plan.steps * plan.batch_size * draws, lasting=whole, measured=plan.privacy is None)
    reply = messages.Update(
        device=device.name,
        run=plan.run,
        round=plan.round,
        rank=plan.rank,
        adapter=goes.data,
        release=noise.release,
        seconds=spent.seconds,
        joules=spent.joules,
        quality=spent.quality,
        loss=None if plan.privacy else trained.loss,  # it was not noised
        epsilon=epsilon,
        events=events,
    )

    def remember() -> None:
        keep(device, goes)
        if plan.scaffold:
            before = trained_tensors(start, plan.trains, lora_xs_bases)
            scaffold.keep(plan, device, sent.control, mine, goes, before, release=noise.release)

    if plan.privacy is None:
        remember()
        return reply  # nothing is spent by making it again, so it needn't be kept
    packed = _pack(reply)
    sealed = ledger.seal(reservation, packed)
    if sealed is not packed:
        return _unpack(sealed)
    # Not before it is the reply: what is left of another one, never sent, would be a second release of this round.
    try:
        remember()
    finally:  # whatever came of it, nobody hears of this round before its time
        device.wait(trained.idle)  # stopped meanwhile, it is sent when it is asked for again
    return reply


def _hidden(device: Device, most: int) -> Generator[Job, Result, tuple[tuple[Picture, ...], Examples]]:
    """The pictures of a private round, `most` of them, and what the denoiser sees of them.

    With fewer than the owner's minimum it is none of them, and the reply is noise alone, charged like any other. A
    refusal would tell, without noise, that there are too few. Between a set of pictures that reaches a minimum of m and
    one that doesn't, what ε bounds is what a group of m pictures changes: whoever sets it chooses that.
    """
    pictures = private_pictures(device, "train", most)
    kept, examples = yield from encode_usable(device, "train", pictures)
    if (least := device.policy.min_pictures) > len(kept):
        log.warning("%d pictures can be used, fewer than min_pictures=%d: nothing is trained on them", len(kept), least)
        return (), Examples(*(part[:0] for part in examples))
    return kept, examples


def _check_form(plan: TrainingPlan) -> None:
    """Raises Refusal for a plan that could be trained by and not be answered.

    A round that fails after training is no release, and is trained anew whenever it is asked for, with other noise and
    without a charge or a wait: how long that takes would tell of the pictures.
    """
    for name, value, valid in (
        ("trains", plan.trains, plan.trains in ("both", "a", "b", "cores", "split")),
        ("optimiser", plan.optimiser, plan.optimiser in ("adamw", "sgd")),
        ("proximal", plan.proximal, 0 <= plan.proximal < math.inf),
        ("update", plan.update, plan.update in ("fp32", *PRECISIONS)),
        ("keep", plan.keep, 0 < plan.keep <= 1),
    ):
        if not valid:
            raise RequestRefusedError(f"{name}: {value} asked, which no device knows")


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
    """The plan's own hash: nothing that the server says of the device enters it."""
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
    """One line of JSON, then the adapter: what the ledger seals."""
    return b"\n".join([messages.to_json(update).encode(), update.adapter])


def _unpack(sealed: bytes) -> messages.Update:
    text, _, adapter = sealed.partition(b"\n")
    return messages.from_json(messages.Update, text.decode(), adapter=adapter)
