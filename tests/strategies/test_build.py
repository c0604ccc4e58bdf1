"""From configuration to strategy."""

import pytest

from bench.lib.tiny import ATTENTION, save_pipeline
from common.errors import AntherError
from conf.compose import compose
from models.base.base import load
from privacy.accounting import DEVICE, PoissonGaussian, epsilon
from privacy.noise import SecureNoise, SimulatedNoise
from privacy.storage import FileStorage
from server.ledger import ServerLedger
from strategies.aggregation.build import aggregation, optimiser
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.flora import FLoRA
from strategies.build import build, combination
from strategies.planning.full_plan import training_plan
from strategies.registry import AGGREGATIONS, ROBUST_RULES, refusal_reason
from strategies.robust.krum import MultiKrum
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.selection.build import selection
from strategies.selection.deadline import Deadline
from strategies.selection.eligible import Eligibility
from strategies.selection.energy import Energy
from strategies.selection.energy_delay import EnergyDelay
from strategies.selection.everyone import Everyone
from strategies.selection.loss_fair import PowerOfChoice
from strategies.selection.oort import Oort
from strategies.selection.poisson import Poisson
from strategies.selection.round_robin import RoundRobin
from strategies.selection.sample import Sample
from strategies.server_optimizers import FedAvgM, FedOpt
from tests.helpers.fleet import SITES, bases_file


def test_the_aggregation_is_the_one_named():
    assert isinstance(aggregation(compose("strategy=exact")), Exact)
    assert isinstance(aggregation(compose("strategy=fedit")), FedIT)
    assert isinstance(aggregation(compose("strategy=fedit strategy.max_rank=8 adapter.shared.rank=8")), FedIT)


@pytest.mark.parametrize("strategy", AGGREGATIONS)
def test_every_shipped_strategy_builds(strategy, tmp_path):
    option = f"adapter.frame={bases_file(tmp_path)} adapter.shared.rank=3" if strategy == "fedsb" else ""
    config = compose(f"strategy={strategy} fleet.sample=2 {option}")
    build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False).summary()
    assert type(aggregation(config)) is AGGREGATIONS[strategy]


@pytest.mark.parametrize("strategy", AGGREGATIONS)
def test_a_cap_below_the_rank_is_refused(strategy):
    with pytest.raises(AntherError, match=r"strategy\.max_rank=2: .*adapter\.shared\.rank=8"):
        aggregation(compose(f"strategy={strategy} strategy.max_rank=2 adapter.shared.rank=8"))


@pytest.mark.parametrize("strategy", sorted(AGGREGATIONS.keys() - {"exact"}))
def test_a_share_of_energy_is_for_the_rule_that_has_one(strategy):
    with pytest.raises(AntherError, match=r"strategy\.energy=0\.9: .*use strategy=exact"):
        aggregation(compose(f"strategy={strategy} strategy.energy=0.9"))


def test_slices_of_rank_are_weighed_by_the_rule_that_has_them():
    assert aggregation(compose("strategy=exact strategy.weights=rank_slice"))._by_slice
    assert not aggregation(compose("strategy=exact"))._by_slice
    with pytest.raises(AntherError, match=r"strategy\.weights=rank_slice: hetlora weighs .*use strategy=exact"):
        aggregation(compose("strategy=hetlora strategy.weights=rank_slice"))


