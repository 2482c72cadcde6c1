"""What the block manager and its spec rely on in vLLM's scheduler; see ``test_vllm_contract.py``.

What its calls do, and in which order they come, is in ``test_vllm_contract_calls.py``.
"""

import dataclasses

import pytest
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.support.contract import (
    check_defaults,
    check_members,
    check_parameters,
    check_source,
    name_of,
)

MANAGER, SPEC = "scheduler/manager.py", "hooks/kv_cache_spec.py"
FULL = "v1.core.single_type_kv_cache_manager:FullAttentionManager"
FREED = ["self", "request_id", "processed_computed_tokens", "num_prompt_tokens"]
COMPUTED = ["num_local_computed_tokens", "num_external_computed_tokens"]
WANTED = ["new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens"]
WANTED += ["num_tokens_main_model", "apply_admission_cap", "prefill_end"]
HIT = ["block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"]
HIT += ["drop_eagle_block", "alignment_tokens", "dcp_world_size", "pcp_world_size"]
CACHED = ["self", "request", "num_tokens", "retention_interval", "replay_boundaries"]


@pytest.mark.parametrize(
    ("ours", "function", "parameters"),
    [
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.remove_skipped_blocks",
            FREED,
        ),
        (MANAGER, "v1.core.kv_cache_manager:KVCacheManager.remove_skipped_blocks", FREED),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager._remove_blocks_in_range",
            ["self", "request_id", "first_block", "last_block"],
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free",
            ["self", "request_id"],
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks",
            CACHED,
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks",
            CACHED,
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.find_longest_cache_hit",
            HIT,
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.add_local_computed_blocks",
            ["self", "request_id", "new_computed_blocks", *COMPUTED],
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks",
            ["self", "request_id", "num_tokens", "num_tokens_main_model"],
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate",
            ["self", "request_id", "num_tokens", *WANTED],
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager._apply_cow",
            ["self", "request_id", "block_idx", "source_block", "cow_block"],
        ),
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager.take_pending_cow_copies",
            ["self"],
        ),
        (MANAGER, "v1.core.block_pool:BlockPool.touch", ["self", "blocks"]),
        (MANAGER, "v1.core.block_pool:BlockPool.evict_blocks", ["self", "block_ids"]),
        (MANAGER, "v1.core.block_pool:BlockPool.get_new_blocks", ["self", "num_blocks"]),
        (
            MANAGER,
            "v1.core.block_pool:BlockPool.get_cached_block",
            ["self", "block_hash", "kv_cache_group_ids"],
        ),
        (MANAGER, "v1.core.block_pool:BlockPool.free_blocks", ["self", "ordered_blocks"]),
        (MANAGER, "v1.core.block_pool:BlockHashToBlockMap.get_one_block", ["self", "key"]),
        (
            MANAGER,
            "v1.core.kv_cache_utils:make_block_hash_with_group_id",
            ["block_hash", "group_id"],
        ),
        (MANAGER, "v1.request:Request.is_finished", ["self"]),
        (
            "scheduler/prefix.py",
            "v1.core.kv_cache_utils:resolve_block_hashes",
            [
                *["block_hashes", "hash_block_size", "block_size"],
                *["supports_fine_grained_hash_lookup", "alignment_tokens"],
            ],
        ),
        (SPEC, "v1.kv_cache_interface:replace_as", ["spec", "target_cls", "drop", "changes"]),
        (SPEC, "v1.kv_cache_interface:FullAttentionSpec.merge", ["specs"]),
        (
            "hooks/kv_cache.py",
            "v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
            ["kvcache_spec_cls", "manager_class", "uniform_type_base_spec"],
        ),
    ],
    ids=name_of,
)
def test_vllm_signature_is_what_we_rely_on(ours: str, function: str, parameters: list[str]) -> None:
    check_parameters(ours, function, parameters)


def test_vllm_defaults_are_what_we_rely_on() -> None:
    check_defaults(MANAGER, f"{FULL}.remove_skipped_blocks", {"num_prompt_tokens": None})
    check_defaults(
        "hooks/kv_cache.py",
        "v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
        {"vllm_config": None},
    )
    check_defaults(SPEC, "v1.kv_cache_interface:replace_as", {"drop": ()})


@pytest.mark.parametrize(
    ("ours", "kind", "names"),
    [
        (
            MANAGER,
            "v1.core.single_type_kv_cache_manager:FullAttentionManager",
            {"req_to_blocks", "num_cached_block", "block_pool", "block_size", "enable_caching"}
            | {"kv_cache_group_id", "kv_cache_spec", "_null_block", "_partial_hit_reqs"}
            | {"_pending_cow_copies", "new_block_ids", "get_num_skipped_tokens"},
        ),
        (
            MANAGER,
            "v1.core.block_pool:BlockPool",
            {"cached_block_hash_to_block", "null_block", "free_block_queue", "blocks"}
            | {"hash_block_size", "get_num_free_blocks", "enable_caching"},
        ),
        (
            MANAGER,
            "v1.core.kv_cache_utils:KVCacheBlock",
            {"block_hash", "ref_cnt", "is_null", "block_id"},
        ),
        (
            MANAGER,
            "v1.request:Request",
            {"num_prompt_tokens", "num_computed_tokens", "num_in_flight_tokens", "block_hashes"}
            | {"num_preemptions", "skip_reading_prefix_cache", "num_tokens", "request_id"},
        ),
        (
            MANAGER,
            "v1.core.sched.output:SchedulerOutput",
            {"scheduled_new_reqs", "kv_cache_block_copies"},
        ),
        (
            MANAGER,
            "v1.core.sched.output:NewRequestData",
            {"req_id", "num_computed_tokens", "block_ids"},
        ),
        (
            "scheduler/prefix.py",
            "v1.core.kv_cache_utils:BlockHashListWithBlockSize",
            {"block_hashes"},
        ),
        ("hooks/model_runner.py", "v1.core.sched.output:NewRequestData", {"sampling_params"}),
        ("hooks/scheduler.py", "v1.request:Request", {"sampling_params"}),
        ("hooks/scheduler.py", "sampling_params:SamplingParams", {"extra_args"}),
        (MANAGER, "v1.core.kv_cache_utils:KVCacheBlockCopy", {"src_block_id", "dst_block_id"}),
        (
            SPEC,
            "v1.kv_cache_interface:FullAttentionSpec",
            {"block_size", "num_kv_heads", "head_size", "head_size_v"},
        ),
        (
            SPEC,
            "v1.kv_cache_interface:FullAttentionSpec",
            {"dtype", "page_size_bytes", "prefix_cacheable"},
        ),
    ],
    ids=name_of,
)
def test_vllm_members_are_what_we_rely_on(ours: str, kind: str, names: set[str]) -> None:
    check_members(ours, kind, names)


