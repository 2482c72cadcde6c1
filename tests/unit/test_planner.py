"""Plans: what they save, and what is refused."""

import pytest

from think_vllm.config import ThinkConfig
from think_vllm.errors import ThinkError
from think_vllm.planner import BLOCK_SIZES, BlockPlan, plan_blocks, pruned_channels


def make(ratio: float, head_size: int = 128, block_size: int | None = None) -> BlockPlan:
    plan = plan_blocks(ThinkConfig(kv_channel_prune=ratio), head_size, 2, block_size)
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("ratio", "block_size", "expected"),
    [
        # chosen block size: kept channels, block, span before and after, thin tokens
        (0.5, None, (63, 48, 4, 3, 64)),
        (0.4, None, (75, 32, 5, 4, 40)),
        (0.5, 128, (62, 128, 4, 3, 172)),
        (0.4, 16, (74, 16, 5, 4, 20)),
        (0.4, 64, (76, 64, 5, 4, 80)),
        (0.7, 32, (39, 32, 3, 2, 48)),
    ],
)
def test_plan_blocks_bf16_head_128(
    ratio: float, block_size: int | None, expected: tuple[int, ...]
) -> None:
    plan = make(ratio, block_size=block_size)
    got = (
        plan.key_channels,
        plan.block_size,
        plan.span_blocks,
        plan.thin_blocks,
        plan.thin_block_tokens,
    )
    assert got == expected


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_size", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("percent", range(20, 81, 5))
def test_plan_blocks_keeps_its_promises(percent: int, head_size: int, itemsize: int) -> None:
    ratio = percent / 100
    plan = plan_blocks(ThinkConfig(kv_channel_prune=ratio), head_size, itemsize)
    assert plan is not None
    wanted = head_size - pruned_channels(ratio, head_size)
    assert wanted - max(1, round(0.025 * head_size)) <= plan.key_channels <= wanted
    assert plan.layout.used_bytes <= plan.layout.run_bytes
    held = plan.thin_blocks * plan.thin_block_tokens
    assert held >= plan.span_tokens > held - plan.thin_block_tokens
    assert plan.thin_bytes_per_token_head == pytest.approx(
        plan.dense_bytes_per_token_head / plan.capacity_multiple
    )
    # Blocks are whole, so a plan reaches most of what the bytes alone would allow, not all.
    ideal = 2 * head_size / (wanted + head_size)
    assert 1 < plan.capacity_multiple <= ideal * 1.03
    assert plan.capacity_multiple - 1 >= 0.75 * (ideal - 1)


def test_blocks_for_counts_what_a_request_holds() -> None:
    plan = make(0.5)  # 4 blocks of 48 become 3, recent window 32
    assert [plan.blocks_for(n) for n in (1, 48, 223, 224, 416, 2048)] == [1, 1, 5, 4, 7, 33]


def test_effective_multiple_approaches_the_capacity_multiple() -> None:
    plan = make(0.5)
    multiples = [plan.effective_multiple(n) for n in (64, 512, 2048, 8192, 131_072)]
    assert multiples == sorted(multiples)
    assert multiples[0] == 1.0
    assert multiples[-1] == pytest.approx(4 / 3, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.0, 0.004, 0.007])
def test_plan_blocks_prunes_nothing_below_one_channel(ratio: float) -> None:
    assert plan_blocks(ThinkConfig(kv_channel_prune=ratio), 128, 2) is None


def test_plan_blocks_refuses_too_small_a_ratio() -> None:
    with pytest.raises(ThinkError, match=r"smallest ratio that does is 0\.\d+"):
        make(0.05)


def test_plan_blocks_refuses_a_block_size_that_no_plan_fits() -> None:
    with pytest.raises(ThinkError, match="--block-size 16 tokens frees a block; use --block-size"):
        make(0.3, block_size=16)


def test_plan_blocks_refuses_a_head_size_beyond_one_byte() -> None:
    with pytest.raises(ThinkError, match="head size is 320"):
        make(0.5, head_size=320)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_plan_blocks_again_for_the_chosen_block_size_is_the_same_plan(
    head_size: int, itemsize: int
) -> None:
    # Workers plan for the block size that the first process has chosen.
    for percent in range(12, 81):
        config = ThinkConfig(kv_channel_prune=percent / 100)
        plan = plan_blocks(config, head_size, itemsize)
        assert plan is not None
        assert plan_blocks(config, head_size, itemsize, plan.block_size) == plan


@pytest.mark.parametrize(("head_size", "block_size"), [(128, 40), (128, 0), (72, None)])
def test_plan_blocks_refuses_sizes_that_kernels_cannot_take(
    head_size: int, block_size: int | None
) -> None:
    with pytest.raises(ThinkError, match="the kernels need a multiple of 16"):
        make(0.5, head_size, block_size)


@pytest.mark.parametrize("window", [0, 7, 1000])
def test_plan_blocks_does_not_depend_on_the_windows(window: int) -> None:
    config = ThinkConfig(kv_channel_prune=0.4, kv_recent_window=window)
    plan = plan_blocks(config, 128, 2)
    assert plan is not None
    assert (plan.key_channels, plan.block_size, plan.span_tokens) == (75, 32, 160)


def test_block_sizes_are_what_the_cpu_kernels_take() -> None:
    assert all(size % 16 == 0 for size in BLOCK_SIZES)
