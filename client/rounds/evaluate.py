"""How an adapter does on the device's own pictures: losses as they are, or a gain with noise, charged like a round."""

from __future__ import annotations

import hashlib
from collections.abc import Generator

import torch
from torch import Tensor

from client.data import fingerprint
from client.device import Device
from client.rounds.helpers import cache_key, encode_split, encode_usable, expect, finite_epsilon, private_pictures
from client.rounds.local_factors import with_local_factors, with_private_local_factors
from client.rounds.received_adapter import ReceivedAdapter, receive_adapter
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.bounded_sum import noised_mean
from privacy.ledger.ledger import MEASURE, Reservation
from privacy.policy import RequestRefusedError
from protocol import messages
from training import jobs
from training.jobs import Examples, Job, Result

AT_ONCE = 256
"""Pictures of a noised gain that are in memory together."""


def answer(request: messages.Evaluate, device: Device) -> Generator[Job, Result, messages.Evaluation]:
    """How the adapter sent does on the device's validation pictures: losses as they are, or a noised gain."""
    device.policy.check_adaptable(device.report.base, device.sites)
    device.policy.check_evaluation(request.privacy)
    device.policy.check_timesteps(request.timesteps)
    sent = receive_adapter(request.adapter, device, rounded=request.rounded)
    if request.privacy is None:
        return (yield from _losses(request, sent, device))
    return (yield from _noised_gain(request, request.privacy, sent, device))


def _losses(
    request: messages.Evaluate, sent: ReceivedAdapter, device: Device
) -> Generator[Job, Result, messages.Evaluation]:
    """Mean losses under the base and under the adapter sent: a release without noise, which the ledger has to know of.

    Once is enough: after one nothing can be promised any more, and further ones take nothing away.
    """
    ledger = device.store.ledger
    past = ledger.history().mechanisms
    told_before = any(isinstance(event, NonPrivate) for event in past)
    if not told_before:
        device.policy.check_spending(past, NonPrivate())  # before pictures are looked at: a no tells of none
    pictures = device.pictures().validation
    if not pictures:
        raise RequestRefusedError("this device has no validation pictures")
    examples = yield from encode_split(device, "validation", pictures)
    if not told_before:
        release = device.noise(request.round, MEASURE).release
        ledger.reserve(
            _measuring(request, device, adapter=sent.sha256, data=fingerprint(pictures), release=release),
            device.policy.check_spending,
        )
    key = f"{request.run}:{cache_key(device, pictures)}"
    base = device.store.number("base", key)
    if base is None:
        base = expect(float, (yield jobs.MeasureJob(examples=examples, adapter=None)))
        device.store.save_number("base", key, base)
    adapter = with_local_factors(sent.adapter, request.run, device)
    shared = expect(float, (yield jobs.MeasureJob(examples=examples, adapter=adapter)))
    return messages.Evaluation(device=device.name, round=request.round, base=base, shared=shared)


def _noised_gain(
    request: messages.Evaluate, privacy: messages.EvaluationPrivacy, sent: ReceivedAdapter, device: Device
) -> Generator[Job, Result, messages.Evaluation]:
    """The mean over pictures of what the adapter sent takes off the base's loss, with noise, charged before.

    Sensitivity: the losses of a picture are a function of it and of the two adapters (`jobs.MeasureEachJob`), so one
    picture more or less is one gain more or less, which `noised_mean` bounds. A device without pictures answers too,
    with noise alone: a refusal would tell that there are none. As many are measured as the request assumes, of which
    some may be blank and count for nothing, so that time doesn't tell how many there are; and no more than `AT_ONCE` of
    them at a time, so that memory doesn't follow from what a server assumes.
    """
    ledger, noise = device.store.ledger, device.noise(request.round, MEASURE)
    if (sealed := ledger.sealed((request.run, request.round, MEASURE), _asked(request))) is not None:
        return messages.from_json(messages.Evaluation, sealed.decode())
    there = private_pictures(device, "validation", privacy.pictures)
    pictures, examples = yield from encode_usable(device, "validation", there)
    reservation = _measuring(request, device, adapter=sent.sha256, data=fingerprint(pictures), release=noise.release)
    charged = ledger.reserve(reservation, device.policy.check_spending, settles=True)
    epsilon = finite_epsilon(privacy.delta, charged)
    adapter = with_private_local_factors(sent.adapter, request.run, device, release=noise.release)
    gains: list[float] = []
    for start in range(0, privacy.pictures, AT_ONCE):
        some = Examples(*(part[start : start + AT_ONCE] for part in examples))
        seen = _filled(some, min(AT_ONCE, privacy.pictures - start))
        base = expect(Tensor, (yield jobs.MeasureEachJob(examples=seen, adapter=None)))
        shared = expect(Tensor, (yield jobs.MeasureEachJob(examples=seen, adapter=adapter)))
        gains += (base - shared)[: len(some)].tolist()
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
        epsilon=epsilon,
    )
    return messages.from_json(messages.Evaluation, ledger.seal(reservation, messages.to_json(reply).encode()).decode())


def _filled(examples: Examples, count: int) -> Examples:
    """So many examples: these, and blank ones."""
    return Examples(*(torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])]) for part in examples))


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
