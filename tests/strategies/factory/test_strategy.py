"""Strategies built from configurations."""

import pytest

from bench.lib.tiny import ATTENTION, save_pipeline
from common.errors import AntherError
from models.base.base import load
from privacy.accounting import DEVICE, PoissonGaussian, epsilon
from privacy.noise import SecureNoise, SimulatedNoise
from privacy.storage import FileStorage
from server.ledger import ServerLedger
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.factory.aggregation import build_aggregation, build_server_optimizer
from strategies.factory.combination import check_configuration
from strategies.factory.full_plan import training_plan
from strategies.factory.selection import build_selection
from strategies.factory.strategy import build
from strategies.planning.full import FullPlanning
from strategies.registry import AGGREGATIONS, ROBUST_RULES
from strategies.robust.krum import MultiKrum
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.selection.deadline import Deadline
from strategies.selection.eafl import EAFL
from strategies.selection.eligible import Eligibility
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.everyone import Everyone
from strategies.selection.oort import Oort
from strategies.selection.poisson import Poisson
from strategies.selection.power_of_choice import PowerOfChoice
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM, FedOpt
from tests.helpers.configs import compose
from tests.helpers.fleet import SITES, bases_file
from tests.helpers.fleet import strategy as strategy_of
from tests.helpers.samples import sampled


def test_aggregation_by_name():
    assert isinstance(build_aggregation(compose("aggregation=exact")), Exact)
    assert isinstance(build_aggregation(compose("aggregation=fedit")), FedIT)


@pytest.mark.integration
@pytest.mark.parametrize("strategy", AGGREGATIONS)
def test_every_aggregation_builds(strategy, tmp_path):
    option = f"adapter.lora_xs_bases={bases_file(tmp_path)} adapter.shared.rank=3" if strategy == "fedsb" else ""
    config = compose(f"aggregation={strategy} cohort.size=2 {option}")
    build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False).summary()
    assert type(build_aggregation(config)) is AGGREGATIONS[strategy]


def test_max_rank_below_the_rank_is_refused():
    config = compose("aggregation=exact aggregation.max_rank=2 adapter.shared.rank=8")
    with pytest.raises(AntherError, match=r"^aggregation\.max_rank=2: .*adapter\.shared\.rank=8"):
        build_aggregation(config)


def test_rank_slices():
    assert build_aggregation(compose("aggregation=exact aggregation.weighting=rank_slice")).by_slice
    assert not build_aggregation(compose("aggregation=exact")).by_slice


@pytest.mark.parametrize(("name", "kind", "rate"), [("fedavgm", FedAvgM, 1.0), ("fedyogi", FedOpt, 0.003)])
def test_server_optimizer_by_name(name, kind, rate):
    config = compose(f"aggregation=exact server_optimizer={name}")
    optimizer = build_server_optimizer(config)
    assert type(optimizer) is kind
    assert optimizer._lr == rate
    with pytest.raises(AntherError, match=r"server_optimizer: .*; use aggregation=exact or fedit"):
        check_configuration(compose(f"aggregation=flora server_optimizer={name}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "aggregation=exact adapter.shared.optimizer=sgd",
            "exact rotates or replaces the factors; use aggregation=fedit",
        ),
        ("aggregation=fedsvd adapter.shared.optimizer=sgd", "fedsvd rotates or replaces the factors"),
        ("aggregation=rolora adapter.shared.optimizer=sgd", "rolora rotates or replaces the factors"),
        ("aggregation=hetlora adapter.shared.optimizer=sgd", "a plain mean, and hetlora is not"),
        ("aggregation=fedit", r"set adapter\.shared\.optimizer=sgd"),
        ("aggregation=fedit adapter.shared.optimizer=sgd privacy=device", "use privacy=example or none"),
        (
            "aggregation=fedit adapter.shared.optimizer=sgd robust=[norm_bound]",
            "an update that a robust rule removes",
        ),
        ("aggregation=fedit adapter.shared.optimizer=sgd round_loop=async", "rounds overlap; use sync"),
        ("aggregation=fedit adapter.shared.optimizer=sgd planning=device", r"use planning=full"),
    ],
)
def test_scaffold_conflicts_are_refused(overrides, message):
    with pytest.raises(AntherError, match=rf"drift_correction=scaffold: .*{message}"):
        check_configuration(compose(f"drift_correction=scaffold {overrides}"))


SCAFFOLD = "aggregation=fedit drift_correction=scaffold adapter.shared.optimizer=sgd"


def test_plan_has_the_optimizer_settings():
    plan = training_plan(
        compose(
            "aggregation=fedit drift_correction=scaffold adapter.shared.optimizer=sgd adapter.shared.proximal_mu=0.5"
        ),
        run="r",
        base="b",
    )
    assert (plan.scaffold, plan.optimiser, plan.proximal) == (True, "sgd", 0.5)


