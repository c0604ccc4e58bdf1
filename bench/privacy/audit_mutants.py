"""Mutants that the audit itself must detect, and mutants of the audit and of the reporting of ε."""

from __future__ import annotations

from bench.privacy.mutants import Mutant

_BROKEN = "tests/simulations/test_broken.py"
_HONEST = f"{_BROKEN}::test_honest_source_passes"
_FIT = "tests/privacy/audit/test_goodness_of_fit.py"
_FOUND = f"{_FIT}::test_broken_noise_is_detected_by_its_test"
_BOUNDS = "tests/privacy/audit/test_empirical.py"
_VERDICTS = "tests/simulations/audit/test_verdicts.py"

AUDIT_MUTANTS = (
    Mutant(
        "noise 3 % low",
        "privacy/bounded_sum.py",
        "return noise_multiplier * self.resolution",
        "return 0.97 * noise_multiplier * self.resolution",
        f"{_HONEST}[plain]",
    ),
    Mutant(
        "round noise 3 % low",
        "privacy/bounded_sum.py",
        "return noise_multiplier * self.resolution",
        "return 0.97 * noise_multiplier * self.resolution",
        f"{_BROKEN}::test_round_without_replies_is_noised",
    ),
    Mutant(
        "sums not reset",
        "privacy/dp_sgd.py",
        "        self._values[index] = 0.0\n        if self._steps is None:\n",
        "        if self._steps is None:\n",
        f"{_HONEST}[steps]",
    ),
    Mutant(
        "no noise on empty batches",
        "privacy/dp_sgd.py",
        "if self._noise_multipliers[client]:",
        "if self._noise_multipliers[client] and row.any():",
        f"{_HONEST}[few]",
    ),
    Mutant(
        "half the noise on long releases",
        "privacy/bounded_sum.py",
        "return (self.steps + noise)",
        "return (self.steps + noise // (1 + (len(noise) > 100_000)))",
        f"{_HONEST}[long]",
    ),
    Mutant(
        "other pictures than drawn",
        "training/batches.py",
        "pictures = poisson_sample(self._job.pictures, privacy.sampling_rate, noise).numpy()",
        "drawn = poisson_sample(self._job.pictures, privacy.sampling_rate, noise).numpy()\n"
        "        pictures = (drawn + 1) % self._job.pictures",
        f"{_HONEST}[plain]",
    ),
    Mutant(
        "noise of the previous round",
        "strategies/central_dp.py",
        "        noise = self._noise(round)\n",
        "        noise = self._noise(round // 2)\n",
        f"{_BROKEN}::test_round_without_replies_is_noised",
    ),
    Mutant(
        "one-sided variance test",
        "privacy/audit/goodness_of_fit.py",
        "p_value = 2 * min(chi2.cdf(total, len(numbers)), chi2.sf(total, len(numbers)))",
        "p_value = chi2.sf(total, len(numbers))",
        f"{_FOUND}[3 % low]",
    ),
    Mutant(
        "correlation only at short lags",
        "privacy/audit/goodness_of_fit.py",
        "lags = np.argsort(scores)[-_CANDIDATES:]",
        "lags = np.argsort(scores[:_CANDIDATES])",
        f"{_FOUND}[second half a copy]",
    ),
    Mutant(
        "copy with random signs missed",
        "privacy/audit/goodness_of_fit.py",
        'autocorrelation(_normal_from_squares(numbers), "of the squares")',
        'autocorrelation(numbers, "of the squares")',
        f"{_FOUND}[second half a copy with random signs]",
    ),
    Mutant(
        "no correction for multiple lags",
        "privacy/audit/goodness_of_fit.py",
        "p_value = min(1.0, 2 * len(sums) * p_values[best])",
        "p_value = p_values[best]",
        f"{_FIT}::test_battery_accepts_standard_normal_numbers",
    ),
    Mutant(
        "batch sizes not randomized within steps",
        "privacy/audit/goodness_of_fit.py",
        "below + (up_to - below) * generator.random(len(sizes))",
        "(below + up_to) / 2",
        f"{_FIT}::test_poisson_batches_transform_to_normal",
    ),
    Mutant(
        "NaN p-value passes",
        "simulations/audit/verdicts.py",
        "if not check.p_value > self.significance",
        "if check.p_value <= self.significance",
        f"{_VERDICTS}::test_one_failed_test_fails_the_audit",
    ),
    Mutant(
        "false alarms not divided among tests",
        "simulations/audit/verdicts.py",
        "return self.false_alarms / len(self.checks)",
        "return self.false_alarms",
        f"{_VERDICTS}::test_one_failed_test_fails_the_audit",
    ),
    Mutant(
        "false alarms not divided among situations",
        "simulations/audit/run.py",
        "return config.false_alarm_rate / (claims + noise_situations)",
        "return config.false_alarm_rate / (claims or 1)",
        f"{_VERDICTS}::test_shares_add_up_to_the_false_alarms",
    ),
    Mutant(
        "failed situation ignored",
        "simulations/audit/verdicts.py",
        " and all(test.sound for test in self.noise_tests)",
        "",
        f"{_VERDICTS}::test_one_failed_test_fails_the_audit",
    ),
    Mutant(
        "shortfall at power one half",
        "privacy/audit/goodness_of_fit.py",
        "/ chi2.ppf(power, count)))",
        "/ chi2.ppf(0.5, count)))",
        f"{_FIT}::test_shortfall_is_detected_with_stated_power",
    ),
    Mutant(
        "guessing advantage overestimated",
        "privacy/audit/empirical.py",
        "chance = (1 + tradeoff.advantage(event)) / 2",
        "chance = tradeoff.advantage(event)",
        f"{_BOUNDS}::test_half_noise_is_refuted_and_honest_is_not[4.0]",
        "integration",
    ),
    Mutant(
        "claim refuted at the bounds' confidence",
        "privacy/audit/empirical.py",
        "(1 - confidence) / tests, false_alarms / tests",
        "(1 - confidence) / tests, (1 - confidence) / tests",
        f"{_BOUNDS}::test_chance_excess_does_not_refute",
    ),
    Mutant(
        "influence on other examples ignored",
        "simulations/audit/batch_independence.py",
        "1.0 if moved <= TOLERANCE else 0.0",
        "1.0",
        f"{_VERDICTS}::test_dependence_between_pictures_fails",
    ),
    Mutant(
        "large delta reported without strict epsilon",
        "privacy/accounting.py",
        "    if guarantee.delta <= STRICT_DELTA:\n        return guarantee\n",
        "    return guarantee\n",
        "tests/privacy/test_accounting.py::test_large_delta_is_shown_with_strict_delta",
    ),
    Mutant(
        "strict epsilon of one round less",
        "strategies/phases/training.py",
        "strict=self.explained(start.number, evaluated",
        "strict=self.explained(start.number - 1, evaluated",
        "tests/strategies/round/test_ledger_coverage.py::test_excessive_report_sets_no_guarantee",
    ),
    Mutant(
        "strict epsilon per device missing",
        "server/ledger.py",
        "guarantees = [with_strict(epsilon(history, budget.delta, DEVICE), history) for history in events]",
        "guarantees = [epsilon(history, budget.delta, DEVICE) for history in events]",
        "tests/server/test_ledger.py::test_unplanned_evaluations_are_charged",
    ),
)
