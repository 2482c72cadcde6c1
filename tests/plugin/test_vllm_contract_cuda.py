"""What the CUDA side overrides, wraps or calls in vLLM; see ``test_vllm_contract.py``.

Its modules are imported here on the CPU too. Where they cannot be, or say only inside a function
what they have, their source is read.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.support import source
from tests.support.contract import check, rows, tight
from tests.support.flash import FlashStandIn
from think_vllm.hooks.model_runner import step_rows, track_rows
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.token_selection import split_runs

FLASH = "vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func"
TABLE = """
worker/cuda/builder.py
    v1.attention.backend:AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, \
        vllm_config, device)
    .build(self, common_prefix_len, common_attn_metadata, fast_build)
    .build_for_cudagraph_capture(self, common_attn_metadata)
    ._init_reorder_batch_threshold(self, reorder_batch_threshold, supports_spec_as_decode, \
        supports_dcp_with_varlen)
    v1.attention.backend:CommonAttentionMetadata{num_reqs, query_start_loc_cpu, \
        seq_lens_cpu_upper_bound, query_start_loc, seq_lens, max_seq_len, block_table_tensor}
    v1.attention.backend:AttentionCGSupport{UNIFORM_SINGLE_TOKEN_DECODE}
    config.scheduler:SchedulerConfig{max_num_seqs}
    # A captured launch has as many splits as the longest context wants, and lengths are read from
    # where they lie.
    v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn
        if for_capture:
        max_seq_len = self.max_model_len
        seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound
    v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata
        query_start_loc=self.query_start_loc.gpu[: num_reqs_padded + 1]
        seq_lens=self.seq_lens
    ._build_attention_metadata
        seq_lens_cpu_upper_bound=self.optimistic_seq_lens_cpu[:num_reqs_padded]
    # Rows that pad a batch have no tokens: in V1 by this, in V2 by its kernel.
    ._prepare_inputs
        self.seq_lens[num_reqs:].fill_(0)
