"""Explain errors of Hydra and OmegaConf in one line that names the key and a correct value."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import get_type_hints

from omegaconf import DictConfig

from conf.components import GROUPS, NAMED, ROBUST
from conf.groups import choices, group_options, option_keys
from conf.overrides import quote
from conf.renames import NO_RENAMES, Renames, present_key, present_option

OTHER_NAMES = {
    "aggregation": {
        "fedavg": "fedit (FedAvg of the factors)",
        "fedprox": "fedit, with adapter.shared.proximal_mu",
        "scaffold": "fedit, with drift_correction=scaffold",
        "fedlora": "fedit",
        "svd": "fedsvd",
    },
    "privacy": {"dp": "example", "dpsgd": "example", "dp-sgd": "example", "user": "device", "client": "device"},
}
"""Other common names of options, by group."""
SYNONYMS = {
    "learning_rate": "lr",
    "epochs": "rounds",
    "clients": "data.writers",
    "num_clients": "data.writers",
    "num_rounds": "rounds",
    "model": "base.path",
    "dataset": "data.pictures",
    "photos": "data.pictures",
    "images": "data.pictures",
    "batch": "batch_size",
    "output": "hydra.run.dir",
    "out": "hydra.run.dir",
    "eps": "privacy.epsilon",
    "random_seed": "seed",
}
"""Other common names of keys."""
EXPECTED = {
    r"could not be converted to Integer": "must be a whole number",
    r"could not be converted to Float": "must be a number",
    r"is not a valid bool": "must be true or false",
    r"is not a ListConfig, list or tuple": "must be a list: [a,b]",
    r"Incompatible value 'None'|field .* is not Optional": "must not be null",
    r"Cannot (assign|convert|merge) .* (DictConfig|dict)|is not a subclass": "is a group of keys, not a value",
}


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Return every dotted key of a schema, groups and leaves, and those of the components that groups offer."""
    keys = []
    for name, kind in get_type_hints(schema).items():
        if name == "name" and prefix.removesuffix(".") in NAMED:
            continue  # set by `group=name`
        keys.append(prefix + name)
        if not prefix and name in (*GROUPS, ROBUST):
            keys += option_keys(name)
        if is_dataclass(kind) and isinstance(kind, type):
            keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def explain(error: BaseException, known: Sequence[str], renames: Renames = NO_RENAMES) -> str:
    """Return one line for an error of Hydra or OmegaConf.

    Args:
        error: the exception.
        known: keys of the schema (`known_keys`).
        renames: former names; the message gives the present ones.
    """
    text = _one_line(error)
    cause = _one_line(error.__cause__) if error.__cause__ else text
    if option := re.search(r"Could not find '([^']+)' Available options in '([^']+)': (.*)", text):
        choice, group, options = option.groups()
        listed = ", ".join(options.split(" Config search path")[0].split())
        choice = choice.removeprefix(f"{group}/")
        if present := present_option(group, choice, renames):
            return f"{group}={choice}: renamed to {present}"
        return f"{group}={choice}: no such option{_hint(group, choice, options)}; {group} is one of: {listed}"
    if rule := re.search(r"Could not load 'robust/([^']+)'", text):
        return _no_such_rule(f"{ROBUST}=[{rule[1]}]", rule[1])
    if unreadable := getattr(error, "override", None):
        return _unreadable(unreadable)
    if merging := re.search(r"Error merging override (.*)", text):
        return f"{merging[1]}: {_expected(cause)}"
    if nested := re.search(r"Could not override '([^']+)'.*", text):
        inner = re.search(r"Key '([^']+)' not in '(\w+)'", cause)
        if inner and nested[1] in known:  # the key exists, but its value contains an unknown one
            for key in (f"{nested[1]}.{inner[1]}", f"{nested[1]}[].{inner[1]}"):
                if present := present_key(key, renames):
                    return f"{key}: renamed to {present}"
            return f"{nested[1]}: '{inner[1]}' is no key of a {inner[2]}"
        key = nested[1].lstrip("+~")
        if key.partition(".")[0] in (*GROUPS, ROBUST) and not present_key(key, renames):
            return _no_such_option(key, getattr(error.__cause__, "parent_node", None))
        return _no_such_key(key, known, renames)
    interpolated = re.search(r"Interpolation key '([\w.]+)' not found", text)
    if interpolated and (present := present_key(interpolated[1], renames)):
        return f"${{{interpolated[1]}}}: renamed to ${{{present}}}"
    if twice := re.search(r"Multiple values for ([\w/]+)\.", text):
        return f"{twice[1]}: set twice; write {twice[1]}=… once, without +"
    full_key = re.search(r"full_key: ([\w.\[\]]+)", f"{cause} {text}")
    if unknown := re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')", cause):
        return _no_such_key(full_key[1] if full_key else unknown[1], known, renames)
    if full_key:
        return f"{full_key[1]}: {_expected(cause)}"
    return text.split(" Check that it's in your config search path")[0]


