"""Validate replies: each is checked against its request; rejected replies are counted by reason.

Flower's built-in strategies abort the run on one malformed reply, and one NaN update makes the model NaN. Here a bad
reply is rejected and counted, and the round continues with the others.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from common.errors import AntherError
from models.lora.adapter import Adapter, Sites, first_directions, select_sites
from models.lora.norm_bound import norm_violation
from models.lora.trainable import from_trained_tensors, trained_shapes, trained_tensors
from protocol import quantization, records, tensor_codec
from protocol.messages import DeviceReport, Evaluation, Personalized, TrainingPlan, Update
from protocol.tensor_codec import CodecError
from strategies.round.private_evaluation import EvaluationPolicy

log = logging.getLogger(__name__)

MIN_REPORTED, MAX_REPORTED = 1e-6, 1e12
"""Range of numbers that a device may report about itself; it keeps their sums finite."""

_REASONS = {  # by error code of Flower: message, reply or node unavailable
    3: "unreachable",
    4: "unreachable",
    5: "unreachable",
    records.UNREADABLE: "malformed",
}

R = TypeVar("R")
T = TypeVar("T")


class ReplyRejectedError(AntherError):
    """A reply is rejected.

    Args:
        reason: key that it is counted under; part of the results, don't change.
        detail: message for the log.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


ReceivedReply = tuple[int, Callable[[], Any] | ReplyRejectedError]
"""Source node, and a function that decodes its reply; or the rejection for an error message, which the SuperLink sends
from its own node for a node that is unavailable."""


def validate_replies(
    kind: str, received: Iterable[ReceivedReply], requests: Mapping[int, R], check: Callable[[R, Any], T]
) -> tuple[dict[int, T], dict[str, int]]:
    """Decode and check replies, at most one for each node that was asked.

    Args:
        kind: message type, for the log.
        received: replies in the order of arrival.
        requests: request of each node.
        check: checks a decoded reply against its request, and returns the accepted value.

    Returns:
        Accepted values by node, and the number of rejected replies by reason.
    """
    accepted: dict[int, T] = {}
    dropped: Counter[str] = Counter()
    count = 0
    for node, decode in received:
        count += 1
        try:
            if isinstance(decode, ReplyRejectedError):
                raise decode
            if node not in requests or node in accepted:
                raise ReplyRejectedError("not asked", "an unrequested reply, or a second one")
            accepted[node] = check(requests[node], decode())
        except Exception as error:  # no reply of a device may end the run
            reason = error.reason if isinstance(error, ReplyRejectedError) else "malformed"
            dropped["codec" if isinstance(error, CodecError) else reason] += 1
            log.warning("%s: reply of node %d rejected: %s", kind, node, error)
    if count < len(requests):
        dropped["no reply"] = len(requests) - count
    return accepted, dict(sorted(dropped.items()))


def error_rejection(code: int, reason: str | None) -> ReplyRejectedError:
    """Make the rejection of an error message; a device that refuses a request is distinguished from a failed one."""
    counted = "refused" if (reason or "").startswith(records.REFUSED) else _REASONS.get(code, "failed")
    return ReplyRejectedError(counted, f"error {code}: {_last_line(reason)}")


