"""When a span is thin, and when its tail may be freed: the rule that both sides share.

The block manager (scheduler process) and the metadata builder (worker processes) never talk
about spans; each derives the same answer from numbers that vLLM gives to both: the prompt
length and the computed tokens. Pure integers, also on numpy arrays.

For a query at position ``p`` (so ``p`` tokens come before it) of a request whose prompt has
``P`` tokens, spans ``0 .. thin_spans(P, p) - 1`` are thin:

* a prompt query (``p < P``) sees dense blocks only; ThinK prunes after the prompt;
* afterwards every span that ends at least ``recent_window`` tokens before ``p`` is thin
  (with ``prune_decode``), or every span that ended so before ``P`` (without).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SpanRule:
    """Which spans are thin for whom.

    Args:
        block_size: Tokens of a dense block.
        span_blocks: Dense blocks of a span before compaction.
        thin_blocks: Blocks of a span after compaction.
        recent_window: Most recent tokens that always stay dense.
        prune_decode: Whether spans that fill while decoding are compacted too.
    """

    block_size: int
    span_blocks: int
    thin_blocks: int
    recent_window: int
    prune_decode: bool

    @property
    def span_tokens(self) -> int:
        """Tokens of a span."""
        return self.block_size * self.span_blocks

    def prompt_spans(self, prompt_len: int) -> int:
        """Spans that the end of a prompt of ``prompt_len`` tokens compacts."""
        return max(0, prompt_len - self.recent_window) // self.span_tokens

    def thin_spans(self, prompt_len: int, position: int) -> int:
        """Thin spans of a request as its query at ``position`` sees them."""
        if position < prompt_len:
            return 0
        return self.prompt_spans(position if self.prune_decode else prompt_len)

    def thin_spans_array(self, prompt_lens: IntArray, positions: IntArray) -> IntArray:
        """``thin_spans`` over arrays of equal shape."""
        ends = positions if self.prune_decode else prompt_lens
        spans = np.maximum(0, ends - self.recent_window) // self.span_tokens
        return np.where(positions < prompt_lens, 0, spans)

    def due_position(self, span: int) -> int:
        """First position whose query sees ``span`` thin, if the prompt has ended by then."""
        return (span + 1) * self.span_tokens + self.recent_window

    def freeable_spans(self, prompt_len: int, processed_tokens: int) -> int:
        """Spans whose tails the worker can no longer read.

        Prompt spans are compacted inside the forward pass that ends the prompt, so they are
        free once it has been processed. A span that fills while decoding is compacted at
        the start of the step whose first query sees it thin, so the manager waits until that
        step has been processed: one token later.

        Args:
            prompt_len: Tokens of the prompt.
            processed_tokens: Tokens whose forward pass has finished.
        """
        if processed_tokens < prompt_len:
            return 0
        return self.thin_spans(prompt_len, max(prompt_len, processed_tokens - 1))
