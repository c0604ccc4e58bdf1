"""HTTP endpoints of the gateway and their authentication."""

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
    harness = GatewayHarness(tmp_path, base_routes=[Route(BASE, lambda _: PlainTextResponse("a base"))])
    with harness.client:
        yield harness


@pytest.fixture
def client(served):
    return served.client


def enrolled(served, key, name="pi"):
    enrollment = Enrollment(protocol=NEWEST, secret=served.registry.issue("ada"), key=openssh(key), name=name)
    response = served.client.post("/v1/anther/enrol", content=strict_json.dumps(enrollment))
    assert response.status_code == 200, response.text
    return key


def test_enrolled_device_reaches_the_base(served, client):
    registered = []
    served.gateway.register_node = lambda key, name: registered.append((key, name))
    key = enrolled(served, new_key())
    assert registered == [(openssh(key), "pi")]
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
def test_other_paths_are_unreachable(served, client, path):
    key = enrolled(served, new_key())
    for response in (client.post(path, headers=signed(key, path)), client.get(path, headers=signed(key, path))):
        assert response.status_code in (401, 404, 405)
    assert served.seen == []


def test_unknown_key_is_rejected(served, client):
    stranger = new_key()
    for headers in ({}, signed(stranger, BASE), {identity.KEY: "!", identity.TIME: "x", identity.SIGNATURE: "y"}):
        assert client.get(BASE, headers=headers).status_code == 401
        assert client.post(PULL, headers=headers).status_code == 401
    assert served.seen == []


def test_signature_covers_path_time_and_key(served, client):
    key = enrolled(served, new_key())
    bad = [
        signed(key, IN),
        signed(key),
        signed(key, BASE, at=datetime.now(UTC) - timedelta(hours=1)),
        signed(key, BASE, at=datetime.now(UTC) + timedelta(hours=1)),
        signed(new_key(), BASE, claimed_key=key),
    ]
    assert [client.get(BASE, headers=headers).status_code for headers in bad] == [401] * 5
    without_zone = signed(key, BASE, at=datetime.now())  # noqa: DTZ005
    assert identity.authenticate(Headers(without_zone), BASE) is None


def test_authenticates_before_reading_the_body(served, client):
    pi = served.node("pi")
    bad = [
        {identity.KEY: signed(pi.key)[identity.KEY]},
        signed(pi.key, PULL),
        signed(new_key(), claimed_key=pi.key),
        signed(pi.key, at=datetime.now(UTC) - timedelta(hours=1)),
    ]
    for headers in bad:
        chunks = iter([b"x" * 100] * 2)

        def body(chunks=chunks):
            yield from chunks

        response = client.post(PULL, content=body(), headers={"content-type": "application/protobuf", **headers})
        assert response.status_code == 401


@pytest.mark.parametrize("name", [identity.KEY, identity.TIME, identity.SIGNATURE])
def test_duplicate_headers_are_rejected(served, client, name):
    """The gateway and the SuperLink could use different ones of two keys."""
    pi = served.node("pi")
    honest = [("content-type", "application/protobuf"), *signed(pi.key).items()]
    body = calls.HEARTBEAT.request(node={"node_id": pi.id}, heartbeat_interval=30.0).SerializeToString()
    assert client.post(calls.HEARTBEAT.path, content=body, headers=honest).status_code == 200
    twice = [*honest, (name, signed(pi.key)[name])]
    assert client.post(calls.HEARTBEAT.path, content=body, headers=twice).status_code == 401


@pytest.mark.parametrize("curve", [ec.SECP256K1, ec.SECP256R1, ec.SECP521R1, ec.BrainpoolP256R1])
def test_other_curves_are_rejected(client, curve):
    key = new_key(curve)
    headers = {**signed(new_key(), IN), identity.KEY: base64.b64encode(pem(key)).decode()}
    assert client.get(IN, headers=headers).status_code == 401
    assert client.post(PULL, headers=headers).status_code == 401


def test_revocation_takes_effect_at_next_request(served, client):
    pi = served.node("pi")
    assert pi.pull() is None
    served.registry.revoke("pi")
    before = len(served.seen)
    assert pi.call(calls.PULL_MESSAGES)[0] == 401
    assert client.get(IN, headers=signed(pi.key, IN)).status_code == 401
    assert len(served.seen) == before


def test_damaged_registry_rejects_all_devices(served, client, caplog):
    pi = served.node("pi")
    (served.gateway.folder / "register.json").write_text("{")
    assert pi.call(calls.PULL_MESSAGES)[0] == 503
    assert client.get(IN, headers=signed(pi.key, IN)).status_code == 503
    assert "restore it from a backup" in caplog.text


