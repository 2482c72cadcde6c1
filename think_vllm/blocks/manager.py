"""Free the tails of compacted spans.

vLLM's scheduler asks the manager of each KV cache group to drop blocks that are no longer
needed before it allocates new ones. Ours answers with the tails of the spans that the worker
has compacted by then. Row indices never move: a freed entry becomes the null block, as in
vLLM's sliding-window and R-SWA managers, so slot mapping and lengths stay as they are.
"""

from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from think_vllm.errors import WAY_OUT
from think_vllm.spans import SpanRule


class ThinKVCacheManager(FullAttentionManager):
    """Manager of a group of full-attention layers whose old spans are thin."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.rule: SpanRule = kv_cache_spec.rule
        #: Spans of each running request whose tails have been freed already.
        self._freed_spans: dict[str, int] = {}
        self._prompt_lens: dict[str, int] = {}

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the tails of spans that the worker has made thin.

        Args:
            request_id: The request.
            processed_computed_tokens: Tokens whose forward pass has finished; the worker
                reads nothing of what they made free.
            num_prompt_tokens: Length of the prompt. None means unknown: nothing is freed.

        Raises:
            NotImplementedError: If a prompt grows, as those of streaming-input sessions do:
                thin blocks cannot become dense again.
        """
        if num_prompt_tokens is None or request_id not in self.req_to_blocks:
            return
        started_with = self._prompt_lens.setdefault(request_id, num_prompt_tokens)
        if started_with != num_prompt_tokens:
            raise NotImplementedError(
                f"think-vllm: the prompt of request {request_id} grew from {started_with} to "
                f"{num_prompt_tokens} tokens (streaming input); thin KV blocks do not support "
                f"sessions. {WAY_OUT}"
            )
        done = self._freed_spans.get(request_id, 0)
        freeable = self.rule.freeable_spans(num_prompt_tokens, processed_computed_tokens)
        for span in range(done, freeable):
            first = span * self.rule.span_blocks
            self._remove_blocks_in_range(
                request_id, first + self.rule.thin_blocks, first + self.rule.span_blocks
            )
        if freeable > done:
            self._freed_spans[request_id] = freeable

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Forget a finished or preempted request; vLLM then frees what it still holds."""
        self._freed_spans.pop(request_id, None)
        self._prompt_lens.pop(request_id, None)
        blocks: list[Any] = super().pop_blocks_for_free(request_id)
        return blocks