def test_scaffold_requires_full_precision_downloads():
    config = compose(f"{SCAFFOLD} compression.download=int8")
    with pytest.raises(AntherError, match=r"compression\.download=int8: .*use compression\.download=fp32"):
        build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)


def test_entrywise_rules_exclude_server_optimizers():
    config = compose("aggregation=fedit server_optimizer=fedavgm robust=[krum]")
    check_configuration(config)
    config = compose("aggregation=fedit server_optimizer=fedavgm robust=[krum,median]")
    with pytest.raises(AntherError, match=r"server_optimizer: .*without median or trimmed_mean"):
        check_configuration(config)


def test_no_server_optimizer_by_default():
    assert build_server_optimizer(compose("")) is None


def test_rank_of_entrywise_rules():
    """It is limited as that of the aggregation."""
    for words, rank in (("exact", 16), ("exact aggregation.max_rank=null", None), ("flora", None), ("fedit", 8)):
        assert build_aggregation(compose(f"aggregation={words} robust=[median]"))._rank == rank


@pytest.mark.parametrize(
    ("overrides", "trained", "evaluated"),
    [
        ("", 20, 20),
        ("cohort.size=5", 5, 5),
        ("cohort.size=5 cohort.eval_size=7", 5, 7),
        ("cohort.eval_size=7", 20, 7),
    ],
)
def test_numbers_of_selected_devices(overrides, trained, evaluated):
    config = compose(overrides)
    federated = build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False)
    names = [str(number) for number in range(20)]
    for number in (1, 2):
        selected = [
            selection.select(names, draw=number)
            for selection in (federated.cohort.rule.selection, federated.evaluation.rule.selection)
        ]
        assert [len(names) for names in selected] == [trained, evaluated]
    if trained == evaluated == 5:
        assert selected[0] != selected[1]  # the samples are independent


def test_plan_without_privacy():
    plan = training_plan(compose("privacy=none adapter.shared.steps=7"), run="r", base="b")
    assert (plan.run, plan.base, plan.steps, plan.privacy) == ("r", "b", 7, None)


@pytest.mark.integration
def test_noise_is_solved_for_all_rounds():
    config = compose("privacy=example privacy.epsilon=4 rounds=5 adapter.shared.steps=3 data.train=16")
    private = training_plan(config, run="r", base="b").privacy
    assert private.sampling_rate == config.adapter.shared.batch_size / 16
    event = PoissonGaussian(noise_multiplier=private.noise_multiplier, sampling_rate=private.sampling_rate, steps=5 * 3)
    assert 0.99 * 4 <= epsilon([event], private.delta).value <= 4


def test_sampling_rate_is_at_most_one():
    config = compose("privacy=example adapter.shared.batch_size=8 data.train=5")
    assert training_plan(config, run="r", base="b").privacy.sampling_rate == 1.0


def private(overrides, folder, *, accept_simulated=True):
    """Make the strategy of these settings, with a ledger."""
    config = compose(overrides)
    plan = training_plan(config, run="r", base="b")
    return build(config, plan, SITES, accept_simulated=accept_simulated, ledger=ServerLedger(FileStorage(folder)))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("target", "sigma"),
    sampled([(1, 2.06), (4, 0.91), (8, 0.66)], [(8, 0.66)]),
)
def test_noise_of_a_secret_sample(tmp_path, target, sigma):
    """100 devices, 10 per round, 50 rounds, δ = 1e-3."""
    selected = (
        f"aggregation=fedit privacy=device privacy.epsilon={target} rounds=50 data.writers=100 cohort.sampling_rate=0.1"
    )
    level = private(selected, tmp_path).central_dp
    assert level.mechanism.noise_multiplier == pytest.approx(sigma, rel=0.05)
    assert level.mechanism.expected == pytest.approx(10)
    assert (level.sampling_rate, level.budget.participations) == (0.1, None)


@pytest.mark.parametrize(
    ("overrides", "steps", "expected"),
    [
        ("rounds=10", 10, 20),
        ("rounds=10 cohort.size=5", 10, 5),
        ("rounds=10 cohort.size=5 privacy.device.max_participations=5", 5, 5),
        ("rounds=5 cohort.size=5 privacy.device.max_participations=10", 5, 5),
    ],
)
def test_participations_are_charged_without_amplification(tmp_path, overrides, steps, expected):
    """Reference values for ε = 8 and δ = 1e-3: σ = 1.07 for 5 participations, 1.52 for 10."""
    level = private(f"aggregation=fedit privacy=device {overrides}", tmp_path).central_dp
    assert level.mechanism.noise_multiplier == pytest.approx({5: 1.07, 10: 1.52}[steps], rel=0.05)
    assert (level.mechanism.expected, level.sampling_rate, level.budget.participations) == (expected, 1.0, steps)


