"""The order and the effect of calls that the block manager relies on, shown by vLLM's own objects.

See ``test_vllm_contract.py``; what fails here concerns ``think_vllm/scheduler/manager.py``.
"""

from unittest.mock import Mock, call

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus

from tests.support import block_engine
from tests.support.block_engine import BLOCK, make_hasher

PROMPT = 10
#: Methods of a manager whose calls are recorded.
RECORDED = (
    *("remove_skipped_blocks", "get_num_blocks_to_allocate", "add_local_computed_blocks"),
    *("allocate_new_blocks", "cache_blocks", "find_longest_cache_hit", "pop_blocks_for_free"),
)


def make_manager(caching: bool) -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return block_engine.make_manager([spec], caching)


def make_request(name: str) -> Request:
    params = SamplingParams(max_tokens=9)
    return Request(name, list(range(PROMPT)), params, None, block_hasher=make_hasher(BLOCK))


def record(manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Record which methods of a manager are called, and with what."""
    (single,) = manager.coordinator.single_type_managers
    calls = Mock()
    for name in RECORDED:
        calls.attach_mock(Mock(wraps=getattr(single, name)), name)
        monkeypatch.setattr(single, name, getattr(calls, name))
    return calls


def take(calls: Mock) -> list[str]:
    """Names of the calls since the last time."""
    names = [name for name, _, _ in calls.mock_calls]
    calls.reset_mock()
    return names


def test_allocate_slots_frees_before_it_counts_and_allocates(monkeypatch):
    manager = make_manager(caching=True)
    calls = record(manager, monkeypatch)
    request = make_request("first")
    blocks, computed, _ = manager.get_computed_blocks(request)
    assert computed == 0
    assert take(calls) == ["find_longest_cache_hit"]
    assert manager.allocate_slots(request, PROMPT, computed, blocks) is not None
    assert take(calls) == [
        "remove_skipped_blocks",
        "get_num_blocks_to_allocate",
        "allocate_new_blocks",
        "cache_blocks",
    ]
    # A hit comes between counting and allocating; it has not been counted as computed yet.
    second = make_request("second")
    blocks, computed, _ = manager.get_computed_blocks(second)
    assert computed == 2 * BLOCK
    assert manager.allocate_slots(second, PROMPT - computed, computed, blocks) is not None
    hit = calls.add_local_computed_blocks.mock_calls
    assert hit == [call("second", blocks.blocks[0], computed, 0)]
    assert take(calls) == [
        "find_longest_cache_hit",
        "remove_skipped_blocks",
        "get_num_blocks_to_allocate",
        "add_local_computed_blocks",
        "allocate_new_blocks",
        "cache_blocks",
    ]


def test_blocks_are_freed_on_the_basis_of_processed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(caching=False)
    calls = record(manager, monkeypatch)
    request = make_request("a")
    manager.allocate_slots(request, 6)
    request.num_computed_tokens, request.num_in_flight_tokens = 6, 4
    take(calls)
    manager.allocate_slots(request, 4)
    assert calls.mock_calls[0] in [
        call.remove_skipped_blocks("a", 2, num_prompt_tokens=PROMPT),
        call.remove_skipped_blocks("a", 2, PROMPT),
    ], "scheduler/manager.py frees what the steps in flight do not read"
    # Not cached, so nothing is hashed.
    assert "cache_blocks" not in take(calls)


def test_freeing_a_request_takes_all_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(caching=False)
    free = manager.block_pool.get_num_free_blocks()
    calls = record(manager, monkeypatch)
    request = make_request("a")
    manager.allocate_slots(request, PROMPT)
    assert manager.block_pool.get_num_free_blocks() == free - 3
    take(calls)
    manager.free(request)
    assert take(calls) == ["pop_blocks_for_free"]
    assert manager.block_pool.get_num_free_blocks() == free
    # As async scheduling does it: the blocks go back later.
    manager.allocate_slots(request, PROMPT)
    blocks = manager.pop_blocks_for_free(request)
    assert len(blocks) == 3
    assert manager.block_pool.get_num_free_blocks() == free - 3
    (single,) = manager.coordinator.single_type_managers
    assert not single.req_to_blocks.get("a")


def test_a_removed_range_becomes_the_null_block_and_stays_in_place() -> None:
    manager = make_manager(caching=False)
    pool = manager.block_pool
    assert pool.null_block.block_id == 0
    assert pool.null_block.is_null
    (single,) = manager.coordinator.single_type_managers
    request = make_request("a")
    manager.allocate_slots(request, PROMPT)
    free = pool.get_num_free_blocks()
    before = [block.block_id for block in single.req_to_blocks["a"]]
    assert 0 not in before, "the null block is nobody's"
    single._remove_blocks_in_range("a", 1, 2)
    assert [block.block_id for block in single.req_to_blocks["a"]] == [before[0], 0, before[2]]
    assert pool.get_num_free_blocks() == free + 1
    # Rows are never shortened: the next blocks come behind.
    request.num_computed_tokens = PROMPT
    new = manager.allocate_slots(request, BLOCK)
    assert new is not None
    row = [block.block_id for block in single.req_to_blocks["a"]]
    assert row == [before[0], 0, before[2], *new.get_block_ids()[0]]


def test_cached_blocks_are_found_kept_and_evicted() -> None:
    manager = make_manager(caching=True)
    pool = manager.block_pool
    (single,) = manager.coordinator.single_type_managers
    request = make_request("a")
    manager.allocate_slots(request, PROMPT)
    # As the second step of a chunked prompt: full blocks have a hash, the last one has none.
    hashed = [block.block_hash for block in single.req_to_blocks["a"]]
    assert [x is not None for x in hashed] == [True, True, False]
    assert single.num_cached_block["a"] == 2
    block = single.req_to_blocks["a"][0]
    key = make_block_hash_with_group_id(request.block_hashes[0], 0)
    assert hashed[0] == key
    assert pool.cached_block_hash_to_block.get_one_block(key) is block
    assert pool.get_cached_block(request.block_hashes[0], [0]) == [block]
    # A freed block keeps its hash, whoever touches it takes it out of the free blocks.
    manager.free(request)
    free = pool.get_num_free_blocks()
    assert (block.ref_cnt, block.block_hash) == (0, key)
    pool.touch([block])
    assert (block.ref_cnt, pool.get_num_free_blocks()) == (1, free - 1)
    # Evicting takes the hash and nothing else.
    pool.evict_blocks({block.block_id})
    assert (block.ref_cnt, block.block_hash) == (1, None)
    assert pool.get_cached_block(request.block_hashes[0], [0]) is None
    pool._insert_block_hash(key, block, num_tokens=BLOCK)
    assert block.block_hash == key
    pool.free_blocks([block])
    assert pool.get_num_free_blocks() == free
    # Handing a block out evicts it too.
    taken = pool.get_new_blocks(free)
    assert block in taken
    assert block.block_hash is None
    assert all(x.ref_cnt == 1 and not x.is_null for x in taken)


def test_copies_keep_both_blocks_until_they_are_made() -> None:
    manager = make_manager(caching=True)
    pool = manager.block_pool
    (single,) = manager.coordinator.single_type_managers
    manager.allocate_slots(make_request("a"), PROMPT)
    source = single.req_to_blocks["a"][1]
    pool.touch([source])
    single.req_to_blocks["b"] = [source]
    (own,) = pool.get_new_blocks(1)
    single._apply_cow("b", 0, source, own)
    assert single.req_to_blocks["b"] == [own]
    assert (source.ref_cnt, own.ref_cnt) == (2, 2)
    copies, retained = manager.take_kv_cache_block_copies()
    assert [tuple(copy) for copy in copies] == [(source.block_id, own.block_id)]
    assert retained == [source, own]
    assert single.take_pending_cow_copies() == []
    pool.free_blocks(retained)
    assert (source.ref_cnt, own.ref_cnt) == (1, 1)


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.RUNNING])
def test_requests_say_what_they_are(status: RequestStatus) -> None:
    request = make_request("a")
    assert (request.num_prompt_tokens, request.num_computed_tokens) == (PROMPT, 0)
    assert (request.num_in_flight_tokens, request.num_preemptions) == (0, 0)
    assert request.skip_reading_prefix_cache is False
    assert len(request.block_hashes) == PROMPT // BLOCK
    # Hashes grow with the answer, past the prompt.
    request.append_output_token_ids([7, 8, 9])
    assert request.num_prompt_tokens == PROMPT
    assert len(request.block_hashes) == (PROMPT + 3) // BLOCK
    request.status = status
    assert request.is_finished() is (status is RequestStatus.FINISHED_ABORTED)
