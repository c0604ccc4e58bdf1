"""The public API: every name is available, and importing the package is cheap."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import anther

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
def test_import_is_lazy() -> None:
    code = "import sys, anther; print(sorted({'torch', 'hydra', 'flwr', 'diffusers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", anther.__all__)
def test_name_is_what_its_module_defines(name: str) -> None:
    tree = ast.parse(inspect.getsource(anther))
    imports = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    module, original = imports[name]
    assert anther._SOURCES[name] in (module, f"{module}:{original}")
    assert getattr(anther, name) is getattr(sys.modules[str(module)], original)
    assert name in dir(anther)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        anther.nothing  # noqa: B018


def test_simulation_from_python(tmp_path: Path) -> None:
    with pytest.raises(anther.AntherError, match=r"^strategy=fedit: renamed to aggregation=fedit$"):
        anther.simulate("strategy=fedit", tmp_path / "run")
    assert not (tmp_path / "run").exists()
