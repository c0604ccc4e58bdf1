"""Membership scores, compared with one picture at a time through an unmodified network with merged weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.lib.tiny import ATTENTION, save_pipeline
from common import counter_rng
from common.seeding import derive_seed
from models.base.base import Base
from models.lora.adapter import Adapter, init_adapter
from models.lora.batched_lora import stack_adapters, to_device
from privacy.audit.membership import AttackTrial, roc
from tests.helpers.reference_trainer import PLENTY, examples, nonzero_adapter, trained_adapter, untouched
from training import membership_scores
from training.cohort import train
from training.jobs import Examples, TrainJob

LOOKS, TIME = 3, 0.3


@pytest.fixture(scope="module", params=["v_prediction", "epsilon"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = save_pipeline(tmp_path_factory.mktemp("attacks"), prediction=request.param)
    return Base(folder, sites=ATTENTION, compute="fp64")


class _SingleExampleScores:
    """Three attacks as defined in their papers, on one picture."""

    def __init__(self, base: Base, adapter: Adapter | None) -> None:
        self.base, self.unet = base, untouched(base.folder, base.full_precision)
        merged = {name: (f.b @ f.a).to(base.full_precision) for name, f in (adapter or {}).items()}
        self.weights = {f"{name}.weight": self.unet.get_parameter(f"{name}.weight") + ba for name, ba in merged.items()}
        self.signals, self.sigmas = base.schedule.signals.double(), base.schedule.sigmas.double()

    def output(self, x: Tensor, t: int, context: Tensor) -> Tensor:
        call = torch.func.functional_call
        return call(
            self.unet, self.weights, (x[None], torch.tensor([t])), {"encoder_hidden_states": context[None]}
        ).sample[0]

    def noise(self, x: Tensor, t: int, context: Tensor) -> Tensor:
        out = self.output(x, t, context)
        if self.base.schedule.prediction == "epsilon":
            return out
        return self.signals[t] * out + self.sigmas[t] * x

    def at(self, x0: Tensor, noise: Tensor, t: int) -> Tensor:
        return self.signals[t] * x0 + self.sigmas[t] * noise

    @torch.no_grad()
    def scores(self, place: int, x0: Tensor, context: Tensor) -> list[float]:
        losses = []
        for look in range(LOOKS):
            t = int((look + 0.5) / LOOKS * len(self.signals))
            key = counter_rng.child(counter_rng.child(derive_seed("membership"), place), look)
            noise = counter_rng.normals(torch.tensor([int(key)]), x0.numel()).to(x0).view_as(x0)
            expected = noise
            if self.base.schedule.prediction != "epsilon":
                expected = self.signals[t] * noise - self.sigmas[t] * x0
            losses.append(float((self.output(self.at(x0, noise, t), t, context) - expected).square().mean()))
        t = int(TIME * len(self.signals))
        start = self.noise(x0, 0, context)
        pia = (self.noise(self.at(x0, start, t), t, context) - start).pow(4).sum()
        return [-float(np.mean(losses)), -float(pia), -float(self.noise(x0, t, context).pow(4).sum())]


@pytest.mark.integration
@pytest.mark.parametrize("adapted", [True, False])
def test_scores_match_the_papers(model: Base, adapted: bool) -> None:
    pool = examples(model, 5, 1)
    adapter = nonzero_adapter(model, 2, 1) if adapted else None
    stacks = to_device(stack_adapters(model.sites, [adapter]), model.like)
    result = membership_scores.scores(model, pool, stacks, timesteps=LOOKS, time=TIME, memory=PLENTY)
    one = _SingleExampleScores(model, adapter)
    expected = [one.scores(index, pool.latents[index], pool.context[index]) for index in range(5)]
    assert np.stack(result, axis=1) == pytest.approx(np.array(expected), rel=1e-6)
    assert all(values.dtype == np.float64 for values in result)


def test_scores_are_independent_of_the_batch(base: Base) -> None:
    pool = examples(base, 7, 2)
    stacks = to_device(stack_adapters(base.sites, [nonzero_adapter(base, 2, 1)]), base.like)
    whole = membership_scores.scores(base, pool, stacks, timesteps=2, time=TIME, memory=PLENTY)
    little = membership_scores.scores(base, pool, stacks, timesteps=2, time=TIME, memory=1)
    assert np.stack(little) == pytest.approx(np.stack(whole), rel=1e-4)
    assert np.stack(whole.minus(whole)) == pytest.approx(0.0)


@pytest.mark.integration
def test_memorizing_adapter_is_detected(base: Base) -> None:
    """The positive control. Pictures are noise, so that members differ from others in nothing else."""
    pool = examples(base, 24, 3)
    members = np.arange(24) < 12
    job = TrainJob(
        client="a",
        round=0,
        purpose="shared",
        seed=0,
        examples=Examples(pool.latents[:12], pool.context[:12]),
        start=init_adapter(base.sites, 16, 0),
        steps=120,
        batch_size=6,
        learning_rate=2e-2,
    )
    adapter = trained_adapter(train(base, [job], memory=PLENTY, timesteps=1)[0])
    stacks = to_device(stack_adapters(base.sites, [adapter]), base.like)
    own = membership_scores.scores(base, pool, stacks, timesteps=6, time=TIME, memory=PLENTY)
    base_scores = membership_scores.scores(base, pool, {}, timesteps=6, time=TIME, memory=PLENTY)

    def auc(scores: np.ndarray) -> float:
        return roc(AttackTrial(scores, members, np.arange(24), np.zeros(24, int))).auc

    assert auc(own.minus(base_scores).loss) > 0.8
    assert auc(own.minus(base_scores).loss) > auc(own.loss)  # cancels how easy a picture is by itself
