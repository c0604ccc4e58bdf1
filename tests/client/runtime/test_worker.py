"""The worker process: its state between requests, the requests that it serves, and its end."""

import dataclasses
import math
import socket
import threading

import pytest

from client.paths import device_files
from client.power.conditions import Conditions
from client.power.meter import Meter
from client.runtime import ipc, request_handler
from client.runtime.request_handler import WorkerResources
from client.runtime.throttle import Throttle
from client.runtime.worker import WorkerServer, stated
from client.store.open import open_store
from conf.schemas import node as nodes
from conf.schemas.node import compose
from protocol.messages import DeviceReport, Evaluation, Query
from tests.helpers.devices import train_request


@pytest.fixture
def worker(tmp_path, monkeypatch, pipeline_folder):
    """Yield a worker on a tiny base, with its store and socket."""
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path))
    words = [f"data={tmp_path}", "name=pi", "worker.idle_seconds=0.5", "worker.memory_gib=0.25", "device=cpu"]
    node = compose(words, tmp_path / "none")
    request_handler._loaded.unload()
    with open_store(device_files("pi")) as files, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        throttle = Throttle(
            nodes.ThrottleConfig(min_free_mib=0), lambda: Conditions(free_mib=1e6, charging=True, battery=0.5)
        )
        resources = WorkerResources(
            store=files.store, read=throttle._read, meter=Meter(None, watts=5.0), throttle=throttle
        )
        yield WorkerServer(stated(node, str(pipeline_folder)), resources), listener, node


def asking(listener, *requests):
    """Send requests in a thread; the returned list collects the responses."""
    answers = []

    def ask():
        for request in requests:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(listener.getsockname())
                try:
                    answers.append(ipc.request_response(connection, request))
                except OSError as error:
                    answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return answers, thread


def test_base_is_loaded_once_until_idle(worker):
    serving, listener, node = worker
    answers, thread = asking(listener, Query(), Query(), Query())
    serving.serve(listener, node)  # returns after the idle time
    thread.join()
    assert all(isinstance(answer.reply, DeviceReport) for answer in answers), answers
    report = answers[0].reply
    assert (report.device, report.battery, report.charging) == ("pi", 0.4, True)


def test_only_refusals_have_a_reason(worker):
    serving, listener, node = worker
    answers, thread = asking(listener, train_request(number=1))  # for another base
    serving.serve(listener, node)
    thread.join()
    assert "the plan is for base" in answers[0].refused
    serving.stated["base"] = "/nowhere/ada's pictures"
    answers, thread = asking(listener, Query())
    serving.serve(listener, node)
    thread.join()
    assert answers == [ipc.WorkerResponse()]


def test_other_users_are_not_served(worker, monkeypatch):
    serving, listener, node = worker
    monkeypatch.setattr(ipc, "same_user", lambda _: False)
    answers, thread = asking(listener, Query())
    serving.serve(listener, node)
    thread.join()
    assert isinstance(answers[0], OSError)


def test_garbage_ends_only_the_request(worker):
    serving, listener, node = worker

    def garbage():
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(listener.getsockname())
            connection.sendall(b"\0" * 40)
        answers.extend(asking(listener, Query())[0])

    answers = []
    thread = threading.Thread(target=garbage)
    thread.start()
    serving.serve(listener, node)
    thread.join()
    assert not serving.resources.throttle.stop.is_set()


def test_non_finite_number_ends_only_the_request(worker, monkeypatch):
    serving, listener, node = worker
    evaluation = Evaluation(device="pi", round=1, base=math.nan, shared=0.5)
    response = iter([evaluation, evaluation, dataclasses.replace(evaluation, base=0.5)])
    monkeypatch.setattr(request_handler, "answer", lambda *_, **__: next(response))
    answers, thread = asking(listener, Query(), Query(), Query())
    serving.serve(listener, node)
    thread.join()
    assert answers[:2] == [ipc.WorkerResponse(), ipc.WorkerResponse()]
    assert answers[2].reply.base == 0.5


def test_stopping_worker_takes_no_request(worker):
    serving, listener, node = worker
    serving.resources.throttle.stop.set()
    serving.serve(listener, node)
