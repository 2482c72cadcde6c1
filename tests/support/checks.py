"""Comparing log-probabilities of a server or an engine with the reference."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.plans import make_plan
from tests.support.reference import Reference, Thinning
from tests.support.served import KV_CACHE_BYTES, Completion, Served
from think_vllm.plan.planner import BlockPlan
from think_vllm.tools.plan import parse_options, plan_report

#: Float32: two implementations that sum in different orders differ by some 1e-6 here; one wrong
#: channel of one span shows as 1e-3 and more.
TOLERANCE = 1e-4
FLOAT32 = ("--dtype", "float32", "--max-num-seqs", "16")
EAGER = (*FLOAT32, "--enforce-eager")
HITS = "vllm:prefix_cache_hits_total"

#: 0.5 at head size 128 in float32: 63 channels, 4 blocks of 48 tokens become 3.
HALF = Thinning(key_channels=63, span_tokens=192)
#: With 0.3 of the value channels too: 64 and 88 channels, 5 blocks of 48 tokens become 3.
BOTH = Thinning(key_channels=64, span_tokens=240, value_channels=88)


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random words of the bundled model's vocabulary, whose first 4 ids are special."""
    rng = random.Random(seed)
    return [[rng.randrange(4, 384) for _ in range(length)] for length in lengths]


def plan_served(
    head_size: int, block_size: int | None = None, itemsize: int = 4, **settings: float | str
) -> tuple[BlockPlan, list[str]]:
    """Plan what a server with these settings does, and say which arguments they are."""
    plan = make_plan(head_size, itemsize, block_size, **settings)
    given = settings if block_size is None else {**settings, "block_size": block_size}
    return plan, [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def check_planned(
    served: Served, model: Path, flags: Sequence[str], memory_bytes: int = KV_CACHE_BYTES
) -> None:
    """Compare ``think-vllm plan`` with an engine of float32: its log, its blocks, its capacity.

    Both were asked for ``flags``; the model's longest requests have 4096 tokens.
    """
    budget = ["--memory", str(memory_bytes), "--context-length", "4096", "--dtype", "float32"]
    fields, lines = plan_report(*parse_options([str(model), *flags, *budget]))
    log = served.log_tail(10_000)
    unsaid = [line for line in lines if line not in log]
    # Only the plan counts a budget, and says what does not fit.
    assert all("GiB of KV cache" in line or "were asked for" in line for line in unsaid)
    blocks = f'num_gpu_blocks="{fields["num_blocks"] + 1}"'  # the null block
    assert served.metric("vllm:cache_config_info", blocks) > 0
    for kind, field in (("dense", "plain_tokens"), ("planned", "thin_tokens")):
        assert served.metric("think_vllm:capacity_tokens", f'kind="{kind}"') == fields[field]


def differences(
    reference: Reference, prompt: list[int], completion: Completion, thinning: Thinning | None
) -> torch.Tensor:
    """How far each log-probability is from the reference: [num_tokens] float32."""
    expected = torch.tensor(reference.logprobs(prompt, completion.tokens, thinning))
    return (expected - torch.tensor(completion.logprobs)).abs()


def worst_differences(
    reference: Reference,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    thinning: Thinning | None,
) -> dict[int, float]:
    """Largest difference of a log-probability, by prompt length."""
    return {
        len(prompt): float(differences(reference, prompt, completion, thinning).max())
        for prompt, completion in zip(prompts, completions, strict=True)
    }


def assert_equal(
    reference: Reference,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    thinning: Thinning | None,
) -> None:
    """Every log-probability is the reference's."""
    worst = worst_differences(reference, prompts, completions, thinning)
    assert all(x < TOLERANCE for x in worst.values()), worst


def assert_unequal(
    reference: Reference,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    thinning: Thinning | None,
) -> None:
    """The comparison would notice another thinning: in each of the completions."""
    worst = worst_differences(reference, prompts, completions, thinning)
    assert all(x > 10 * TOLERANCE for x in worst.values()), worst


def check_served(
    server: Served,
    reference: Reference,
    lengths: Sequence[int],
    max_tokens: Sequence[int],
    thinning: Thinning | None,
    together: bool = True,
    others: Sequence[Thinning | None] = (),
    **options: Any,
) -> list[Completion]:
    """Complete prompts of these lengths and compare every log-probability.

    The comparison would notice the ``others`` in the last prompt.
    """
    prompts = random_prompts(lengths)
    if together:
        completions = server.complete_all(prompts, max_tokens, **options)
    else:
        completions = [
            server.complete(prompt, count, **options)
            for prompt, count in zip(prompts, max_tokens, strict=True)
        ]
    assert_equal(reference, prompts, completions, thinning)
    for other in others:
        assert_unequal(reference, prompts[-1:], completions[-1:], other)
    return completions


def hit_of(
    server: Served, prompt: list[int], max_tokens: int, **options: Any
) -> tuple[Completion, int]:
    """Complete a prompt, and say how many of its tokens were in the cache."""
    before = server.metric(HITS)
    completion = server.complete(prompt, max_tokens, **options)
    # Hits are counted when a request is admitted, and written with a later step.
    return completion, int(server.metric(HITS) - before)
