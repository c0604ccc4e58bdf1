"""Which folder a run has."""

import pytest

from conf.compose import compose
from conf.errors import AntherError
from server.runs import run_folder


def test_a_new_run_has_a_name_never_used(tmp_path):
    config = compose("rounds=2")
    assert run_folder(config, tmp_path) != run_folder(config, tmp_path)


def test_resume_finds_the_newest_run_of_the_same_configuration(tmp_path):
    for _ in range(2):
        run_folder(compose("rounds=2"), tmp_path)
    newest = max(tmp_path.iterdir())
    run_folder(compose("rounds=3"), tmp_path)
    assert run_folder(compose("rounds=2 resume=true"), tmp_path) == newest
    with pytest.raises(AntherError, match="holds no run of this configuration"):
        run_folder(compose("rounds=4 resume=true"), tmp_path)
