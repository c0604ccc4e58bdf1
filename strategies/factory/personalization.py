"""Method of personalization of a configuration."""

from __future__ import annotations

from typing import cast

from conf.schemas.federation import FederationConfig
from protocol.messages import MethodOption, PersonalizationMethod
from strategies.declarations import create
from training.personalization import PERSONALIZATIONS, Personalization


def build_personalization(config: FederationConfig) -> Personalization:
    """Create the method; AntherError if it is not registered, or refuses an option."""
    chosen = config.personalization
    return cast(Personalization, create(PERSONALIZATIONS, chosen.name, chosen.options, key="personalization"))


def personalization_method(config: FederationConfig) -> PersonalizationMethod:
    """Return the method as it is sent to devices."""
    chosen = sorted(config.personalization.options.items())
    options = tuple(MethodOption(name=key, value=float(value)) for key, value in chosen)
    return PersonalizationMethod(name=config.personalization.name, options=options)
