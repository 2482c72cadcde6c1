"""Register the block manager with vLLM, and what its scheduler has to tell it."""

from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from think_vllm.hooks import metrics, platform, requests
from think_vllm.scheduler.manager import ThinKVCacheManager
from think_vllm.scheduler.report import engine_report
from think_vllm.scheduler.requests import announce_request, settle_requests


def register(spec: type[Any]) -> None:
    """Give layers of a KV cache spec our manager, and let vLLM's schedulers report to it.

    Args:
        spec: ``ThinKVCacheSpec``.
    """
    platform.register_spec(spec, ThinKVCacheManager, base=FullAttentionSpec)
    requests.watch_scheduler(announce_request)
    metrics.watch_scheduler(settle_requests, engine_report)
