"""The ClientApp: what a SuperNode runs for each message.

It only connects things. `client.logic` decides, and nothing that a server sends chooses the device's files, policy or
noise: those come from the node's own configuration and environment.
"""

from __future__ import annotations

import functools
import logging
import os

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client.device import from_config, whole
from client.drive import drive
from client.logic import handle
from conf.compose import compose
from conf.errors import AntherError
from models.adapter import shapes
from models.base import Base, load
from privacy.policy import Refusal
from protocol import records
from protocol.codec import largest
from protocol.messages import Reply, Request
from training.engine import perform
from training.memory import budget, check_free

log = logging.getLogger(__name__)

app = ClientApp()

DEFAULT_BASE = "glyphs"


@app.query()
@app.train()
@app.train("personalise")
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Reply to any request; whatever goes wrong becomes this node's error reply."""
    try:
        config = compose(str(context.run_config.get("overrides", "")))
        node = _stated(context)
        weights, device = str(node.get("weights", "fp32")), str(node.get("device", "auto"))
        resolution = whole(node, "resolution") or None
        base = _base(str(node.get("base", DEFAULT_BASE)), config.adapter.sites, weights, device, resolution)
        memory = budget(config.cohort.memory_gib, base.device)
        check_free(memory, base.device)
        owner = from_config(node, base)
        most = largest(shapes(owner.sites, -1), free=owner.policy.max_rank)
        conversation = handle(requested(message, most=most), owner)
        work = functools.partial(perform, base, memory=memory, timesteps=config.evaluation.timesteps)
        outcome = drive({"": conversation}, work)[""]
    except Exception as error:
        outcome = error
    return reply_message(outcome, message)


def requested(message: Message, *, most: int | None = None) -> Request:
    """What a message asks for; Refusal if it can't be read, since what is wrong with it is the server's to know.

    Args:
        most: bytes of an adapter that are looked at; None, in a simulation: whatever was sent.
    """
    try:
        return records.request_from_records(message.metadata.message_type, message.content, most=most)
    except AntherError as error:
        raise Refusal(str(error)) from None


def reply_message(outcome: Reply | Exception, request: Message) -> Message:
    """The reply, or an error that tells the server only what a refusal may tell it.

    Other exceptions can name the owner's files, so their text stays in the device's own log.
    """
    if not isinstance(outcome, Exception):
        return Message(records.reply_to_records(outcome), reply_to=request)
    unforeseen = None if isinstance(outcome, AntherError) else outcome
    log.error("could not answer %s: %s", request.metadata.message_type, outcome, exc_info=unforeseen)
    if isinstance(outcome, Refusal):
        reason = f"{records.REFUSED}{outcome}"
    else:
        reason = f"{type(outcome).__name__}, see the device's own log"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=request)


def _stated(context: Context) -> dict[str, object]:
    """The node's configuration; a simulated node has none of its own, so the environment can fill it in."""
    node: dict[str, object] = dict(context.node_config)
    for key, variable in (("data-root", "ANTHER_DATA_ROOT"), ("base", "ANTHER_BASE"), ("test", "ANTHER_TEST")):
        if variable in os.environ:
            node.setdefault(key, os.environ[variable])
    return node


@functools.lru_cache(maxsize=1)
def _base(path: str, sites: str | None, weights: str, device: str, resolution: int | None) -> Base:
    """Kept between the messages that one process answers."""
    return load(path, sites=sites, weights=weights, device=device, resolution=resolution)
