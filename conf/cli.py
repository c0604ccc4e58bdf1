"""A Hydra application whose mistakes cost one line each.

Hydra answers a wrong key with half a page; `application` turns whatever the composition or the typed
schema objects to into one line that names the key and what would be right.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import AntherError

USAGE, INTERRUPTED = 2, 130


def application(name: str, schema: type) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorate `main(config: schema)` as the Hydra application of `conf/<name>.yaml`.

    The function receives the resolved configuration as an instance of `schema`, whose `__post_init__` may
    raise ValueError to refuse a value. AntherError and refused configurations end the process with exit
    code 2 and one line on standard error.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)
        @functools.wraps(main)
        def typed(config: DictConfig) -> None:
            main(to_object(config))

        @functools.wraps(main)
        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # we print the errors: Hydra is to raise them as they are
            try:
                typed()
            except AntherError as error:
                _stop(str(error))
            except (HydraException, OmegaConfBaseException) as error:
                _stop(explain(error, known_keys(schema)))
            except KeyboardInterrupt:
                sys.exit(INTERRUPTED)

        return run

    return decorate


def to_object(config: DictConfig) -> Any:
    """The typed, validated object of a composed configuration; AntherError with one line if refused."""
    try:
        return OmegaConf.to_object(config)
    except ValueError as error:  # raised by a schema's __post_init__
        raise AntherError(str(error)) from error
    except OmegaConfBaseException as error:
        raise AntherError(explain(error, config.keys())) from error


def output_dir() -> str:
    """Hydra's output folder of this run (`hydra.run.dir=…` moves it)."""
    return str(HydraConfig.get().runtime.output_dir)


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key that a schema knows, groups and leaves."""
    keys = []
    for field in fields(schema):
        keys.append(prefix + field.name)
        kind = field.default_factory if is_dataclass(field.default_factory) else field.type
        if isinstance(kind, type) and is_dataclass(kind):
            keys += known_keys(kind, f"{prefix}{field.name}.")
    return keys


def explain(error: Exception, known: Iterable[Any]) -> str:
    """One line for what Hydra or OmegaConf objects to."""
    text = " ".join(str(error).split())
    keys = [str(key) for key in known]
    if option := re.search(r"Could not find '([\w./-]+)' Available options in '([\w./-]+)': (.*)", text):
        choice, group, options = option.groups()
        listed = ", ".join(options.split()[:40])
        return f"{group}={choice.rsplit('/', 1)[-1]}: no such option; {group} is one of: {listed}"
    if missing := re.search(r"Could not override '([\w.@/-]+)'", text):
        return f"{missing[1]}: no such key{_closest(missing[1], keys)}"
    if missing := re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')", text):
        return f"{missing[1]}: no such key{_closest(missing[1], keys)}"
    if where := re.search(r"full_key: ([\w.]+)", text):
        reason = text.split(" full_key:")[0].removeprefix("Error merging override ").strip()
        return f"{where[1]}: {reason}"
    return text.split(" Set the environment variable")[0]


def _closest(key: str, known: list[str]) -> str:
    """'; did you mean …?' by whole key first, then by last part; else the top-level keys."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    close += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in close][:3]
    if not close:
        close_leaves = difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.6)
        close = [k for k in known if k.rsplit(".", 1)[-1] in close_leaves][:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known are: {', '.join(k for k in known if '.' not in k)}"


def _stop(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(USAGE)
