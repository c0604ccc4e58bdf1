"""Assign pseudonyms and roles to people by a hash of their names, so that neither depends on their handwriting."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

MEASURED, FEWEST = 40, 26  # of 62 characters: for development and test, and for the role extra
DEVELOPMENT = 40  # people
SALT = "anther.unipen.1"
"""Changing it changes every role and pseudonym."""


def assign_pseudonyms(people: Iterable[str]) -> dict[str, str]:
    """Number the people of each donor as `donor-NN`, in the order of their hashes."""
    numbers: Counter[str] = Counter()
    result = {}
    for person in sorted(people, key=stable_hash):
        donor = person.split("/")[0]
        numbers[donor] += 1
        result[person] = f"{donor}-{numbers[donor]:02d}"
    return result


def assign_roles(characters: Mapping[str, int]) -> dict[str, str]:
    """Return each person's role, given the number of different characters; none for people with too few.

    The 40 people of the smallest hashes among those with at least 40 characters are development, the others test.
    """
    measured = sorted((person for person, count in characters.items() if count >= MEASURED), key=stable_hash)
    extra = [person for person, count in characters.items() if FEWEST <= count < MEASURED]
    return (
        dict.fromkeys(measured[:DEVELOPMENT], "development")
        | dict.fromkeys(measured[DEVELOPMENT:], "test")
        | dict.fromkeys(extra, "extra")
    )


def stable_hash(person: str) -> bytes:
    return hashlib.sha256(f"{SALT}:{person}".encode()).digest()
