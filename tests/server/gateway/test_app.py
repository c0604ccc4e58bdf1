"""What is answered at a federation's one port, and to whom."""

import asyncio
import base64
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from common import strict_json
from conf.schemas.server import LimitsConfig
from protocol.handshake import Enrollment
from protocol.messages import NEWEST, OLDEST
from server.gateway import calls, identity
from server.gateway.app import Gateway
from server.gateway.limits import RequestBudget
from tests.helpers.served import GatewayHarness, hello, new_key, openssh, pem, signed

BASE, IN = "/v1/anther/base/x/manifest", "/v1/anther/in"
PULL = calls.PULL_MESSAGES.path


@pytest.fixture
def served(tmp_path):
    found = GatewayHarness(tmp_path, base_routes=[Route(BASE, lambda _: PlainTextResponse("a base"))])
    with found.client:
        yield found


@pytest.fixture
def client(served):
    return served.client


def enrolled(served, key, name="pi"):
    asked = Enrollment(protocol=NEWEST, secret=served.registry.issue("ada"), key=openssh(key), name=name)
    found = served.client.post("/v1/anther/enrol", content=strict_json.dumps(asked))
    assert found.status_code == 200, found.text
    return key


def test_a_device_enrols_and_reaches_the_base(served, client):
    welcomed = []
    served.gateway.register_node = lambda key, name: welcomed.append((key, name))
    key = enrolled(served, new_key())
    assert welcomed == [(openssh(key), "pi")]
    assert client.get(BASE, headers=signed(key, BASE)).text == "a base"
    assert client.get(IN, headers=signed(key, IN)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/control/register-node",
        "/v1/runtime/get-nodes",
        "/health",
        "/",
        "/docs",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs",
        "/v1/fleet/..",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages%3F",
        "//v1/fleet/pull-messages",
        "/v1/fleet/start-run",
    ],
)
def test_nothing_else_of_the_superlink_is_reached(served, client, path):
    key = enrolled(served, new_key())
    for found in (client.post(path, headers=signed(key, path)), client.get(path, headers=signed(key, path))):
        assert found.status_code in (401, 404, 405)
    assert served.seen == []


def test_a_stranger_reaches_nothing(served, client):
    stranger = new_key()
    for headers in ({}, signed(stranger, BASE), {identity.KEY: "!", identity.TIME: "x", identity.SIGNATURE: "y"}):
        assert client.get(BASE, headers=headers).status_code == 401
        assert client.post(PULL, headers=headers).status_code == 401
    assert served.seen == []


def test_a_signature_is_for_one_path_and_one_time_and_one_key(served, client):
    key = enrolled(served, new_key())
    bad = [
        signed(key, IN),
        signed(key),
        signed(key, BASE, at=datetime.now(UTC) - timedelta(hours=1)),
        signed(key, BASE, at=datetime.now(UTC) + timedelta(hours=1)),
        signed(new_key(), BASE, as_whom=key),
    ]
    assert [client.get(BASE, headers=headers).status_code for headers in bad] == [401] * 5
    without_zone = signed(key, BASE, at=datetime.now())  # noqa: DTZ005
    assert identity.authenticate(Headers(without_zone), BASE) is None


def test_fleet_calls_are_proven_before_their_body_is_read(served, client):
    pi = served.node("pi")
    bad = [
        {identity.KEY: signed(pi.key)[identity.KEY]},
        signed(pi.key, PULL),
        signed(new_key(), as_whom=pi.key),
        signed(pi.key, at=datetime.now(UTC) - timedelta(hours=1)),
    ]
    for headers in bad:
        chunks = iter([b"x" * 100] * 2)

        def body(chunks=chunks):
            yield from chunks

        found = client.post(PULL, content=body(), headers={"content-type": "application/protobuf", **headers})
        assert found.status_code == 401


