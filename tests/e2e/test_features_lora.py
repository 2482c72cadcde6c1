"""LoRA: base model and two adapters at the same time, each against a model with it merged."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.checks import EAGER, TOLERANCE, plan_served, random_prompts, worst_differences
from tests.support.adapters import make_adapter, merge_adapter
from tests.support.models import make_llama
from tests.support.reference import Reference, Thinning
from tests.support.server import Completion, Server

pytestmark = pytest.mark.e2e


def test_adapters_and_base_model_in_one_batch(serve: Callable[..., Server], tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", head_size=128, num_heads=4, num_kv_heads=2)
    references = {str(base): Reference(base)}
    modules = []
    for seed, name in enumerate(("first", "second"), start=1):
        adapter = make_adapter(tmp_path / name, base, seed)
        references[name] = Reference(merge_adapter(tmp_path / f"{name}-merged", base, adapter))
        modules.append(f"{name}={adapter}")
    plan, arguments = plan_served(128, kv_channel_prune=0.5, kv_prefix_cache="dense")
    # One slot more than adapters: on CPUs vLLM 0.32 gives requests of the base model, where they
    # share a batch with others, the adapter in the last slot, and that of an empty slot is zero.
    lora = ("--enable-lora", "--max-loras", "3", "--max-lora-rank", "8", "--lora-modules", *modules)
    # In chunks; and --disable-log-stats, which takes the statistics out of the scheduler.
    chunks = ("--max-num-batched-tokens", "256", "--disable-log-stats")
    server = serve(*EAGER, *arguments, *lora, *chunks, model=base)

    # The same prompts for all: whoever got another one's blocks would answer as that one.
    prompts = random_prompts([40, plan.span_tokens + 32, 700])
    asked = [(name, prompt) for prompt in prompts for name in references]

    def ask(request: tuple[str, list[int]]) -> Completion:
        name, prompt = request
        # Some 250 tokens more: spans fill while decoding, too.
        return server.complete(prompt, plan.span_tokens + 60, model=name, frequency_penalty=2.0)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    thinning = Thinning.of(plan)
    for name, reference in references.items():
        own = [answer for (of, _), answer in zip(asked, answers, strict=True) if of == name]
        worst = worst_differences(reference, prompts, own, thinning)
        assert all(x < TOLERANCE for x in worst.values()), (name, worst)
        # The comparison would notice another adapter, and keys that are not pruned.
        for other in references.values():
            if other is not reference:
                worst = worst_differences(other, prompts, own, thinning)
                assert min(worst.values()) > 10 * TOLERANCE
        worst = worst_differences(reference, prompts, own, None)
        assert min(worst.values()) > 10 * TOLERANCE