@pytest.mark.parametrize(("name", "kind", "rate"), [("fedavgm", FedAvgM, 1.0), ("fedyogi", FedOpt, 0.003)])
def test_the_servers_optimiser_is_the_one_named(name, kind, rate):
    config = compose(f"strategy=exact strategy.optimiser={name}")
    found = optimiser(config, aggregation(config))
    assert type(found) is kind
    assert found._rate == rate
    with pytest.raises(AntherError, match=rf"strategy\.optimiser={name}: .*use strategy=exact or strategy=fedit"):
        optimiser(config, FLoRA(rank=8, seed=0))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("strategy=exact adapter.shared.optimiser=sgd", "exact turns or changes the factors; use strategy=fedit"),
        ("strategy=fedsvd adapter.shared.optimiser=sgd", "fedsvd turns or changes the factors"),
        ("strategy=rolora adapter.shared.optimiser=sgd", "rolora turns or changes the factors"),
        ("strategy=hetlora adapter.shared.optimiser=sgd", "a plain mean, and hetlora is none"),
        ("strategy=fedit", r"set adapter\.shared\.optimiser=sgd"),
        ("strategy=fedit adapter.shared.optimiser=sgd privacy=device", "use privacy=example or none"),
        ("strategy=fedit adapter.shared.optimiser=sgd strategy.robust=[norm]", "one that strategy.robust leaves out"),
        ("strategy=fedit adapter.shared.optimiser=sgd strategy.timing=async", "rounds overlap; use sync"),
        ("strategy=fedit adapter.shared.optimiser=sgd strategy.planning=device", r"use strategy\.planning=full"),
    ],
)
def test_scaffold_is_refused_where_it_means_nothing(overrides, complaint):
    with pytest.raises(AntherError, match=rf"strategy\.correction=scaffold: .*{complaint}"):
        training_plan(compose(f"strategy.correction=scaffold {overrides}"), run="r", base="b")


def test_a_plan_says_how_devices_take_their_steps():
    plan = training_plan(
        compose("strategy=fedit strategy.correction=scaffold adapter.shared={optimiser:sgd,proximal:0.5}"),
        run="r",
        base="b",
    )
    assert (plan.scaffold, plan.optimiser, plan.proximal) == (True, "sgd", 0.5)


def test_a_control_variate_is_sent_whole():
    shared = "strategy=fedit strategy.correction=scaffold adapter.shared.optimiser=sgd"
    config = compose(f"{shared} strategy.download=int8")
    with pytest.raises(AntherError, match=r"strategy\.download=int8: .*use strategy\.download=fp32"):
        build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)


def test_a_robust_rule_that_goes_by_entries_leaves_no_direction_as_it_was():
    config = compose("strategy=fedit strategy.optimiser=fedavgm strategy.robust=[krum]")
    assert isinstance(optimiser(config, aggregation(config)), FedAvgM)
    config = compose("strategy=fedit strategy.optimiser=fedavgm strategy.robust=[krum,median]")
    with pytest.raises(AntherError, match=r"strategy\.optimiser=fedavgm: .*without median or trimmed"):
        optimiser(config, aggregation(config))


def test_no_optimiser_unless_one_is_named():
    assert optimiser(compose(""), FLoRA(rank=8, seed=0)) is None
    with pytest.raises(AntherError, match=r"strategy\.server_rate=0\.1: without an optimiser .* or leave it null"):
        optimiser(compose("strategy.server_rate=0.1"), FLoRA(rank=8, seed=0))


@pytest.mark.parametrize("robust", ["", "strategy.robust=[krum]"])
def test_a_bound_that_nothing_holds_is_refused(robust):
    with pytest.raises(AntherError, match=r"strategy\.norm_bound=2: .*add norm to strategy\.robust"):
        aggregation(compose(f"strategy.norm_bound=2 {robust}"))
    assert aggregation(compose("strategy.norm_bound=2 strategy.robust=[norm]"))


@pytest.mark.parametrize(
    ("overrides", "trained", "measured"),
    [
        ("", 20, 20),
        ("fleet.sample=5", 5, 5),
        ("fleet.sample=5 fleet.evaluate=7", 5, 7),
        ("fleet.evaluate=7", 20, 7),
    ],
)
def test_how_many_are_asked(overrides, trained, measured):
    config = compose(overrides)
    found = build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False)
    names = [str(number) for number in range(20)]
    for number in (1, 2):
        asked = [selection.select(names, draw=number) for selection in (found._selection, found._evaluation)]
        assert [len(chosen) for chosen in asked] == [trained, measured]
    if trained == measured == 5:
        assert asked[0] != asked[1]  # who trains says nothing of who measures


