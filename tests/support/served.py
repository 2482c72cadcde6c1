"""What answers completions in tests: a server, or an engine without one."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METRIC_TIMEOUT_S = 30
POLL_S = 0.1
KV_CACHE_BYTES = 256 * 2**20
#: How completions are sampled: no chance, the log-probability of each token, and all of them.
GREEDY = {"temperature": 0, "logprobs": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Completion:
    """One completion: token ids, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]
    text: str


class Served(ABC):
    """A model with its arguments."""

    @abstractmethod
    def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> Completion:
        """Greedy completion of exactly ``max_tokens`` tokens."""

    @abstractmethod
    def complete_all(
        self, prompts: Sequence[list[int]], max_tokens: Sequence[int], **options: Any
    ) -> list[Completion]:
        """Complete all prompts at the same time."""

    @abstractmethod
    def log_text(self) -> str:
        """What was logged."""

    @abstractmethod
    def metrics_text(self) -> str:
        """All metrics, as Prometheus gets them."""

    def log_tail(self, lines: int = 60) -> str:
        """The end of what was logged."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def metric(self, name: str, label: str = "") -> float:
        """Sum of a Prometheus metric over its labels, or over those that hold ``label``.

        Raises:
            KeyError: If it is not there.
        """
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in self.metrics_text().splitlines()
            if line.startswith((name + "{", name + " ")) and label in line
        ]
        if not values:
            raise KeyError(f"{name} is not among the metrics")
        return sum(values)

    def wait_for_metric(self, name: str, value: float) -> None:
        """Wait until a metric has a value; vLLM updates its metrics after the answer."""
        deadline = time.monotonic() + METRIC_TIMEOUT_S
        while (seen := self.metric(name)) != value:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} is {seen} after {METRIC_TIMEOUT_S} s, not {value}")
            time.sleep(POLL_S)
