"""A class of diffusers is imported without its neighbors, and a later import of these works as usual."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from models.files.diffusers_classes import _defer

_EAGER = """
    import sys
    from types import ModuleType
    from models.files.diffusers_classes import diffusers_class

    network = diffusers_class("UNet2DConditionModel")
    vae = diffusers_class("AutoencoderKL", "diffusers.models")
    for name in ("models.transformers.transformer_flux", "models.unets.unet_1d", "models.autoencoders.vq_model"):
        assert f"diffusers.{name}" not in sys.modules, name
    assert "diffusers.hooks.faster_cache" not in sys.modules
    assert "scipy.stats._stats_py" not in sys.modules
    assert vars(sys.modules["transformers.models"])["_deferred_run"] is False

    from diffusers.models.transformers import FluxTransformer2DModel
    assert diffusers_class("FluxTransformer2DModel") is FluxTransformer2DModel
    import diffusers.models.unets, diffusers.models.autoencoders
    assert diffusers.models.unets.UNet2DConditionModel is network
    assert diffusers.models.autoencoders.AutoencoderKL is vae
    from scipy.stats import norm, qmc
    import scipy.stats.distributions
    assert scipy.stats.distributions.norm is norm and norm.cdf(0) == 0.5
    from diffusers.hooks import FasterCacheConfig
    assert FasterCacheConfig.__module__ == "diffusers.hooks.faster_cache"
    import transformers
    encoder = transformers.CLIPTextModel
    import transformers.models
    assert transformers.models.clip.CLIPTextModel is encoder
    assert transformers.models.BertModel is transformers.BertModel
    assert sys.modules["transformers.models"] is transformers.models and "BertModel" in dir(transformers.models)
    for name in ("diffusers.models.transformers", "diffusers.models.unets", "diffusers.hooks", "scipy.stats"):
        assert type(sys.modules[name]) is ModuleType, name
    try:
        diffusers_class("NoSuchNetwork")
    except AttributeError as error:
        assert "NoSuchNetwork" in str(error)
    else:
        raise AssertionError("an unknown name has no class")
"""


@pytest.mark.integration
def test_class_loads_without_neighbors() -> None:
    """In a fresh process, since this one may have imported all of diffusers."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(_EAGER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Package `outer.late`, which counts its runs, with a submodule that needs nothing from it."""
    late = tmp_path / "outer" / "late"
    late.mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").write_text("")
    (late / "__init__.py").write_text(
        "import builtins, time\n"
        "builtins.runs_of_late += 1\n"
        "if builtins.late_is_broken: raise RuntimeError('broken')\n"
        "time.sleep(0.05)\n"
        "from .part import VALUE\n"
        "def __getattr__(name):\n"
        "    if name == 'dynamic': return 7\n"
        "    raise AttributeError(name)\n"
    )
    (late / "part.py").write_text("VALUE = 3\n")
    builtins: Any = importlib.import_module("builtins")
    monkeypatch.setattr(builtins, "runs_of_late", 0, raising=False)
    monkeypatch.setattr(builtins, "late_is_broken", False, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "outer.late"
    for name in [name for name in sys.modules if name.split(".")[0] == "outer"]:
        del sys.modules[name]


def _runs() -> int:
    builtins: Any = importlib.import_module("builtins")
    return int(builtins.runs_of_late)


def test_submodule_does_not_run_package(package: str) -> None:
    _defer(package, submodules=True)
    assert importlib.import_module(f"{package}.part").VALUE == 3
    assert _runs() == 0
    late = importlib.import_module(package)
    assert (late.VALUE, late.dynamic, _runs()) == (3, 7, 1)
    assert type(late) is ModuleType
    with pytest.raises(AttributeError, match="absent"):
        _ = late.absent


def test_submodule_runs_package_first(package: str) -> None:
    _defer(package, submodules=False)
    assert _runs() == 0
    assert importlib.import_module(f"{package}.part").VALUE == 3
    assert _runs() == 1


def test_package_may_replace_itself(package: str, tmp_path: Path) -> None:
    with (tmp_path / "outer" / "late" / "__init__.py").open("a") as code:
        code.write(
            "import sys, types\n"
            "lazy = types.ModuleType(__name__)\n"
            "lazy.__path__, lazy.OTHER = __path__, 5\n"
            "sys.modules[__name__] = lazy\n"
        )
    _defer(package, submodules=True)
    stand_in = sys.modules[package]
    assert [stand_in.OTHER, stand_in.OTHER] == [5, 5]
    assert _runs() == 1
    outer, late = importlib.import_module("outer"), importlib.import_module(package)
    assert late is outer.late is sys.modules[package]
    assert late is not stand_in
    with pytest.raises(AttributeError, match="absent"):
        _ = stand_in.absent


def test_threads_see_complete_package(package: str) -> None:
    _defer(package, submodules=True)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(sys.modules[package].VALUE)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen, _runs()) == ([3, 3, 3, 3], 1)


def test_error_of_package_is_repeated(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.late_is_broken", True)
    _defer(package, submodules=True)
    late = importlib.import_module(package)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            _ = late.VALUE
    monkeypatch.setattr("builtins.late_is_broken", False)
    assert late.VALUE == 3


def test_absent_package_is_skipped() -> None:
    _defer("diffusers.no_such_package", submodules=True)
    _defer("no_such_library.package", submodules=True)
    assert "diffusers.no_such_package" not in sys.modules