worker/cuda/layer.py
    v1.attention.backend:AttentionImpl.__init__(self, num_heads, head_size, scale, num_kv_heads, \
        alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type, \
        kv_sharing_target_layer_name)
    # Keys are stored by an operator of their own.
    model_executor.layers.attention.attention:unified_kv_cache_update
        attn_layer.impl.do_kv_cache_update(
        attn_layer, key, value, kv_cache, layer_slot_mapping,
worker/cuda/impl.py
    v1.attention.backend:AttentionImpl.forward(self, layer, query, key, value, kv_cache, \
        attn_metadata, output, output_scale, output_block_scale)
worker/cuda/backend.py
    v1.attention.backend:AttentionBackend{forward_includes_kv_cache_update}
    .supported_kv_cache_layouts()
    .get_supported_kernel_block_sizes(kv_cache_spec)
    .get_supported_head_sizes()
    .supports_compute_capability(capability)
    .supports_kv_connector()
    v1.kv_cache_layout:KVCacheLayout{LBHNC}
worker/cuda/metadata.py
    utils.torch_utils:async_tensor_h2d(data, device, dtype, out)
worker/cuda/flash.py
    v1.attention.backends.fa_utils:get_flash_attn_version(..., head_size, requires_softcap)
    # Pages need lengths, and those exclude starts of keys.
    vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func
        causal mask is aligned to the bottom right
        cu_seqlens_k is None or seqused_k is None
        assert block_table is None or seqused_k is not None
    # Rows of a key and a value, as ``BlockForm.GPU`` has them, read and stored.
    v1.attention.backends.flash_attn:FlashAttentionImpl.forward
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        k=key_cache
        v=value_cache
        cu_seqlens_q=cu_seqlens_q
        seqused_k=seqused_k
        max_seqlen_k=max_seqlen_k
        block_table=block_table
    .do_kv_cache_update
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
hooks/model_runner.py
    # In V2, preempted requests forget their rows, and come back as new ones with all their blocks.
    v1.worker.gpu.model_runner:GPUModelRunner.finish_requests
        finished_req_ids.union(preempted_req_ids)
    v1.core.sched.scheduler:Scheduler.schedule
        req_to_new_blocks[request_id] = self.kv_cache_manager.get_blocks(request_id)
        if self.use_v2_model_runner: scheduled_new_reqs.extend(scheduled_resumed_reqs) \
            scheduled_resumed_reqs.clear()
    v1.worker.gpu.model_runner:BatchReqState{req_ids, idx_mapping_np, has_prefill}
    v1.worker.gpu.states:RequestState.__init__
        self.req_id_to_index: dict
        self.prompt_len = UvaBackedTensor(
    v1.worker.gpu.buffer_utils:UvaBackedTensor{np}
    # Rows are known before their metadata is built, and decide about full graphs. Capture and
    # dummy replays build their metadata apart.
    v1.worker.gpu.model_runner:GPUModelRunner.execute_model
        self.finish_requests(scheduler_output)
        self.add_requests(scheduler_output)
        batch_req_state, uniform_tok_count = self.gather_batch_req_state(
        dispatch_cg_and_sync_dp(
        self.model_state.prepare_attn(
        for_capture=dummy_run and batch_desc.cg_mode == CUDAGraphMode.FULL
    .execute_model
        if batch_req_state.has_prefill:
    # In V1, on CPUs, too, where eviction asks whose rows a step has.
    v1.worker.cpu_model_runner:CPUModelRunner extends v1.worker.gpu_model_runner:GPUModelRunner
    v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding(..., \
        force_uniform_decode)
    ._dummy_run
        force_uniform_decode=uniform_decode
    .execute_model
        self._update_states(scheduler_output)
        self._determine_batch_execution_and_padding(
        self._build_attention_metadata(
    .__init__
        self.requests: dict[str, CachedRequestState]
    ._update_states
        req_state.block_ids = new_block_ids
    v1.worker.gpu_input_batch:InputBatch.req_ids(self)
    .num_reqs(self)
    .__init__
        self.num_prompt_tokens = self.num_prompt_tokens_cpu_tensor.numpy()
        self.num_computed_tokens_cpu = self.num_computed_tokens_cpu_tensor.numpy()
        self.block_table = MultiGroupBlockTable(
    .add_request
        self.block_table.add_row(request.block_ids, req_index)
    v1.worker.block_table:MultiGroupBlockTable.__getitem__(self, idx)
    # Rows are appended to, so what was null at the beginning stays so.
    v1.worker.block_table:BlockTable.get_numpy_array(self)
    .append_row
        self.block_table.np[row_idx, start : start + num_blocks] = block_ids
"""


@pytest.mark.parametrize(("ours", "use", "pieces"), rows(TABLE))
def test_vllm_is_what_we_rely_on(ours: str, use: str, pieces: list[str]) -> None:
    check(ours, use, pieces)


def test_vllm_flash_attention_takes_what_our_stand_in_takes() -> None:
    parameters = source.parameters(source.find(FLASH))
    taken = list(inspect.signature(FlashStandIn.__call__).parameters)[1:]
    assert [name for name in parameters if name in taken] == taken
    # tests/triton calls the stand-in as we do.
    passed = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k"]
    passed += ["block_table", "softmax_scale", "softcap", "causal", "fa_version"]
    assert set(passed) <= set(taken)


def test_vllm_flash_attention_reads_our_dense_blocks() -> None:
    kv_cache = torch.arange(3 * 2 * 16 * 128).view(3, 2, 16, 128)
    keys, values = kv_cache.transpose(1, 2).split(64, dim=-1)
    ours = split_runs(kv_cache, SimpleNamespace(block_size=16, head_size=64), BlockForm.GPU)  # type: ignore[arg-type]
    assert torch.equal(ours[0].permute(0, 3, 1, 2), keys)
    assert torch.equal(ours[1].transpose(1, 2), values)


def test_vllm_runner_v1_tells_dummy_runs_apart() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "_determine_batch_execution_and_padding" not in vars(CPUModelRunner)
    assert "force_uniform_decode" not in tight(GPUModelRunner.execute_model)


@pytest.mark.parametrize("use_v2", [False, True])
def test_watching_a_runner_wraps_it_once(use_v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if use_v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        name = "gather_batch_req_state"
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        name = "_determine_batch_execution_and_padding"
    calls: list[Any] = []

    def original(self: Any, *args: Any, **kwargs: Any) -> tuple[None, int]:
        calls.append((args, kwargs))
        return None, 1

    monkeypatch.setattr(GPUModelRunner, name, original)
    config = SimpleNamespace(use_v2_model_runner=use_v2)
    rule = SpanRule(2, 3, 2, 5, True)
    track_rows(config, rule, None)  # type: ignore[arg-type]
    wrapped = getattr(GPUModelRunner, name)
    track_rows(config, rule, None)  # type: ignore[arg-type]
    assert getattr(GPUModelRunner, name) is wrapped
    # Runners without thin blocks, and dummy runs of those with, see the original.
    arguments: dict[str, Any] = {"scheduler_output": None, "dummy_run": True}
    if not use_v2:
        arguments = {"num_tokens": 1, "force_uniform_decode": True}
    for backend in (None, AttentionBackendEnum.CUSTOM):
        runner = SimpleNamespace(
            vllm_config=SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
        )
        assert wrapped(runner, **arguments) == (None, 1)
    assert len(calls) == 2
    assert step_rows() is None