EVALUATED = "rounds=4 private_eval.interval=2 private_eval.noise_multiplier=2"
EVALUATIONS = PoissonGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=2)


def test_central_evaluation_is_part_of_the_budget(tmp_path):
    level = private(f"aggregation=fedit privacy=device {EVALUATED}", tmp_path).central_dp
    assert level.budget.other_releases == (EVALUATIONS,)
    training = PoissonGaussian(noise_multiplier=level.mechanism.noise_multiplier, sampling_rate=1.0, steps=4)
    assert 0.99 * 8 <= epsilon([training, EVALUATIONS], 1e-3, DEVICE).value <= 8


@pytest.mark.integration
def test_local_evaluation_is_part_of_the_budget():
    config = compose(f"privacy=example {EVALUATED}")
    plan, steps = training_plan(config, run="r", base="b").privacy, 4 * config.adapter.shared.steps
    training = PoissonGaussian(noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=steps)
    assert 0.99 * 8 <= epsilon([training, EVALUATIONS], 1e-3).value <= 8


def test_device_level_has_its_own_epsilon_and_delta(tmp_path):
    settings = "privacy.epsilon=4 privacy.delta=1e-3 privacy.device.epsilon=6 privacy.device.delta=1e-4"
    budget = private(f"aggregation=fedit privacy=device {settings}", tmp_path).central_dp.budget
    assert (budget.epsilon, budget.delta) == (6, 1e-4)


@pytest.mark.integration
def test_reproducible_noise_requires_a_test(tmp_path):
    overrides = "aggregation=fedit privacy=device cohort.sampling_rate=0.5"
    for accept_simulated, kind in ((True, SimulatedNoise), (False, SecureNoise)):
        federated = private(overrides, tmp_path, accept_simulated=accept_simulated)
        assert isinstance(federated.central_dp._noise(1), kind)
        assert isinstance(federated.cohort.rule.selection, Poisson)
        assert isinstance(federated.cohort.rule.selection._rng(1), kind)
    noise = private(overrides, tmp_path).central_dp._noise
    assert noise(1).rounded_gaussian(3, 1e9).tolist() == noise(1).rounded_gaussian(3, 1e9).tolist()
    assert noise(1).rounded_gaussian(3, 1e9).tolist() != noise(2).rounded_gaussian(3, 1e9).tolist()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("aggregation=exact", r"exact is not linear in the updates: .*docs/privacy\.md"),
        (
            "aggregation=fedit cohort.sampling_rate=0.5 privacy.device.max_participations=2",
            r"participations=2: with cohort\.sampling_rate .*null",
        ),
        (
            "aggregation=fedit privacy.device.max_participations=2 rounds=4",
            r"2: 20 devices are too few for 4 rounds of 20",
        ),
        ("aggregation=fedit privacy.device.target_quantile=0.5 cohort.size=4", r"quantile=0\.5: too few devices"),
    ],
)
def test_conflicts_are_refused_in_one_line(tmp_path, overrides, message):
    with pytest.raises(AntherError, match=message) as caught:
        private(f"privacy=device {overrides}", tmp_path)
    assert "\n" not in str(caught.value)


def test_sampling_rate_and_size_exclude_each_other():
    with pytest.raises(AntherError, match=r"cohort\.sampling_rate=0\.5 cohort\.size=2: choose one"):
        compose("cohort.sampling_rate=0.5 cohort.size=2")


def test_device_level_requires_a_ledger():
    config = compose("aggregation=fedit privacy=device")
    with pytest.raises(ValueError, match="ledger"):
        build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)


def test_plan_has_the_update_precision():
    def plan(overrides):
        training = training_plan(compose(overrides), run="r", base="b")
        return training.update, training.keep, training.feedback

    assert plan("") == ("fp32", 1.0, False)
    assert plan("aggregation=fedit") == ("fp32", 1.0, False)
    assert plan("aggregation=exact compression.upload=int8") == ("int8", 1.0, False)  # directions rotate
    assert plan("aggregation=fedit compression.upload=fp16") == ("fp16", 1.0, True)
    assert plan("aggregation=fedit compression.upload=int4 compression.keep_fraction=0.5") == ("int4", 0.5, True)
    with pytest.raises(AntherError, match=r"compression\.keep_fraction=0\.5: .*; use aggregation=fedit"):
        check_configuration(compose("aggregation=exact compression.upload=int4 compression.keep_fraction=0.5"))


