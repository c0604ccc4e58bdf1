"""Tests that mutants are caught by the tests that they name, and that survivors are reported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.privacy.audit_mutants import AUDIT_MUTANTS
from bench.privacy.mutants import DEVICE_MUTANTS, EXAMPLE_MUTANTS, Mutant
from bench.privacy.mutations import PASSED, ROOT, TIERS, apply_mutant, copy_source, judge, run_tests, select_mutants
from common.errors import AntherError

EVERY = select_mutants()
REQUIRED = {  # broken guarantee -> mutants that must exist for it
    "noise off": {"noise off"},
    "noise × 0.25": {"noise × 0.25"},
    "clip off": {"clip off"},
    "realized batch size as divisor": {
        "realized batch size as divisor",
        "number of replies as divisor",
    },
    "shuffle accounted as Poisson": {"shuffle accounted as Poisson", "sample of fixed size accounted as Poisson"},
    "noise multiplicity counted as K examples": {"noise multiplicity counted as K examples"},
    "noise redrawn on a resend": {"noise redrawn on a resend", "retrained on a resend", "round released twice"},
    "weights not uniform": {"weights by work", "weights by order of arrival"},
    "dropped client refunded": {"dropped device refunded", "aborted round refunded"},
    "personal adapter in the private forward pass": {"personal adapter in the private forward pass"},
    "simulated noise without a declared test": {
        "simulated noise on a real device",
        "simulated noise on a real server",
    },
    "simulated noise recorded as a release": {"simulated noise recorded as a release"},
    "noise slightly too low": {"noise 3 % low", "round noise 3 % low"},
    "noise that repeats": {"noise that repeats every 65,536 numbers", "cosines in both halves of the noise"},
    "another source of noise": {"secure noise from NumPy's generator", "float16 noise", "float32 noise"},
    "reported before noise": {"signal-to-noise ratio before noise", "diagnostic before noise"},
    "sums and batches": {"sums not reset", "no noise on empty batches", "batches never empty"},
}


COLLECT = """
import json, sys
import pytest

class Marks:
    def pytest_collection_finish(self, session):
        self.of = {item.nodeid: [mark.name for mark in item.iter_markers()] for item in session.items}

marks = Marks()
pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[marks])
print(json.dumps(marks.of))
"""


@pytest.fixture(scope="module")
def copied() -> Iterator[Path]:
    with copy_source() as root:
        yield root


def test_required_mutants_exist() -> None:
    names = {mutant.name for _, mutant in EVERY}
    assert set().union(*REQUIRED.values()) <= names
    for shared in ("noise off", "noise × 0.25", "clip off"):
        assert {level for level, mutant in EVERY if mutant.name == shared} == {"image", "device"}
    assert len(EVERY) == len({(level, mutant.name) for level, mutant in EVERY}) >= 20


@pytest.mark.parametrize("mutant", [*EXAMPLE_MUTANTS, *DEVICE_MUTANTS, *AUDIT_MUTANTS], ids=lambda mutant: mutant.name)
def test_mutant_fits_the_source_and_names_a_test(mutant: Mutant) -> None:
    assert mutant.new != mutant.old
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    file, *_, name = mutant.test.split("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.integration
def test_named_tests_are_in_their_tiers() -> None:
    command = [sys.executable, "-c", COLLECT, *sorted({mutant.test for _, mutant in EVERY})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    marks = json.loads(done.stdout.splitlines()[-1])
    tiers = {test: [tier for tier in TIERS if tier in names][-1] for test, names in marks.items()}  # the longest counts
    for _, mutant in EVERY:
        cases = {tier for test, tier in tiers.items() if mutant.test in (test, test.partition("[")[0])}
        assert cases == {mutant.tier}, f"{mutant.name}: {mutant.test}"


def test_mutants_are_selected_by_tier() -> None:
    by_tier = [select_mutants(tier=tier) for tier in TIERS]
    assert sorted(mutant for mutants in by_tier for mutant in mutants) == sorted(EVERY)
    assert all(mutant.tier == "unit" for _, mutant in by_tier[0])


@pytest.mark.integration
def test_sample_mutant_is_caught(copied: Path) -> None:
    ((level, mutant),) = select_mutants("weights by order of arrival")
    verdict = judge(level, mutant, copied)
    assert verdict.caught, verdict.message


@pytest.mark.stress
def test_all_mutants_are_caught(copied: Path) -> None:
    verdicts = [judge(level, mutant, copied) for level, mutant in EVERY]
    assert [verdict.mutant.name for verdict in verdicts if not verdict.caught] == []


@pytest.mark.stress
def test_survivors_and_broken_tests_are_not_caught(copied: Path) -> None:
    _, mutant = select_mutants("noise redrawn on a resend")[0]
    assert run_tests(copied, [mutant.test])[0] == PASSED
    assert not judge("image", mutant._replace(new=f"{mutant.old} "), copied).caught  # changes nothing
    assert not judge("image", mutant._replace(new="if ("), copied).caught  # no test runs
    assert not judge("image", mutant._replace(tier="stress"), copied).caught  # the test is in another tier
    assert not judge("image", mutant._replace(test="tests/privacy/ledger/test_ledger.py::test_missing"), copied).caught


def test_misfit_mutant_raises_and_source_is_restored(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\nx = 1\n")
    for old in ("x = 1", "y"):
        with pytest.raises(AntherError, match=r"a\.py.* times: update"), apply_mutant(mutant(old), tmp_path):
            pass
    with apply_mutant(mutant("x = 1\nx"), tmp_path):
        assert file.read_text() == "new = 1\n"
    assert file.read_text() == "x = 1\nx = 1\n"


def mutant(old: str) -> Mutant:
    return Mutant("m", "a.py", old, "new", "tests/none.py::test_none")
