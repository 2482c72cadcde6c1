"""The attention backend that an engine gets.

It is registered as ``AttentionBackendEnum.CUSTOM``: a member made at run time would not unpickle in
vLLM's child processes, which read the config before they load plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from think_vllm.errors import ThinkError
from think_vllm.hooks.engine import find_engine
from think_vllm.hooks.engine_support import is_cpu

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_PATH = "think_vllm.worker.cpu.backend.ThinkCPUBackend"
CPU_WINDOW_PATH = "think_vllm.worker.cpu.window.WindowCPUBackend"
CPU_STATIC_PATH = "think_vllm.worker.static.cpu.StaticCPUBackend"
CUDA_PATH = "think_vllm.worker.cuda.backend.ThinkCUDABackend"
CUDA_STATIC_PATH = "think_vllm.worker.static.cuda.StaticCUDABackend"


def claim_backend(vllm_config: VllmConfig) -> None:
    """Make a config request our backend, which is part of vLLM's selection cache key.

    Raises:
        ThinkError: If the user chose another backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import _cached_get_attn_backend

    attention = vllm_config.attention_config
    if attention.backend_per_kind:
        raise ThinkError(
            "thin KV blocks: attention backends per kind of layer were requested "
            f"({attention.backend_per_kind}); thin blocks need their own attention backend. Leave "
            "them out"
        )
    if attention.backend not in (None, AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):
        raise ThinkError(
            f"thin KV blocks: --attention-backend is {attention.backend.name}; thin blocks need "
            "their own attention backend. Leave --attention-backend out"
        )
    attention.backend = AttentionBackendEnum.CUSTOM
    # An earlier engine of this process may have had our other backend, of the same name.
    _cached_get_attn_backend.cache_clear()


def has_our_backend(vllm_config: VllmConfig) -> bool:
    """Whether ``claim_backend`` was called for a config."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return bool(vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM)


def select_backend(vllm_config: VllmConfig, has_window: bool = False) -> str | None:
    """Path of the attention backend for an engine, None if it has no thin blocks.

    Args:
        vllm_config: Of the engine.
        has_window: Whether the layer has a sliding window. Then its blocks are never thin.
    """
    engine = find_engine(vllm_config)
    if engine is not None and engine.static is not None:
        return CPU_STATIC_PATH if is_cpu() else CUDA_STATIC_PATH
    if engine is None or engine.plan is None:
        return None
    if not is_cpu():
        return CUDA_PATH
    return CPU_WINDOW_PATH if has_window else CPU_PATH


def get_attn_backend_cls(
    original: Callable[..., str],
    platform: Any,
    selected_backend: Any,
    attn_selector_config: Any,
    *args: Any,
    **kwargs: Any,
) -> str:
    """Name our backend where there is one for the engine whose layers are being built."""
    from vllm.config import get_current_vllm_config

    path = select_backend(get_current_vllm_config(), attn_selector_config.has_sliding_window)
    if path is None:
        return original(platform, selected_backend, attn_selector_config, *args, **kwargs)
    # The backend of sliding-window layers goes by the name of vLLM's own, which it extends.
    if path != CPU_WINDOW_PATH:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CUSTOM, path)
    return path
