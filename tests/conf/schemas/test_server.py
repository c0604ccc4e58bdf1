"""Values of a server's settings are checked."""

import pytest

from conf.schemas.server import ServerConfig


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.10", "::", "example.org"])
def test_insecure_server_needs_loopback(host: str) -> None:
    ServerConfig(host=host)
    with pytest.raises(ValueError, match=r"only 127\.0\.0\.1"):
        ServerConfig(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_insecure_server_on_loopback(host: str) -> None:
    assert ServerConfig(host=host, insecure=True).insecure
