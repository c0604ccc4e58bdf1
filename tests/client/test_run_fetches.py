"""A device without its base keeps trying to download it, whatever prevented it before."""

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


def test_broken_connection_does_not_end_device(monkeypatch: pytest.MonkeyPatch) -> None:
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
        result = next(tries)
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Path)
        return result

    monkeypatch.setattr(downloads, "fetch", fetched)
    monkeypatch.setattr(ServerConnection, "hello", lambda _: hello)
    monkeypatch.setattr(supervisor.server_connection, "skew", lambda _: 0.0)
    waited: list[float] = []
    monkeypatch.setattr(supervisor.time, "sleep", waited.append)
    assert supervisor.wait_for_server(NodeConfig(), LINK, Policy()) == BASE
    assert len(waited) == 2


def test_metered_network_is_not_used(home: Path) -> None:
    (home / "sensors.json").write_text(json.dumps({"metered": True}))
    node = NodeConfig(
        power=PowerConfig(meter="file", file=str(home / "sensors.json")), fetch=FetchConfig(source="server")
    )
    with pytest.raises(ServerUnavailable, match="network is metered"):
        supervisor.ensure_base(node, LINK, BASE)
    with pytest.raises(
        ServerUnavailable, match="can't be fetched"
    ) as refused:  # no server is there, but the download was attempted
        supervisor.ensure_base(replace(node, fetch=FetchConfig(source="folder", allow_metered=True)), LINK, BASE)
    assert "network is metered" not in str(refused.value)
