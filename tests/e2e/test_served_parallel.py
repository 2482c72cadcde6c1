"""Several ranks, on vLLM's own executors: each compacts the heads and layers that it has.

A rank is bound to one core, as vLLM's CPU build asks for where there are fewer NUMA nodes than
ranks. The pools are small, so that requests lose their blocks while other steps are under way.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.e2e.conftest import Serve
from tests.support import checks
from tests.support.checks import EAGER, FLOAT32, TOLERANCE
from tests.support.metrics import read_metrics, steady_metrics
from tests.support.models import copy_tokenizer, make_llama
from tests.support.reference import Reference, Thinning
from tests.support.served import Completion
from think_vllm.hooks.model_support import AttentionLayers
from think_vllm.plan.planner import BlockPlan
from think_vllm.tools.plan import budget_fields

pytestmark = pytest.mark.e2e

MAX_MODEL_LEN = 1640
PREEMPTIONS = "vllm:num_preemptions_total"
#: Several steps for most prompts, each shared by several requests.
LIMITS = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "160")


class Ranks:
    """A server of several ranks, whose cache holds little more than its longest request.

    Heads are KV heads on one rank, layers those of the rank that has most; a block has
    ``block_runs`` runs: layers times heads of all ranks of one of the data-parallel ``engines``.
    """

    def __init__(
        self,
        serve: Serve,
        plan: BlockPlan,
        arguments: list[str],
        *,
        heads: int,
        layers: int,
        block_runs: int,
        engines: int = 1,
        model: Path | None = None,
    ) -> None:
        self.plan, self.engines = plan, engines
        self.block_bytes = plan.layout.run_bytes * block_runs
        self.num_blocks = MAX_MODEL_LEN // plan.block_size + 2
        self.pool_bytes = self.num_blocks * plan.layout.run_bytes * heads * layers
        cores = sorted(os.sched_getaffinity(0))
        bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
        options = {"kv_cache_bytes": self.pool_bytes, "environment": bound}
        if model is not None:
            options["model"] = model
        self.server = serve(*arguments, *LIMITS, **options)
        kinds = AttentionLayers(full=layers, window=0, window_tokens=0)
        fields = budget_fields(plan, heads, kinds, self.pool_bytes, MAX_MODEL_LEN)
        assert fields["num_blocks"] == self.num_blocks - 1

    def check(self, reference: Reference, **options: float) -> list[Completion]:
        """Compare a load that does not fit: short and long prompts, and spans that fill later."""
        span = self.plan.span_tokens
        self.lengths = [1, 5, 33, 40, 60, 90, span + 31, span + 32, 2 * span + 33, 380, 610, 1500]
        counts = [min(2 * span + 40, 500)] * (len(self.lengths) - 1) + [120]
        thinning = Thinning.of(self.plan)
        done = checks.check_served(
            self.server, reference, self.lengths, counts, thinning, **options
        )
        assert self.server.metric(PREEMPTIONS) > 0
        # The comparison would notice if nothing were thin.
        assert self.longest_difference(reference, done, None) > 10 * TOLERANCE
        self._check_size()
        self._check_metrics()
        return done

    def check_dense(self, reference: Reference, **options: float) -> None:
        """Compare a request that stays dense, on every rank, beside pruned ones."""
        asks = [{}, {"kv_channel_prune": False}, {}]
        prompts = checks.random_prompts([700, 900, 610], seed=6)
        wishes = [{"vllm_xargs": asked, **options} for asked in asks]
        answers = self.server.complete_each(prompts, 150, wishes)
        for prompt, asked, answer in zip(prompts, asks, answers, strict=True):
            checks.assert_equal(
                reference, [prompt], [answer], None if asked else Thinning.of(self.plan)
            )

    def longest_difference(
        self, reference: Reference, done: list[Completion], thinning: Thinning | None
    ) -> float:
        """How far the longest request is from a reference."""
        prompts = checks.random_prompts(self.lengths)
        return checks.worst_differences(reference, prompts[-1:], done[-1:], thinning)[
            self.lengths[-1]
        ]

    def _check_size(self) -> None:
        assert self.server.log_tail(10_000).count("multiply by these") == 1
        # VLLM has as many blocks as `think-vllm plan` counts, which leaves out the null block;
        # it adds up those of its engines.
        size = f'num_gpu_blocks="{self.num_blocks * self.engines}"'
        assert self.server.metric("vllm:cache_config_info", size) > 0

    def _check_metrics(self) -> None:
        seen = steady_metrics(self.server)
        spans = seen.total("spans_compacted")
        # The longest prompt alone has as many.
        assert spans >= self.plan.rule.prompt_spans(self.lengths[-1])
        blocks = spans * (self.plan.span_blocks - self.plan.thin_blocks)
        assert seen.total("blocks_freed") == blocks
        assert seen.total("freed_bytes") == blocks * self.block_bytes
        # Of one rank's layers and heads, for every prompt at least.
        assert seen.value("score_mass_kept_count") >= len(self.lengths)
        assert seen.total("compaction_seconds") > 0
        usable = (self.num_blocks - 1) * self.plan.block_size * self.engines
        assert seen.value("capacity_tokens", kind="dense") == usable


def test_tensor_parallel(serve: Serve, exact_model: Path, exact_reference: Reference) -> None:
    # One KV head a rank, pruned and quantized.
    plan, arguments = checks.plan_served(128, kv_channel_prune=0.5, kv_quant="k4v2")
    arguments += [*EAGER, "--tensor-parallel-size", "2"]
    ranks = Ranks(serve, plan, arguments, heads=1, layers=1, block_runs=2, model=exact_model)
    # Greedy answers of a random model go round in circles: groups of equal tokens.
    ranks.check(exact_reference, frequency_penalty=2.0)
    ranks.check_dense(exact_reference, frequency_penalty=2.0)


@pytest.mark.extended
def test_tensor_parallel_with_a_shared_kv_head(serve: Serve, tmp_path: Path) -> None:
    # Fewer KV heads than ranks: vLLM gives the one head to both, and each prunes it for the query
    # heads that it has, as if the model had a KV head for each rank.
    model = make_llama(tmp_path / "one", head_size=64, num_heads=8, num_kv_heads=1)
    plan, arguments = checks.plan_served(64, kv_channel_prune=0.5)
    arguments += [*EAGER, "--tensor-parallel-size", "2"]
    ranks = Ranks(serve, plan, arguments, heads=1, layers=2, block_runs=4, model=model)
    done = ranks.check(Reference(repeat_kv_heads(model, tmp_path / "two", 2)))
    # On one device, all query heads choose together.
    assert ranks.longest_difference(Reference(model), done, Thinning.of(plan)) > TOLERANCE


@pytest.mark.extended
def test_pipeline_parallel(serve: Serve, tmp_path: Path) -> None:
    # Two steps are under way at a time. Not eager: with --enforce-eager vLLM's CPU build fails
    # with or without thin blocks, as its second stage gets no buffers for what it receives.
    model = make_llama(tmp_path, head_size=64, num_heads=4, num_kv_heads=2, num_layers=3)
    plan, arguments = checks.plan_served(64, kv_channel_prune=0.5)
    arguments += [*FLOAT32, "--pipeline-parallel-size", "2"]
    ranks = Ranks(serve, plan, arguments, heads=2, layers=2, block_runs=6, model=model)
    ranks.check(Reference(model))
    ranks.check_dense(Reference(model))


@pytest.mark.extended
def test_data_parallel(serve: Serve, recall_reference: Reference) -> None:
    # Either of two API servers shows the metrics of both engines.
    plan, arguments = checks.plan_served(128, kv_channel_prune=0.5)
    arguments += [*EAGER, "--data-parallel-size", "2", "--api-server-count", "2"]
    ranks = Ranks(serve, plan, arguments, heads=2, layers=2, block_runs=4, engines=2)
    ranks.check(recall_reference)
    seen = read_metrics(ranks.server)
    for engine in ("0", "1"):
        assert ranks.server.metric("vllm:request_success_total", f'engine="{engine}"') > 0
        assert seen.value("score_mass_kept_count", engine=engine) > 0
    # Two at a time, so that nothing is preempted: every span counts once, wherever it was made.
    prompts = checks.random_prompts([600] * 6, seed=5)
    spans = len(prompts) * plan.rule.prompt_spans(600)
    for first in range(0, len(prompts), 2):
        ranks.server.complete_all(prompts[first : first + 2], [4, 4])
    after = steady_metrics(ranks.server, seen.total("spans_compacted") + spans)
    choices = after.value("score_mass_kept_count") - seen.value("score_mass_kept_count")
    assert choices == len(prompts) * 2 * 2


def repeat_kv_heads(model: Path, path: Path, times: int) -> Path:
    """Save the same model with every KV head ``times`` times."""
    one = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = one.state_dict()
    size = one.config.head_dim
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weights[name].unflatten(0, (-1, size))
            weights[name] = heads.repeat_interleave(times, dim=0).flatten(0, 1)
    one.config.num_key_value_heads *= times
    LlamaForCausalLM(one.config).save_pretrained(path, state_dict=weights)
    copy_tokenizer(path)
    return path
