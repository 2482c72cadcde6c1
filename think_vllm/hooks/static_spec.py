"""The spec that vLLM gets for static blocks: its own, in which keys and values are shorter."""

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from think_vllm.hooks.engine import check_head_sizes
from think_vllm.hooks.static_engine import WHO, selected_static


def customize_static_spec(spec: Any) -> Any:
    """Set the stored channels of a full-attention layer; leave any other spec alone.

    Raises:
        ThinkError: If the layer does not have the shape that the plan was made for.
    """
    if type(spec) is not FullAttentionSpec:
        return spec
    plan = selected_static().plan
    check_head_sizes(WHO, spec, plan)
    shorter = replace(spec, head_size=plan.key_channels, head_size_v=plan.value_channels)
    if plan.is_quantized:
        # Codes and their scales are one packed run of bytes to vLLM.
        size = plan.layout.token_bytes
        shorter = replace(shorter, dtype=torch.uint8, state_content_bytes=size)
    return shorter
