"""Static pruning against a transformers model all keys of which are masked; see ``Static``."""

from pathlib import Path

import pytest
import torch

from tests.engine.conftest import Load
from tests.support.checks import FLOAT32, HITS, TOLERANCE, random_prompts
from tests.support.engine import Engine
from tests.support.static_server import Static
from think_vllm.hooks.model_support import AttentionLayers
from think_vllm.tools.plan import budget_fields

#: Key/value heads and layers of the bundled model.
HEADS = LAYERS = 2


class TestPlain:
    """Keys and values, small chunks, a pool too small for the load, prefix caching."""

    POOL_BYTES = 70 * 81_920

    @pytest.fixture(scope="class")
    def static(self, recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Static:
        folder = tmp_path_factory.mktemp("tables")
        return Static(recall_model, folder, 32, kv_channel_prune=0.5, kv_value_prune=0.25)

    @pytest.fixture(scope="class")
    def engine(self, load: Load, static: Static) -> Engine:
        limits = ("--max-num-batched-tokens", "128", "--max-model-len", "2048")
        # With vLLM's default compilation.
        return load(*FLOAT32, *static.arguments, *limits, kv_cache_bytes=self.POOL_BYTES)

    def test_cache_holds_more_blocks(self, engine: Engine, static: Static) -> None:
        # 2 layers x 2 heads x 32 tokens x (64 + 96) channels in float32, by hand.
        fields = budget_fields(
            static.plan, HEADS, AttentionLayers(LAYERS, 0, 0), self.POOL_BYTES, 1024
        )
        assert fields["num_blocks"] == 69
        assert engine.metric("vllm:cache_config_info", 'num_gpu_blocks="70"') > 0
        assert fields["effective_multiple"] == pytest.approx(1.6)
        log = engine.log_tail(10_000)
        assert log.count("nothing is compacted, and prefixes are shared exactly") == 1
        # What is on /metrics is vLLM's own: nothing is compacted that could be counted.
        assert "think_vllm" not in engine.metrics_text()

    def test_prompts_of_any_length(self, engine: Engine, static: Static) -> None:
        static.check(engine, [1, 2, 31, 32, 33, 64, 127, 128, 129, 250], [12] * 10)

    def test_prefix_hits_are_exact(self, engine: Engine, static: Static) -> None:
        shared = random_prompts([700], seed=5)[0]
        tails = random_prompts([40, 1, 90], seed=6)
        prompts = [shared, *(shared + tail for tail in tails)]
        first = [engine.complete(prompts[0], 10)]
        before = engine.metric(HITS)
        rest = [engine.complete(prompt, 10) for prompt in prompts]
        # 21 full blocks of 32 tokens, four times.
        assert engine.metric(HITS) - before >= 4 * 672
        assert static.worst(prompts, rest) < TOLERANCE
        again = torch.tensor(rest[0].logprobs) - torch.tensor(first[0].logprobs)
        assert rest[0].tokens == first[0].tokens
        assert float(again.abs().max()) < TOLERANCE

    def test_preempted_requests(self, engine: Engine, static: Static) -> None:
        before = engine.metric("vllm:num_preemptions_total")
        # All start together, in 38 blocks of the 69 that there are, and they grow to 137.
        prompts = random_prompts([100, 133, 240, 80, 150, 155, 60, 170])
        done = engine.complete_all(prompts, [400] * len(prompts))
        assert static.worst(prompts, done) < TOLERANCE
        assert engine.metric("vllm:num_preemptions_total") > before
