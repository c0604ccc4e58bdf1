"""Flower's fleet protocol through the gateway, with Flower's own SuperLink behind it."""

import hashlib

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from conf.schemas.server import LimitsConfig
from server.gateway import calls
from tests.helpers.served import GatewayHarness, names, pem, records

QUERY = RecordDict({"message": ConfigRecord({"json": "{}"})})


@pytest.fixture
def served(tmp_path):
    harness = GatewayHarness(tmp_path, limits=LimitsConfig(requests_per_minute=100_000))
    with harness.client:
        yield harness


@pytest.fixture
def pi(served):
    return served.node("pi")


@pytest.mark.integration
def test_honest_exchange(served, pi):
    for size in (0, 100, calls.CHUNK + 10):
        request = served.ask(pi, records(size))
        head = pi.receive()
        assert not served.has(request.object_id), "confirmed, and removed"
        reply = pi.reply(head, records(size, text="done"))
        assert set(pi.send(reply)) == {200}
        (stored,) = served.replies(request)
        assert (stored.metadata.message_id, stored.metadata.src_node_id) == (reply.object_id, pi.id)
        assert all(served.has(name) for name in names(get_object_tree(reply)))
    assert pi.pull() is None


def test_error_reply(served, pi):
    request = served.ask(pi, QUERY)
    assert pi.send(pi.reply(pi.receive())) == [200, 200]
    assert served.replies(request)[0].error.reason == "refused: no"


def test_paths_and_headers_are_not_forwarded(served, pi):
    pi.post(calls.HEARTBEAT.path + "?x=/v1/control/start-run", b"", host="a/v1/control/start-run?", cookie="mine")
    served.ask(pi, QUERY)
    pi.receive()
    assert set(served.paths()) <= {call.path for call in calls.CALLS}
    assert all("cookie" not in headers and headers["host"] == "inside" for _, headers in served.seen)


# Early and foreign confirmations: the ServerApp's own push would fail, and end its run.


def test_confirmation_waits_for_complete_message(served, pi):
    request = served.ask(pi, records(), pushed=False)
    head, tree = pi.pull()
    assert pi.confirm(head)[0] == 503
    served.push_the_rest()
    assert served.has(request.object_id)
    assert pi.object(served.run, names(tree)[0])[0] == 200
    assert pi.confirm(head)[0] == 200, "a SuperNode doesn't pull objects that it already has"
    assert pi.confirm(head)[0] == 200, "the answer may be lost"
    assert not served.has(request.object_id)


def test_foreign_confirmation_is_refused(served, pi):
    mallory = served.node("mallory")
    request = served.ask(pi, records())
    for by in (mallory, pi):  # nor its own message before pulling it
        assert by.confirm(request)[0] == 403
    assert served.has(request.object_id)
    assert pi.receive().metadata.message_id == request.object_id


def test_next_message_confirms_previous(served, pi):
    first = served.ask(pi, records())
    pi.pull()
    served.ask(pi, QUERY)
    pi.pull()
    assert not served.has(first.object_id), "a node that never confirms doesn't fill the disk"


# Replies.


def test_only_complete_replies_reach_the_superlink(served, pi):
    request = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    _, response = pi.promise(reply)
    objects = get_all_nested_objects(reply)
    assert set(response.objects_to_push) == set(objects)
    for name in response.objects_to_push:
        assert served.replies(request) == []
        assert calls.PUSH_MESSAGES.path not in served.paths()
        pi.push_object(served.run, response.session_id, name, objects[name].deflate())
    assert len(served.replies(request)) == 1


def test_repeated_calls_after_lost_answers(served, pi):
    request = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    _, first = pi.promise(reply)
    _, again = pi.promise(reply)
    assert first.session_id == again.session_id
    objects = get_all_nested_objects(reply)
    for name in [name for name in first.objects_to_push for _ in range(2)]:
        assert pi.push_object(served.run, first.session_id, name, objects[name].deflate())[0] == 200
    status, after = pi.promise(reply)
    assert (status, list(after.objects_to_push)) == (200, [])
    assert len(served.replies(request)) == 1


def test_unavailable_superlink_is_retried(served, pi):
    request = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive())
    served.down = True
    assert pi.send(reply) == [200, 503]
    assert pi.call(calls.HEARTBEAT, heartbeat_interval=30.0)[0] == 503
    served.down = False
    assert pi.send(reply) == [200, 200]
    assert len(served.replies(request)) == 1