def _unreadable(word: str) -> str:
    """Suggest a word that Hydra can parse."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        return f"{word}: can't be read; write key=value"
    correct = shlex.quote(f"{key}={quote(value)}")
    return f"{word}: can't be read as key=value; quote the value, and all of it for the shell: {correct}"


def _hint(group: str, choice: str, options: str) -> str:
    """Suggest an option by its other names or by its spelling."""
    names = options.replace(",", " ").split()
    known = OTHER_NAMES.get(group, {}).get(choice.lower())
    near = [known] if known else difflib.get_close_matches(choice, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _expected(cause: str) -> str:
    for pattern, meaning in EXPECTED.items():
        if re.search(pattern, cause):
            return meaning
    return cause.split(" full_key:")[0].rsplit("raised while composing config: ", 1)[-1]


def _no_such_option(key: str, node: object) -> str:
    """Return which options the selected component has, and which component has the given one.

    Args:
        key: key of an option.
        node: composed group in which it was sought.
    """
    group, _, option = key.partition(".")
    values = {str(name): node[name] for name in node} if isinstance(node, DictConfig) else {}
    if group == ROBUST and "name" not in values:  # it isn't a rule, but the group of the selected ones
        if (rule := option.partition(".")[0]) in choices(group):
            return f"{key}: only with {group}=[{rule}]; selected are {', '.join(values) or 'none'}"
        return _no_such_rule(key, rule)
    option = option.rpartition(".")[2]
    own = [name for name in values if name != "name"]
    others = [] if group == ROBUST else [name for name in choices(group) if option in group_options(group, name)]
    near = difflib.get_close_matches(option, own, n=1)
    hint = f"; it belongs to {', '.join(f'{group}={name}' for name in others)}" if others else ""
    hint = f"; did you mean {key.rpartition('.')[0]}.{near[0]}?" if near else hint
    return f"{key}: no option of {group}={values.get('name')}, which has {', '.join(own) or 'none'}{hint}"


def _no_such_rule(shown: str, rule: str) -> str:
    known = choices(ROBUST)
    return f"{shown}: no such rule{_hint(ROBUST, rule, ' '.join(known))}; known are {', '.join(known)}"


def _no_such_key(key: str, known: Sequence[str], renames: Renames) -> str:
    """Suggest the nearest sibling, else the same or a similar name elsewhere, else list the keys of the parent."""
    if present := present_key(key, renames):
        return f"{key}: renamed to {present}"
    parent, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    everywhere: dict[str, list[str]] = {}
    for name in known:
        everywhere.setdefault(name.rpartition(".")[2], []).append(name)
    if leaf in SYNONYMS:
        name = SYNONYMS[leaf]
        keys = [f"{parent}.{name}"] if name in siblings and parent else everywhere.get(name, [name])
        return f"{key}: no such key; did you mean {' or '.join(keys)}?"
    if near := difflib.get_close_matches(leaf, siblings, n=1):
        return f"{key}: no such key; did you mean {siblings[near[0]]}?"
    if near := difflib.get_close_matches(leaf, everywhere, n=1):
        return f"{key}: no such key; did you mean {' or '.join(everywhere[near[0]])}?"
    listed = siblings or {name: name for name in known if "." not in name}
    return f"{key}: no such key; known here: {', '.join(listed)}"
