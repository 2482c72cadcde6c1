"""Statically pruned servers against a transformers model all keys of which are masked.

The channels are at random, so another head's, another layer's or a dense key shows at once.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.e2e.checks import EAGER, FLOAT32, TOLERANCE, random_prompts
from tests.support.models import make_exact_llama
from tests.support.server import Completion, Server
from tests.support.static_tables import MaskedModel, mask, random_tables
from think_vllm.cli.plan_static import static_budget
from think_vllm.config import ThinkConfig
from think_vllm.static.plan import StaticPlan, plan_static

pytestmark = pytest.mark.e2e

#: Key/value heads and layers of the bundled model.
HEADS = LAYERS = 2
HITS = "vllm:prefix_cache_hits_total"


class Static:
    """A server and its truth."""

    def __init__(self, model: Path, folder: Path, block_size: int, **given: float | str) -> None:
        tables, file = random_tables(model), folder / "tables.json"
        tables.save(file)
        settings = {"kv_select": "static", "kv_channel_tables_file": str(file), **given}
        config = ThinkConfig.model_validate(settings)
        plan = plan_static(config, tables.shape.head_size, 4, block_size)
        assert plan is not None
        self.plan: StaticPlan = plan
        self.arguments = ["--block-size", str(block_size)]
        for name, value in settings.items():
            self.arguments += [f"--{name.replace('_', '-')}", str(value)]
        kept = mask(tables.key_channels, plan.key_channels)
        kept_values = mask(tables.value_channels, plan.value_channels)
        self.reference = MaskedModel(model, kept, kept_values, coded=plan.is_coded)
        self.whole = MaskedModel(model, torch.ones_like(kept), torch.ones_like(kept))

    def worst(
        self, prompts: list[list[int]], completions: list[Completion], whole: bool = False
    ) -> float:
        """Largest difference of a log-probability from the reference, or from the whole model."""
        reference = self.whole if whole else self.reference
        return max(
            float(
                (reference.logprobs(prompt, done.tokens) - torch.tensor(done.logprobs)).abs().max()
            )
            for prompt, done in zip(prompts, completions, strict=True)
        )

    def check(self, server: Server, lengths: list[int], counts: list[int]) -> None:
        """Compare a load with the reference, and see that the whole model says something else."""
        prompts = random_prompts(lengths)
        done = server.complete_all(prompts, counts)
        assert self.worst(prompts, done) < TOLERANCE
        assert self.worst(prompts, done, whole=True) > 10 * TOLERANCE


class TestPlain:
    """Keys and values, small chunks, a pool too small for the load, prefix caching."""

    POOL_BYTES = 70 * 81_920

    @pytest.fixture(scope="class")
    def static(self, recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Static:
        folder = tmp_path_factory.mktemp("tables")
        return Static(recall_model, folder, 32, kv_channel_prune=0.5, kv_value_prune=0.25)

    @pytest.fixture(scope="class")
    def server(self, serve: Callable[..., Server], static: Static) -> Server:
        limits = ("--max-num-batched-tokens", "128", "--max-model-len", "2048")
        # With vLLM's default compilation.
        return serve(*FLOAT32, *static.arguments, *limits, kv_cache_bytes=self.POOL_BYTES)

    def test_cache_holds_more_blocks(self, server: Server, static: Static) -> None:
        # 2 layers x 2 heads x 32 tokens x (64 + 96) channels in float32, by hand.
        fields = static_budget(static.plan, HEADS, LAYERS, self.POOL_BYTES, 1024)
        assert fields["num_blocks"] == 69
        assert server.metric("vllm:cache_config_info", 'num_gpu_blocks="70"') > 0
        assert fields["effective_multiple"] == pytest.approx(1.6)
        log = server.log_tail(10_000)
        assert log.count("nothing is compacted, and prefixes are shared exactly") == 1
        # What is on /metrics is vLLM's own: nothing is compacted that could be counted.
        assert "think_vllm" not in server.metrics_text()

    def test_prompts_of_any_length(self, server: Server, static: Static) -> None:
        static.check(server, [1, 2, 31, 32, 33, 64, 127, 128, 129, 250], [12] * 10)

    def test_prefix_hits_are_exact(self, server: Server, static: Static) -> None:
        shared = random_prompts([700], seed=5)[0]
        tails = random_prompts([40, 1, 90], seed=6)
        prompts = [shared, *(shared + tail for tail in tails)]
        first = [server.complete(prompts[0], 10)]
        before = server.metric(HITS)
        rest = [server.complete(prompt, 10) for prompt in prompts]
        # 21 full blocks of 32 tokens, four times.
        assert server.metric(HITS) - before >= 4 * 672
        assert static.worst(prompts, rest) < TOLERANCE
        again = torch.tensor(rest[0].logprobs) - torch.tensor(first[0].logprobs)
        assert rest[0].tokens == first[0].tokens
        assert float(again.abs().max()) < TOLERANCE

    def test_preempted_requests(self, server: Server, static: Static) -> None:
        before = server.metric("vllm:num_preemptions_total")
        # One HTTP request, so that all start together however busy the machine is: in 38 blocks
        # of the 69 that there are, and they grow to 137.
        prompts = random_prompts([100, 133, 240, 80, 150, 155, 60, 170])
        done = server.complete_together(prompts, 400)
        assert static.worst(prompts, done) < TOLERANCE
        assert server.metric("vllm:num_preemptions_total") > before


def test_codes_on_two_ranks(serve: Callable[..., Server], tmp_path: Path) -> None:
    # Whole prompts in one step. Each rank has one KV head, and takes its own row of the tables.
    # Codes are compared on a model whose keys are the same bits everywhere: see its docstring.
    model = make_exact_llama(tmp_path / "model", head_size=64, num_heads=4, num_kv_heads=2)
    static = Static(model, tmp_path, 64, kv_channel_prune=0.3, kv_quant="fp8")
    assert (static.plan.key_channels, static.plan.value_channels) == (45, 64)
    cores = sorted(os.sched_getaffinity(0))
    server = serve(
        *EAGER,
        *static.arguments,
        *("--tensor-parallel-size", "2", "--max-num-batched-tokens", "4096"),
        model=model,
        environment={"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"},
    )
    static.check(server, [1, 63, 64, 65, 500, 1000], [70] * 6)
