"""Ways of breaking what is promised, each as a change of the source, and the test that is to notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A text that occurs once in a file, what is put in its place, and the test that fails then."""

    name: str
    file: str
    old: str
    new: str
    test: str


_NEIGHBOURS = "tests/privacy/test_neighbours.py::test_one_picture_moves_each_sum_by_the_clip_at_most"
_NOISE = "tests/privacy/test_noise.py"
_LATTICE = "tests/privacy/test_lattice.py"
_AUDIT = "tests/simulations/test_canaries.py"
_CLIENTS = "tests/simulations/test_canary_clients.py"

OF_PICTURES = (
    Mutant(
        "noise off", "privacy/clipping.py",
        "row.add_(noises[client])", "row.add_(0 * noises[client])",
        f"{_AUDIT}::test_the_honest_loop_is_not_refuted_and_shows_something",
    ),
    Mutant(
        "noise × 0.25", "privacy/clipping.py",
        "return noise_multiplier * RESOLUTION if", "return 0.25 * noise_multiplier * RESOLUTION if",
        f"{_AUDIT}::test_the_honest_loop_is_not_refuted_and_shows_something",
    ),
    Mutant(
        "clip off", "privacy/clipping.py",
        ".clamp_max(1.0)\n", ".clamp_max(1.0).fill_(1.0)\n",
        f"{_NEIGHBOURS}[clipped]",
    ),
    Mutant(
        "K draws counted as K people", "training/batches.py",
        "weights=np.full(len(turns), 1 / draws),\n            per_unit=draws,",
        "weights=np.full(len(turns), 1 / draws),\n            per_unit=1,",
        f"{_NEIGHBOURS}[three draws, some clipped]",
    ),
    Mutant(
        "realised instead of public batch constant", "training/trainer.py",
        "resident.pending = batch.size\n",
        "resident.pending = batch.size\n            self.rows.divisors[row] = max(1, batch.size // batch.per_unit)\n",
        f"{_NEIGHBOURS}[clipped]",
    ),
    Mutant(
        "number of pictures instead of public batch constant", "training/rows.py",
        "[job.batch_size if job.privacy else 1.0]", "[job.pictures if job.privacy else 1.0]",
        f"{_NEIGHBOURS}[clipped]",
    ),
    Mutant(
        "passes as large as batches", "training/trainer.py",
        "self.queue.take(self.size).filled(self.size)", "self.queue.take(self.size)",
        "tests/training/test_company.py::test_one_picture_more_moves_the_sum_by_its_own_alone[cpu]",
    ),
    Mutant(
        "the size of a pass by how many pictures there are", "training/fixed.py",
        "assumed = max(1, sum(job.assumed for job in jobs))", "assumed = max(1, sum(job.pictures for job in jobs))",
        "tests/training/test_fixed.py::test_the_size_is_a_function_of_the_plan",
    ),
    Mutant(
        "a job that takes as many passes as its batches", "training/trainer.py",
        "units = min(batch.size // batch.per_unit, self.turns.holding(self.left))",
        "units = batch.size // batch.per_unit",
        "tests/training/test_schedule.py::test_what_goes_beyond_counts_as_not_drawn",
    ),
    Mutant(
        "a schedule that is often too short", "training/schedule.py",
        "budget = -math.log(steps * OVERFLOW) + 1e-6 * steps", "budget = 1.0",
        "tests/training/test_schedule.py::test_turns_are_enough_but_for_what_is_charged",
    ),
    Mutant(
        "what a schedule cuts isn't charged", "privacy/accounting.py",
        "uncut -= OVERFLOW * event.steps", "uncut -= 0.0 * event.steps",
        "tests/privacy/test_accounting.py::test_what_a_schedule_may_cut_is_kept_back_of_delta",
    ),
    Mutant(
        "a private reply as soon as it is done", "client/train.py",
        "device.wait(trained.idle)", "device.wait(0.0)",
        "tests/client/test_logic.py::test_a_private_reply_waits_for_its_time",
    ),
    Mutant(
        "only the pictures that there are measured", "client/evaluate.py",
        "seen = _filled(some, min(AT_ONCE, privacy.pictures - start))", "seen = some",
        "tests/client/test_evaluate.py::test_a_noised_gain_and_nothing_else",
    ),
    Mutant(
        "loss as the mean of the batch", "training/batches.py",
        "weights=np.full(len(turns), 1 / draws),\n", "weights=np.full(len(turns), 1 / max(1, len(turns))),\n",
        "tests/privacy/test_neighbours.py::test_one_picture_beside_copies_of_another",
    ),
    Mutant(
        "shuffle accounted as Poisson", "training/batches.py",
        "self._poisson() if self._job.privacy else", "self._shuffled() if self._job.privacy else",
        "tests/training/test_batches.py::test_an_empty_poisson_batch_is_empty",
    ),
    Mutant(
        "batches of fixed size accounted as Poisson", "privacy/noise.py",
        "joins = first < whole\n", "joins = np.argsort(np.argsort(first)) < round(rate * size)\n",
        f"{_NOISE}::test_poisson_batches_have_the_rate_and_differ",
    ),
    Mutant(
        "personal adapter in the private forward", "client/train.py",
        "frozen=frozen,",
        "frozen=kept.adapter if (kept := device.store.personal(device.sites)) else None,",
        f"{_NEIGHBOURS}[clipped]",
    ),
    Mutant(
        "streams of a picture by its place", "training/batches.py",
        "streams.child(self._names[pictures], self._step)",
        "streams.child(streams.child(self._key, pictures), self._step)",
        f"{_NEIGHBOURS}[clipped]",
    ),
    Mutant(
        "noise of a seed that another device has too", "privacy/noise.py",
        'stream(seed, client, round, purpose, "privacy")', 'stream(seed, round, purpose, "privacy")',
        f"{_NOISE}::test_simulated_noise_is_keyed",
    ),
    Mutant(
        "secure noise from a seed", "privacy/noise.py",
        "np.frombuffer(os.urandom(8 * size), dtype=np.uint64)",
        "np.random.default_rng(0).integers(0, 2**64, size, dtype=np.uint64)",
        f"{_NOISE}::test_secure_noise_has_no_seed",
    ),
    Mutant(
        "secure noise from NumPy's generator", "privacy/noise.py",
        "np.frombuffer(os.urandom(8 * size), dtype=np.uint64)",
        "np.random.default_rng().integers(0, 2**64, size, dtype=np.uint64)",
        f"{_NOISE}::test_every_byte_of_secure_noise_is_the_operating_systems",
    ),
    Mutant(
        "cosines in both halves of the noise", "privacy/noise.py",
        "np.stack([np.cos(angle), np.sin(angle)])", "np.stack([np.cos(angle), np.cos(angle)])",
        f"{_NOISE}::test_noise_is_white_at_every_lag[secure]",
    ),
    Mutant(
        "noise that repeats every 65,536 numbers", "privacy/noise.py",
        "torch.from_numpy(drawn[:size])", "torch.from_numpy(np.resize(drawn[:65536], size))",
        f"{_NOISE}::test_noise_is_white_at_every_lag[secure]",
    ),
    Mutant(
        "noise that comes back with another sign", "privacy/noise.py",
        "torch.from_numpy(drawn[:size])",
        "torch.from_numpy(np.concatenate([drawn[: -(-size // 2)], -drawn[: size // 2]]))",
        f"{_NOISE}::test_noise_is_white_at_every_lag[secure]",
    ),
    Mutant(
        "float16 noise", "privacy/noise.py",
        "torch.from_numpy(drawn[:size])",
        "torch.from_numpy(np.rint((drawn[:size] / stddev).astype(np.float16).astype(float) * stddev).astype(np.int64))",
        f"{_NOISE}::test_no_number_is_drawn_twice[secure]",
    ),
    Mutant(
        "float32 noise", "privacy/noise.py",
        "torch.from_numpy(drawn[:size])",
        "torch.from_numpy(np.rint((drawn[:size] / stddev).astype(np.float32).astype(float) * stddev).astype(np.int64))",
        f"{_NOISE}::test_no_number_is_drawn_twice[secure]",
    ),
    Mutant(
        "float32 noise on a gain", "privacy/measuring.py",
        "int(noise.rounded_gaussian(1, noise_multiplier * bounded.sensitivity))",
        "round(noise_multiplier * bounded.sensitivity * float(noise.rounded_gaussian(1, 2.0**23).float()) / 2**23)",
        f"{_LATTICE}::test_the_noise_on_a_gain_is_as_fine_as_its_steps",
    ),
    Mutant(
        "numbers that 53 bits leave open are rounded", "privacy/noise.py",
        "undecided = np.flatnonzero(~decided)", "undecided = np.flatnonzero(~decided)[:0]",
        f"{_NOISE}::test_the_ends_of_the_uniforms",
    ),
    Mutant(
        "coins of 53 bits", "privacy/noise.py",
        "joins[index] = _happens(rate / _CELL - whole)", "joins[index] = True",
        f"{_NOISE}::test_a_coin_is_exact",
    ),
    Mutant(
        "batches that are never empty", "privacy/noise.py",
        "return torch.from_numpy(np.flatnonzero(joins))",
        "return torch.from_numpy(np.flatnonzero(joins) if joins.any() or not size else np.zeros(1, np.int64))",
        f"{_NOISE}::test_batches_are_binomial_and_may_be_empty",
    ),
    Mutant(
        "gradients cut to the nearest step", "privacy/clipping.py",
        "gradients.trunc_()", "gradients.round_()",
        "tests/privacy/test_clipping.py::test_a_row_moves_its_owners_sum_by_at_most_the_bound_and_no_other",
    ),
    Mutant(
        "gradients not cut", "privacy/clipping.py",
        "    gradients.trunc_()\n", "",
        f"{_LATTICE}::test_a_device_releases_whole_steps_that_fit_any_pictures",
    ),
    Mutant(
        "sums of integers in float32", "privacy/clipping.py",
        "sum_segments(part.double(), counts)", "sum_segments(part, counts).double()",
        "tests/privacy/test_clipping.py::test_sums_of_many_units_are_exact",
    ),
    Mutant(
        "nothing of delta kept for the sampler", "privacy/accounting.py",
        "uncut = delta - SAMPLING", "uncut = delta",
        "tests/privacy/test_accounting.py::test_a_part_of_delta_covers_the_sampler",
    ),
    Mutant(
        "trained again at a resend", "client/train.py",
        "_identity(plan), echo=request.echo)) is not None:", "_identity(plan), echo=request.echo)) == b\"\":",
        "tests/client/test_logic.py::test_the_same_request_gets_the_same_bytes_and_no_second_training",
    ),
    Mutant(
        "noise redrawn at a resend", "privacy/ledger.py",
        "if entry.state == RESERVED:\n                self._storage.write",
        "if True:\n                self._storage.write",
        "tests/privacy/test_ledger.py::test_a_second_seal_sends_the_first_reply",
    ),
    Mutant(
        "dropped device refunds itself", "privacy/entries.py",
        "return [entry.reservation.mechanism for entry in self.entries.values()]",
        "return [e.reservation.mechanism for e in self.entries.values() if e.state != RESERVED]",
        "tests/client/test_logic.py::test_a_failed_training_stays_charged_and_is_retried_under_its_reservation",
    ),
    Mutant(
        "only the last of several events is composed", "privacy/accounting.py",
        "event.sampling_rate] += event.steps", "event.sampling_rate] = event.steps",
        "tests/privacy/test_accounting.py::test_two_halves_are_the_whole_and_less_than_their_sum",
    ),
    Mutant(
        "owner's cap not asked for", "client/train.py",
        "ledger.reserve(reservation, device.policy.check_spending, settles=True)",
        "ledger.reserve(reservation, lambda *_: None, settles=True)",
        "tests/client/test_logic.py::test_the_owners_cap_ends_the_run",
    ),
    Mutant(
        "simulated noise on a device that declared no test", "client/device.py",
        "seed=seed if is_test else None),", "seed=seed),",
        "tests/client/test_device.py::test_a_real_device_draws_secure_noise_and_keeps_its_seed",
    ),
    Mutant(
        "simulated noise told as a release", "client/train.py",
        "release=noise.release,\n        seconds=spent.seconds,", "release=True,\n        seconds=spent.seconds,",
        "tests/client/test_logic.py::test_simulated_noise_is_no_release",
    ),
    Mutant(
        "simulated noise recorded as a release", "client/train.py",
        "clip=private.clip if private else None,\n        release=release,\n    )\n\n\n@lru_cache",
        "clip=private.clip if private else None,\n        release=True,\n    )\n\n\n@lru_cache",
        "tests/client/test_logic.py::test_simulated_noise_is_no_release",
    ),
    Mutant(
        "simulated noise accepted by a server that is in no test", "strategies/replies.py",
        "if not (reply.release or self.accept_simulated):", "if not (reply.release or True):",
        "tests/strategies/test_federated.py::test_simulated_noise_is_no_release",
    ),
    Mutant(
        "what is left of a reply that was never sent enters the next", "client/train.py",
        "if sealed is not packed:\n        return _unpack(sealed)",
        "if sealed is not packed:\n        keep(device, goes)\n        return _unpack(sealed)",
        "tests/client/test_outgoing.py::test_of_two_processes_what_the_one_left_that_replied_is_kept",
    ),
    Mutant(
        "what simulated noise left enters a release", "client/outgoing.py",
        "plan.privacy is None, release)", "plan.privacy is None)",
        "tests/client/test_outgoing.py::test_simulated_noise_leaves_nothing_to_a_release",
    ),
    Mutant(
        "what an open round left enters a private one", "client/outgoing.py",
        "plan.privacy is None, release)", "release)",
        "tests/client/test_outgoing.py::test_what_an_open_round_left_enters_no_private_one_after_the_ledger_was_reset",
    ),
    Mutant(
        "what rounding left enters two rounds", "client/outgoing.py",
        "return kept.left if kept.round == last else {}", "return kept.left",
        "tests/client/test_outgoing.py::test_killed_at_every_step_nothing_is_sent_twice",
    ),
    Mutant(
        "training loss told without noise", "client/train.py",
        "loss=None if plan.privacy else trained.loss,", "loss=trained.loss,",
        "tests/client/test_logic.py::test_a_private_round",
    ),
    Mutant(
        "gain told without noise", "privacy/measuring.py",
        "return (bounded.steps + drawn) *", "return (bounded.steps + 0 * drawn) *",
        "tests/privacy/test_measuring.py::test_the_noise_is_of_the_size_that_was_paid_for",
    ),
    Mutant(
        "gain divided by the pictures there are", "privacy/measuring.py",
        "* bounded.step / count", "* bounded.step / max(1, len(list(gains)))",
        "tests/privacy/test_measuring.py::test_the_noise_follows_from_the_sensitivity_and_the_divisor_is_public",
    ),
    Mutant(
        "losses of pictures that share a pass", "training/inference.py",
        "size = min(timesteps, _most(base, pools, adapters, memory))\n"
        "    looks = torch.arange(len(place) * timesteps).split(timesteps)",
        "size = _most(base, pools, adapters, memory)\n    looks = [torch.arange(len(place) * timesteps)]",
        "tests/training/test_inference.py::test_no_pass_holds_two_examples",
    ),
)  # fmt: skip

