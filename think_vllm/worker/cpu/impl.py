"""One layer's attention on the CPU, as vLLM calls it."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config

from think_vllm.hooks.engine import remember_plan
from think_vllm.worker.cpu.kernels import CPUKernels
from think_vllm.worker.cpu.layer import CPULayerImpl
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.layer import ThinkLayer


class ThinkCPUImpl(CPULayerImpl):
    """Attention over thin and dense blocks on the CPU."""

    who = "thin KV blocks"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        config = get_current_vllm_config()
        plan = remember_plan(config)
        heads = rank_heads(config, self.num_kv_heads, self.head_size)
        cap = self.logits_soft_cap or 0.0
        kernels = CPUKernels(plan, self.scale, cap, self.sinks, self.prompt_attention)
        self.attention = ThinkLayer(plan, heads, kernels)
