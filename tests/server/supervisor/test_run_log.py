"""A run's log as the operator reads it, through Flower's own logger."""

import io
import logging

import pytest
from flwr.supercore.logger import FLOWER_LOGGER, ConsoleHandler

from server.supervisor.run_log import format_line, log_through_flower, log_to_console


@pytest.mark.parametrize("timestamps", [True, False])
@pytest.mark.parametrize("colored", [True, False])
def test_our_log_lines_are_plain(colored, timestamps):
    stream = io.StringIO()
    handler = ConsoleHandler(timestamps=timestamps, json=False, colored=colored, stream=stream)
    before, FLOWER_LOGGER.handlers = FLOWER_LOGGER.handlers, [handler]
    room = logging.getLogger("room")
    try:
        log_through_flower("room")
        logging.getLogger("room.inner").info("round %d of %d", 1, 3)
        logging.getLogger("room.inner").warning("node 7 is excluded")
        FLOWER_LOGGER.info("Starting Flower ServerApp")
        FLOWER_LOGGER.error("something broke")
    finally:
        FLOWER_LOGGER.handlers = before
        room.handlers.clear()
    assert [format_line(line) for line in stream.getvalue().splitlines()] == [
        "round 1 of 3",
        "warning: node 7 is excluded",
        None,
        "error: something broke",
    ]


def test_a_traceback_is_shown():
    assert format_line("Traceback (most recent call last):\n") == "Traceback (most recent call last):"
    assert format_line("\x1b[92mINFO \x1b[0m:      \n") is None
    assert format_line("\n") is None
    assert format_line("Using SuperLink: anther (127.0.0.1:9444)") is None


def test_log_to_console(capsys):
    log_to_console("lobby")
    logging.getLogger("lobby.gateway").info("ada-pi is in, of %s", "ada")
    logging.getLogger("lobby").handlers.clear()
    assert capsys.readouterr().out.endswith(" ada-pi is in, of ada\n")
