"""Mutants that break a privacy guarantee by a change of the source, each with the test that must detect it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A text that occurs once in a file, its replacement, the test that then fails, and the tier of that test."""

    name: str
    file: str
    old: str
    new: str
    test: str
    tier: str = "unit"


_NOISE = "tests/privacy/test_noise.py"
_LATTICE = "tests/privacy/test_lattice.py"

EXAMPLE_MUTANTS = (
    Mutant(
        "noise off",
        "privacy/bounded_sum.py",
        "return (self.steps + noise)",
        "return (self.steps + 0 * noise)",
        "tests/privacy/test_bounded_sum.py::test_noise_statistics",
    ),
    Mutant(
        "noise × 0.25",
        "privacy/bounded_sum.py",
        "return noise_multiplier * self.resolution",
        "return 0.25 * noise_multiplier * self.resolution",
        "tests/privacy/test_bounded_sum.py::test_stddev_is_sigma_times_the_norm",
    ),
    Mutant(
        "clip off",
        "privacy/dp_sgd.py",
        ".clamp_max(1.0)\n",
        ".clamp_max(1.0).fill_(1.0)\n",
        "tests/privacy/test_dp_sgd.py::test_sums_of_many_units_are_exact",
    ),
    Mutant(
        "noise multiplicity counted as K examples",
        "training/batches.py",
        "weights=np.full(len(draw_numbers), 1 / draws),\n            per_unit=draws,",
        "weights=np.full(len(draw_numbers), 1 / draws),\n            per_unit=1,",
        "tests/training/test_batches.py::test_empty_poisson_batch_is_empty[no prior]",
    ),
    Mutant(
        "realized batch size as divisor",
        "training/cohort.py",
        "resident.pending = batch.size\n",
        "resident.pending = batch.size\n"
        "            self.buffers.divisors[row] = max(1, batch.size // batch.per_unit)\n",
        "tests/training/test_cohort.py::test_private_cohort_matches_reference[64]",
        "integration",
    ),
    Mutant(
        "number of pictures as divisor",
        "training/buffers.py",
        "[job.batch_size if job.privacy else 1.0]",
        "[job.pictures if job.privacy else 1.0]",
        "tests/training/test_cohort.py::test_private_cohort_matches_reference[64]",
        "integration",
    ),
    Mutant(
        "pass size equal to batch size",
        "training/cohort.py",
        "self.queue.pop(size).padded(size)",
        "self.queue.pop(size)",
        "tests/training/test_batch_independence.py::test_added_picture_changes_sum_by_its_own_gradient[cpu]",
    ),
    Mutant(
        "pass size from the number of pictures",
        "training/public_schedule.py",
        "assumed_pictures = max(1, sum(job.assumed_pictures for job in jobs))",
        "assumed_pictures = max(1, sum(job.pictures for job in jobs))",
        "tests/training/test_public_schedule.py::test_size_depends_on_the_plan_only",
    ),
    Mutant(
        "number of passes from the batches",
        "training/public_schedule.py",
        "units = min(batch.size // batch.per_unit, self._turns.max_pictures(self._left))",
        "units = batch.size // batch.per_unit",
        "tests/training/test_public_schedule.py::test_overflow_keeps_duration_and_initial_adapter[16]",
    ),
    Mutant(
        "schedule too short",
        "training/public_schedule.py",
        "budget = -math.log(steps * TRUNCATION_DELTA) + 1e-6 * steps",
        "budget = 1.0",
        "tests/training/test_public_schedule.py::test_turns_suffice_except_with_charged_probability",
    ),
    Mutant(
        "truncated batches not charged",
        "privacy/accounting.py",
        "uncut -= TRUNCATION_DELTA * event.steps",
        "uncut -= 0.0 * event.steps",
        "tests/privacy/test_accounting.py::test_truncation_is_subtracted_from_delta",
    ),
    Mutant(
        "private reply sent without waiting",
        "client/rounds/train.py",
        "device.wait(trained.idle)",
        "device.wait(0.0)",
        "tests/client/rounds/test_handler.py::test_private_reply_waits_for_public_time",
    ),
    Mutant(
        "evaluation without padding pictures",
        "client/rounds/evaluate.py",
        "padded = _padded(chunk, min(AT_ONCE, privacy.pictures - start))",
        "padded = chunk",
        "tests/client/rounds/test_evaluate.py::test_only_a_noised_gain_is_sent",
    ),
    Mutant(
        "loss averaged over the batch",
        "training/batches.py",
        "weights=np.full(len(draw_numbers), 1 / draws),\n",
        "weights=np.full(len(draw_numbers), 1 / max(1, len(draw_numbers))),\n",
        "tests/training/test_batches.py::test_private_draws_are_independent_of_the_batch",
    ),
    Mutant(
        "shuffle accounted as Poisson",
        "training/batches.py",
        "self._poisson() if self._job.privacy else",
        "self._shuffled() if self._job.privacy else",
        "tests/training/test_batches.py::test_empty_poisson_batch_is_empty",
    ),
    Mutant(
        "batches of fixed size accounted as Poisson",
        "privacy/noise.py",
        "joins = first < threshold\n",
        "joins = np.argsort(np.argsort(first)) < round(rate * size)\n",
        f"{_NOISE}::test_poisson_batches_have_the_rate",
    ),
    Mutant(
        "personal adapter in the private forward pass",
        "client/rounds/train.py",
        "frozen=frozen,",
        "frozen=kept.adapter if (kept := device.store.personal(device.sites)) else None,",
        "tests/client/rounds/test_handler.py::test_personal_adapter_stays_out_of_shared_job",
    ),
    Mutant(
        "random streams keyed by position",
        "training/batches.py",
        "counter_rng.child(self._names[pictures], self._step)",
        "counter_rng.child(counter_rng.child(self._key, pictures), self._step)",
        "tests/training/test_batches.py::test_removing_pictures_keeps_the_draws_of_others",
    ),
    Mutant(
        "noise seed shared between devices",
        "privacy/noise.py",
        'derive_seed(seed, client, round, purpose, "privacy")',
        'derive_seed(seed, round, purpose, "privacy")',
        f"{_NOISE}::test_simulated_noise_is_keyed",
    ),
    Mutant(
        "secure noise from a seed",
        "privacy/noise.py",
        "np.frombuffer(os.urandom(8 * size), dtype=np.uint64)",
        "np.random.default_rng(0).integers(0, 2**64, size, dtype=np.uint64)",
        f"{_NOISE}::test_secure_noise_has_no_seed",
    ),
    Mutant(
        "secure noise from NumPy's generator",
        "privacy/noise.py",
        "np.frombuffer(os.urandom(8 * size), dtype=np.uint64)",
        "np.random.default_rng().integers(0, 2**64, size, dtype=np.uint64)",
        f"{_NOISE}::test_secure_noise_uses_only_system_bytes",
    ),
    Mutant(
        "cosines in both halves of the noise",
        "privacy/noise.py",
        "np.stack([np.cos(angle), np.sin(angle)])",
        "np.stack([np.cos(angle), np.cos(angle)])",
        f"{_NOISE}::test_noise_has_no_autocorrelation[secure]",
    ),
    Mutant(
        "noise that repeats every 65,536 numbers",
        "privacy/noise.py",
        "torch.from_numpy(samples[:size])",
        "torch.from_numpy(np.resize(samples[:65536], size))",
        f"{_NOISE}::test_noise_has_no_autocorrelation[secure]",
    ),
    Mutant(
        "noise repeated with opposite sign",
        "privacy/noise.py",
        "torch.from_numpy(samples[:size])",
        "torch.from_numpy(np.concatenate([samples[: -(-size // 2)], -samples[: size // 2]]))",
        f"{_NOISE}::test_noise_has_no_autocorrelation[secure]",
    ),
    Mutant(
        "float16 noise",
        "privacy/noise.py",
        "torch.from_numpy(samples[:size])",
        "torch.from_numpy("
        "np.rint((samples[:size] / stddev).astype(np.float16).astype(float) * stddev).astype(np.int64))",
        f"{_NOISE}::test_extreme_uniforms_are_resolved",
    ),
    Mutant(
        "float32 noise",
        "privacy/noise.py",
        "torch.from_numpy(samples[:size])",
        "torch.from_numpy("
        "np.rint((samples[:size] / stddev).astype(np.float32).astype(float) * stddev).astype(np.int64))",
        f"{_NOISE}::test_extreme_uniforms_are_resolved",
    ),
    Mutant(
        "float32 noise on the gain",
        "privacy/noised_gain.py",
        "clipped_sum(gains, clip).add_noise(noise_multiplier, noise)",
        "clipped_sum(gains, clip).add("
        "(noise_multiplier * STEPS_PER_CLIP * noise.rounded_gaussian(1, 2.0**23).float().double() / 2**23).round())",
        f"{_LATTICE}::test_gain_noise_has_resolution_of_its_steps",
    ),
    Mutant(
        "undecided roundings not refined",
        "privacy/noise.py",
        "undecided = np.flatnonzero(~decided)",
        "undecided = np.flatnonzero(~decided)[:0]",
        f"{_NOISE}::test_extreme_uniforms_are_resolved",
    ),
    Mutant(
        "Bernoulli draws with 53 bits",
        "privacy/noise.py",
        "joins[index] = _bernoulli(rate / _CELL - threshold)",
        "joins[index] = True",
        f"{_NOISE}::test_bernoulli_draw_is_exact",
    ),
    Mutant(
        "batches never empty",
        "privacy/noise.py",
        "return torch.from_numpy(np.flatnonzero(joins))",
        "return torch.from_numpy(np.flatnonzero(joins) if joins.any() or not size else np.zeros(1, np.int64))",
        f"{_NOISE}::test_batch_sizes_are_binomial",
    ),
    Mutant(
        "gradients rounded to nearest",
        "privacy/dp_sgd.py",
        "gradients.trunc_()",
        "gradients.round_()",
        "tests/privacy/test_dp_sgd.py::test_truncation_removes_less_than_a_step",
    ),
    Mutant(
        "gradients not rounded",
        "privacy/dp_sgd.py",
        "        gradients.trunc_()\n",
        "        pass\n",
        f"{_LATTICE}::test_device_release_is_consistent_with_any_pictures",
        "integration",
    ),
    Mutant(
        "integer sums in float32",
        "privacy/dp_sgd.py",
        "sum_segments(part.double(), counts)",
        "sum_segments(part, counts).double()",
        "tests/privacy/test_dp_sgd.py::test_sums_of_many_units_are_exact",
    ),
    Mutant(
        "no part of delta for the sampler",
        "privacy/accounting.py",
        "uncut = delta - SAMPLER_DELTA",
        "uncut = delta",
        "tests/privacy/test_accounting.py::test_sampler_error_is_subtracted_from_delta",
    ),
    Mutant(
        "retrained on a resend",
        "client/rounds/train.py",
        "_identity(plan), echo=request.echo)) is not None:",
        '_identity(plan), echo=request.echo)) == b"":',
        "tests/client/rounds/test_handler.py::test_repeated_request_gets_same_bytes",
    ),
    Mutant(
        "noise redrawn on a resend",
        "privacy/ledger/ledger.py",
        "if entry.state == RESERVED:\n                self._storage.write",
        "if True:\n                self._storage.write",
        "tests/privacy/ledger/test_ledger.py::test_second_seal_returns_the_first_reply",
    ),
    Mutant(
        "dropped device refunded",
        "privacy/ledger/entries.py",
        "return [entry.reservation.mechanism for entry in self.entries.values()]",
        "return [e.reservation.mechanism for e in self.entries.values() if e.state != RESERVED]",
        "tests/client/rounds/test_handler.py::test_failed_training_is_retried_under_its_reservation",
    ),
    Mutant(
        "only the last event composed",
        "privacy/accounting.py",
        "event.sampling_rate] += event.steps",
        "event.sampling_rate] = event.steps",
        "tests/privacy/test_accounting.py::test_composition_of_halves_is_the_whole",
    ),
    Mutant(
        "owner's budget not checked",
        "client/rounds/train.py",
        "ledger.reserve(reservation, device.policy.check_spending, settles=True)",
        "ledger.reserve(reservation, lambda *_: None, settles=True)",
        "tests/client/rounds/test_handler.py::test_owner_budget_ends_run",
    ),
    Mutant(
        "simulated noise on a real device",
        "client/device.py",
        "seed=seed if is_test else None),",
        "seed=seed),",
        "tests/client/test_device.py::test_real_device_uses_secure_noise_and_stored_seed",
    ),
    Mutant(
        "simulated noise reported as a release",
        "client/rounds/train.py",
        "release=noise.release,\n        seconds=cost.seconds,",
        "release=True,\n        seconds=cost.seconds,",
        "tests/client/rounds/test_handler.py::test_simulated_noise_is_no_release",
    ),
    Mutant(
        "simulated noise recorded as a release",
        "client/rounds/train.py",
        "clip=private.clip if private else None,\n        release=release,\n    )\n\n\n@lru_cache",
        "clip=private.clip if private else None,\n        release=True,\n    )\n\n\n@lru_cache",
        "tests/client/rounds/test_handler.py::test_simulated_noise_is_no_release",
    ),
    Mutant(
        "simulated noise accepted by a real server",
        "strategies/round/validation.py",
        "if not (reply.release or self.accept_simulated):",
        "if not (reply.release or True):",
        "tests/strategies/test_strategy.py::test_simulated_noise_is_no_release",
    ),
    Mutant(
        "residual of an unsent reply enters the next",
        "client/rounds/train.py",
        "if sealed is not packed:\n        return _unpack(sealed)",
        "if sealed is not packed:\n        save_round_state(device, upload)\n        return _unpack(sealed)",
        "tests/client/rounds/test_upload.py::test_residual_of_replying_process_is_kept",
    ),
    Mutant(
        "residual of simulated noise enters a release",
        "client/rounds/upload.py",
        "plan.privacy is None, release)",
        "plan.privacy is None)",
        "tests/client/rounds/test_upload.py::test_simulated_residual_never_enters_release",
    ),
    Mutant(
        "residual of a non-private round enters a private one",
        "client/rounds/upload.py",
        "plan.privacy is None, release)",
        "release)",
        "tests/client/rounds/test_upload.py::test_residual_never_enters_private_round_after_reset",
    ),
    Mutant(
        "quantization residual used in two rounds",
        "client/rounds/upload.py",
        "return stored.left if stored.round == last else {}",
        "return stored.left",
        "tests/client/rounds/test_upload.py::test_rolled_back_server_gets_no_residual_twice",
    ),
    Mutant(
        "training loss reported without noise",
        "client/rounds/train.py",
        "loss=None if plan.privacy else trained.loss,",
        "loss=trained.loss,",
        "tests/client/rounds/test_handler.py::test_private_round",
    ),
    Mutant(
        "gain reported without noise",
        "privacy/noised_gain.py",
        "clipped_sum(gains, clip).add_noise(noise_multiplier, noise)",
        "clipped_sum(gains, clip).add(torch.zeros(1))",
        "tests/privacy/test_noised_gain.py::test_noise_has_the_charged_stddev",
    ),
    Mutant(
        "gain divided by the number of pictures",
        "privacy/noised_gain.py",
        "add_noise(noise_multiplier, noise)) / count",
        "add_noise(noise_multiplier, noise)) / max(1, len(list(gains)))",
        "tests/privacy/test_noised_gain.py::test_noise_follows_from_sensitivity_and_public_divisor",
    ),
    Mutant(
        "losses of pictures in a shared pass",
        "training/inference.py",
        "size = min(timesteps, _max_pass_size(base, pools, adapters, memory))\n"
        "    entries = torch.arange(len(noise_index) * timesteps).split(timesteps)",
        "size = _max_pass_size(base, pools, adapters, memory)\n"
        "    entries = [torch.arange(len(noise_index) * timesteps)]",
        "tests/training/test_inference.py::test_no_pass_holds_two_examples",
    ),
)

