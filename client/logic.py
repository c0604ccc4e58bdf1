"""What a device does with a request: check, reserve, have the job done, seal, reply.

One generator in plain Python. It yields each job and is sent the result, so that whoever drives it decides where
jobs run: a cohort of simulated devices in one pass, or one device's warm worker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from client.data import fingerprint
from client.device import Device
from client.drive import Conversation
from client.store import Personal
from conf.errors import AntherError
from models import cores
from models.adapter import Adapter, Factors, Site, from_tensors, head_and_tail, initial, rank, shapes, to_tensors
from models.bounds import excess
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.ledger import MEASURE, TRAIN, Reservation
from privacy.measuring import noised_mean
from privacy.noise import stream
from privacy.policy import Refusal
from protocol import codec, messages, plain
from protocol.messages import Request, TrainingPlan
from training import jobs
from training.jobs import Examples, Job, Picture, Result, Trained

SHARED, PERSONAL = "shared", "personal"

T = TypeVar("T", Examples, Trained, float, Tensor)


def handle(request: Request, device: Device) -> Conversation:
    """Answer one request.

    Raises:
        Refusal: the device's policy or its ledger forbids it; the reason may go to the server.
        AntherError: the request is malformed, or something on the device is damaged; the text may name the
            owner's files and stays on the device.
    """
    match request:
        case messages.Query():
            return device.report
        case messages.Train():
            return (yield from _train(request, device))
        case messages.Evaluate():
            return (yield from _evaluate(request, device))
        case messages.Personalise():
            return (yield from _personalise(request, device))


def _train(request: messages.Train, device: Device) -> Generator[Job, Result, messages.Update]:
    """Train the shared adapter from the base and the adapter sent alone.

    The personal adapter stays out: it is a function of every picture, so with it one changed picture would change
    every clipped gradient.
    """
    plan, ledger = request.plan, device.store.ledger
    if plan.base != device.report.base:
        raise Refusal(f"the plan is for base {plan.base[:12]}, this device holds {device.report.base[:12]}")
    device.policy.check_adaptable(plan.base, device.sites)
    device.policy.check_plan(plan)
    sent = _received(request.adapter, device, framed=plan.cores)
    if sent.rank < plan.rank:
        raise Refusal(f"the plan trains rank {plan.rank}, the adapter sent has {sent.rank}")
    if (sealed := ledger.sealed((plan.run, plan.round, TRAIN), _identity(plan), echo=request.echo)) is not None:
        return _unpack(sealed)

    pictures = device.pictures().train
    device.policy.check_pictures(len(pictures))
    examples = yield from _examples(device, "train", pictures)
    noise = device.noise(plan.round, SHARED)
    reservation = _reservation(plan, adapter=sent.sha256, data=fingerprint(pictures), release=noise.release)
    charged = ledger.reserve(reservation, device.policy.check_spending, settles=True)
    start, frozen, frame = sent.parts(plan.rank)
    trained = _expect(
        Trained,
        (
            yield jobs.Train(
                client=device.name,
                round=plan.round,
                purpose=SHARED,
                seed=device.seed,
                examples=examples,
                start=start,
                frozen=frozen,
                frame=frame,
                steps=plan.steps,
                batch_size=plan.batch_size,
                learning_rate=plan.learning_rate,
                privacy=_dp_sgd(plan),
                noise=noise if plan.privacy else None,
                names=tuple(fingerprint([picture]) for picture in pictures) if plan.privacy else (),
            )
        ),
    )
    draws = plan.privacy.draws if plan.privacy else 1
    events = charged.events + (plan.privacy is not None)  # with the seal, which comes before anybody reads this
    seconds, joules = _cost(device, plan.steps * plan.batch_size * draws)
    reply = messages.Update(
        device=device.name,
        run=plan.run,
        round=plan.round,
        rank=plan.rank,
        adapter=codec.encode(cores.cores(trained.adapter, frame) if frame else to_tensors(trained.adapter)),
        release=noise.release,
        seconds=seconds,
        joules=joules,
        quality="estimate",
        loss=None if plan.privacy else trained.loss,  # it was not noised
        epsilon=charged.spent(plan.privacy.delta).value if plan.privacy else None,
        events=events,
    )
    if plan.privacy is None:
        return reply  # nothing is spent by making it again, so it needn't be kept
    packed = _pack(reply)
    sealed = ledger.seal(reservation, packed)
    return reply if sealed is packed else _unpack(sealed)


def _evaluate(request: messages.Evaluate, device: Device) -> Generator[Job, Result, messages.Evaluation]:
    """How the adapter sent does on the device's validation pictures: losses as they are, or a noised gain."""
    device.policy.check_adaptable(device.report.base, device.sites)
    device.policy.check_measure(request.privacy)
    sent = _received(request.adapter, device)
    if request.privacy is None:
        return (yield from _losses(request, sent, device))
    return (yield from _noised_gain(request, request.privacy, sent, device))


