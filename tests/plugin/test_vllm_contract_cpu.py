"""What CPU attention overrides or calls in vLLM; see ``test_vllm_contract.py``."""

import pytest
from vllm.v1.attention.backend import (
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
)
from vllm.v1.kv_cache_interface import (
    KVCacheLayout,
)

from tests.support.contract import (
    check_base,
    check_members,
    check_parameters,
    check_source,
    name_of,
)

FORWARD = ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
FORWARD += ["output_scale", "output_block_scale"]
LAYER = ["self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes"]
LAYER += ["sliding_window", "kv_cache_dtype", "logits_soft_cap", "attn_type"]
LAYER += ["kv_sharing_target_layer_name", "sinks"]
BUILD = ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]
STORE = ["key", "value", "key_cache", "value_cache", "slot_mapping", "isa", "k_scale", "v_scale"]
STORE += ["kv_cache_dtype"]


@pytest.mark.parametrize(
    ("ours", "function", "parameters"),
    [
        ("worker/cpu/impl.py", "config.vllm:get_current_vllm_config", []),
        (
            "worker/heads.py",
            "distributed.parallel_state:get_tensor_model_parallel_rank",
            [],
        ),
        ("worker/heads.py", "config.model:ModelConfig.get_total_num_kv_heads", ["self"]),
        (
            "worker/cpu/backend.py",
            "v1.attention.backend:AttentionBackend.customize_spec",
            ["spec"],
        ),
        (
            "worker/cpu/backend.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackend.get_name",
            [],
        ),
        (
            "worker/cpu/backend.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackend.get_impl_cls",
            [],
        ),
        (
            "worker/cpu/backend.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackend.get_builder_cls",
            [],
        ),
        (
            "worker/cpu/backend.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackend.supports_attn_type",
            ["attn_type"],
        ),
        (
            "worker/cpu/backend.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackend.get_supported_kernel_block_sizes",
            ["kv_cache_spec"],
        ),
        (
            "worker/cpu/builder.py",
            "v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.__init__",
            ["self", "kv_cache_spec", "layer_names", "vllm_config", "device"],
        ),
        (
            "worker/cpu/builder.py",
            "v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build",
            BUILD,
        ),
        (
            "worker/cpu/builder.py",
            "v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder._set_isa_to_layers",
            ["self", "layer_names"],
        ),
        (
            "worker/cpu/builder.py",
            "v1.attention.backend:AttentionMetadataBuilder._init_reorder_batch_threshold",
            [
                "self",
                "reorder_batch_threshold",
                "supports_spec_as_decode",
                "supports_dcp_with_varlen",
            ],
        ),
        (
            "worker/cpu/metadata.py",
            "v1.attention.backend:CommonAttentionMetadata.replace",
            ["self", "kwargs"],
        ),
        (
            "worker/cpu/impl.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.__init__",
            LAYER,
        ),
        (
            "worker/cpu/impl.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
            FORWARD,
        ),
        ("worker/cpu/dense.py", "_custom_ops:cpu_attn_reshape_and_cache", STORE),
        (
            "worker/static/cpu.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
            ["self", "layer", "key", "value", "kv_cache", "slot_mapping"],
        ),
        (
            "worker/static/cpu_builder.py",
            "config.vllm:get_layers_from_vllm_config",
            ["vllm_config", "layer_type", "layer_names"],
        ),
    ],
    ids=name_of,
)
def test_vllm_signature_is_what_we_rely_on(ours: str, function: str, parameters: list[str]) -> None:
    check_parameters(ours, function, parameters)


