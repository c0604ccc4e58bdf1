"""Checkpoints load as saved, and damaged ones are refused."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from common.errors import AntherError
from models.lora.adapter import Site, init_adapter, to_tensors
from privacy.accounting import Guarantee
from server.report import totals
from server.rounds import checkpoint
from server.rounds.state import Round
from strategies.round.metrics import CentralDPMetrics, DeviceMetrics, TrainMetrics, ValidationMetrics
from tests.helpers.fleet import SITES, fresh_state

FILES = ["adapter.safetensors", "best.safetensors", "memory.safetensors", "state.json", "manifest.json"]


def device(**changes):
    return DeviceMetrics(
        **{"rank": 3, "steps": 2, "bytes_down": 10, "bytes_up": 5, "seconds": 1.5, "joules": 2.0, "epsilon": None}
        | changes
    )


def round_(number, shared):
    facts = TrainMetrics(
        asked=3,
        replied=2,
        dropped={"codec": 1},
        bytes_down=10,
        bytes_up=5,
        seconds=1.5,
        joules=2.0,
        loss=0.1,
        epsilon=None,
        diagnostics={"energy": 1.0},
        devices={"a": device(), f"only {number}": device(rank=number)},
    )
    validation = ValidationMetrics(base=1.0, shared=shared, devices={"a": 0.5} if shared else {})
    return Round(number=number, train=facts if number else None, validation=validation, wall_seconds=0.25)


def states(*losses, private=False):
    """Return the states after each round."""
    state, loaded = fresh_state(private=private), []
    for number, loss in enumerate(losses):
        memory = {part: to_tensors(init_adapter(SITES, number + 1, seed=9)) for part in ("mean", "square")}
        state = state.after(round_(number, loss), init_adapter(SITES, 3, seed=number), memory=memory)
        loaded.append(state)
    return loaded


def equal(one, other):
    def tensors(state):
        adapters = [
            t for adapter in (state.adapter, state.best_adapter) for factors in adapter.values() for t in factors
        ]
        return adapters + [part[name] for part in state.memory.values() for name in sorted(part)]

    facts = [
        (s.run, s.private, s.history, s.devices, s.best_round, {part: s.memory[part].keys() for part in s.memory})
        for s in (one, other)
    ]
    return facts[0] == facts[1] and all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_round_trip(tmp_path):
    (*_, state) = states(1.0, 0.5, 0.7)
    checkpoint.save(tmp_path, state)
    assert equal(checkpoint.load(tmp_path, sites=SITES), state)


def test_history_keeps_sums_per_device():
    (*_, state) = states(1.0, 0.5, 0.7)
    assert all(done.train is None or done.train.devices == {} for done in state.history)
    assert all(done.validation.devices == {} for done in state.history)
    twice = device(steps=4, bytes_down=20, bytes_up=10, seconds=3.0, joules=4.0)
    assert state.devices == {"a": twice, "only 1": device(rank=1), "only 2": device(rank=2)}


def test_device_sums_of_two_rounds():
    one, two = device(rank=3, epsilon=1.0), device(rank=2, steps=5, epsilon=1.5)
    assert (
        one.merge(two)
        == two.merge(one)
        == device(rank=3, steps=7, bytes_down=20, bytes_up=10, seconds=3.0, joules=4.0, epsilon=1.5)
    )
    assert device(epsilon=1.0).merge(device()).epsilon == 1.0


def test_missing_folder_loads_none(tmp_path):
    assert checkpoint.load(tmp_path / "none", sites=SITES) is None


def test_best_round_has_lowest_validation_loss():
    assert [state.best_round for state in states(1.0, 0.5, 0.7, None, 0.4)] == [0, 1, 1, 1, 4]
    assert [state.best_round for state in states(None, None, 0.7, 0.8)] == [0, 1, 2, 2]
    best = states(1.0, 0.5, 0.7)[-1]
    assert torch.equal(best.best_adapter["x"].a, init_adapter(SITES, 3, seed=1)["x"].a)


def test_rounds_compare_by_relative_improvement():
    """An easy device in round 1, then a hard one, on which the adapter improves."""
    state = fresh_state()
    for number, (base, shared) in enumerate([(None, None), (0.5, 0.49), (0.9, 0.8), (0.9, 0.6), (0.9, 0.7)]):
        validation = ValidationMetrics(base=base, shared=shared, improved=None if base is None else 1 - shared / base)
        record = Round(number=number, train=None, validation=validation, wall_seconds=1.0)
        state = state.after(record, init_adapter(SITES, 3, seed=number))
    assert state.best_round == 3
    assert totals.validation_losses(state) == {"base": 0.9, "shared": 0.6}
    old = [replace(done, validation=replace(done.validation, improved=None)) for done in state.history]
    scores = [done.validation.score for done in state.history[1:]]
    assert [done.validation.score for done in old[1:]] == pytest.approx(scores)


def test_private_run_keeps_last_round():
    assert [state.best_round for state in states(1.0, 0.5, 0.7, private=True)] == [0, 1, 2]


def test_round_numbers_are_consecutive():
    with pytest.raises(ValueError, match="round 2 can't follow round -1"):
        fresh_state().after(round_(2, 0.5), {})
    assert fresh_state().round == -1
    assert fresh_state().best_score is None


def test_keeps_two_newest_with_best_adapter(tmp_path):
    for state in states(1.0, 0.1, 0.7, 0.6):
        checkpoint.save(tmp_path, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000002", "round-000003"]
    loaded = checkpoint.load(tmp_path, sites=SITES)
    assert loaded.best_round == 1
    assert torch.equal(loaded.best_adapter["x"].a, init_adapter(SITES, 3, seed=1)["x"].a)


def test_other_run_is_not_overwritten(tmp_path):
    first, second = states(1.0, 0.5)
    checkpoint.save(tmp_path, second)
    for state in (first, second):
        with pytest.raises(AntherError, match="contains round-000001 already: resume"):
            checkpoint.save(tmp_path, state)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "longer"])
def test_damage_is_reported_with_a_fix(tmp_path, name, damage):
    first, second = states(1.0, 0.5)
    checkpoint.save(tmp_path, first)
    file = checkpoint.save(tmp_path, second) / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        file.write_bytes({"empty": b"", "cut": data[:-1], "flipped": flipped, "longer": data + b"x"}[damage])
    with pytest.raises(AntherError) as caught:
        checkpoint.load(tmp_path, sites=SITES)
    message = str(caught.value)
    assert "\n" not in message
    assert "round-000001" in message
    assert "go back to round-000000" in message
    shutil.rmtree(file.parent)
    assert equal(checkpoint.load(tmp_path, sites=SITES), first)


def test_edited_json_is_refused(tmp_path):
    file = checkpoint.save(tmp_path, states(1.0)[0]) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    with pytest.raises(AntherError, match=r"state\.json was changed after it was written .*go back to the start"):
        checkpoint.load(tmp_path, sites=SITES)


def test_checkpoint_of_earlier_release(tmp_path):
    """An earlier release stores no gains on the same devices and only one ε: the means replace the gains, and the best
    round stays the same."""
    (*_, state) = states(None, 0.5, 0.7)
    spent = Guarantee(1.5, 1e-5)
    central = CentralDPMetrics(
        guarantee=spent, clip=1.0, next_clip=1.0, deviation=1.0, snr=1.0, dropped=0, release=True
    )
    last = replace(state.history[2], train=replace(state.history[2].train, guarantees=(spent,), central=central))
    state = replace(state, history=(*state.history[:2], last))
    folder = checkpoint.save(tmp_path, state)
    written = json.loads((folder / "state.json").read_text())
    for done in written["history"]:
        del done["validation"]["improved"]
    train = written["history"][2]["train"]
    for guarantee in (train["guarantees"][0], train["central"]["guarantee"]):
        del guarantee["strict"], guarantee["seen"]
    data = json.dumps(written).encode()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256(data).hexdigest()
    (folder / "state.json").write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    loaded = checkpoint.load(tmp_path, sites=SITES)
    assert (loaded.best_round, loaded.best_score) == (1, 0.5)
    assert loaded.history == state.history
    assert loaded.after(round_(3, 0.6), loaded.adapter).best_round == 1
    assert loaded.after(round_(3, 0.4), loaded.adapter).best_round == 3


def test_other_sites_are_refused(tmp_path):
    checkpoint.save(tmp_path, states(1.0)[0])
    with pytest.raises(AntherError, match=r"adapter\.safetensors does not fit this base"):
        checkpoint.load(tmp_path, sites={"z": Site(2, 2)})


class _Killed(BaseException):
    pass


def test_kill_at_any_step_keeps_last_round(tmp_path, monkeypatch):
    """Die at the k-th call that changes the disk, for every k; the remaining files must load."""
    first, second, third = states(1.0, 0.5, 0.4)
    loaded_rounds = set()
    for die_at in range(1, 200):
        folder = tmp_path / str(die_at)
        checkpoint.save(folder, first)
        checkpoint.save(folder, second)
        calls = 0

        def killing(function, die_at=die_at):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == die_at:
                    raise _Killed
                return function(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "open"):
                patch.setattr(os, name, killing(getattr(os, name)))
            try:
                checkpoint.save(folder, third)
            except _Killed:
                pass
            else:
                break
        loaded = checkpoint.load(folder, sites=SITES)
        assert equal(loaded, second) or equal(loaded, third)
        loaded_rounds.add(loaded.round)
        if loaded.round == 1:
            checkpoint.save(folder, third)  # the next process continues
            assert equal(checkpoint.load(folder, sites=SITES), third)
    assert loaded_rounds == {1, 2}
    assert die_at > 20