def _losses(request: messages.Evaluate, sent: _Sent, device: Device) -> Generator[Job, Result, messages.Evaluation]:
    """Mean losses under the base and under the adapter sent: a release without noise, which the ledger has to know of.

    Once is enough: after one nothing can be promised any more, and further ones take nothing away.
    """
    ledger = device.store.ledger
    pictures = device.pictures().validation
    if not pictures:
        raise Refusal("this device has no validation pictures")
    examples = yield from _examples(device, "validation", pictures)
    if not any(isinstance(entry.reservation.mechanism, NonPrivate) for entry in ledger.entries()):
        release = device.noise(request.round, MEASURE).release
        ledger.reserve(
            _measuring(request, device, adapter=sent.sha256, data=fingerprint(pictures), release=release),
            device.policy.check_spending,
        )
    key = f"{request.run}:{_cache_key(device, pictures)}"
    base = device.store.loss("base", key)
    if base is None:
        base = _expect(float, (yield jobs.Measure(examples=examples, adapter=None)))
        device.store.save_loss("base", key, base)
    shared = _expect(float, (yield jobs.Measure(examples=examples, adapter=sent.adapter)))
    return messages.Evaluation(device=device.name, round=request.round, base=base, shared=shared)


def _noised_gain(
    request: messages.Evaluate, privacy: messages.MeasuringPrivacy, sent: _Sent, device: Device
) -> Generator[Job, Result, messages.Evaluation]:
    """The mean over pictures of what the adapter sent takes off the base's loss, with noise, charged before.

    Sensitivity: the losses of a picture are a function of it and of the two adapters (`jobs.MeasureEach`), so one
    picture more or less is one gain more or less, which `noised_mean` bounds. A device without pictures answers too,
    with noise alone: a refusal would tell that there are none.
    """
    ledger, noise = device.store.ledger, device.noise(request.round, MEASURE)
    if (sealed := ledger.sealed((request.run, request.round, MEASURE), _asked(request))) is not None:
        return messages.from_json(messages.Evaluation, sealed.decode())
    pictures = device.pictures().validation
    reservation = _measuring(request, device, adapter=sent.sha256, data=fingerprint(pictures), release=noise.release)
    examples = (yield from _examples(device, "validation", pictures)) if pictures else None
    charged = ledger.reserve(reservation, device.policy.check_spending)
    gains: list[float] = []
    if examples:
        base = _expect(Tensor, (yield jobs.MeasureEach(examples=examples, adapter=None)))
        shared = _expect(Tensor, (yield jobs.MeasureEach(examples=examples, adapter=sent.adapter)))
        gains = (base - shared).tolist()
    reply = messages.Evaluation(
        device=device.name,
        round=request.round,
        base=None,
        shared=None,
        gain=noised_mean(
            gains,
            clip=privacy.clip,
            noise_multiplier=privacy.noise_multiplier,
            count=privacy.pictures,
            noise=noise,
        ),
        release=noise.release,
        epsilon=charged.spent(privacy.delta).value,
    )
    return messages.from_json(messages.Evaluation, ledger.seal(reservation, messages.to_json(reply).encode()).decode())


