"""The judgement of a federation under attack, and the attacks against a gateway in this process."""

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


def test_rounds_are_read_from_the_log():
    assert [(done.number, done.replied, done.asked, done.seconds) for done in rounds(LOG)] == [
        (1, 3, 4, 12.6),
        (2, 2, 4, 6.3),
    ]
    assert lost(rounds(LOG)) == [2]


def test_what_was_started_again_is_found():
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
def test_each_claim_can_fail(changed, failures):
    found = GatewayResults(calls=10, calm_seconds=[6.0, 5.0, 6.0], seconds=[7.0, 7.1])
    for name, value in changed.items():
        setattr(found, name, value)
    assert len(found.failures()) == failures
    assert gateway.table(found).row_count == len(
        {(who, row[0]) for who, rows in found.outcomes.items() for row in rows}
    )


class InProcess(fleet_attacks.Client):
    """A client of a gateway that is in this process."""

    def __init__(self, served, key, node, rng):
        self.key, self.rng, self.node, self.outcomes, self.base = key, rng, node, Counter(), "0" * 64
        self.pem, self.http = pem(key), served.client


HTTP = [kind for kind in fleet_attacks.KINDS if kind is not fleet_attacks.leave_half_open]


@pytest.fixture
def served(tmp_path):
    found = GatewayHarness(tmp_path, limits=LimitsConfig(requests_per_minute=10**9))
    with found.client:
        yield found


@pytest.mark.parametrize("enrolled", [True, False])
def test_hostile_calls_are_answered_and_change_nothing(served, enrolled):
    pi, eve = served.node("pi"), served.node("eve")
    asked = served.ask(pi, records())
    before = len(served.state.object_store)
    client = InProcess(served, eve.key if enrolled else new_key(), eve.id, Random(enrolled))
    for _ in range(150):
        client.rng.choice(HTTP)(client)
    became = Counter(status for (_, status), count in client.outcomes.items() for _ in range(count))
    told = {"200", "412"} if enrolled else set()  # it comes and leaves as it likes
    assert set(became) <= {"400", "401", "403", "404", "405", "413", *told}, client.outcomes
    assert len(served.state.object_store) == before
    assert set(pi.send(pi.reply(pi.receive(), records(text="done")))) == {200}
    assert len(served.replies(asked)) == 1


def test_a_misused_message_harms_no_other(served):
    pi, mallory = served.node("pi"), served.node("mallory")
    for seed in range(3):
        for node in (pi, mallory):
            served.ask(node, records(text="the same for both"), pushed=node is pi)
        client = InProcess(served, mallory.key, mallory.id, Random(seed))
        head, tree = mallory.pull()
        fleet_attacks.misuse(client, head.metadata, tree)
        served.push_the_rest()  # the ServerApp's own push, which an early confirmation would break
        fleet_attacks.refuse(client, head.metadata, tree, hostile=True)
        assert set(pi.send(pi.reply(pi.receive(), records(text=str(seed))))) == {200}
        answered = {kind: status for kind, status in client.outcomes if kind == "answering"}
        assert answered == {"answering": "200"}
        assert not any(status.startswith("5") and status != "503" for _, status in client.outcomes), client.outcomes
    assert calls.PUSH_MESSAGES.path in served.paths()