def test_a_plan_without_privacy():
    plan = training_plan(compose("privacy=none adapter.shared.steps=7"), run="r", base="b")
    assert (plan.run, plan.base, plan.steps, plan.privacy) == ("r", "b", 7, None)


def test_noise_is_solved_for_all_rounds_together():
    config = compose("privacy=example privacy.epsilon=4 rounds=5 adapter.shared.steps=3 data.train=16")
    private = training_plan(config, run="r", base="b").privacy
    assert private.sampling_rate == config.adapter.shared.batch_size / 16
    event = PoissonGaussian(noise_multiplier=private.noise_multiplier, sampling_rate=private.sampling_rate, steps=5 * 3)
    assert 0.99 * 4 <= epsilon([event], private.delta).value <= 4


def test_more_asked_than_there_is_means_everything():
    config = compose("privacy=example adapter.shared.batch_size=8 data.train=5")
    assert training_plan(config, run="r", base="b").privacy.sampling_rate == 1.0


def private(overrides, folder, *, accept_simulated=True):
    """The strategy of these settings, with a ledger."""
    config = compose(overrides)
    plan = training_plan(config, run="r", base="b")
    return build(config, plan, SITES, accept_simulated=accept_simulated, ledger=ServerLedger(FileStorage(folder)))


@pytest.mark.parametrize(
    ("target", "sigma"),
    [pytest.param(1, 2.06, marks=pytest.mark.slow), pytest.param(4, 0.91, marks=pytest.mark.slow), (8, 0.66)],
)
def test_anchor_of_a_secret_sample(tmp_path, target, sigma):
    """A hundred devices, ten a round, fifty rounds, δ = 1e-3. The slow ones: pytest -m slow tests/strategies."""
    asked = f"strategy=fedit privacy=device privacy.epsilon={target} rounds=50 data.writers=100 fleet.rate=0.1"
    level = private(asked, tmp_path).central_dp
    assert level.mechanism.noise_multiplier == pytest.approx(sigma, rel=0.05)
    assert level.mechanism.expected == pytest.approx(10)
    assert (level.sampling_rate, level.budget.participations) == (0.1, None)


@pytest.mark.parametrize(
    ("overrides", "steps", "expected"),
    [
        ("rounds=10", 10, 20),
        ("rounds=10 fleet.sample=5", 10, 5),
        ("rounds=10 fleet.sample=5 privacy.device.participations=5", 5, 5),
        ("rounds=5 fleet.sample=5 privacy.device.participations=10", 5, 5),
    ],
)
def test_without_a_secret_sample_every_participation_is_paid_for_in_full(tmp_path, overrides, steps, expected):
    """Anchors for ε = 8 and δ = 1e-3: 5 participations 1.07, 10 of them 1.52."""
    level = private(f"strategy=fedit privacy=device {overrides}", tmp_path).central_dp
    assert level.mechanism.noise_multiplier == pytest.approx({5: 1.07, 10: 1.52}[steps], rel=0.05)
    assert (level.mechanism.expected, level.sampling_rate, level.budget.participations) == (expected, 1.0, steps)


MEASURED = "rounds=4 privacy.measuring.every=2 privacy.measuring.noise_multiplier=2"
MEASUREMENTS = PoissonGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=2)


def test_what_is_measured_among_devices_is_paid_for_beside(tmp_path):
    level = private(f"strategy=fedit privacy=device {MEASURED}", tmp_path).central_dp
    assert level.budget.beside == (MEASUREMENTS,)
    training = PoissonGaussian(noise_multiplier=level.mechanism.noise_multiplier, sampling_rate=1.0, steps=4)
    assert 0.99 * 8 <= epsilon([training, MEASUREMENTS], 1e-3, DEVICE).value <= 8