@pytest.mark.parametrize("name", [identity.KEY, identity.TIME, identity.SIGNATURE])
def test_doubled_headers_are_refused(served, client, name):
    """Of two keys the gateway could believe the one, and the SuperLink the other."""
    pi = served.node("pi")
    honest = [("content-type", "application/protobuf"), *signed(pi.key).items()]
    body = calls.HEARTBEAT.request(node={"node_id": pi.id}, heartbeat_interval=30.0).SerializeToString()
    assert client.post(calls.HEARTBEAT.path, content=body, headers=honest).status_code == 200
    twice = [*honest, (name, signed(pi.key)[name])]
    assert client.post(calls.HEARTBEAT.path, content=body, headers=twice).status_code == 401


@pytest.mark.parametrize("curve", [ec.SECP256K1, ec.SECP256R1, ec.SECP521R1, ec.BrainpoolP256R1])
def test_keys_of_other_curves(client, curve):
    key = new_key(curve)
    headers = {**signed(new_key(), IN), identity.KEY: base64.b64encode(pem(key)).decode()}
    assert client.get(IN, headers=headers).status_code == 401
    assert client.post(PULL, headers=headers).status_code == 401


def test_a_revoked_device_is_out_from_the_next_request_on(served, client):
    pi = served.node("pi")
    assert pi.pull() is None
    served.registry.revoke("pi")
    before = len(served.seen)
    assert pi.call(calls.PULL_MESSAGES)[0] == 401
    assert client.get(IN, headers=signed(pi.key, IN)).status_code == 401
    assert len(served.seen) == before


def test_a_damaged_register_lets_nobody_in_and_is_told(served, client, caplog):
    pi = served.node("pi")
    (served.gateway.folder / "register.json").write_text("{")
    assert pi.call(calls.PULL_MESSAGES)[0] == 503
    assert client.get(IN, headers=signed(pi.key, IN)).status_code == 503
    assert "restore it from a backup" in caplog.text


def test_a_used_ticket_an_old_device_and_another_kind_of_key_are_told_why(served, client):
    secret = served.registry.issue("ada")

    def come(**changed):
        said = {"protocol": NEWEST, "secret": secret, "key": openssh(new_key()), "name": "pi"} | changed
        found = client.post("/v1/anther/enrol", content=strict_json.dumps(said))
        return found.status_code, found.json().get("error", "")

    assert "update Anther on the device" in come(protocol=OLDEST - 1)[1]
    assert "nistp384" in come(key=openssh(new_key(ec.SECP256R1)))[1]
    assert come(key="no key")[0] == come(name="")[0] == come(name="a\nb")[0] == come(name="n" * 65)[0] == 403
    assert come(secret="guessed" * 5)[1].startswith("no such ticket")
    assert come(protocol="1")[0] == 403
    assert come()[0] == 200
    assert "works only once" in come()[1]
    assert client.post("/v1/anther/enrol", content=b"[" * 9000).status_code == 403
    assert client.post("/v1/anther/enrol", content=b" " * (1 << 20)).status_code == 413


@pytest.mark.parametrize("call", calls.CALLS, ids=lambda call: call.path)
def test_a_body_has_a_limit_and_is_a_message(served, call):
    pi = served.node("pi")
    before = len(served.seen)
    assert pi.post(call.path, b"\xff" * 50).status_code == 400
    assert pi.post(call.path, b"x" * (call.most + 1)).status_code == 413
    assert pi.post(call.path, b"", **{"content-type": "text/plain"}).status_code == 400
    assert pi.post(call.path, b"", **{"content-encoding": "gzip"}).status_code == 400
    assert len(served.seen) == before


def test_fields_that_flower_doesnt_know_are_not_handed_on(served):
    pi = served.node("pi")
    body = calls.HEARTBEAT.request(node={"node_id": pi.id}, heartbeat_interval=7.0).SerializeToString()
    assert pi.post(calls.HEARTBEAT.path, body + b"\xfa\x3f\x03abc").status_code == 200


