"""A checkpoint, a server's folder and a device's store of the previous version open without loss.

`fixtures/previous_version` was made by commit 0741131, whose configuration keys had other names. Its simulation was
made again, with the same settings, when the glyph base was replaced: the base's folder was copied into that commit,
`python -m models.assets --pin` recorded it, one run was killed after round 2 and one ran to its end.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from client.paths import enrolled_files
from client.store.open import open_store
from common.errors import AntherError
from conf.compose import compose
from conf.schemas.node import compose as compose_node
from models.base.base import load
from privacy.ledger.ledger import DeviceLedger
from server.gateway.device_registry import DeviceRegistry
from server.report.results import write_run_results
from server.rounds import checkpoint
from server.supervisor.run_dirs import newest_run, run_folder
from server.supervisor.server_dir import ServerDir
from simulations import run_dir
from simulations.run import simulate

FIXTURES = Path(__file__).parent / "fixtures" / "previous_version"
SIMULATION = (
    "rounds=4 data.writers=2 data.train=2 data.validation=1 data.test=1 aggregation=fedit "
    "server_optimizer=fedavgm robust=[norm_bound] adapter.shared.lr_schedule=cosine cohort.size=1 "
    "selection=energy_delay trainer.memory_gib=1 adapter.shared.rank=1 adapter.personal.rank=1 "
    "adapter.shared.steps=1 adapter.personal.steps=1 adapter.sites=.*attn2.to_q evaluation.gallery_size=0 "
    "evaluation.timesteps=1 tracker=none seed=3"
)
DRAWING = (  # the previous defaults
    "evaluation.sampler=ddim evaluation.sampling_steps=6 evaluation.guidance_scale=1.5 evaluation.guide_strength=1"
)
SERVER = (
    "rounds=40 cohort.size=2 aggregation=fedit round_loop.timeout=300 compression.download=fp16 privacy=example "
    "privacy.epsilon=8 privacy.delta=1e-3 privacy.noise_multiplicity=2 adapter.shared.rank=1 adapter.shared.steps=1 "
    "adapter.personal.steps=1 adapter.sites=.*attn2.to_q evaluation.timesteps=1 data.writers=1 data.devices=100"
)


def unpack(name: str, folder: Path) -> Path:
    with tarfile.open(FIXTURES / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder / name


def metrics(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.integration
def test_interrupted_simulation_resumes(tmp_path: Path) -> None:
    """It ends as it would have ended without the interruption, in the previous version."""
    folder = unpack("simulation", tmp_path)
    finished = metrics(folder)
    simulate(f"{SIMULATION} {DRAWING} resume=true", folder)
    assert metrics(folder)[:3] == finished
    assert [line["round"] for line in metrics(folder)] == [0, 1, 2, 3, 4]
    adapter = load_file(folder / "checkpoints/round-000004/adapter.safetensors")
    torch.testing.assert_close(adapter, load_file(tmp_path / "expected.safetensors"), rtol=1e-4, atol=1e-6)
    evaluated, expected = (
        json.loads(path.read_text()) for path in (folder / "evaluation.json", tmp_path / "expected.json")
    )
    assert [person["name"] for person in evaluated] == [person["name"] for person in expected]
    for person, wanted in zip(evaluated, expected, strict=True):
        for arm in ("base", "local", "shared", "personal"):
            assert person[arm]["loss"] == pytest.approx(wanted[arm]["loss"], rel=1e-4)


@pytest.mark.integration
def test_simulation_on_another_base_is_refused(tmp_path: Path) -> None:
    """Its adapter has learned on top of that base: averages with updates for another one mean nothing."""
    folder = unpack("simulation", tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["assets"]["base"] = "1bd304185a3f74aa372fbdd010efc6b5373af9ef504282eb385fa2ab198fd41d"
    (folder / "run.json").write_text(json.dumps(record))
    finished = metrics(folder)
    with pytest.raises(AntherError, match=r"was run with another base \(1bd304185a3f.*\): restore it, or start"):
        simulate(f"{SIMULATION} {DRAWING} resume=true", folder)
    assert metrics(folder) == finished
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["round-000001", "round-000002"]


@pytest.mark.integration
def test_simulation_with_other_settings_is_refused(tmp_path: Path) -> None:
    """Defaults that changed since then are named too."""
    folder = unpack("simulation", tmp_path)
    run_dir.check(folder, compose(f"{SIMULATION} {DRAWING} resume=true"))
    with pytest.raises(AntherError, match=r"\(seed was 3, now 4\)"):
        run_dir.check(folder, compose(f"{SIMULATION} {DRAWING} seed=4 resume=true"))
    changed = r"\(evaluation.guidance_scale was 1.5, now 8.0; .*; evaluation.sampler was ddim, now dpm; and 1 more\)"
    with pytest.raises(AntherError, match=changed):
        run_dir.check(folder, compose(f"{SIMULATION} resume=true"))


def test_server_folder_opens(tmp_path: Path) -> None:
    home = unpack("server", tmp_path)
    server = ServerDir(home / "server")
    assert server.address().federation == server.fingerprint()[:16]
    enrolled = {device.name for device in DeviceRegistry(server.folder).snapshot().active_devices().values()}
    assert enrolled == {"owner-0", "owner-1"}
    folder = newest_run(SERVER, home / "runs")
    assert folder is not None
    assert run_folder(f"{SERVER} resume=true", home / "runs") == folder
    state = checkpoint.load(folder / "checkpoints", sites=load("glyphs", sites=".*attn2.to_q").sites)
    assert state is not None
    assert state.round == 3
    assert write_run_results(folder).exists()


def test_device_store_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = unpack("device", tmp_path)
    monkeypatch.setenv("ANTHER_HOME", str(home))
    for file in (home / "node.conf", home / "devices" / "owner-0" / "enrolled"):  # it stays where it was
        file.write_text(file.read_text().replace("@HOME@", str(home)))
    node = compose_node([], home / "node.conf")
    assert (node.name, node.max_rank, node.fetch.source) == ("owner-0", 1, "server")
    assert (node.throttle.require_charging, node.throttle.min_free_mib) == (False, 50.0)
    assert (node.connection.address, node.connection.poll_seconds) == ("127.0.0.1:41865", 0.1)
    with open_store(enrolled_files("owner-0", node.store), federation=node.federation) as opened:
        history = DeviceLedger(opened.storage).history()
        rounds = [entry.reservation.round for entry in history.entries.values()]
        assert (rounds, history.events) == ([1, 2], 6)
        assert history.spent(1e-3).value > 0
