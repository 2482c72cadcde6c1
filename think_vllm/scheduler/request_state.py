"""What the block manager remembers of requests: their state, and per-request overrides."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from think_vllm.plan.request import dense_rule, request_override
from think_vllm.plan.spans import SpanRule


@dataclass(slots=True)
class RequestState:
    """One request, from its admission until it ends or is preempted."""

    rule: SpanRule  # when its spans are thin
    #: Whether its worker has said that it may be compacted, or that it stays dense.
    resolved: bool = True
    #: vLLM's own; None until its first step is scheduled, or without prefix caching.
    request: Any = None
    prompt_len: int | None = None  # tokens of its prompt; None until known
    cached_spans: int = 0  # leading spans that came thin from the prefix cache
    freed_spans: int = 0  # spans that have freed blocks, or came without them
    published: int = 0  # rows that the prefix cache has been offered
    published_spans: int = 0  # thin spans that it has been offered
    uncached_spans: int = 0  # spans whose dense form must not be offered any more
    next_free: int = 0  # processed tokens before which no further block comes free
    next_compaction: int = 0  # scheduled tokens before which no further span is compacted
    scheduled: int = 0  # tokens that will have been computed after the step that is being scheduled


class RequestRules:
    """Rules of requests that override the server's, or are not known yet.

    They are kept for as long as vLLM's scheduler has the request.

    Args:
        limits_loss: Whether workers decide at a prompt's end if its request stays dense.
    """

    def __init__(self, limits_loss: bool) -> None:
        self._limits_loss = limits_loss
        self._requests: WeakValueDictionary[str, Any] = WeakValueDictionary()
        #: Whether requests stay dense that have been asked what they would lose.
        self._decisions: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._requests)

    def register(self, request: Any) -> None:
        """Receive a request that has an override."""
        self._requests[request.request_id] = request

    def resolve(self, request: Any, dense: bool) -> None:
        """Receive whether a request whose prompt has ended stays dense."""
        self._requests[request.request_id] = request
        self._decisions[request] = dense

    def find(self, request_id: str, rule: SpanRule) -> tuple[SpanRule, bool]:
        """The rule of a request, and whether it is known for good.

        Args:
            request_id: The request.
            rule: Of its server.
        """
        request = self._requests.get(request_id)
        if request is None:
            return rule, not self._limits_loss
        if self._decisions.get(request):
            return dense_rule(rule), True
        own = request_override(rule, request.sampling_params.extra_args) or rule
        return own, not self._limits_loss or own.stays_dense or request in self._decisions
