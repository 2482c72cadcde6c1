"""What a step costs outside the model, as requests and contexts grow: ours against plain vLLM's.

``scheduler``: ``schedule()`` and ``update_from_output()`` of vLLM's own scheduler, whose only
difference is the spec of its layers and so the block manager. All requests decode; spans fall due
and are freed meanwhile. Medians show the usual step, means also those that free spans.

``builder``: ``build()`` of both metadata builders for steps in which every request decodes one
token. In half of the rows no span is due, in the others one of every request.

What is compared takes turns in one process, each step of one beside the same step of the other;
ratios are medians of the pairs'. Times are the thread's own on its processor, as a step is short
enough to be doubled by whoever else wants the core. Run: ``python -m bench.growth``.
"""

import argparse
import logging
import random
import time
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from bench.support.repository import BUNDLED
from bench.support.turns import take_turns, timed
from think_vllm.hooks import model_runner
from think_vllm.hooks.engine import remember_plan, selected_engine
from think_vllm.tools.common.machine import this_machine
from think_vllm.tools.common.markdown import table

VLLM_BLOCK_SIZE = 128  # its default on CPUs
SETTINGS: dict[str, dict[str, Any]] = {
    "prune 0.5": {"kv_channel_prune": 0.5},
    "prune 0.5 + k4v2": {"kv_channel_prune": 0.5, "kv_quant": "k4v2"},
}
#: Prompts of the scheduler's requests; the model takes 2,048 tokens.
PROMPT_TOKENS = (400, 1000)


def make_config(settings: dict[str, Any] | None, requests: int, caching: bool) -> VllmConfig:
    """An engine's config, as a server with these settings has it; None for plain vLLM."""
    load_general_plugins()
    return EngineArgs(
        model=str(BUNDLED),
        enforce_eager=True,
        max_num_seqs=requests,
        max_num_batched_tokens=32768,
        enable_prefix_caching=caching,
        additional_config={} if settings is None else {"think": settings},
    ).create_engine_config()


def dense_spec(config: VllmConfig, block_size: int) -> FullAttentionSpec:
    """Plain vLLM's spec of the model's layers."""
    model = config.model_config
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=model.get_num_kv_heads(config.parallel_config),
        head_size=model.get_head_size(),
        dtype=model.dtype,
    )


class Steps:
    """A scheduler whose requests all decode, and a model that always says the same."""

    def __init__(self, config: VllmConfig, spec: FullAttentionSpec, requests: int) -> None:
        blocks = requests * (config.model_config.max_model_len // spec.block_size + 1) + 1
        groups = [KVCacheGroupSpec(["layer"], spec)]
        config.cache_config.block_size = spec.block_size
        config.cache_config.num_gpu_blocks = blocks
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=spec.block_size,
            log_stats=True,
        )
        hasher = None
        if config.cache_config.enable_prefix_caching:
            hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_fn)
            hasher = get_request_block_hasher(spec.block_size, hash_fn)
        rng = random.Random(0)
        for index in range(requests):
            prompt = [rng.randrange(4, 384) for _ in range(rng.randint(*PROMPT_TOKENS))]
            params = SamplingParams(max_tokens=2000, ignore_eos=True)
            params.update_from_generation_config({}, None)
            request = Request(f"r{index}", prompt, params, None, block_hasher=hasher)
            self.scheduler.add_request(request)
        while self.scheduler.get_request_counts()[1] or self._prompts():
            self.run()

    def _prompts(self) -> bool:
        return any(r.num_computed_tokens < r.num_prompt_tokens for r in self.scheduler.running)

    def run(self) -> float:
        """One step; return its seconds of processor time without the model's part."""
        start = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = time.thread_time()
        names = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        done = [
            [9] if requests[name].num_computed_tokens >= requests[name].num_tokens else []
            for name in names
        ]
        sampled = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, done)
        resumed = time.thread_time()
        self.scheduler.update_from_output(output, sampled)
        return scheduled - start + time.thread_time() - resumed


