"""Plans: what they save, and what is rejected."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.plans import make_plan
from think_vllm.errors import ThinkError
from think_vllm.plan.formats import FORMATS, GROUP_SIZES
from think_vllm.plan.planner import (
    BLOCK_SIZES,
    CHANNEL_ALIGNMENT,
    CHANNEL_TOLERANCE,
    MAX_SPAN_TOKENS,
    TOKEN_ALIGNMENT,
    BlockPlan,
    plan_blocks,
    pruned_channels,
)
from think_vllm.plan.settings import ThinkConfig

CODED = [name for name in FORMATS if name != "none"]


def make(
    ratio: float,
    head_size: int = 128,
    block_size: int | None = None,
    quant: str = "none",
    group: int = 32,
    itemsize: int = 2,
    value_ratio: float = 0.0,
) -> BlockPlan:
    settings = {"kv_channel_prune": ratio, "kv_value_prune": value_ratio}
    settings |= {"kv_quant": quant, "kv_quant_group": group}
    plan = plan_blocks(ThinkConfig.model_validate(settings), head_size, itemsize, block_size)
    assert plan is not None
    return plan


def shape(plan: BlockPlan) -> tuple[int, ...]:
    return (
        plan.key_channels,
        plan.block_size,
        plan.span_blocks,
        plan.thin_blocks,
        plan.thin_block_tokens,
    )


def test_plans_for_short_requests_save_more_there() -> None:
    # Span tokens, and multiples at 1k and 32k tokens.
    seen = {}
    for context in (1024, 8192):
        plan = make_plan(kv_channel_prune=0.5, kv_quant="k4v2", kv_plan_context=context)
        # A worker that plans again for the chosen block size comes to the same.
        assert plan_blocks(plan.config, 128, 2, plan.block_size) == plan
        seen[context] = plan
    assert (seen[1024].span_tokens, seen[8192].span_tokens) == (80, 176)
    assert seen[1024].effective_multiple(1024) > 1.05 * seen[8192].effective_multiple(1024)
    assert seen[1024].effective_multiple(32768) < seen[8192].effective_multiple(32768)


@pytest.mark.parametrize(
    ("ratio", "block_size", "expected"),
    [
        # kept channels, block size, blocks of a span before and after, tokens of a thin block
        (0.5, None, (63, 48, 4, 3, 64)),
        (0.4, None, (76, 48, 5, 4, 60)),
        (0.5, 128, (62, 128, 4, 3, 172)),
        (0.4, 16, (74, 16, 5, 4, 20)),
        (0.4, 64, (76, 64, 5, 4, 80)),
        (0.7, 32, (39, 32, 3, 2, 48)),
    ],
)
def test_plan_blocks_bf16_head_128(ratio, block_size, expected):
    assert shape(make(ratio, block_size=block_size)) == expected


@pytest.mark.parametrize(
    ("ratio", "quant", "expected", "capacity", "effective_8k"),
    [
        (0.0, "fp8", (128, 48, 11, 6, 88), 1.8, 1.75),
        (0.5, "fp8", (62, 48, 8, 3, 128), 2.6, 2.5),
        (0.0, "kivi4", (128, 16, 3, 1, 48), 3.0, 2.9),
        (0.4, "kivi4", (74, 16, 4, 1, 64), 4.0, 3.7),
        (0.0, "k4v2", (128, 16, 4, 1, 64), 4.0, 3.7),
        (0.5, "k4v2", (64, 16, 11, 2, 88), 5.5, 4.9),
        (0.0, "kivi2", (128, 16, 5, 1, 80), 5.0, 4.8),
        (0.5, "kivi2", (62, 16, 7, 1, 112), 7.0, 5.8),
    ],
)
def test_plan_blocks_bf16_head_128_is_worth_what_is_promised(
    ratio: float, quant: str, expected: tuple[int, ...], capacity: float, effective_8k: float
) -> None:
    plan = make(ratio, quant=quant)
    assert shape(plan) == expected
    assert plan.capacity_multiple >= capacity
    assert plan.effective_multiple(8192) >= effective_8k
    assert 0 <= plan.waste < 0.1


@pytest.mark.parametrize(
    ("ratio", "value_ratio", "quant", "value_channels", "expected", "capacity"),
    [
        (0.0, 0.3, "none", 88, (128, 48, 7, 6, 56), 7 / 6),
        # 64 and a table would not fit 3 blocks of 64 tokens
        (0.0, 0.5, "none", 60, (128, 48, 4, 3, 64), 4 / 3),
        (0.5, 0.3, "none", 88, (64, 48, 5, 3, 80), 5 / 3),
        (0.5, 0.5, "none", 64, (63, 32, 2, 1, 64), 2.0),
        (0.0, 0.3, "fp8", 88, (128, 48, 7, 3, 112), 7 / 3),
        (0.5, 0.3, "k4v2", 88, (62, 16, 13, 2, 104), 6.5),
    ],
)
def test_plan_blocks_with_pruned_values(
    ratio, value_ratio, quant, value_channels, expected, capacity
):
    plan = make(ratio, quant=quant, value_ratio=value_ratio)
    assert (plan.value_channels, shape(plan)) == (value_channels, expected)
    assert plan.capacity_multiple == pytest.approx(capacity)
    assert plan.prunes
    assert plan.prunes_keys == (ratio > 0)
    assert plan.kept_channels == plan.key_channels + value_channels
    assert plan.observation_window == 32


def test_waste_is_what_a_hand_counts() -> None:
    # 11 blocks of 16 tokens become 2 of 88, 7,872 of 8,192 bytes of each in use.
    assert make(0.5, quant="k4v2").waste == pytest.approx(320 / 8192)
    # 7 become 1 of 112: 18 bytes behind the table, and 8 behind the 1,736 of key codes.
    assert make(0.5, quant="kivi2").waste == pytest.approx(26 / 8192)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_size", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("percent", range(20, 81, 5))
def test_plan_blocks_keeps_its_promises(percent: int, head_size: int, itemsize: int) -> None:
    ratio = percent / 100
    plan = make(ratio, head_size, itemsize=itemsize)
    wanted = head_size - pruned_channels(ratio, head_size)
    # Blocks are whole, so a plan reaches most of what the bytes alone would allow, not all.
    ideal = 2 * head_size / (wanted + head_size)
    assert 1 < plan.capacity_multiple <= ideal * 1.03
    assert plan.capacity_multiple - 1 >= 0.75 * (ideal - 1)


PLANS = {
    "quant": st.sampled_from(list(FORMATS)),
    "percent": st.sampled_from([0, *range(12, 81)]),
    "head_size": st.sampled_from([64, 96, 128, 192, 256]),
    "itemsize": st.sampled_from([2, 4]),
    "group": st.sampled_from(GROUP_SIZES),
    "value_percent": st.sampled_from([0, 0, 20, 30, 45, 50, 80]),
}


@pytest.mark.slow
@given(**PLANS)
@settings(max_examples=80)
def test_plan_blocks_holds_for_all_formats(
    quant: str, percent: int, head_size: int, itemsize: int, group: int, value_percent: int
) -> None:
    ratio = percent / 100
    settings = {"kv_channel_prune": ratio, "kv_value_prune": value_percent / 100}
    config = ThinkConfig.model_validate(settings | {"kv_quant": quant, "kv_quant_group": group})
    try:
        plan = plan_blocks(config, head_size, itemsize)
    except ThinkError:
        assert (quant == "none" and max(percent, value_percent) < 20) or head_size % group
        return
    if plan is None:
        assert (quant, percent, value_percent) == ("none", 0, 0)
        return
    # Workers plan for the block size that the first process has chosen.
    assert plan_blocks(config, head_size, itemsize, plan.block_size) == plan

    wanted = head_size - pruned_channels(ratio, head_size)
    tolerated = max(1, round(CHANNEL_TOLERANCE * head_size)) if percent else 0
    assert wanted - tolerated <= plan.key_channels <= wanted
    assert plan.prunes_keys == plan.layout.has_table == (percent > 0)
    wanted = head_size - pruned_channels(value_percent / 100, head_size)
    tolerated = CHANNEL_ALIGNMENT if value_percent else 0
    assert wanted - tolerated <= plan.value_channels <= wanted
    assert plan.value_channels % CHANNEL_ALIGNMENT == 0
    assert plan.prunes_values == plan.layout.has_value_table == (value_percent > 0)
    assert plan.layout.used_bytes <= plan.layout.run_bytes
    assert plan.capacity_multiple > 1
    assert plan.span_tokens <= MAX_SPAN_TOKENS
    assert plan.thin_block_tokens % TOKEN_ALIGNMENT == 0
    held = plan.thin_blocks * plan.thin_block_tokens
    assert held >= plan.span_tokens > held - plan.thin_block_tokens

    used = plan.key_bytes_per_token_head + plan.value_bytes_per_token_head
    blocks = plan.thin_blocks * plan.layout.run_bytes
    assert plan.thin_bytes_per_token_head == pytest.approx(blocks / plan.span_tokens)
    assert plan.thin_bytes_per_token_head * (1 - plan.waste) == pytest.approx(used)
    assert 0 <= plan.waste < 0.2


def test_blocks_for_counts_what_a_request_holds() -> None:
    plan = make(0.5)  # 4 blocks of 48 become 3, recent window 32
    assert [plan.blocks_for(n) for n in (1, 48, 223, 224, 416, 2048)] == [1, 1, 5, 4, 7, 33]


@pytest.mark.parametrize(("quant", "capacity"), [("none", 4 / 3), ("k4v2", 11 / 2)])
def test_effective_multiple_approaches_the_capacity_multiple(quant: str, capacity: float) -> None:
    plan = make(0.5, quant=quant)
    multiples = [plan.effective_multiple(n) for n in (64, 512, 2048, 8192, 131_072)]
    assert multiples == sorted(multiples)
    assert multiples[0] == 1.0
    assert multiples[-1] == pytest.approx(capacity, rel=1e-2)


def test_effective_multiple_counts_the_window_and_half_a_span_densely() -> None:
    plan = make(0.5)
    # 32 + 192 / 2 tokens stay dense
    assert plan.effective_multiple(2048) == pytest.approx(2048 / (1920 * 3 / 4 + 128))


@pytest.mark.parametrize("ratio", [0.0, 0.004, 0.007])
def test_plan_blocks_is_none_below_one_channel(ratio: float) -> None:
    assert plan_blocks(ThinkConfig(kv_channel_prune=ratio), 128, 2) is None


@pytest.mark.parametrize("quant", CODED)
@pytest.mark.parametrize("ratio", [0.0, 0.007])
def test_plan_blocks_prunes_nothing_that_was_not_asked_for(ratio: float, quant: str) -> None:
    plan = make(ratio, quant=quant)
    assert (plan.key_channels, plan.prunes, plan.layout.has_table) == (128, False, False)


def test_plan_blocks_takes_the_smallest_ratio_that_frees_a_block() -> None:
    assert make(0.08).capacity_multiple > 1


@pytest.mark.parametrize(
    ("ratio", "changes", "message"),
    [
        (0.04, {}, r"smallest ratio that does is 0\.08,"),
        (0.06999, {}, r"smallest ratio that does is 0\.08,"),
        (0.07, {}, r"smallest ratio that does is 0\.08,"),
        (0.0, {"value_ratio": 0.05}, r"--kv-value-prune 0\.05 .* that does is 0\.\d+, or leave"),
        (0.3, {"block_size": 16}, "--block-size 16 tokens frees a block; use --block-size"),
        (0.0, {"block_size": 1024, "quant": "fp8"}, "fp8 at head size 128: .* --block-size 16"),
        (0.5, {"head_size": 320}, "head size is 320"),
        (0.5, {"block_size": 40}, "--block-size is 40; the kernels need a multiple of 16"),
        (0.5, {"block_size": 0}, "the kernels need a multiple of 16"),
        (0.5, {"head_size": 72}, "the kernels need a multiple of 16"),
        (0.0, {"head_size": 80, "quant": "kivi4"}, "80; .* of 32. Use --kv-quant fp8, or"),
        (0.0, {"head_size": 112, "quant": "kivi2"}, "kivi2: .* 112; .* multiple of 32"),
        (0.0, {"head_size": 64, "quant": "k4v2", "group": 128}, "64, .*; use .*-group 32 or 64$"),
        (0.0, {"head_size": 96, "quant": "kivi4", "group": 64}, "-group 64; use .*-group 32$"),
        (0.0, {"head_size": 72, "quant": "fp8"}, "72; .* of 16. Serve this model without"),
        (0.0, {"head_size": 8, "quant": "fp8"}, "head size is 8; .* multiple of 16"),
    ],
)
def test_plan_blocks_rejects(ratio: float, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ThinkError, match=message):
        make(ratio, **changes)


@pytest.mark.parametrize("head_size", [16, 80, 112, 240])
def test_plan_blocks_takes_any_head_size_in_fp8(head_size: int) -> None:
    # Groups are the integer formats' business.
    assert make(0.0, head_size, quant="fp8", group=128).capacity_multiple > 1.8


@pytest.mark.parametrize("window", [0, 7, 1000])
@pytest.mark.parametrize("quant", ["none", "k4v2"])
def test_plan_blocks_does_not_depend_on_the_windows(quant: str, window: int) -> None:
    plan = make_plan(kv_channel_prune=0.4, kv_quant=quant, kv_recent_window=window)
    assert shape(plan) == shape(make(0.4, quant=quant))


def test_block_sizes_are_what_the_cpu_kernels_take() -> None:
    assert all(size % 16 == 0 for size in BLOCK_SIZES)
