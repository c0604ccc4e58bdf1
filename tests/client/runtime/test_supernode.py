"""A device's SuperNode: handling of bundles and tasks before the ClientApp."""

import io
import stat
import sys
import zipfile
from pathlib import Path

import flwr.supernode.runtime.run_clientapp as clientapp
import flwr.supernode.start_client_internal as flower_supernode
import pytest
from flwr.common.config import get_fused_config_from_fab
from flwr.supercore.run import Run

from client.runtime import supernode
from client.runtime.client_app import app


def bundle(megabytes):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed, packed.open("pyproject.toml", "w") as content:
        content.write(b"[tool.flwr.app.config]\nx=1\n#")
        content.write(b"a" * (megabytes << 20))
    return file.getvalue()


def test_bundles_are_not_unpacked(monkeypatch):
    """Flower's function would unpack the bundle; the replacement never reads it."""
    monkeypatch.setattr(
        flower_supernode, "get_fused_config_from_fab", get_fused_config_from_fab
    )  # restored after the test
    small = bundle(0)
    with pytest.raises(Exception):  # noqa: B017, PT011 - it reached the bundle's contents
        flower_supernode.get_fused_config_from_fab(small[:-40], Run.create_empty(1))
    supernode._skip_bundles()
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("opened"))
    assert flower_supernode.get_fused_config_from_fab(small, Run.create_empty(1)) == {}
    assert flower_supernode.get_fused_config_from_fab(b"no bundle", Run.create_empty(1)) == {}


def test_clientapp_is_the_devices_own(monkeypatch):
    """Flower's procedure, with the patched names, installs and imports nothing from a bundle."""
    names = ("pull_task_input", "install_from_fab", "get_project_dir", "get_load_client_app_fn")
    flowers = clientapp.run_clientapp.__code__.co_names
    for name in names:
        assert name in flowers
        monkeypatch.setattr(clientapp, name, getattr(clientapp, name))  # restored after the test
    called = {}

    def procedure(**named):
        load = clientapp.get_load_client_app_fn(default_app_ref="evil:app", app_path="/x", multi_app=True)
        called.update(
            named,
            pulled=clientapp.pull_task_input("client"),
            installed=clientapp.install_from_fab(bundle(0), None),
            app=load("evil", "1"),
        )

    monkeypatch.setattr(clientapp, "run_clientapp", procedure)
    supernode.answer_task("127.0.0.1:1", supernode._Task("token", ("pulled input",)))
    assert called["app"] is app
    assert (called["pulled"], called["installed"], called["token"]) == (("pulled input",), None, "token")


def test_tasks_need_a_fresh_secret(tmp_path, monkeypatch):
    """Flower's SuperNode gets it in a private file, and each start has a new one."""
    started = []
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(supernode.os, "fork", lambda: 0)  # continues as the SuperNode's process
    monkeypatch.setattr(supernode.os, "_exit", lambda _: sys.exit())
    for name in ("end_with_parent", "_patch_polling", "_skip_bundles", "_deactivate_first"):
        monkeypatch.setattr(supernode, name, lambda *_: None)
    monkeypatch.setattr(supernode, "flower_supernode", lambda: started.append(list(sys.argv)))
    secrets = set()
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["client.runtime.supernode", "127.0.0.1:9094", "--", "--insecure"])
        with pytest.raises(SystemExit):
            supernode.main()
        words = started[-1]
        file = Path(words[words.index("--superexec-auth-secret-file") + 1])
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        secrets.add(file.read_bytes())
    assert [len(secret) for secret in secrets] == [32, 32]
