"""Which folder a run has."""

import pytest

from common.errors import AntherError
from server.supervisor.run_dirs import is_finished, mark_finished, newest_run, run_folder, save_refusal, take_refusal


def test_a_new_run_has_a_name_never_used(tmp_path):
    config = "rounds=2 seed=1"
    assert run_folder(config, tmp_path) != run_folder(config, tmp_path)


def test_resume_finds_the_newest_run_of_the_same_configuration(tmp_path):
    for _ in range(2):
        run_folder("rounds=2", tmp_path)
    newest_run = max(tmp_path.iterdir())
    run_folder("rounds=3", tmp_path)
    assert run_folder("rounds=2 resume=true", tmp_path) == newest_run
    with pytest.raises(AntherError, match="holds no run of this configuration"):
        run_folder("rounds=4 resume=true", tmp_path)


def test_a_run_is_over_once_it_was_said(tmp_path):
    config = "rounds=2 seed=1"
    assert newest_run(config, tmp_path) is None
    folder = run_folder(config, tmp_path)
    assert newest_run(config, tmp_path) == folder
    assert not is_finished(folder)
    mark_finished(folder)
    assert is_finished(folder)
    assert newest_run("rounds=3", tmp_path) is None


def test_a_refusal_is_told_once_and_to_its_own_run(tmp_path):
    save_refusal(tmp_path, 7, "mend it")
    assert take_refusal(tmp_path, 8) is None
    assert take_refusal(tmp_path, 7) == "mend it"
    assert take_refusal(tmp_path, 7) is None
