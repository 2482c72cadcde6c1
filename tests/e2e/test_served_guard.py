"""A limit on lost score mass: requests beyond it equal a dense model, the others a pruned one."""

from itertools import pairwise

import pytest

from tests.e2e.conftest import Serve
from tests.support.checks import EAGER, assert_equal, assert_unequal, plan_served, random_prompts
from tests.support.metrics import steady_metrics
from tests.support.reference import Reference, Thinning

pytestmark = pytest.mark.e2e

MAX_MODEL_LEN = 2048
LENGTHS = [60, 300, 420, 610, 700, 955, 1100, 1433]


def losses(reference: Reference, prompts: list[list[int]], thinning: Thinning) -> list[float]:
    """What each prompt loses of its score mass, on average over layers and heads."""
    lost = []
    for prompt in prompts:
        reference.logprobs(prompt, [5], thinning)
        lost.append(1 - float(reference.shares.mean()))
    return lost


def test_requests_beyond_the_limit_stay_dense(serve: Serve, recall_reference: Reference) -> None:
    plan, _ = plan_served(128, kv_channel_prune=0.5)
    thinning = Thinning.of(plan)
    prompts = random_prompts(LENGTHS, seed=31)
    lost = losses(recall_reference, prompts, thinning)
    # A limit that three or more are beyond, in the widest gap, so that nothing hangs on rounding.
    ranked = sorted(lost)
    gap, limit = max((high - low, (high + low) / 2) for low, high in pairwise(ranked[2:6]))
    assert gap > 1e-4
    _, flags = plan_served(128, kv_channel_prune=0.5, kv_prune_max_loss=limit)
    # Of little more than the longest request: some are preempted, and go on as they began.
    pool = (MAX_MODEL_LEN // plan.block_size + 2) * plan.layout.run_bytes * 2 * 2
    limits = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "160")
    server = serve(*EAGER, *flags, *limits, kv_cache_bytes=pool)
    answers = server.complete_together(prompts, 260)
    assert server.metric("vllm:num_preemptions_total") > 0
    for prompt, answer, loss in zip(prompts, answers, lost, strict=True):
        kept, other = (None, thinning) if loss > limit else (thinning, None)
        assert_equal(recall_reference, [prompt], [answer], kept)
        if len(prompt) > plan.span_tokens:
            assert_unequal(recall_reference, [prompt], [answer], other)
    seen = steady_metrics(server)
    assert seen.total("requests_kept_dense") == sum(loss > limit for loss in lost)
    # A prompt with the same beginning finds exact blocks, whoever left them.
    before = server.metric("vllm:prefix_cache_hits_total")
    again = server.complete(prompts[-1], 20)
    assert server.metric("vllm:prefix_cache_hits_total") - before > 1000
    kept = None if lost[-1] > limit else thinning
    assert_equal(recall_reference, [prompts[-1]], [again], kept)
    server.wait_for_metric("vllm:kv_cache_usage_perc", 0)