def test_what_is_measured_among_pictures_is_paid_for_beside():
    config = compose(f"privacy=example {MEASURED}")
    plan, steps = training_plan(config, run="r", base="b").privacy, 4 * config.adapter.shared.steps
    training = PoissonGaussian(noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=steps)
    assert 0.99 * 8 <= epsilon([training, MEASUREMENTS], 1e-3).value <= 8


def test_each_level_has_its_own_epsilon_and_delta(tmp_path):
    chosen = "privacy.epsilon=4 privacy.delta=1e-3 privacy.device.epsilon=6 privacy.device.delta=1e-4"
    budget = private(f"strategy=fedit privacy=device {chosen}", tmp_path).central_dp.budget
    assert (budget.epsilon, budget.delta) == (6, 1e-4)


def test_only_a_test_has_noise_that_can_be_repeated(tmp_path):
    overrides = "strategy=fedit privacy=device fleet.rate=0.5"
    for accept_simulated, kind in ((True, SimulatedNoise), (False, SecureNoise)):
        federated = private(overrides, tmp_path, accept_simulated=accept_simulated)
        assert isinstance(federated.central_dp._noise(1), kind)
        assert isinstance(federated._selection, Poisson)
        assert isinstance(federated._selection._coins(1), kind)
    noise = private(overrides, tmp_path).central_dp._noise
    assert noise(1).rounded_gaussian(3, 1e9).tolist() == noise(1).rounded_gaussian(3, 1e9).tolist()
    assert noise(1).rounded_gaussian(3, 1e9).tolist() != noise(2).rounded_gaussian(3, 1e9).tolist()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("strategy=exact", r"exact is not linear in the updates: .*docs/privacy\.md"),
        ("strategy=fedit fleet.rate=0.5 privacy.device.participations=2", r"participations=2: with fleet\.rate .*null"),
        ("strategy=fedit privacy.device.participations=2 rounds=4", r"2: 20 devices can't fill 4 rounds of 20"),
        ("strategy=fedit privacy.device.quantile=0.5 fleet.sample=4", r"quantile=0\.5: too few devices"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_line(tmp_path, overrides, said):
    with pytest.raises(AntherError, match=said) as caught:
        private(f"privacy=device {overrides}", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_secret_sample_and_a_fixed_one():
    with pytest.raises(AntherError, match=r"fleet\.rate=0\.5 fleet\.sample=2: choose one"):
        compose("fleet.rate=0.5 fleet.sample=2")


def test_nothing_is_private_per_device_without_a_ledger():
    config = compose("strategy=fedit privacy=device")
    with pytest.raises(ValueError, match="ledger"):
        build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)


def test_a_plan_says_in_which_precision_updates_come_back():
    def plan(overrides):
        found = training_plan(compose(overrides), run="r", base="b")
        return found.update, found.keep, found.feedback

    assert plan("") == ("fp32", 1.0, False)
    assert plan("strategy=fedit") == ("fp32", 1.0, False)
    assert plan("strategy=exact strategy.update=int8") == ("int8", 1.0, False)  # directions turn
    assert plan("strategy=fedit strategy.update=fp16") == ("fp16", 1.0, True)
    assert plan("strategy=fedit strategy.update=int4 strategy.keep=0.5") == ("int4", 0.5, True)
    with pytest.raises(AntherError, match=r"strategy\.keep=0\.5: .*; use strategy=fedit"):
        plan("strategy=exact strategy.update=int4 strategy.keep=0.5")


def test_a_frame_is_for_cores_and_cores_need_one(tmp_path):
    for text, words in (
        (f"strategy=fedit adapter.frame={bases_file(tmp_path)}", "cores are for strategy=fedsb"),
        ("strategy=fedsb adapter.frame=null", "strategy=fedsb needs one"),
    ):
        config = compose(f"{text} adapter.shared.rank=3")
        with pytest.raises(AntherError, match=words):
            build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)


