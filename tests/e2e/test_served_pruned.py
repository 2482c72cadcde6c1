"""A pruned server: its log-probabilities, the anchor of this project, its prefixes and metrics.

Other settings, over the same engine without HTTP: tests/engine.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.e2e.conftest import Serve
from tests.support import checks
from tests.support.checks import EAGER, HALF, HITS, TOLERANCE
from tests.support.metrics import Snapshot, read_metrics, steady_metrics
from tests.support.prefix_reference import view_of, worst
from tests.support.reference import Reference
from tests.support.served import Completion
from tests.support.server import Server
from think_vllm.hooks.model_support import AttentionLayers
from think_vllm.metrics.catalog import SHARE_EDGES
from think_vllm.tools.plan import budget_fields

pytestmark = pytest.mark.e2e

PRUNED = (*EAGER, "--kv-channel-prune", "0.5", "--max-num-batched-tokens", "2048")
DENSE = {"vllm_xargs": {"kv_channel_prune": False}}


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    # Prompts fit one chunk.
    return serve(*PRUNED)


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        # A prompt of n spans plus the recent window is the first whose n-th span is thin.
        ([191, 192, 193, 223, 224, 225, 415, 416, 417], [6] * 9),
        # Short prompts choose channels long before their first span is full.
        ([5, 40, 230, 400], [700, 520, 420, 410]),
        ([1777, 1999, 1000], [24] * 3),
    ],
    ids=["span edges", "decoded spans", "long"],
)
def test_logprobs_equal_the_reference(server, recall_reference, lengths, counts):
    # The comparison would notice if nothing were pruned, or too late.
    others = [None] if lengths[-1] == 1000 else []
    checks.check_served(server, recall_reference, lengths, counts, HALF, others=others)


def test_prompts_shorter_than_the_windows(server, recall_reference):
    lengths = [1, 2, 31, 32, 33, 50]
    checks.check_served(server, recall_reference, lengths, [8] * len(lengths), HALF, together=False)


class TestThinPrefixes:
    def test_hit_on_thin_spans(self, server, prefix_reference):
        donor, other = checks.random_prompts([1000, 150], seed=11)
        left, hit = checks.hit_of(server, donor, 8)
        assert hit == 0
        view = view_of(donor, left, HALF)
        assert worst(prefix_reference, donor, left, view) < TOLERANCE
        # 900 shared tokens hold four spans; the fifth is thin and has others' tokens.
        prompt = donor[:900] + other
        answer, hit = checks.hit_of(server, prompt, 300)
        assert hit == 4 * 192
        hit_view = view_of(prompt, answer, HALF, cached=view, cached_spans=4, cached_tokens=4 * 192)
        assert worst(prefix_reference, prompt, answer, hit_view) < TOLERANCE
        # The comparison sees that the prefix was thin for the prompt's own queries.
        assert (
            worst(prefix_reference, prompt, answer, view_of(prompt, answer, HALF)) > 10 * TOLERANCE
        )

    def test_conversation(self, server, prefix_reference):
        first, second = checks.random_prompts([1000, 60], seed=12)
        left, hit = checks.hit_of(server, first, 16)
        view = view_of(first, left, HALF)
        assert worst(prefix_reference, first, left, view) < TOLERANCE
        prompt = first + left.tokens + second
        answer, hit = checks.hit_of(server, prompt, 40)
        # (1015 - 32) // 192 = 5 thin spans, and one dense block of question and answer behind.
        assert hit == 5 * 192 + 48
        hit_view = view_of(prompt, answer, HALF, cached=view, cached_spans=5, cached_tokens=hit)
        assert worst(prefix_reference, prompt, answer, hit_view) < TOLERANCE

    def test_many_requests_share_a_prefix(self, server, prefix_reference):
        system, *questions = checks.random_prompts(
            [800, *[40 + 13 * i for i in range(12)]], seed=13
        )
        left = server.complete(system, 2)
        view = view_of(system, left, HALF)
        prefix_reference.logprobs(system, left.tokens, view)
        prompts = [system + question for question in questions]
        before = server.metric(HITS)
        answers = server.complete_all(prompts, [250] * len(prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            # Four thin spans; the dense tail is one block, which ends at 816 > 800.
            hit_view = view_of(prompt, answer, HALF, cached=view, cached_spans=4, cached_tokens=768)
            assert worst(prefix_reference, prompt, answer, hit_view) < TOLERANCE
        assert server.metric(HITS) - before == len(prompts) * 768
        server.wait_for_metric("vllm:kv_cache_usage_perc", 0)

    def test_first_of_equal_prompts_is_exact(self, server, recall_reference):
        # Those of its step are, too; whichever comes a step later may hit what it left.
        (prompt,) = checks.random_prompts([500], seed=14)
        answers = server.complete_all([prompt] * 3, [30] * 3)
        found = [
            checks.worst_differences(recall_reference, [prompt], [answer], HALF)[500]
            for answer in answers
        ]
        assert min(found) < TOLERANCE, found

    def test_dense_requests_beside_pruned_ones(self, server, recall_reference):
        prompts = checks.random_prompts([700, 1001, 60, 640, 1003, 230], seed=15)
        answers = server.complete_each(prompts, 300, [{}, DENSE] * 3)
        checks.assert_equal(recall_reference, prompts[1::2], answers[1::2], None)
        checks.assert_equal(recall_reference, prompts[::2], answers[::2], HALF)
        # The comparison sees which of them were pruned.
        checks.assert_unequal(recall_reference, prompts[1::2], answers[1::2], HALF)
        server.wait_for_metric("vllm:kv_cache_usage_perc", 0)

    def test_dense_requests_hit_nothing_thin(self, server, recall_reference):
        donor, *others = checks.random_prompts([1000, 150, 140, 130], seed=18)
        server.complete(donor, 8)
        first, second, third = (donor[:900] + other for other in others)
        # Of what the pruned one has left, it takes no thin span: all is computed.
        dense, hit = checks.hit_of(server, first, 300, **DENSE)
        assert hit == 0
        # Exact blocks of a dense one are as good for others, dense and pruned.
        again, hit = checks.hit_of(server, second, 100, **DENSE)
        assert hit == 900 // 48 * 48
        pruned, hit = checks.hit_of(server, third, 100)
        assert hit == 900 // 48 * 48
        for prompt, answer, thinning in (
            (first, dense, None),
            (second, again, None),
            (third, pruned, HALF),
        ):
            checks.assert_equal(recall_reference, [prompt], [answer], thinning)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"kv_channel_prune": 0.3}, "kv_channel_prune is 0.3"),
            ({"kv_channel_prune": "no"}, "give false to keep its blocks dense"),
            ({"kv_evict_budget": 512}, "this server evicts nothing"),
            ({"kv_quant": "none"}, "the rest are settings of the server"),
        ],
        ids=str,
    )
    def test_wrong_overrides_are_rejected_alone(self, server, asked, message):
        (prompt,) = checks.random_prompts([500], seed=19)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.complete, prompt, 60)
            body = {"prompt": prompt, "max_tokens": 5, "vllm_xargs": asked}
            rejected = server.post("/v1/completions", body)
            assert len(running.result().tokens) == 60
        assert rejected.status_code == 400, rejected.text
        assert message in rejected.text

    def test_metrics(self, server, recall_reference):
        plan, _ = checks.plan_served(128, kv_channel_prune=0.5)
        prompts = checks.random_prompts([40, 230, 700, 1000], seed=16)
        spans = sum(plan.rule.prompt_spans(len(prompt)) for prompt in prompts)
        before = read_metrics(server)
        answers = server.complete_all(prompts, [4] * len(prompts))
        after = steady_metrics(server, before.total("spans_compacted") + spans)

        def more(counter: str) -> float:
            return after.total(counter) - before.total(counter)

        # Two layers of two heads.
        block_bytes = plan.layout.run_bytes * 2 * 2
        assert (spans, plan.span_blocks - plan.thin_blocks) == (9, 1)
        assert more("blocks_freed") == spans
        assert more("freed_bytes") == spans * block_bytes
        assert more("thin_prefix_hit_tokens") == 0
        assert more("compaction_seconds") > 0
        assert after.value("capacity_multiple") == 0
        # Whole requests of max_model_len; ``think-vllm plan`` counts alike.
        pool = 256 * 2**20
        fields = budget_fields(plan, 2, AttentionLayers(2, 0, 0), pool, 2048)
        assert after.value("capacity_tokens", kind="dense") == fields["plain_tokens"]
        assert after.value("capacity_tokens", kind="planned") == fields["thin_tokens"]
        self.check_shares(recall_reference, prompts, answers, before, after)
        # The same again: all that may be hit is, three spans of 700 tokens and five of 1000.
        spans_before = after.total("spans_compacted")
        server.complete_all(prompts[2:], [4] * 2)
        again = steady_metrics(server, spans_before)
        hit = again.total("thin_prefix_hit_tokens") - after.total("thin_prefix_hit_tokens")
        assert hit == (3 + 5) * plan.span_tokens

    def check_shares(
        self,
        reference: Reference,
        prompts: list[list[int]],
        answers: list[Completion],
        before: Snapshot,
        after: Snapshot,
    ) -> None:
        """Compare the histogram with shares of the reference's scores, in float64."""
        shares = []
        for prompt, answer in zip(prompts, answers, strict=True):
            reference.logprobs(prompt, answer.tokens, HALF)
            shares.append(reference.shares.flatten())
        expected = torch.cat(shares)
        count = after.value("score_mass_kept_count") - before.value("score_mass_kept_count")
        assert count == expected.numel() == len(prompts) * 2 * 2
        total = after.value("score_mass_kept_sum") - before.value("score_mass_kept_sum")
        # Scores are sums of float32; 63 of 128 channels at random would have half of the mass.
        assert abs(total - float(expected.sum())) < 1e-5 * count
        assert expected.mean() > 0.6
        found = zip(SHARE_EDGES, after.share_buckets(), before.share_buckets(), strict=True)
        for edge, then, earlier in found:
            least, most = ((expected <= edge + x).sum() for x in (-1e-5, 1e-5))
            assert least <= then - earlier <= most

    def test_metrics_while_a_request_runs(self, server):
        # The server does not wait for its clients, and a request may be done before they look.
        for seed in range(17, 27):
            (prompt,) = checks.random_prompts([1000], seed=seed)
            stream = server.stream(prompt=prompt, max_tokens=1000, ignore_eos=True)
            held = 0.0
            for _ in stream:
                seen = read_metrics(server)
                held = seen.value("held_tokens", kind="thin")
                if held:
                    break
            stream.close()
            steady_metrics(server)
            if held:
                break
        assert held >= 5 * 192
        assert held % 192 == 0
        # As many blocks as tokens need, but for one a span.
        rows = -(-(held + seen.value("held_tokens", kind="dense")) // 48)
        assert seen.value("capacity_multiple") == rows / (rows - held / 192)