def test_a_device_has_so_many_requests_a_minute(tmp_path):
    served = GatewayHarness(tmp_path)
    served.gateway.budget = RequestBudget(LimitsConfig(requests_per_minute=50), lambda: 0.0)
    with served.client:
        pi, other = served.node("pi"), served.node("other")
        statuses = [pi.call(calls.PULL_MESSAGES)[0] for _ in range(60)]
        assert statuses == [200] * 20 + [503] * 40, "thirty were taken by its coming"
        assert other.call(calls.PULL_MESSAGES)[0] == 200


def test_hostile_requests_count_as_many(tmp_path, caplog):
    served = GatewayHarness(tmp_path)
    served.gateway.budget = RequestBudget(LimitsConfig(requests_per_minute=100), lambda: 0.0)
    with served.client:
        pi = served.node("pi")
        statuses = [pi.call(calls.REGISTER, public_key=pem(pi.key))[0] for _ in range(10)]
    assert statuses == [403] * 3 + [503] * 7
    assert [record.message for record in caplog.records if "refused" in record.message] == [
        "pi of ada: refused: nodes of this federation are enrolled, and don't register"
    ], "named once"


def test_a_device_holds_a_request_until_it_has_read_the_answer(tmp_path):
    """One that reads slowly would else have us keep an answer of 20 MiB for each of its connections."""
    served = GatewayHarness(tmp_path)
    served.gateway.budget = RequestBudget(LimitsConfig(concurrent_requests=1))
    with served.client as client:
        pi, other = served.node("pi"), served.node("other")
        began, over = threading.Event(), asyncio.Event()

        async def read_slowly():
            body = calls.PULL_MESSAGES.request(node={"node_id": pi.id}).SerializeToString()
            headers = {"content-type": "application/protobuf", **signed(pi.key)}

            async def receive():
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(_):
                began.set()
                await over.wait()

            scope = {
                "type": "http",
                "asgi": {"spec_version": "2.4"},
                "http_version": "1.1",
                "method": "POST",
                "path": PULL,
                "query_string": b"",
                "headers": [(n.encode(), v.encode()) for n, v in headers.items()],
                "client": ("127.0.0.1", 1),
            }
            await served.gateway.app()(scope, receive, send)

        reading = client.portal.start_task_soon(read_slowly)
        try:
            assert began.wait(10)
            assert pi.call(calls.PULL_MESSAGES)[0] == 503
            assert pi.call(calls.HEARTBEAT, heartbeat_interval=30.0)[0] == 200, "it is there, however slow its line"
            assert other.call(calls.PULL_MESSAGES)[0] == 200
        finally:
            client.portal.call(over.set)
        reading.result(10)
        assert pi.call(calls.PULL_MESSAGES)[0] == 200


def test_without_tls_a_node_registers_itself(tmp_path):
    served = GatewayHarness(tmp_path)
    gateway = Gateway(
        superlink_url="http://inside",
        registry=served.registry,
        hello=hello,
        authority=b"",
        register_node=lambda *_: None,
        transport=served.gateway.transport,
        folder=tmp_path,
    )
    key = new_key()
    with TestClient(gateway.app()) as client:

        def call(call, **fields):
            body = call.request(**fields).SerializeToString()
            headers = {"content-type": "application/protobuf", **signed(key)}
            return client.post(call.path, content=body, headers=headers)

        assert call(calls.PULL_MESSAGES, node={"node_id": 5}).status_code == 401
        found = call(calls.REGISTER, public_key=pem(key))
        assert found.status_code == 200, found.text
        node = calls.REGISTER.response.FromString(found.content).node_id
        assert call(calls.ACTIVATE, public_key=pem(key), heartbeat_interval=30.0).status_code == 200
        assert call(calls.PULL_MESSAGES, node={"node_id": node}).status_code == 200
        assert call(calls.UNREGISTER, node_id=node).status_code == 200
        assert client.get(IN).status_code == 200
