"""Options of groups that have no YAML file: `aggregation=NAME` for an installed plug-in, or an import path.

A plug-in's own options are keys of `options`, e.g. `aggregation.options.temperature=2`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from hydra.core.config_store import ConfigStore

CONF = Path(__file__).parent
"""Folder of the Hydra groups."""
GROUPS = ("aggregation", "selection")
_OWN_OPTION = re.compile(r"(aggregation|selection|server_optimizer)\.options\.\w+=")


def offer_plugins(words: Sequence[str]) -> list[str]:
    """Offer plug-ins as options of their groups, and return the words in Hydra's form.

    Args:
        words: words of the command line, which may contain import paths.
    """
    for group in GROUPS:
        names = {point.name for point in entry_points(group=f"anther.{group}")}
        for word in words:
            key, _, value = word.partition("=")
            if key.lstrip("+") == group:
                names |= {name for name in value.split(",") if ":" in name}
        for name in sorted(names):
            if not (CONF / group / f"{name}.yaml").exists():
                ConfigStore.instance().store(group=group, name=name, node={"name": name})
    return [f"++{word}" if _OWN_OPTION.match(word) else word for word in words]
