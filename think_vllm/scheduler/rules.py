"""Rules of requests that have others than their server, or are yet to be told theirs."""

from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from think_vllm.plan.request import dense_rule, own_rule
from think_vllm.plan.spans import SpanRule


class RequestRules:
    """What a block manager has heard of requests, for as long as vLLM's scheduler has them.

    Args:
        guarded: Whether workers decide at a prompt's end if its request stays dense.
    """

    def __init__(self, guarded: bool) -> None:
        self._guarded = guarded
        self._requests: WeakValueDictionary[str, Any] = WeakValueDictionary()
        #: Whether requests stay dense that have been asked what they would lose.
        self._verdicts: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._requests)

    def announce(self, request: Any) -> None:
        """Hear of a request that asks for a rule of its own."""
        self._requests[request.request_id] = request

    def settle(self, request: Any, dense: bool) -> None:
        """Hear whether a request whose prompt has ended stays dense."""
        self._requests[request.request_id] = request
        self._verdicts[request] = dense

    def find(self, request_id: str, rule: SpanRule) -> tuple[SpanRule, bool]:
        """The rule of a request, and whether it is known for good.

        Args:
            request_id: The request.
            rule: Of its server.
        """
        request = self._requests.get(request_id)
        if request is None:
            return rule, not self._guarded
        if self._verdicts.get(request):
            return dense_rule(rule), True
        own = own_rule(rule, request.sampling_params.extra_args) or rule
        return own, not self._guarded or own.stays_dense or request in self._verdicts