def test_reply_must_answer_a_delivered_message(served, pi):
    mallory = served.node("mallory")
    served.ask(pi, QUERY)
    head = pi.receive()
    assert mallory.promise(mallory.reply(head))[0] == 403
    assert mallory.promise(mallory.reply(head, src_node_id=pi.id))[0] == 403
    assert pi.promise(pi.reply(head, reply_to_message_id="0" * 64))[0] == 403
    assert pi.promise(pi.reply(head, run_id=5))[0] == 403
    assert pi.promise(pi.reply(head, message_type="query"))[0] == 403
    assert pi.promise(pi.reply(head, group_id="9"))[0] == 403
    assert pi.promise(pi.reply(head, ttl=float("nan")))[0] == 403
    assert pi.promise(pi.reply(head, created_at=float("inf")))[0] == 403
    assert set(pi.send(pi.reply(head))) == {200}
    assert pi.promise(pi.reply(head, QUERY))[0] == 403, "a second reply"


def test_reply_must_name_its_root(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    other = get_object_tree(pi.reply(head, QUERY))
    assert pi.promise(pi.reply(head), other)[0] == 403


def test_root_must_match_head(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    forged = pi.reply(head, src_node_id=7)
    honest = pi.reply(head)
    honest.metadata.__dict__["_message_id"] = forged.object_id
    _, response = pi.promise(honest, ObjectTree(object_id=forged.object_id))
    assert pi.push_object(served.run, response.session_id, forged.object_id, forged.deflate())[0] == 403


@pytest.mark.parametrize("number", [20, 400, 20_000])
def test_large_tree_is_refused(served, pi, number):
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    whole = get_object_tree(reply)
    many = [ObjectTree(object_id=hashlib.sha256(str(n).encode()).hexdigest()) for n in range(number)]
    status, _ = pi.promise(reply, ObjectTree(object_id=whole.object_id, children=[*whole.children, *many]))
    assert status == (413 if number > 1000 else 403)
    assert calls.PUSH_MESSAGES.path not in served.paths()


def test_deep_or_contradictory_tree_is_refused(served, pi):
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    whole, deep = get_object_tree(reply), ObjectTree(object_id="0" * 64)
    for n in range(1, 40):
        deep = ObjectTree(object_id=f"{n:064x}", children=[deep])
    child = whole.children[0]
    for extra in (deep, child, ObjectTree(object_id=child.object_id), ObjectTree(object_id="A" * 64)):
        tree = ObjectTree(object_id=whole.object_id, children=[*whole.children, extra])
        assert pi.promise(reply, tree)[0] == 403


def test_known_object_with_other_children_is_refused(served, pi):
    """A Query's content never changes, so its id is known: a poisoned id would prevent later queries."""
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    whole, content = get_object_tree(reply), get_all_nested_objects(QUERY)[QUERY.object_id].deflate()
    poisoned = ObjectTree(object_id=whole.object_id, children=[*whole.children, ObjectTree(object_id=QUERY.object_id)])
    _, response = pi.promise(reply, poisoned)
    assert pi.push_object(served.run, response.session_id, QUERY.object_id, content)[0] == 403
    root = get_all_nested_objects(reply)[reply.object_id].deflate()
    assert pi.push_object(served.run, response.session_id, reply.object_id, root)[0] == 403, "the root doesn't name it"
    assert not served.has(QUERY.object_id)
    served.ask(pi, QUERY)  # the ServerApp's next query


def test_objects_must_match_ids_and_tree(served, pi):
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    _, response = pi.promise(reply)
    objects = get_all_nested_objects(reply)
    some = next(name for name in objects if name != reply.object_id)
    assert pi.push_object(served.run, response.session_id, some, b"other")[0] == 403
    assert pi.push_object(served.run, "x" * 32, some, objects[some].deflate())[0] == 403
    assert pi.push_object(served.run + 1, response.session_id, some, objects[some].deflate())[0] == 403
    foreign = b"ArrayChunk  3\0abc"
    assert pi.push_object(served.run, response.session_id, hashlib.sha256(foreign).hexdigest(), foreign)[0] == 403


def test_reply_size_limit(tmp_path):
    served = GatewayHarness(tmp_path, largest=1000, limits=LimitsConfig(requests_per_minute=100_000))
    with served.client:
        pi = served.node("pi")
        request = served.ask(pi, QUERY)
        head = pi.receive()
        assert 403 in pi.send(pi.reply(head, records((1 << 20) + 2000)))
        assert served.replies(request) == []
        assert set(pi.send(pi.reply(head, records(1000)))) == {200}


def test_unread_replies_are_bounded(served, pi):
    request, sent = [], []
    for number in range(7):
        request.append(served.ask(pi, QUERY))
        sent.append(pi.reply(pi.receive(), records(text=str(number))))
        assert set(pi.send(sent[-1])) == {200}
    assert [served.has(reply.object_id) for reply in sent] == [False] * 3 + [True] * 4


def test_stored_objects_are_not_revealed(served, pi):
    """They would reveal whether another device sent the same report."""
    other = served.node("other")
    for node in (pi, other):
        served.ask(node, QUERY)
    first, second = pi.reply(pi.receive(), records()), other.reply(other.receive(), records())
    pi.send(first)
    _, response = other.promise(second)
    assert set(response.objects_to_push) == set(get_all_nested_objects(second))
    assert set(other.send(second)) == {200}


# Objects, runs and nodes of other devices.


def test_foreign_objects_are_refused(served, pi):
    mallory = served.node("mallory")
    request = served.ask(pi, records())
    tree = get_object_tree(request)
    assert [mallory.object(served.run, name)[0] for name in names(tree)] == [403] * len(names(tree))
    pi.receive()
    assert pi.object(served.run + 1, tree.object_id)[0] == 403
    assert mallory.call(calls.GET_RUN, run_id=served.run)[0] == 403
    assert mallory.call(calls.GET_FAB, run_id=served.run, hash_str="0" * 64)[0] == 403
    assert [pi.call(calls.GET_RUN, run_id=served.run)[0] for _ in range(20)] == [200] * 16 + [403] * 4


def test_repeated_pulls_are_limited(served, pi):
    served.ask(pi, records())
    _, tree = pi.pull()
    statuses = [pi.object(served.run, tree.object_id)[0] for _ in range(40)]
    assert statuses == [200] * 32 + [403] * 8


def test_repeated_replies_are_limited(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    reply = pi.reply(head, records())
    _, response = pi.promise(reply)
    name, content = next((name, item.deflate()) for name, item in get_all_nested_objects(reply).items())
    assert [pi.push_object(served.run, response.session_id, name, content)[0] for _ in range(34)] == [200] * 32 + [
        403
    ] * 2
    begun = [pi.promise(pi.reply(head, records(text=str(n))))[0] for n in range(17)]
    assert begun == [200] * 15 + [403] * 2


def test_full_disk_is_retried(served, pi, monkeypatch):
    request = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records(1 << 20))
    monkeypatch.setattr(served.gateway.fleet, "folder", served.gateway.folder / "missing")
    assert 503 in pi.send(reply)
    assert served.replies(request) == []


def test_node_is_identified_by_key(served, pi):
    mallory = served.node("mallory")
    theirs = ProtoNode(node_id=pi.id)
    before = len(served.seen)
    assert mallory.call(calls.PULL_MESSAGES, node=theirs)[0] == 401
    assert mallory.call(calls.HEARTBEAT, node=theirs, heartbeat_interval=30.0)[0] == 401
    assert mallory.call(calls.DEACTIVATE, node_id=pi.id)[0] == 401
    assert mallory.call(calls.ACTIVATE, public_key=pem(pi.key), heartbeat_interval=30.0)[0] == 401
    assert mallory.call(calls.REGISTER, public_key=pem(mallory.key))[0] == 403
    assert mallory.call(calls.UNREGISTER, node_id=mallory.id)[0] == 403
    assert len(served.seen) == before
    assert mallory.call(calls.DEACTIVATE, node_id=mallory.id)[0] == 200


def test_new_node_id_resets_exchange(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    served.ids[pi.name] = served.state.create_node("", "", b"another", 30.0)
    assert pi.promise(pi.reply(head))[0] == 403
    assert calls.PUSH_MESSAGES.path not in served.paths()


def test_reply_to_finished_run_is_dropped(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    (task,) = served.state.get_tasks(run_ids=[served.run])
    served.state.finish_task(task.task_id, "completed", "")
    assert pi.send(pi.reply(head)) == [200, 403], "the SuperNode drops it after a 403"


def test_unknown_node_id_means_retry(served, pi):
    del served.gateway.fleet.exchanges[pi.name]
    served.ids[pi.name] = None
    assert pi.post(calls.HEARTBEAT.path, b"").status_code == 503