OF_DEVICES = (
    Mutant(
        "noise off", "privacy/sensitivity.py",
        "self.steps + noise.rounded_gaussian(", "self.steps + 0 * noise.rounded_gaussian(",
        f"{_CLIENTS}::test_canary_clients_show_what_is_claimed_and_no_more",
    ),
    Mutant(
        "noise × 0.25", "privacy/sensitivity.py",
        "return noise_multiplier * self.norm", "return 0.25 * noise_multiplier * self.norm",
        f"{_CLIENTS}::test_canary_clients_show_what_is_claimed_and_no_more",
    ),
    Mutant(
        "clip off", "privacy/central.py",
        "scale = _WITHIN * min(1.0, clip / norm if norm else 1.0)", "scale = _WITHIN",
        "tests/privacy/test_central.py::test_one_device_more_or_less_moves_the_sum_by_its_clip_at_most",
    ),
    Mutant(
        "an update that is not finite passes the clip", "privacy/central.py",
        "if not math.isfinite(norm):", "if norm == math.inf:",
        "tests/privacy/test_central.py::test_one_device_more_or_less_moves_the_sum_by_its_clip_at_most",
    ),
    Mutant(
        "replies counted instead of a public constant", "strategies/private.py",
        "clipped = clip_and_sum(changes(layout, current, trained), opened.clip, layout.size)\n"
        "        released = self.mechanism.release(clipped, opened.noise)",
        "trained = list(trained)\n"
        "        clipped = clip_and_sum(changes(layout, current, trained), opened.clip, layout.size)\n"
        "        released = Gaussian(noise_multiplier=self.mechanism.noise_multiplier, "
        "expected=max(1.0, float(len(trained)))).release(clipped, opened.noise)",
        "tests/strategies/test_private.py::test_who_drops_out_contributes_zero_and_the_divisor_stays",
    ),
    Mutant(
        "weights by the work done", "strategies/federated.py",
        "trained = (adapter for adapter, _ in updates)",
        "trained = (adapter for adapter, _ in updates for _ in range(rank(adapter)))",
        "tests/strategies/test_private.py::test_the_release_is_that_of_a_loop",
    ),
    Mutant(
        "weights by the order of arrival", "privacy/central.py",
        "total += (values * scale / clip * RESOLUTION).long()",
        "total += (values * scale / clip * RESOLUTION * (2 if bool(total.any()) else 1)).long()",
        "tests/privacy/test_central.py::test_everybody_weighs_the_same",
    ),
    Mutant(
        "sample of fixed size accounted as Poisson", "strategies/selection/poisson.py",
        "self._coins(draw).poisson_batch(len(names), self.rate).tolist()",
        "sorted(self._coins(draw).rounded_gaussian(len(names), 1e9).argsort()[: int(self.rate * len(names))].tolist())",
        "tests/strategies/test_poisson.py::test_each_by_itself_with_its_rate",
    ),
    Mutant(
        "amplification by a sample that is no secret", "strategies/build.py",
        "rate = 1.0 if fleet.rate is None else fleet.rate",
        "rate = asked / devices if fleet.rate is None else fleet.rate",
        "tests/strategies/test_build.py::test_without_a_secret_sample_every_participation_is_paid_for_in_full",
    ),
    Mutant(
        "aborted round refunded", "server/ledger.py",
        "            if state == RELEASED:\n",
        '            if state == RELEASED or not any(b\'"released"\' in line for line in lines[number:]):\n',
        "tests/server/test_private_loop.py::test_an_aborted_round_stays_charged_and_the_run_ends_a_round_early",
    ),
    Mutant(
        "not charged before anybody is asked", "strategies/federated.py",
        "            self.device_level.open(server_round", "            plans or self.device_level.open(server_round",
        "tests/strategies/test_private.py::test_the_charge_is_on_the_disk_before_a_message_leaves",
    ),
    Mutant(
        "a round released twice", "strategies/private.py",
        "opened, self._open = self._open, None", "opened = self._open",
        "tests/strategies/test_private.py::test_a_round_is_released_once_and_only_if_it_was_charged_for",
    ),
    Mutant(
        "participations not capped", "strategies/private.py",
        "if had.get(name, 0) < most}", "if had.get(name, 0) >= 0}",
        "tests/strategies/test_private.py::test_devices_at_their_cap_are_not_asked",
    ),
    Mutant(
        "count for the clip not noised", "privacy/central.py",
        "count = clipped.below.noised(2 * self.adaptive.deviation, noise)", "count = clipped.below.value",
        "tests/privacy/test_central.py::test_the_clip_follows_the_quantile_as_in_the_paper",
    ),
    Mutant(
        "count for the clip not paid for", "privacy/central.py",
        "return self.adaptive.noise_multiplier(z) if self.adaptive else z", "return z",
        "tests/privacy/test_central.py::test_the_clip_follows_the_quantile_as_in_the_paper",
    ),
    Mutant(
        "signal to noise from before the noise", "privacy/central.py",
        "signal_to_noise(mean, deviation), next_clip",
        "signal_to_noise(clipped.total.steps * clipped.total.step / self.expected, deviation), next_clip",
        f"{_LATTICE}::test_all_that_the_server_tells_is_a_function_of_the_noised_integers",
    ),
    Mutant(
        "a diagnostic from before the noise", "strategies/private.py",
        '"noise": facts.deviation}', '"noise": facts.deviation, "moved": float(clipped.total.steps.abs().max())}',
        f"{_LATTICE}::test_all_that_the_server_tells_is_a_function_of_the_noised_integers",
    ),
    Mutant(
        "updates cut to the nearest step", "privacy/central.py",
        "(values * scale / clip * RESOLUTION).long()", "(values * scale / clip * RESOLUTION).round().long()",
        "tests/privacy/test_central.py::test_one_device_more_or_less_moves_the_sum_by_its_clip_at_most",
    ),
    Mutant(
        "float16 noise", "privacy/sensitivity.py",
        "noise.rounded_gaussian(len(self.steps), stddev)",
        "(noise.rounded_gaussian(len(self.steps), 2.0**10).half().double() / 2**10 * stddev).round().long()",
        f"{_LATTICE}::test_the_server_releases_whole_steps_that_fit_any_devices",
    ),
    Mutant(
        "simulated noise on a real server", "strategies/build.py",
        "seed = config.seed if accept_simulated else None", "seed = config.seed",
        "tests/strategies/test_build.py::test_only_a_test_has_noise_that_can_be_repeated",
    ),
    Mutant(
        "gain of the devices with the noise of another round", "strategies/measuring.py",
        "count=hidden.devices,\n                noise=hidden.noise(round),",
        "count=hidden.devices,\n                noise=hidden.noise(round + 1),",
        "tests/strategies/test_measuring.py::test_gains_that_the_server_noises",
    ),
)  # fmt: skip
