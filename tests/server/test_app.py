"""Log line and tracker metrics of a round."""

import logging
from dataclasses import replace

from privacy.accounting import Guarantee
from server.app import _log_round
from server.report.trackers import round_metrics
from server.rounds.state import Round
from strategies.round.metrics import TrainMetrics, ValidationMetrics

TRAIN = TrainMetrics(
    asked=4,
    replied=2,
    dropped={"refused": 1, "unreachable": 1},
    bytes_down=20,
    bytes_up=10,
    seconds=2.0,
    joules=3.0,
    loss=0.5,
    epsilon=None,
)
NO_VALIDATION = ValidationMetrics(base=None, shared=None)
MEASURED = ValidationMetrics(base=0.5, shared=0.4, improved=0.2)


def test_round_is_one_log_line(caplog):
    caplog.set_level(logging.INFO)
    done = Round(number=1, train=TRAIN, validation=MEASURED, wall_seconds=12.34)
    private = replace(TRAIN, dropped={}, guarantees=(Guarantee(1.5, 1e-5),))
    noised = replace(NO_VALIDATION, gain=0.1, gain_error=0.01)
    _log_round(Round(number=0, train=None, validation=NO_VALIDATION, wall_seconds=1.0), 3)
    _log_round(done, 3)
    _log_round(replace(done, train=private, validation=noised), 3)
    assert caplog.messages == [
        "round 1 of 3: 2 of 4 replied (1 refused, 1 unreachable), 20.0% off the base's loss (0.5000 to 0.4000), 12.3 s",
        "round 1 of 3: 2 of 4 replied, gain 0.10000 ± 0.01000 by its noise, ε=1.5 per image (δ=1e-05, add or remove "
        "one), 12.3 s",
    ]


def test_round_metrics():
    metrics = round_metrics(Round(number=1, train=TRAIN, validation=MEASURED, wall_seconds=12.34))
    assert metrics["improved"] == 0.2
    assert (metrics["asked"], metrics["replied"], metrics["dropped"], metrics["refused"]) == (4, 2, 2, 1)
    assert metrics["seconds"] == 12.34
