"""What comes through a federation's one port, and what doesn't."""

import base64
import ssl
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from bench.processes import free_port
from protocol import plain
from protocol.hello import Enrolment, Hello
from protocol.messages import NEWEST, OLDEST
from server import identity
from server.door import Door, now, serve, show
from server.place import Place
from server.register import Register


def shown(port: int) -> bytes:
    """The certificate that whoever connects is shown, as PEM."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10).encode()


def key_of(size=ec.SECP384R1):
    return ec.generate_private_key(size())


def openssh(key) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def signed(key, path: str, *, at: datetime | None = None, as_whom=None) -> dict[str, str]:
    time = (at or datetime.now(UTC)).isoformat()
    pem = (as_whom or key).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {
        identity.KEY: base64.b64encode(pem).decode(),
        identity.TIME: time,
        identity.SIGNATURE: base64.b64encode(key.sign(f"{time} {path}".encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    }


class Inside:
    """Stands for a SuperLink: notes what comes through."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, dict[str, str]]] = []
        self.down = False

    async def __call__(self, scope, receive, send):
        await Starlette(routes=[Route("/{rest:path}", self.answer, methods=["POST", "GET"])])(scope, receive, send)

    async def answer(self, request: Request) -> Response:
        self.seen.append((request.url.path, await request.body(), dict(request.headers)))
        return Response(b"protobuf", media_type="application/protobuf", headers={"flwr-x": "y"})


@pytest.fixture
def inside():
    return Inside()


@pytest.fixture
def register(tmp_path):
    return Register(tmp_path)


@pytest.fixture
def welcomed():
    return []


@pytest.fixture
def client(inside, register, welcomed):
    def hello():
        return Hello(
            oldest=OLDEST, newest=NEWEST, anther="1", federation="f" * 16, base="b" * 64, base_bytes=7, time=now()
        )

    door = Door(
        inside="http://inside", register=register, hello=hello, authority=b"an authority",
        welcome=lambda key, name: welcomed.append((key, name)),
        shelf=[Route("/v1/anther/base/x/manifest", lambda _: PlainTextResponse("a base"))],
    )  # fmt: skip

    class Line(httpx.ASGITransport):
        async def handle_async_request(self, request):
            if inside.down:
                raise httpx.ConnectError("nobody there")
            return await super().handle_async_request(request)

    door._client = httpx.AsyncClient(base_url="http://inside", transport=Line(app=inside))
    return TestClient(door.app())


def enrolled(client, register, key, name="pi"):
    asked = Enrolment(protocol=NEWEST, secret=register.issue("ada"), key=openssh(key), name=name)
    found = client.post("/v1/anther/enrol", content=plain.dumps(asked))
    assert found.status_code == 200, found.text
    return key


def test_a_device_comes_in_and_reaches_the_fleet_and_the_base(client, register, inside, welcomed):
    key = enrolled(client, register, key_of())
    assert welcomed == [(openssh(key), "pi")]
    headers = {**signed(key, "anything"), "content-type": "application/protobuf", "x-mine": "no"}
    found = client.post("/v1/fleet/pull-messages", content=b"body", headers=headers)
    assert (found.status_code, found.content, found.headers["flwr-x"]) == (200, b"protobuf", "y")
    (path, body, seen), *_ = inside.seen
    assert (path, body) == ("/v1/fleet/pull-messages", b"body")
    assert seen["flwr-signature"] == headers["flwr-signature"]
    assert "x-mine" not in seen
    path = "/v1/anther/base/x/manifest"
    assert client.get(path, headers=signed(key, path)).text == "a base"
    assert client.get("/v1/anther/in", headers=signed(key, "/v1/anther/in")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/control/list-runs", "/v1/control/register-node", "/v1/runtime/get-nodes", "/health", "/", "/docs"]
)
def test_nothing_else_of_the_superlink_is_reached(client, register, inside, path):
    key = enrolled(client, register, key_of())
    for found in (client.post(path, headers=signed(key, path)), client.get(path, headers=signed(key, path))):
        assert found.status_code in (404, 405)
    assert inside.seen == []


