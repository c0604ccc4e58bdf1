"""Jobs of every kind together; what one can't do harms no other."""

from __future__ import annotations

import numpy as np

from models.adapter import Factors, initial
from models.base import Base
from training.engine import perform
from training.jobs import Draw, Drawn, Encode, Examples, Picture
from training.memory import budget


def test_a_drawing_that_fails_is_its_own_loss(base: Base) -> None:
    start = initial(base.sites, 2, 0)
    broken = {name: Factors(a[:, 1:], b) for name, (a, b) in start.items()}
    picture = Picture(np.zeros((16, 16), np.uint8), "a")
    jobs = [
        Draw(captions=["a", "b"], adapters=[start], seed=0, steps=2),
        Draw(captions=["a"], adapters=[broken], seed=0, steps=2),
        Encode(pictures=[picture]),
        Draw(captions=["b"], adapters=[], seed=0, steps=2),
    ]
    two, failed, encoded, one = perform(base, jobs, memory=budget(None, base.device), timesteps=1)
    assert isinstance(failed, Exception)
    assert isinstance(encoded, Examples)
    assert isinstance(two, Drawn)
    assert isinstance(one, Drawn)
    assert two.pictures.shape == (2, 16, 16)
    assert np.abs(two.pictures[1].astype(int) - one.pictures[0]).max() <= 1  # B is 0, and each has its own noise
    assert (two.pictures[0] != two.pictures[1]).any()
