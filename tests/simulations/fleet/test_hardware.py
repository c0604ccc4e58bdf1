"""Hardware of a fleet's profiles, and the initial state of its devices."""

from dataclasses import replace

import pytest

from client.planning.plan_search import pass_seconds
from common.errors import AntherError
from conf.schemas.planning import device_profile
from models.base.base import Base, load
from models.diffusion.sites import ATTENTION
from models.families.known import find_base
from models.footprint.footprint import example_shapes, footprint, meta_denoiser
from privacy.storage import FileStorage
from simulations.fleet.costs import build_costs
from simulations.fleet.hardware import build_hardware, profile_cycle
from simulations.fleet.participants import participants
from simulations.fleet.virtual_fleet import build_virtual_fleet
from tests.helpers.configs import compose
from tests.helpers.fleet import PLAN
from tests.helpers.timed_fleet import COSTS


def test_profiles_are_assigned_by_count():
    fleet = compose("fleet=week").fleet
    cycle = profile_cycle(fleet)
    assert len(cycle) == sum(profile.count for profile in fleet.profiles) == 10
    assert [cycle.count(profile) for profile in fleet.profiles] == [profile.count for profile in fleet.profiles]


@pytest.mark.integration
def test_unstated_hardware_is_predicted():
    phone = "{name: p, device: pixel8, uplink_mbps: 1, downlink_mbps: 1"
    fleet = compose(f"'fleet.profiles=[{phone}}},{phone}, memory_gib: 1, examples_per_second: 0.5, watts: 2}}]'").fleet
    unstated, stated = build_hardware(fleet, COSTS, 3)
    device = device_profile("pixel8")
    assert (unstated.memory_gib, unstated.watts) == (device.memory_gib, device.watts_busy)
    assert unstated.examples_per_second == pytest.approx(1 / COSTS.example_seconds(3, device))
    assert (stated.memory_gib, stated.examples_per_second, stated.watts) == (1, 0.5, 2)
    assert stated.known_device.memory_gib == 1
    assert stated.seconds(PLAN, COSTS) == pytest.approx(PLAN.steps * PLAN.batch_size / 0.5)
    with pytest.raises(AntherError, match=r"fleet\.profiles: p: device=toaster: no such device"):
        build_hardware(compose(f"'fleet.profiles=[{phone.replace('pixel8', 'toaster')}}}]'").fleet, COSTS, 3)


@pytest.mark.integration
def test_initial_state_follows_seed_and_trace(base: Base, tmp_path):
    (tmp_path / "trace.csv").write_text("device,on,off\nx,0,3600\n")

    config = compose("fleet=week data.writers=10")
    people = participants(config, base, lambda name: FileStorage(tmp_path / name))
    costs = build_costs(base, config.base, config.fleet.workload, rank=config.adapter.shared.rank)

    def devices(seed=0, **changes):
        return build_virtual_fleet(replace(config.fleet, **changes), people, tmp_path, seed=seed).devices

    first, again, other = devices(), devices(), devices(seed=1)
    assert all(
        device.power_model.capacity is None or 0.3 <= device.state.charge / device.power_model.capacity <= 1
        for device in first.values()
    )
    states = [[device.state_at(80_000.0) for device in fleet.values()] for fleet in (first, again, other)]
    assert states[0] == states[1] != states[2]
    for device in first.values():
        rate = 1 / costs.example_seconds(8, device.hardware.known_device)
        assert device.hardware.examples_per_second == pytest.approx(rate)
    traced = devices(trace=str(tmp_path / "trace.csv"))
    assert {device.availability.plugged(1800.0) for device in traced.values()} == {True}
    assert {device.availability.plugged(7200.0) for device in traced.values()} == {False}


@pytest.mark.integration
def test_stated_rate_holds_for_its_base_only(base: Base):
    """For another base or resolution the rate is predicted as by `client.cli.plan`."""
    fleet = compose("fleet=mixed").fleet
    glyphs = load("glyphs", sites=r".*\.attn[12]\.to_(q|k|v|out\.0)")
    stated = build_hardware(fleet, COSTS, 3, glyphs)
    assert [kind.examples_per_second for kind in stated] == [25, 56, 77, 47, 110, 140]
    assert not any(kind.predicted for kind in stated)
    larger = load("glyphs", sites="conv_in", resolution=2 * glyphs.resolution)
    for other in (base, larger):
        for kind in build_hardware(fleet, COSTS, 3, other):
            assert kind.predicted
            assert kind.device is not None
            assert kind.examples_per_second == pytest.approx(1 / COSTS.example_seconds(3, kind.device))
            assert (kind.memory_gib, kind.watts) == (kind.profile.memory_gib, kind.profile.watts)


@pytest.mark.integration
def test_stated_rate_without_base_always_holds(base: Base):
    own = "{name: p, memory_gib: 1, examples_per_second: 0.5, watts: 2, uplink_mbps: 1, downlink_mbps: 1}"
    (kind,) = build_hardware(compose(f"'fleet.profiles=[{own}]'").fleet, COSTS, 3, base)
    assert (kind.examples_per_second, kind.predicted) == (0.5, False)
    with pytest.raises(AntherError, match="measured_on=glyphs of p: name its hardware too"):
        compose(f"'fleet.profiles=[{own[:-1]}, measured_on: glyphs}}]'")


@pytest.mark.stress
def test_stable_diffusion_on_pi_takes_planned_time():
    """About 106 s a step at 512 pixels."""
    (pi,) = [p for p in compose("fleet=pis").fleet.profiles if p.name == "pi4_4gb"]
    known = find_base("sd15")
    denoiser = meta_denoiser(known, sites=ATTENTION, weights="int8", checkpointing="block")
    predicted = footprint(denoiser, *example_shapes(known, 512), rank=8)
    assert 60 < pass_seconds(predicted, device_profile(pi.device or "")) < 200
