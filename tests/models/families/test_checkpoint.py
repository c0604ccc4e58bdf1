"""Recognition of pipeline folders."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import AntherError
from common.plugins import allow_installed_plugins, allow_plugins
from models.base.base import Base
from models.families.checkpoint import recognize
from models.families.family import FAMILIES
from tests.helpers.packages import install
from tests.models.conftest import TinyPipeline


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_recognize(tiny: TinyPipeline) -> None:
    checkpoint = recognize(tiny.folder)
    assert checkpoint.family is tiny.base.family
    assert checkpoint.family.pipeline == json.loads((tiny.folder / "model_index.json").read_text())["_class_name"]
    assert tiny.name.replace("_", "-").startswith(("distilled", checkpoint.family.name.removesuffix("-sigma")))


def test_missing_part_is_named(tiny: TinyPipeline, tmp_path: Path) -> None:
    family = tiny.base.family
    for part in (family.network, "vae", "scheduler", *family.encoders):
        copy = tmp_path / part
        shutil.copytree(tiny.folder, copy, ignore=shutil.ignore_patterns(part))
        with pytest.raises(AntherError, match=f"{part} is missing"):
            recognize(copy)


@pytest.mark.integration
def test_pickled_weights_are_refused(tiny: TinyPipeline, tmp_path: Path) -> None:
    for part in (tiny.base.family.network, "vae", "text_encoder"):
        copy = Path(shutil.copytree(tiny.folder, tmp_path / part))
        for weights in (copy / part).glob("*.safetensors"):
            torch.save(load_file(weights), weights.with_suffix(".bin"))
            weights.unlink()
        with pytest.raises(AntherError) as refusal:
            use(copy, tiny.base.resolution)
        assert "\n" not in str(refusal.value)
        assert part in str(refusal.value)


def test_provenance(folder: Path) -> None:
    unsaid = {"family": "stable-diffusion", "licence": "unknown", "safety_checker": "none"}
    assert recognize(folder).provenance() == unsaid | {"requires_safety_checker": "false"}
    (folder / "LICENSE.md").write_text("terms")
    assert recognize(folder).provenance()["licence"] == "LICENSE.md"
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: creativeml-openrail-m\n---\n# A model\n")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change(folder / "model_index.json", safety_checker=checker, requires_safety_checker=True)
    provenance = recognize(folder).provenance()
    assert provenance["licence"] == "creativeml-openrail-m"
    assert (provenance["safety_checker"], provenance["requires_safety_checker"]) == (checker[1], "true")
    assert Base(folder).provenance == provenance
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: flux-1-dev\n---\n")
    assert recognize(folder).provenance()["licence"] == "flux-1-dev"


def use(folder: Path, resolution: int) -> None:
    """Use every part of a base."""
    base = Base(folder, resolution=resolution)
    base.decode(torch.zeros(1, *base.shape))
    base.encode_captions(["fox"])


FAMILY = """
from dataclasses import replace
from models.families.stable_diffusion import STABLE_DIFFUSION

LAB = replace(STABLE_DIFFUSION, name="lab")
"""


def test_family_of_an_installed_package(
    pipeline_folder: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """A device needs its owner's permission; a server, a simulation or a command doesn't."""
    entry = {"anther.family LabPipeline": "anther_test_family:LAB"}
    install(monkeypatch, tmp_path / "site", module="anther_test_family", source=FAMILY, entry_points=entry)
    change(folder / "model_index.json", _class_name="LabPipeline")
    request.addfinalizer(partial(allow_plugins, ()))
    request.addfinalizer(partial(sys.modules.pop, "anther_test_family", None))
    for names in ((), ("other",)):
        allow_plugins(names)
        with pytest.raises(AntherError, match=r"holds a LabPipeline: only FluxPipeline, .* are supported"):
            recognize(folder)
    assert "anther_test_family" not in sys.modules
    allow_plugins(["LabPipeline"])
    assert Base(folder).provenance["family"] == "lab"
    allow_plugins(())
    allow_installed_plugins()
    base = Base(folder)
    assert base.provenance["family"] == "lab"
    assert torch.equal(base.encode_captions(["a"]), Base(pipeline_folder).encode_captions(["a"]))


class TestCheckpointErrors:
    """Each error is one clear line."""

    def refuse(self, folder: Path, match: str) -> None:
        with pytest.raises(AntherError, match=match) as refusal:
            Base(folder)
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize("name", ["KolorsPipeline", "StableDiffusionInpaintPipeline", None, ["x"]])
    def test_another_pipeline(self, folder: Path, name: object) -> None:
        change(folder / "model_index.json", _class_name=name)
        self.refuse(folder, "only " + ", ".join(FAMILIES))

    @pytest.mark.parametrize("part", ["unet", "vae"])
    def test_another_class_of_a_part(self, folder: Path, part: str) -> None:
        change(folder / "model_index.json", **{part: ["diffusers", "UNet3DConditionModel"]})
        self.refuse(folder, f"{part} is a UNet3DConditionModel")

    def test_invalid_json(self, folder: Path) -> None:
        (folder / "unet" / "config.json").write_text("{")
        self.refuse(folder, r"config.json can't be read")

    @pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"])
    def test_missing_configuration_is_named_once(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        self.refuse(folder, rf"^base {re.escape(str(folder))}: {file} is missing: copy it too$")

    def test_invalid_index(self, folder: Path) -> None:
        (folder / "model_index.json").write_text("[1]")
        self.refuse(folder, "model_index.json")

    def test_invalid_resolution(self, tiny: TinyPipeline) -> None:
        with pytest.raises(AntherError, match="multiple of"):
            Base(tiny.folder, resolution=tiny.base.resolution + 1)
