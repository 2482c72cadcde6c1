"""Prompt lengths of a step on CPUs, which vLLM passes to builders if the model has a window."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


def request_prompt_lens(model_config: ModelConfig) -> None:
    """Make vLLM's model runners pass prompt lengths to metadata builders."""
    model_config.model_arch_config.rswa_window = model_config.max_model_len


def really_uses_rswa(model_config: ModelConfig) -> bool:
    """Whether the model itself asks for reference sliding-window attention."""
    window = model_config.rswa_window
    return window is not None and window < model_config.max_model_len


def prompt_lens(metadata: CommonAttentionMetadata) -> torch.Tensor:
    """Prompt length of each request of a batch: int tensor [num_reqs].

    Raises:
        RuntimeError: If vLLM did not pass them.
    """
    if metadata.rswa_prefix_lens is None:
        raise RuntimeError(
            "think-vllm: vLLM passed no prompt lengths (CommonAttentionMetadata."
            "rswa_prefix_lens is None); see prompt_lengths.request_prompt_lens"
        )
    lens: torch.Tensor = metadata.rswa_prefix_lens
    return lens