@pytest.mark.parametrize(
    ("ours", "kind", "names"),
    [
        (
            "worker/cpu/builder.py",
            "v1.attention.backend:CommonAttentionMetadata",
            {"query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "max_seq_len"}
            | {"num_actual_tokens", "max_query_len", "block_table_tensor"}
            | {"seq_lens_cpu_upper_bound"},
        ),
        ("worker/cpu/backend.py", "v1.attention.backend:AttentionType", {"DECODER"}),
        ("worker/heads.py", "config.model:ModelConfig", {"seed"}),
        ("worker/heads.py", "config.parallel:ParallelConfig", {"tensor_parallel_size"}),
        (
            "worker/cpu/backend.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackend",
            {"supported_kv_cache_dtypes"},
        ),
        (
            "worker/cpu/builder.py",
            "v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder",
            {"dtype", "head_dim", "num_heads", "num_kv_heads", "block_size", "isa"},
        ),
        (
            "worker/cpu/impl.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
            {"alibi_slopes", "sinks", "kv_sharing_target_layer_name", "scale", "head_size"}
            | {"num_kv_heads", "logits_soft_cap", "do_kv_cache_update"},
        ),
        (
            "worker/cpu/metadata.py",
            "v1.attention.backends.cpu_attn:CPUAttentionMetadata",
            {"block_table", "scheduler_metadata"},
        ),
        (
            "hooks/static_spec.py",
            "v1.kv_cache_interface:FullAttentionSpec",
            {"head_size", "head_size_v"},
        ),
        (
            "hooks/static_spec.py",
            "v1.kv_cache_interface:FullAttentionSpec",
            {"dtype", "state_content_bytes"},
        ),
        (
            "worker/static/cpu_builder.py",
            "model_executor.layers.attention.attention:Attention",
            {"impl"},
        ),
    ],
    ids=name_of,
)
def test_vllm_members_are_what_we_rely_on(ours: str, kind: str, names: set[str]) -> None:
    check_members(ours, kind, names)


@pytest.mark.parametrize(
    ("ours", "kind", "base"),
    [
        (
            "worker/cpu/backend.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackend",
            "v1.attention.backend:AttentionBackend",
        ),
        (
            "worker/cpu/builder.py",
            "v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder",
            "v1.attention.backend:AttentionMetadataBuilder",
        ),
        (
            "worker/cpu/impl.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
            "v1.attention.backend:AttentionImpl",
        ),
    ],
    ids=name_of,
)
def test_vllm_base_is_what_we_rely_on(ours: str, kind: str, base: str) -> None:
    check_base(ours, kind, base)


@pytest.mark.parametrize(
    ("ours", "function", "pieces"),
    [
        # Which heads a rank has.
        (
            "worker/heads.py",
            "model_executor.layers.linear:QKVParallelLinear",
            [
                "self.num_kv_head_replicas = divide(tp_size, self.total_num_kv_heads)",
                "shard_rank = self.tp_rank // self.num_kv_head_replicas",
            ],
        ),
        # A spec is made by its layer's backend.
        (
            "hooks/kv_cache_spec.py",
            "v1.worker.utils:customize_attention_spec",
            ["spec = backend.customize_spec(spec)"],
        ),
        # Tokens are stored by the kernels that the builder has chosen for its layers.
        (
            "worker/cpu/builder.py",
            "v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder._set_isa_to_layers",
            ["layer.isa = self.isa"],
        ),
        (
            "worker/cpu/builder.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
            ["ops.cpu_attn_reshape_and_cache(", "layer.isa"],
        ),
        # A page has as many bytes as its spec says, whatever heads the layer has.
        (
            "hooks/static_spec.py",
            "v1.kv_cache_interface:AttentionSpec.state_content_size_bytes",
            ["return (self.head_size + self.head_size_v) * get_dtype_size(self.dtype)"],
        ),
        (
            "hooks/static_spec.py",
            "v1.kv_cache_interface:compute_layer_kv_cache_shape_bytes",
            ["spec.num_heads", "spec.state_content_size_bytes"],
        ),
        # Queries and outputs are of the layer's own heads.
        (
            "worker/static/cpu.py",
            "model_executor.layers.attention.attention:Attention.forward",
            ["query.view(-1, self.num_heads"],
        ),
        # No metadata means that vLLM is profiling. A block is two halves, keys and values.
        (
            "worker/cpu/impl.py",
            "v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
            [
                "if attn_metadata is None: return output",
                "kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))",
                "key_cache, value_cache = kv_cache.chunk(2, dim=2)",
                "ops.cpu_attention_with_kv_cache(",
                "block_table=attn_metadata.block_table",
            ],
        ),
    ],
    ids=name_of,
)
def test_vllm_does_what_we_rely_on(ours: str, function: str, pieces: list[str]) -> None:
    check_source(ours, function, *pieces)


def test_vllm_values_are_what_we_rely_on() -> None:
    assert CPUAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,), "layout.py"
    assert AttentionType.DECODER == "decoder", "worker/cpu/backend.py and cuda_impl.py"
    assert MultipleOf(16).base == 16, "worker/cpu/backend.py"
    # Keys and values are stored before attention, by an operator of its own: worker/cpu/impl.py.
    assert CPUAttentionBackend.forward_includes_kv_cache_update is False
