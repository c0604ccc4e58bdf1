"""Check that plans hold under a hard memory limit.

For every device profile, a step of the chosen plan runs in a new process whose memory is limited to the profile's. The
nearest better option that was refused for its memory runs without a limit, since a planner that refuses a fitting
option is too conservative. Weights are random, which doesn't change the cost of a step.

    anther bench limits [--base sd15] [--devices pi4_2gb …] [key=value …]

The limit is enforced twice: by the kernel, where a memory control group can be created, and by this process, which
kills a process whose resident memory, including pages of mapped files, exceeds it when sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.lib.machine import machine, versions
from bench.memory import predicted, published_bases
from bench.memory.predicted import NETWORKS, RUNTIME, FootprintCase, MeasuredStep
from client.cli.plan import predictor, site_pattern, training_settings
from client.planning.plan_search import FootprintPredictor, TrainingOption, TrainingSetting, search_plans
from common import low_memory
from common.units import GIB, MIB
from conf.schemas.planning import PlanConfig, compose_plan, devices
from models.base.pack import pack
from models.footprint.footprint import Footprint

MIN_REFUSED_SHARE = 0.9  # smallest share of the limit that a refused option must use
GROUPS = Path("/sys/fs/cgroup")
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class LimitTrial:
    """Chosen option of a device, and the nearest better option, which was refused."""

    device: str
    limit: int  # bytes
    chosen: TrainingOption
    above: TrainingOption | None  # None: no better option was refused for its memory

    @property
    def cases(self) -> list[tuple[TrainingOption, int | None]]:
        """Options to run, each with its limit in bytes."""
        return [(self.chosen, self.limit), *([(self.above, None)] if self.above else [])]


def compose_device_plan(overrides: Sequence[str], device: str, runtime_mib: float) -> PlanConfig:
    """Compute the plan of a device whose runtime takes as much memory as this machine's.

    Args:
        overrides: overrides of the plan.
        device: name of the device profile.
        runtime_mib: memory of the runtime in MiB.
    """
    plan = compose_plan([*overrides, f"device={device}"], Path())
    return replace(plan, device=replace(plan.device, runtime_mib=runtime_mib))


def runtime_bytes() -> int:
    """Measure the bytes of a process on this machine besides the network, like `bench.memory.predicted`."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_base(RUNTIME.network, Path(folder), {RUNTIME.weights})
        measured_step = measure_step(RUNTIME, Path(folder), None)
    assert measured_step is not None
    return measured_step.peak_bytes - predicted.predict(RUNTIME).peak_bytes


def find_trials(plans: Sequence[PlanConfig]) -> list[LimitTrial]:
    """Find the options of devices that differ only in their profile; each footprint is predicted only once."""
    known: dict[TrainingSetting, Footprint] = {}

    def cached(predict: FootprintPredictor) -> FootprintPredictor:
        def cached_predict(setting: TrainingSetting) -> Footprint:
            footprint = known.get(setting) or predict(setting)
            if footprint.activations_bytes:  # otherwise the base was already too large for this device
                known[setting] = footprint
            return footprint

        return cached_predict

    base = NETWORKS[plans[0].base]
    return [
        select_trial(plan, *search_plans(training_settings(base), plan, cached(predictor(base, plan))))
        for plan in plans
    ]


def select_trial(plan: PlanConfig, rungs: Sequence[TrainingOption], best: int | None) -> LimitTrial:
    """Return the chosen option, and the nearest better one that was refused for its memory.

    Args:
        plan: the device's plan.
        rungs: options in order of preference.
        best: index of the chosen option; None: none fits.
    """
    if best is None:
        raise SystemExit(f"device={plan.device.name}: no option fits")
    refused = [rung for rung in rungs[:best] if (rung.blocked or "").startswith("memory")]
    return LimitTrial(
        plan.device.name, int(plan.device.memory_gib * GIB), rungs[best], refused[-1] if refused else None
    )


