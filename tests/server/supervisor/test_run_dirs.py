"""Folders of runs."""

import pytest

from common.errors import AntherError
from server.supervisor.run_dirs import is_finished, mark_finished, newest_run, run_folder, save_refusal, take_refusal


def test_new_run_has_a_new_name(tmp_path):
    config = "rounds=2 seed=1"
    assert run_folder(config, tmp_path) != run_folder(config, tmp_path)


def test_resume_finds_newest_matching_run(tmp_path):
    for _ in range(2):
        run_folder("rounds=2", tmp_path)
    newest_run = max(tmp_path.iterdir())
    run_folder("rounds=3", tmp_path)
    assert run_folder("rounds=2 resume=true", tmp_path) == newest_run
    with pytest.raises(AntherError, match="contains no run of this configuration"):
        run_folder("rounds=4 resume=true", tmp_path)


def test_mark_finished(tmp_path):
    config = "rounds=2 seed=1"
    assert newest_run(config, tmp_path) is None
    folder = run_folder(config, tmp_path)
    assert newest_run(config, tmp_path) == folder
    assert not is_finished(folder)
    mark_finished(folder)
    assert is_finished(folder)
    assert newest_run("rounds=3", tmp_path) is None


def test_refusal_is_returned_once(tmp_path):
    save_refusal(tmp_path, 7, "fix it")
    assert take_refusal(tmp_path, 8) is None
    assert take_refusal(tmp_path, 7) == "fix it"
    assert take_refusal(tmp_path, 7) is None
