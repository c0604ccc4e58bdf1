"""Training speed of this device with its base, if `anther device benchmark` has measured the device."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

from client.store.store import Store
from models.base.base import Base
from models.families.known import find_base
from models.files import assets
from models.footprint.footprint import copy_for_dry_run, example_shapes, footprint

PROFILE = "device.yaml"  # `client.cli.plan`'s, whose imports are slow
RANK = 8  # hardly affects the time of a pass


@dataclass(frozen=True)
class Rates:
    """Measured rates for a device's report."""

    examples_per_second: float
    watts: float
    battery_wh: float | None


def benchmarked(base: Base, store: Store | None = None) -> Rates | None:
    """Return the rates with this base; None if the device wasn't measured or trains on a GPU.

    The benchmark doesn't measure GPUs. The cost of a pass is predicted from the profile in the same way as by `anther
    device plan device=this`. This takes a second or two; the store caches the result.

    Raises:
        AntherError: the profile in ANTHER_HOME can't be used.
    """
    path = assets.home() / PROFILE
    if not path.is_file() or base.device.type != "cpu":
        return None
    from client.planning.plan_search import pass_seconds
    from conf.schemas.planning import THIS, compose_plan

    profile = compose_plan([f"device={THIS}"], path).device
    inputs = (base.hash, base.resolution, base.dtype, base.checkpointing, sorted(base.sites), astuple(profile))
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()
    seconds = store.number("pass-seconds", key) if store else None
    if seconds is None:
        predicted = footprint(
            copy_for_dry_run(base), *example_shapes(find_base(str(base.folder)), base.resolution), rank=RANK
        )
        seconds = pass_seconds(predicted, profile)
        if store:
            store.save_number("pass-seconds", key, seconds)
    return Rates(1 / seconds, profile.watts_busy, profile.battery_wh)
