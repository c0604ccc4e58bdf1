"""Components in stored configurations of earlier versions, in which all components of a group shared typed keys.

A key was null, or had its default, under a component without this option: `server_optimizer.tau` under `fedavgm`, for
example. Null had the meaning of the option's default. The hash of a configuration, from which random numbers derive,
is that of this form (`simulations.run_dir`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from conf.components import GROUPS, ROBUST
from conf.groups import group_options

# All of these are stored, or hashed; don't change.
_OORT = MappingProxyType(
    {
        "alpha": 2.0,
        "exploration": 0.9,
        "exploration_decay": 0.98,
        "min_exploration": 0.3,
        "cutoff": 0.95,
        "clip_quantile": 0.9,
        "duration_quantile": 0.3,
        "pacer_window": 20,
        "pacer_step": 0.05,
        "max_selections": None,
    }
)
_SHARED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "aggregation": {"max_rank": None, "energy_fraction": None, "weighting": "device"},
        "selection": {"utility_weight": None, "candidate_factor": None},
        "server_optimizer": {"lr": None, "momentum": None, "beta2": None, "tau": None},
    }
)
"""Keys that all components of a group had, with their defaults."""
_ADAPTIVE = {"lr": 0.003, "momentum": 0.9, "beta2": 0.99, "tau": 0.001}
_MEANING_OF_NULL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fedavgm": {"lr": 1.0, "momentum": 0.9},
        "fedadam": _ADAPTIVE,
        "fedyogi": _ADAPTIVE,
        "eafl": {"utility_weight": 0.25},
        "deadline": {"candidate_factor": 2.0},
        "power_of_choice": {"candidate_factor": 2.0},
        "energy_delay": {"candidate_factor": 2.0},
    }
)
_ROBUST_KEYS = (
    ("krum", "outlier_fraction", "outlier_fraction", 0.2),
    ("trimmed_mean", "outlier_fraction", "outlier_fraction", 0.2),
    ("norm_bound", "bound", "norm_bound", None),
    ("norm_bound", "factor", "norm_factor", 1.0),
)
"""Rule, its option, the key that it had in `robust`, and the value that null had."""
_LATER_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"afa": {"xi": 2.0, "step": 0.5}, "replay": {"threshold": 0.5, "capacity": 2**22}}
)
"""Options of robust rules that were constants."""
_BUFFERS = {"buffer_size": 10, "concurrency": 10}
_WHOLE = ("max_rank", "pacer_window", "max_selections", "capacity")
"""Options that are whole numbers: the others were converted to floats."""


def present_components(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration in which each component has its own options; one in this form stays as it is.

    So does `robust` with a rule that was applied twice, which present configurations can't have.
    """
    present = dict(settings)
    for group in _SHARED:
        if "name" in present.get(group, {}):
            present[group] = _present_component(group, dict(present[group]))
    if "rules" in present.get(ROBUST, {}) and len(set(present[ROBUST]["rules"])) == len(present[ROBUST]["rules"]):
        present[ROBUST] = _present_rules(present[ROBUST])
    if "mode" in (loop := dict(present.get("round_loop", {}))):
        present["round_loop"] = loop = {"name": loop.pop("mode"), **loop}
        if loop["name"] == "async":
            loop |= {key: value for key, value in _BUFFERS.items() if loop.get(key) is None}
    return present


def first_components(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the shared keys of earlier versions: the inverse of `present_components`."""
    first = dict(settings)
    for group in _SHARED:
        if "name" in first.get(group, {}):
            first[group] = _first_component(group, dict(first[group]))
    if ROBUST in first and "rules" not in first[ROBUST]:
        first[ROBUST] = _first_rules(first[ROBUST])
    if "name" in (loop := dict(first.get("round_loop", {}))):
        first["round_loop"] = loop = {"mode": loop.pop("name"), **loop}
        loop |= {key: None for key, value in _BUFFERS.items() if loop.get(key) == value}
    return first


def used_words(words: Sequence[str]) -> list[str]:
    """Drop stored words that set an option to null, or that belong to a component which isn't selected.

    They had no effect in earlier versions, which refused other values of them.
    """
    pairs = [word.lstrip("+").partition("=")[::2] for word in words]
    chosen = {
        "selection": "random",
        "server_optimizer": "none",
        **{key: value for key, value in pairs if key in GROUPS},
    }
    rules: list[str] = next((value.strip("[]").split(",") for key, value in reversed(pairs) if key == ROBUST), [])
    kept = []
    for word, (key, value) in zip(words, pairs, strict=True):
        group, _, option = key.partition(".")
        if group == ROBUST and option and (value == "null" or option.partition(".")[0] not in map(str.strip, rules)):
            continue
        if group in ("selection", "server_optimizer", "round_loop") and option and value == "null":
            continue
        unused = option in _OORT or option in _SHARED.get(group, ())
        if unused and group in chosen and option not in group_options(group, chosen[group]):
            continue
        kept.append(word)
    return kept


def _present_component(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Keep the options that a component has, with the meaning of null."""
    shared, name = _SHARED[group], settings.pop("name")
    oort, own = settings.pop("oort", {}), settings.pop("options", {})
    if shared.keys() <= settings.keys():  # all components had them
        meanings, options = _MEANING_OF_NULL.get(name, {}), group_options(group, name)
        shared_values = {key: settings.pop(key) for key in shared if key in settings}
        values = {**{key: oort[key] for key in oort if "alpha" in options}, **shared_values}
        own = {
            key: meanings.get(key) if value is None else value for key, value in values.items() if key in options
        } | own
    return {"name": name, **settings, **own}


def _first_component(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    name, shared = settings.pop("name"), _SHARED[group]
    meanings, first = _MEANING_OF_NULL.get(name, {}), {"name": name, **shared}
    if not group_options(group, name) and settings:  # a plug-in
        return {**first, **({"oort": dict(_OORT)} if group == "selection" else {}), "options": settings}
    for key, value in settings.items():
        if key in shared:
            first[key] = None if key in meanings and value == meanings[key] else _stored_number(key, value)
    if group == "selection":
        first["oort"] = {key: _stored_number(key, settings.get(key, value)) for key, value in _OORT.items()}
    return first


def _present_rules(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rules: dict[str, dict[str, Any]] = {name: dict(_LATER_OPTIONS.get(name, {})) for name in settings["rules"]}
    for rule, option, key, null in _ROBUST_KEYS:
        if rule in rules:
            value = settings.get(key)
            rules[rule][option] = null if value is None else value
    return {name: {**options, **settings.get("options", {}).get(name, {})} for name, options in rules.items()}


def _first_rules(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    first: dict[str, Any] = {"rules": list(settings), **{key: None for _, _, key, _ in _ROBUST_KEYS}}
    others = {name: dict(options) for name, options in settings.items()}
    for rule, option, key, null in _ROBUST_KEYS:
        if option not in others.get(rule, {}):
            continue
        value = _stored_number(key, others[rule][option])
        value = None if value == null else value
        if rule == "trimmed_mean" and "krum" in settings and value != first[key]:
            continue  # earlier versions had one key for both
        first[key] = value
        del others[rule][option]
    for rule, defaults in _LATER_OPTIONS.items():
        others[rule] = {key: value for key, value in others.get(rule, {}).items() if value != defaults.get(key)}
    options = {name: values for name, values in others.items() if values}
    return {**first, "options": options} if options else first


def _stored_number(key: str, value: Any) -> Any:
    """Convert an integer as the typed keys did."""
    whole = key in _WHOLE or isinstance(value, bool) or not isinstance(value, int)
    return value if whole else float(value)
