"""Statistics of `anther bench people`: gains, ratios and curves with 95 % intervals.

A gain is L_base − L_arm on a person's held-out letters. Every ratio divides mean gains over the same people, which are
resampled together (`bench.lib.paired`); a person's losses are averaged over seeds first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.lib.paired import RESAMPLES, Estimate, first_reached, mean, ratio
from common.errors import AntherError

Federation = Mapping[str, Any]  # result of `people_work.run_federation`
Local = Mapping[str, Any]  # a record of `people_work.run_local`
Block = dict[str, Any]

SAME_BASE = 0.01  # relative difference of the base's loss between two programs with other pass sizes


def losses(runs: Iterable[Federation], names: Sequence[str], arm: str) -> np.ndarray:
    """Return the losses [people] of an arm, averaged over runs with other seeds.

    Args:
        runs: federations with all of these people.
        names: names of the people.
        arm: name of the arm.
    """
    return np.mean([[run["people"][name][arm] for name in names] for run in runs], axis=0)


def local_losses(records: Iterable[Local], names: Sequence[str], kind: str) -> np.ndarray:
    """Return the losses of training without others, averaged over seeds.

    Args:
        records: records of one setting, with other seeds.
        names: names of the people.
        kind: `base`, `tuned`, `oracle` [people], or `curve` [people, steps].
    """
    found = []
    for record in records:
        rows = [record["people"].index(name) for name in names]
        curve = np.array(record["curve"])[rows]
        values = {"base": curve[:, 0], "curve": curve, "oracle": curve.min(axis=1)}
        found.append(np.array(record["stopped"])[rows] if kind == "tuned" else values[kind])
    return np.mean(found, axis=0)


def gains(base: np.ndarray, arm: np.ndarray) -> Block:
    """Return mean loss and gain of an arm, and the gain relative to the base's loss, with intervals."""
    return {"loss": mean(arm), "gain": mean(base - arm), "relative_gain": ratio(base - arm, base)}


def members_block(runs: Sequence[Federation], local: Sequence[Local]) -> Block:
    """Compare people in a federation with their training without others.

    Args:
        runs: federations, one for each seed.
        local: training of the same people without others, one record for each seed.

    Raises:
        AntherError: the base's losses differ, so that gains can't be compared.
    """
    names = measured(runs[0])
    base, base_of_local = losses(runs, names, "base"), local_losses(local, names, "base")
    if (difference := float(np.abs(base / base_of_local - 1).max())) > SAME_BASE:
        raise AntherError(
            f"losses of the base differ by {difference:.1%} between federation and local training: give overrides of "
            "data, base and evaluation to every run, directly after FILE"
        )
    arms = {arm: losses(runs, names, arm) for arm in ("shared", "personal")}
    arms |= {"local": local_losses(local, names, "tuned"), "local, best step": local_losses(local, names, "oracle")}
    gain = {arm: base - values for arm, values in arms.items()}
    by_seed = [
        float((losses([run], names, "base") - losses([run], names, "personal")).mean())
        / float((local_losses([record], names, "base") - local_losses([record], names, "tuned")).mean())
        for run, record in zip(runs, local, strict=False)
    ]
    return {
        "people": len(names),
        "members": runs[0]["summary"]["clients"],
        "base": mean(base),
        "arms": {arm: gains(base, values) for arm, values in arms.items()},
        "ratio": ratio(gain["personal"], gain["local"]),
        "ratio_by_seed": by_seed,
        "oracle_ratio": ratio(gain["personal"], gain["local, best step"]),
        "better": mean((gain["personal"] > gain["local"]).astype(float)),
        "losses": {"base": base.tolist(), **{arm: values.tolist() for arm, values in arms.items()}},
        "better_than_oracle": mean((gain["personal"] > gain["local, best step"]).astype(float)),
    }


def joined_block(joined: Mapping[str, Federation], members: Federation) -> Block:
    """Compare people who joined after the rounds with themselves as members.

    Args:
        joined: federations without some people, who joined afterwards, by group.
        members: the federation of everyone with the same seed.
    """
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    for group, run in joined.items():
        gained: tuple[list[float], list[float]] = ([], [])
        for name in measured(run, newcomers=True):
            for values, row in zip(gained, (run["people"][name], members["people"][name]), strict=True):
                values.append(row["base"] - row["personal"])
        pairs[group] = gained
    everyone = [np.concatenate([np.array(pair[which]) for pair in pairs.values()]) for which in (0, 1)]
    groups = {
        group: {"people": len(new), "share": ratio(np.array(new), np.array(old))} for group, (new, old) in pairs.items()
    }
    return {"people": len(everyone[0]), "share": ratio(*everyone), "groups": groups}


def steps_of_newcomers(joined: Mapping[str, Federation], local: Local, steps: int) -> Block:
    """Return the steps of people who join after the rounds, relative to those of the best local loss.

    Args:
        joined: federations without some people, who joined afterwards.
        local: training of the same people without others.
        steps: optimizer steps of a device after the rounds.

    Returns:
        The fraction; None if their mean loss is higher than the lowest mean of the local curve.
    """
    pairs = [(run, name) for run in joined.values() for name in measured(run, newcomers=True)]
    loss = np.mean([run["people"][name]["personal"] for run, name in pairs])
    curve = local_losses([local], [name for _, name in pairs], "curve").mean(0)
    best = int(curve.argmin())
    return {"fraction": steps / local["steps"][best] if best and loss <= curve[best] else None}


