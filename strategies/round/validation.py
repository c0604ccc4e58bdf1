"""What is let in of what devices send: each reply is held against what was asked, and what fails is counted.

Stock strategies abort the run on one bad reply and turn one NaN into a model of NaN. Here a bad one is dropped and
counted by its reason, and the round goes on with the others.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Adapter, Sites, select_sites, split_rank
from models.lora.norm_bound import norm_violation
from models.lora.trainable import from_trained_tensors, trained_shapes, trained_tensors
from protocol import quantization, records, tensor_codec
from protocol.messages import DeviceReport, Evaluation, Personalized, TrainingPlan, Update
from protocol.tensor_codec import CodecError
from strategies.private_evaluation import EvaluationPolicy

log = logging.getLogger(__name__)

LEAST, MOST = 1e-6, 1e12
"""Numbers that a device tells of itself lie between: sums of them stay finite."""

_REASONS = {  # of error codes: message, reply or node unavailable are Flower's
    3: "unreachable",
    4: "unreachable",
    5: "unreachable",
    records.UNREADABLE: "malformed",
}

R = TypeVar("R")
T = TypeVar("T")


class ReplyRejectedError(AntherError):
    """A reply that is not used, with the reason that it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


ReceivedReply = tuple[int, Callable[[], Any] | ReplyRejectedError]
"""The node that a message is from, and what reads the reply in it; or what is counted for an error in its place, which
the SuperLink sends for a node that is away, from its own."""


def validate_replies(
    kind: str, heard: Iterable[ReceivedReply], asked: Mapping[int, R], check: Callable[[R, Any], T]
) -> tuple[dict[int, T], dict[str, int]]:
    """What passed `check`, by node, and how many did not by reason; one reply for each node that was asked."""
    found: dict[int, T] = {}
    dropped: Counter[str] = Counter()
    count = 0
    for node, read in heard:
        count += 1
        try:
            if isinstance(read, ReplyRejectedError):
                raise read
            if node not in asked or node in found:
                raise ReplyRejectedError("not asked", "a reply that nobody asked for, or a second one")
            found[node] = check(asked[node], read())
        except Exception as wrong:  # whatever a device sends, the server lives
            reason = wrong.reason if isinstance(wrong, ReplyRejectedError) else "malformed"
            dropped["codec" if isinstance(wrong, CodecError) else reason] += 1
            log.warning("%s: reply of node %d dropped: %s", kind, node, wrong)
    if count < len(asked):
        dropped["no reply"] = len(asked) - count
    return found, dict(sorted(dropped.items()))


def error_rejection(code: int, reason: str | None) -> ReplyRejectedError:
    """What an error reply is counted under: a device that says no is no broken one."""
    counted = "refused" if (reason or "").startswith(records.REFUSED) else _REASONS.get(code, "failed")
    return ReplyRejectedError(counted, f"error {code}: {_last_line(reason)}")


