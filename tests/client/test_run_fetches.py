"""A device that lacks its base waits for it: whatever kept it from coming, it is asked for again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.runtime import downloads, supervisor
from client.runtime.server_connection import ServerConnection, ServerUnavailable
from common.errors import AntherError
from conf.schemas.node import FetchConfig, NodeConfig, PowerConfig
from privacy.policy import Policy
from protocol.handshake import ServerHello
from protocol.messages import NEWEST, OLDEST

BASE = "0" * 64
LINK = ServerConnection("127.0.0.1:1", insecure=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    return tmp_path


def test_a_link_that_is_cut_ends_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: Iterator[object] = iter([AntherError("the link was cut 7 times"), AntherError("again"), Path("there")])
    hello = ServerHello(
        oldest=OLDEST,
        newest=NEWEST,
        anther="1",
        federation="f",
        base=BASE,
        base_bytes=1,
        time="2026-01-01T00:00:00+00:00",
    )

    def fetched(*_: object, **__: object) -> Path:
        found = next(tries)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Path)
        return found

    monkeypatch.setattr(downloads, "fetch", fetched)
    monkeypatch.setattr(ServerConnection, "hello", lambda _: hello)
    monkeypatch.setattr(supervisor.server_connection, "skew", lambda _: 0.0)
    waited: list[float] = []
    monkeypatch.setattr(supervisor.time, "sleep", waited.append)
    assert supervisor.wait_for_server(NodeConfig(), LINK, Policy()) == BASE
    assert len(waited) == 2


def test_a_network_that_is_paid_by_volume_is_left_alone(home: Path) -> None:
    (home / "sensors.json").write_text(json.dumps({"metered": True}))
    node = NodeConfig(
        power=PowerConfig(meter="file", file=str(home / "sensors.json")), fetch=FetchConfig(source="server")
    )
    with pytest.raises(ServerUnavailable, match="network is metered"):
        supervisor.ensure_base(node, LINK, BASE)
    with pytest.raises(ServerUnavailable, match="can't be fetched") as refused:  # nobody is there, but it was asked
        supervisor.ensure_base(replace(node, fetch=FetchConfig(source="folder", allow_metered=True)), LINK, BASE)
    assert "network is metered" not in str(refused.value)
