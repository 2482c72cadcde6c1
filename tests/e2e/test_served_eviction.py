"""Evicted tokens: served log-probabilities against a model in which each head's are hidden."""

from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.support import checks
from tests.support.checks import EAGER
from tests.support.reference import Reference, Thinning
from tests.support.server import Server
from think_vllm.plan.planner import BlockPlan

pytestmark = pytest.mark.e2e

MAX_MODEL_LEN = 2048


def pool_bytes(plan: BlockPlan, heads: int, layers: int) -> int:
    """A KV cache of one longest request, and the null block."""
    return (MAX_MODEL_LEN // plan.block_size + 1) * plan.layout.run_bytes * heads * layers


class TestSnapKV:
    """Pruned by half and evicted, in small chunks, in a pool too small for the load."""

    plan, flags = checks.plan_served(
        128, kv_channel_prune=0.5, kv_evict="snapkv", kv_evict_budget=256
    )
    thinning = Thinning.of(plan)

    @pytest.fixture(scope="class")
    def server(self, serve: Serve) -> Server:
        limits = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "96")
        pool = pool_bytes(self.plan, heads=2, layers=2)
        return serve(*EAGER, *self.flags, *limits, kv_cache_bytes=pool)

    def test_prompts_at_the_budget(self, server: Server, recall_reference: Reference) -> None:
        # The first prompt that loses tokens has one span more than the budget.
        span, kept = self.plan.span_tokens, self.thinning.kept_tokens
        first = kept + span + self.thinning.recent_window
        lengths = [20, kept, first - 1, first, first + 1, first + span]
        checks.check_served(server, recall_reference, lengths, [2 * span + 5] * 6, self.thinning)
        assert recall_reference.margin > 0

    def test_budgets_of_requests(self, server: Server, recall_reference: Reference) -> None:
        span, kept = self.plan.span_tokens, self.thinning.kept_tokens
        asks: list[tuple[int, dict[str, Any], Thinning | None]] = [
            (1400, {}, self.thinning),
            (1010, {"kv_evict_budget": 2 * kept}, replace(self.thinning, kept_tokens=2 * kept)),
            (1300, {"kv_evict_budget": span}, replace(self.thinning, kept_tokens=span)),
            (900, {"kv_evict_budget": False}, replace(self.thinning, evict=None)),
            (700, {"kv_channel_prune": False}, None),
        ]
        prompts = checks.random_prompts([length for length, _, _ in asks], seed=4)
        answers = server.complete_each(prompts, 200, [{"vllm_xargs": x} for _, x, _ in asks])
        for prompt, answer, (_, asked, thinning) in zip(prompts, answers, asks, strict=True):
            checks.assert_equal(recall_reference, [prompt], [answer], thinning)
            if asked:
                checks.assert_unequal(recall_reference, [prompt], [answer], self.thinning)
        short = {"prompt": [5] * 9, "max_tokens": 1, "vllm_xargs": {"kv_evict_budget": span - 1}}
        rejected = server.post("/v1/completions", short)
        assert rejected.status_code == 400
        assert f"give {span} or more" in rejected.text

    def test_preempted_requests(self, server: Server, recall_reference: Reference) -> None:
        lengths = [1433, 610, 1100, 420, 955, 300, 1970]
        before = server.metric("vllm:num_preemptions_total")
        counts = [400] * (len(lengths) - 1) + [70]
        completions = checks.check_served(server, recall_reference, lengths, counts, self.thinning)
        assert server.metric("vllm:num_preemptions_total") > before
        # The comparison would notice if all tokens were kept, or others.
        prompts = checks.random_prompts(lengths)
        for other in ({"evict": None}, {"evict": "h2o"}):
            thinning = replace(self.thinning, **other)
            checks.assert_unequal(recall_reference, prompts[:1], completions[:1], thinning)

    def test_prompt_hit_in_the_cache(self, server: Server, recall_reference: Reference) -> None:
        hits = server.metric("vllm:prefix_cache_hits_total")
        for _ in range(2):
            checks.check_served(server, recall_reference, [1500], [40], self.thinning)
        assert server.metric("vllm:prefix_cache_hits_total") - hits > 1000

    def test_freed_blocks_admit_more_requests(self, server: Server) -> None:
        # 3 prompts of 1,300 tokens: only one of them fits the pool at a time, pruned or not. But
        # an evicted one holds a fifth of that, so they decode together.
        steps = "vllm:iteration_tokens_total_count"
        before = server.metric(steps)
        server.complete_all(checks.random_prompts([1300] * 3, seed=2), [150] * 3)
        prompts = 3 * (1300 // 96 + 1)
        assert server.metric(steps) - before < 150 + prompts + 50
