"""What a device's SuperNode does with what a server sends, before a ClientApp has it."""

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


def test_no_bundle_is_unpacked(monkeypatch):
    """Flower's own function reads it; in its place nothing does, however much it unpacks to."""
    monkeypatch.setattr(
        flower_supernode, "get_fused_config_from_fab", get_fused_config_from_fab
    )  # so that it is put back
    small = bundle(0)
    with pytest.raises(Exception):  # noqa: B017, PT011 - it got as far as looking for what a bundle holds
        flower_supernode.get_fused_config_from_fab(small[:-40], Run.create_empty(1))
    supernode._skip_bundles()
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("opened"))
    assert flower_supernode.get_fused_config_from_fab(small, Run.create_empty(1)) == {}
    assert flower_supernode.get_fused_config_from_fab(b"no bundle", Run.create_empty(1)) == {}


def test_the_clientapp_is_the_devices_own(monkeypatch):
    """Flower's own course, by the names that it has there, installs nothing of a bundle and imports nothing of it."""
    names = ("pull_task_input", "install_from_fab", "get_project_dir", "get_load_client_app_fn")
    flowers = clientapp.run_clientapp.__code__.co_names
    for name in names:
        assert name in flowers
        monkeypatch.setattr(clientapp, name, getattr(clientapp, name))  # so that it is put back
    called = {}

    def course(**named):
        load = clientapp.get_load_client_app_fn(default_app_ref="evil:app", app_path="/x", multi_app=True)
        called.update(
            named, pulled=clientapp.pull_task_input("client"), installed=clientapp.install_from_fab(bundle(0), None),
            app=load("evil", "1"),
        )  # fmt: skip

    monkeypatch.setattr(clientapp, "run_clientapp", course)
    supernode.answer_task("127.0.0.1:1", supernode._Task("token", ("what was pulled",)))
    assert called["app"] is app
    assert (called["pulled"], called["installed"], called["token"]) == (("what was pulled",), None, "token")


def test_tasks_are_behind_a_secret_of_this_start(tmp_path, monkeypatch):
    """Flower's SuperNode is started with it, in a file that nobody else can read, and another at each start."""
    started = []
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(supernode.os, "fork", lambda: 0)  # as in the SuperNode's process
    monkeypatch.setattr(supernode.os, "_exit", lambda _: sys.exit())
    for name in ("end_with_parent", "_pace", "_skip_bundles", "_deactivate_first"):
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
