"""What vLLM is told of static blocks: its own spec, in which keys and values are shorter."""

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from think_vllm.errors import ThinkError
from think_vllm.hooks.static_engine import WHO, selected_static


def customize_static_spec(spec: Any) -> Any:
    """Say how many channels are stored of a full-attention layer; leave any other spec alone.

    Raises:
        ThinkError: If the layer does not have the shape that the plan was made for.
    """
    if type(spec) is not FullAttentionSpec:
        return spec
    plan = selected_static().plan
    if spec.head_size != plan.head_size or spec.head_size_v != plan.head_size:
        raise ThinkError(
            f"{WHO}: an attention layer has head sizes {spec.head_size} (keys) and "
            f"{spec.head_size_v} (values), the plan was made for {plan.head_size}; models "
            "whose heads differ are not supported"
        )
    made = replace(spec, head_size=plan.key_channels, head_size_v=plan.value_channels)
    if plan.is_coded:
        # Codes and their scales are one packed run of bytes to vLLM.
        size = plan.layout.token_bytes
        made = replace(made, dtype=torch.uint8, state_content_bytes=size)
    return made
