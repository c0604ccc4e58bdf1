"""Federated LoRA with DP from published recipes, on Flower's Ray simulation.

    anther bench ray_recipe --form published|tuned

Follows the documentation of diffusers, peft, Opacus and Flower: a diffusers UNet with peft's LoRA, Opacus' hooks and
DPOptimizer, stock FedAvg of A and B, and one client at a time in each of Ray's processes. The workload is that of
`bench.throughput.recipes`; pictures and captions are encoded before the timing starts.

    published  loads the base for every message, as in Flower's FlowerTune recipe, with Flower's default of two cores
               per client
    tuned      keeps the base in each process; one process per core, with one thread

The last line of output is JSON with seconds: `startup` until the first round begins, `rounds`, `total` of both, and
`clients`, the time in clients' code, summed over clients.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads its variables on import, here and in actors
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; avoids its warning

import numpy as np
import psutil
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from bench.lib.workloads import EXAMPLES, PRIVACY, SITES
from bench.throughput.peers import OpacusPeer, add_lora
from common.seeding import derive_seed
from models.diffusion.objective import diffusion
from models.files import assets
from training.jobs import Examples

CLIENTS, STEPS, SEED = 20, 4, 0
RESOURCES: dict[str, Any] = {"published": {"num_cpus": 2}, "tuned": {"num_cpus": 1}}


def prepare(folder: Path) -> None:
    """Encode the pictures of the first writers into a file of latents and text embeddings for each."""
    from models.base.base import load
    from typefaces import dataset

    base = load("glyphs", sites=SITES)
    for client, writer in enumerate(dataset.load("development", assets.locate("typefaces"))[:CLIENTS]):
        indices = dataset.split(writer.order, EXAMPLES).train
        latents = base.encode_images([writer.images[i] for i in indices])
        context = base.encode_captions([dataset.caption(dataset.GLYPHS[i]) for i in indices])
        np.savez(folder / f"{client}.npz", latents=latents.numpy(), context=context.numpy())


def network() -> Any:
    """Load the frozen UNet of the base."""
    return UNet2DConditionModel.from_pretrained(assets.locate("glyphs") / "unet").requires_grad_(False)


def new_peer(examples: Examples) -> OpacusPeer:
    """Load a UNet with LoRA and Opacus' hooks."""
    scheduler: Any = DDIMScheduler.from_pretrained(assets.locate("glyphs") / "scheduler")
    schedule = diffusion(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    return OpacusPeer(network(), examples, schedule, factors="fp32")


def process_peer(examples: Examples) -> OpacusPeer:
    """Return this process's peer with an optimizer state independent of the previous client."""
    peer = _cached_peer()
    peer.examples = examples
    peer.optimizer.original_optimizer.state.clear()
    return peer


@functools.cache
def _cached_peer() -> OpacusPeer:
    torch.set_num_threads(1)
    return new_peer(Examples(torch.empty(0), torch.empty(0)))


def train(form: str, folder: Path, message: Message, context: Context) -> Message:
    """Run a few steps of DP-SGD from the received factors, as the ClientApp.

    Args:
        form: `published` or `tuned`.
        folder: folder of the encoded pictures.
        message: the server's message with factors.
        context: Flower's context, which contains the client's partition.
    """
    started = time.perf_counter()
    client = int(context.node_config["partition-id"])
    torch.manual_seed(derive_seed(SEED, client, message.content["config"]["server-round"]))
    with np.load(folder / f"{client}.npz") as file:
        examples = Examples(torch.from_numpy(file["latents"]), torch.from_numpy(file["context"]))
    peer = process_peer(examples) if form == "tuned" else new_peer(examples)
    unet: Any = peer.unet._module
    set_peft_model_state_dict(unet, message.content.array_records["arrays"].to_torch_state_dict())
    for _ in range(STEPS):
        peer.step((torch.rand(EXAMPLES) < PRIVACY.sampling_rate).nonzero().flatten())
    metrics = MetricRecord({"num-examples": EXAMPLES, "seconds": time.perf_counter() - started})
    arrays = ArrayRecord(get_peft_model_state_dict(unet))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def sum_seconds(replies: list[RecordDict], _: str) -> MetricRecord:
    """Sum the time in clients' code. Raises if a client failed, since FedAvg would omit it from the average."""
    if len(replies) < CLIENTS:
        raise RuntimeError(f"{CLIENTS - len(replies)} of {CLIENTS} clients failed")
    spent: list[Any] = [reply["metrics"]["seconds"] for reply in replies]
    return MetricRecord({"seconds": sum(spent)})


def simulate(form: str, rounds: int, folder: Path) -> tuple[list[float], float]:
    """Run the simulation.

    Args:
        form: `published` or `tuned`.
        rounds: number of rounds.
        folder: folder of the encoded pictures.

    Returns:
        Times (by time.time()) at which the first round began and each round ended, and seconds in clients' code.
    """
    server, client = ServerApp(), ClientApp()
    ends: list[float] = []
    spent: list[Any] = []

    def clock(_round: int, _arrays: ArrayRecord) -> None:
        ends.append(time.time())

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        unet = network()
        add_lora(unet, "fp32")
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS, train_metrics_aggr_fn=sum_seconds)
        result = strategy.start(
            grid, ArrayRecord(get_peft_model_state_dict(unet)), num_rounds=rounds, evaluate_fn=clock
        )
        spent.extend(metrics["seconds"] for metrics in result.train_metrics_clientapp.values())

    client.train()(functools.partial(train, form, folder))
    run_simulation(server, client, CLIENTS, backend_config={"client_resources": RESOURCES[form]})
    return ends, sum(spent)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=RESOURCES, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prepare", type=Path, help="only encode the pictures into this folder")
    args = parser.parse_args(arguments)
    if args.prepare:
        prepare(args.prepare)
        return
    born = psutil.Process().create_time()
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        command = [sys.executable, "-m", "bench.throughput.ray_recipe", "--form", args.form, "--prepare", folder]
        subprocess.run(command, check=True)  # in its own process, so that this one stays free of its modules
        preparing = time.time() - started
        ends, clients = simulate(args.form, args.rounds, Path(folder))
    startup = ends[0] - born - preparing
    rounds = [after - started for started, after in pairwise(ends)]
    print(json.dumps({"startup": startup, "rounds": rounds, "total": startup + sum(rounds), "clients": clients}))


if __name__ == "__main__":
    from bench.throughput import ray_recipe

    ray_recipe.main()
