"""What a device does with a request: check, reserve, have the job done, seal, reply.

One generator in plain Python. It yields each job and is sent the result, so that whoever drives it decides where
jobs run: a cohort of simulated devices in one pass, or one device's warm worker.
"""

from __future__ import annotations

import dataclasses
import math

from client.device import Device
from client.rounds import evaluate, personalize, train
from client.rounds.scheduler import RequestHandler
from common.errors import AntherError
from protocol import messages
from protocol.messages import Request


def handle(request: Request, device: Device) -> RequestHandler:
    """Answer one request.

    A number that isn't finite is no answer: weights that hold NaN make every loss one, and JSON has none.

    Raises:
        Refusal: the device's policy or its ledger forbids it; the reason may go to the server.
        AntherError: the request is malformed, or something on the device is damaged; the text may name the
            owner's files and stays on the device.
    """
    reply = yield from _answer(request, device)
    for field in dataclasses.fields(reply):
        value = getattr(reply, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise AntherError(
                f"{field.name} came out as {value}: the base or the adapter sent holds numbers that overflow"
            )
    return reply


def _answer(request: Request, device: Device) -> RequestHandler:
    match request:
        case messages.Query():
            return device.report
        case messages.Train():
            return (yield from train.answer(request, device))
        case messages.Evaluate():
            return (yield from evaluate.answer(request, device))
        case messages.Personalize():
            return (yield from personalize.answer(request, device))