@pytest.mark.parametrize("strategy", sorted(AGGREGATIONS.keys()))
def test_what_is_held_back_is_for_rules_whose_directions_stay(strategy):
    config = compose(f"strategy={strategy} strategy.update=int4 strategy.keep=0.5")
    if AGGREGATIONS[strategy].stable_factors:
        assert training_plan(config, run="r", base="b").feedback
    else:
        with pytest.raises(AntherError, match=r"strategy\.keep=0\.5: what is held back fits no later round"):
            training_plan(config, run="r", base="b")


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ("", Everyone),
        ("fleet.sample=2", Sample),
        ("fleet.rate=0.5", Poisson),
        ("fleet.sample=2 selection=oort", Oort),
        ("fleet.sample=2 selection=round_robin", RoundRobin),
        ("fleet.sample=2 selection=energy", Energy),
        ("fleet.sample=2 selection=deadline strategy.deadline=9", Deadline),
        ("fleet.sample=2 selection=loss_fair", PowerOfChoice),
        ("fleet.sample=2 selection=thrifty", EnergyDelay),
    ],
)
def test_the_selection_is_the_one_named(overrides, kind):
    assert type(selection(compose(overrides), seed=0)) is kind


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("selection=oort", r"selection=oort: .*fleet\.sample"),
        ("selection=energy fleet.rate=0.5", r"selection=energy: .*fleet\.sample"),
        ("selection=deadline fleet.sample=2", r"give strategy\.deadline"),
        ("privacy=example selection=loss_fair fleet.sample=2", "losses that devices told"),
        ("privacy=device strategy=fedit selection=energy fleet.sample=2", "left of batteries"),
        (
            "privacy=device strategy=fedit strategy.battery_share=0.1",
            r"privacy=device hides all .*; use strategy\.joules",
        ),
    ],
)
def test_a_selection_without_what_it_goes_by_is_refused(tmp_path, overrides, said):
    with pytest.raises(AntherError, match=said) as caught:
        private(overrides, tmp_path)
    assert "\n" not in str(caught.value)


def test_limits_and_eligibility_are_what_the_configuration_says():
    chosen = "fleet.eligible.battery=0.4 fleet.eligible.idle=true fleet.report_age=30 strategy.joules=7"
    config = compose(f"{chosen} strategy.battery_share=0.1 strategy.deadline=9")
    found = build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False)
    assert found._eligible == Eligibility(idle=True, battery=0.4)
    assert found._report_age == 30
    limits = found._planner.limits
    assert (limits.joules, limits.battery_share, limits.deadline) == (7, 0.1, 9)
    assert found._planner.fitting is None


def test_sites_are_fitted_by_what_passes_of_the_base_cost(tmp_path):
    config = compose("strategy.planning=device adapter.shared.rank=4")
    plan = training_plan(config, run="r", base="b")
    with pytest.raises(ValueError, match="planning=device"):
        build(config, plan, SITES, accept_simulated=False)
    base = load(str(save_pipeline(tmp_path)), sites=ATTENTION)
    found = build(config, plan, base.sites, accept_simulated=False, base=base)._planner.fitting.costs
    assert {site.name for site in found.sites} == set(base.sites)
    assert found.work(list(base.sites)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("strategy", "rules"),
    [("fedsa", sorted(ROBUST_RULES)), ("hetlora", ["geometric", "norm"])],
)
def test_a_rule_that_would_protect_nothing_is_refused(strategy, rules):
    """Of a B that stays on devices there is no product; what hetlora weighs by its norm nobody holds down."""
    for rule in rules:
        config = compose(f"strategy={strategy} 'strategy.robust=[{rule}]'")
        with pytest.raises(AntherError, match=rf"strategy\.robust: {rule} .*; (leave it out, or )?use "):
            build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=True)
        assert refusal_reason(combination(config)) is not None
    assert isinstance(aggregation(compose("strategy=hetlora 'strategy.robust=[krum]'")), RobustAggregation)


def test_the_last_check_says_so_too():
    with pytest.raises(ValueError, match="no device sends one"):
        RobustAggregation(FedSA(), rules=[MultiKrum(outliers=0.2)], entrywise=None, rank=None, seed=0)
