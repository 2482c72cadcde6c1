"""A logits processor of vLLM's own kind that makes a request follow given tokens."""

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

#: Key in ``SamplingParams.extra_args`` of the tokens to follow.
FORCED_TOKENS = "forced_tokens"


class ForcedTokens(AdapterLogitsProcessor):
    """Leave each step no choice; the raw log-probabilities that vLLM reports stay as they were."""

    def is_argmax_invariant(self) -> bool:
        """Say no: it decides what greedy sampling takes."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """For requests that bring tokens to follow."""
        tokens = (params.extra_args or {}).get(FORCED_TOKENS)
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(logits, -torch.inf)
            forced[tokens[len(output_ids)]] = 0
            return forced

        return force
