"""What nodes may say of Flower's fleet protocol, with Flower's own SuperLink behind the gateway."""

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
    found = GatewayHarness(tmp_path, limits=LimitsConfig(requests_per_minute=100_000))
    with found.client:
        yield found


@pytest.fixture
def pi(served):
    return served.node("pi")


def test_an_honest_exchange(served, pi):
    for size in (0, 100, calls.CHUNK + 10):
        asked = served.ask(pi, records(size))
        head = pi.receive()
        assert not served.has(asked.object_id), "confirmed, and removed"
        reply = pi.reply(head, records(size, text="done"))
        assert set(pi.send(reply)) == {200}
        (stored,) = served.replies(asked)
        assert (stored.metadata.message_id, stored.metadata.src_node_id) == (reply.object_id, pi.id)
        assert all(served.has(name) for name in names(get_object_tree(reply)))
    assert pi.pull() is None


def test_an_error_is_a_reply_too(served, pi):
    asked = served.ask(pi, QUERY)
    assert pi.send(pi.reply(pi.receive())) == [200, 200]
    assert served.replies(asked)[0].error.reason == "refused: no"


def test_the_superlink_sees_constant_paths_and_no_header_of_the_device(served, pi):
    pi.post(calls.HEARTBEAT.path + "?x=/v1/control/start-run", b"", host="a/v1/control/start-run?", cookie="mine")
    served.ask(pi, QUERY)
    pi.receive()
    assert set(served.paths()) <= {call.path for call in calls.CALLS}
    assert all("cookie" not in headers and headers["host"] == "inside" for _, headers in served.seen)


# Early and foreign confirmations: the ServerApp's own push would fail, and its run with it.


def test_a_message_is_confirmed_only_once_the_server_has_sent_it(served, pi):
    asked = served.ask(pi, records(), pushed=False)
    head, tree = pi.pull()
    assert pi.confirm(head)[0] == 503
    served.push_the_rest()
    assert served.has(asked.object_id)
    assert pi.object(served.run, names(tree)[0])[0] == 200
    assert pi.confirm(head)[0] == 200, "a SuperNode needn't pull what it holds"
    assert pi.confirm(head)[0] == 200, "the answer may be lost"
    assert not served.has(asked.object_id)


def test_nobody_confirms_another_nodes_message(served, pi):
    mallory = served.node("mallory")
    asked = served.ask(pi, records())
    for by in (mallory, pi):  # nor a node its own, before it has pulled it
        assert by.confirm(asked)[0] == 403
    assert served.has(asked.object_id)
    assert pi.receive().metadata.message_id == asked.object_id


def test_the_next_message_confirms_the_one_before(served, pi):
    first = served.ask(pi, records())
    pi.pull()
    served.ask(pi, QUERY)
    pi.pull()
    assert not served.has(first.object_id), "a node that never confirms doesn't fill the disk"


# Replies.


def test_a_reply_reaches_the_superlink_only_when_it_is_whole(served, pi):
    asked = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    _, found = pi.promise(reply)
    objects = get_all_nested_objects(reply)
    assert set(found.objects_to_push) == set(objects)
    for name in found.objects_to_push:
        assert served.replies(asked) == []
        assert calls.PUSH_MESSAGES.path not in served.paths()
        pi.push_object(served.run, found.session_id, name, objects[name].deflate())
    assert len(served.replies(asked)) == 1


def test_lost_answers_are_asked_for_again(served, pi):
    asked = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    _, first = pi.promise(reply)
    _, again = pi.promise(reply)
    assert first.session_id == again.session_id
    objects = get_all_nested_objects(reply)
    for name in [name for name in first.objects_to_push for _ in range(2)]:
        assert pi.push_object(served.run, first.session_id, name, objects[name].deflate())[0] == 200
    status, after = pi.promise(reply)
    assert (status, list(after.objects_to_push)) == (200, [])
    assert len(served.replies(asked)) == 1


