"""What the block manager and its spec rely on in vLLM's scheduler; see ``test_vllm_contract.py``.

What its calls do, and in which order they come, is in ``test_vllm_contract_calls.py``.
"""

import pytest

from tests.support.contract import check, rows

TABLE = """
scheduler/manager.py
    v1.core.single_type_kv_cache_manager:FullAttentionManager extends \
        v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager
    .remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens=None)
    ._remove_blocks_in_range(self, request_id, first_block, last_block)
    .pop_blocks_for_free(self, request_id)
    .cache_blocks(self, request, num_tokens, retention_interval, replay_boundaries)
    .find_longest_cache_hit(block_hashes, max_length, kv_cache_group_ids, block_pool, \
        kv_cache_spec, drop_eagle_block, alignment_tokens, dcp_world_size, pcp_world_size)
    .add_local_computed_blocks(self, request_id, new_computed_blocks, \
        num_local_computed_tokens, num_external_computed_tokens)
    .allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model)
    .get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, \
        total_computed_tokens, num_local_computed_tokens, num_tokens_main_model, \
        apply_admission_cap, prefill_end)
    ._apply_cow(self, request_id, block_idx, source_block, cow_block)
    .take_pending_cow_copies(self)
    v1.core.single_type_kv_cache_manager:FullAttentionManager{_null_block, _partial_hit_reqs, \
        block_pool, block_size, enable_caching, get_num_skipped_tokens, kv_cache_group_id, \
        kv_cache_spec, new_block_ids, num_cached_block, req_to_blocks}
    v1.core.kv_cache_manager:KVCacheManager.remove_skipped_blocks(self, request_id, \
        processed_computed_tokens, num_prompt_tokens)
    v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks(self, request, \
        num_tokens, retention_interval, replay_boundaries)
    v1.core.block_pool:BlockPool{blocks, cached_block_hash_to_block, enable_caching, \
        free_block_queue, get_num_free_blocks, hash_block_size, null_block}
    .touch(self, blocks)
    .evict_blocks(self, block_ids)
    .get_new_blocks(self, num_blocks)
    .get_cached_block(self, block_hash, kv_cache_group_ids)
    .free_blocks(self, ordered_blocks)
    v1.core.block_pool:BlockHashToBlockMap.get_one_block(self, key)
    v1.core.kv_cache_utils:make_block_hash_with_group_id(block_hash, group_id)
    v1.core.kv_cache_utils:KVCacheBlock{block_hash, block_id, is_null, ref_cnt}
    v1.core.kv_cache_utils:KVCacheBlockCopy{dst_block_id, src_block_id}
    v1.request:Request{block_hashes, num_computed_tokens, num_in_flight_tokens, num_preemptions, \
        num_prompt_tokens, num_tokens, request_id, skip_reading_prefix_cache}
    .is_finished(self)
    v1.core.sched.output:SchedulerOutput{kv_cache_block_copies, scheduled_new_reqs}
    v1.core.sched.output:NewRequestData{block_ids, num_computed_tokens, req_id}
    # Blocks that are kept for a while go back when their step is over.
    v1.core.sched.scheduler:Scheduler.schedule
        self.kv_cache_manager.take_kv_cache_block_copies()
        self._free_cow_retained_blocks(
        kv_cache_block_copies=pending_kv_cache_block_copies
        self._update_after_schedule(scheduler_output)
    # Tokens count as computed once scheduled, and as in flight until they are processed.
    ._update_after_schedule
        num_computed_tokens += num_scheduled_token
        num_in_flight_tokens +=
    .update_from_output
        num_in_flight_tokens -= num_tokens_scheduled
    # A preempted request loses all blocks at once, and starts again.
    ._preempt_request
        self._free_request_blocks(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
    # The worker copies blocks after it has zeroed new ones, and before it runs the model.
    v1.worker.gpu_model_runner:GPUModelRunner._update_states
        self._zero_block_ids(scheduler_output.new_block_ids_to_zero)
        copy_kv_cache_blocks_inplace(
        block_ids.extend(new_ids)
        req_state.block_ids = new_block_ids
        self.input_batch.block_table.append_row(new_block_ids, req_index)
    .execute_model
        self._update_states(scheduler_output)
        self._model_forward(
    v1.worker.gpu_input_batch:InputBatch.add_request
        self.block_table.add_row(request.block_ids,
    v1.worker.gpu.model_runner:GPUModelRunner.update_requests
        overwrite=False
        zero_block_ids(
        copy_kv_cache_blocks_inplace(
    .execute_model
        self.add_requests(
        self.update_requests(
        self.model(
    # One group of layers: its manager finds hits, at the size of its blocks.
    v1.core.kv_cache_coordinator:UnitaryKVCacheCoordinator.find_longest_cache_hit
        self.single_type_managers[0].find_longest_cache_hit(
        alignment_tokens=self.block_size
scheduler/prefix.py
    v1.core.kv_cache_utils:resolve_block_hashes(block_hashes, hash_block_size, block_size, \
        supports_fine_grained_hash_lookup, alignment_tokens)
    v1.core.kv_cache_utils:BlockHashListWithBlockSize{block_hashes}
hooks/kv_cache_spec.py
    v1.kv_cache_interface:replace_as(spec, target_cls, drop=(), changes)
    v1.kv_cache_interface:FullAttentionSpec{block_size, dtype, head_size, head_size_v, \
        num_kv_heads, page_size_bytes, prefix_cacheable}
    .merge(specs)
hooks/kv_cache.py
    v1.kv_cache_spec_registry:KVCacheSpecRegistry.register(kvcache_spec_cls, manager_class, \
        uniform_type_base_spec)
    ._ensure_registered(vllm_config=None)
hooks/scheduler.py
    v1.request:Request{sampling_params}
    sampling_params:SamplingParams{extra_args}
    # A request is registered before it can be looked up; its hashes stay the same object, and
    # every rank receives its sampling parameters.
    v1.core.sched.scheduler:Scheduler.add_request
        self._enqueue_waiting_request(request)
    v1.request:Request.update_block_hashes
        self.block_hashes.extend(
hooks/model_runner.py
    v1.core.sched.output:NewRequestData{sampling_params}
    .from_request
        sampling_params=request.sampling_params
    # Preempted requests are known to V1 until they finish.
    v1.worker.gpu_model_runner:GPUModelRunner._update_states
        for req_id in scheduler_output.finished_req_ids: \
            req_state = self.requests.pop(req_id, None)
        for new_req_data in scheduler_output.scheduled_new_reqs:
"""


@pytest.mark.parametrize(("ours", "use", "pieces"), rows(TABLE))
def test_vllm_is_what_we_rely_on(ours: str, use: str, pieces: list[str]) -> None:
    check(ours, use, pieces)
