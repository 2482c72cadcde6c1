"""Sliding-window layers beside thin ones: groups of layers, one pool of blocks, clean blocks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec
from vllm.v1.request import Request

from tests.support.block_engine import make_hasher
from tests.support.block_worker import make_spec
from tests.support.contract import planning
from think_vllm.hooks.model_support import AttentionLayers, attention_layers, window_summary
from think_vllm.scheduler.manager import ThinKVCacheManager
from think_vllm.scheduler.prefix import LimitedHashes
from think_vllm.worker.cpu.window import clear_begun_blocks

BLOCK, NUM_BLOCKS, WINDOW = 4, 64, 10
SHAPE: dict[str, Any] = {
    "block_size": BLOCK,
    "num_kv_heads": 1,
    "head_size": 8,
    "dtype": torch.float32,
}
#: 3 blocks of 4 tokens become 2; 5 recent tokens stay dense.
THIN = make_spec()
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=WINDOW)


def make_manager(layers: dict[str, Any], unit: int | None = None) -> KVCacheManager:
    """vLLM's manager of groups of layers; with prefix caching if hashes have a ``unit``."""
    groups = planning()._get_kv_cache_groups_uniform_page_size(layers)
    return KVCacheManager(
        KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=200,
        scheduler_block_size=BLOCK,
        hash_block_size=unit or BLOCK,
        enable_caching=unit is not None,
    )


@pytest.mark.parametrize("full_first", [True, False])
def test_layers_are_grouped_by_kind(full_first: bool) -> None:
    kinds = [("full", THIN), ("window.0", SLIDING), ("window.1", SLIDING)]
    layers = dict(kinds if full_first else reversed(kinds))
    assert not planning().is_kv_cache_spec_uniform(layers)
    groups = planning()._get_kv_cache_groups_uniform_page_size(layers)
    assert sorted(len(group.layer_names) for group in groups) == [1, 1, 1]
    assert [g.kv_cache_spec for g in groups].count(THIN) == 1
    assert [g.kv_cache_spec for g in groups].count(SLIDING) == 2


def test_full_layers_free_tails_and_others_their_window() -> None:
    manager = make_manager({"full": THIN, "window.0": SLIDING, "window.1": SLIDING})
    managers = manager.coordinator.single_type_managers
    assert [type(m) for m in managers] == [ThinKVCacheManager] + [SlidingWindowManager] * 2

    def held() -> list[int]:
        blocks = manager.get_blocks("r").blocks
        return [sum(not block.is_null for block in group) for group in blocks]

    prompt = 41
    request = Request("r", list(range(prompt)), SamplingParams(max_tokens=9), None)
    assert manager.allocate_slots(request, prompt) is not None
    assert held() == [11, 11, 11]
    request.num_computed_tokens = prompt
    request.append_output_token_ids(7)
    assert manager.allocate_slots(request, 1) is not None
    # (41 - 5) // 12 spans give up a block each; the last 9 tokens before position 41 lie in 3.
    assert held() == [11 - 3, 3, 3]
    assert manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1 - sum(held())
    # What the full layers gave up is there for another request's windows.
    other = Request("s", list(range(4 * 16)), SamplingParams(max_tokens=1), None)
    assert manager.allocate_slots(other, 4 * 16) is not None
    manager.free(request)
    manager.free(other)
    assert manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1


@pytest.mark.parametrize("unit", [1, 2, BLOCK])
@pytest.mark.parametrize("max_tokens", [None, 0, 9, 16])
def test_resumed_requests_hit_no_more_than_they_may(unit: int, max_tokens: int | None) -> None:
    # --prefix-match-unit is for models with several groups of layers.
    dense = make_spec(thin_prefixes=False, recent_window=1000)
    manager = make_manager({"full": dense, "window": SLIDING}, unit)

    def request(name: str) -> Request:
        params = SamplingParams(max_tokens=9)
        return Request(name, list(range(30)), params, None, block_hasher=make_hasher(unit))

    first = request("first")
    assert manager.allocate_slots(first, 30) is not None
    first.num_computed_tokens = 30
    first.append_output_token_ids([7])
    assert manager.allocate_slots(first, 1) is not None
    second = request("second")
    if max_tokens is not None:
        second.block_hashes = LimitedHashes(second.block_hashes, max_tokens, max_thin_spans=0)
    _, computed, *_ = manager.get_computed_blocks(second)
    limit = 29 if max_tokens is None else max_tokens
    assert computed == limit // BLOCK * BLOCK


def test_begun_blocks_are_cleared_unless_they_are_filled() -> None:
    cache = torch.full((6, 2, BLOCK, 16), torch.nan)
    # Blocks 1 and 2 in one chunk, the second in part; one token each into 3, 4 and none.
    slots = [*range(4, 11), 12, 17, -1]
    clear_begun_blocks(cache, torch.tensor(slots))
    assert [bool(block.isnan().any()) for block in cache] == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "window", "expected"),
    [
        ({}, None, AttentionLayers(4, 0, 0)),
        ({}, 64, AttentionLayers(0, 4, 64)),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            64,
            AttentionLayers(2, 1, 64),
        ),
        # --disable-sliding-window
        ({"layer_types": ["sliding_attention"] * 3}, None, AttentionLayers(3, 0, 0)),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            None,
            AttentionLayers(1, 0, 0, ("chunked_attention",)),
        ),
    ],
)
def test_layers_are_counted_by_kind(settings, window, expected):
    config: Any = SimpleNamespace(
        hf_text_config=SimpleNamespace(**settings),
        get_sliding_window=lambda: window,
        get_total_num_hidden_layers=lambda: 4,
    )
    assert attention_layers(config) == expected


@pytest.mark.parametrize(
    ("full", "window", "groups"),
    [(32, 0, (32, 1, 0)), (5, 25, (5, 1, 5)), (12, 12, (12, 1, 1)), (4, 5, (5, 1, 1))],
)
def test_layers_share_blocks_as_in_vllm(full, window, groups):
    counted = AttentionLayers(full, window, 64)
    assert counted.groups == groups
    assert counted.block_layers(counted) == groups[0]
    layers = {f"full.{i}": THIN for i in range(full)}
    layers |= {f"window.{i}": SLIDING for i in range(window)}
    made = planning()._get_kv_cache_groups_uniform_page_size(layers)
    assert len(made) == groups[1] + groups[2]
    assert max(len(group.layer_names) for group in made) == groups[0]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [((2, 10), 2), ((0, 10), 2), ((2, 0), 2), ((1, 1), 1), ((0, 4), 1), ((0, 0), 0)],
)
def test_a_rank_pays_for_its_part_of_the_largest_group(stage, expected):
    # 4 full layers are a group, 20 with a window five more; a stage may have none of a kind.
    layers = AttentionLayers(4, 20, 64)
    assert layers.block_layers(AttentionLayers(*stage, 64)) == expected


def test_window_summary_is_empty_without_windows() -> None:
    assert window_summary(AttentionLayers(4, 0, 0)) == []
    (line,) = window_summary(AttentionLayers(4, 20, 512))
    assert line.startswith("4 of 24 layers become thin; the others have a sliding window of 512")
