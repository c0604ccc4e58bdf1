"""Tests of the verdict on a federation under attack, and of the attacks on a gateway in this process."""

from collections import Counter
from random import Random

import pytest

from bench.robustness import fleet_attacks, gateway
from bench.robustness.gateway import GatewayResults, exited, lost, rounds
from conf.schemas.server import LimitsConfig
from server.gateway import calls
from tests.helpers.served import GatewayHarness, new_key, pem, records

LOG = """2026-11-30 19:48:14 run 7 began
2026-11-30 19:48:20 round 0 of 9: no losses, 0.0 s
2026-11-30 19:48:30 round 1 of 9: 3 of 4 replied (1 refused), 0.7% off the base's loss (0.0761 to 0.0761), 12.6 s
2026-11-30 19:48:40 round 2 of 9: 2 of 4 replied (1 no reply), 0.7% off the base's loss (0.0761 to 0.0761), 6.3 s
2026-11-30 19:48:40 round 2 of 9: 2 of 4 replied (1 no reply), 0.7% off the base's loss (0.0761 to 0.0761), 6.3 s
"""


def test_rounds_are_parsed_from_the_log():
    assert [(record.number, record.replied, record.asked, record.seconds) for record in rounds(LOG)] == [
        (1, 3, 4, 12.6),
        (2, 2, 4, 6.3),
    ]
    assert lost(rounds(LOG)) == [2]


def test_restarted_programs_are_listed():
    before = {
        "server: server.supervisor.run": {1},
        "owner-0: client.runtime.supernode": {5, 6, 7},
        "owner-0: client.runtime.worker": {9},
    }
    after = {
        "server: server.supervisor.run": {1},
        "owner-0: client.runtime.supernode": {5, 8},
        "owner-0: client.runtime.worker": {10},
    }
    assert exited(before, after) == []
    assert exited(before, {**after, "server: server.supervisor.run": {2}}) == ["server: server.supervisor.run"]
    assert exited(before, {**after, "owner-0: client.runtime.supernode": {6, 7}}) == [
        "owner-0: client.runtime.supernode"
    ]


@pytest.mark.parametrize(
    ("changed", "failures"),
    [
        ({}, 0),
        ({"lost": [3]}, 1),
        ({"restarted": ["server: server.supervisor.run"]}, 1),
        ({"seconds": [7.3]}, 1),
        ({"seconds": []}, 1),
        ({"memory_mib": 300.0}, 1),
        ({"disk_mib": 100.0}, 1),
        ({"outcomes": {"stranger": [("paths", "200", 1)], "eve": [("mutated", "500", 2), ("mutated", "200", 2)]}}, 2),
    ],
)
def test_every_claim_can_fail(changed, failures):
    results = GatewayResults(calls=10, calm_seconds=[6.0, 5.0, 6.0], seconds=[7.0, 7.1])
    for name, value in changed.items():
        setattr(results, name, value)
    assert len(results.failures()) == failures
    assert gateway.table(results).row_count == len(
        {(who, row[0]) for who, rows in results.outcomes.items() for row in rows}
    )


class _InProcessClient(fleet_attacks.Client):
    """Client of a gateway in this process."""

    def __init__(self, served, key, node, rng):
        self.key, self.rng, self.node, self.outcomes, self.base = key, rng, node, Counter(), "0" * 64
        self.pem, self.http = pem(key), served.client


HTTP = [kind for kind in fleet_attacks.KINDS if kind is not fleet_attacks.leave_half_open]


@pytest.fixture
def served(tmp_path):
    gateway_under_test = GatewayHarness(tmp_path, limits=LimitsConfig(requests_per_minute=10**9))
    with gateway_under_test.client:
        yield gateway_under_test


@pytest.mark.parametrize("enrolled", [True, False])
def test_hostile_calls_change_nothing(served, enrolled):
    pi, eve = served.node("pi"), served.node("eve")
    request = served.ask(pi, records())
    stored = len(served.state.object_store)
    client = _InProcessClient(served, eve.key if enrolled else new_key(), eve.id, Random(enrolled))
    for _ in range(150):
        client.rng.choice(HTTP)(client)
    statuses = Counter(status for (_, status), count in client.outcomes.items() for _ in range(count))
    allowed = {"200", "412"} if enrolled else set()  # an enrolled client may activate and deactivate its node
    assert set(statuses) <= {"400", "401", "403", "404", "405", "413", *allowed}, client.outcomes
    assert len(served.state.object_store) == stored
    assert set(pi.send(pi.reply(pi.receive(), records(text="done")))) == {200}
    assert len(served.replies(request)) == 1


@pytest.mark.integration
def test_misused_message_harms_no_other_node(served):
    pi, mallory = served.node("pi"), served.node("mallory")
    for seed in range(3):
        for node in (pi, mallory):
            served.ask(node, records(text="the same for both"), pushed=node is pi)
        client = _InProcessClient(served, mallory.key, mallory.id, Random(seed))
        head, tree = mallory.pull()
        fleet_attacks.misuse(client, head.metadata, tree)
        served.push_the_rest()  # the ServerApp's push, which an early confirmation must not break
        fleet_attacks.refuse(client, head.metadata, tree, hostile=True)
        assert set(pi.send(pi.reply(pi.receive(), records(text=str(seed))))) == {200}
        answered = {kind: status for kind, status in client.outcomes if kind == "answering"}
        assert answered == {"answering": "200"}
        assert not any(status.startswith("5") and status != "503" for _, status in client.outcomes), client.outcomes
    assert calls.PUSH_MESSAGES.path in served.paths()
