"""A server refuses keys that only a simulation uses, and opens runs that were stored with them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from common.errors import AntherError
from conf.components import as_settings
from conf.compose import compose, compose_federation, compose_stored_federation
from conf.explain import known_keys
from conf.schemas.federation import FederationConfig
from conf.schemas.server import ServeConfig
from conf.schemas.simulation import SimulationConfig
from conf.simulation_keys import federation_words, refusal
from server.supervisor.run import main as serve
from server.supervisor.run import run_overrides
from server.supervisor.run_dirs import newest_run, run_folder

REFUSED = {
    "data.writers=1": "data.writers: only a simulation uses it, not a server; set data.devices, the number of devices",
    "data.test=3": "data.test: only a simulation uses it, not a server; leave it out",
    "data=folder": "data: only a simulation uses it, not a server; leave it out",
    "fleet=phones": "fleet: only a simulation uses it, not a server; leave it out",
    "fleet.profiles[0].count=3": "fleet.profiles[0].count: only a simulation uses it, not a server; leave it out",
    "+trainer.memory_gib=1": "trainer.memory_gib: only a simulation uses it, not a server; leave it out",
    "grid=serial": "grid: only a simulation uses it, not a server; leave it out",
    "evaluation.gallery_size=0": "evaluation.gallery_size: only a simulation uses it, not a server; leave it out",
    "preset=metered": "preset=metered: sets fleet, which only a simulation uses; set its other keys one by one",
    "preset=quick": "preset=quick: sets data.writers, data.test, evaluation.gallery_size, which only a simulation "
    "uses; set its other keys one by one",
}


@pytest.mark.parametrize("word", REFUSED)
def test_key_of_simulations_is_refused(word: str) -> None:
    with pytest.raises(AntherError) as refused:
        compose_federation(f"rounds=3 {shlex.quote(word)}")
    assert str(refused.value) == REFUSED[word]


def test_keys_of_a_federation_are_accepted() -> None:
    words = "preset=private tracker=none data.devices=7 data.train=30 evaluation.timesteps=2 resume=true"
    assert all(refusal(word) is None for word in [*words.split(), "server.port=1", "nonsense=1", "preset=../x"])
    config = compose_federation(words)
    assert (type(config), config.data.count(), config.data.train, config.rounds) == (FederationConfig, 7, 30, 25)
    assert (config.evaluation.timesteps, config.tracker.tensorboard, config.resume) == (2, False, True)


def test_every_key_of_a_federation_is_one_of_simulations() -> None:
    simulation, server = (set(known_keys(schema)) for schema in (SimulationConfig, ServeConfig))
    own = {key for key in server if key.split(".")[0] == "server"}
    assert set(known_keys(FederationConfig)) == server - own <= simulation


@pytest.mark.integration
def test_federation_has_defaults_of_simulations() -> None:
    """Apart from the number of devices, which a simulation derives from its writers: 20 too."""
    simulation, federation = (as_settings(config) for config in (compose(""), compose_federation("")))
    assert compose("").data.count() == federation["data"].pop("devices") == 20
    for key, value in federation.items():
        if isinstance(value, dict):
            assert {name: simulation[key][name] for name in value} == value, key
        else:
            assert simulation[key] == value, key


STORED = {
    "rounds=2 data.writers=1 data.devices=100": 100,
    "rounds=2 data.writers=30": 30,
    "rounds=2 data.writers=30 data.devices=3 evaluation.gallery_size=0 grid=serial fleet=phones": 3,
    "rounds=2 preset=quick data.devices=3": 3,
    "rounds=2 preset=metered cohort.size=2 data.writers=1 data.devices=40": 40,
    "rounds=2 data.devices=9": 9,
}
"""Words that servers stored, and their number of devices."""


@pytest.mark.parametrize("words", STORED)
def test_stored_words_open(words: str, tmp_path: Path) -> None:
    config = compose_stored_federation(words)
    assert (type(config), config.rounds, config.data.count()) == (FederationConfig, 2, STORED[words])
    folder = run_folder(words, tmp_path)
    (folder / "words").write_text("".join(f"{word}\n" for word in words.split()))  # as that version did
    present = " ".join(federation_words(words.split()))
    assert newest_run(words, tmp_path) == newest_run(present, tmp_path) == folder
    assert newest_run(f"{present} seed=1", tmp_path) is None


def test_wrong_stored_words_are_refused() -> None:
    with pytest.raises(AntherError, match=r"^zzz: no such key"):
        compose_stored_federation("zzz=1")


@pytest.mark.integration
def test_devices_are_limited_by_their_number() -> None:
    with pytest.raises(AntherError, match=r"^cohort\.size=8: there are only 7 devices"):
        compose_federation("data.devices=7 cohort.size=8")
    for wrong in ("0", "null"):
        with pytest.raises(AntherError, match=r"^data\.devices=\w+: must be 1 or more"):
            compose_federation(f"data.devices={wrong}")


def test_command_refuses_key_of_simulations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anther serve", "rounds=3", "fleet=phones"])
    with pytest.raises(SystemExit) as stopped:
        serve()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {REFUSED['fleet=phones']}\n"


def test_command_prints_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["anther serve", "preset=private", "server.max_devices=9", "--cfg", "job"])
    serve()
    composed: Any = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out), resolve=True)
    assert composed.pop("server")["max_devices"] == composed["data"]["devices"] == 9
    assert composed["adapter"]["sites"] == "attention"
    composed["adapter"]["sites"] = None  # as configurations are stored
    assert composed == as_settings(compose_federation("preset=private data.devices=9"))
    assert run_overrides(["preset=private"], 9) == ["preset=private", "data.devices=9"]
    assert run_overrides(["data.devices=3"], 9) == ["data.devices=3"]