def test_enrollment_errors_state_the_reason(served, client):
    secret = served.registry.issue("ada")

    def enroll(**changed):
        fields = {"protocol": NEWEST, "secret": secret, "key": openssh(new_key()), "name": "pi"} | changed
        response = client.post("/v1/anther/enrol", content=strict_json.dumps(fields))
        return response.status_code, response.json().get("error", "")

    assert "update Anther on the device" in enroll(protocol=OLDEST - 1)[1]
    assert "nistp384" in enroll(key=openssh(new_key(ec.SECP256R1)))[1]
    assert enroll(key="no key")[0] == enroll(name="")[0] == enroll(name="a\nb")[0] == enroll(name="n" * 65)[0] == 403
    assert enroll(secret="guessed" * 5)[1].startswith("no such ticket")
    assert enroll(protocol="1")[0] == 403
    assert enroll()[0] == 200
    assert "works only once" in enroll()[1]
    assert client.post("/v1/anther/enrol", content=b"[" * 9000).status_code == 403
    assert client.post("/v1/anther/enrol", content=b" " * (1 << 20)).status_code == 413


@pytest.mark.parametrize("call", calls.CALLS, ids=lambda call: call.path)
def test_body_is_bounded_and_parsed(served, call):
    pi = served.node("pi")
    before = len(served.seen)
    assert pi.post(call.path, b"\xff" * 50).status_code == 400
    assert pi.post(call.path, b"x" * (call.max_bytes + 1)).status_code == 413
    assert pi.post(call.path, b"", **{"content-type": "text/plain"}).status_code == 400
    assert pi.post(call.path, b"", **{"content-encoding": "gzip"}).status_code == 400
    assert len(served.seen) == before


def test_unknown_fields_are_dropped(served):
    pi = served.node("pi")
    body = calls.HEARTBEAT.request(node={"node_id": pi.id}, heartbeat_interval=7.0).SerializeToString()
    assert pi.post(calls.HEARTBEAT.path, body + b"\xfa\x3f\x03abc").status_code == 200


def test_request_rate_per_device(tmp_path):
    served = GatewayHarness(tmp_path)
    served.gateway.budget = RequestBudget(LimitsConfig(requests_per_minute=50), lambda: 0.0)
    with served.client:
        pi, other = served.node("pi"), served.node("other")
        statuses = [pi.call(calls.PULL_MESSAGES)[0] for _ in range(60)]
        assert statuses == [200] * 20 + [503] * 40, "activation costs 30 requests"
        assert other.call(calls.PULL_MESSAGES)[0] == 200


def test_hostile_requests_cost_more(tmp_path, caplog):
    served = GatewayHarness(tmp_path)
    served.gateway.budget = RequestBudget(LimitsConfig(requests_per_minute=100), lambda: 0.0)
    with served.client:
        pi = served.node("pi")
        statuses = [pi.call(calls.REGISTER, public_key=pem(pi.key))[0] for _ in range(10)]
    assert statuses == [403] * 3 + [503] * 7
    assert [record.message for record in caplog.records if "refused" in record.message] == [
        "pi of ada: refused: nodes of this federation are enrolled, and don't register"
    ], "logged once"


def test_request_counts_until_answer_is_read(tmp_path):
    """Otherwise a slow reader could make the gateway hold an answer of 20 MiB per connection."""
    served = GatewayHarness(tmp_path)
    served.gateway.budget = RequestBudget(LimitsConfig(concurrent_requests=1))
    with served.client as client:
        pi, other = served.node("pi"), served.node("other")
        started, finished = threading.Event(), asyncio.Event()

        async def read_slowly():
            body = calls.PULL_MESSAGES.request(node={"node_id": pi.id}).SerializeToString()
            headers = {"content-type": "application/protobuf", **signed(pi.key)}

            async def receive():
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(_):
                started.set()
                await finished.wait()

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
            assert started.wait(10)
            assert pi.call(calls.PULL_MESSAGES)[0] == 503
            assert pi.call(calls.HEARTBEAT, heartbeat_interval=30.0)[0] == 200, "heartbeats are counted separately"
            assert other.call(calls.PULL_MESSAGES)[0] == 200
        finally:
            client.portal.call(finished.set)
        reading.result(10)
        assert pi.call(calls.PULL_MESSAGES)[0] == 200


def test_node_registers_without_tls(tmp_path):
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
        response = call(calls.REGISTER, public_key=pem(key))
        assert response.status_code == 200, response.text
        node = calls.REGISTER.response.FromString(response.content).node_id
        assert call(calls.ACTIVATE, public_key=pem(key), heartbeat_interval=30.0).status_code == 200
        assert call(calls.PULL_MESSAGES, node={"node_id": node}).status_code == 200
        assert call(calls.UNREGISTER, node_id=node).status_code == 200
        assert client.get(IN).status_code == 200
