"""The reference of served tests against the kernels' reference: two truths, one answer."""

from dataclasses import replace

import pytest
import torch

from tests.support.channels import kept_channels, kept_value_channels
from tests.support.checks import plan_served
from tests.support.reference import Thinning, thin_attention
from think_vllm.kernels.reference.attention import decode_attention_ref
from think_vllm.kernels.reference.compaction import compact_spans_ref
from think_vllm.plan.formats import FORMATS

HEAD_SIZE, KV_HEADS, HEADS = 64, 2, 4


def random_tokens(num_tokens: int) -> list[torch.Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(count, num_tokens, HEAD_SIZE, generator=generator) for count in heads]


@pytest.mark.parametrize(
    ("ratio", "value_ratio", "quant", "group", "block_size"),
    [
        (0.5, 0.0, "none", 32, None),
        (0.0, 0.0, "fp8", 32, 64),  # 3 thin blocks of a span, the last one shorter
        (0.5, 0.0, "fp8", 32, None),
        (0.4, 0.0, "kivi4", 64, None),
        (0.0, 0.0, "k4v2", 32, None),
        (0.5, 0.0, "kivi2", 32, None),
        (0.0, 0.3, "none", 32, None),
        (0.5, 0.3, "none", 32, None),
        (0.0, 0.3, "fp8", 32, None),
        (0.5, 0.3, "k4v2", 32, None),
    ],
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_both_references_attend_alike(ratio, value_ratio, quant, group, block_size, softcap):
    settings = {"kv_channel_prune": ratio, "kv_value_prune": value_ratio, "kv_quant": quant}
    if FORMATS[quant].has_groups:
        settings["kv_quant_group"] = group
    plan, _ = plan_served(HEAD_SIZE, block_size, **settings)
    thinning = Thinning.of(plan)
    prompt_len = plan.span_tokens + 40  # one span of the prompt, one filled while decoding
    num_tokens = 2 * plan.span_tokens + 36
    query, key, value = random_tokens(num_tokens)
    sinks = None if softcap is None else torch.linspace(-1, 3, HEADS)
    output = thin_attention(
        query, key, value, 0.125, prompt_len, thinning, softcap=softcap, sinks=sinks
    )

    blocks = -(-num_tokens // plan.block_size)
    cache = torch.zeros(blocks, KV_HEADS, plan.block_size, 2 * HEAD_SIZE)
    halves = cache.view(blocks, KV_HEADS, 2, -1)
    for token in range(num_tokens):
        block, slot = divmod(token, plan.block_size)
        keys = halves[block, :, 0].view(KV_HEADS, HEAD_SIZE, plan.block_size)
        values = halves[block, :, 1].view(KV_HEADS, plan.block_size, HEAD_SIZE)
        keys[:, :, slot], values[:, slot] = key[:, token], value[:, token]
    table = torch.arange(blocks, dtype=torch.int32)[None]
    kept = [kept_channels(query, key, prompt_len, thinning)[:, 0]]
    if plan.prunes_values:
        kept.append(kept_value_channels(output[:, :prompt_len], KV_HEADS, thinning))
    channels = torch.cat(
        [torch.stack([row.nonzero()[:, 0].to(torch.uint8) for row in rows]) for rows in kept], dim=1
    )[None]

    thin = 0
    # The first query past the prompt, both sides of a due position, and some between.
    due = plan.rule.due_position(1)
    for position in sorted({*range(prompt_len, num_tokens, 29), due - 1, due, num_tokens - 1}):
        for span in range(thin, plan.rule.thin_spans(prompt_len, position)):
            compact_spans_ref(cache, table, [0], [span], channels, plan)
            thin = span + 1
        rows = ([0], [position + 1], [thin])
        expected = decode_attention_ref(
            query[None, :, position], cache, table, *rows, plan, 0.125, softcap or 0.0, sinks
        )
        torch.testing.assert_close(output[:, position].double(), expected[0], atol=1e-6, rtol=1e-5)
    assert thin == 2


@pytest.mark.parametrize(
    ("quant", "change"),
    [
        ("fp8", {"format": FORMATS["none"]}),
        ("fp8", {"thin_block_tokens": None}),
        ("kivi4", {"format": FORMATS["none"]}),
        ("kivi4", {"group": 64}),
        ("k4v2", {"format": FORMATS["kivi4"]}),
        ("kivi2", {"format": FORMATS["k4v2"]}),
        ("kivi2", {"recent_window": 0}),
        ("none", {"value_channels": None}),
        ("none", {"value_channels": 40}),
        ("none", {"select": "key-norm"}),
        ("none", {"tables": "span"}),
    ],
)
def test_every_setting_shows(quant, change):
    values = 0.3 if "value_channels" in change else 0.0
    keys = 0.5 if {"select", "tables"} & set(change) else 0.0
    plan, _ = plan_served(HEAD_SIZE, kv_quant=quant, kv_value_prune=values, kv_channel_prune=keys)
    thinning = Thinning.of(plan)
    # One span of the prompt, or for changes of choices two.
    prompt_len = plan.span_tokens * (2 if keys else 1) + (40 if keys else 16)
    query, key, value = random_tokens((3 if keys else 2) * plan.span_tokens)
    output, other = (
        thin_attention(query, key, value, 0.125, prompt_len, how)
        for how in (thinning, replace(thinning, **change))
    )
    assert (output - other).abs().max() > 1e-3
