"""A worker's step around the CUDA backend, as vLLM's two model runners prepare it.

Requests get their blocks, and lose the tails of compacted spans, as the scheduler would do it;
freed blocks are filled with NaN, so that whoever still reads one is found out.
"""

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.support.flash import FlashStandIn, found
from tests.triton.expected import SCALE, Request
from tests.triton.layers import run_layer
from tests.triton.runners import make_runner
from think_vllm.hooks import model_runner
from think_vllm.hooks.engine import EnginePlan
from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec
from think_vllm.plan.planner import BlockPlan
from think_vllm.worker.cuda.backend import ThinkCUDABackend
from think_vllm.worker.heads import RankHeads


class Engine:
    """Scheduler and worker in one, for ``Hq`` and ``Hk`` heads and model runner 1 or 2.

    With ``graphs`` decode batches run as full CUDA graphs do: with the metadata that was built
    before, for more rows than the batch has. Without ``flash`` FlashAttention does not load.
    """

    MAX_REQUESTS = 6
    WIDTH = 40

    def __init__(
        self,
        plan: BlockPlan,
        heads: tuple[int, int],
        version: int,
        device: torch.device,
        layers: int = 1,
        graphs: bool = False,
        num_blocks: int = 120,
        seed: int = 0,
        flash: bool = True,
    ) -> None:
        self.flash = FlashStandIn() if flash else None
        self.plan, self.heads, self.version, self.device = plan, heads, version, device
        self.graphs = graphs
        self.random = random.Random(seed)
        self.requests: dict[str, Request] = {}
        self.free = list(range(1, num_blocks))
        self.holders: Counter[int] = Counter()
        self.graph_steps = 0
        self.rows = np.zeros((self.MAX_REQUESTS, self.WIDTH), np.int32)
        self.block_table = torch.zeros(self.rows.shape, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(self.MAX_REQUESTS, dtype=torch.int32, device=device)
        self.config = self._make_config(layers)
        self.layers = self._make_layers(num_blocks, layers)
        spec = FullAttentionSpec(
            block_size=plan.block_size, num_kv_heads=heads[1], head_size=plan.head_size,
            head_size_v=plan.head_size, dtype=torch.float32,
        )  # fmt: skip
        chosen = EnginePlan(plan, thin_prefixes=not plan.rule.delay_prompt, in_flight_tokens=0)
        with (
            patch("think_vllm.worker.metadata_builder.selected_engine", return_value=chosen),
            patch.object(model_runner, "track_rows") as watch,
        ):
            self.builder = ThinkCUDABackend.get_builder_cls()(
                ThinKVCacheSpec.from_dense(spec, chosen), [x.layer_name for x in self.layers],
                self.config, device,
            )  # fmt: skip
        (_, model_runner._rule, model_runner._count_cached), _ = watch.call_args
        self.runner = make_runner(version, self.config)
        self.captured: dict[int, Any] = {}

    def _make_config(self, layers: int) -> Any:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=self.MAX_REQUESTS),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            compilation_config=SimpleNamespace(static_forward_context={}),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=None,
            attention_config=SimpleNamespace(backend=AttentionBackendEnum.CUSTOM),
            use_v2_model_runner=self.version == 2,
        )

    def _make_layers(self, num_blocks: int, layers: int) -> list[Any]:
        plan, made = self.plan, []
        # Layers of a group may share one allocation.
        shape = (num_blocks, layers, self.heads[1], plan.block_size, 2 * plan.head_size)
        memory = torch.full(shape, torch.nan, device=self.device)
        with (
            patch("think_vllm.worker.cuda.impl.get_current_vllm_config"),
            # The one of a GPU has no float32.
            found(self.flash),
            patch("think_vllm.worker.cuda.impl.remember_plan", return_value=plan),
            patch(
                "think_vllm.worker.cuda.impl.rank_heads",
                return_value=RankHeads(0, self.heads[1], plan.head_size, seed=0),
            ),
        ):
            for i in range(layers):
                impl = ThinkCUDABackend.get_impl_cls()(
                    self.heads[0], plan.head_size, SCALE, self.heads[1], None, None, "auto"
                )
                layer = SimpleNamespace(layer_name=f"layer.{i}", impl=impl, kv_cache=memory[:, i])
                self.config.compilation_config.static_forward_context[layer.layer_name] = layer
                made.append(layer)
        return made

    def add(self, request: Request) -> None:
        self.requests[request.name] = request
        self.runner.admit(request.name)

    def hit(self, request: Request, other: Request, tokens: int) -> None:
        """Admit a request, or a preempted one again, with a prefix that the cache has of another's.

        Thin spans are shared. Dense blocks behind them are copied, since it will compact them.
        """
        plan = self.plan
        request.cached_spans = min(other.freed_spans, tokens // plan.span_tokens)
        request.freed_spans, request.computed = request.cached_spans, tokens
        first = request.cached_spans * plan.span_blocks
        for row, block in enumerate(other.blocks[: tokens // plan.block_size]):
            if row < first and row % plan.span_blocks >= plan.thin_blocks:
                request.blocks.append(0)
                request.gone.add(row)
            elif row < first:
                request.blocks.append(block)
                self.holders[block] += 1
            else:
                request.blocks.append(self._take())
                for layer in self.layers:
                    layer.kv_cache[request.blocks[-1]] = layer.kv_cache[block]

    def preempt(self, request: Request) -> None:
        """Take everything from a request; it starts again, its output included."""
        self._release(request, range(len(request.blocks)))
        request.blocks, request.gone = [], set()
        request.prefill_len = max(request.prompt_len, request.computed)
        request.computed = request.freed_spans = request.cached_spans = 0
        request.admitted = True
        self.runner.forget(request.name)

    def finish(self, request: Request) -> None:
        self.preempt(request)
        del self.requests[request.name]

    def _take(self) -> int:
        block = self.free.pop(self.random.randrange(len(self.free)))
        self.holders[block] += 1
        return block

    def _release(self, request: Request, rows: range) -> None:
        for row in rows:
            if row in request.gone:
                continue
            request.gone.add(row)
            block = request.blocks[row]
            self.holders[block] -= 1
            if not self.holders[block]:
                for layer in self.layers:
                    layer.kv_cache[block] = torch.nan
                self.free.append(block)

    def _allocate(self, request: Request, tokens: int) -> None:
        rule = request.rule(self.plan)
        freeable = rule.freeable_spans(request.prompt_len, request.computed, request.cached_spans)
        evicted = rule.evicted_spans(request.prompt_len)
        for span in range(request.freed_spans, freeable):
            first = span * rule.span_blocks
            kept = 0 if span < evicted else rule.thin_blocks
            # The worker's rows keep the numbers of blocks that are gone.
            self._release(request, range(first + kept, first + rule.span_blocks))
        request.freed_spans = max(request.freed_spans, freeable)
        while len(request.blocks) * self.plan.block_size < request.computed + tokens:
            request.blocks.append(self._take())

    def step(self, work: dict[str, int]) -> dict[str, torch.Tensor]:
        """Run so many tokens of each request: their outputs, [layers, tokens, Hq, D]."""
        names = list(work)
        self.random.shuffle(names)
        if self.version == 2:
            names.sort(key=lambda name: work[name])
            for name in names:
                self.add(self.requests[name])
        batch = [self.requests[name] for name in names]
        counts = [work[name] for name in names]
        for request, count in zip(batch, counts, strict=True):
            self._allocate(request, count)
        self.rows[:] = self.random.choices(range(100), k=self.WIDTH)
        for row, request in zip(self.rows, batch, strict=False):
            row[: len(request.blocks)] = request.blocks
        uniform = self.runner.announce(batch, counts, self.requests, self.rows)
        full_graph = uniform and self.graphs
        common = self._metadata(batch, counts, full_graph)
        metadata = self.builder.build(0, common)
        if full_graph:
            self.graph_steps += 1
            metadata = self.captured[common.num_reqs]
        outputs = [
            run_layer(layer, i, batch, counts, self.plan.block_size, common, metadata)
            for i, layer in enumerate(self.layers)
        ]
        result = {}
        for request, start, count in zip(batch, np.cumsum([0, *counts]), counts, strict=False):
            result[request.name] = torch.stack([out[start : start + count] for out in outputs])
            request.computed += count
            request.admitted = False
        return result

    def dummy(self, rows: int, tokens: int) -> Any:
        """Build the metadata of a run without requests, as vLLM warms up.

        The block table is an earlier batch's, and lengths may be more than the run has tokens.
        """
        self.runner.announce_dummy(tokens)
        lens = np.full(rows, tokens + 7, np.int32)
        common = self._common([tokens] * rows, rows, tokens * np.arange(rows + 1), lens, tokens)
        return self.builder.build(0, common)

    def capture(self, rows: int) -> None:
        """Build the metadata of a graph for ``rows`` rows."""
        common = self._common([0] * rows, rows, np.arange(rows + 1), np.ones(rows, np.int32), rows)
        self.captured[rows] = self.builder.build_for_cudagraph_capture(common)

    def _metadata(
        self, batch: list[Request], counts: list[int], full_graph: bool
    ) -> CommonAttentionMetadata:
        num_reqs = len(batch)
        rows = min(self.MAX_REQUESTS, num_reqs + 2) if full_graph else num_reqs
        if full_graph and rows not in self.captured:
            self.capture(rows)
        starts = np.full(rows + 1, sum(counts))
        starts[: num_reqs + 1] = np.cumsum([0, *counts])
        lens = np.zeros(rows, np.int32)
        lens[:num_reqs] = [r.computed + n for r, n in zip(batch, counts, strict=True)]
        self.block_table.copy_(torch.from_numpy(self.rows))
        self.block_table[num_reqs:rows] = 0
        return self._common(counts, rows, starts, lens, max(counts))

    def _common(self, counts, rows, starts, lens, longest) -> CommonAttentionMetadata:
        self.seq_lens[:rows] = torch.from_numpy(lens)
        self.seq_lens[rows:] = 0
        starts = torch.from_numpy(starts.astype(np.int32))
        # V1 fills both in for padding rows too, V2 for requests only.
        filled = len(counts) if self.version == 2 else rows
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=self.seq_lens[:rows],
            seq_lens_cpu_upper_bound=torch.from_numpy(lens),
            num_reqs=rows,
            num_actual_tokens=max(rows, int(starts[-1])) if self.graphs else int(starts[-1]),
            max_query_len=longest,
            max_seq_len=int(lens.max()),
            block_table_tensor=self.block_table[:rows],
            slot_mapping=torch.zeros(0, dtype=torch.int64),
            is_prefilling=torch.zeros(filled, dtype=torch.bool),
            req_idx=np.arange(filled) if self.version == 2 else None,
        )
