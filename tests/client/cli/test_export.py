"""`anther export` and `anther import`: adapters leave a device and return with equal products."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from client.cli import export as exporting
from client.cli import import_adapter as importing
from client.cli.export import PERSONAL_NOTE
from client.paths import device_files
from client.store.store import IMPORTED, PersonalAdapter, Store
from models.export import adapter_files
from models.export.base_outline import BaseOutline, outline
from models.export.lora_file import read_header
from models.export.reading import read_adapter
from models.lora.adapter import Adapter, Sites, concatenate
from privacy.accounting import Guarantee, NonPrivate
from privacy.ledger.ledger import DeviceLedger
from privacy.storage import FileStorage
from tests.helpers.adapters import random_adapter
from tests.privacy.ledger.test_ledger import FIRST, free, replace


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTHER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("platform.node", lambda: "tablet")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def base(pipeline_folder: Path) -> BaseOutline:
    return outline(str(pipeline_folder))


def sites(base: BaseOutline) -> Sites:
    return {name: site for name, site in base.sites.items() if ".attn1." in name}


def learn(base: BaseOutline, folder: Path | None = None) -> tuple[Adapter, Adapter]:
    """Store a shared and a personal adapter, and return both."""
    shared, personal = random_adapter(sites(base), 2, 1), random_adapter(sites(base), 3, 2)
    files = FileStorage(folder) if folder else device_files("tablet")
    Store(files).save_personal(PersonalAdapter(personal, shared, base.hash, "run:1"))
    return shared, personal


def check(actual: Adapter, expected: Adapter) -> None:
    assert actual.keys() == expected.keys()
    for name, (a, b) in expected.items():
        torch.testing.assert_close(actual[name].b @ actual[name].a, b @ a, rtol=1e-5, atol=1e-5)


def refuse(main: object, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(main)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("what", ["shared", "personal", "both"])
def test_exports_of_a_device(
    what: str, layout: str, base: BaseOutline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, personal = learn(base)
    out = tmp_path / "new" / "a.safetensors"
    options = ["--layout", layout, "--base", str(base.folder), "--trigger", "sks"]
    assert exporting.main([str(out), *options, *([] if what == "shared" else ["--what", what])]) == 0
    printed = capsys.readouterr().out
    expected = {"shared": shared, "personal": personal, "both": concatenate([shared, personal])}[what]
    check(read_adapter(out, base).adapter, expected)
    assert (PERSONAL_NOTE in printed) == (what != "shared")
    metadata = read_header(out)
    assert metadata["anther_base"] == base.hash
    assert metadata["anther_layout"] == layout
    assert metadata["anther_rank"] == metadata["anther_alpha"] == str({"shared": 2, "personal": 3, "both": 5}[what])
    assert metadata["anther_contents"] == exporting.CONTENTS[what]
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["anther_privacy"] == exporting.NOTHING_SHARED
    assert ("anther_personal" in metadata) == (what != "shared")
    assert "anther_ignored_by_sd_scripts" not in metadata  # of the adapted layers


def test_privacy_is_that_of_the_ledger(base: BaseOutline, tmp_path: Path) -> None:
    learn(base)
    ledger = DeviceLedger(device_files("tablet"))
    ledger.reserve(FIRST, free)
    options = ["--base", str(base.folder)]
    assert exporting.main([str(tmp_path / "a.safetensors"), *options]) == 0
    metadata = read_header(tmp_path / "a.safetensors")
    spent = ledger.history().spent(float(metadata["anther_delta"]))
    assert metadata["anther_epsilon"] == f"{spent.value:.6g}"
    assert metadata["anther_privacy_unit"] == "image"
    assert metadata["anther_privacy"].startswith(f"ε={spent.value:.3g} per image (δ=")
    ledger.reserve(replace(FIRST, round=2, mechanism=NonPrivate()), free)
    assert exporting.main([str(tmp_path / "b.safetensors"), *options]) == 0
    metadata = read_header(tmp_path / "b.safetensors")
    assert metadata["anther_epsilon"] == "inf"
    assert metadata["anther_privacy"] == "shared without noise: no privacy guarantee"


def test_exports_of_a_run(base: BaseOutline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = random_adapter(sites(base), 2)
    adapter_files.write(tmp_path / "run/adapters/personal", "ada", adapter, base, "personal")
    epsilon = vars(Guarantee(2.5, 1e-5))
    (tmp_path / "run/summary.json").write_text(json.dumps({"epsilon": epsilon, "device_epsilon": None}))
    file = str(tmp_path / "run/adapters/personal/ada.safetensors")
    out = tmp_path / "b.safetensors"
    options = ["--base", str(base.folder), "--layout", "kohya"]
    assert exporting.main([file, str(out), *options]) == 0
    assert PERSONAL_NOTE in capsys.readouterr().out
    check(read_adapter(out, base).adapter, adapter)
    assert all(name.startswith("lora_unet_") for name in load_file(out))
    assert read_header(out)["anther_privacy"] == "ε=2.5 per image (δ=1e-05, add or remove one)"
    again = tmp_path / "c.safetensors"
    assert exporting.main([str(out), str(again), "--base", str(base.folder)]) == 0
    assert read_header(again)["anther_epsilon"] == "2.5"
    refuse(
        exporting.main, [file, str(tmp_path / "d.safetensors"), *options, "--what", "shared"], "holds personal", capsys
    )
    foreign, other = tmp_path / "foreign.safetensors", str(tmp_path / "d.safetensors")
    save_file({"x": torch.ones(1)}, foreign)
    refuse(exporting.main, [str(foreign), other], "was not written by Anther", capsys)


def test_export_errors(base: BaseOutline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.safetensors")
    refuse(exporting.main, [out], "no store in this folder", capsys)
    Store(device_files("tablet")).save_number("x", "y", 1)
    refuse(exporting.main, [out], "nothing was learned here yet", capsys)
    learn(base)
    refuse(exporting.main, [out], "with --base", capsys)  # no stored base has this hash
    refuse(exporting.main, [out, "--base", "glyphs"], "belongs to another base", capsys)
    refuse(exporting.main, [str(tmp_path / "a.pt")], "must end with .safetensors", capsys)
    Path(out).touch()
    refuse(exporting.main, [out], "already exists", capsys)


def test_import_and_roll_back(base: BaseOutline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared, personal = learn(base)
    foreign = random_adapter(sites(base), 4, 3)
    adapter_files.write(tmp_path, "mine", foreign, base, "personal")
    file = str(tmp_path / "mine.kohya.safetensors")
    assert importing.main([file, "--base", str(base.folder)]) == 0
    printed = capsys.readouterr().out
    assert "on top of the shared adapter" in printed
    assert "anther device roll-back restores it" in printed
    store = Store(device_files("tablet"))
    current = store.personal(sites(base))
    assert current is not None
    check(current.adapter, foreign)
    check(current.shared, shared)
    assert current.request.startswith(IMPORTED)
    store.roll_back()
    before = store.personal(sites(base))
    assert before is not None
    check(before.adapter, personal)


def test_import_into_a_new_store(base: BaseOutline, home: Path, tmp_path: Path) -> None:
    """The default layers of a base, zero where the file has none, in the federation that was joined."""
    home.mkdir()
    (home / "node.conf").write_text("name=tablet\nconnection.address=here:1\nfederation=0123456789abcdef\n")
    some = {name: site for name, site in sites(base).items() if name.endswith("to_q")}
    adapter_files.write(tmp_path, "mine", random_adapter(some, 4), base, "personal")
    assert importing.main([str(tmp_path / "mine.safetensors"), "--base", str(base.folder)]) == 0
    store = Store(device_files("tablet"), "0123456789abcdef")
    stored = store.personal({name: base.sites[name] for name in base.sites if ".attn" in name})
    assert stored is not None
    assert {name for name, factors in stored.adapter.items() if factors.b.any()} == some.keys()
    assert not any(factors.b.any() for factors in stored.shared.values())
    out = tmp_path / "out.safetensors"
    assert exporting.main([str(out), "--what", "personal", "--base", str(base.folder)]) == 0


def test_shared_part_is_not_doubled(base: BaseOutline, tmp_path: Path) -> None:
    shared, personal = learn(base)
    adapter_files.write(tmp_path, "sum", concatenate([shared, personal]), base, "shared+personal")
    assert importing.main([str(tmp_path / "sum.safetensors"), "--base", str(base.folder)]) == 0
    current = Store(device_files("tablet")).personal(sites(base))
    assert current is not None
    check(current.combined, concatenate([shared, personal]))


def test_import_errors(base: BaseOutline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn(base)
    given = ["--base", str(base.folder)]
    zero = {name: factors._replace(b=factors.b * 0) for name, factors in random_adapter(sites(base), 1).items()}
    large = {name: factors._replace(b=factors.b * 1e4) for name, factors in random_adapter(sites(base), 1).items()}
    for name, adapter, message in (("zero", zero, "changes nothing"), ("large", large, "scale it down")):
        adapter_files.write(tmp_path, name, adapter, base, "personal")
        refuse(importing.main, [str(tmp_path / f"{name}.safetensors"), *given], message, capsys)
    (tmp_path / "a.pt").write_bytes(b"PK")
    refuse(importing.main, [str(tmp_path / "a.pt"), *given], "is a pickle", capsys)
    refuse(importing.main, [str(tmp_path / "none.safetensors"), *given], "none.safetensors", capsys)
    assert len(Store(device_files("tablet")).personal_versions()) == 1
