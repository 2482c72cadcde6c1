"""Plans with a budget of old tokens: whole spans, well used, and what they hold."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.plans import make_plan
from think_vllm.errors import ThinkError
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BLOCK_SIZES, USED_SHARE, BlockPlan, plan_blocks
from think_vllm.plan.summary import plan_fields, plan_summary


def make(budget: int, block_size: int | None = None, **changes: object) -> BlockPlan:
    given = {"kv_evict": "snapkv", "kv_evict_budget": budget, **changes}
    return make_plan(block_size=block_size, **given)


def most_kept(budget: int, ratio: float, quant: str) -> int:
    kept = []
    for block_size in BLOCK_SIZES:
        try:
            plan = make(budget, block_size, kv_channel_prune=ratio, kv_quant=quant)
        except ThinkError:  # its spans are longer than the budget, or it has none
            continue
        kept.append(plan.kept_tokens)
    return max(kept)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    budget=st.integers(128, 5000),
    ratio=st.sampled_from([0.0, 0.4, 0.5]),
    quant=st.sampled_from(sorted(FORMATS)),
)
@example(budget=143, ratio=0.0, quant="fp8")  # four spans of 32 are all that fits
def test_plans_fill_their_budget(budget: int, ratio: float, quant: str) -> None:
    plan = make(budget, kv_channel_prune=ratio, kv_quant=quant)
    # Every worker plans again, with the block size that was chosen.
    assert plan_blocks(plan.config, 128, 2, plan.block_size) == plan
    kept = plan.kept_tokens
    assert plan.rule.budget_spans == kept // plan.span_tokens
    # Short budgets hold few whole spans: then no block size would hold more.
    assert min(USED_SHARE * budget, most_kept(budget, ratio, quant)) <= kept <= budget
    assert plan.rule.delay_prompt
    assert plan.config.kv_prefix_cache == "dense"
    # A prompt holds thin blocks of what is kept, and the dense ones behind its old spans.
    for length in (10, kept + 31, 3 * budget, 20_000):
        old = plan.rule.prompt_spans(length)
        thin = min(old, plan.rule.budget_spans or 0) * plan.thin_blocks
        dense = math.ceil((length - old * plan.span_tokens) / plan.block_size)
        assert plan.blocks_for(length) == thin + dense


def test_plan_that_only_evicts_leaves_blocks_as_they_are() -> None:
    plan = make(1000)
    assert (plan.span_blocks, plan.thin_blocks, plan.key_channels) == (1, 1, 128)
    assert plan.layout.used_bytes == plan.layout.run_bytes
    assert not plan.layout.has_table
    assert not plan.rule.prune_decode
    assert plan.kept_tokens == 992
    assert plan.effective_multiple(8192) == pytest.approx(8192 / (992 + 32 + 8))
    # A ratio that prunes no channel is none.
    assert make(1000, kv_channel_prune=0.005).span_blocks == 1


def test_budget_below_the_shortest_span_is_rejected() -> None:
    with pytest.raises(
        ThinkError, match=r"budget is 15: .* has 16 tokens; use .*budget 16 or more"
    ):
        make(15)
    with pytest.raises(ThinkError, match=r"has 512 tokens; .* 512 or more, or a smaller --block-"):
        make(300, block_size=128, kv_channel_prune=0.5)


def test_report_says_what_is_kept() -> None:
    plan = make(300, kv_channel_prune=0.5)
    text = "\n".join(plan_summary(plan, True))
    assert "each KV head keeps 288 old tokens of a prompt at most (budget 300, snapkv)" in text
    assert "prefixes cached as dense copies" in text
    fields = plan_fields(plan, True)
    assert (fields["evict"], fields["evict_budget"]) == ("snapkv", 288)
    assert fields["effective_multiple_32k"] > 50


def test_plans_without_eviction_keep_everything() -> None:
    plan = make_plan(kv_channel_prune=0.5)
    assert plan.rule.budget_spans is None
    assert plan_fields(plan, True)["evict_budget"] is None
    assert not any("old tokens" in line for line in plan_summary(plan, True))
