"""Personal adapters: requests to train them, and the cost of the training."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid

from protocol import records
from protocol.messages import DeviceReport, Personalize, Personalized, TrainingPlan
from strategies.cohort import Cohort
from strategies.costs import ReportedCosts
from strategies.download import AdapterFormat
from strategies.round.messages import received_replies
from strategies.round.metrics import PersonalizationMetrics
from strategies.round.request import PersonalizationRequest
from strategies.round.validation import ReplyValidator, validate_replies
from training.personalization import build


@dataclass(frozen=True, kw_only=True)
class PersonalizationPhase:
    """Request personal adapters, and summarize the replies."""

    plan: TrainingPlan
    format: AdapterFormat
    timesteps: int
    cohort: Cohort
    validator: ReplyValidator
    costs: ReportedCosts

    def request(self, message: Personalize, grid: Grid, names: Collection[str] | None = None) -> PersonalizationRequest:
        """Request a personal adapter from every connected device, or from those among them in `names`.

        Args:
            message: message to send, with the shared adapter in full precision, which is encoded for download.
            grid: connection to the devices.
            names: names of devices; None: all.
        """
        download = self.format.encode(self.format.decode(message.adapter))
        message = replace(
            message,
            adapter=download.data,
            rounded=download.rounded,
            adapted=self.format.adapted,
            timesteps=self.timesteps,
        )
        asked = {
            node: report for node, report in self.cohort.query(grid).items() if names is None or report.device in names
        }
        method = build(message.method.name, message.method.arguments())
        plan = replace(
            self.plan,
            rank=message.rank,
            steps=method.all_steps_after(message.steps),
            batch_size=message.batch_size,
            personalization=None,
            privacy=None,
        )
        return PersonalizationRequest(
            messages=dict.fromkeys(asked, message), asked=asked, plan=plan, sent_at=self.costs.time(grid)
        )

    def finish(self, request: PersonalizationRequest, replies: Iterable[Message]) -> PersonalizationMetrics:
        """Return the devices with a personal adapter, and the cost."""

        def check(report: DeviceReport, reply: Personalized) -> Personalized:
            checked = self.validator.personalized(report, reply)
            return self.costs.plausible(report, request.plan, checked, request.sent_at)

        received = received_replies(records.PERSONALIZE, replies)
        accepted, dropped = validate_replies(records.PERSONALIZE, received, request.asked, check)
        done = sorted(accepted.values(), key=lambda reply: reply.device)
        done = done if request.sent_at is None else self.costs.capped(done)
        return PersonalizationMetrics(
            asked=len(request.asked),
            devices=tuple(reply.device for reply in done),
            dropped=dropped,
            seconds=max((reply.seconds for reply in done), default=0.0),
            joules=sum(reply.joules for reply in done),
        )
