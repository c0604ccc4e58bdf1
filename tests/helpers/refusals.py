"""Refused combinations: the reason, and a configuration and parts that reach it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from conf.components import ComponentConfig
from models.lora.adapter import Factors
from protocol.messages import EvaluationPrivacy, ExamplePrivacy, PersonalizationMethod
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.ffa import FFA
from strategies.aggregation.flora import FLoRA
from strategies.aggregation.hetlora import HetLoRA
from strategies.last_round import LastRound
from strategies.planning.plan import PlanLimits
from strategies.robust.krum import MultiKrum
from strategies.robust.norm import NormBound
from strategies.robust.replay import ReplayFilter
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.robust.trimmed import Median
from strategies.round.private_evaluation import CentralDPEvaluation, EvaluationPolicy
from strategies.selection.eafl import EAFL
from strategies.selection.oort import OortSettings
from strategies.selection.power_of_choice import PowerOfChoice
from strategies.server_optimizers import FedAvgM
from tests.helpers.central import BUDGET, poisson, simulated
from tests.helpers.fleet import PLAN, SITES
from training.personalization.population import Population

PRIVATE = replace(PLAN, privacy=ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, draws=1, delta=1e-3))
SGD = replace(PLAN, optimiser="sgd", scaffold=True)
QUANTIZED = replace(PLAN, update="int4", keep=0.5, feedback=True)
EXACT, SLICES = Exact(rank=3, max_rank=None, seed=0), Exact(rank=3, weighting="rank_slice", seed=0)
LOCAL = EvaluationPrivacy(noise_multiplier=4.0, clip=0.1, pictures=5, delta=1e-3)
CENTRAL = CentralDPEvaluation(noise_multiplier=4.0, clip=0.1, devices=4, noise=functools.partial(simulated, "measure"))
BASES = {"x": Factors(torch.zeros(3, 6), torch.zeros(5, 3))}


class Undeclared(FedIT):
    """Rule without a declaration, which a test registers as `undeclared`."""

    sensitivity = None  # type: ignore[assignment]


class Case(NamedTuple):
    reason: str
    config: dict[str, Any] | None = None
    """Values by key, of a group the name of its component; the aggregation is FedIT by default. None: no configuration
    reaches the reason."""
    parts: dict[str, Any] | None = None
    """Settings of `tests.helpers.fleet.strategy`; the aggregation is FedIT by default. None: no parts reach it."""
    buffer_size: int | None = None
    """With parts: updates of an asynchronous round."""


def robust(*reweight: Any, rule: Any = None, entrywise: Any = None) -> RobustAggregation:
    return RobustAggregation(rule or FedIT(), rules=reweight, entrywise=entrywise, rank=None, seed=0)


def population(rule: Any = None) -> LastRound:
    return LastRound(rule or FedIT(), Population(), rounds=3)


def krum() -> MultiKrum:
    return MultiKrum(outlier_fraction=0.2)


ASYNC = {"round_loop.name": "async", "round_loop.buffer_size": 10}
SLICED = {"aggregation": ComponentConfig("exact", {"weighting": "rank_slice"})}
DEVICE = {"privacy.level": "device"}
SCAFFOLD = {"drift_correction": "scaffold", "adapter.shared.optimizer": "sgd"}
INT4 = {"compression.upload": "int4", "compression.keep_fraction": 0.5}
SERVER: dict[str, Any] = {"central_dp": {}}
DIRECTIONS = PersonalizationMethod(name="directions")

CASES = [
    Case("robust: replay checks each reply on arrival", {"robust": ["norm_bound", "replay"]}),
    Case("robust: median merges all updates into one", {"robust": ["median", "krum"]}),
    Case(
        "robust: norm_bound reduces large products",
        {"aggregation": "hetlora", "robust": ["norm_bound"]},
        {"aggregation": robust(NormBound(), rule=HetLoRA())},
    ),
    Case(
        "robust: krum compares products",
        {"aggregation": "fedsa", "robust": ["krum"]},
        {"aggregation": robust(krum(), rule=FedSA())},
    ),
    Case(
        "robust: replay compares products",
        {"aggregation": "fedsa", "robust": ["replay"]},
        {"aggregation": FedSA(), "replay_filter": ReplayFilter(SITES, seed=0)},
    ),
    Case(
        "round_loop=async: a sample that amplifies privacy requires",
        {"cohort.sampling_rate": 0.5, **ASYNC},
        {"selection": poisson(0.5)},
        buffer_size=10,
    ),
    Case(
        "round_loop=async: ffa can't use an update of an older adapter; use aggregation=exact or fedit",
        {"aggregation": "ffa", **ASYNC},
        {"aggregation": FFA()},
        buffer_size=10,
    ),
    Case(
        "privacy=example: aggregation undeclared declares no sensitivity",
        {"aggregation": "undeclared", "privacy.level": "example"},
        {"aggregation": Undeclared(), "plan": PRIVATE},
    ),
    Case(
        "privacy=example: selection power_of_choice depends on private data",
        {"privacy.level": "example", "selection": "power_of_choice", "cohort.size": 2},
        {"plan": PRIVATE, "selection": PowerOfChoice(size=2, seed=0)},
    ),
    Case(
        "privacy=device: selection eafl depends on the state of a device",
        {**DEVICE, "selection": "eafl", "cohort.size": 2},
        {**SERVER, "selection": EAFL(size=2, seed=0, settings=OortSettings())},
    ),
    Case(
        "privacy=device: aggregation exact is not linear in the updates",
        {**DEVICE, "aggregation": "exact"},
        {**SERVER, "aggregation": EXACT},
    ),
    Case(
        "privacy=device: robust rule krum breaks the sensitivity bound",
        {**DEVICE, "robust": ["krum"]},
        {**SERVER, "aggregation": robust(krum())},
    ),
    Case("privacy=device: timing async can't be charged in advance", {**DEVICE, **ASYNC}, SERVER, buffer_size=10),
    Case(
        "aggregation.weighting=rank_slice: an update of an older adapter",
        {**SLICED, **ASYNC},
        {"aggregation": SLICES},
        buffer_size=10,
    ),
    Case("cohort.overselection=2: with round_loop=async", {"cohort.size": 2, "cohort.overselection": 2.0, **ASYNC}),
    Case("round_loop.quorum=3: no round has more replies than cohort", {"cohort.size": 2, "round_loop.quorum": 3}),
    Case(
        "round_loop.quorum=3: no round has more replies than round_loop.buffer_size=2",
        {**ASYNC, "round_loop.quorum": 3, "round_loop.buffer_size": 2},
        {"quorum": 3},
        buffer_size=2,
    ),
    Case(
        "round_loop.quorum=2: with device-level privacy",
        {**DEVICE, "round_loop.quorum": 2},
        {**SERVER, "quorum": 2},
    ),
    Case(
        "robust: median rotates the factors, and aggregation=ffa",
        {"aggregation": "ffa", "robust": ["median"]},
        {"aggregation": robust(rule=FFA(), entrywise=Median())},
    ),
    Case(
        "robust: median rotates the factors, and compression.keep_fraction",
        {"robust": ["median"], **INT4},
        {"aggregation": robust(entrywise=Median()), "plan": QUANTIZED},
    ),
    Case(
        "aggregation.weighting=rank_slice: median combines all updates into one",
        {**SLICED, "robust": ["median"]},
        {"aggregation": robust(rule=SLICES, entrywise=Median())},
    ),
    Case(
        "server_optimizer: changes of factors can be summed over rounds only if directions persist, and with flo",
        {"aggregation": "flora", "server_optimizer": "fedavgm"},
        {"aggregation": FLoRA(rank=3, seed=0), "server_optimizer": FedAvgM()},
    ),
    Case(
        "server_optimizer: changes of factors can be summed over rounds only if directions persist, and with fed",
        {"robust": ["median"], "server_optimizer": "fedavgm"},
        {"aggregation": robust(entrywise=Median()), "server_optimizer": FedAvgM()},
    ),
    Case("compression.keep_fraction=0: must be over 0", parts={"plan": replace(QUANTIZED, keep=0.0)}),
    Case(
        "compression.keep_fraction=0.5: the residual can't be used in a later round, since exact",
        {"aggregation": "exact", **INT4},
        {"aggregation": EXACT, "plan": QUANTIZED},
    ),
    Case(
        "compression.keep_fraction=0.5: the blocks that are not sent would be lost",
        parts={"plan": replace(QUANTIZED, feedback=False)},
    ),
    Case(
        "compression.upload with feedback: the residual can't be used",
        parts={"aggregation": EXACT, "plan": replace(QUANTIZED, keep=1.0)},
    ),
    Case(
        "compression.metered_upload=int4 with feedback: the residual can't be used",
        parts={"aggregation": EXACT, "limits": PlanLimits(metered_update="int4", feedback=True)},
    ),
    Case(
        "drift_correction=scaffold: a control variate can't be used in a later round, since exact",
        {"aggregation": "exact", **SCAFFOLD},
        {"aggregation": EXACT, "plan": SGD},
    ),
    Case(
        "drift_correction=scaffold: the server's control variate is a plain mean, and hetlora is not",
        {"aggregation": "hetlora", **SCAFFOLD},
        {"aggregation": HetLoRA(), "plan": SGD},
    ),
    Case(
        "drift_correction=scaffold: only with plain SGD",
        {"drift_correction": "scaffold"},
        {"plan": replace(SGD, optimiser="adamw")},
    ),
    Case(
        "drift_correction=scaffold: with privacy=device the server's control variate",
        {**SCAFFOLD, **DEVICE},
        {"plan": SGD, **SERVER},
    ),
    Case(
        "drift_correction=scaffold: every update enters the server's control variate",
        {**SCAFFOLD, "robust": ["krum"]},
        {"plan": SGD, "aggregation": robust(krum())},
    ),
    Case(
        "drift_correction=scaffold: a control variate covers every site",
        {**SCAFFOLD, "planning.name": "device"},
        {"plan": replace(SGD, sites=("x",))},
    ),
    Case(
        "drift_correction=scaffold: a control variate covers every direction",
        parts={"plan": SGD, "aggregation": FFA(), "limits": PlanLimits(metered_rank=1)},
    ),
    Case(
        "drift_correction=scaffold: a control variate belongs to the adapter of one round",
        {**SCAFFOLD, **ASYNC},
        {"plan": SGD},
        buffer_size=10,
    ),
    Case(
        "adapter.lora_xs_bases: fedit trains no cores",
        {"adapter.lora_xs_bases": "glyphs-frame"},
        {"lora_xs_bases": BASES},
    ),
    Case("adapter.lora_xs_bases: aggregation=fedsb requires one", {"aggregation": "fedsb"}, {"aggregation": FedSB()}),
    Case(
        "compression.download=int8: adapter.lora_xs_bases and SCAFFOLD's",
        {**SCAFFOLD, "compression.download": "int8"},
        {"plan": SGD, "download": "int8"},
    ),
    Case("planning.metered_rank=1: fedit requires equal ranks", parts={"limits": PlanLimits(metered_rank=1)}),
    Case(
        "planning.max_battery_fraction=0.5: the battery charge of a device is private",
        {**DEVICE, "planning.max_battery_fraction": 0.5},
        {**SERVER, "limits": PlanLimits(battery_share=0.5)},
    ),
    Case(
        "compression.metered_upload=int4: the link of a device is private",
        {**DEVICE, "compression.metered_upload": "int4"},
        {**SERVER, "limits": PlanLimits(metered_update="int4")},
    ),
    Case(
        "planning.metered_rank=1: the link of a device is private",
        parts={**SERVER, "aggregation": FFA(), "limits": PlanLimits(metered_rank=1)},
    ),
    Case("cohort.overselection=2: the time of a reply", {**DEVICE, "cohort.size": 2, "cohort.overselection": 2.0}),
    Case("cohort.sampling_rate=0.5: accounted with a sampling rate of 1", parts={**SERVER, "selection": poisson(0.5)}),
    Case(
        "privacy.device.max_participations=3: with cohort.sampling_rate",
        {**DEVICE, "cohort.sampling_rate": 0.5, "privacy.device.max_participations": 3},
        {"central_dp": {"sampling_rate": 0.5, "budget": BUDGET}, "selection": poisson(0.5)},
    ),
    Case(
        "privacy.device.max_participations=2: 20 devices are too few for 4 rounds of 20",
        {**DEVICE, "privacy.device.max_participations": 2},
    ),
    Case(
        "private_eval.interval=2: with privacy=both",
        {"privacy.level": "both", "private_eval.interval": 2},
        {
            "plan": PRIVATE,
            **SERVER,
            "evaluation_policy": EvaluationPolicy(interval=2, local_noise=LOCAL, central_noise=CENTRAL),
        },
    ),
    Case(
        "private_eval.interval=1: with example-level privacy",
        parts={"plan": PRIVATE, "evaluation_policy": EvaluationPolicy()},
    ),
    Case(
        "private_eval.interval=1: with device-level privacy", parts={**SERVER, "evaluation_policy": EvaluationPolicy()}
    ),
    Case(
        "personalization=directions: values fitted to pictures enter",
        {"personalization": "directions", "privacy.level": "example"},
        {"plan": replace(PRIVATE, personalization=DIRECTIONS)},
    ),
    Case(
        "personalization=fedalt: values fitted to pictures enter",
        {"personalization": "fedalt", "privacy.level": "both"},
        {"plan": replace(PRIVATE, personalization=PersonalizationMethod(name="fedalt")), **SERVER},
    ),
    Case(
        "personalization=directions: with aggregation=fedsa devices keep their own B",
        {"personalization": "directions", "aggregation": "fedsa"},
        {"plan": replace(PLAN, personalization=DIRECTIONS), "aggregation": FedSA()},
    ),
    Case(
        "personalization=directions: its directions are averaged number by number",
        {"personalization": "directions", "aggregation": "exact"},
        {"plan": replace(PLAN, personalization=DIRECTIONS), "aggregation": EXACT},
    ),
    Case(
        "personalization=directions: can't be combined with drift_correction=scaffold",
        {"personalization": "directions", **SCAFFOLD},
        {"plan": replace(SGD, personalization=DIRECTIONS)},
    ),
    Case(
        "personalization=directions: can't be combined with round_loop=async",
        {"personalization": "directions", **ASYNC},
        {"plan": replace(PLAN, personalization=DIRECTIONS)},
        buffer_size=10,
    ),
    Case(
        "personalization=population: its last round needs the update of each device",
        {"personalization": "population", **DEVICE},
        {"aggregation": population(), **SERVER},
    ),
    Case(
        "personalization=population: its last round has 40 steps",
        {"personalization": "population", "privacy.level": "example"},
        {"aggregation": population(), "plan": PRIVATE},
    ),
    Case(
        "personalization=population: devices have no B on a common A with aggregation=fedsa",
        {"personalization": "population", "aggregation": "fedsa"},
        {"aggregation": population(FedSA())},
    ),
    Case(
        "personalization=population: its last round uses every update, and robust=krum",
        {"personalization": "population", "robust": ["replay", "krum"]},
        {"aggregation": population(robust(krum()))},
    ),
    Case(
        "personalization=population: a step of the server would scale the directions",
        {"personalization": "population", "server_optimizer": "fedavgm"},
        {"aggregation": population(), "server_optimizer": FedAvgM()},
    ),
    Case(
        "personalization=population: can't be combined with drift_correction=scaffold",
        {"personalization": "population", **SCAFFOLD},
        {"aggregation": population(), "plan": SGD},
    ),
    Case(
        "personalization=population: can't be combined with round_loop=async",
        {"personalization": "population", **ASYNC},
    ),
    Case(
        "personalization=population: 4 directions need more than 3 devices",
        {"personalization": "population", "cohort.size": 3},
    ),
]
