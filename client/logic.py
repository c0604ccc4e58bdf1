"""What a device does with a request: check, reserve, have the job done, seal, reply.

One generator in plain Python. It yields each job and is sent the result, so that whoever drives it decides where
jobs run: a cohort of simulated devices in one pass, or one device's warm worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from client.data import fingerprint
from client.device import Device
from client.drive import Conversation
from client.store import Personal
from models.adapter import Adapter, Factors, Site, from_tensors, head_and_tail, initial, rank, shapes, to_tensors
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.ledger import SEALED, TRAIN, Reservation
from privacy.noise import stream
from privacy.policy import Refusal
from protocol import codec, messages, plain
from protocol.messages import Request, TrainingPlan
from training import jobs
from training.jobs import Examples, Job, Picture, Result, Trained

SHARED, PERSONAL = "shared", "personal"

T = TypeVar("T", Examples, Trained, float)


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
    device.policy.check_plan(plan)
    sent = _received(request.adapter, device)
    if rank(sent.adapter) < plan.rank:
        raise Refusal(f"the plan trains rank {plan.rank}, the adapter sent has {rank(sent.adapter)}")
    if (sealed := ledger.sealed((plan.run, plan.round, TRAIN), _identity(plan), echo=request.echo)) is not None:
        return _unpack(sealed)

    pictures = device.pictures().train
    examples = yield from _examples(device, "train", pictures)
    _settle(plan, device)
    noise = device.noise(plan.round, SHARED)
    reservation = _reservation(plan, adapter=sent.sha256, data=fingerprint(pictures), release=noise.release)
    events = ledger.reserve(reservation, device.policy.check_spending)
    start, frozen = sent.parts(plan.rank)
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
                frozen=frozen if rank(frozen) else None,
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
    seconds, joules = _cost(device, plan.steps * plan.batch_size * draws)
    reply = messages.Update(
        device=device.name,
        run=plan.run,
        round=plan.round,
        rank=plan.rank,
        adapter=codec.encode(to_tensors(trained.adapter)),
        release=noise.release,
        seconds=seconds,
        joules=joules,
        quality="estimate",
        loss=None if plan.privacy else trained.loss,  # it was not noised
        epsilon=ledger.spent(plan.privacy.delta).value if plan.privacy else None,
        events=events + 1 if plan.privacy else events,  # with the seal, which comes before anybody reads this
    )
    if plan.privacy is None:
        return reply  # nothing is spent by making it again, so it needn't be kept
    packed = _pack(reply)
    sealed = ledger.seal(reservation, packed)
    return reply if sealed is packed else _unpack(sealed)


def _evaluate(request: messages.Evaluate, device: Device) -> Generator[Job, Result, messages.Evaluation]:
    """Losses on the device's validation pictures, under the base and under the adapter sent."""
    device.policy.check_measure()
    sent = _received(request.adapter, device).adapter
    pictures = device.pictures().validation
    if not pictures:
        raise Refusal("this device has no validation pictures")
    examples = yield from _examples(device, "validation", pictures)
    key = f"{request.run}:{_cache_key(device, pictures)}"
    base = device.store.loss("base", key)
    if base is None:
        base = _expect(float, (yield jobs.Measure(examples=examples, adapter=None)))
        device.store.save_loss("base", key, base)
    shared = _expect(float, (yield jobs.Measure(examples=examples, adapter=sent)))
    return messages.Evaluation(device=device.name, round=request.round, base=base, shared=shared)


def _personalise(request: messages.Personalise, device: Device) -> Generator[Job, Result, messages.Personalised]:
    """Train the personal adapter on top of the shared one sent, and keep it on the device."""
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
    stopping = None
    if pictures.validation:
        validation = yield from _examples(device, "validation", pictures.validation)
        stopping = jobs.EarlyStopping(validation=validation, every=request.look_every, patience=request.patience)
    trained = _expect(
        Trained,
        (
            yield jobs.Train(
                client=device.name,
                round=request.round,
                purpose=PERSONAL,
                seed=device.seed,
                examples=examples,
                start=_personal_start(request.rank, sent, stored, device),
                frozen=sent,
                steps=request.steps,
                batch_size=request.batch_size,
                learning_rate=request.learning_rate,
                early_stopping=stopping,
            )
        ),
    )
    device.store.save_personal(Personal(trained.adapter, sent, device.report.base, identity))
    return reply


def _received(data: bytes, device: Device) -> _Sent:
    """The adapter in these bytes: exactly the device's sites, all of one rank that its owner allows."""
    sent = _decoded(data, tuple(device.sites.items()))
    if rank(sent.adapter) > device.policy.max_rank:
        raise Refusal(f"the adapter sent has rank {rank(sent.adapter)}, this device allows {device.policy.max_rank}")
    return sent


class _Sent:
    """An adapter that was sent, and its parts: the same objects for all devices of a process that were sent the same.

    Besides the work it saves the room, here and in a pass through the base, which knows by the object that one adapter
    serves everybody. Adapters are never changed.
    """

    def __init__(self, adapter: Adapter, sha256: str) -> None:
        self.adapter, self.sha256 = adapter, sha256
        self._parts: dict[int, tuple[Adapter, Adapter]] = {}

    def parts(self, rank: int) -> tuple[Adapter, Adapter]:
        """What a plan of this rank trains, and what stays frozen beside it."""
        if rank not in self._parts:
            self._parts[rank] = head_and_tail(self.adapter, rank)
        return self._parts[rank]


@lru_cache(maxsize=1)
def _decoded(data: bytes, sites: tuple[tuple[str, Site], ...]) -> _Sent:
    adapter = from_tensors(codec.decode(data, shapes(dict(sites), -1)))
    return _Sent(adapter, hashlib.sha256(data).hexdigest())


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


def _settle(plan: TrainingPlan, device: Device) -> None:
    """A plan for a later round says that the server has moved past the run's earlier ones."""
    for entry in device.store.ledger.entries():
        earlier = entry.reservation
        if entry.state == SEALED and earlier.run == plan.run and earlier.round < plan.round:
            device.store.ledger.sent(earlier.key)


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
        and rank(stored.shared) == rank(shared)
        and all(torch.equal(a, b) for name in shared for a, b in zip(shared[name], stored.shared[name], strict=True))
    ):
        return stored.adapter
    fresh = initial(device.sites, rank_asked, stream(device.seed, device.name, PERSONAL))
    return {name: Factors(torch.cat([shared[name].a, f.a])[:rank_asked], f.b) for name, f in fresh.items()}


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