def footprint_case(plan: PlanConfig, rung: TrainingOption) -> FootprintCase:
    """Convert an option to a case of `bench.memory.predicted`."""
    setting = rung.setting
    return FootprintCase(
        plan.base,
        setting.resolution,
        setting.weights,
        setting.checkpointing,
        setting.batch,
        plan.rank,
        site_pattern(setting.sites),
    )


def measure_step(footprint_case: FootprintCase, folder: Path, limit: int | None) -> MeasuredStep | None:
    """Measure a step of a packed base in a new process.

    Args:
        footprint_case: network and options of the step.
        folder: folder of the packed bases.
        limit: memory limit in bytes; None: no limit.

    Returns:
        Peak and seconds; None if the process was killed for exceeding the limit.
    """
    command = [
        sys.executable,
        "-m",
        "bench.memory.limits",
        "--folder",
        str(folder),
        "--step",
        json.dumps(asdict(footprint_case)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **low_memory.ENVIRONMENT}
    output = run_limited(command, limit, environment)
    return None if output is None else MeasuredStep(*json.loads(output.strip().splitlines()[-1]))


def run_limited(command: Sequence[str], limit: int | None, environment: dict[str, str]) -> str | None:
    """Run a command under a memory limit, and return its output.

    Args:
        command: the command.
        limit: limit in bytes; None: no limit.
        environment: environment of the process.

    Returns:
        The output; None if the process was killed for exceeding the limit.

    Raises:
        RuntimeError: the command failed for another reason.
    """
    with control_group(limit) as group, tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        enter = None if group is None else lambda: (group / "cgroup.procs").write_text("0")
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, preexec_fn=enter)
        ended = False
        while process.poll() is None:
            if limit is not None and resident(process.pid) > limit:
                process.kill()
                ended = True
            time.sleep(POLL_SECONDS)
        if ended or (limit is not None and process.returncode == -9):
            return None
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {errors.read()[-2000:]}")
        return output.read()


@contextmanager
def control_group(limit: int | None) -> Iterator[Path | None]:
    """Create a memory control group with this limit; None without a limit, or if none can be created."""
    unified = (GROUPS / "cgroup.controllers").exists()
    group = GROUPS / ("" if unified else "memory") / f"anther-{os.getpid()}"
    limits = {"memory.max": limit, "memory.swap.max": 0} if unified else {"memory.limit_in_bytes": limit}
    created = limited = False
    try:
        if limit is not None:
            group.mkdir()
            created = True
            for name, value in limits.items():
                (group / name).write_text(str(value))
            limited = True
    except OSError:  # no permission
        pass
    try:
        yield group if limited else None
    finally:
        if created:
            group.rmdir()


def resident(process: int) -> int:
    """Return the resident bytes of a process; 0 once it has exited."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def result_row(
    trial: LimitTrial, measured: dict[tuple[TrainingOption, int | None], MeasuredStep | None]
) -> dict[str, Any]:
    """Convert the results of one device to a row of the result file."""
    step = measured[trial.chosen, trial.limit]
    above = measured[trial.above, None] if trial.above else None
    ran = step is not None and step.peak_bytes <= trial.limit  # sampling may miss a short peak
    return {
        "device": trial.device,
        "limit_bytes": trial.limit,
        "chosen": asdict(trial.chosen.setting),
        "predicted_bytes": trial.chosen.footprint.peak_bytes,
        "ran": ran,
        "peak_bytes": step.peak_bytes if step else None,
        "above": asdict(trial.above.setting) if trial.above else None,
        "above_predicted_bytes": trial.above.footprint.peak_bytes if trial.above else None,
        "above_peak_bytes": above.peak_bytes if above else None,
        "above_share": above.peak_bytes / trial.limit if above else None,
        "sound": ran and (above is None or above.peak_bytes > MIN_REFUSED_SHARE * trial.limit),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of all devices in MiB."""
    result = Table(title="One step under a profile's memory limit, and the memory of the refused option above it; MiB")
    for heading in (
        "device",
        "limit",
        "plan",
        "predicted",
        "peak",
        "refused above",
        "predicted",
        "peak",
        "of limit",
        "",
    ):
        result.add_column(heading, justify="left" if heading in ("device", "plan", "refused above") else "right")
    for row in rows:
        result.add_row(
            row["device"],
            _mib(row["limit_bytes"]),
            _describe(row["chosen"]),
            _mib(row["predicted_bytes"]),
            _mib(row["peak_bytes"]) if row["ran"] else "ended",
            _describe(row["above"]),
            _mib(row["above_predicted_bytes"]),
            _mib(row["above_peak_bytes"]),
            f"{row['above_share']:.0%}" if row["above"] else "",
            "sound" if row["sound"] else "NOT SOUND",
        )
    return result


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:,.0f}"