def private_block(runs: Mapping[str, Sequence[Federation]]) -> Block:
    """Compare the shared gain of private federations with that of the reference.

    Args:
        runs: federations by form, one for each seed; `reference` is the tuned open one.
    """
    names = measured(runs["reference"][0])
    reference = losses(runs["reference"], names, "base") - losses(runs["reference"], names, "shared")
    block = {}
    for form, federations in runs.items():
        gain = losses(federations, names, "base") - losses(federations, names, "shared")
        summary = federations[0]["summary"]
        epsilon = summary.get("device_epsilon") or summary.get("epsilon")
        block[form] = {"share": ratio(gain, reference), "epsilon": epsilon, "rounds": summary["rounds"]}
    return block


def steps_block(runs: Mapping[float, Federation], local: Local) -> Block:
    """Compare curves over a device's optimizer steps, and find when a federation reaches the best local loss.

    Args:
        runs: federations by total steps of a device.
        local: training of the same people without others.
    """
    names = measured(next(iter(runs.values())))
    steps = sorted(runs)
    federated = np.stack([losses([runs[step]], names, "personal") for step in steps], axis=1)
    curve, base = local_losses([local], names, "curve"), local_losses([local], names, "base")
    return {
        "fraction": steps_fraction(local["steps"], curve, steps, federated),
        "federation": {str(step): gains(base, federated[:, index]) for index, step in enumerate(steps)},
        "local": {str(step): gains(base, curve[:, index]) for index, step in enumerate(local["steps"])},
    }


def steps_fraction(
    local_steps: Sequence[float], local: np.ndarray, steps: Sequence[float], federated: np.ndarray
) -> Estimate | None:
    """Return at which fraction of the local steps a federation reaches the best local loss.

    Losses are means over people; the local steps are those of its lowest mean loss.

    Args:
        local_steps: points of the local curve.
        local: its losses [people, points].
        steps: points of the federation's curve.
        federated: its losses [people, points].

    Returns:
        The fraction with its interval, whose upper end is infinite if some resamples don't reach the loss; None if the
        federation doesn't reach it.
    """

    def fraction(rows: np.ndarray) -> float:
        mean_local, mean_federated = local[rows].mean(0), federated[rows].mean(0)
        best = int(mean_local.argmin())
        reached = first_reached(steps, list(mean_federated), float(mean_local[best]))
        return float("inf") if reached is None or best == 0 else reached / local_steps[best]

    value = fraction(np.arange(len(local)))
    draws = np.random.default_rng(0).integers(len(local), size=(RESAMPLES // 10, len(local)))
    low, high = np.percentile([fraction(rows) for rows in draws], [2.5, 97.5], method="nearest")
    return Estimate(value, float(low), float(high)) if np.isfinite(value) else None


def curve_block(runs: Mapping[int, Sequence[Federation]], names: Sequence[str] | None = None) -> Block:
    """Return the personal gain by number of letters or people.

    Args:
        runs: federations by number; the measured people of one number are in different federations.
        names: people to measure; None: all.
    """
    block = {}
    for number, federations in runs.items():
        rows = {
            name: run["people"][name] for run in federations for name in names or measured(run) if name in run["people"]
        }
        base, arm = (np.array([row[key] for row in rows.values()]) for key in ("base", "personal"))
        block[str(number)] = {"people": len(rows), **gains(base, arm)}
    return block


def local_curve_block(records: Mapping[int, Local], names: Sequence[str]) -> Block:
    """Return the gain of training without others by number of letters.

    Args:
        records: training by number of letters.
        names: the people.
    """
    block = {}
    for number, record in records.items():
        base = local_losses([record], names, "base")
        block[str(number)] = {
            **gains(base, local_losses([record], names, "tuned")),
            "best step": gains(base, local_losses([record], names, "oracle")),
        }
    return block


CHANCE = 0.5
"""Style match of letters in no one's style."""


def pictures_block(drawings: Sequence[Mapping[str, Any]]) -> Block:
    """Return read rates and style matches by judge and arm; drawings of all seeds count alike.

    Args:
        drawings: results of `people_pictures.draw`, one for each seed.
    """
    block: Block = {}
    for judge in drawings[0]:
        values = {
            score: {arm: np.mean([seed[judge][score][arm] for seed in drawings], axis=0) for arm in arms}
            for score, arms in drawings[0][judge].items()
        }
        block[judge] = {score: {arm: mean(scores) for arm, scores in arms.items()} for score, arms in values.items()}
        block[judge]["read_ratio"] = ratio(values["read"]["personal"], values["read"]["real"])
        block[judge]["style_share"] = ratio(values["style"]["personal"] - CHANCE, values["style"]["real"] - CHANCE)
        block[judge]["read_difference"] = mean(values["read"]["personal"] - values["read"]["real"])
    return block


def measured(run: Federation, *, newcomers: bool = False) -> list[str]:
    """Return the names of a run's measured members, or of its newcomers."""
    return [name for name, row in run["people"].items() if bool(row["newcomer"]) == newcomers]
