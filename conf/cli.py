"""Hydra applications with one-line errors.

Hydra answers a wrong key with half a page. `hydra_application` turns every error of the composition or of the typed
schema into one line that names the key and a correct value.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.terminal import discard_output, use_plain_output
from conf.explain import explain, known_keys
from conf.groups import refuse_wrong_selections
from conf.key_help import register_resolvers
from conf.overrides import prepare_overrides
from conf.plugin_options import offer_plugins
from conf.renames import BY_APPLICATION, NO_RENAMES, Renames, refuse_renamed

USAGE, INTERRUPTED = 2, 130


def hydra_application(
    name: str,
    schema: type,
    *,
    check: Callable[[Sequence[str]], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorate `main(config: schema)` as the Hydra application of `conf/<name>.yaml`.

    The function receives the resolved configuration as an instance of `schema`, whose `__post_init__` may raise
    ValueError to refuse a value. AntherError, refused configurations and errors of the operating system end the process
    with exit code 2 and one line on standard error. In a multirun they also cancel the remaining jobs.

    Args:
        name: name of the YAML file.
        schema: dataclass that describes it.
        check: refuses words before they are composed.
        after: function called after all jobs of the command.
    """

    renames = BY_APPLICATION.get(name, NO_RENAMES)

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)
        @functools.wraps(main)
        def job(config: DictConfig) -> None:
            try:
                main(to_object(config, schema, renames))
            except REPORTED_ERRORS as error:
                drop_empty(output_dir())
                _stop(
                    describe_error(error)
                )  # SystemExit, because Hydra delays other exceptions until all jobs have run

        @functools.wraps(main)
        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
            use_plain_output()
            register_resolvers()
            try:
                refuse_renamed(sys.argv[1:], renames)
                refuse_wrong_selections(sys.argv[1:])
                if check is not None:
                    check(sys.argv[1:])
                offer_plugins(sys.argv[1:])
                sys.argv[1:] = prepare_overrides(sys.argv[1:], schema)
                with _shortcuts(sys.argv[1:]):
                    job()
                if after is not None:
                    after()
            except (HydraException, OmegaConfBaseException, YAMLError) as error:
                _stop(explain(error, known_keys(schema), renames))
            except ValueError as error:  # Hydra has no exception of its own for `group=null` and `group=3`
                if not str(error).startswith("Config group override must be"):
                    raise
                _stop("a group takes the name of one of its options; --help lists them")
            except BrokenPipeError:  # the reader of our output closed it
                discard_output()
                sys.exit(USAGE)
            except REPORTED_ERRORS as error:  # from Hydra: the output folder, or a configuration file of the user
                _stop(describe_error(error))
            except KeyboardInterrupt:
                sys.exit(INTERRUPTED)

        return run

    return decorate


def to_object(config: DictConfig, schema: type, renames: Renames = NO_RENAMES) -> Any:
    """Return the validated instance of `schema` for a composed configuration.

    Args:
        config: composed configuration.
        schema: dataclass of the application.
        renames: former keys, which messages explain.

    Returns:
        An instance of `schema`.

    Raises:
        AntherError: a value is missing, not finite, or refused by the schema.
    """
    try:
        # Merge plain data into a new schema, because Hydra's `+key=value` unlocks the composed one.
        merged = OmegaConf.merge(_structured(schema), OmegaConf.to_container(config))
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise AntherError(f"{missing[0]}: needs a value")
        for key, value in _not_finite(OmegaConf.to_container(merged)):
            raise AntherError(f"{key}={value}: must be a finite number")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise AntherError(explain(error, known_keys(schema), renames)) from error
    except ValueError as error:  # raised by a schema's __post_init__
        raise AntherError(str(error)) from error


@functools.cache
def _structured(schema: type) -> DictConfig:
    """Return the schema with its defaults, to be merged into, which copies it."""
    return OmegaConf.structured(schema)


def _not_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Find keys with an infinite or NaN value; no limit is written as inf."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _not_finite(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _not_finite(part, f"{key}[{index}]")


def drop_empty(folder: str) -> None:
    """Remove the output folder that Hydra created before the configuration was checked."""
    with contextlib.suppress(OSError):  # not empty: it was there before
        Path(folder).rmdir()


def program(module: str) -> list[str]:
    """Return the command that started this process: `anther simulate`, or `python -m` and the module."""
    started = sys.argv[0].split()
    return started if started[:1] == ["anther"] else ["python", "-m", module]


def output_dir() -> str:
    """Return Hydra's output folder of this run (`hydra.run.dir`)."""
    return str(HydraConfig.get().runtime.output_dir)


@contextlib.contextmanager
def _shortcuts(words: Sequence[str]) -> Iterator[None]:
    """Skip two slow steps of Hydra whose results our applications don't use.

    For `--help`, Hydra lists all groups, but our templates have lists of their own. Before a run, it composes the whole
    configuration once more for `hydra.mode`, which is not set unless on the command line or by a file of the user.
    """
    listing, mode = Hydra.format_config_groups, Hydra.get_mode
    if not {"--help", "-h"}.isdisjoint(words):
        Hydra.format_config_groups = lambda *_, **__: ""  # type: ignore[method-assign]
    if not any("hydra.mode" in word or word.startswith(("--config", "-c")) for word in words):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.format_config_groups, Hydra.get_mode = listing, mode  # type: ignore[method-assign]


def _stop(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(USAGE)
