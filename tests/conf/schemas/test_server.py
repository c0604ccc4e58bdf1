"""What a server may be told to do."""

import pytest

from conf.schemas.server import ServerConfig


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.10", "::", "example.org"])
def test_without_keys_nobody_else_reaches_it(host: str) -> None:
    ServerConfig(host=host)
    with pytest.raises(ValueError, match=r"only 127\.0\.0\.1"):
        ServerConfig(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_it_may_be_tried_without(host: str) -> None:
    assert ServerConfig(host=host, insecure=True).insecure
