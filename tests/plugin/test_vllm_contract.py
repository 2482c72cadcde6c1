"""What we override or call in vLLM, by signature: fails first when an upgrade changes it."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import vllm
from vllm import _custom_ops as ops
from vllm.config import CacheConfig, VllmConfig
from vllm.config.model_arch import ModelArchitectureConfig
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from think_vllm import VLLM_SERIES


def test_vllm_is_of_the_series_that_we_extend() -> None:
    assert vllm.__version__.startswith(VLLM_SERIES + ".")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (Platform.pre_register_and_update, ["parser"]),
        (Platform.check_and_update_config, ["vllm_config"]),
        (
            Platform.get_attn_backend_cls,
            ["selected_backend", "attn_selector_config", "num_heads"],
        ),
        (AttentionBackend.customize_spec, ["spec"]),
        (
            FullAttentionManager.remove_skipped_blocks,
            ["self", "request_id", "processed_computed_tokens", "num_prompt_tokens"],
        ),
        (
            FullAttentionManager._remove_blocks_in_range,
            ["self", "request_id", "first_block", "last_block"],
        ),
        (FullAttentionManager.pop_blocks_for_free, ["self", "request_id"]),
        (
            KVCacheManager.remove_skipped_blocks,
            ["self", "request_id", "processed_computed_tokens", "num_prompt_tokens"],
        ),
        (
            InputProcessor.process_inputs,
            [
                "self",
                "request_id",
                "prompt",
                "params",
                "supported_tasks",
                "arrival_time",
                "lora_request",
                "tokenization_kwargs",
                "trace_headers",
                "priority",
                "data_parallel_rank",
                "resumable",
                "session_id",
                "kv_hints",
            ],
        ),
        (KVCacheSpecRegistry._ensure_registered, ["vllm_config"]),
        (
            KVCacheSpecRegistry.register,
            ["kvcache_spec_cls", "manager_class", "uniform_type_base_spec"],
        ),
        (register_backend, ["backend", "class_path", "is_mamba"]),
        (replace_as, ["spec", "target_cls", "drop", "changes"]),
        (
            CPUAttentionMetadataBuilder.build,
            ["self", "common_prefix_len", "common_attn_metadata", "fast_build"],
        ),
        (CPUAttentionMetadataBuilder._set_isa_to_layers, ["self", "layer_names"]),
        (
            CPUAttentionBackendImpl.forward,
            [
                "self",
                "layer",
                "query",
                "key",
                "value",
                "kv_cache",
                "attn_metadata",
                "output",
                "output_scale",
                "output_block_scale",
            ],
        ),
        (
            ops.cpu_attn_reshape_and_cache,
            [
                "key",
                "value",
                "key_cache",
                "value_cache",
                "slot_mapping",
                "isa",
                "k_scale",
                "v_scale",
                "kv_cache_dtype",
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_vllm_signature_is_what_we_rely_on(
    function: Callable[..., Any], parameters: list[str]
) -> None:
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (
            CommonAttentionMetadata,
            {
                "query_start_loc",
                "query_start_loc_cpu",
                "seq_lens",
                "num_reqs",
                "num_actual_tokens",
                "max_query_len",
                "max_seq_len",
                "block_table_tensor",
                "rswa_prefix_lens",
            },
        ),
        (FullAttentionSpec, {"block_size", "num_kv_heads", "head_size", "head_size_v", "dtype"}),
        (CacheConfig, {"block_size", "user_specified_block_size", "enable_prefix_caching"}),
        (VllmConfig, {"additional_config", "attention_config", "cache_config"}),
        (ModelArchitectureConfig, {"rswa_window"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_vllm_fields_are_what_we_rely_on(kind: type, fields: set[str]) -> None:
    declared = (
        {f.name for f in dataclasses.fields(kind)}
        if dataclasses.is_dataclass(kind)
        else set(getattr(kind, "model_fields", {}))
    )
    assert fields <= declared


def test_vllm_custom_backend_is_a_static_member() -> None:
    assert AttentionBackendEnum["CUSTOM"] is AttentionBackendEnum.CUSTOM
