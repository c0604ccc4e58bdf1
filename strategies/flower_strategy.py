"""The phases of a `FederatedStrategy` under the names of Flower's `Strategy`, for a ServerApp with Flower's own loop.

Flower's hooks have no argument for the state of a run, so it is kept here. Flower's loop can't continue a run after a
restart, and holds no privacy ledger's anchor; `server.rounds.loop` can.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from models.lora.adapter import to_tensors
from protocol import records
from protocol.tensor_codec import encode
from strategies.round.history import TrainingHistory
from strategies.round.messages import to_messages
from strategies.round.metrics import TrainMetrics, ValidationMetrics
from strategies.round.request import EvaluationRequest, RoundRequest, RoundStart
from strategies.server_optimizers import StrategyState
from strategies.strategy import FederatedStrategy


class FlowerStrategy(FederatedStrategy, Strategy):
    """A `FederatedStrategy` with Flower's interface.

    Attributes:
        memory: state that the strategy keeps across rounds besides the adapter.
        history: record of the devices.
        trained: metrics of the last training; None before any.
        validation: metrics of the last evaluation; None before any.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.memory: StrategyState = {}
        self.history = TrainingHistory()
        self.trained: TrainMetrics | None = None
        self.validation: ValidationMetrics | None = None
        self._training: tuple[RoundStart, RoundRequest] | None = None
        self._evaluation: EvaluationRequest | None = None

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface; Anther sends its settings in the messages
        grid: Grid,
    ) -> Iterable[Message]:
        """Make a Train message for each selected device, with its own plan.

        Args:
            server_round: number of the round.
            arrays: current adapter.
            config: unused.
            grid: connection to the devices.
        """
        start = self._start(server_round, arrays)
        request = self.training.request(start, grid)
        self._training = start, request
        return to_messages(request.messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies to the last `configure_train`, once.

        Returns:
            The next adapter and its metrics, or None for both if no reply was accepted. Under device-level privacy, a
            noised adapter is released in any case, unless devices would refuse it (None for both).
        """
        if self._training is None or self._training[0].number != server_round:
            raise ValueError("configure_train must be called before aggregate_train, once per round")
        (start, request), self._training = self._training, None
        with self.training.open_updates(start, request) as updates:
            dropped = self.training.accept(start, request, replies, updates)
            result = self.training.finish(start, [request], updates, dropped)
            count = len(updates)
        self.memory, self.trained = result.memory, result.metrics
        self.history = self.history.after_training(result.metrics)
        if result.adapter is None:
            return None, None
        adapter = records.adapter_to_record(encode(to_tensors(result.adapter)))
        return adapter, MetricRecord({"replied": count, **result.metrics.diagnostics})

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # Flower's interface; Anther sends its settings in the messages
        grid: Grid,
    ) -> Iterable[Message]:
        """Make an Evaluate message for each selected device; none if this round is not evaluated.

        Args:
            server_round: number of the round.
            arrays: adapter to evaluate.
            config: unused.
            grid: connection to the devices.
        """
        self._evaluation = self.evaluation.request(self._start(server_round, arrays), grid)
        return to_messages(self._evaluation.messages) if self._evaluation else []

    def aggregate_evaluate(
        self,
        server_round: int,  # noqa: ARG002  # Flower's interface; the request has it
        replies: Iterable[Message],
    ) -> MetricRecord | None:
        """Return the mean losses of the base and of the adapter, or a noised gain; None if there is neither."""
        if self._evaluation is None:
            self.validation = ValidationMetrics(base=None, shared=None)
            return None
        self.validation, self._evaluation = self.evaluation.finish(self._evaluation, replies), None
        self.history = self.history.after_evaluation(self.validation)
        values = {name: getattr(self.validation, name) for name in ("base", "shared", "gain", "gain_error")}
        available = {name: value for name, value in values.items() if value is not None}
        return MetricRecord(available) if available else None

    def _start(self, number: int, arrays: ArrayRecord) -> RoundStart:
        return RoundStart(
            number=number,
            adapter=self.format.decode(records.adapter_from_record(arrays)),
            memory=self.memory,
            history=self.history,
            release=self.trained.central if self.trained else None,
        )