@dataclass(frozen=True, kw_only=True)
class ReplyValidator:
    """What a reply must be to be used; RefusedError or CodecError for another.

    Args:
        frame: as for `Federated`, and so are `accept_simulated` and `measuring`.
    """

    sites: Sites
    lora_xs_bases: Adapter | None
    accept_simulated: bool
    measuring: EvaluationPolicy

    def trained_shapes(self, plan: TrainingPlan) -> dict[str, tuple[int, ...]]:
        """What comes back of this plan: what it trains, at its sites."""
        chosen = self.sites if plan.sites is None else {name: self.sites[name] for name in plan.sites}
        return trained_shapes(chosen, plan.rank, plan.trains)

    def largest(self, plan: TrainingPlan) -> int:
        """Bytes of the longest payload that comes back of this plan."""
        expected = self.trained_shapes(plan)
        if plan.update == "fp32":
            return tensor_codec.max_payload(expected)
        return quantization.max_payload(expected, plan.update, keep=plan.keep)

    def update(
        self, current: Adapter, asked: tuple[DeviceReport, TrainingPlan], reply: Update
    ) -> tuple[Update, Adapter]:
        """The update and its factors, if it is what the plan asked for of a device that was sent `current`."""
        report, plan = asked
        _check_origin(report, reply.device)
        if (reply.run, reply.round) != (plan.run, plan.round):
            raise ReplyRejectedError("stale", f"{reply.device}: update of run {reply.run[:50]}, round {reply.round}")
        if reply.rank != plan.rank:
            raise ReplyRejectedError("rank", f"{reply.device}: trained rank {reply.rank}, was asked for {plan.rank}")
        if plan.privacy:
            self._check_noise(reply)
        _check_cost(reply)
        if not 0 <= reply.events < MOST:
            raise ReplyRejectedError("malformed", f"{reply.device}: events of its ledger must be 0 to {MOST:g}")
        if reply.loss is not None and not 0 <= reply.loss < MOST:
            raise ReplyRejectedError("malformed", f"{reply.device}: loss must be 0 to {MOST:g}")
        sites = self.sites if plan.sites is None else plan.sites
        start = split_rank(select_sites(current, sites), plan.rank)[0]
        lora_xs_bases = split_rank(self.lora_xs_bases, plan.rank)[0] if self.lora_xs_bases else None
        found = self._trained(reply.adapter, plan, trained_tensors(start, plan.trains, lora_xs_bases))
        adapter = from_trained_tensors(found, plan.trains, start, lora_xs_bases)
        # Whatever the precision, a change that was decoded is finite, and with it the sum that is bounded here.
        if over := norm_violation(adapter):
            raise ReplyRejectedError("norm", f"{reply.device}: {over}")
        return reply, adapter

    def _trained(self, data: bytes, plan: TrainingPlan, start: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What was trained from `start`, in whichever precision the plan had it come back."""
        expected = self.trained_shapes(plan)
        if plan.update == "fp32":
            return tensor_codec.decode(data, expected)
        change = quantization.decode(data, expected, plan.update, keep=plan.keep)
        return {name: start[name] + moved for name, moved in change.items()}

    def evaluation(self, round: int, report: DeviceReport, reply: Evaluation) -> Evaluation:
        """The measurement of this round, if it tells what was asked for and no more."""
        _check_origin(report, reply.device)
        if reply.round != round:
            raise ReplyRejectedError("stale", f"{reply.device}: evaluated round {reply.round}, not {round}")
        if not self.measuring.accepts(reply):
            raise ReplyRejectedError("malformed", f"{reply.device}: tells other measures than it was asked for")
        if reply.gain is not None:
            self._check_noise(reply)
        numbers = [value for value in (reply.base, reply.shared, reply.epsilon) if value is not None]
        if not (all(0 <= value < MOST for value in numbers) and abs(reply.gain or 0.0) < MOST):
            raise ReplyRejectedError("malformed", f"{reply.device}: losses must be 0 to {MOST:g}")
        return reply

    def personalised(self, report: DeviceReport, reply: Personalized) -> Personalized:
        _check_origin(report, reply.device)
        _check_cost(reply)
        return reply

    def _check_noise(self, reply: Update | Evaluation) -> None:
        if not (reply.release or self.accept_simulated):
            raise ReplyRejectedError(
                "not a release", f"{reply.device}: simulated noise, and this server is not in test mode"
            )


def _check_origin(report: DeviceReport, device: str) -> None:
    if device != report.device:
        raise ReplyRejectedError("impostor", f"node of {report.device} signs as {device[:100]!r}")


def _check_cost(reply: Update | Personalized) -> None:
    if not (0 <= reply.seconds < MOST and 0 <= reply.joules < MOST):
        raise ReplyRejectedError("malformed", f"{reply.device}: seconds and joules must be 0 to {MOST:g}")


def _last_line(text: str | None) -> str:
    """Of a traceback, the line that says what happened, in characters that a terminal doesn't obey."""
    line = ((text or "")[-10_000:].strip().splitlines() or ["no reason given"])[-1][:300]
    return "".join(character if character.isprintable() else "?" for character in line)
