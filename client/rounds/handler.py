"""Answer one server request on a device: check it, reserve privacy budget, run jobs, seal, reply.

`handle` is a generator in plain Python. It yields jobs and is sent their results, so the driver decides where jobs run:
all simulated clients of a round in shared passes, or one device's warm worker.
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

    Non-finite numbers are errors: with NaN in the weights every loss is NaN, and JSON cannot encode it.

    Raises:
        RequestRefusedError: the device's policy or its ledger forbids the request; the reason may be sent to the
            server.
        AntherError: the request is malformed, or something on the device is damaged; the text may name the owner's
            files and stays on the device.
    """
    reply = yield from _answer(request, device)
    for field in dataclasses.fields(reply):
        value = getattr(reply, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise AntherError(
                f"{field.name} is {value}: the base or the received adapter contains numbers that overflow"
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