def test_a_superlink_that_is_away_is_waited_for(served, pi):
    asked = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive())
    served.down = True
    assert pi.send(reply) == [200, 503]
    assert pi.call(calls.HEARTBEAT, heartbeat_interval=30.0)[0] == 503
    served.down = False
    assert pi.send(reply) == [200, 200]
    assert len(served.replies(asked)) == 1


def test_a_reply_answers_a_message_that_its_node_was_given(served, pi):
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
    assert pi.promise(pi.reply(head, QUERY))[0] == 403, "a second one"


def test_a_reply_names_its_own_root(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    other = get_object_tree(pi.reply(head, QUERY))
    assert pi.promise(pi.reply(head), other)[0] == 403


def test_a_root_object_that_says_otherwise_than_the_head(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    forged = pi.reply(head, src_node_id=7)
    honest = pi.reply(head)
    honest.metadata.__dict__["_message_id"] = forged.object_id
    _, found = pi.promise(honest, ObjectTree(object_id=forged.object_id))
    assert pi.push_object(served.run, found.session_id, forged.object_id, forged.deflate())[0] == 403


@pytest.mark.parametrize("number", [20, 400, 20_000])
def test_a_tree_of_many_names(served, pi, number):
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    whole = get_object_tree(reply)
    many = [ObjectTree(object_id=hashlib.sha256(str(n).encode()).hexdigest()) for n in range(number)]
    status, _ = pi.promise(reply, ObjectTree(object_id=whole.object_id, children=[*whole.children, *many]))
    assert status == (413 if number > 1000 else 403)
    assert calls.PUSH_MESSAGES.path not in served.paths()


def test_a_deep_or_contradictory_tree(served, pi):
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    whole, deep = get_object_tree(reply), ObjectTree(object_id="0" * 64)
    for n in range(1, 40):
        deep = ObjectTree(object_id=f"{n:064x}", children=[deep])
    child = whole.children[0]
    for extra in (deep, child, ObjectTree(object_id=child.object_id), ObjectTree(object_id="A" * 64)):
        tree = ObjectTree(object_id=whole.object_id, children=[*whole.children, extra])
        assert pi.promise(reply, tree)[0] == 403


def test_what_every_query_holds_cant_be_promised_with_other_children(served, pi):
    """Its content is the same each time, so its id is known: poisoned, no later Query could be asked."""
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    whole, content = get_object_tree(reply), get_all_nested_objects(QUERY)[QUERY.object_id].deflate()
    poisoned = ObjectTree(object_id=whole.object_id, children=[*whole.children, ObjectTree(object_id=QUERY.object_id)])
    _, found = pi.promise(reply, poisoned)
    assert pi.push_object(served.run, found.session_id, QUERY.object_id, content)[0] == 403
    root = get_all_nested_objects(reply)[reply.object_id].deflate()
    assert pi.push_object(served.run, found.session_id, reply.object_id, root)[0] == 403, "nor does the root name it"
    assert not served.has(QUERY.object_id)
    served.ask(pi, QUERY)  # the ServerApp's next


def test_objects_are_what_their_ids_say_and_the_reply_holds_no_others(served, pi):
    served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records())
    _, found = pi.promise(reply)
    objects = get_all_nested_objects(reply)
    some = next(name for name in objects if name != reply.object_id)
    assert pi.push_object(served.run, found.session_id, some, b"other")[0] == 403
    assert pi.push_object(served.run, "x" * 32, some, objects[some].deflate())[0] == 403
    assert pi.push_object(served.run + 1, found.session_id, some, objects[some].deflate())[0] == 403
    foreign = b"ArrayChunk  3\0abc"
    assert pi.push_object(served.run, found.session_id, hashlib.sha256(foreign).hexdigest(), foreign)[0] == 403


def test_a_reply_holds_no_more_than_the_largest_adapter(tmp_path):
    served = GatewayHarness(tmp_path, largest=1000, limits=LimitsConfig(requests_per_minute=100_000))
    with served.client:
        pi = served.node("pi")
        asked = served.ask(pi, QUERY)
        head = pi.receive()
        assert 403 in pi.send(pi.reply(head, records((1 << 20) + 2000)))
        assert served.replies(asked) == []
        assert set(pi.send(pi.reply(head, records(1000)))) == {200}


def test_replies_that_nobody_takes_dont_pile_up(served, pi):
    asked, sent = [], []
    for number in range(7):
        asked.append(served.ask(pi, QUERY))
        sent.append(pi.reply(pi.receive(), records(text=str(number))))
        assert set(pi.send(sent[-1])) == {200}
    assert [served.has(reply.object_id) for reply in sent] == [False] * 3 + [True] * 4


def test_which_objects_the_server_holds_is_not_told(served, pi):
    """Whether another device sent the same report would be known by it."""
    other = served.node("other")
    for node in (pi, other):
        served.ask(node, QUERY)
    first, second = pi.reply(pi.receive(), records()), other.reply(other.receive(), records())
    pi.send(first)
    _, found = other.promise(second)
    assert set(found.objects_to_push) == set(get_all_nested_objects(second))
    assert set(other.send(second)) == {200}


# Objects, runs and nodes of others.


def test_objects_of_other_nodes_messages(served, pi):
    mallory = served.node("mallory")
    asked = served.ask(pi, records())
    tree = get_object_tree(asked)
    assert [mallory.object(served.run, name)[0] for name in names(tree)] == [403] * len(names(tree))
    pi.receive()
    assert pi.object(served.run + 1, tree.object_id)[0] == 403
    assert mallory.call(calls.GET_RUN, run_id=served.run)[0] == 403
    assert mallory.call(calls.GET_FAB, run_id=served.run, hash_str="0" * 64)[0] == 403
    assert [pi.call(calls.GET_RUN, run_id=served.run)[0] for _ in range(20)] == [200] * 16 + [403] * 4


def test_the_same_object_again_and_again(served, pi):
    served.ask(pi, records())
    _, tree = pi.pull()
    statuses = [pi.object(served.run, tree.object_id)[0] for _ in range(40)]
    assert statuses == [200] * 32 + [403] * 8


def test_the_same_reply_again_and_again(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    reply = pi.reply(head, records())
    _, found = pi.promise(reply)
    name, content = next((name, item.deflate()) for name, item in get_all_nested_objects(reply).items())
    assert [pi.push_object(served.run, found.session_id, name, content)[0] for _ in range(34)] == [200] * 32 + [403] * 2
    begun = [pi.promise(pi.reply(head, records(text=str(n))))[0] for n in range(17)]
    assert begun == [200] * 15 + [403] * 2


def test_a_full_disk_is_waited_for(served, pi, monkeypatch):
    asked = served.ask(pi, QUERY)
    reply = pi.reply(pi.receive(), records(1 << 20))
    monkeypatch.setattr(served.gateway.fleet, "folder", served.gateway.folder / "missing")
    assert 503 in pi.send(reply)
    assert served.replies(asked) == []


def test_a_node_is_its_key(served, pi):
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


def test_a_node_with_another_id_begins_anew(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    served.ids[pi.name] = served.state.create_node("", "", b"another", 30.0)
    assert pi.promise(pi.reply(head))[0] == 403
    assert calls.PUSH_MESSAGES.path not in served.paths()


def test_a_reply_to_a_run_that_is_over_is_dropped(served, pi):
    served.ask(pi, QUERY)
    head = pi.receive()
    (task,) = served.state.get_tasks(run_ids=[served.run])
    served.state.finish_task(task.task_id, "completed", "")
    assert pi.send(pi.reply(head)) == [200, 403], "for which a SuperNode forgets it"


def test_while_the_gateway_knows_nothing_yet_nodes_are_told_to_wait(served, pi):
    del served.gateway.fleet.exchanges[pi.name]
    served.ids[pi.name] = None
    assert pi.post(calls.HEARTBEAT.path, b"").status_code == 503
