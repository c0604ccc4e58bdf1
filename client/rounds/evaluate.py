"""Handle an evaluation request: raw losses, or a noised gain that is charged like a training round."""

from __future__ import annotations

import hashlib
from collections.abc import Generator

import torch
from torch import Tensor

from client.data import fingerprint
from client.device import Device
from client.rounds.helpers import cache_key, encode_split, encode_usable, finite_epsilon, private_pictures
from client.rounds.local_factors import with_local_factors, with_private_local_factors
from client.rounds.received_adapter import ReceivedAdapter, receive_adapter
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.ledger.ledger import MEASURE, Reservation
from privacy.noised_gain import noised_mean
from privacy.policy import RequestRefusedError
from protocol import messages
from training import jobs
from training.jobs import Examples, Job, Result, expect

AT_ONCE = 256
"""Maximum number of pictures of a noised gain in memory at once."""


def answer(request: messages.Evaluate, device: Device) -> Generator[Job, Result, messages.Evaluation]:
    """Measure the received adapter on the device's validation pictures.

    Raises RequestRefusedError if the policy or the ledger forbids it.
    """
    device.policy.check_adaptable(device.report.base, device.sites, device.named_sites)
    device.policy.check_evaluation(request.privacy)
    device.policy.check_timesteps(request.timesteps)
    sent = receive_adapter(request.adapter, device, rounded=request.rounded)
    if request.privacy is None:
        return (yield from _losses(request, sent, device))
    return (yield from _noised_gain(request, request.privacy, sent, device))


def _losses(
    request: messages.Evaluate, sent: ReceivedAdapter, device: Device
) -> Generator[Job, Result, messages.Evaluation]:
    """Measure mean losses of the base and of the received adapter: a release without noise, recorded in the ledger.

    One ledger entry is enough: after it no guarantee is left, and further releases cannot remove more.
    """
    ledger = device.store.ledger
    past = ledger.history().mechanisms
    already_released = any(isinstance(event, NonPrivate) for event in past)
    if not already_released:
        device.policy.check_spending(past, NonPrivate())  # before reading pictures: a refusal must not depend on them
    pictures = device.pictures().validation
    if not pictures:
        raise RequestRefusedError("this device has no validation pictures")
    examples = yield from encode_split(device, "validation", pictures)
    if not already_released:
        release = device.noise(request.round, MEASURE).release
        ledger.reserve(
            _reservation(request, device, adapter=sent.sha256, data=fingerprint(pictures), release=release),
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
    """Measure the mean reduction of the loss over pictures, with noise, charged before measuring.

    Sensitivity: the losses of a picture depend on that picture and the two adapters only (`jobs.MeasureEachJob`). So
    adding or removing a picture adds or removes one gain, which `noised_mean` clips. A device without pictures replies
    with noise only: a refusal would reveal that there are none. The number of measured pictures is the number that the
    request assumes, filled with blanks that are discarded, so that the duration does not reveal how many there are. At
    most `AT_ONCE` are measured together, so that the server's assumption does not determine memory.
    """
    ledger, noise = device.store.ledger, device.noise(request.round, MEASURE)
    if (sealed := ledger.sealed((request.run, request.round, MEASURE), _identity(request))) is not None:
        return messages.from_json(messages.Evaluation, sealed.decode())
    candidates = private_pictures(device, "validation", privacy.pictures)
    pictures, examples = yield from encode_usable(device, "validation", candidates)
    reservation = _reservation(request, device, adapter=sent.sha256, data=fingerprint(pictures), release=noise.release)
    charged = ledger.reserve(reservation, device.policy.check_spending, settles=True)
    epsilon = finite_epsilon(privacy.delta, charged)
    adapter = with_private_local_factors(sent.adapter, request.run, device, release=noise.release)
    gains: list[float] = []
    for start in range(0, privacy.pictures, AT_ONCE):
        chunk = Examples(*(part[start : start + AT_ONCE] for part in examples))
        padded = _padded(chunk, min(AT_ONCE, privacy.pictures - start))
        base = expect(Tensor, (yield jobs.MeasureEachJob(examples=padded, adapter=None)))
        shared = expect(Tensor, (yield jobs.MeasureEachJob(examples=padded, adapter=adapter)))
        gains += (base - shared)[: len(chunk)].tolist()
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


def _padded(examples: Examples, count: int) -> Examples:
    """Pad examples with zeros to `count`."""
    return Examples(*(torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])]) for part in examples))


def _reservation(request: messages.Evaluate, device: Device, *, adapter: str, data: str, release: bool) -> Reservation:
    private = request.privacy
    return Reservation(
        run=request.run,
        round=request.round,
        base=device.report.base,
        plan=_identity(request),
        adapter=adapter,
        data=data,
        mechanism=PoissonGaussian(noise_multiplier=private.noise_multiplier, sampling_rate=1.0, steps=1)
        if private
        else NonPrivate(),
        clip=private.clip if private else None,
        release=release,
        purpose=MEASURE,
    )


def _identity(request: messages.Evaluate) -> str:
    """Return the SHA-256 of an evaluation request, which does not include the adapter."""
    return hashlib.sha256(messages.to_json(request).encode()).hexdigest()
