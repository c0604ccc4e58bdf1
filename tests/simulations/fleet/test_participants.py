"""Participants: writers, folders, profiles, owners' policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import AntherError
from models.base.base import Base
from privacy.accounting import NonPrivate, PoissonGaussian
from privacy.policy import Policy, RequestRefusedError
from privacy.storage import FileStorage
from simulations.fleet.participants import (
    Participant,
    load_pictures,
    newcomers,
    own_pictures_hash,
    owners_policy,
    participants,
    select_evaluated,
)
from simulations.fleet.writers import slug, writers
from strategies.factory.full_plan import training_plan
from strategies.round.private_evaluation import evaluation_mechanisms, evaluation_policy
from tests.helpers.configs import compose
from tests.helpers.people import characters, write
from tests.helpers.simulations import own_pictures
from typefaces.dataset import GLYPHS


def fleet(base: Base, folder: Path, overrides: str) -> list[Participant]:
    return participants(compose(overrides), base, lambda name: FileStorage(folder / name))


def names(base: Base, folder: Path, overrides: str) -> list[str]:
    return [person.name for person in fleet(base, folder, overrides)]


@pytest.mark.integration
def test_owners_allow_exactly_the_runs_guarantee() -> None:
    config = compose("privacy=example privacy.epsilon=4 rounds=3 private_eval.interval=3")
    policy, plan, measured = (
        owners_policy(config),
        training_plan(config, run="r", base="b"),
        evaluation_mechanisms(config),
    )
    private = plan.privacy
    assert private is not None
    policy.check_plan(plan)
    policy.check_evaluation(evaluation_policy(config, simulated=True).local_noise)
    round_ = PoissonGaussian(
        noise_multiplier=private.noise_multiplier, sampling_rate=private.sampling_rate, steps=plan.steps
    )
    policy.check_spending([round_, round_, *measured], round_)
    for request in (
        lambda: policy.check_spending([round_, round_, round_, *measured], round_),
        lambda: policy.check_spending([], NonPrivate()),
        lambda: policy.check_evaluation(None),
        lambda: owners_policy(compose("privacy=example")).check_evaluation(
            evaluation_policy(config, simulated=True).local_noise
        ),
    ):
        with pytest.raises(RequestRefusedError):
            request()
    assert owners_policy(compose("privacy=none")) == owners_policy(compose("privacy=device")) == Policy()


@pytest.mark.integration
def test_folders_replace_writers(base: Base, tmp_path: Path) -> None:
    mine, yours = own_pictures(tmp_path / "mine"), own_pictures(tmp_path / "yours")
    devices = names(base, tmp_path / "fleet", f"data.writers=3 'data.pictures=[{mine}]'")
    assert len(devices) == 3
    assert "mine" in devices
    assert names(base, tmp_path / "fleet", f"data.writers=1 'data.pictures=[{mine},{yours}]'") == ["mine", "yours"]
    assert names(base, tmp_path / "fleet", f"data.writers=0 'data.pictures=[{mine}]'") == ["mine"]


@pytest.mark.integration
def test_profiles_are_assigned_cyclically(base: Base, tmp_path: Path) -> None:
    config = compose("data.writers=7")
    people = fleet(base, tmp_path, "data.writers=7")
    kinds = [profile.name for profile in config.fleet.profiles]
    assert [person.profile for person in people] == [kinds[i % len(kinds)] for i in range(7)]
    assert [person.name for person in people] == sorted(person.name for person in people)
    assert all(person.device.report.base == base.hash for person in people)
    assert not (tmp_path / people[0].name).exists()  # nothing is written before the run is claimed


@pytest.mark.integration
def test_reports_state_rank_and_sites(base: Base, tmp_path: Path) -> None:
    reports = {
        person.profile: person.device.report
        for person in fleet(base, tmp_path, "fleet=ranks_halves data.writers=8 adapter.shared.rank=16")
    }
    assert [reports[f"rank_{rank}"].rank for rank in (2, 4, 8, 16)] == [2, 4, 8, 16]
    assert reports["rank_2"].sites is None
    half = reports["rank_2_half_the_sites"].sites
    assert half is not None
    assert set(half) == {name for name in base.sites if "attn2" in name}
    assert 2 * len(half) == len(base.sites)
    kind = "{name: all, memory_gib: 1, examples_per_second: 1, watts: 1, uplink_mbps: 1, downlink_mbps: 1"
    named = fleet(base, tmp_path, f"data.writers=1 'fleet.profiles=[{kind}, sites: linear}}]'")[0].device.report
    assert named.sites == tuple(base.sites)
    with pytest.raises(AntherError, match=r"fleet.profiles: all: sites=x9: matches no layer of the base"):
        fleet(base, tmp_path, f"data.writers=2 'fleet.profiles=[{kind}, sites: x9}}]'")


def test_splits_are_disjoint_and_of_the_given_size() -> None:
    for writer in writers(compose("data.train=4 data.validation=3 data.test=5").data):
        assert tuple(map(len, writer.pictures)) == (4, 3, 5)
        assert len({picture.caption for split in writer.pictures for picture in split}) == 12


def test_too_many_writers_are_refused() -> None:
    with pytest.raises(AntherError, match="only 20 development writers"):
        writers(compose("data.writers=21").data)


def test_folders_with_equal_names_are_refused(base: Base, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    folders = [own_pictures(tmp_path / parent / "cats") for parent in ("one", "two")]
    with pytest.raises(AntherError, match="two folders are called cats"):
        names(base, tmp_path / "fleet", f"'data.pictures=[{folders[0]},{folders[1]}]'")


@pytest.mark.integration
def test_folder_with_a_writers_name_is_refused(base: Base, tmp_path: Path) -> None:
    folder = own_pictures(tmp_path / writers(compose("").data)[0].name)
    with pytest.raises(AntherError, match="two devices are called"):
        names(base, tmp_path / "fleet", f"data.writers=20 'data.pictures=[{folder}]'")


@pytest.mark.integration
def test_writers_are_assigned_cyclically(base: Base, tmp_path: Path) -> None:
    people = fleet(base, tmp_path, "data.writers=3 data.devices=8 data.train=4")
    firsts = names(base, tmp_path, "data.writers=3")
    assert [person.name for person in people if not person.copy] == firsts
    assert sorted(person.name for person in people) == [person.name for person in people]
    assert len({person.name for person in people}) == 8
    further = [person for person in people if person.copy]
    assert all(person.name.rsplit("-", 1)[1] == f"{person.copy + 1:04d}" for person in further)
    assert sorted(person.copy for person in people) == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.integration
def test_copies_have_other_pictures_and_noise(base: Base, tmp_path: Path) -> None:
    people = {person.name: person for person in fleet(base, tmp_path, "data.writers=1 data.devices=4 data.train=5")}
    (first,) = (name for name, person in people.items() if not person.copy)
    writer = writers(compose("data.train=5").data)[0]
    own = people[first].pictures.train
    assert [picture.caption for picture in own] == [picture.caption for picture in writer.pictures.train]
    held_out = {picture.caption for split in writer.pictures[1:] for picture in split}
    training = []
    for person in people.values():
        for split in ("validation", "test"):
            pairs = zip(getattr(person.pictures, split), getattr(writer.pictures, split), strict=True)
            assert all(np.array_equal(one.pixels, other.pixels) for one, other in pairs)
        captions = [picture.caption for picture in person.pictures.train]
        assert len(set(captions)) == 5
        assert not held_out & set(captions)
        assert captions == [picture.caption for picture in person.device.pictures().train]  # the same at each call
        training.append(frozenset(captions))
    assert len(set(training)) == 4
    noises = [float(person.device.noise(1, "shared").rounded_gaussian(1, 1e9)) for person in people.values()]
    assert len(set(noises)) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("data.devices=19", "data.devices=19: must be data.writers=20 or more"),
        ("data.devices=30 'data.pictures=[x]'", "leave one of them out"),
        ("data.devices=30 cohort.size=31", "cohort.size=31: there are only 30 devices"),
        ("cohort.eval_size=21", "cohort.eval_size=21: there are only 20 devices"),
        ("cohort.eval_size=0", "cohort.eval_size=0"),
        ("evaluation.devices=21", "evaluation.devices=21: there are only 20 devices"),
        ("evaluation.devices=0", "evaluation.devices=0"),
    ],
)
def test_invalid_counts_are_one_line(overrides: str, words: str) -> None:
    with pytest.raises(AntherError, match=words) as raised:
        compose(overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.integration
def test_one_device_of_each_writer_is_evaluated_first(base: Base, tmp_path: Path) -> None:
    people = fleet(base, tmp_path, "data.writers=4 data.devices=12")
    assert select_evaluated(people, None) == [person for person in people if not person.copy]
    few, more = select_evaluated(people, 2), select_evaluated(people, 6)
    assert {person.name for person in few} < {person.name for person in select_evaluated(people, 4)}
    assert select_evaluated(people, 4) == select_evaluated(people, None)
    assert sorted(person.copy for person in more) == [0, 0, 0, 0, 1, 1]
    assert [person.name for person in more] == sorted(person.name for person in more)
    one_each = fleet(base, tmp_path, "data.writers=4")
    assert select_evaluated(one_each, None) == one_each


@pytest.mark.integration
def test_people_of_a_data_set(base: Base, tmp_path: Path) -> None:
    """Newcomers change no device of the rounds; a resumed run needs their pictures too."""
    names, glyphs = ("ann", "bo", "cy", "di"), GLYPHS[:20]
    rows = characters(names[:3], glyphs, role="test") + characters(names[3:], glyphs, role="extra")
    rows[5]["text"] = "a cat"  # of ann
    file = write(tmp_path / "people.parquet", rows)

    def storage(name: str) -> FileStorage:
        return FileStorage(tmp_path / name)

    config = compose(f"data.path={file} data.people=3 data.newcomers=[cy]")
    people = load_pictures(config.data)
    members, joined = participants(config, base, storage, people), newcomers(config, base, storage, people)
    assert [person.name for person in members] == ["ann", "bo", "di"]
    assert [(person.name, person.newcomer, person.role) for person in joined] == [("cy", True, "test")]
    assert [person.has_letters for person in members] == [False, True, True]
    assert not any(person.newcomer for person in members)
    kinds = [profile.name for profile in config.fleet.profiles]
    assert [person.profile for person in members] == kinds[:3]
    assert select_evaluated(members, None, ["test"]) == members[:2]
    assert select_evaluated(members, 1, ["extra"]) == members[2:]
    hashes = {own_pictures_hash(group) for group in (members, joined, [*members, *joined])}
    assert len(hashes) == 3
    with pytest.raises(AntherError, match=r"evaluation\.devices=3: only 2 devices have a role of evaluated_roles"):
        select_evaluated(members, 3, ["test"])


def test_names_are_safe_for_files() -> None:
    assert slug("../My cat! №5") == "my-cat-5"
    assert slug("猫") == "unnamed"


@pytest.mark.integration
def test_label_skew_changes_training_pictures_only() -> None:
    plain, skewed = (writers(compose(f"data.train=3 data.label_skew={skew}").data) for skew in ("false", "true"))
    words = ("digit", "capital", "lowercase")
    for index, (before, after) in enumerate(zip(plain, skewed, strict=True)):
        (kind,) = [word for word in words if words[index % 3] == word]
        available = sum(picture.caption.startswith(kind) for picture in before.pool)
        assert sum(p.caption.startswith(kind) for p in after.pictures.train) == min(3, available)
        held_out = [
            [p.caption for p in writer.pictures.test + writer.pictures.validation] for writer in (before, after)
        ]
        assert held_out[0] == held_out[1]
    with pytest.raises(AntherError, match=r"data\.label_skew"):
        compose("data.devices=40 data.label_skew=true")
