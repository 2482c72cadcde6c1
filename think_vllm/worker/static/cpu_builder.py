"""What a step of statically pruned requests looks like on CPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from think_vllm.hooks.static_engine import selected_static
from think_vllm.kernels.cpu.static_attention import static_attention
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.metrics.worker import begin_report
from think_vllm.worker.cpu.metadata import prefill_common
from think_vllm.worker.cpu.scratch import BLOCK_SIZE, PromptScratch
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.static.channels import rank_channels
from think_vllm.worker.step import Prefill
from think_vllm.worker.tokens import Tokens, token_range


@dataclass(frozen=True)
class FreshPart:
    """Prompts that start in the step.

    Args:
        metadata: vLLM's own, for the scratch blocks.
        tokens: Where their queries are.
        scratch: Blocks to attend to.
    """

    metadata: CPUAttentionMetadata
    tokens: Tokens
    scratch: PromptScratch


@dataclass(frozen=True)
class CacheRows:
    """Queries that read the cache.

    Args:
        tokens: Where they are.
        request: int32 [R]. Row of the block table of each.
        seq_len: int32 [R]. Tokens that each attends to.
    """

    tokens: Tokens
    request: npt.NDArray[np.int32]
    seq_len: npt.NDArray[np.int32]


@dataclass(frozen=True)
class StaticCPUMetadata:
    """One step, shared by all layers.

    Args:
        block_table: int32 [num_reqs, width]. Blocks of each request.
        fresh: Prompts that start in the step, None for none.
        rows: All other queries, None for none.
    """

    block_table: torch.Tensor
    fresh: FreshPart | None
    rows: CacheRows | None


class StaticCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds ``StaticCPUMetadata``."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Single-token queries first: those of fresh prompts are then neighbours as a rule.
        self._init_reorder_batch_threshold(1)
        engine = selected_static()
        self.plan = engine.plan
        # Another engine of this process may have left measurements, which are none of ours.
        begin_report()
        # For fresh prompts: vLLM's own builder for whole heads in blocks of its own default size.
        whole = replace(
            kv_cache_spec,
            block_size=BLOCK_SIZE,
            head_size=self.plan.head_size,
            head_size_v=self.plan.head_size,
            dtype=self.dtype,
            state_content_bytes=None,
        )
        self._fresh = CPUAttentionMetadataBuilder(whole, layer_names, vllm_config, device)
        self._scratch = PromptScratch(
            self.num_kv_heads, self.plan.head_size, self.dtype, self._fresh.isa
        )
        heads = rank_heads(vllm_config, self.num_kv_heads, self.plan.head_size)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            layer.impl.use(rank_channels(engine, heads.of_layer(name)))
        # Here, because vLLM builds this before it reports healthy: nothing compiles later.
        self._warm_up(rank_channels(engine, heads.of_layer(layer_names[0])))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Sort the batch: prompts that start in the step, and queries that read the cache."""
        common = common_attn_metadata
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        seq_lens = common.seq_lens.numpy().astype(np.int64)
        num_tokens = np.diff(query_start)
        is_fresh = num_tokens == seq_lens
        # Requests without a query may pad a batch.
        used = num_tokens > 0
        step = Prefill(
            request=np.arange(seq_lens.size),
            first_token=query_start[:-1],
            num_tokens=num_tokens,
            seq_len=seq_lens,
            thin_spans=np.zeros_like(seq_lens),
        )
        return StaticCPUMetadata(
            block_table=common.block_table_tensor,
            fresh=self._build_fresh(common, step.choose(is_fresh & used)),
            rows=_build_rows(step.choose(~is_fresh & used)),
        )

    def _build_fresh(self, common: CommonAttentionMetadata, fresh: Prefill) -> FreshPart | None:
        if not fresh.request.size:
            return None
        table = self._scratch.place(fresh.num_tokens)
        metadata = self._fresh.build(0, prefill_common(common, fresh, table))
        return FreshPart(metadata, token_range(fresh.tokens()), self._scratch)

    def _warm_up(self, channels: StaticChannels) -> None:
        """Compile the kernel, or load it from numba's cache."""
        plan, heads = self.plan, self.num_kv_heads
        stored = torch.uint8 if plan.is_coded else self.dtype
        width = plan.layout.token_bytes // stored.itemsize
        kv_cache = torch.zeros(1, heads, plan.block_size, width, dtype=stored)
        query = torch.zeros(1, self.num_heads, plan.head_size, dtype=self.dtype)
        static_attention(
            query,
            kv_cache,
            torch.zeros(1, 1, dtype=torch.int32),
            np.zeros(1, np.int32),
            np.ones(1, np.int32),
            channels,
            plan,
            scale=1.0,
            out=torch.empty_like(query),
        )


def _build_rows(step: Prefill) -> CacheRows | None:
    """One row for each query, in token order."""
    if not step.request.size:
        return None
    token = step.tokens()
    first = step.seq_len - step.num_tokens - step.first_token
    return CacheRows(
        tokens=token_range(token),
        request=np.repeat(step.request, step.num_tokens).astype(np.int32),
        seq_len=(token + np.repeat(first, step.num_tokens) + 1).astype(np.int32),
    )