DEVICE_MUTANTS = (
    Mutant(
        "noise off",
        "privacy/bounded_sum.py",
        "return (self.steps + noise)",
        "return (self.steps + 0 * noise)",
        "tests/privacy/test_bounded_sum.py::test_noise_statistics",
    ),
    Mutant(
        "noise × 0.25",
        "privacy/bounded_sum.py",
        "return noise_multiplier * self.resolution",
        "return 0.25 * noise_multiplier * self.resolution",
        "tests/privacy/test_bounded_sum.py::test_stddev_is_sigma_times_the_norm",
    ),
    Mutant(
        "clip off",
        "privacy/central.py",
        "scale = _SAFETY_FACTOR * min(1.0, clip / norm if norm else 1.0)",
        "scale = _SAFETY_FACTOR",
        "tests/privacy/test_central.py::test_all_devices_have_equal_weight",
    ),
    Mutant(
        "non-finite update not rejected",
        "privacy/central.py",
        "if not math.isfinite(norm):",
        "if norm == math.inf:",
        "tests/privacy/test_central.py::test_sum_matches_loop",
    ),
    Mutant(
        "number of replies as divisor",
        "strategies/central_dp.py",
        "clipped = clip_and_sum(changes(layout, current, trained), charged.clip, layout.size)\n"
        "        released = self.mechanism.release(clipped, charged.noise)",
        "trained = list(trained)\n"
        "        clipped = clip_and_sum(changes(layout, current, trained), charged.clip, layout.size)\n"
        "        released = GaussianMechanism(noise_multiplier=self.mechanism.noise_multiplier, "
        "expected=max(1.0, float(len(trained)))).release(clipped, charged.noise)",
        "tests/strategies/test_central_dp.py::test_dropouts_contribute_zero_and_the_divisor_stays",
    ),
    Mutant(
        "weights by work",
        "strategies/server_update.py",
        "trained = (adapter for adapter, _ in updates.adapters)",
        "trained = (adapter for adapter, _ in updates.adapters for _ in range(rank(adapter)))",
        "tests/strategies/test_central_dp.py::test_release_matches_a_reference_loop",
    ),
    Mutant(
        "weights by order of arrival",
        "privacy/central.py",
        "total += (values * scale / clip * RESOLUTION).long()",
        "total += (values * scale / clip * RESOLUTION * (2 if bool(total.any()) else 1)).long()",
        "tests/privacy/test_central.py::test_all_devices_have_equal_weight",
    ),
    Mutant(
        "sample of fixed size accounted as Poisson",
        "strategies/selection/poisson.py",
        "self._rng(draw).poisson_batch(len(names), self.rate).tolist()",
        "sorted(self._rng(draw).rounded_gaussian(len(names), 1e9).argsort()[: int(self.rate * len(names))].tolist())",
        "tests/strategies/test_poisson.py::test_devices_are_selected_independently",
    ),
    Mutant(
        "amplification by a sample that is not secret",
        "strategies/factory/strategy.py",
        "rate = 1.0 if cohort.sampling_rate is None else cohort.sampling_rate",
        "rate = size / devices if cohort.sampling_rate is None else cohort.sampling_rate",
        "tests/strategies/factory/test_strategy.py::test_participations_are_charged_without_amplification",
    ),
    Mutant(
        "aborted round refunded",
        "server/ledger.py",
        "            if state == RELEASED:\n",
        "            if state == RELEASED or not any(b'\"released\"' in line for line in lines[number:]):\n",
        "tests/server/rounds/test_private_loop.py::test_aborted_round_stays_charged",
    ),
    Mutant(
        "charged after requests are sent",
        "strategies/phases/training.py",
        "        self.update.central_dp.charge_round(round",
        "        selected or self.update.central_dp.charge_round(round",
        "tests/strategies/test_central_dp.py::test_charge_is_stored_before_a_message_is_sent",
    ),
    Mutant(
        "round released twice",
        "strategies/central_dp.py",
        "charged, self._charged = self._charged, None",
        "charged = self._charged",
        "tests/strategies/test_central_dp.py::test_charged_round_is_released_once",
    ),
    Mutant(
        "participations not capped",
        "strategies/central_dp.py",
        "if counts.get(name, 0) < limit}",
        "if counts.get(name, 0) >= 0}",
        "tests/strategies/test_central_dp.py::test_devices_at_their_limit_are_not_asked",
    ),
    Mutant(
        "clip count without noise",
        "privacy/central.py",
        "count = clipped.below.add_noise(2 * self.adaptive.noise_stddev, noise)",
        "count = clipped.below.steps.double() * clipped.below.step",
        "tests/privacy/test_central.py::test_adaptive_clip_matches_the_paper",
    ),
    Mutant(
        "clip count not charged",
        "privacy/central.py",
        "return self.adaptive.noise_multiplier(z) if self.adaptive else z",
        "return z",
        "tests/privacy/test_central.py::test_adaptive_clip_matches_the_paper",
    ),
    Mutant(
        "signal-to-noise ratio before noise",
        "privacy/central.py",
        "signal_to_noise(mean, noise_stddev), next_clip",
        "signal_to_noise(clipped.total.steps * clipped.total.step / self.expected, noise_stddev), next_clip",
        f"{_LATTICE}::test_server_outputs_depend_on_noised_integers_only",
    ),
    Mutant(
        "diagnostic before noise",
        "strategies/central_dp.py",
        '"noise": metrics.deviation}',
        '"noise": metrics.deviation, "moved": float(clipped.total.steps.abs().max())}',
        f"{_LATTICE}::test_server_outputs_depend_on_noised_integers_only",
    ),
    Mutant(
        "updates rounded to nearest",
        "privacy/central.py",
        "(values * scale / clip * RESOLUTION).long()",
        "(values * scale / clip * RESOLUTION).round().long()",
        "tests/privacy/test_central.py::test_removing_device_changes_sum_by_clip_at_most",
        "integration",
    ),
    Mutant(
        "float16 noise",
        "privacy/bounded_sum.py",
        "noise = source.rounded_gaussian(size, self.stddev(noise_multiplier), self.steps.device)",
        "drawn = source.rounded_gaussian(size, 2.0**10, self.steps.device).half().double()\n"
        "        noise = (drawn / 2**10 * self.stddev(noise_multiplier)).round().long()",
        f"{_LATTICE}::test_server_release_is_consistent_with_any_devices",
    ),
    Mutant(
        "simulated noise on a real server",
        "strategies/factory/strategy.py",
        "seed = config.seed if accept_simulated else None",
        "seed = config.seed",
        "tests/strategies/factory/test_strategy.py::test_reproducible_noise_requires_a_test",
        "integration",
    ),
    Mutant(
        "device gains with another round's noise",
        "strategies/round/private_evaluation.py",
        "count=central.devices,\n                noise=central.noise(round),",
        "count=central.devices,\n                noise=central.noise(round + 1),",
        "tests/strategies/round/test_private_evaluation.py::test_gains_with_central_noise",
    ),
)
