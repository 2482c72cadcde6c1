"""What CPU attention overrides or calls in vLLM; see ``test_vllm_contract.py``."""

import pytest
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from tests.support.contract import check, rows

TABLE = """
worker/heads.py
    distributed.parallel_state:get_tensor_model_parallel_rank()
    config.model:ModelConfig{seed}
    config.parallel:ParallelConfig{tensor_parallel_size}
    # Which heads a rank has.
    model_executor.layers.linear:QKVParallelLinear
        self.num_kv_head_replicas = divide(tp_size, self.total_num_kv_heads)
        shard_rank = self.tp_rank // self.num_kv_head_replicas
worker/cpu/backend.py
    v1.attention.backend:AttentionBackend.customize_spec(spec)
    v1.attention.backend:AttentionType{DECODER}
    v1.attention.backends.cpu_attn:CPUAttentionBackend extends \
        v1.attention.backend:AttentionBackend
    v1.attention.backends.cpu_attn:CPUAttentionBackend{supported_kv_cache_dtypes}
    .get_name()
    .get_impl_cls()
    .get_builder_cls()
    .supports_attn_type(attn_type)
    .get_supported_kernel_block_sizes(kv_cache_spec)
worker/cpu/builder.py
    v1.attention.backend:CommonAttentionMetadata{block_table_tensor, max_query_len, max_seq_len, \
        num_actual_tokens, num_reqs, query_start_loc, query_start_loc_cpu, seq_lens, \
        seq_lens_cpu_upper_bound}
    v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder extends \
        v1.attention.backend:AttentionMetadataBuilder
    v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder{block_size, dtype, head_dim, isa, \
        num_heads, num_kv_heads}
    .__init__(self, kv_cache_spec, layer_names, vllm_config, device)
    .build(self, common_prefix_len, common_attn_metadata, fast_build)
    ._set_isa_to_layers(self, layer_names)
    # Tokens are stored by the kernels that the builder has chosen for its layers.
    ._set_isa_to_layers
        layer.isa = self.isa
    v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update
        ops.cpu_attn_reshape_and_cache(
        layer.isa
worker/cpu/impl.py
    config.vllm:get_current_vllm_config()
    v1.attention.backends.cpu_attn:CPUAttentionBackendImpl extends \
        v1.attention.backend:AttentionImpl
    v1.attention.backends.cpu_attn:CPUAttentionBackendImpl{alibi_slopes, do_kv_cache_update, \
        head_size, kv_sharing_target_layer_name, logits_soft_cap, num_kv_heads, scale, sinks}
    .__init__(self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, \
        kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks)
    .forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, \
        output_block_scale)
    # No metadata means that vLLM is profiling. A block is two halves, keys and values.
    .forward
        if attn_metadata is None: return output
        kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))
        key_cache, value_cache = kv_cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
        block_table=attn_metadata.block_table
worker/cpu/metadata.py
    v1.attention.backend:CommonAttentionMetadata.replace(self, kwargs)
    v1.attention.backends.cpu_attn:CPUAttentionMetadata{block_table, scheduler_metadata}
worker/cpu/dense.py
    _custom_ops:cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, \
        k_scale, v_scale, kv_cache_dtype)
worker/static/cpu.py
    v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update(self, layer, key, \
        value, kv_cache, slot_mapping)
    # Queries and outputs are of the layer's own heads.
    model_executor.layers.attention.attention:Attention.forward
        query.view(-1, self.num_heads
worker/static/cpu_builder.py
    config.vllm:get_layers_from_vllm_config(vllm_config, layer_type, layer_names)
    model_executor.layers.attention.attention:Attention{impl}
hooks/static_spec.py
    v1.kv_cache_interface:FullAttentionSpec{dtype, head_size, head_size_v, state_content_bytes}
    # A page has as many bytes as its spec says, whatever heads the layer has.
    v1.kv_cache_interface:AttentionSpec.state_content_size_bytes
        return (self.head_size + self.head_size_v) * get_dtype_size(self.dtype)
    v1.kv_cache_interface:compute_layer_kv_cache_shape_bytes
        spec.num_heads
        spec.state_content_size_bytes
hooks/kv_cache_spec.py
    # A spec is made by its layer's backend.
    v1.worker.utils:customize_attention_spec
        spec = backend.customize_spec(spec)
"""


@pytest.mark.parametrize(("ours", "use", "pieces"), rows(TABLE))
def test_vllm_is_what_we_rely_on(ours: str, use: str, pieces: list[str]) -> None:
    check(ours, use, pieces)


def test_vllm_values_are_what_we_rely_on() -> None:
    assert CPUAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,), "layout.py"
    assert AttentionType.DECODER == "decoder", "worker/cpu/backend.py and cuda_impl.py"
    assert MultipleOf(16).base == 16, "worker/cpu/backend.py"
    # Keys and values are stored before attention, by an operator of its own: worker/cpu/impl.py.
    assert CPUAttentionBackend.forward_includes_kv_cache_update is False
