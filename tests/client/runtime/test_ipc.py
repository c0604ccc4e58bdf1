"""A ClientApp and its worker: what is said arrives as it was, and nobody else is listened to."""

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


def exchange(ends, asked, answered):
    """What a worker hears, and what whoever asked is told."""
    ours, theirs = ends
    heard = []

    def work():
        heard.append(ipc.recv_request(theirs))
        ipc.send_response(theirs, answered)

    worker = threading.Thread(target=work)
    worker.start()
    told = ipc.request_response(ours, asked)
    worker.join()
    return heard[0], told


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_and_its_reply_arrive(ends, request_):
    reply = Personalized(device="d", seconds=1.5, joules=2.0, quality="estimate")
    assert exchange(ends, request_, ipc.WorkerResponse(reply=reply)) == (request_, ipc.WorkerResponse(reply=reply))


@given(st.binary(max_size=5000))
def test_an_adapter_of_any_bytes_arrives(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        asked = replace(train_request(number=1), adapter=data)
        heard, told = exchange((ours, theirs), asked, ipc.WorkerResponse(refused="no"))
    assert isinstance(heard, Train)
    assert heard.adapter == data
    assert told == ipc.WorkerResponse(refused="no")


def test_a_failure_has_one_word(ends):
    assert exchange(ends, Query(), ipc.WorkerResponse())[1] == ipc.WorkerResponse()


def test_a_worker_that_dies_is_noticed(ends):
    ours, theirs = ends
    theirs.close()
    with pytest.raises(ConnectionError):
        ipc.request_response(ours, Query())


def test_half_a_request_is_none(ends):
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
def test_what_is_malformed_is_refused(ends, head):
    ours, theirs = ends
    ours.sendall(ipc._LENGTHS.pack(len(head), 0) + head)
    with pytest.raises(AntherError):
        ipc.recv_request(theirs)


def test_no_room_is_made_for_what_is_only_claimed(ends):
    ours, theirs = ends
    ours.sendall(ipc._LENGTHS.pack(2, 1 << 60))
    with pytest.raises(AntherError, match="too long"):
        ipc.recv_request(theirs)


def test_our_own_user_is_known(ends, monkeypatch):
    assert ipc.same_user(ends[0])
    monkeypatch.setattr("os.getuid", lambda: 1_000_000)
    assert not ipc.same_user(ends[0])