def _personalise(request: messages.Personalise, device: Device) -> Generator[Job, Result, messages.Personalised]:
    """Train the personal adapter on top of the shared one sent, or of the one kept, and keep both on the device.

    Which of the two it is, is the owner's alone: nothing that leaves the device, now or later, depends on it.
    """
    device.policy.check_adaptable(device.report.base, device.sites)
    device.policy.check_work(
        rank=request.rank, steps=request.steps, examples=request.batch_size, learning_rate=request.learning_rate
    )
    if min(request.look_every, request.patience) < 1:
        raise Refusal(f"look_every={request.look_every}, patience={request.patience}: each must be 1 or more")
    sent = _received(request.adapter, device).adapter
    # Of the steps asked for: when training stops tells of the pictures.
    seconds, joules = _cost(device, request.steps * request.batch_size)
    reply = messages.Personalised(device=device.name, seconds=seconds, joules=joules, quality="estimate")
    identity = hashlib.sha256(messages.to_json(request).encode() + request.adapter).hexdigest()
    stored = device.store.personal(device.sites)
    if stored and stored.request == identity:
        return reply  # made before a crash of whoever asked: training on from it would give another one
    pictures = device.pictures()
    examples = yield from _examples(device, "train", pictures.train)
    stopping, shared = None, sent
    if pictures.validation:
        validation = yield from _examples(device, "validation", pictures.validation)
        stopping = jobs.EarlyStopping(validation=validation, every=request.look_every, patience=request.patience)
        shared = yield from _better(sent, stored, validation, device)
    trained = _expect(
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
    return reply


def _better(
    sent: Adapter, stored: Personal | None, validation: Examples, device: Device
) -> Generator[Job, Result, Adapter]:
    """The shared adapter to keep: the one sent, unless the one kept so far does better on the owner's own pictures.

    Both are measured whichever was kept before, so that what there is to do doesn't tell.
    """
    if stored is None or stored.base != device.report.base:
        return sent
    kept = _expect(float, (yield jobs.Measure(examples=validation, adapter=stored.shared)))
    new = _expect(float, (yield jobs.Measure(examples=validation, adapter=sent)))
    return stored.shared if kept < new or math.isnan(new) else sent


def _received(data: bytes, device: Device, *, framed: bool = False) -> _Sent:
    """The adapter in these bytes: exactly the device's sites, all of one rank that its owner allows, of bounded norm.

    Args:
        framed: whether the factors that stay travel beside it, since cores are to be trained.

    Raises Refusal otherwise: the reason is about what was sent, and the base that the server knows.
    """
    most = device.policy.max_rank
    try:
        return _decoded(data, tuple(device.sites.items()), most, framed)
    except AntherError as error:
        raise Refusal(f"what was sent is no adapter of rank 1 to {most} at this device's sites: {error}") from None


class _Sent:
    """An adapter that was sent, and its parts: the same objects for all devices of a process that were sent the same.

    Besides the work it saves the room, here and in a pass through the base, which knows by the object that one adapter
    serves everybody. Adapters are never changed.
    """

    def __init__(self, adapter: Adapter, frame: Adapter | None, sha256: str) -> None:
        self.adapter, self.rank, self.sha256, self._frame = adapter, rank(adapter), sha256, frame
        self._parts: dict[int, tuple[Adapter, Adapter | None, Adapter | None]] = {}

    def parts(self, rank: int) -> tuple[Adapter, Adapter | None, Adapter | None]:
        """What a plan of this rank trains, what stays frozen beside it, and the frame of the cores, if it is those."""
        if rank not in self._parts:
            head, tail = head_and_tail(self.adapter, rank)
            frame = head_and_tail(self._frame, rank)[0] if self._frame else None
            self._parts[rank] = head, tail if self.rank > rank else None, frame
        return self._parts[rank]


@lru_cache(maxsize=1)
def _decoded(data: bytes, sites: tuple[tuple[str, Site], ...], most_rank: int, framed: bool) -> _Sent:
    tensors = codec.decode(data, shapes(dict(sites), -1, frame=framed), free=most_rank)
    adapter = from_tensors(tensors)
    if found := excess(adapter):
        raise AntherError(found)
    frame = cores.frame_from_tensors(tensors) if framed else None
    return _Sent(adapter, frame, hashlib.sha256(data).hexdigest())


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
    return hashlib.sha256(plain.dumps(plan).encode()).hexdigest()


def _measuring(request: messages.Evaluate, device: Device, *, adapter: str, data: str, release: bool) -> Reservation:
    private = request.privacy
    return Reservation(
        run=request.run,
        round=request.round,
        base=device.report.base,
        plan=_asked(request),
        adapter=adapter,
        data=data,
        mechanism=PoissonGaussian(noise_multiplier=private.noise_multiplier, sampling_rate=1.0, steps=1)
        if private
        else NonPrivate(),
        clip=private.clip if private else None,
        release=release,
        purpose=MEASURE,
    )


def _asked(request: messages.Evaluate) -> str:
    """What stands for a request to measure, whatever adapter it is about."""
    return hashlib.sha256(messages.to_json(request).encode()).hexdigest()


def _examples(device: Device, split: str, pictures: Sequence[Picture]) -> Generator[Job, Result, Examples]:
    """The pictures of a split as the denoiser sees them, encoded once."""
    key = _cache_key(device, pictures)
    examples = device.store.examples(split, key)
    if examples is None:
        examples = _expect(Examples, (yield jobs.Encode(pictures=pictures)))
        device.store.save_examples(split, key, examples)
    return examples


def _cache_key(device: Device, pictures: Sequence[Picture]) -> str:
    return f"{device.report.base}:{fingerprint(pictures)}"


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


def _cost(device: Device, examples: int) -> tuple[float, float]:
    """Estimated seconds and joules of training on so many examples, a number that says nothing of the pictures."""
    seconds = examples / device.report.examples_per_second
    return seconds, seconds * device.report.watts


def _pack(update: messages.Update) -> bytes:
    """One line of JSON, then the adapter: what the ledger seals."""
    return b"\n".join([messages.to_json(update).encode(), update.adapter])


def _unpack(sealed: bytes) -> messages.Update:
    text, _, adapter = sealed.partition(b"\n")
    return messages.from_json(messages.Update, text.decode(), adapter=adapter)


def _expect(kind: type[T], result: Result) -> T:
    """The result of a job, which must be of its kind."""
    if not isinstance(result, kind):
        raise TypeError(f"a driver sent {type(result).__name__} for {kind.__name__}")
    return result