def test_vllm_specs_are_frozen_dataclasses_that_we_extend() -> None:
    parameters = FullAttentionSpec.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen, SPEC
    assert any(f.init for f in dataclasses.fields(FullAttentionSpec)), SPEC
    assert issubclass(FullAttentionManager, SingleTypeKVCacheManager), MANAGER


@pytest.mark.parametrize(
    ("ours", "function", "pieces"),
    [
        # Blocks that are kept for a while go back when their step is over.
        (
            MANAGER,
            "v1.core.sched.scheduler:Scheduler.schedule",
            [
                "self.kv_cache_manager.take_kv_cache_block_copies()",
                "self._free_cow_retained_blocks(",
                "kv_cache_block_copies=pending_kv_cache_block_copies",
                "self._update_after_schedule(scheduler_output)",
            ],
        ),
        # Tokens count as computed once scheduled, and as in flight until they are processed.
        (
            MANAGER,
            "v1.core.sched.scheduler:Scheduler._update_after_schedule",
            ["num_computed_tokens += num_scheduled_token", "num_in_flight_tokens +="],
        ),
        (
            MANAGER,
            "v1.core.sched.scheduler:Scheduler.update_from_output",
            ["num_in_flight_tokens -= num_tokens_scheduled"],
        ),
        # A preempted request loses all blocks at once, and starts again.
        (
            MANAGER,
            "v1.core.sched.scheduler:Scheduler._preempt_request",
            [
                "self._free_request_blocks(request)",
                "request.status = RequestStatus.PREEMPTED",
                "request.num_computed_tokens = 0",
                "request.num_preemptions += 1",
            ],
        ),
        # A request is registered before it can be looked up; its hashes stay the same object, and
        # every rank receives its sampling parameters.
        (
            "hooks/scheduler.py",
            "v1.core.sched.scheduler:Scheduler.add_request",
            ["self._enqueue_waiting_request(request)"],
        ),
        (
            "hooks/scheduler.py",
            "v1.request:Request.update_block_hashes",
            ["self.block_hashes.extend("],
        ),
        (
            "hooks/model_runner.py",
            "v1.core.sched.output:NewRequestData.from_request",
            ["sampling_params=request.sampling_params"],
        ),
        # Preempted requests are known to V1 until they finish.
        (
            "hooks/model_runner.py",
            "v1.worker.gpu_model_runner:GPUModelRunner._update_states",
            [
                "for req_id in scheduler_output.finished_req_ids: "
                "req_state = self.requests.pop(req_id, None)",
                "for new_req_data in scheduler_output.scheduled_new_reqs:",
            ],
        ),
        # The worker copies blocks after it has zeroed new ones, and before it runs the model.
        (
            MANAGER,
            "v1.worker.gpu_model_runner:GPUModelRunner._update_states",
            [
                "self._zero_block_ids(scheduler_output.new_block_ids_to_zero)",
                "copy_kv_cache_blocks_inplace(",
                "block_ids.extend(new_ids)",
                "req_state.block_ids = new_block_ids",
                "self.input_batch.block_table.append_row(new_block_ids, req_index)",
            ],
        ),
        (
            MANAGER,
            "v1.worker.gpu_model_runner:GPUModelRunner.execute_model",
            ["self._update_states(scheduler_output)", "self._model_forward("],
        ),
        (
            MANAGER,
            "v1.worker.gpu_input_batch:InputBatch.add_request",
            ["self.block_table.add_row(request.block_ids,"],
        ),
        (
            MANAGER,
            "v1.worker.gpu.model_runner:GPUModelRunner.update_requests",
            ["overwrite=False", "zero_block_ids(", "copy_kv_cache_blocks_inplace("],
        ),
        (
            MANAGER,
            "v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
            ["self.add_requests(", "self.update_requests(", "self.model("],
        ),
        # One group of layers: its manager finds hits, at the size of its blocks.
        (
            MANAGER,
            "v1.core.kv_cache_coordinator:UnitaryKVCacheCoordinator.find_longest_cache_hit",
            [
                "self.single_type_managers[0].find_longest_cache_hit(",
                "alignment_tokens=self.block_size",
            ],
        ),
    ],
    ids=name_of,
)
def test_vllm_does_what_we_rely_on(ours: str, function: str, pieces: list[str]) -> None:
    check_source(ours, function, *pieces)