@dataclass(frozen=True, kw_only=True)
class ReplyValidator:
    """Checks of replies; they raise ReplyRejectedError or CodecError for an invalid one.

    Args:
        sites: sites of the adapter.
        lora_xs_bases: see `FederatedStrategy`.
        accept_simulated: see `FederatedStrategy`.
        evaluation_policy: see `FederatedStrategy`.
    """

    sites: Sites
    lora_xs_bases: Adapter | None
    accept_simulated: bool
    evaluation_policy: EvaluationPolicy

    def trained_shapes(self, plan: TrainingPlan) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that a plan trains."""
        sites = self.sites if plan.sites is None else {name: self.sites[name] for name in plan.sites}
        return trained_shapes(sites, plan.rank, plan.trains)

    def max_payload(self, plan: TrainingPlan) -> int:
        """Return the largest valid payload of a plan's update, in bytes."""
        expected = self.trained_shapes(plan)
        if plan.update == "fp32":
            return tensor_codec.max_payload(expected)
        return quantization.max_payload(expected, plan.update, keep=plan.keep)

    def update(
        self, current: Adapter, request: tuple[DeviceReport, TrainingPlan], reply: Update
    ) -> tuple[Update, Adapter]:
        """Check and decode an update.

        Args:
            current: adapter that was sent to the device.
            request: report of the device and the plan that it was sent.
            reply: its reply.

        Returns:
            The update, and its factors.
        """
        report, plan = request
        _check_origin(report, reply.device)
        if (reply.run, reply.round) != (plan.run, plan.round):
            raise ReplyRejectedError("stale", f"{reply.device}: update of run {reply.run[:50]}, round {reply.round}")
        if reply.rank != plan.rank:
            raise ReplyRejectedError("rank", f"{reply.device}: trained rank {reply.rank}, was asked for {plan.rank}")
        if plan.privacy:
            self._check_noise(reply)
        _check_cost(reply)
        if not 0 <= reply.events < MAX_REPORTED:
            raise ReplyRejectedError("malformed", f"{reply.device}: ledger events must be 0 to {MAX_REPORTED:g}")
        if reply.loss is not None and not 0 <= reply.loss < MAX_REPORTED:
            raise ReplyRejectedError("malformed", f"{reply.device}: loss must be 0 to {MAX_REPORTED:g}")
        sites = self.sites if plan.sites is None else plan.sites
        start = first_directions(select_sites(current, sites), plan.rank)
        lora_xs_bases = first_directions(self.lora_xs_bases, plan.rank) if self.lora_xs_bases else None
        trained = self._trained(reply.adapter, plan, start, lora_xs_bases)
        adapter = from_trained_tensors(trained, plan.trains, start, lora_xs_bases)
        # A decoded change is finite in every precision, and so is the sum that is bounded here.
        if violation := norm_violation(adapter):
            raise ReplyRejectedError("norm", f"{reply.device}: {violation}")
        return reply, adapter

    def _trained(
        self, data: bytes, plan: TrainingPlan, start: Adapter, lora_xs_bases: Adapter | None
    ) -> Mapping[str, Tensor]:
        """Decode the trained tensors in the precision of the plan; quantized updates are changes of `start`."""
        expected = self.trained_shapes(plan)
        if plan.update == "fp32":
            return tensor_codec.decode(data, expected)
        change = quantization.decode(data, expected, plan.update, keep=plan.keep)
        before = trained_tensors(start, plan.trains, lora_xs_bases)
        return {name: before[name] + moved for name, moved in change.items()}

    def evaluation(self, round: int, report: DeviceReport, reply: Evaluation) -> Evaluation:
        """Check that an evaluation is of this round and has exactly the requested values.

        Args:
            round: number of the round.
            report: report of the device.
            reply: its reply.
        """
        _check_origin(report, reply.device)
        if reply.round != round:
            raise ReplyRejectedError("stale", f"{reply.device}: evaluated round {reply.round}, not {round}")
        if not self.evaluation_policy.accepts(reply):
            raise ReplyRejectedError("malformed", f"{reply.device}: its metrics are not the requested ones")
        if reply.gain is not None:
            self._check_noise(reply)
        numbers = [value for value in (reply.base, reply.shared, reply.epsilon) if value is not None]
        if not (all(0 <= value < MAX_REPORTED for value in numbers) and abs(reply.gain or 0.0) < MAX_REPORTED):
            raise ReplyRejectedError("malformed", f"{reply.device}: losses must be 0 to {MAX_REPORTED:g}")
        return reply

    def personalized(self, report: DeviceReport, reply: Personalized) -> Personalized:
        """Check the reply to a personalization request."""
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
        raise ReplyRejectedError("impostor", f"node of {report.device} replies as {device[:100]!r}")


def _check_cost(reply: Update | Personalized) -> None:
    if not (0 <= reply.seconds < MAX_REPORTED and 0 <= reply.joules < MAX_REPORTED):
        raise ReplyRejectedError("malformed", f"{reply.device}: seconds and joules must be 0 to {MAX_REPORTED:g}")


def _last_line(text: str | None) -> str:
    """Return the last line of a traceback, without characters that control a terminal."""
    line = ((text or "")[-10_000:].strip().splitlines() or ["no reason given"])[-1][:300]
    return "".join(character if character.isprintable() else "?" for character in line)
