"""Options of groups that have no YAML file: `aggregation=NAME` for an installed plug-in, or an import path.

A plug-in's options are keys of its group, e.g. `aggregation.temperature=2`. Its class checks them when it is created,
since its package isn't imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from conf.components import GROUPS, ROBUST
from conf.groups import CONF


def offer_plugins(words: Sequence[str]) -> None:
    """Offer installed plug-ins, and import paths on the command line, as options of their groups.

    Args:
        words: words of the command line.
    """
    for group in (*GROUPS, "planning", ROBUST):
        names = installed_plugins(group)
        for word in words:
            key, _, value = word.partition("=")
            if key.lstrip("+") == group:
                names |= {name.strip() for name in value.strip("[]").split(",") if ":" in name}
        for name in sorted(names):
            if not (CONF / group / f"{name}.yaml").exists():
                _offer(group, name)


def installed_plugins(group: str) -> set[str]:
    """Return the names that installed packages offer for a group, without importing them."""
    return {point.name for point in entry_points(group=f"anther.{group}")}


def plugin_key(name: str) -> str:
    """Return the key in `robust` of a plug-in: its name, or the class of an import path."""
    return name.rpartition(":")[2]


def _offer(group: str, name: str) -> None:
    """Store a plug-in as an option of its group, which accepts any keys (but `planning`, whose keys are typed)."""
    node = OmegaConf.create({"name": name}, flags={"struct": False})
    package = f"{ROBUST}.{plugin_key(name)}" if group == ROBUST else group
    ConfigStore.instance().store(group=group, name=name, node=node, package=package)