def measure_scheduler(options: argparse.Namespace) -> str:
    """A table of steps of the scheduler."""
    rows = []
    for name, requests in product(options.only, options.requests):
        config = make_config(SETTINGS[name], requests, options.prefix_caching)
        config.cache_config.enable_prefix_caching = options.prefix_caching
        plan = remember_plan(config)
        thin = thin_spec(dense_spec(config, plan.block_size))
        runs = {"thin": Steps(config, thin, requests).run}
        for block_size in {plan.block_size, VLLM_BLOCK_SIZE}:
            config = make_config(None, requests, options.prefix_caching)
            steps = Steps(config, dense_spec(config, block_size), requests)
            runs[f"plain, blocks of {block_size}"] = steps.run
        times = take_turns(runs, options.steps)
        base = f"plain, blocks of {plan.block_size}"
        for manager in runs:
            median, mean = times.median(manager), times.mean(manager)
            us = (f"{1e6 * median:.1f}", f"{1e6 * mean:.1f}")
            ratios = (times.ratio(manager, base), mean / times.mean(base))
            rows.append([name, requests, manager, *us, *(f"{ratio:.3f}" for ratio in ratios)])
    header = ("format", "requests", "manager", "median us", "mean us", "median ratio", "mean ratio")
    return table(header, rows)


def thin_spec(dense: FullAttentionSpec) -> FullAttentionSpec:
    """The spec that layers of the engine whose plan was remembered get."""
    # Imported only now: it registers the spec with its manager.
    from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec

    return ThinKVCacheSpec.from_dense(dense, selected_engine())


def decode_step(context: int, requests: int, block_size: int) -> CommonAttentionMetadata:
    """What a model runner hands to a builder: one query per request, behind ``context`` tokens."""
    starts = torch.arange(requests + 1, dtype=torch.int32)
    lengths = torch.full((requests,), context + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=requests,
        num_actual_tokens=requests,
        max_query_len=1,
        max_seq_len=context + 1,
        block_table_tensor=torch.ones(requests, context // block_size + 1, dtype=torch.int32),
        slot_mapping=torch.zeros(requests, dtype=torch.int64),
        seq_lens_cpu_upper_bound=lengths,
    )


def make_builder(kind: Any, settings: dict[str, Any] | None) -> tuple[Any, int]:
    """A metadata builder of an engine, and the tokens of a block."""
    config = make_config(settings, 64, False)
    with set_current_vllm_config(config):
        size = VLLM_BLOCK_SIZE if settings is None else remember_plan(config).block_size
        spec = dense_spec(config, size)
        spec = spec if settings is None else thin_spec(spec)
        return kind(spec, [], config, torch.device("cpu")), size


def measure_builder(options: argparse.Namespace) -> str:
    """A table of steps of the metadata builders."""
    from think_vllm.worker.cpu.builder import ThinkCPUMetadataBuilder

    rows = []
    plain, plain_size = make_builder(CPUAttentionMetadataBuilder, None)
    for name in options.only:
        ours, size = make_builder(ThinkCPUMetadataBuilder, SETTINGS[name])
        rule = selected_engine().plan.rule
        for requests, wanted in product(options.batches, options.contexts):
            due = rule.due_position(wanted // rule.span_tokens - 1)
            for context, is_due in ((due, True), (due + rule.span_tokens // 2, False)):
                # What our hook in the model runner reports of that step.
                names, none = [str(row) for row in range(requests)], np.zeros(requests, np.int64)
                known = none + min(context, rule.span_tokens)
                step = model_runner.StepRows(names, known, none, names)
                for request in names:
                    ours.state.requests.give(request, known)
                mine = decode_step(context, requests, size)
                theirs = decode_step(context, requests, plain_size)
                builds = {"plain": partial(plain.build, 0, theirs)}
                builds["thin"] = partial(ours.build, 0, mine)
                runs = {who: timed(run, time.thread_time) for who, run in builds.items()}
                with patch.object(model_runner, "_step_rows", step):
                    (decode,) = ours.build(0, mine).tensors.passes
                    assert (decode.due is not None) == is_due
                    times = take_turns(runs, options.steps)
                us = [f"{1e6 * times.median(who):.1f}" for who in runs]
                ratio = f"{times.ratio('thin', 'plain'):.3f}"
                rows.append([name, requests, context, "all" if is_due else "none", *us, ratio])
    header = ("format", "requests", "context", "due", "plain us", "thin us", "ratio")
    return table(header, rows)


PARTS = {"scheduler": measure_scheduler, "builder": measure_builder}


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--requests", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64])
    contexts = [1024, 4096, 16384, 65536, 131072]
    parser.add_argument("--contexts", nargs="+", type=int, default=contexts)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prefix-caching", action="store_true", help="in both schedulers")
    options = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.ERROR)
    print(this_machine())
    for part in options.parts:
        print(f"\n{part}, {options.steps} steps\n\n{PARTS[part](options)}", flush=True)


if __name__ == "__main__":
    main()