@pytest.mark.parametrize("path", ["/v1/fleet/../control/list-runs", "/v1/fleet/..%2fcontrol%2flist-runs"])
def test_no_way_leads_out_of_the_fleet(client, register, inside, path):
    key = enrolled(client, register, key_of())
    client.post(path, headers=signed(key, path))
    assert all("control" not in path or path.startswith("/v1/fleet/") for path, *_ in inside.seen)
    assert not any(path.startswith("/v1/control") for path, *_ in inside.seen)


def test_who_is_not_in_reaches_nothing(client, inside):
    stranger, path = key_of(), "/v1/anther/base/x/manifest"
    for headers in ({}, signed(stranger, path), {identity.KEY: "!", identity.TIME: "x", identity.SIGNATURE: "y"}):
        assert client.get(path, headers=headers).status_code == 401
        assert client.post("/v1/fleet/pull-messages", headers=headers).status_code == 401
    assert inside.seen == []


def test_a_signature_is_for_one_path_and_one_time_and_one_key(client, register):
    key, path = enrolled(client, register, key_of()), "/v1/anther/base/x/manifest"
    bad = [
        signed(key, "/v1/anther/in"),
        signed(key, path, at=datetime.now(UTC) - timedelta(hours=1)),
        signed(key, path, at=datetime.now(UTC) + timedelta(hours=1)),
        signed(key_of(), path, as_whom=key),
    ]
    assert [client.get(path, headers=headers).status_code for headers in bad] == [401] * 4
    assert identity.proven(signed(key, path, at=datetime.now()), path) is None, "a time without a zone"  # noqa: DTZ005


def test_who_was_revoked_is_out_from_the_next_request_on(client, register):
    key = enrolled(client, register, key_of())
    register.revoke("pi")
    assert client.post("/v1/fleet/pull-messages", headers=signed(key, "x")).status_code == 401
    assert client.get("/v1/anther/in", headers=signed(key, "/v1/anther/in")).status_code == 401


def test_a_used_ticket_an_old_device_and_another_kind_of_key_are_told_why(client, register, welcomed):
    secret = register.issue("ada")

    def come(**changed):
        said = {"protocol": NEWEST, "secret": secret, "key": openssh(key_of()), "name": "pi"} | changed
        found = client.post("/v1/anther/enrol", content=plain.dumps(said))
        return found.status_code, found.json().get("error", "")

    assert "update Anther on the device" in come(protocol=OLDEST - 1)[1]
    assert "secp384r1" in come(key=openssh(key_of(ec.SECP256R1)))[1] or "nistp384" in come(key="x")[1]
    assert come(key="no key")[0] == come(name="")[0] == come(name="a\nb")[0] == come(name="n" * 65)[0] == 403
    assert come(secret="guessed" * 5)[1].startswith("no such ticket")
    assert come(protocol="1")[0] == 403
    assert welcomed == []
    assert come()[0] == 200
    assert "works once" in come()[1]
    assert client.post("/v1/anther/enrol", content=b"[" * 9000).status_code == 403
    assert client.post("/v1/anther/enrol", content=b" " * (1 << 20)).status_code == 403


def test_while_the_superlink_is_away_devices_are_told_to_wait(client, register, inside):
    key = enrolled(client, register, key_of())
    inside.down = True
    assert client.post("/v1/fleet/pull-messages", headers=signed(key, "x")).status_code == 503


def test_a_larger_request_than_flower_makes_is_refused(client, register, inside, monkeypatch):
    monkeypatch.setattr("server.door._LARGEST", 10)
    key = enrolled(client, register, key_of())
    assert client.post("/v1/fleet/push-object", content=b"x" * 11, headers=signed(key, "x")).status_code == 413
    assert inside.seen == []


def test_a_new_certificate_is_shown_without_a_restart(register, tmp_path):
    place, port = Place(tmp_path), free_port()
    place.prepare(["127.0.0.1"], port)
    door = Door(inside="http://inside", register=register, hello=str, authority=b"", welcome=lambda *_: None)
    opened = serve(door, host="127.0.0.1", port=port, certificates=place.certificates)
    try:
        assert shown(port) == place.certificates.certificate.read_bytes()
        place.rotate()
        show(opened, place.certificates)
        assert shown(port) == place.certificates.certificate.read_bytes()
    finally:
        opened.should_exit = True