def _describe(setting: dict[str, Any] | None) -> str:
    if setting is None:
        return "–"
    return "{resolution}² {sites} {weights} {checkpointing} ×{batch}".format(**setting)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, and return the exit status: 1 if a plan exceeds its limit, or if a refused option would
    fit."""
    parser = argparse.ArgumentParser(prog="anther bench limits", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of client.cli.plan: rank, pictures, …")
    parser.add_argument("--base", default="sd15", choices=NETWORKS)
    parser.add_argument("--devices", nargs="+", default=devices(), choices=devices())
    parser.add_argument("--folder", type=Path, help="folder that keeps the packed base for later runs")
    parser.add_argument("--output", type=Path, default=Path("bench/results/limits.json"))
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.step:
        torch.set_num_threads(1)
        with low_memory.imports():
            print(json.dumps(predicted.measure_case(FootprintCase(**json.loads(args.step)), args.folder)))
        return 0
    runtime = runtime_bytes() / MIB
    plans = {name: compose_device_plan([f"base={args.base}", *args.overrides], name, runtime) for name in args.devices}
    tried = dict(zip(plans, find_trials(list(plans.values())), strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        modes = {rung.setting.weights for limit_trial in tried.values() for rung, _ in limit_trial.cases}
        prepare_base(args.base, folder, modes)
        measured: dict[tuple[FootprintCase, int | None], MeasuredStep | None] = {}
        rows = []
        for name, limit_trial in tried.items():
            for rung, limit in limit_trial.cases:
                key = footprint_case(plans[name], rung), limit
                if key not in measured:  # several devices may have the same case
                    measured[key] = measure_step(key[0], folder, limit)
            measured_options = {
                (rung, limit): measured[footprint_case(plans[name], rung), limit] for rung, limit in limit_trial.cases
            }
            rows.append(result_row(limit_trial, measured_options))
            print(json.dumps(rows[-1]), file=sys.stderr)
    Console(width=170).print(table(rows))
    sound = all(each["sound"] for each in rows)
    with control_group(2**40) as group:
        kept_by = ["resident memory, every 20 ms", *(["memory control group"] if group else [])]
    record = {
        "command": shlex.join(
            ["python", "-m", "bench.memory.limits", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "machine": machine(torch.device("cpu")),
        "versions": versions("torch", "diffusers"),
        "kept_by": kept_by,
        "sound": sound,
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if sound else 1


def prepare_base(base: str, folder: Path, modes: set[str]) -> None:
    """Write the base with random weights, and pack it in the modes that are missing.

    Args:
        base: key of `NETWORKS`.
        folder: folder for the source and the packed bases.
        modes: modes to pack.
    """
    missing = sorted(mode for mode in modes if not (folder / mode).exists())
    if missing and not (folder / "source").exists():
        published_bases.write_base(NETWORKS[base], folder / "source")
    for mode in missing:
        pack(str(folder / "source"), folder / mode, mode)


if __name__ == "__main__":
    sys.exit(main())
