"""Messages between ClientApp and worker arrive unchanged, and only from the same user."""

import socket
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.runtime import ipc
from common.errors import AntherError
from protocol.messages import Evaluate, Personalized, Query, Train
from tests.helpers.devices import train_request

REQUESTS = [
    Query(),
    Query(adapted=("a|b", "c")),
    train_request(number=1),
    Evaluate(run="r", round=1, adapter=b"\0\1"),
]


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def exchange(ends, request_, response_):
    """Return the request that the worker received and the response that the requester received."""
    ours, theirs = ends
    received = []

    def work():
        received.append(ipc.recv_request(theirs))
        ipc.send_response(theirs, response_)

    worker = threading.Thread(target=work)
    worker.start()
    received_response = ipc.request_response(ours, request_)
    worker.join()
    return received[0], received_response


@pytest.mark.parametrize("request_", REQUESTS)
def test_request_and_reply_arrive(ends, request_):
    reply = Personalized(device="d", seconds=1.5, joules=2.0, quality="estimate")
    assert exchange(ends, request_, ipc.WorkerResponse(reply=reply)) == (request_, ipc.WorkerResponse(reply=reply))


@given(st.binary(max_size=5000))
def test_adapter_bytes_arrive(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        requested = replace(train_request(number=1), adapter=data)
        received, response = exchange((ours, theirs), requested, ipc.WorkerResponse(refused="no"))
    assert isinstance(received, Train)
    assert received.adapter == data
    assert response == ipc.WorkerResponse(refused="no")


def test_failure_has_no_reason(ends):
    assert exchange(ends, Query(), ipc.WorkerResponse())[1] == ipc.WorkerResponse()


def test_dead_worker_is_detected(ends):
    ours, theirs = ends
    theirs.close()
    with pytest.raises(ConnectionError):
        ipc.request_response(ours, Query())


def test_partial_request_is_an_error(ends):
    ours, theirs = ends
    ours.sendall(b"\0\0\0\7\0")
    ours.close()
    with pytest.raises(ConnectionError):
        ipc.recv_request(theirs)


@pytest.mark.parametrize(
    "head",
    [
        b'{"kind":"Query","message":"{}","carries":true}',
        b'{"kind":"Reboot","message":"{}","carries":false}',
        b'{"kind":"Train","message":"{}","carries":false}',
    ],
)
def test_malformed_message_is_refused(ends, head):
    ours, theirs = ends
    ours.sendall(ipc._LENGTHS.pack(len(head), 0) + head)
    with pytest.raises(AntherError):
        ipc.recv_request(theirs)


def test_claimed_length_allocates_no_memory(ends):
    ours, theirs = ends
    ours.sendall(ipc._LENGTHS.pack(2, 1 << 60))
    with pytest.raises(AntherError, match="too long"):
        ipc.recv_request(theirs)


def test_same_user_is_accepted(ends, monkeypatch):
    assert ipc.same_user(ends[0])
    monkeypatch.setattr("os.getuid", lambda: 1_000_000)
    assert not ipc.same_user(ends[0])