def test_lora_xs_bases_are_for_fedsb(tmp_path):
    for text, message in (
        (f"aggregation=fedit adapter.lora_xs_bases={bases_file(tmp_path)}", "fedit trains no cores .*; set it to null"),
        ("aggregation=fedsb adapter.lora_xs_bases=null", "aggregation=fedsb requires one"),
    ):
        config = compose(f"{text} adapter.shared.rank=3")
        with pytest.raises(AntherError, match=message):
            build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)


@pytest.mark.parametrize("strategy", sorted(AGGREGATIONS.keys()))
def test_keep_fraction_requires_stable_factors(strategy):
    config = compose(f"aggregation={strategy} compression.upload=int4 compression.keep_fraction=0.5")
    if AGGREGATIONS[strategy].stable_factors:
        assert training_plan(config, run="r", base="b").feedback
    else:
        with pytest.raises(
            AntherError, match=r"compression\.keep_fraction=0\.5: the residual can't be used in a later round"
        ):
            check_configuration(config)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ("", Everyone),
        ("cohort.size=2", Sample),
        ("cohort.sampling_rate=0.5", Poisson),
        ("cohort.size=2 selection=oort", Oort),
        ("cohort.size=2 selection=round_robin", RoundRobin),
        ("cohort.size=2 selection=eafl", EAFL),
        ("cohort.size=2 selection=deadline planning.deadline=9", Deadline),
        ("cohort.size=2 selection=power_of_choice", PowerOfChoice),
        ("cohort.size=2 selection=energy_delay", EnergyDelay),
    ],
)
def test_selection_by_name(overrides, kind):
    assert type(build_selection(compose(overrides), seed=0)) is kind


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("selection=oort", r"selection=oort requires cohort\.size"),
        ("selection=eafl cohort.sampling_rate=0.5", r"selection=eafl requires cohort\.size"),
        ("selection=deadline cohort.size=2", r"requires planning\.deadline"),
        ("privacy=example selection=power_of_choice cohort.size=2", "by reported losses only"),
        ("privacy=device aggregation=fedit selection=eafl cohort.size=2", "by battery charge"),
        (
            "privacy=device aggregation=fedit planning.max_battery_fraction=0.1",
            r"private with privacy=device; use planning\.max_joules",
        ),
    ],
)
def test_selection_conflicts_are_refused(tmp_path, overrides, message):
    with pytest.raises(AntherError, match=message) as caught:
        private(overrides, tmp_path)
    assert "\n" not in str(caught.value)


def test_limits_and_eligibility():
    settings = (
        "cohort.eligibility.min_battery=0.4 cohort.eligibility.idle=true cohort.max_state_age=30 planning.max_joules=7"
    )
    config = compose(f"{settings} planning.max_battery_fraction=0.1 planning.deadline=9")
    federated = build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False)
    assert federated.cohort.rule.eligibility == Eligibility(idle=True, battery=0.4)
    assert federated.cohort.rule.max_state_age == 30
    limits = federated.cohort.planner.limits
    assert (limits.joules, limits.battery_share, limits.deadline) == (7, 0.1, 9)
    assert isinstance(federated.cohort.planner.method, FullPlanning)


@pytest.mark.integration
def test_site_selector_uses_costs_of_the_base(tmp_path):
    config = compose("planning=device adapter.shared.rank=4")
    plan = training_plan(config, run="r", base="b")
    with pytest.raises(ValueError, match="planning=device"):
        build(config, plan, SITES, accept_simulated=False)
    base = load(str(save_pipeline(tmp_path)), sites=ATTENTION)
    costs = build(config, plan, base.sites, accept_simulated=False, base=base).cohort.planner.method.costs
    assert {site.name for site in costs.sites} == set(base.sites)
    assert costs.work(list(base.sites)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("strategy", "rules"),
    [("fedsa", sorted(ROBUST_RULES)), ("hetlora", ["geometric_median", "norm_bound"])],
)
def test_ineffective_robust_rules_are_refused(strategy, rules):
    """FedSA-LoRA has no product at the server, and HetLoRA's weights undo a norm bound."""
    for rule in rules:
        config = compose(f"aggregation={strategy} 'robust=[{rule}]'")
        with pytest.raises(AntherError, match=rf"robust: {rule} .*; (remove it, or )?use "):
            build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)
    assert isinstance(build_aggregation(compose("aggregation=hetlora 'robust=[krum]'")), RobustAggregation)


def test_robust_aggregation_requires_products():
    rule = RobustAggregation(FedSA(), rules=[MultiKrum(outlier_fraction=0.2)], entrywise=None, rank=None, seed=0)
    with pytest.raises(ValueError, match="krum compares products, and with aggregation=fedsa every device keeps its"):
        strategy_of(aggregation=rule)
