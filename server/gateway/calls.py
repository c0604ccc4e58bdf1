"""Flower's fleet protocol as a table: the twelve calls that a SuperNode makes (flwr 1.41 and 1.42, over HTTP)."""

from __future__ import annotations

from typing import NamedTuple

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from google.protobuf.message import Message

_SMALL = 4 << 10  # bytes of a request that names a node and an id
CHUNK = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE  # bytes that Flower puts into one object of an array
HEAD = 64 << 10  # bytes of an object without an array's data, and of a reply's head with the tree of its objects


class Call(NamedTuple):
    """One call of the protocol."""

    path: str
    request: type[Message]
    response: type[Message]
    max_bytes: int = _SMALL
    """Largest request body, in bytes."""


REGISTER = Call("/v1/fleet/register-node", fleet_pb2.RegisterNodeFleetRequest, fleet_pb2.RegisterNodeFleetResponse)
ACTIVATE = Call("/v1/fleet/activate-node", fleet_pb2.ActivateNodeRequest, fleet_pb2.ActivateNodeResponse)
DEACTIVATE = Call("/v1/fleet/deactivate-node", fleet_pb2.DeactivateNodeRequest, fleet_pb2.DeactivateNodeResponse)
UNREGISTER = Call(
    "/v1/fleet/unregister-node", fleet_pb2.UnregisterNodeFleetRequest, fleet_pb2.UnregisterNodeFleetResponse
)
HEARTBEAT = Call(
    "/v1/fleet/send-node-heartbeat", heartbeat_pb2.SendNodeHeartbeatRequest, heartbeat_pb2.SendNodeHeartbeatResponse
)
PULL_MESSAGES = Call("/v1/fleet/pull-messages", fleet_pb2.PullMessagesRequest, fleet_pb2.PullMessagesResponse)
PUSH_MESSAGES = Call("/v1/fleet/push-messages", fleet_pb2.PushMessagesRequest, fleet_pb2.PushMessagesResponse, HEAD)
GET_RUN = Call("/v1/fleet/get-run", run_pb2.GetRunRequest, run_pb2.GetRunResponse)
GET_FAB = Call("/v1/fleet/get-fab", fab_pb2.GetFabRequest, fab_pb2.GetFabResponse)
PULL_OBJECT = Call("/v1/fleet/pull-object", message_pb2.PullObjectRequest, message_pb2.PullObjectResponse)
PUSH_OBJECT = Call("/v1/fleet/push-object", message_pb2.PushObjectRequest, message_pb2.PushObjectResponse, CHUNK + HEAD)
CONFIRM = Call(
    "/v1/fleet/confirm-message-received",
    message_pb2.ConfirmMessageReceivedRequest,
    message_pb2.ConfirmMessageReceivedResponse,
)

CALLS = (
    REGISTER,
    ACTIVATE,
    DEACTIVATE,
    UNREGISTER,
    HEARTBEAT,
    PULL_MESSAGES,
    PUSH_MESSAGES,
    GET_RUN,
    GET_FAB,
    PULL_OBJECT,
    PUSH_OBJECT,
    CONFIRM,
)
