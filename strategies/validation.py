"""What a strategy's parts do not promise or do together."""

from __future__ import annotations

from models.lora.adapter import Adapter
from protocol.messages import TrainingPlan
from strategies.aggregation import Aggregation
from strategies.central_dp import CentralDP
from strategies.download import FP32
from strategies.planning.plan import PlanLimits
from strategies.planning.site_selection import SiteSelector
from strategies.private_evaluation import EvaluationPolicy
from strategies.robust.replay import ReplayFilter
from strategies.selection import Selection
from strategies.selection.poisson import Poisson
from strategies.server_optimizers import ServerOptimizer


def check(
    *,
    plan: TrainingPlan,
    aggregation: Aggregation,
    selection: Selection,
    limits: PlanLimits,
    measuring: EvaluationPolicy,
    optimiser: ServerOptimizer | None,
    download: str,
    lora_xs_bases: Adapter | None,
    central_dp: CentralDP | None,
    replay: ReplayFilter | None,
    quorum: int,
    fitting: SiteSelector | None,
) -> None:
    """ValueError for the parts of a `strategies.strategy.Federated` that contradict each other.

    Whoever configures a run is told before, in terms of its keys (`strategies.build`); this is the last check.
    """
    if central_dp and quorum > 1:
        raise ValueError("quorum: what is private per device is released whatever came back; leave it 1")
    if central_dp and replay:
        raise ValueError(f"replay inside the bound: {replay.sensitivity.reason}")
    if replay and aggregation.trains(1) == "split":
        raise ValueError("replay compares products, and with this aggregation no device sends one")
    if (aggregation.trains(1) == "cores") != (lora_xs_bases is not None):
        raise ValueError("an aggregation of cores needs their frame, and no other does")
    if not 0 < plan.keep <= 1 or (plan.keep < 1 and not plan.feedback):
        raise ValueError("keep: over 0 and at most 1, and less than 1 only with feedback")
    if plan.feedback and not aggregation.stable_factors:
        raise ValueError("feedback needs directions that keep their meaning, and under this aggregation they don't")
    if plan.scaffold and (
        central_dp or plan.optimiser != "sgd" or not (aggregation.sensitivity.linear and aggregation.stable_factors)
    ):
        raise ValueError("scaffold: for plain SGD and a mean of factors, and not under privacy per device")
    if plan.scaffold and (plan.sites is not None or fitting or limits.metered_rank is not None):
        raise ValueError("scaffold: every device trains every site and direction")
    if download != FP32 and (lora_xs_bases or plan.scaffold):
        raise ValueError("download: what travels beside an adapter is sent whole, and so is the adapter")
    if optimiser and aggregation.sensitivity.turned:
        raise ValueError(f"an optimiser needs directions that stay the same: {aggregation.sensitivity.turned}")
    if central_dp and not aggregation.sensitivity.linear:
        raise ValueError(f"not linear in the updates: {aggregation.sensitivity.reason}")
    drawn = selection.rate if isinstance(selection, Poisson) else 1.0
    if central_dp and central_dp.sampling_rate != drawn:
        raise ValueError(f"accounted with a sampling rate of {central_dp.sampling_rate}, selected with {drawn}")
    if limits.metered_rank is not None and not aggregation.mixed_ranks:
        raise ValueError("limits.metered_rank: this aggregation takes one rank only; leave it None")
    if central_dp and (selection.sensitivity.uses_transient_state or limits.uses_transient_state):
        raise ValueError("what a device tells of its moment decides, and is part of what is private")
    if central_dp and (limits.metered_rank is not None or limits.metered_update is not None):
        raise ValueError("limits: what link a device is on is part of what is private; leave metered_… None")
    if limits.metered_update is not None and limits.feedback and not aggregation.stable_factors:
        raise ValueError("feedback needs directions that keep their meaning, and under this aggregation they don't")
    if measuring.every and plan.privacy and not measuring.local_noise:
        raise ValueError("measuring: a private plan promises to ask no device for a measure without noise")
    if measuring.every and central_dp and not measuring.central_noise:
        raise ValueError("measuring: a run that is private per device keeps no measure without noise")
