"""Sliding-window layers beside full ones; families of such models: ``test_families.py``."""

from pathlib import Path

from tests.engine.conftest import Load
from tests.support.checks import EAGER, check_served, plan_served, random_prompts
from tests.support.models import make_exact_llama
from tests.support.reference import Reference, Thinning

HEAD_SIZE = 64
FULL, WINDOW = "full_attention", "sliding_attention"


def test_windows_in_blocks_that_held_codes(load: Load, tmp_path: Path) -> None:
    # A pool little larger than one request: sliding windows get blocks that were thin a moment ago,
    # and whose codes spell NaNs; full layers get theirs, and requests are preempted.
    model = make_exact_llama(
        tmp_path, head_size=HEAD_SIZE, num_heads=4, num_kv_heads=2, num_layers=2,
        # In this order, so that the quantized keys are the exact ones of the first layer.
        layer_types=[FULL, WINDOW], sliding_window=100,
    )  # fmt: skip
    plan, flags = plan_served(HEAD_SIZE, kv_channel_prune=0.5, kv_quant="kivi4")
    limits = ("--max-model-len", "2048", "--max-num-batched-tokens", "256")
    # A whole request, and what a window and a chunk take.
    blocks = (2048 + 100 + 256) // plan.block_size + 4
    pool = blocks * plan.layout.run_bytes * 2
    engine = load(*EAGER, *flags, *limits, model=model, kv_cache_bytes=pool)
    # Two requests whose thin blocks are all over the pool when they have ended.
    for prompt in random_prompts([2000, 1950], seed=1):
        engine.complete(prompt, 40)
    lengths = [1500, 950, 500, *range(20, 200, 15)]
    check_served(
        engine, Reference(model), lengths, [300] * len(lengths), Thinning.of(plan),
        frequency_penalty=2.0,
    )  # fmt: skip
    assert engine.metric("vllm:num_preemptions_total") > 0
