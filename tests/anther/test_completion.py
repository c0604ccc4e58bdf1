"""Shell completion: the scripts name every command and key, and bash completes by them."""

import shutil
import subprocess
import sys

import pytest

from anther import completion
from anther.commands import COMMANDS


@pytest.fixture(scope="module")
def words() -> dict[str, list[str]]:
    return completion.words()


def test_words(words: dict[str, list[str]]) -> None:
    assert {"simulate", "device", "completion"} <= set(words[""])
    assert {"enroll", "run"} <= set(words["device"])
    assert {"rounds=", "privacy.epsilon=", "aggregation=fedit", "preset=private"} <= set(words["simulate"])
    assert "privacy=" not in words["simulate"]
    assert {"server.port=", "rounds="} <= set(words["serve"])
    assert "throttle.min_battery=" in words["device run"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_name_every_command(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["anther completion", shell])
    assert completion.main() == 0
    printed = capsys.readouterr().out
    assert all(part in printed for name in COMMANDS for part in name.split())
    if program := shutil.which(shell):
        checked = subprocess.run([program, "-n"], input=printed, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["anther completion", "csh"])
    assert completion.main() == 2
    assert capsys.readouterr().err == "error: anther completion: needs one of: bash, zsh, fish\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("anther sim", ["simulate"]),
        ("anther device be", ["benchmark"]),
        ("anther simulate privacy.eps", ["privacy.epsilon="]),
        ("anther simulate rounds=3 privacy.device.eps", ["privacy.device.epsilon="]),
        ("anther simulate aggregation=ff", ["ffa"]),  # bash replaces what follows the =
        ("anther device run throttle.min_b", ["throttle.min_battery="]),
        ("anther keys re", ["revoke"]),
        ("anther simulate nothing", []),
    ],
)
def test_bash_completes(line: str, expected: list[str], words: dict[str, list[str]]) -> None:
    script = completion.script("bash", words)
    test = f"{script}\nCOMP_LINE='{line}' COMP_POINT={len(line)} _anther\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", test], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
