"""A worker's step around the CUDA backend of ``--kv-select static``, over vLLM's own KV blocks.

There is nothing to follow but who has which blocks: a cached prefix is shared by its block numbers.
Freed blocks are filled with NaN, so that whoever still reads one is found out.
"""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.support.static_blocks import random_channels
from tests.triton.layers import run_layer
from think_vllm.hooks.static_engine import StaticEngine
from think_vllm.kernels.reference.static import static_attention_ref, store_static_ref
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.plan.static_plan import StaticPlan
from think_vllm.worker.heads import RankHeads
from think_vllm.worker.static.cuda import StaticCUDABackend

SCALE = 0.2
#: float32 sums in another order, of values of about 1.
TOLERANCE = 2e-5


@dataclass
class StaticRequest:
    """A request: query, key and value are [layers, total, heads, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Tables:
    """Channels of layers, in the place of a file's."""

    def __init__(self, channels: list[StaticChannels]) -> None:
        self._channels = channels

    def kept_keys(self, layer: int, plan: StaticPlan) -> list[list[int]]:
        return self._channels[layer].keys.tolist()

    def kept_values(self, layer: int, plan: StaticPlan) -> list[list[int]]:
        return self._channels[layer].values.tolist()


class StaticWorker:
    """Scheduler and worker in one, which checks every answer against the reference.

    With ``graphs`` batches of single tokens run as full CUDA graphs do: with the metadata that was
    built before, for more rows than the batch has.
    """

    MAX_REQUESTS = 6
    WIDTH = 12

    def __init__(
        self,
        plan: StaticPlan,
        heads: tuple[int, int],
        device: torch.device,
        layers: int = 2,
        graphs: bool = False,
        num_blocks: int = 40,
    ) -> None:
        self.plan, self.heads, self.device, self.graphs = plan, heads, device, graphs
        self.random, self.generator = random.Random(0), torch.Generator().manual_seed(0)
        self.channels = [random_channels(plan, heads[1], self.generator) for _ in range(layers)]
        self.requests: dict[str, StaticRequest] = {}
        self.free = list(range(1, num_blocks))
        #: Rows without a query behind each batch that is no graph.
        self.padding, self.graph_steps = 0, 0
        self.captured: dict[int, Any] = {}
        # Addresses that a graph keeps.
        shape = (self.MAX_REQUESTS, self.WIDTH)
        self.block_table = torch.zeros(shape, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(self.MAX_REQUESTS, dtype=torch.int32, device=device)
        engine: Any = StaticEngine(plan, Tables(self.channels))
        module = "think_vllm.worker.static.cuda"
        with (
            patch(f"{module}.get_current_vllm_config"),
            patch(f"{module}.remember_static", return_value=engine),
        ):
            impls = [
                StaticCUDABackend.get_impl_cls()(heads[0], plan.head_size, SCALE, heads[1])
                for _ in range(layers)
            ]
        with patch("think_vllm.hooks.static_spec.selected_static", return_value=engine):
            dense = FullAttentionSpec(
                block_size=plan.block_size, num_kv_heads=heads[1], head_size=plan.head_size,
                dtype=torch.float32,
            )  # fmt: skip
            self.spec = StaticCUDABackend.customize_spec(dense)
        caches = self._make_caches(num_blocks, layers)
        self.layers = {
            name: SimpleNamespace(layer_name=name, impl=impl, kv_cache=caches[:, i])
            for i, impl in enumerate(impls)
            for name in [f"model.layers.{i}.attn"]
        }
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=None,
            compilation_config=SimpleNamespace(static_forward_context=self.layers),
            model_config=SimpleNamespace(dtype=torch.float32),
        )
        module = "think_vllm.worker.static.builder"
        rank = RankHeads(0, heads[1], plan.head_size, seed=0)
        with (
            patch(f"{module}.selected_static", return_value=engine),
            patch(f"{module}.rank_heads", return_value=rank),
        ):
            self.builder = StaticCUDABackend.get_builder_cls()(
                self.spec, list(self.layers), config, device
            )

    def _make_caches(self, num_blocks: int, layers: int) -> torch.Tensor:
        """Caches as the spec says, layers in one allocation; all bits set, which is a NaN."""
        size = (num_blocks, layers, self.heads[1], self.plan.block_size)
        width = self.spec.state_content_size_bytes
        assert width == self.plan.layout.token_bytes
        memory = torch.full((*size, width), 255, dtype=torch.uint8, device=self.device)
        return memory.view(self.spec.dtype)

    def add(self, name: str, total: int, like: tuple[str, int] | None = None) -> None:
        """Admit a request; ``like`` names whose prefix of how many tokens it finds in the cache."""

        def some(count: int) -> torch.Tensor:
            shape = (len(self.layers), total, count, self.plan.head_size)
            return torch.randn(shape, generator=self.generator)

        query_heads, kv_heads = self.heads
        request = StaticRequest(some(query_heads), some(kv_heads), some(kv_heads))
        if like is not None:
            other, tokens = self.requests[like[0]], like[1]
            assert tokens <= other.computed
            assert tokens % self.plan.block_size == 0
            request.key[:, :tokens] = other.key[:, :tokens]
            request.value[:, :tokens] = other.value[:, :tokens]
            request.blocks = other.blocks[: tokens // self.plan.block_size]
            request.computed = tokens
        self.requests[name] = request

    def preempt(self, name: str) -> None:
        """Take a request's blocks, which nobody else has; it starts again."""
        request = self.requests[name]
        for block in request.blocks:
            for layer in self.layers.values():
                layer.kv_cache[block].view(torch.uint8).fill_(255)
        self.free += request.blocks
        request.blocks, request.computed = [], 0

    def step(self, order: list[str] | None = None, /, **work: int) -> None:
        """Run so many tokens of each request, and check what they answer.

        Both model runners put single tokens first, and that is all the order there is, unless
        another one is given.
        """
        names = order or sorted(work, key=lambda name: (work[name] > 1, self.random.random()))
        counts = [work[name] for name in names]
        batch = [self.requests[name] for name in names]
        self.block_table[:] = self.random.randrange(1, 30)  # what an earlier batch has left
        for row, (request, count) in enumerate(zip(batch, counts, strict=True)):
            needed = -(-(request.computed + count) // self.plan.block_size)
            while len(request.blocks) < needed:
                request.blocks.append(self.free.pop(self.random.randrange(len(self.free))))
            self.block_table[row, :needed] = torch.tensor(request.blocks[:needed])
        common = self._common(batch, counts)
        metadata = self.builder.build(0, common)
        if self.graphs and max(counts) == 1:
            self.graph_steps += 1
            metadata = self.captured[common.num_reqs]
        for i, layer in enumerate(self.layers.values()):
            out = run_layer(layer, i, batch, counts, self.plan.block_size, common, metadata)
            wanted = [self._expected(i, *one) for one in zip(batch, counts, strict=True)]
            torch.testing.assert_close(out.double(), torch.cat(wanted), rtol=0, atol=TOLERANCE)
        for request, count in zip(batch, counts, strict=True):
            request.computed += count

    def _common(self, batch: list[StaticRequest], counts: list[int]) -> CommonAttentionMetadata:
        rows = len(batch) + self.padding
        if self.graphs and max(counts) == 1:
            rows = min(self.MAX_REQUESTS, len(batch) + 2)
            if rows not in self.captured:
                ones = self._metadata(list(range(rows + 1)), [1] * rows)
                self.captured[rows] = self.builder.build_for_cudagraph_capture(ones)
        starts = [0, *np.cumsum(counts).tolist()]
        starts += [starts[-1]] * (rows - len(batch))
        lens = [request.computed + n for request, n in zip(batch, counts, strict=True)]
        return self._metadata(starts, lens + [0] * (rows - len(batch)))

    def _metadata(self, starts: list[int], lens: list[int]) -> CommonAttentionMetadata:
        rows = len(lens)
        self.seq_lens[:rows] = torch.tensor(lens, dtype=torch.int32)
        self.block_table[rows:] = 0
        start = torch.tensor(starts, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=start.to(self.device),
            query_start_loc_cpu=start,
            seq_lens=self.seq_lens[:rows],
            num_reqs=rows,
            num_actual_tokens=max(rows, starts[-1]) if self.graphs else starts[-1],
            max_query_len=int(np.diff(starts).max()),
            # A graph is captured for the longest context there may be.
            max_seq_len=self.WIDTH * self.plan.block_size if self.graphs else max(lens),
            block_table_tensor=self.block_table[:rows],
            slot_mapping=torch.zeros(0, dtype=torch.int64),
        )

    def _expected(self, index: int, request: StaticRequest, count: int) -> torch.Tensor:
        """What the reference answers, over a cache of the request's own that it stores itself."""
        plan, end = self.plan, request.computed + count
        kept = self.channels[index].keys.tolist(), self.channels[index].values.tolist()
        shape = (-(-end // plan.block_size), *self.layers["model.layers.0.attn"].kv_cache.shape[1:])
        cache = torch.zeros(shape, dtype=self.spec.dtype)
        store_static_ref(
            request.key[index, :end], request.value[index, :end], cache, range(end), *kept, plan
        )
        lens = range(request.computed + 1, end + 1)
        table = torch.arange(shape[0], dtype=torch.int32)[None]
        return static_attention_ref(
            request.query[index, request.computed : end], cache, table, [0] * count, lens, *kept,
            plan, SCALE,
        )  # fmt: skip
