"""Roles depend on a hash of the person and the number of characters only; pseudonyms hide names."""

from __future__ import annotations

import hashlib
import re

from typefaces.making.unipen.roles import assign_pseudonyms, assign_roles

PEOPLE = [f"{donor}/name{number}" for donor in ("aga", "tos") for number in range(30)]


def test_roles_by_number_of_characters() -> None:
    counts = {"a/1": 25, "a/2": 26, "a/3": 39, "a/4": 40, "a/5": 62}
    expected = {"a/2": "extra", "a/3": "extra", "a/4": "development", "a/5": "development"}
    assert assign_roles(counts) == expected


def test_forty_people_are_development() -> None:
    roles = assign_roles(dict.fromkeys(PEOPLE, 62))
    assert [list(roles.values()).count(role) for role in ("development", "test")] == [40, 20]
    assert roles == assign_roles(dict.fromkeys(reversed(PEOPLE), 40))
    # About two thirds of each donor: the hash doesn't follow the order of names.
    assert 10 < sum(roles[person] == "development" for person in PEOPLE[:30]) < 30


def test_roles_are_stable() -> None:
    """Fewer people with few characters change no role, and a further one moves at most one person to test."""
    roles = assign_roles(dict.fromkeys(PEOPLE, 62))
    more = assign_roles(dict.fromkeys([*PEOPLE, "new/person"], 62) | {"few/characters": 30})
    changed = [person for person in PEOPLE if roles[person] != more[person]]
    assert len(changed) <= 1
    assert {more[person] for person in changed} <= {"test"}


def test_hash_is_fixed() -> None:
    """Changed roles would move people between development and test."""
    digests = {hashlib.sha256(f"anther.unipen.1:{person}".encode()).hexdigest(): person for person in PEOPLE}
    expected = [digests[digest] for digest in sorted(digests)]
    roles = assign_roles(dict.fromkeys(PEOPLE, 62))
    assert {person for person in PEOPLE if roles[person] == "development"} == set(expected[:40])
    first = next(person for person in expected if person.startswith("aga/"))
    assert assign_pseudonyms(PEOPLE)[first] == "aga-01"


def test_pseudonyms_hide_names() -> None:
    pseudonyms = assign_pseudonyms(PEOPLE)
    assert set(pseudonyms) == set(PEOPLE)
    assert len(set(pseudonyms.values())) == len(PEOPLE)
    assert all(re.fullmatch(rf"{person[:3]}-\d\d", pseudonym) for person, pseudonym in pseudonyms.items())
    assert sorted(PEOPLE[:30], key=pseudonyms.__getitem__) != PEOPLE[:30]
